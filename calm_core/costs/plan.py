"""An estimate of what a run takes, without training: FLOPs, hours, memory and disk (paper, sections 6 and 7).

Notable:
- FLOPs are those of ``flops``, in the paper's accounting;
- activations are counted, not estimated: the training's own forward pass runs on fake tensors, which have
  shapes and storages but no memory, and what autograd keeps for the backward pass is added up;
- the optimiser state follows from the optimisers that the training would build;
- a model of any size is planned within seconds on any machine.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, computed_field
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from calm_core import params as sections
from calm_core.autoencoder.model import Autoencoder, Posterior, autoencoder_loss, draw
from calm_core.autoencoder.training import autoencoder_config
from calm_core.calm.model import Calm
from calm_core.calm.token_head import TokenHead
from calm_core.calm.training import calm_config, head_objective
from calm_core.costs.flops import (
    ModelFlops,
    autoencoder_flops,
    calm_flops,
    transformer_flops,
)
from calm_core.costs.matching import with_matched_steps
from calm_core.costs.run_shapes import scored_targets
from calm_core.errors import CalmError
from calm_core.latents.shards import latent_bytes
from calm_core.nn.draws import GeneratorDraws
from calm_core.params import Params
from calm_core.runtime.precision import autocast
from calm_core.training.optimisers import Muon, build_optimisers
from calm_core.transformer.model import Transformer, next_token_loss
from calm_core.transformer.training import transformer_config

FLOAT32_BYTES = 4
ADAMW_STATES, MUON_STATES = 2, 1
"""Float32 numbers that each optimiser keeps for a parameter."""

MEMORY_LABELS = {
    "weights_bytes": "weights",
    "gradients_bytes": "gradients",
    "optimiser_bytes": "optimiser state",
    "frozen_bytes": "frozen autoencoder",
    "weight_copies_bytes": "copies of weights",
    "activations_bytes": "activations",
}


UNITS = ("patches", "sequences", "sequences")
"""What the rows of the three models' batches are."""


class Figures(BaseModel):
    """Plain numbers, units in their names; ``model_dump_json`` writes them."""

    model_config = ConfigDict(frozen=True)


class DeviceMemory(Figures):
    """Bytes that one device holds between the forward and the backward pass of one sequence."""

    weights_bytes: int
    gradients_bytes: int
    optimiser_bytes: int
    frozen_bytes: int
    """Weights of the autoencoder beside CALM, whole on every device."""
    weight_copies_bytes: int
    """What autograd keeps whatever the batch: the output matrix's gradient and, under autocast, weights in bf16."""
    activations_bytes: int
    """What autograd keeps of one sequence; of the autoencoder, of a device's share of a step's patches."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total_bytes(self) -> int:
        """The sum of the others."""
        return sum(getattr(self, name) for name in type(self).model_fields)


class ModelPlan(Figures):
    """What training one model takes."""

    parameters: int
    training_tokens: int
    training_flops: float
    inference_flops_per_token: float
    """Of the autoencoder: decoding."""
    training_hours: float
    memory_ddp: DeviceMemory
    """Every device holds everything."""
    memory_sharded: DeviceMemory
    """Weights, gradients and optimiser state are spread evenly over the devices, as FSDP does."""
    micro_batch: int
    """Sequences (patches) that a device takes in a pass: its part of the batch by ``runtime.gradient_accumulation``."""
    micro_batch_bytes: int
    """What ``memory_ddp`` is with all of them instead of one sequence (a device's patches)."""


class CorpusPlan(Figures):
    """Disk for one epoch over the training tokens of CALM or the Transformer, whichever sees more."""

    tokens: int
    token_bytes: int
    latent_bytes: int
    """An upper bound, as if no patch occurred twice; 0 where they are computed in each step."""


class Plan(Figures):
    """What a run takes, after what that rests on."""

    devices: int
    device_flops_per_second: float
    utilisation: float
    precision: Literal["float32", "bfloat16"]
    """Of matrix products."""
    autoencoder_patches: int
    """Those of a training step that a device takes."""
    autoencoder: ModelPlan
    calm: ModelPlan
    transformer: ModelPlan
    corpus: CorpusPlan
    seeds: int
    """How often all are trained; the figures are those of once."""
    beside: list[str]
    """Presets whose CALM is trained, too; it is in none of the figures."""


def plan(params: Params, devices: int, device_flops: float, utilisation: float) -> Plan:
    """What the run that ``params`` describes would take.

    Each of ``devices`` could do ``device_flops`` floating-point operations a second and does the share
    ``utilisation`` of them. Precision auto is taken as bfloat16, the vocabulary to be as large as ``params`` says.

    Raises:
        CalmError: ``devices`` is below 1, ``device_flops`` no positive number, ``utilisation`` outside (0, 1]; or as
            ``with_matched_steps``.
    """
    params = with_matched_steps(params)
    if devices < 1:
        raise CalmError(f"devices is {devices}; it must be 1 or more")
    if not 0 < device_flops < math.inf:
        raise CalmError(f"device FLOPs a second are {device_flops}; they must be above 0, as 989e12")
    if not 0 < utilisation <= 1:
        raise CalmError(f"utilisation is {utilisation}; it must be above 0 and at most 1")
    precision: Literal["float32", "bfloat16"] = "float32" if params.runtime.precision == "float32" else "bfloat16"
    # A language model is planned with one sequence a device; patches are small, so the autoencoder with all of a
    # device's share of a step.
    patches = max(1, params.autoencoder.batch_patches // devices)

    def model_plan(run: _Training, trained: bool = True) -> ModelPlan:
        of_one = _memory(run, precision)
        memory = of_one.model_copy(update={"activations_bytes": run.batch * of_one.activations_bytes})
        micro_batch = max(1, run.rows // (devices * params.runtime.gradient_accumulation))
        training_tokens = run.section.training_tokens if trained else 0
        training_flops = run.flops.training_per_token * training_tokens
        return ModelPlan(
            parameters=run.flops.parameters,
            training_tokens=training_tokens,
            training_flops=training_flops,
            inference_flops_per_token=run.flops.inference_per_token,
            training_hours=training_flops / (devices * device_flops * utilisation) / 3600,
            memory_ddp=memory,
            memory_sharded=sharded(memory, devices),
            micro_batch=micro_batch,
            micro_batch_bytes=of_one.total_bytes + (micro_batch - 1) * of_one.activations_bytes,
        )

    # The diffusion head's schedule comes from numpy: real tensors, a thousand numbers each.
    with FakeTensorMode(allow_non_fake_inputs=True):
        return Plan(
            devices=devices,
            device_flops_per_second=device_flops,
            utilisation=utilisation,
            precision=precision,
            autoencoder_patches=patches,
            autoencoder=model_plan(_autoencoder_training(params, patches), not params.calm.has_given_autoencoder),
            calm=model_plan(_calm_training(params)),
            transformer=model_plan(_transformer_training(params)),
            corpus=_corpus_plan(params),
            seeds=1 + len(params.evaluation.seeds),
            beside=params.evaluation.beside,
        )


def render_plan(plan: Plan) -> RenderableType:
    """``plan`` as a table to read, and under it what it rests on."""
    models = (plan.autoencoder, plan.calm, plan.transformer)
    table = Table("", "autoencoder", "CALM", "Transformer")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, cells: Iterable[str], end_section: bool = False) -> None:
        table.add_row(name, *cells, end_section=end_section)

    row("parameters", (_millions(model.parameters) for model in models))
    row("training tokens", (_power(model.training_tokens) for model in models))
    row("training FLOPs", (_power(model.training_flops) for model in models))
    row("inference FLOPs a token", (_power(model.inference_flops_per_token) for model in models))
    row("training time", (_duration(model.training_hours) for model in models), end_section=True)
    for name, label in MEMORY_LABELS.items():
        row(label, (_bytes(getattr(model.memory_ddp, name)) for model in models))
    row("memory a device, DDP", (_bytes(model.memory_ddp.total_bytes) for model in models))
    row("memory a device, sharded", (_bytes(model.memory_sharded.total_bytes) for model in models), end_section=True)
    row("micro-batch", (f"{model.micro_batch:,} {unit}" for model, unit in zip(models, UNITS, strict=True)))
    row("memory of it, DDP", (_bytes(model.micro_batch_bytes) for model in models))
    corpus = plan.corpus
    latents = f"at most {_bytes(corpus.latent_bytes)} of latents (no patch occurs twice)"
    notes = (
        f"Disk, for one epoch over {_power(corpus.tokens)} tokens: {_bytes(corpus.token_bytes)} of tokens, "
        f"{latents if corpus.latent_bytes else 'no latents, which each step computes'}.",
        f"Devices: {plan.devices}, of {_power(plan.device_flops_per_second)} FLOPs a second at {plan.utilisation:.3g} "
        f"of the peak; matrix products in {plan.precision}, weights and optimiser state in float32.",
        "Activations are what the backward pass needs of one sequence (autoencoder: of "
        f"{plan.autoencoder_patches} patches); sharding spreads weights, gradients and optimiser state alone. "
        "Encoding and evaluation are not counted. A micro-batch is what a device takes at once, by "
        "runtime.gradient_accumulation.",
        *([f"All are trained {plan.seeds} times, once a seed (evaluation.seeds)."] if plan.seeds > 1 else []),
        *([f"Not counted: CALM under {', '.join(plan.beside)}, too (evaluation.beside)."] if plan.beside else []),
    )
    return Group(table, *(Text(note) for note in notes))


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of ``forward``: distinct storages but those of ``parameters``."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Holding the storage keeps its address from being given to another.
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    for parameter in parameters:
        # Weights are saved too, as themselves, and counted elsewhere.
        storages.pop(parameter.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values())


def sharded(memory: DeviceMemory, devices: int) -> DeviceMemory:
    """``memory`` of DDP with weights, gradients and optimiser state spread evenly over ``devices``, as FSDP does."""
    spread = ("weights_bytes", "gradients_bytes", "optimiser_bytes")
    return memory.model_copy(update={name: math.ceil(getattr(memory, name) / devices) for name in spread})


class _Training(NamedTuple):
    """One training on fake tensors; ``loss`` is that of so many sequences (autoencoder: patches).

    ``rows`` of them are a step's batch, and ``batch`` are planned for a device.
    """

    section: sections.AutoencoderParams | sections.LanguageModelParams
    flops: ModelFlops
    model: nn.Module
    loss: Callable[[int], Tensor]
    rows: int
    batch: int = 1
    frozen: tuple[nn.Parameter, ...] = ()


def _autoencoder_training(params: Params, patches: int) -> _Training:
    section = params.autoencoder
    config = autoencoder_config(section, params.tokenizer.vocabulary_size)
    model = Autoencoder(config)

    def loss(patches: int) -> Tensor:
        token_ids = torch.zeros(patches, config.patch_size, dtype=torch.int64)
        draws = draw(config, patches, GeneratorDraws(torch.Generator()))
        return autoencoder_loss(model, token_ids, draws).total

    return _Training(section, autoencoder_flops(config), model, loss, section.batch_patches, patches)


def _calm_training(params: Params) -> _Training:
    section = params.calm
    coder = autoencoder_config(params.autoencoder, params.tokenizer.vocabulary_size)
    config = calm_config(section, coder)
    context = section.context_tokens // config.patch_size
    model, autoencoder = Calm(config), Autoencoder(coder).requires_grad_(False)
    objective = head_objective(section, autoencoder)
    flops = calm_flops(config, coder, context, section.samples, scored_targets(section))

    def loss(sequences: int) -> Tensor:
        positions = sequences * context
        patches = torch.zeros(sequences, context, config.patch_size, dtype=torch.int64)
        if isinstance(model.head, TokenHead):
            return model.head.loss(model(patches), patches, patches)
        latents = torch.zeros(sequences, context, config.latent_size)
        hidden_states = model(model.inputs(patches, autoencoder, latents)).flatten(0, 1)
        draws = model.latent_head.training_draws(positions, objective, GeneratorDraws(torch.Generator()))
        posterior = Posterior(*torch.zeros(2, positions, config.latent_size))
        return model.latent_head.loss(hidden_states, posterior, draws, objective).total

    frozen = tuple(autoencoder.parameters()) if section.needs_autoencoder else ()
    return _Training(section, flops, model, loss, section.batch_sequences, frozen=frozen)


def _transformer_training(params: Params) -> _Training:
    section = params.transformer
    config = transformer_config(section, params.tokenizer.vocabulary_size)
    model = Transformer(config)

    def loss(sequences: int) -> Tensor:
        return next_token_loss(model, torch.zeros(sequences, section.context_tokens + 1, dtype=torch.int64))

    return _Training(section, transformer_flops(config, section.context_tokens), model, loss, section.batch_sequences)


def _memory(run: _Training, precision: Literal["float32", "bfloat16"]) -> DeviceMemory:
    """That of one sequence or patch."""

    def saved(batch: int) -> int:
        with autocast(precision, torch.device("cpu")):
            return saved_bytes(lambda: run.loss(batch), (*run.model.parameters(), *run.frozen))

    # What autograd keeps is linear in the batch, so two small ones tell what grows with it from what does not. From 2
    # on: in a batch of 1, targets are a view of the inputs.
    twice, thrice = saved(2), saved(3)
    of_one = thrice - twice
    weights = FLOAT32_BYTES * run.flops.parameters
    return DeviceMemory(
        weights_bytes=weights,
        gradients_bytes=weights,
        optimiser_bytes=_optimiser_bytes(run.model, run.section),
        frozen_bytes=FLOAT32_BYTES * _count(run.frozen),
        weight_copies_bytes=twice - 2 * of_one,
        activations_bytes=of_one,
    )


def _optimiser_bytes(model: nn.Module, section: sections.TrainingParams) -> int:
    numbers = 0
    for optimiser in build_optimisers(model, section):
        states = MUON_STATES if isinstance(optimiser, Muon) else ADAMW_STATES
        numbers += states * sum(_count(group["params"]) for group in optimiser.param_groups)
    return FLOAT32_BYTES * numbers


def _corpus_plan(params: Params) -> CorpusPlan:
    tokens = max(params.calm.training_tokens, params.transformer.training_tokens)
    patches = tokens // params.autoencoder.patch_size
    # As ``TokenWriter`` chooses.
    bytes_per_token = 2 if params.tokenizer.vocabulary_size <= 1 << 16 else 4
    return CorpusPlan(
        tokens=tokens,
        token_bytes=bytes_per_token * tokens,
        # As if every patch were distinct: how many are is known only once the corpus is encoded.
        latent_bytes=0
        if params.calm.latents == "online"
        else latent_bytes(patches, patches, params.autoencoder.latent_size),
    )


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count / 1e6:.3f} M"


def _power(value: float) -> str:
    """5.24e11."""
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits}e{int(exponent)}"


def _bytes(value: float) -> str:
    """In the largest decimal unit that leaves 1 or more."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return "< 1 min"
    if hours < 1:
        return f"{60 * hours:.1f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
