"""Stage measure_diversity: held-out tokens and the models -> results/diversity.json."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.folder import load_calm
from calm_core.calm.model import Calm
from calm_core.errors import CalmError
from calm_core.evaluation.brier import by_document, per_document, terms_from_samples
from calm_core.evaluation.diversity import (
    COPIED_TOKENS,
    LONGEST_DISTINCT,
    copied_shares,
    distinct_share,
    mean_over_prompts,
)
from calm_core.evaluation.intervals import estimate_brierlm
from calm_core.inference.decoding import Sampling
from calm_core.inference.sampled_continuations import Continuations, sampled_continuations
from calm_core.params import Params
from calm_core.runtime.device import choose_device
from calm_core.runtime.precision import set_threads
from calm_core.runtime.randomness import generator
from calm_core.storage.json_io import write_json
from calm_core.storage.model_folder import load_model
from calm_core.storage.provenance import require_intact, require_tokenizer_of
from calm_core.tokens.blocks import MAX_TOKENS
from calm_core.tokens.document_marks import marks_of_tokens
from calm_core.tokens.shards import TokenStream
from calm_core.transformer.model import Transformer
from stages.runner.run import run_stage

STAGE = "measure_diversity"
TOKENS = Path("data/tokens")
CALM, TRANSFORMER = Path("models/calm"), Path("models/transformer")

COPIES = 2
"""Independent continuations of each prompt: as many as a pair takes, and more are better spent on prompts."""

PROMPT_TOKENS, TEXT_TOKENS = 64, 32
"""Longest prompt, and longest text after it, in tokens."""

TEXT_EVERY = 8
"""One prompt in so many is continued by a whole text, the others by the tokens that Brier scores ask for.

Below temperature 1 each patch of a CALM is chosen among some hundred others, and quality needs more prompts than
diversity does.
"""


class Places(NamedTuple):
    """Where the models are asked: prompts and what follows them."""

    prompts: Tensor
    """[places, prompt tokens] int64"""
    following: Tensor
    """[places, text tokens] int64, the true text"""

    @property
    def of_texts(self) -> Tensor:
        """Which places are continued by a whole text, [places] bool."""
        return torch.arange(len(self.prompts)) % TEXT_EVERY == 0


def main(params: Params) -> None:
    """Continue the same places by both models at each temperature, and count."""
    set_threads(params.runtime.threads)
    device = choose_device(params.runtime.device)
    require_intact(TOKENS)
    for folder in (CALM, TRANSFORMER):
        require_tokenizer_of(folder, TOKENS)
    calm, autoencoder = load_calm(CALM)
    transformer = load_model(Transformer, TRANSFORMER)
    for model in (calm, autoencoder, transformer):
        if model is not None:
            model.to(device)
    context = min(params.calm.context_tokens, params.transformer.context_tokens)
    split, prompts = params.evaluation.split, params.evaluation.diversity_prompts
    places = _places(split, prompts, context, calm.config.patch_size)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    texts = [places.following[places.of_texts][None]]
    for name, model, decoder in (("calm", calm, autoencoder), ("transformer", transformer, None)):
        rows[name] = {}
        for temperature in params.evaluation.temperatures:
            row, text = _measured(name, model, decoder, places, temperature, params)
            rows[name][str(temperature)] = row
            texts.append(text)
    truth = _distinct(texts[0])
    of_models = [row for of_model in rows.values() for row in of_model.values()]
    shares = copied_shares(texts, TokenStream(TOKENS, "train"), marks_of_tokens(TOKENS))
    for row, copied in zip([truth, *of_models], shares, strict=True):
        row |= {"copied": copied.share, "copied_standard_error": copied.standard_error}
    write_json(
        Path("results/diversity.json"),
        {
            "split": split,
            "prompts": len(places.prompts),
            "prompt_tokens": places.prompts.shape[1],
            "texts": len(texts[0][0]),
            "text_tokens": places.following.shape[1],
            "truth": truth,
            **rows,
        },
    )
    _tell(truth, rows)


def _places(split: str, prompts: int, context: int, patch_size: int) -> Places:
    """``prompts`` places at equal distances in the split, fewer if it has no more, within ``context`` tokens each.

    Raises:
        CalmError: the split has too few tokens for two texts.
    """
    tokens = TokenStream(TOKENS, split)
    # Whole patches: half of the context at most, one at least.
    prompt = max(1, min(PROMPT_TOKENS, context // 2) // patch_size) * patch_size
    text = max(COPIED_TOKENS, min(TEXT_TOKENS, context - prompt))
    there = len(tokens) - prompt - text + 1
    count = min(prompts, there)
    if count <= TEXT_EVERY:
        raise CalmError(
            f"the {split} split has {len(tokens)} tokens, too few for {TEXT_EVERY + 1} prompts of {prompt} and {text} "
            f"more; use more text or a larger corpus.{split}_percent"
        )
    windows = tokens.windows(torch.arange(count) * there // count, prompt + text)
    return Places(windows[:, :prompt], windows[:, prompt:])


def _measured(
    name: str,
    model: Calm | Transformer,
    autoencoder: Autoencoder | None,
    places: Places,
    temperature: float,
    params: Params,
) -> tuple[dict[str, Any], Tensor]:
    """What a model's continuations say at a temperature, and those that are whole texts, [copies, texts, tokens]."""
    of_texts, sampling = places.of_texts, Sampling(temperature)

    def continued(prompts: Tensor, tokens: int, what: str) -> Continuations:
        return sampled_continuations(
            model, autoencoder, prompts, tokens, COPIES, sampling, params.seed, STAGE, name, str(temperature), what
        )

    texts = continued(places.prompts[of_texts], places.following.shape[1], "texts")
    others = continued(places.prompts[~of_texts], MAX_TOKENS, "openings")
    openings = torch.empty(COPIES, len(places.prompts), MAX_TOKENS, dtype=torch.int64)
    openings[:, of_texts], openings[:, ~of_texts] = texts.token_ids[..., :MAX_TOKENS], others.token_ids
    terms = terms_from_samples(openings, places.following[:, :MAX_TOKENS])
    accuracy, accuracy_error = mean_over_prompts(terms.accuracy)
    collision, collision_error = mean_over_prompts(terms.collision)
    # The bootstrap draws prompts, which take the place of documents.
    numbers = torch.arange(len(openings[0]))
    prompts = by_document(per_document(numbers, torch.zeros_like(numbers), 2 * terms.accuracy - terms.collision))
    draws = generator(params.seed, STAGE, "bootstrap")
    score = estimate_brierlm([prompts], params.evaluation.bootstrap_resamples, draws)
    tokens_a_step = model.config.patch_size if isinstance(model, Calm) else 1
    steps = [-(-tokens // tokens_a_step) for tokens in (texts.token_ids.shape[-1], MAX_TOKENS)]
    row = {
        "temperature": temperature,
        "accuracy": accuracy,
        "accuracy_standard_error": accuracy_error,
        "collision": collision,
        "collision_standard_error": collision_error,
        "brierlm": score.brierlm,
        "brierlm_ci95": score.brierlm_ci95,
        "exact": share_of_steps(texts.exact, others.exact, *steps),
        "reached": share_of_steps(texts.reached, others.reached, *steps),
        **_distinct(texts.token_ids),
    }
    return row, texts.token_ids


def share_of_steps(of_texts: Tensor, of_openings: Tensor, text_steps: int, opening_steps: int) -> float:
    """Mean over all steps of shares [copies, places] that are each of ``text_steps`` or ``opening_steps`` of them."""
    shares = torch.cat([of_texts, of_openings], dim=1)
    steps = torch.full_like(shares, opening_steps)
    steps[:, : of_texts.shape[1]] = text_steps
    return float((shares * steps).sum() / steps.sum())


def _distinct(texts: Tensor) -> dict[str, Any]:
    found = [distinct_share(texts, length) for length in range(1, LONGEST_DISTINCT + 1)]
    return {
        "distinct": [one.share for one in found],
        "distinct_standard_error": [one.standard_error for one in found],
    }


def _tell(truth: dict[str, Any], rows: dict[str, dict[str, dict[str, Any]]]) -> None:
    def line(row: dict[str, Any]) -> str:
        copied = "no 8-grams" if row["copied"] is None else f"{row['copied']:.1%} of 8-grams copied"
        return f"distinct-2 {row['distinct'][1]:.3f}, {copied}"

    print(f"true text: {line(truth)}")
    for name, of_model in rows.items():
        for temperature, row in of_model.items():
            terms = f"accuracy {row['accuracy'][0]:.3f}, collision {row['collision'][0]:.3f}"
            print(f"{name} at temperature {temperature}: {terms}, {line(row)}")


if __name__ == "__main__":
    run_stage(STAGE, main)
