"""The baseline's compute against that of CALM with its autoencoder."""

from typing import Any

import pytest

from calm_core.costs.matching import matched_steps, with_matched_steps
from calm_core.costs.plan import plan
from calm_core.costs.run_shapes import run_shapes
from calm_core.errors import CalmError
from calm_core.params import Params, parse_params
from calm_core.presets import load_preset
from tests import ROOT


def test_closed_form(values: dict[str, Any]) -> None:
    """One layer each and sizes of 2 to 12, added up by hand."""
    shape = {"hidden_size": 4, "intermediate_size": 6, "layers": 1, "heads": 2, "key_value_heads": 1}
    values["tokenizer"].update(vocabulary_size=300)
    values["autoencoder"].update(patch_size=2, hidden_size=3, intermediate_size=5, latent_size=2)
    values["autoencoder"].update(batch_patches=8, steps=100, warmup_steps=0)
    values["calm"].update(**shape, context_tokens=16, head="energy", head_blocks=1, noise_size=5, samples=3)
    values["calm"].update(decoder_score=False)
    values["calm"].update(batch_sequences=2, steps=70, warmup_steps=0)
    values["transformer"].update(**shape, context_tokens=12, batch_sequences=3, warmup_steps=0)
    layer = 2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 6  # queries and output, keys and values, SwiGLU
    transformer = 3 * (2 * (layer + 4 * 300) + 4 * 12 * 4) * 36
    inputs = (2 * 4 + 4) * 8  # the embeddings of a patch to 2 D, and from there to D
    head = 6 * 4 * 4 + (5 + 2) * 4 + 2 * 4 * 4  # a block, noise and latent, condition and output
    calm = 3 * (2 * (layer + inputs) + 4 * 8 * 4 + 3 * 2 * head) * 8 * 2  # 8 patches in a context
    coder_layer = 3 * 3 * 5
    encoder = 2 * coder_layer + 2 * 3 * 3 + coder_layer + 2 * 3 * 2
    decoder = 2 * 3 + coder_layer + 2 * 3 * 3 + 2 * coder_layer + 2 * 300 * 3
    autoencoder = 3 * 2 * (encoder + decoder) * 8
    assert matched_steps(parse_params(values)) == round((70 * calm + 100 * autoencoder) / transformer)

    # One that came with a model was not trained here.
    values["calm"].update(initial="a folder")
    values["evaluation"].update(beside=[])
    given = parse_params(values)
    assert matched_steps(given) == round(70 * calm / transformer)
    assert plan(given, 1, 1e12, 0.5).autoencoder.training_flops == 0

    # A token head of width 3 needs no autoencoder.
    values["calm"].update(head="tokens", token_hidden_size=3, token_intermediate_size=7, token_layers=2)
    # From D to both tokens, from the two read last to each, from the first to the second.
    head = 4 * 2 * 3 + 2 * 2 * 3 * 3 + 3 * 3 + 2 * (2 * 3 * 3 * 7 + 300 * 3)
    calm = 3 * (2 * (layer + inputs + head) + 4 * 8 * 4) * 8 * 2
    assert matched_steps(parse_params(values)) == round(70 * calm / transformer)


def compute(params: Params) -> tuple[float, float, float]:
    """Training FLOPs of CALM with the autoencoder of its latents, of the Transformer, and of one step of the latter."""
    flops = run_shapes(params).analytic_flops()
    both = flops.calm.training_per_token * params.calm.training_tokens
    if params.calm.head != "tokens":
        both += flops.autoencoder.training_per_token * params.autoencoder.training_tokens
    step = flops.transformer.training_per_token * params.transformer.step_tokens
    return both, flops.transformer.training_per_token * params.transformer.training_tokens, step


@pytest.mark.parametrize(
    "changes", [{}, {"head": "energy"}, {"head": "diffusion"}, {"head": "flow", "input": "latents"}, {"steps": 777}]
)
def test_the_result_is_within_half_a_step(values: dict[str, Any], changes: dict[str, Any]) -> None:
    values["calm"].update(changes)
    both, transformer, step = compute(with_matched_steps(parse_params(values)))
    assert abs(transformer - both) <= step / 2


def test_presets_that_match_say_so_and_the_published_ones_name_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("smoke", "overnight", "one-gpu"):
        params = load_preset(name)
        assert params.transformer.steps == "match"
        both, transformer, step = compute(with_matched_steps(params))
        assert abs(transformer - both) <= step / 2
    for name in ("autoencoder", "calm-m", "calm-l", "calm-xl", "transformer-s", "transformer-m", "transformer-l"):
        assert isinstance(load_preset(name).transformer.steps, int)


def test_a_number_stays(values: dict[str, Any]) -> None:
    values["transformer"].update(steps=321)
    params = parse_params(values)
    assert with_matched_steps(params) is params
    assert (
        params.transformer.training_tokens
        == 321 * params.transformer.batch_sequences * params.transformer.context_tokens
    )


def test_nothing_counts_with_steps_that_are_not_known(params: Params) -> None:
    with pytest.raises(ValueError, match="still to be matched"):
        _ = params.transformer.training_tokens


def test_a_warmup_longer_than_what_matches_is_refused(values: dict[str, Any]) -> None:
    steps = matched_steps(parse_params(values))
    values["transformer"].update(warmup_steps=steps + 1)
    with pytest.raises(CalmError, match=f"match stands for: .*warmup_steps {steps + 1} exceeds steps {steps}"):
        with_matched_steps(parse_params(values))


def test_too_little_compute_for_one_step_is_refused(values: dict[str, Any]) -> None:
    values["calm"].update(steps=1, warmup_steps=0, batch_sequences=1)
    values["autoencoder"].update(steps=1, warmup_steps=0, batch_patches=1)
    values["transformer"].update(warmup_steps=0, batch_sequences=4096)
    with pytest.raises(CalmError, match="transformer.steps is 0: input should be .*greater than or equal to 1"):
        with_matched_steps(parse_params(values))


@pytest.mark.parametrize("head", ["tokens", "energy"])
def test_a_plan_has_the_number(values: dict[str, Any], head: str) -> None:
    values["calm"].update(head=head)
    params = parse_params(values)
    made = plan(params, 1, 1e12, 0.5)
    step = made.transformer.training_flops / matched_steps(params)
    charged = made.calm.training_flops + (made.autoencoder.training_flops if head == "energy" else 0)
    assert abs(made.transformer.training_flops - charged) <= step / 2
