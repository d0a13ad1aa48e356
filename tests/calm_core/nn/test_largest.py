"""The most probable token, looked for in blocks, against torch's argmax."""

import pytest
import torch

from calm_core.nn import largest as searched
from calm_core.nn.largest import BLOCK, largest


@pytest.mark.parametrize("few", [0, 1 << 40], ids=["in blocks", "few"])
@pytest.mark.parametrize("vocabulary", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 100, 3 * BLOCK, 10 * BLOCK + 63])
def test_it_is_argmax(vocabulary: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few different values, so that most maxima stand at several tokens, of one block and of several."""
    monkeypatch.setattr(searched, "FEW_LOGITS", few)
    logits = torch.randint(-3, 3, (500, vocabulary), generator=torch.Generator().manual_seed(0)).float()
    logits[0] = -torch.inf
    logits[1, -1] = 9.0
    for scores in (logits, logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))):
        assert torch.equal(largest(scores), scores.argmax(dim=1))
        assert torch.equal(largest(scores.bfloat16()), scores.bfloat16().argmax(dim=1))
