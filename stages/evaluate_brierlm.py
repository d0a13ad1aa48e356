"""Stage evaluate_brierlm: held-out tokens and the models -> results/brierlm.json."""

from pathlib import Path
from typing import Any

import polars as pl

from calm_core.calm.folder import load_calm
from calm_core.evaluation.brier import bootstrap_brierlm, bootstrap_difference
from calm_core.evaluation.brierlm import cross_entropy, evaluate_calm, evaluate_transformer
from calm_core.params import Params
from calm_core.runtime.device import choose_device
from calm_core.runtime.precision import set_threads
from calm_core.runtime.randomness import generator
from calm_core.storage.json_io import write_json
from calm_core.storage.model_folder import load_model
from calm_core.storage.provenance import require_intact, require_tokenizer_of
from calm_core.tokens.blocks import EvaluationBlocks
from calm_core.tokens.shards import TokenStream
from calm_core.transformer.model import Transformer
from stages.runner.run import run_stage

STAGE = "evaluate_brierlm"
TOKENS, SPLIT = Path("data/tokens"), "validation"
CALM, TRANSFORMER = Path("models/calm"), Path("models/transformer")


def main(params: Params) -> None:
    """Score both models on the validation split, each at the context it was trained with."""
    set_threads(params.runtime.threads)
    device, settings = choose_device(params.runtime.device), params.evaluation
    require_intact(TOKENS)
    for folder in (CALM, TRANSFORMER):
        require_tokenizer_of(folder, TOKENS)
    tokens = TokenStream(TOKENS, SPLIT)
    calm, autoencoder = load_calm(CALM)
    transformer = load_model(Transformer, TRANSFORMER)
    for model in (calm, autoencoder, transformer):
        model.to(device)
    batch, limit = settings.batch_sequences, settings.tokens
    calm_blocks = EvaluationBlocks(tokens, params.calm.context_tokens, batch, limit, params.seed)
    transformer_blocks = EvaluationBlocks(tokens, params.transformer.context_tokens, batch, limit, params.seed)
    calm_documents = evaluate_calm(calm, autoencoder, calm_blocks, settings.samples)
    transformer_documents = evaluate_transformer(
        transformer, transformer_blocks, calm.config.patch_size, settings.samples
    )
    scores = {
        "calm": _result(calm_documents, calm_blocks, params),
        "transformer": {
            **_result(transformer_documents, transformer_blocks, params),
            "cross_entropy_nats": cross_entropy(transformer, transformer_blocks),
        },
    }
    draws = generator(params.seed, STAGE, "difference")
    difference = bootstrap_difference(calm_documents, transformer_documents, settings.bootstrap_resamples, draws)
    write_json(Path("results/brierlm.json"), {**scores, "calm_minus_transformer": difference._asdict()})
    for name, result in scores.items():
        low, high = result["brierlm_ci95"]
        print(f"{name}: BrierLM {result['brierlm']:.2f} [{low:.2f}, {high:.2f}] over {result['positions']:,} positions")
    low, high = difference.difference_ci95
    print(f"CALM - Transformer: {difference.difference:.2f} [{low:.2f}, {high:.2f}], p {difference.p:.3g}")


def _result(documents: pl.DataFrame, blocks: EvaluationBlocks, params: Params) -> dict[str, Any]:
    draws = generator(params.seed, STAGE, "bootstrap")
    score = bootstrap_brierlm(documents, params.evaluation.bootstrap_resamples, draws)
    # A score is one of its block length: positions have half of it before them on average.
    return {**score._asdict(), "split": SPLIT, "context_tokens": blocks.context, "blocks": len(blocks.starts)}


if __name__ == "__main__":
    run_stage(STAGE, main)
