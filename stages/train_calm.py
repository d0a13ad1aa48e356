"""Stage train_calm: tokens, latents and autoencoder -> models/calm."""

from pathlib import Path

from calm_core.autoencoder import Autoencoder, AutoencoderConfig
from calm_core.calm_training import train_calm
from calm_core.latent_files import LatentCorpus
from calm_core.model_files import AUTOENCODER, load_model, load_model_tokenizer, save_model
from calm_core.params import Params
from calm_core.provenance import require_intact, require_latents_of, require_tokenizer_of
from calm_core.token_files import TokenStream
from stages.checkpointing import finished
from stages.running import Measured, run_stage
from stages.training_run import training_run

TOKENS, LATENTS = Path("data/tokens"), Path("data/latents")
TRAINED, MODEL = Path("models/autoencoder"), Path("models/calm")


def main(params: Params) -> Measured:
    """Train and write, the frozen autoencoder beside the model."""
    require_intact(TOKENS)
    require_intact(LATENTS)
    require_latents_of(LATENTS, TRAINED, TOKENS)
    require_tokenizer_of(TRAINED, TOKENS)
    tokens, latents = TokenStream(TOKENS, "train"), LatentCorpus(LATENTS)
    autoencoder = load_model(Autoencoder, AutoencoderConfig, TRAINED)
    with training_run("train_calm", params, Path("results/training/calm")) as run:
        model = train_calm(params, tokens, latents, autoencoder, *run)
    checkpoints = run.checkpoints
    if checkpoints is None:
        return {}
    seconds = checkpoints.seconds
    tokenizer = load_model_tokenizer(TRAINED)
    save_model(model, tokenizer, MODEL, params.calm.context_tokens)
    save_model(autoencoder, tokenizer, MODEL / AUTOENCODER)
    finished(checkpoints)
    return {"training_tokens_per_second": params.calm.training_tokens / seconds}


if __name__ == "__main__":
    run_stage("train_calm", main, by_processes=True)
