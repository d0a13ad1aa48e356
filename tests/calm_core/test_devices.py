"""Everything that makes tensors, with the model on a device that is not the CPU: the pretend device, and CUDA.

A mask, a generator or a position that is made on the CPU fails on both. What is drawn before is the same on both, and
so are the results, up to rounding. What is sampled on the device follows the distribution that the models were made
for; on the pretend device it is what the CPU samples.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn

from calm_core.autoencoder.model import AutoencoderDraws, Posterior, autoencoder_loss
from calm_core.autoencoder.training import reconstruction, train_autoencoder
from calm_core.calm.denoiser import DenoisingDraws
from calm_core.calm.diffusion_head import DiffusionHeadConfig
from calm_core.calm.energy_head import EnergyDraws, EnergyHeadConfig
from calm_core.calm.flow_head import FlowHeadConfig
from calm_core.calm.head import HeadConfig, HeadObjective
from calm_core.calm.training import manifold_distance, train_calm
from calm_core.evaluation.brier import SCORES, by_document
from calm_core.evaluation.brierlm import cross_entropy, evaluate_calm, evaluate_transformer
from calm_core.inference.decoding import Prompts, Sampling, align_prompts, calm_steps, transformer_steps
from calm_core.inference.temperature import batch_temperature, exact_temperature
from calm_core.latents.encode import encode_corpus
from calm_core.latents.shards import LatentCorpus
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.layers import initialise
from calm_core.params import Params
from calm_core.runtime import float64
from calm_core.runtime.process_group import ProcessGroup
from calm_core.runtime.randomness import generator
from calm_core.tokens.blocks import EvaluationBlocks
from calm_core.tokens.shards import TokenStream
from calm_core.training.loop import update_weights
from calm_core.training.optimisers import build_optimisers
from calm_core.training.parallel_model import ParallelModel
from calm_core.training.run import Run
from calm_core.transformer.model import Transformer, TransformerConfig, next_token_loss
from calm_core.transformer.training import train_transformer
from tests.calm_core.known_models import (
    bigram_transformer,
    chain_text,
    coin_calm,
    expected,
    moments_of_probabilities,
    moments_of_sampling,
    paths_of_bigrams,
    paths_of_patches,
    places,
    walk,
)
from tests.calm_core.training.tiny_trainings import (
    BUILDS,
    LATENT,
    VOCABULARY,
    autoencoder_section,
    calm_section,
    encoded,
    random_tokens,
    seeded,
    stream_of,
    tiny_autoencoder,
    transformer_section,
)
from tests.support.pretend_device import PretendDevice, pretend_device
from tests.support.pretend_processes import pretend_processes

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Elsewhere:
    """A device that is not the CPU."""

    device: torch.device
    pretend: PretendDevice | None
    """None on CUDA."""

    def near(self, found: Tensor, wanted: Tensor) -> None:
        """Equal up to the rounding of another kernel."""
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3 if self.pretend is None else 1e-5, atol=1e-5)


@pytest.fixture(params=["pretend", pytest.param("cuda", marks=pytest.mark.gpu)])
def elsewhere(request: pytest.FixtureRequest) -> Iterator[Elsewhere]:
    if request.param == "pretend":
        with pretend_device() as pretend:
            yield Elsewhere(pretend.device, pretend)
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    yield Elsewhere(torch.device("cuda", torch.cuda.current_device()), None)


def moved(value: Any, device: torch.device) -> Any:
    """A tensor, or a named tuple of such."""
    return value.to(device) if isinstance(value, Tensor) else type(value)(*(moved(part, device) for part in value))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed))


# Losses, and all else that only computes


POSITIONS, HIDDEN, SAMPLES = 7, 16, 3


class HeadCase(NamedTuple):
    config: HeadConfig
    draws: Any


HEADS = {
    "energy": HeadCase(
        EnergyHeadConfig(2, 5),
        EnergyDraws(uniform(SAMPLES, POSITIONS, 5), normal(4, LATENT), normal(2, POSITIONS, LATENT, seed=1)),
    ),
    "diffusion": HeadCase(
        DiffusionHeadConfig(2, sampling_steps=9, start_is_noise=True),
        DenoisingDraws(
            normal(SAMPLES, POSITIONS, LATENT),
            torch.randint(1000, (SAMPLES, POSITIONS), generator=seeded(2)).index_fill(1, torch.tensor([0]), 0),
            normal(SAMPLES, POSITIONS, LATENT, seed=1),
        ),
    ),
    "flow": HeadCase(
        FlowHeadConfig(2, steps=3),
        DenoisingDraws(
            normal(SAMPLES, POSITIONS, LATENT),
            uniform(SAMPLES, POSITIONS, seed=2),
            normal(SAMPLES, POSITIONS, LATENT, seed=1),
        ),
    ),
}


def built(model: Any, seed: int = 0) -> Any:
    initialise(model, seeded(seed), embedding_std=1.0)
    return model


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found
    return {"loss": loss.detach(), **found}


def head_loss(name: str, device: torch.device) -> dict[str, Tensor]:
    config, draws = HEADS[name]
    head, autoencoder = built(config.build(HIDDEN, LATENT)).to(device), tiny_autoencoder(2).to(device)
    objective = HeadObjective(SAMPLES, 8, spaces=(autoencoder.hidden_states,), scored_targets=2)
    posterior = Posterior(normal(POSITIONS, LATENT, seed=3), normal(POSITIONS, LATENT, seed=4) - 1)
    hidden_states = normal(POSITIONS, HIDDEN, seed=5)
    loss = head.loss(moved(hidden_states, device), moved(posterior, device), moved(draws, device), objective)
    return {**gradients(head, loss.total), **loss.terms}


def head_sample(name: str, device: torch.device) -> dict[str, Tensor]:
    head = built(HEADS[name].config.build(HIDDEN, LATENT)).requires_grad_(False).to(device)
    draws = head.sampling_draws((SAMPLES, POSITIONS), seeded(6))
    return {"latents": head.sample(normal(POSITIONS, HIDDEN).to(device), draws.to(device))}


def transformer_loss(device: torch.device) -> dict[str, Tensor]:
    model = built(Transformer(TransformerConfig(VOCABULARY, BackboneConfig(HIDDEN, 24, 2, 2, 1)))).to(device)
    return gradients(model, next_token_loss(model, random_tokens(27).view(3, 9).to(device)))


def loss_of_autoencoder(device: torch.device) -> dict[str, Tensor]:
    model = tiny_autoencoder(2).requires_grad_(True).to(device)
    draws = AutoencoderDraws(normal(5, LATENT), uniform(5, 2), uniform(5, LATENT, seed=1))
    loss = autoencoder_loss(model, random_tokens(10).view(5, 2).to(device), moved(draws, device))
    return {**gradients(model, loss.total), "cross_entropy": loss.cross_entropy, "kl": loss.kl}


@torch.no_grad()
def distance(device: torch.device) -> dict[str, Tensor]:
    return {"distance": manifold_distance(tiny_autoencoder(2).to(device), normal(9, LATENT).to(device))}


COMPUTED: dict[str, Callable[[torch.device], dict[str, Tensor]]] = {
    **{f"loss of the {name} head": partial(head_loss, name) for name in HEADS},
    **{f"sample of the {name} head": partial(head_sample, name) for name in HEADS},
    "loss of the Transformer": transformer_loss,
    "loss of the autoencoder": loss_of_autoencoder,
    "distance from the manifold": distance,
}


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED.keys())
def test_computes_what_the_cpu_computes(
    compute: Callable[[torch.device], dict[str, Tensor]], elsewhere: Elsewhere
) -> None:
    wanted, found = compute(CPU), compute(elsewhere.device)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.device == elsewhere.device, name
        elsewhere.near(tensor, wanted[name].detach())


def test_tables_of_the_diffusion_are_copied_once(elsewhere: Elsewhere) -> None:
    head = built(HEADS["diffusion"].config.build(HIDDEN, LATENT)).requires_grad_(False).to(elsewhere.device)
    hidden_states = normal(POSITIONS, HIDDEN).to(elsewhere.device)
    draws = head.sampling_draws((POSITIONS,), generator(0, device=elsewhere.device))
    head.sample(hidden_states, draws)
    if elsewhere.pretend is not None:
        elsewhere.pretend.forget()
        head.sample(hidden_states, draws)
        assert elsewhere.pretend.transfers == []
    assert not any("schedule" in name for name in head.state_dict())
    # The CPU has its own.
    head.to(CPU).sample(hidden_states.cpu(), draws.cpu())


def test_latents_of_a_corpus(elsewhere: Elsewhere, tmp_path: Path) -> None:
    latents = []
    for device in (CPU, elsewhere.device):
        folder = tmp_path / device.type
        folder.mkdir()
        tokens = stream_of(folder, random_tokens(90))
        encode_corpus(tiny_autoencoder(2).to(device), tokens, folder, "float32")
        latents.append(LatentCorpus(folder).posterior(torch.arange(45)))
    for found, wanted in zip(latents[1], latents[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-4)  # float16 on disk


# Trainings


STEPS = 3


def params_of(params: Params, **runtime: Any) -> Params:
    sections = {"steps": STEPS, "warmup_steps": 1}
    return params.model_copy(
        update={
            "runtime": params.runtime.model_copy(update={"precision": "float32", **runtime}),
            "autoencoder": autoencoder_section(params, **sections),
            "calm": calm_section(params, **sections),
            "transformer": transformer_section(params, **sections),
        }
    )


def calm_training(params: Params, folder: Path, run: Run) -> nn.Module:
    autoencoder, tokens = tiny_autoencoder(2), stream_of(folder, random_tokens(90))
    return train_calm(params, tokens, encoded(folder, tokens, autoencoder), autoencoder, run)


TRAININGS: dict[str, Callable[[Params, Path, Run], nn.Module]] = {
    "autoencoder": lambda params, folder, run: train_autoencoder(
        params, stream_of(folder, random_tokens(90)), VOCABULARY, run
    ),
    "transformer": lambda params, folder, run: train_transformer(
        params, stream_of(folder, random_tokens(90)), VOCABULARY, run
    ),
    "calm": calm_training,
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_learns_what_it_learns_on_the_cpu(
    name: str, params: Params, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    curves, models = [], []
    for device in (CPU, elsewhere.device):
        points: list[dict[str, float]] = []
        (tmp_path / device.type).mkdir()
        # A list of its own for each device: appended to while the training runs.
        run = Run(log=partial(lambda points, done, values: points.append(dict(values)), points),
                  processes=ProcessGroup(device=device))  # fmt: skip
        given = params_of(params, gradient_accumulation=2)
        models.append(TRAININGS[name](given, tmp_path / device.type, run))
        curves.append(points)
    assert len(curves[0]) == len(curves[1]) > 0
    for found, wanted in zip(curves[1], curves[0], strict=True):
        assert found == pytest.approx(wanted, rel=1e-3)
    # What comes back is on the CPU, to be saved.
    for weight, other in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["autoencoder", "transformer", "calm"])
def test_several_processes_are_set_up_on_the_device(
    name: str, parallelism: Any, params: Params, tmp_path: Path
) -> None:
    """As far as one process goes; tests/reliability/test_processes.py has several, on the CPU."""
    with pretend_device() as pretend, pretend_processes(pretend.device) as processes:
        objective = BUILDS[name](params, tmp_path, 0)
        if name == "calm":
            objective._autoencoder.to(pretend.device)  # type: ignore[attr-defined]
        changes = {"parallelism": parallelism, "activation_checkpointing": True, "precision": "float32"}
        parallel = ParallelModel(objective.model, processes, params.runtime.model_copy(update=changes))
        optimisers = build_optimisers(objective.model, autoencoder_section(params))
        batch = objective.batch(0, range(2), pretend.device)
        loss = parallel.forward(lambda: objective.loss(batch)).total
        assert loss.device == pretend.device
        if parallelism == "ddp":
            return  # the fake group gives its reducer no gradients back
        loss.backward()
        update_weights(objective.model, optimisers, 1.0)
        assert {parameter.device for parameter in objective.model.parameters()} == {pretend.device}


# Evaluation


SIZE, CONTEXT = 4, 12
LENGTHS = [5, 1, 23, 2, 40, 7, 12, 3, 61, 1, 1, 18, 9, 30, 4, 27]
NEXT_PATCHES = {
    1: [[[1], [2]], [[2], [0]], [[3], [1]], [[0], [3]]],
    2: [[[1, 2], [1, 3]], [[2, 3], [0, 0]], [[3, 0], [1, 2]], [[0, 1], [0, 2]]],
    4: [[[1, 2, 3, 0], [1, 2, 0, 0]], [[2, 3, 0, 1], [2, 3, 0, 2]], [[3, 0, 1, 2], [1, 1, 1, 1]],
        [[0, 1, 2, 3], [0, 0, 2, 3]]],
}  # fmt: skip
TEXT = chain_text(walk(SIZE, 2), LENGTHS, 0.8, seed=5)


@pytest.fixture()
def blocks(tmp_path: Path) -> EvaluationBlocks:
    TEXT.write(tmp_path, "validation", SIZE, documents_a_shard=3)
    return EvaluationBlocks(TokenStream(tmp_path, "validation"), CONTEXT, 3, 10**6, 0)


def assert_near(found: pl.DataFrame, wanted: Any) -> None:
    found = by_document(found)
    assert found["document"].to_list() == wanted.document
    assert found["positions"].to_list() == wanted.positions
    difference = np.abs(found.select(SCORES).to_numpy() - wanted.mean).sum(axis=0)
    assert np.all(np.abs(difference) <= 5 * np.sqrt(np.maximum(wanted.variance, 0)).sum(axis=0) + 1e-2)


@pytest.mark.parametrize("inputs", ["tokens", "latents"])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_brierlm_of_calm(patch_size: int, inputs: Any, elsewhere: Elsewhere, blocks: EvaluationBlocks) -> None:
    patches = NEXT_PATCHES[patch_size]
    model, autoencoder = coin_calm(patches, inputs)
    on_cpu = evaluate_calm(model, autoencoder, blocks, 3)
    found = evaluate_calm(model.to(elsewhere.device), autoencoder.to(elsewhere.device), blocks, 3)
    paths = paths_of_patches(patches)
    wanted = expected(
        places(TEXT, CONTEXT, patch_size), lambda place: moments_of_sampling(paths(place.history), place.following, 3)
    )
    assert_near(found, wanted)
    if elsewhere.pretend is not None:
        assert found.equals(on_cpu)


@pytest.mark.parametrize("patch_size", [1, 4])
def test_brierlm_and_cross_entropy_of_a_transformer(
    patch_size: int, elsewhere: Elsewhere, blocks: EvaluationBlocks
) -> None:
    model = bigram_transformer(walk(SIZE, 2))
    entropy = cross_entropy(model, blocks)
    model.to(elsewhere.device)
    found = evaluate_transformer(model, blocks, patch_size, 2)
    paths = paths_of_bigrams(walk(SIZE, 2))
    wanted = expected(
        places(TEXT, CONTEXT, patch_size),
        lambda place: moments_of_probabilities(paths(place.history), place.following, 2),
    )
    assert_near(found, wanted)
    assert cross_entropy(model, blocks) == pytest.approx(entropy, rel=1e-5)


def test_batches_are_copied_once_and_scores_at_the_end(blocks: EvaluationBlocks) -> None:
    model, autoencoder = coin_calm(NEXT_PATCHES[2])
    with pretend_device() as pretend:
        model.to(pretend.device), autoencoder.to(pretend.device)
        pretend.forget()
        evaluate_calm(model, autoencoder, blocks, 3)
        batches = -(-len(blocks.starts) // blocks.batch)
        assert batches > 2
        assert len(pretend.to_device) == batches
        assert len(pretend.from_device) == 1


def test_reconstruction(elsewhere: Elsewhere, tmp_path: Path) -> None:
    tokens, model = stream_of(tmp_path, random_tokens(400)), tiny_autoencoder(2)
    on_cpu = reconstruction(model, tokens, seed=0)
    found = reconstruction(model.to(elsewhere.device), tokens, seed=0)
    assert found.token_accuracy == on_cpu.token_accuracy
    assert found.posterior_std == pytest.approx(on_cpu.posterior_std, rel=1e-5)
    # The noise is the device's own.
    assert found.token_accuracy_noisy == pytest.approx(on_cpu.token_accuracy_noisy, abs=0.1)
    if elsewhere.pretend is not None:
        assert found.token_accuracy_noisy == on_cpu.token_accuracy_noisy


# Generation


SAMPLINGS = {
    "temperature 1": Sampling(1.0),
    "batch": Sampling(0.6, "batch", draws=20),
    "exact": Sampling(0.6, "exact", budget=500),
    "exact on a small budget": Sampling(0.3, "exact", draws=9, budget=3),
    "softmax": Sampling(0.3, "softmax", latents=5),
}
UNEVEN = [[1, 2, 3], [0], [3, 3, 2, 1, 0]]


def generated(device: torch.device, patch_size: int, inputs: Any, sampling: Sampling) -> list[Tensor]:
    model, autoencoder = (part.to(device) for part in coin_calm(NEXT_PATCHES[patch_size], inputs))
    prompts = Prompts(*(part.to(device) for part in align_prompts(UNEVEN, patch_size, 0)))
    steps = calm_steps(model, autoencoder, prompts, sampling, generator(1, device=device))
    found = [next(steps) for _ in range(4)]
    assert {tensor.device.type for step in found for tensor in step[:3]} == {device.type}
    return [torch.stack([step[part] for step in found], dim=1).cpu() for part in range(3)]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
@pytest.mark.parametrize(("patch_size", "inputs"), [(1, "tokens"), (2, "tokens"), (2, "latents"), (4, "tokens")])
def test_generation_by_calm(patch_size: int, inputs: Any, sampling: Sampling, elsewhere: Elsewhere) -> None:
    token_ids, draws, finished = generated(elsewhere.device, patch_size, inputs, sampling)
    last = torch.tensor([prompt[-1] for prompt in UNEVEN])
    for patches in token_ids.unbind(dim=1):
        for token, patch in zip(last.tolist(), patches.tolist(), strict=True):
            assert patch in NEXT_PATCHES[patch_size][token]
        last = patches[:, -1]
    assert draws.min() >= 1
    if elsewhere.pretend is not None:
        on_cpu = generated(CPU, patch_size, inputs, sampling)
        assert all(torch.equal(*pair) for pair in zip((token_ids, draws, finished), on_cpu, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_generation_by_a_transformer(temperature: float, elsewhere: Elsewhere) -> None:
    def written(device: torch.device) -> Tensor:
        model = bigram_transformer(walk(SIZE, 2)).to(device)
        prompts = Prompts(*(part.to(device) for part in align_prompts(UNEVEN, 1, 0)))
        steps = transformer_steps(model, prompts, Sampling(temperature), generator(1, device=device))
        found = [next(steps) for _ in range(6)]
        assert {tensor.device.type for step in found for tensor in step[:3]} == {device.type}
        return torch.cat([step.token_ids for step in found], dim=1).cpu()

    found = written(elsewhere.device)
    before = torch.cat([torch.tensor([prompt[-1:] for prompt in UNEVEN]), found[:, :-1]], dim=1)
    assert (walk(SIZE, 2)[before, found] > 0.1).all()
    if elsewhere.pretend is not None:
        assert torch.equal(found, written(CPU))


# Temperature


PROBABILITIES = torch.tensor([0.5, 0.3, 0.2])


def symbols_at(temperature: float, exact: bool, device: torch.device, rows: int = 4000) -> Tensor:
    draws = generator(2, device=device)

    def draw(asked: Tensor, count: int) -> Tensor:
        assert asked.device.type == device.type
        probabilities = PROBABILITIES.to(device).expand(len(asked), -1)
        return torch.multinomial(probabilities, count, replacement=True, generator=draws).T[..., None]

    sampler = exact_temperature if exact else batch_temperature
    sample = sampler(draw, rows, temperature, draws)
    assert {tensor.device.type for tensor in sample[:3]} == {device.type}
    return sample.symbols.cpu().flatten()


@pytest.mark.parametrize("temperature", [1.0, 0.8, 0.5, 0.3])
@pytest.mark.parametrize("exact", [True, False])
def test_temperature_samplers(temperature: float, exact: bool, elsewhere: Elsewhere) -> None:
    found = symbols_at(temperature, exact, elsewhere.device)
    wanted = (PROBABILITIES.log() / temperature).softmax(dim=0)
    shares = torch.bincount(found, minlength=3) / len(found)
    assert torch.all((shares - wanted).abs() < 5 * (wanted * (1 - wanted) / len(found)).sqrt() + 0.01)
    if elsewhere.pretend is not None:
        assert torch.equal(found, symbols_at(temperature, exact, CPU))


# A device without float64, as Apple's


@pytest.fixture()
def no_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendDevice]:
    monkeypatch.setattr(float64, "WITHOUT_FLOAT64", ("meta",))
    with pretend_device(float64=False) as pretend:
        yield pretend


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED.keys())
def test_computes_without_float64(
    compute: Callable[[torch.device], dict[str, Tensor]], no_float64: PretendDevice
) -> None:
    assert all(tensor.device == no_float64.device for tensor in compute(no_float64.device).values())


@pytest.mark.parametrize("name", TRAININGS)
def test_trains_without_float64(name: str, params: Params, no_float64: PretendDevice, tmp_path: Path) -> None:
    TRAININGS[name](params_of(params), tmp_path, Run(processes=ProcessGroup(device=no_float64.device)))


def test_evaluates_without_float64(no_float64: PretendDevice, blocks: EvaluationBlocks) -> None:
    model, autoencoder = (part.to(no_float64.device) for part in coin_calm(NEXT_PATCHES[2]))
    assert evaluate_calm(model, autoencoder, blocks, 2).height > 0
    transformer = bigram_transformer(walk(SIZE, 2)).to(no_float64.device)
    assert evaluate_transformer(transformer, blocks, 2, 1).height > 0
    assert cross_entropy(transformer, blocks) > 0


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_generates_without_float64(sampling: Sampling, no_float64: PretendDevice) -> None:
    generated(no_float64.device, 2, "tokens", sampling)


@pytest.mark.parametrize("temperature", [1.0, 0.8, 0.5, 0.3])
@pytest.mark.parametrize("exact", [True, False])
def test_temperature_samplers_without_float64(temperature: float, exact: bool, no_float64: PretendDevice) -> None:
    found = symbols_at(temperature, exact, no_float64.device)
    wanted = (PROBABILITIES.log() / temperature).softmax(dim=0)
    shares = torch.bincount(found, minlength=3) / len(found)
    assert torch.all((shares - wanted).abs() < 5 * (wanted * (1 - wanted) / len(found)).sqrt() + 0.01)
