"""What the baseline learns: the token that follows, under torch's own cross entropy."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.errors import CalmError
from calm_core.nn.layers import initialise
from calm_core.params import Params
from calm_core.training.loop import train
from calm_core.training.objective import Loss
from calm_core.transformer.training import TransformerObjective, checkpoint_steps, train_transformer
from tests.calm_core.training.tiny_trainings import (
    CONTEXT,
    VOCABULARY,
    random_tokens,
    seeded,
    stream_of,
    transformer_section,
)


def objective_of(params: Params, folder: Path, token_ids: Tensor, seed: int = 0, rows: int = 3) -> TransformerObjective:
    """With weights that all matter."""
    section = transformer_section(params, batch_sequences=rows)
    objective = TransformerObjective(section, stream_of(folder, token_ids), VOCABULARY, seed)
    initialise(objective.model, seeded(1), embedding_std=1.0)
    return objective


def test_a_batch_is_blocks_and_the_token_after_each(params: Params, tmp_path: Path) -> None:
    """The last block ends one token before the split does; one token less, and there is a block less."""
    token_ids = random_tokens(7 * CONTEXT + 1)
    for count, blocks in ((len(token_ids), 7), (len(token_ids) - 1, 6)):
        folder = tmp_path / str(count)
        folder.mkdir()
        objective = objective_of(params, folder, token_ids[:count])
        rows = torch.cat([objective.batch(step, range(3)) for step in range(2 * blocks)])
        starts = range(0, blocks * CONTEXT, CONTEXT)
        expected = sorted(token_ids[start : start + CONTEXT + 1].tolist() for start in starts)
        epochs = rows.view(6, blocks, CONTEXT + 1).tolist()
        assert all(sorted(epoch) == expected for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_rows_are_the_same_however_a_batch_is_divided(params: Params, tmp_path: Path) -> None:
    objective = objective_of(params, tmp_path, random_tokens(90), rows=6)
    whole = objective.batch(2, range(6))
    for rows in (range(0, 3), range(3, 6), range(4, 5)):
        assert torch.equal(objective.batch(2, rows), whole[rows.start : rows.stop])
    assert not torch.equal(objective_of(params, tmp_path, random_tokens(90), seed=1, rows=6).batch(2, range(6)), whole)


def test_loss_is_the_cross_entropy_of_each_next_token(params: Params, tmp_path: Path) -> None:
    objective = objective_of(params, tmp_path, random_tokens(90))
    batch = objective.batch(0, range(3))
    loss = objective.loss(batch)
    logits = objective.model(batch[:, :CONTEXT])
    expected = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    torch.testing.assert_close(loss.total, expected)
    assert loss == Loss(loss.total, {}, None)
    names, weights = zip(*objective.model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss.total, weights)
    for name, of_loss, of_torch in zip(names, found, torch.autograd.grad(expected, weights), strict=True):
        assert of_torch.any(), name
        torch.testing.assert_close(of_loss, of_torch, rtol=1e-4, atol=1e-6)


def test_a_message_names_the_text_of_its_step(params: Params, tmp_path: Path) -> None:
    token_ids = random_tokens(90)
    objective = objective_of(params, tmp_path, token_ids)
    places = [
        int((token_ids.unfold(0, CONTEXT + 1, 1) == row).all(dim=1).nonzero()) for row in objective.batch(3, range(3))
    ]
    assert objective.describe_batch(3) == f"sequences from tokens {', '.join(map(str, places))} of the training split"


def test_a_split_of_less_than_a_block_is_refused(params: Params, tmp_path: Path) -> None:
    with pytest.raises(CalmError, match=r"8 tokens, fewer than transformer.context_tokens 8 and one more"):
        objective_of(params, tmp_path, random_tokens(CONTEXT))


def test_a_split_of_one_block_is_enough(params: Params, tmp_path: Path) -> None:
    block = random_tokens(CONTEXT + 1)
    assert torch.equal(objective_of(params, tmp_path, block).batch(0, range(1)), block[None])


def test_its_own_section_trains_it(params: Params, tmp_path: Path) -> None:
    tokens, section = stream_of(tmp_path, random_tokens(90)), transformer_section(params, steps=3, warmup_steps=0)
    seeded_params = params.model_copy(update={"transformer": section, "seed": 3})
    trained = train_transformer(seeded_params, tokens, VOCABULARY)
    expected = train(TransformerObjective(section, tokens, VOCABULARY, 3), section, params.runtime)
    for name, weight in expected.named_parameters():
        assert torch.equal(trained.get_parameter(name), weight), name


@pytest.mark.parametrize(
    ("steps", "checkpoints", "expected"),
    [
        (10, 5, {2, 4, 6, 8, 10}),
        (10, 3, {3, 6, 10}),
        (820, 8, {102, 205, 307, 410, 512, 615, 717, 820}),
        (4, 4, {1, 2, 3, 4}),
    ],
)
def test_models_are_kept_at_even_distances(steps: int, checkpoints: int, expected: set[int], params: Params) -> None:
    assert checkpoint_steps(transformer_section(params, steps=steps, checkpoints=checkpoints)) == expected
