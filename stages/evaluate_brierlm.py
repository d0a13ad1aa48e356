"""Stage evaluate_brierlm: held-out tokens and the models -> results/brierlm.json."""

from pathlib import Path
from typing import Any

import polars as pl

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.model import Calm
from calm_core.evaluation.brier import bootstrap_brierlm
from calm_core.evaluation.brierlm import cross_entropy, evaluate_calm, evaluate_transformer
from calm_core.params import Params
from calm_core.runtime.precision import set_threads
from calm_core.runtime.randomness import generator
from calm_core.storage.json_io import write_json
from calm_core.storage.model_folder import AUTOENCODER, load_model
from calm_core.storage.provenance import require_intact, require_tokenizer_of
from calm_core.tokens.shards import TokenStream
from calm_core.transformer.model import Transformer
from stages.runner.run import run_stage

STAGE = "evaluate_brierlm"
TOKENS = Path("data/tokens")


def main(params: Params) -> None:
    """Score both models on the validation split, each at the context it was trained with."""
    set_threads(params.runtime.threads)
    settings = params.evaluation
    require_intact(TOKENS)
    for model in ("calm", "transformer"):
        require_tokenizer_of(Path("models") / model, TOKENS)
    tokens = TokenStream(TOKENS, "validation")
    autoencoder = load_model(Autoencoder, Path("models/calm") / AUTOENCODER)
    calm = load_model(Calm, Path("models/calm"))
    transformer = load_model(Transformer, Path("models/transformer"))
    batch, limit = settings.batch_sequences, settings.tokens
    context, patch_size = params.transformer.context_tokens, calm.config.patch_size
    calm_documents = evaluate_calm(
        calm, autoencoder, tokens, params.calm.context_tokens, batch, limit, settings.samples, params.seed
    )
    transformer_documents = evaluate_transformer(
        transformer, tokens, context, patch_size, batch, limit, settings.samples, params.seed
    )
    results = {
        "calm": _summary(calm_documents, params),
        "transformer": {
            **_summary(transformer_documents, params),
            "cross_entropy_nats": cross_entropy(transformer, tokens, context, batch, limit),
        },
    }
    write_json(Path("results/brierlm.json"), results)
    for name, result in results.items():
        low, high = result["brierlm_ci95"]
        print(f"{name}: BrierLM {result['brierlm']:.2f} [{low:.2f}, {high:.2f}] over {result['positions']:,} positions")


def _summary(documents: pl.DataFrame, params: Params) -> dict[str, Any]:
    score = bootstrap_brierlm(
        documents, params.evaluation.bootstrap_resamples, generator(params.seed, STAGE, "bootstrap")
    )
    return {
        "brierlm": score.brierlm,
        "brierlm_ci95": list(score.ci95),
        "brier": score.brier,
        "positions": score.positions,
        "documents": len(documents),
    }


if __name__ == "__main__":
    run_stage(STAGE, main)
