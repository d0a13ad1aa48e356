"""Which batches the speed is measured on, and what a second is divided by."""

from typing import Any

import pytest
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, Posterior
from calm_core.autoencoder.training import autoencoder_config
from calm_core.calm.model import Calm
from calm_core.calm.training import calm_config
from calm_core.costs import throughput
from calm_core.nn.backbone import Backbone
from calm_core.params import Params
from calm_core.transformer.training import transformer_config


def small(smoke: Params, runtime: dict[str, Any]) -> Params:
    sections = {
        "runtime": smoke.runtime.model_copy(update={"precision": "float32", **runtime}),
        "calm": smoke.calm.model_copy(update={"batch_sequences": 12}),
        "transformer": smoke.transformer.model_copy(update={"batch_sequences": 24}),
    }
    return smoke.model_copy(update=sections)


def rates(params: Params) -> dict[str, float]:
    size = params.tokenizer.vocabulary_size
    coder = autoencoder_config(params.autoencoder, size)
    shapes = (calm_config(params.calm, coder), coder, transformer_config(params.transformer, size))
    return throughput.tokens_per_second(params, *shapes, torch.device("cpu"))


def test_the_batch_is_what_a_process_takes_in_a_pass(smoke: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, set[int]] = {"calm": set(), "either": set()}
    of_calm, of_backbone = Calm.forward, Backbone.forward

    def calm(self: Calm, inputs: Tensor, *others: Any) -> Tensor:
        taken["calm"].add(len(inputs))
        return of_calm(self, inputs, *others)

    def backbone(self: Backbone, hidden_states: Tensor, *others: Any) -> Tensor:
        taken["either"].add(len(hidden_states))
        return of_backbone(self, hidden_states, *others)

    monkeypatch.setattr(Calm, "forward", calm)
    monkeypatch.setattr(Backbone, "forward", backbone)
    monkeypatch.setattr(throughput, "ROUNDS", 1)
    runtime = {"launcher": "torchrun", "processes": 2, "gradient_accumulation": 3}
    assert all(rate > 0 for rate in rates(small(smoke, runtime)).values())
    assert taken == {"calm": {2}, "either": {2, 4}}


def test_a_second_is_divided_by_the_tokens_of_the_batch(smoke: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each look at the clock is a second later than the one before.
    clock = iter(range(1000))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: float(next(clock)))
    params = small(smoke, {})
    of_calm, of_transformer = 12 * params.calm.context_tokens, 24 * params.transformer.context_tokens
    assert rates(params) == {
        "calm_training_tokens_per_second": of_calm,
        "transformer_training_tokens_per_second": of_transformer,
        "calm_inference_tokens_per_second": of_calm,
        "transformer_inference_tokens_per_second": of_transformer,
    }


def test_latents_are_encoded_before_anything_is_timed(smoke: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    encode, forward = Autoencoder.encode, Calm.forward

    def encoded(self: Autoencoder, token_ids: Tensor) -> Posterior:
        calls.append("encode")
        return encode(self, token_ids)

    def passed(self: Calm, inputs: Tensor, *others: Any) -> Tensor:
        calls.append("forward")
        return forward(self, inputs, *others)

    monkeypatch.setattr(Autoencoder, "encode", encoded)
    monkeypatch.setattr(Calm, "forward", passed)
    monkeypatch.setattr(throughput, "ROUNDS", 1)
    params = small(smoke, {})
    rates(params.model_copy(update={"calm": params.calm.model_copy(update={"head": "energy", "input": "latents"})}))
    assert calls[0] == "encode"
    assert set(calls[1:]) == {"forward"}
