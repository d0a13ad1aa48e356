"""Stage train_transformer: tokens -> models/transformer, the baseline, and checkpoints of its training."""

import time
from pathlib import Path

from calm_core.artefacts import whole_directory
from calm_core.model_files import save_model
from calm_core.params import Params
from calm_core.precision import set_threads
from calm_core.token_files import TokenStream, vocabulary_size
from calm_core.tokenizer import load_tokenizer
from calm_core.transformer import Transformer
from calm_core.transformer_training import train_transformer
from stages.curves import training_curves
from stages.running import Measured, run_stage

TOKENS = Path("data/tokens")


def main(params: Params) -> Measured:
    """Train and write."""
    set_threads(params.runtime.threads)
    context = params.transformer.context_tokens
    started = time.monotonic()
    with (
        training_curves(Path("results/training/transformer")) as log,
        whole_directory(Path("models/transformer_checkpoints")) as checkpoints,
    ):

        def keep(step: int, model: Transformer) -> None:
            save_model(model, None, checkpoints / f"step-{step:07d}", context)

        model = train_transformer(params, TokenStream(TOKENS, "train"), vocabulary_size(TOKENS), log, keep)
    seconds = time.monotonic() - started
    save_model(model, load_tokenizer(TOKENS / "tokenizer.json"), Path("models/transformer"), context)
    return {"training_tokens_per_second": params.transformer.training_tokens / seconds}


if __name__ == "__main__":
    run_stage("train_transformer", main)
