"""Which items of the training split a step trains on."""

import pytest
import torch

from calm_core.runtime.randomness import generator
from calm_core.training.batches import batch_indices, described_batch


def test_each_block_once_an_epoch_in_a_new_order() -> None:
    seen = torch.cat([batch_indices(step, 4, 10, 0, "stage") for step in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert batch_indices(3, 4, 10, 0, "stage").tolist() == seen[12:16]
    assert batch_indices(3, 4, 10, 1, "stage").tolist() != seen[12:16]
    assert batch_indices(3, 4, 10, 0, "other stage").tolist() != seen[12:16]


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (3, 7), (7, 3), (5, 5), (4, 9)])
def test_batches_cut_the_shuffled_epochs_whatever_was_asked_before(batch: int, count: int) -> None:
    epochs = [torch.randperm(count, generator=generator(3, "stage", "order", epoch)) for epoch in range(20)]
    expected = torch.cat(epochs)
    steps = torch.randperm(20 * count // batch, generator=torch.Generator().manual_seed(0)).tolist()
    for step in [*steps, *steps[:3]]:
        indices = batch_indices(step, batch, count, 3, "stage")
        assert indices.tolist() == expected[step * batch : (step + 1) * batch].tolist()
        indices.zero_()  # what is done to a batch stays there


def test_a_batch_in_words_names_its_first_items() -> None:
    few = described_batch("patches", torch.tensor([7, 1_234_567]))
    assert few == "patches from tokens 7, 1,234,567 of the training split"
    some = described_batch("sequences", torch.arange(8))
    assert some == "sequences from tokens 0, 1, 2, 3, 4, 5, 6, 7 of the training split"
    many = described_batch("sequences", torch.arange(10))
    assert many == "sequences from tokens 0, 1, 2, 3, 4, 5, 6, 7 and 2 more of the training split"
