"""What a CALM with a token head learns: each next patch of the stream, and its training as a whole."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from calm_core.autoencoder.model import AutoencoderConfig
from calm_core.calm.model import CalmConfig
from calm_core.calm.token_head import TokenHead, TokenHeadConfig
from calm_core.calm.token_training import TokenHeadObjective
from calm_core.calm.training import calm_config, train_calm
from calm_core.errors import CalmError
from calm_core.nn.backbone import BackboneConfig
from calm_core.params import Params
from calm_core.training.loop import train
from tests.calm_core.training.tiny_trainings import (
    CONTEXT,
    VOCABULARY,
    calm_section,
    encoded,
    random_tokens,
    seeded,
    stream_of,
    tiny_autoencoder,
)


def objective_of(params: Params, folder: Path, token_ids: torch.Tensor, patch_size: int = 2) -> TokenHeadObjective:
    section = calm_section(params, head="tokens")
    config = calm_config(section, tiny_autoencoder(patch_size).config)
    return TokenHeadObjective(section, config, stream_of(folder, token_ids), 0, "train_calm")


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_a_batch_is_sequences_and_the_patch_after_each(patch_size: int, params: Params, tmp_path: Path) -> None:
    token_ids = random_tokens(8 * CONTEXT + patch_size)
    objective = objective_of(params, tmp_path, token_ids, patch_size)
    blocks = token_ids.unfold(0, CONTEXT + patch_size, CONTEXT).tolist()
    seen = []
    for step in range(2):
        batch = objective.batch(step, range(4))
        assert batch.shape == (4, CONTEXT // patch_size + 1, patch_size)
        seen += [blocks.index(row) for row in batch.flatten(1).tolist()]
        starts = ", ".join(str(CONTEXT * block) for block in seen[-4:])
        assert objective.describe_batch(step) == f"sequences from tokens {starts} of the training split"
    assert sorted(seen) == list(range(8))  # an epoch takes each once
    assert torch.equal(objective.batch(1, range(1, 3)), batch[1:3])


def test_the_loss_is_the_cross_entropy_of_each_token_given_all_before(params: Params, tmp_path: Path) -> None:
    objective = objective_of(params, tmp_path, random_tokens(90))
    model, batch = objective.model, objective.batch(0, range(2))
    head = model.head
    assert isinstance(head, TokenHead)
    nats = []
    for row in batch:
        for patch in range(1, len(row)):
            hidden_state = model(row[None, :patch])[0, -1]
            earlier = row[patch - 1 : patch + 1].flatten()
            nats += [F.cross_entropy(head.logits(hidden_state, earlier[: 2 + k]), row[patch, k]) for k in range(2)]
    found = objective.loss(batch)
    torch.testing.assert_close(found.total, torch.stack(nats).mean(), rtol=1e-4, atol=1e-5)
    assert found.terms == objective.observe(found.features) == {}


def test_the_split_has_to_hold_a_sequence(params: Params, tmp_path: Path) -> None:
    token_ids = random_tokens(CONTEXT + 2)
    assert torch.equal(objective_of(params, tmp_path, token_ids).batch(0, range(1)).flatten(), token_ids)
    shorter = tmp_path / "shorter"
    shorter.mkdir()
    with pytest.raises(CalmError, match=r"9 tokens, fewer than calm.context_tokens 8 and a patch"):
        objective_of(params, shorter, token_ids[:-1])


def test_the_shape_that_params_ask_for(params: Params) -> None:
    section = calm_section(params, head="tokens", token_hidden_size=7, token_intermediate_size=9, token_layers=3)
    found = calm_config(section, AutoencoderConfig(50, 2, 12, 16, 6))
    assert found == CalmConfig(50, 2, 16, BackboneConfig(16, 24, 1, 2, 1), TokenHeadConfig(7, 9, 3), "tokens")


def test_it_learns_a_text_that_repeats_itself(params: Params, tmp_path: Path) -> None:
    """Of a period that is no multiple of K, so that a patch is never a matter of its place."""
    period = torch.randint(VOCABULARY, (11,), generator=seeded(0))
    tokens = stream_of(tmp_path, period.repeat(40))
    section = calm_section(params, head="tokens", steps=200, warmup_steps=2, checkpoints=3)
    trained = train_calm(
        params.model_copy(update={"calm": section}), tokens, encoded(tmp_path, tokens, tiny_autoencoder(2)),
        tiny_autoencoder(2),
    )  # fmt: skip
    text = period.repeat(3)[: CONTEXT + 2].view(1, -1, 2)
    head = trained.head
    assert isinstance(head, TokenHead)
    assert -head.log_probabilities(trained(text[:, :-1]), text[:, :-1], text[:, 1:])[:, 1:].mean() < 0.2
    fresh = TokenHeadObjective(section, trained.config, tokens, params.seed, "train_calm")
    assert fresh.loss(fresh.batch(0, range(4))).total > 3
    # It is the objective's own training, and no autoencoder's business.
    again = train(fresh, section, params.runtime)
    for name, weight in again.named_parameters():
        assert torch.equal(trained.get_parameter(name), weight), name
