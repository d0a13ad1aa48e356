"""Scaling on paper: CALM-M to CALM-XL on 8 to 1024 GPUs; FLOPs, memory, communication, disk, time (paper, section 7).

FLOPs, memory and disk are ``costs.plan``'s; what is added is how a step's batch goes round, what the GPUs send one
another and how long that takes. The machine is one on paper: H100 SXM GPUs in nodes of 8, an InfiniBand port each.
"""

from typing import NamedTuple

from calm_core.costs.plan import FLOAT32_BYTES, MEMORY_LABELS, DeviceMemory, ModelPlan, plan, sharded
from calm_core.params import Params
from calm_core.presets import load_preset

MODELS, GPUS = ("calm-m", "calm-l", "calm-xl"), (8, 64, 256, 1024)
PEAK_FLOPS, UTILISATION = 989e12, 0.4
"""Dense bf16 FLOPs a second of a GPU, and the share of them that a training step reaches, in the paper's count."""
MEMORY_BYTES, USABLE_MEMORY = 80e9, 0.9
"""Of a GPU, and the share that tensors may fill; CUDA, NCCL and fragmentation take the rest."""
NODE = 8
"""GPUs of a node."""
NVLINK, INFINIBAND, BANDWIDTH_SHARE = 450e9, 50e9, 0.8
"""Bytes a second that a GPU can send within its node and out of it, and the share of them that collectives reach."""
BFLOAT16_BYTES = 2


class Estimate(NamedTuple):
    """One model trained in one way on so many GPUs; bytes are those of one GPU, times those of one step."""

    model: str
    gpus: int
    way: str
    """DDP (a whole copy on each GPU) or FSDP (weights, gradients and optimiser state spread over all)."""
    sequences: int
    """Of a step, on all GPUs together."""
    at_once: int
    """Sequences that go forward and backward together on a GPU; 0: not even one fits."""
    memory_bytes: float
    sent_bytes: float
    compute_seconds: float
    communication_seconds: float
    hours: float
    """Of the whole training, where nothing is sent while something is computed."""


def ddp_bytes(parameters: int, gpus: int) -> float:
    """Bytes that a GPU sends in a step: one ring all-reduce of the float32 gradients, 2 (n - 1) / n * 4 P."""
    return 2 * (gpus - 1) / gpus * FLOAT32_BYTES * parameters


def fsdp_bytes(parameters: int, gpus: int, passes: int) -> float:
    """Bytes that a GPU sends in a step of ``passes`` forward and backward passes: (n - 1) / n * (2 + 2 + 4) P for each.

    bf16 weights are gathered before the forward and again before the backward pass, float32 gradients scattered after.
    """
    return passes * (gpus - 1) / gpus * (2 * BFLOAT16_BYTES + FLOAT32_BYTES) * parameters


def ring_seconds(sent_bytes: float, gpus: int) -> float:
    """Time in which each of ``gpus`` sends ``sent_bytes`` round rings, latency left out.

    Beyond one node a ring leaves each node once, and as many rings as a node has ports share the bytes.
    """
    bandwidth = NVLINK if gpus <= NODE else min(NVLINK, NODE * INFINIBAND)
    return sent_bytes / (bandwidth * BANDWIDTH_SHARE)


def sequences_at_once(memory: DeviceMemory, share: int, limit: float = MEMORY_BYTES * USABLE_MEMORY) -> int:
    """The largest power of two, at most ``share``, whose activations fit beside the rest in ``limit`` bytes; or 0."""
    room = (limit - memory.total_bytes + memory.activations_bytes) // memory.activations_bytes
    fitting = min(share, int(room))
    return 1 << (fitting.bit_length() - 1) if fitting > 0 else 0


def estimate(name: str, params: Params, model: ModelPlan, gpus: int, way: str) -> Estimate:
    """Training ``model``, the CALM of ``params``, on ``gpus`` GPUs.

    A GPU takes whole sequences; where a step has fewer than there are GPUs, it gets one for each, and steps get fewer.
    """
    sequences = max(params.calm.batch_sequences, gpus)
    steps = model.training_tokens / (sequences * params.calm.context_tokens)
    memory = model.memory_ddp if way == "DDP" else sharded(model.memory_ddp, gpus)
    share = sequences // gpus
    at_once = sequences_at_once(memory, share)
    batch = max(1, at_once)
    sent = ddp_bytes(model.parameters, gpus) if way == "DDP" else fsdp_bytes(model.parameters, gpus, share // batch)
    held = memory.total_bytes + (batch - 1) * memory.activations_bytes
    compute = model.training_flops / steps / (gpus * PEAK_FLOPS * UTILISATION)
    communication = ring_seconds(sent, gpus)
    hours = steps * (compute + communication) / 3600
    return Estimate(name, gpus, way, sequences, at_once, held, sent, compute, communication, hours)


def paper_tables() -> tuple[str, list[Estimate]]:
    """Three Markdown tables, of the models, of their memory and of their trainings; and the rows of the third."""
    models = [_row("model", "parameters", "FLOPs", "GPU-days of computing", "checkpoint", "tokens", "latents")]
    memories = [_row("model", *MEMORY_LABELS.values(), "total")]
    trainings = [
        _row(
            "model", "GPUs", "", "sequences a step (at once)", "memory", "sent", "computing", "sending", "ratio", "time"
        )
    ]
    for lines in (models, memories, trainings):
        lines.append(_row(*["---"] * (lines[0].count("|") - 1)))
    rows: list[Estimate] = []
    for name in MODELS:
        params = load_preset(name)
        # The presets encode online; the table says what encoding ahead would take.
        encoded = params.model_copy(update={"calm": params.calm.model_copy(update={"latents": "encoded"})})
        made = plan(encoded, 1, PEAK_FLOPS, UTILISATION)
        calm, memory, label = made.calm, made.calm.memory_ddp, name.upper()
        checkpoint = memory.weights_bytes + memory.optimiser_bytes
        disk = (f"{made.corpus.token_bytes / 1e12:.1f} TB", f"{made.corpus.latent_bytes / 1e12:.1f} TB")
        days = f"{calm.training_hours / 24:.1f}"
        models.append(
            _row(
                label,
                f"{calm.parameters / 1e6:.0f} M",
                f"{calm.training_flops:.2e}",
                days,
                _gigabytes(checkpoint),
                *disk,
            )
        )
        held = [getattr(memory, part) for part in MEMORY_LABELS]
        memories.append(_row(label, *map(_gigabytes, held), _gigabytes(memory.total_bytes)))
        rows += [estimate(label, params, calm, gpus, way) for gpus in GPUS for way in ("DDP", "FSDP")]
    for row in rows:
        times = [f"{1e3 * seconds:.0f} ms" for seconds in (row.compute_seconds, row.communication_seconds)]
        times += [f"{row.communication_seconds / row.compute_seconds:.0%}", f"{row.hours:.3g} h"]
        batch = f"{row.sequences} ({row.at_once or 'none fits'})"
        sizes = (_gigabytes(row.memory_bytes), _gigabytes(row.sent_bytes))
        trainings.append(_row(row.model, str(row.gpus), row.way, batch, *sizes, *times))
    return "\n\n".join("\n".join(lines) for lines in (models, memories, trainings)), rows


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB"
