"""How varied generated text is, and how much of it is copied: shares of its n-grams, with their standard errors.

Notable:
- distinct-n falls as a text grows, so only texts of equal length compare: each set has one continuation a prompt, as
  the true text has, and independent sets are averaged rather than joined;
- an n-gram of generated text counts as copied if the training split holds it. The true continuations have a share of
  such n-grams too, by which the models' are to be judged;
- standard errors are delete-one jackknifes over prompts: the n-grams of one continuation are not independent, and a
  bootstrap would draw a prompt twice, whose n-grams are then no longer distinct.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calm_core.tokens.document_marks import DocumentMarks
from calm_core.tokens.ngrams import ngram_hashes, occurring
from calm_core.tokens.shards import TokenStream

LONGEST_DISTINCT = 4
"""Distinct-n is measured for n from 1 to this."""

COPIED_TOKENS = 8
"""Tokens of an n-gram that counts as copied: longer than the phrases that any text repeats."""


class Estimate(NamedTuple):
    """A share in [0, 1] and its standard error; None where there is nothing to take it of."""

    share: float | None
    standard_error: float | None


def mean_over_prompts(values: Tensor) -> tuple[list[float], list[float]]:
    """Means of ``values`` [prompts, n] over two prompts or more, and their standard errors, n each."""
    values = values.double()
    errors = values.std(dim=0) / len(values) ** 0.5
    return values.mean(dim=0).tolist(), errors.tolist()


def distinct_share(token_ids: Tensor, length: int) -> Estimate:
    """Distinct-n for n = ``length``: different n-grams of a set over all its n-grams, averaged over sets.

    ``token_ids`` [sets, prompts, tokens] are on the CPU; n-grams lie within one continuation, of which there are two or
    more in a set.
    """
    sets, prompts, tokens = token_ids.shape
    each = tokens - length + 1
    share, without = 0.0, torch.zeros(prompts, dtype=torch.float64)
    for windows in token_ids.unfold(-1, length, 1):
        found, numbers = torch.unique(windows.flatten(0, 1), dim=0, return_inverse=True)
        holds = torch.zeros(prompts, len(found), dtype=torch.bool)
        holds.scatter_(1, numbers.view(prompts, each), True)
        # Without a prompt the n-grams are gone that no other prompt's continuation has.
        gone = (holds & (holds.sum(dim=0) == 1)).sum(dim=1)
        share += len(found) / (prompts * each) / sets
        without += (len(found) - gone).double() / ((prompts - 1) * each) / sets
    return Estimate(share, _jackknife(without))


def copied_shares(texts: list[Tensor], training: TokenStream, marks: DocumentMarks) -> list[Estimate]:
    """The share of n-grams of ``COPIED_TOKENS`` tokens that occur in ``training``, of each of ``texts``.

    A text is [sets, prompts, tokens] token ids on the CPU, two prompts or more. Its n-grams lie within one document, of
    which the first and last of the split's ``marks`` may be the first and the last token; the split is read once for
    all texts.
    """
    windows = [text.unfold(-1, COPIED_TOKENS, 1) for text in texts]
    hashes = [_hashes(of_text) for of_text in windows]
    wanted = np.unique(np.concatenate([of_text.ravel() for of_text in hashes]))
    held = wanted[occurring(wanted, training, COPIED_TOKENS, "copies")]
    found = []
    for of_text, hashed in zip(windows, hashes, strict=True):
        whole = torch.ones(of_text.shape[:-1], dtype=torch.bool)
        for beginning in marks.before[:1]:
            whole &= (of_text[..., 1:] != beginning).all(dim=-1)
        for end in marks.after[-1:]:
            whole &= (of_text[..., :-1] != end).all(dim=-1)
        copied = torch.from_numpy(np.isin(hashed, held)) & whole
        found.append(_ratio(copied.sum(dim=(0, 2)), whole.sum(dim=(0, 2))))
    return found


def _hashes(windows: Tensor) -> np.ndarray:
    """A hash of each of ``windows`` [..., n], each as a document of its own, [...] uint64."""
    length = windows.shape[-1]
    flat = windows.reshape(-1).numpy()
    return ngram_hashes(flat, np.arange(length, len(flat) + 1, length), length).reshape(windows.shape[:-1])


def _ratio(part: Tensor, total: Tensor) -> Estimate:
    """The sum of ``part`` over that of ``total``, both [prompts]."""
    part, total = part.double(), total.double()
    if not total.sum():
        return Estimate(None, None)
    rest = total.sum() - total
    error = _jackknife((part.sum() - part) / rest) if rest.all() else None
    return Estimate(float(part.sum() / total.sum()), error)


def _jackknife(without: Tensor) -> float:
    """Standard error from the estimates without each of the prompts, [prompts] float64 (Efron and Stein, 1981)."""
    return float(((len(without) - 1) * without.var(correction=0)).sqrt())
