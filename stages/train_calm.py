"""Stage train_calm: tokens, latents and autoencoder -> models/calm."""

import time
from pathlib import Path

from calm_core.artefacts import whole_directory
from calm_core.autoencoder import Autoencoder, AutoencoderConfig
from calm_core.calm_training import train_calm
from calm_core.latent_files import LatentCorpus
from calm_core.model_files import load_model, load_model_tokenizer, save_model
from calm_core.params import Params
from calm_core.precision import set_threads
from calm_core.token_files import TokenStream
from stages.curves import training_curves
from stages.running import Measured, run_stage

AUTOENCODER = Path("models/autoencoder")


def main(params: Params) -> Measured:
    """Train and write."""
    set_threads(params.runtime.threads)
    tokens, latents = TokenStream(Path("data/tokens"), "train"), LatentCorpus(Path("data/latents"))
    autoencoder = load_model(Autoencoder, AutoencoderConfig, AUTOENCODER)
    started = time.monotonic()
    with training_curves(Path("results/training/calm")) as log:
        model = train_calm(params, tokens, latents, autoencoder, log)
    seconds = time.monotonic() - started
    with whole_directory(Path("models/calm")) as folder:
        save_model(model, "calm", load_model_tokenizer(AUTOENCODER), folder)
    section = params.calm
    return {"training_tokens_per_second": section.steps * section.batch_sequences * section.context_tokens / seconds}


if __name__ == "__main__":
    run_stage("train_calm", main)
