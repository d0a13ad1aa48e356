"""Stage train_transformer: tokens -> models/transformer, the baseline."""

import time
from pathlib import Path

from calm_core.artefacts import whole_directory
from calm_core.model_files import save_model
from calm_core.params import Params
from calm_core.precision import set_threads
from calm_core.token_files import TokenStream, vocabulary_size
from calm_core.tokenizer import load_tokenizer
from calm_core.transformer_training import train_transformer
from stages.curves import training_curves
from stages.running import Measured, run_stage

TOKENS = Path("data/tokens")


def main(params: Params) -> Measured:
    """Train and write."""
    set_threads(params.runtime.threads)
    started = time.monotonic()
    with training_curves(Path("results/training/transformer")) as log:
        model = train_transformer(params, TokenStream(TOKENS, "train"), vocabulary_size(TOKENS), log)
    seconds = time.monotonic() - started
    with whole_directory(Path("models/transformer")) as folder:
        save_model(model, "transformer", load_tokenizer(TOKENS / "tokenizer.json"), folder)
    section = params.transformer
    return {"training_tokens_per_second": section.steps * section.batch_sequences * section.context_tokens / seconds}


if __name__ == "__main__":
    run_stage("train_transformer", main)
