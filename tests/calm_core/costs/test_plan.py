"""What a run would take, against counts by hand and against a real forward pass."""

import functools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from calm_core.autoencoder.model import Autoencoder, Posterior, autoencoder_loss, draw
from calm_core.autoencoder.training import autoencoder_config
from calm_core.calm.model import Calm
from calm_core.calm.token_head import TokenHead
from calm_core.calm.training import calm_config, head_objective
from calm_core.costs.plan import Plan, plan, render_plan
from calm_core.errors import CalmError
from calm_core.nn.draws import GeneratorDraws
from calm_core.params import Params, parse_params
from calm_core.transformer.model import Transformer, next_token_loss
from calm_core.transformer.training import transformer_config

V, K = 512, 4
AE_D, AE_MLP, L = 32, 48, 16
D, MLP, LAYERS, HEAD_SIZE, KV_D, CONTEXT = 32, 56, 2, 8, 16, 64
NOISE, BLOCKS = 12, 1


def tiny(values: dict[str, Any], **sections: dict[str, Any]) -> Params:
    """Small models of known shapes, changed by ``sections``."""
    backbone = {"hidden_size": D, "intermediate_size": MLP, "layers": LAYERS, "heads": 4, "key_value_heads": 2}
    training = {"context_tokens": CONTEXT, "batch_sequences": 6, "steps": 10, "warmup_steps": 0, "optimiser": "adamw"}
    values["runtime"]["precision"] = "float32"
    values["tokenizer"]["vocabulary_size"] = V
    values["autoencoder"] |= {
        "patch_size": K,
        "hidden_size": AE_D,
        "intermediate_size": AE_MLP,
        "latent_size": L,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "batch_patches": 24,
        "steps": 5,
        "warmup_steps": 0,
        "optimiser": "adamw",
    }
    head = {"head": "energy", "head_blocks": BLOCKS, "noise_size": NOISE, "samples": 3, "target_samples": 6}
    values["calm"] |= backbone | training | head | {"decoder_score": False, "input": "tokens", "alpha": 1.0}
    values["transformer"] |= backbone | training | {"steps": 7}
    for name, changes in sections.items():
        values[name] |= changes
    return parse_params(values)


def make(params: Params, devices: int = 2) -> Plan:
    """The plan at half of 1e12 FLOPs a second; several tests look at the same ones."""
    return _make(params.model_dump_json(), devices)


@functools.cache
def _make(params: str, devices: int) -> Plan:
    return plan(Params.model_validate_json(params), devices, 1e12, 0.5)


AE_LAYER = 3 * AE_D * AE_MLP
AE_PARAMETERS = (
    V * AE_D
    + 4 * (AE_LAYER + AE_D)
    + (K * AE_D**2 + AE_D)
    + (2 * L * AE_D + 2 * L)
    + (L * AE_D + AE_D)
    + (K * AE_D**2 + K * AE_D)
    + 2 * AE_D
)
LAYER_WEIGHTS = LAYERS * (2 * D**2 + 2 * D * KV_D + 3 * D * MLP)
BACKBONE_PARAMETERS = LAYER_WEIGHTS + LAYERS * 2 * D + D
TRANSFORMER_PARAMETERS = BACKBONE_PARAMETERS + 2 * V * D
INPUT_WEIGHTS = K * D * 2 * D + 2 * D * D
HEAD_WEIGHTS = NOISE * D + D * D + BLOCKS * 6 * D * D + D * D + D * L
HEAD_VECTORS = 2 * D + 4 * D + BLOCKS * (2 * D + 5 * D) + 2 * D + D + L
CALM_PARAMETERS = V * D + INPUT_WEIGHTS + (3 * D + 2 * D) + BACKBONE_PARAMETERS + HEAD_WEIGHTS + HEAD_VECTORS


def test_parameters_and_flops_by_hand(values: dict[str, Any]) -> None:
    result = make(tiny(values))
    assert result.autoencoder.parameters == AE_PARAMETERS
    assert result.calm.parameters == CALM_PARAMETERS
    assert result.transformer.parameters == TRANSFORMER_PARAMETERS

    # One layer of each half: by token (K times) and by patch; the output matrix K times.
    encoder = (K + 1) * AE_LAYER + K * AE_D**2 + 2 * L * AE_D
    decoder = (K + 1) * AE_LAYER + K * AE_D**2 + L * AE_D + K * V * AE_D
    assert result.autoencoder.training_tokens == 5 * 24 * K
    assert result.autoencoder.training_flops == pytest.approx(3 * 2 * (encoder + decoder) / K * 5 * 24 * K)
    assert result.autoencoder.inference_flops_per_token == 2 * decoder / K

    forward = 2 * (LAYER_WEIGHTS + D * V) + 4 * CONTEXT * D * LAYERS
    assert result.transformer.training_flops == 3 * forward * 7 * 6 * CONTEXT
    assert result.transformer.inference_flops_per_token == forward

    backbone = 2 * (LAYER_WEIGHTS + INPUT_WEIGHTS) + 4 * (CONTEXT // K) * D * LAYERS
    training = 3 * (backbone + 3 * 2 * HEAD_WEIGHTS) / K
    assert result.calm.training_flops == pytest.approx(training * 10 * 6 * CONTEXT)
    assert result.calm.inference_flops_per_token == (backbone + 2 * HEAD_WEIGHTS + 2 * decoder) / K


def test_a_token_head_by_hand(values: dict[str, Any]) -> None:
    size, intermediate = 24, 40
    head = {"head": "tokens", "token_hidden_size": size, "token_intermediate_size": intermediate, "token_layers": 2}
    calm = make(tiny(values, calm=head)).calm
    # Each token reads the K of the patch before and those before it in its own.
    earlier, layers = (K * K + K * (K - 1) // 2) * size**2, 2 * 3 * size * intermediate
    weights = K * D * size + K * size + V * size + earlier + layers + 3 * size + V * size
    assert calm.parameters == CALM_PARAMETERS - HEAD_WEIGHTS - HEAD_VECTORS + weights
    forward = 2 * (LAYER_WEIGHTS + INPUT_WEIGHTS + K * D * size + earlier + K * (layers + V * size))
    forward += 4 * (CONTEXT // K) * D * LAYERS
    assert calm.training_flops == pytest.approx(3 * forward / K * 10 * 6 * CONTEXT)
    assert calm.inference_flops_per_token == forward / K
    assert calm.memory_ddp.frozen_bytes == 0


def test_hours(values: dict[str, Any]) -> None:
    few, many = make(tiny(values), devices=2), make(tiny(values), devices=100)
    for slow, fast in zip((few.autoencoder, few.calm), (many.autoencoder, many.calm), strict=True):
        assert slow.training_hours == pytest.approx(slow.training_flops / (2 * 0.5e12) / 3600)
        assert fast.training_hours == pytest.approx(slow.training_hours / 50)
    # A step of 24 patches leaves none to some of 100 devices.
    assert (few.autoencoder_patches, many.autoencoder_patches) == (12, 1)


def test_weights_gradients_and_optimiser_state(values: dict[str, Any]) -> None:
    result = make(tiny(values, transformer={"optimiser": "muon"}), devices=3)
    for model in (result.autoencoder, result.calm):
        assert model.memory_ddp.weights_bytes == model.memory_ddp.gradients_bytes == 4 * model.parameters
        assert model.memory_ddp.optimiser_bytes == 8 * model.parameters
        assert model.memory_sharded.optimiser_bytes == math.ceil(8 * model.parameters / 3)
        assert model.memory_sharded.activations_bytes == model.memory_ddp.activations_bytes
    # Muon takes the matrices between the layers; embedding, output and gains stay with AdamW.
    others = TRANSFORMER_PARAMETERS - LAYER_WEIGHTS
    assert result.transformer.memory_ddp.optimiser_bytes == 4 * LAYER_WEIGHTS + 8 * others
    assert result.calm.memory_ddp.frozen_bytes == result.calm.memory_sharded.frozen_bytes == 4 * AE_PARAMETERS
    assert result.autoencoder.memory_ddp.frozen_bytes == result.transformer.memory_ddp.frozen_bytes == 0


def test_autocast_copies_each_matrix_once(values: dict[str, Any]) -> None:
    full = make(tiny(values))
    half = make(tiny(values, runtime={"precision": "auto"}))
    assert (full.precision, half.precision) == ("float32", "bfloat16")
    # Beside the copies: the rotary cosines and sines, and the gradient of the output matrix, made with the loss.
    constant = 2 * 4 * CONTEXT * HEAD_SIZE + 4 * V * D
    before, after = full.transformer.memory_ddp, half.transformer.memory_ddp
    assert before.weight_copies_bytes == constant
    assert after.weight_copies_bytes == constant + 2 * LAYER_WEIGHTS
    assert after.activations_bytes < before.activations_bytes


def kept_in_memory(model: nn.Module, loss: Callable[[], Tensor], precision: str) -> int:
    """Bytes of real memory that autograd holds for the backward pass, by address, parameters left out."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr() - tensor.storage_offset() * tensor.element_size()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "auto"),
    ):
        loss()
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in addresses)


# Autocast's layer norm keeps two statistics a position in float32 where fake tensors say bfloat16.
TOLERANCE = 1e-3


@pytest.mark.parametrize(
    ("precision", "head"),
    [
        ("float32", {}),
        ("auto", {}),
        ("float32", {"alpha": 1.5, "input": "latents"}),
        ("auto", {"decoder_score": True}),
        ("auto", {"head": "diffusion"}),
        ("float32", {"head": "flow"}),
        ("float32", {"head": "tokens"}),
        ("auto", {"head": "tokens"}),
    ],
)
def test_calm_keeps_what_is_planned(values: dict[str, Any], precision: str, head: dict[str, Any]) -> None:
    params = tiny(values, calm=head, runtime={"precision": precision})
    coder = autoencoder_config(params.autoencoder, V)
    model, autoencoder = Calm(calm_config(params.calm, coder)), Autoencoder(coder).requires_grad_(False)
    objective = head_objective(params.calm, autoencoder)
    generator = torch.Generator().manual_seed(0)

    def loss(sequences: int) -> Tensor:
        shape = (sequences, CONTEXT // K)
        if params.calm.input == "tokens":
            inputs = torch.randint(V, (*shape, K), generator=generator)
        else:
            inputs = torch.randn(*shape, L, generator=generator)
        if isinstance(model.head, TokenHead):
            return model.head.loss(model(inputs), inputs, inputs)
        hidden_states = model(inputs).flatten(0, 1)
        posterior = Posterior(*torch.randn(2, math.prod(shape), L, generator=generator))
        draws = model.head.training_draws(math.prod(shape), objective, GeneratorDraws(generator))
        return model.head.loss(hidden_states, posterior, draws, objective).total

    # The frozen autoencoder's weights are no activations: its own and CALM's parameters are left out together.
    everything = nn.ModuleList([model, autoencoder])
    memory = make(params).calm.memory_ddp
    for sequences in (2, 5):
        kept = kept_in_memory(everything, lambda count=sequences: loss(count), precision)
        assert memory.weight_copies_bytes + sequences * memory.activations_bytes == pytest.approx(kept, rel=TOLERANCE)


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_the_others_keep_what_is_planned(values: dict[str, Any], precision: str) -> None:
    params = tiny(values, runtime={"precision": precision})
    result = make(params)
    generator = torch.Generator().manual_seed(0)
    transformer = Transformer(transformer_config(params.transformer, V))
    token_ids = torch.randint(V, (4, CONTEXT + 1), generator=generator)
    memory = result.transformer.memory_ddp
    kept = kept_in_memory(transformer, lambda: next_token_loss(transformer, token_ids), precision)
    assert memory.weight_copies_bytes + 4 * memory.activations_bytes == kept

    coder = autoencoder_config(params.autoencoder, V)
    autoencoder = Autoencoder(coder)
    patches = torch.randint(V, (24 // 2, K), generator=generator)
    draws = draw(coder, len(patches), GeneratorDraws(generator))
    memory = result.autoencoder.memory_ddp
    kept = kept_in_memory(autoencoder, lambda: autoencoder_loss(autoencoder, patches, draws).total, precision)
    assert memory.weight_copies_bytes + memory.activations_bytes == kept


def test_activations_grow_linearly_with_the_context(values: dict[str, Any]) -> None:
    short = make(tiny(values))
    long = make(tiny(values, calm={"context_tokens": 8 * CONTEXT}, transformer={"context_tokens": 8 * CONTEXT}))
    for before, after in ((short.calm, long.calm), (short.transformer, long.transformer)):
        ratio = after.memory_ddp.activations_bytes / before.memory_ddp.activations_bytes
        assert ratio == pytest.approx(8, rel=0.01)


def test_a_batch_of_any_size_is_planned_at_once(values: dict[str, Any]) -> None:
    # So many logits that going through the larger batch, block by block, would take days.
    vocabulary = {"vocabulary_size": 1 << 20}
    small = make(tiny(values, tokenizer=vocabulary)).autoencoder.memory_ddp
    large = make(tiny(values, tokenizer=vocabulary, autoencoder={"batch_patches": 24 * 400_000})).autoencoder.memory_ddp
    assert large.activations_bytes == 400_000 * small.activations_bytes


def test_disk(values: dict[str, Any]) -> None:
    corpus = make(tiny(values)).corpus
    tokens = 10 * 6 * CONTEXT
    assert corpus.tokens == tokens
    assert corpus.token_bytes == 2 * tokens
    assert corpus.latent_bytes == tokens // K * (2 * L * 2 + 4)
    longer = make(tiny(values, transformer={"steps": 20}, tokenizer={"vocabulary_size": (1 << 16) + 1})).corpus
    assert longer.token_bytes == 4 * 2 * tokens
    online = make(tiny(values, calm={"latents": "online"})).corpus
    assert (online.token_bytes, online.latent_bytes) == (2 * tokens, 0)


def test_a_micro_batch_is_the_devices_part_of_a_pass(values: dict[str, Any]) -> None:
    # Batches of 24 patches and of 6 sequences, for 2 devices in 3 passes; 4 devices leave some without a sequence.
    params = tiny(values, runtime={"gradient_accumulation": 3})
    result = make(params, devices=2)
    assert [result.autoencoder.micro_batch, result.calm.micro_batch, result.transformer.micro_batch] == [4, 1, 1]
    assert result.calm.micro_batch_bytes == result.calm.memory_ddp.total_bytes
    whole = make(tiny(values, runtime={"gradient_accumulation": 1}), devices=1)
    for model in (whole.calm, whole.transformer):
        assert model.micro_batch == 6
        assert model.micro_batch_bytes == model.memory_ddp.total_bytes + 5 * model.memory_ddp.activations_bytes
    assert whole.autoencoder.micro_batch_bytes == whole.autoencoder.memory_ddp.total_bytes


def test_nothing_is_allocated(values: dict[str, Any]) -> None:
    wide = {"hidden_size": 1 << 16, "intermediate_size": 1 << 18, "context_tokens": 1 << 16}
    memory = make(tiny(values, transformer=wide)).transformer.memory_ddp
    assert memory.weights_bytes > 5e11
    assert memory.activations_bytes > 1e11


def test_json_holds_plain_numbers_and_the_table_all_models(values: dict[str, Any]) -> None:
    result = make(tiny(values))
    written = json.loads(result.model_dump_json())
    memory = written["calm"]["memory_sharded"]
    assert memory["total_bytes"] == sum(value for name, value in memory.items() if name != "total_bytes")
    assert written["transformer"]["parameters"] == TRANSFORMER_PARAMETERS
    assert Plan.model_validate_json(result.model_dump_json()) == result
    console = Console(width=100)
    with console.capture() as captured:
        console.print(render_plan(result))
    for text in (
        "autoencoder",
        "CALM",
        "Transformer",
        f"{TRANSFORMER_PARAMETERS / 1e6:.3f} M",
        "1.00e12",
        "0.5 of the peak",
        "float32",
    ):
        assert text in captured.get(), text


def test_a_plan_names_what_it_leaves_out(values: dict[str, Any]) -> None:
    values["evaluation"]["beside"] = ["one", "two"]
    result = make(tiny(values))
    assert result.beside == ["one", "two"]
    console = Console(width=100)
    with console.capture() as captured:
        console.print(render_plan(result))
    assert "Not counted: CALM under one, two, too (evaluation.beside)." in captured.get()


@pytest.mark.parametrize(
    ("devices", "device_flops", "utilisation", "message"),
    [
        (0, 1e12, 0.5, "devices is 0"),
        (1, 0.0, 0.5, "FLOPs a second are 0.0"),
        (1, math.nan, 0.5, "FLOPs a second are nan"),
        (1, 1e12, 0.0, "utilisation is 0.0"),
        (1, 1e12, 40.0, "utilisation is 40.0"),
    ],
)
def test_mistakes(params: Params, devices: int, device_flops: float, utilisation: float, message: str) -> None:
    with pytest.raises(CalmError, match=message) as caught:
        plan(params, devices, device_flops, utilisation)
    assert "\n" not in str(caught.value)
