"""Stage train_autoencoder: tokens -> models/autoencoder and its reconstruction accuracy."""

from pathlib import Path

from calm_core.autoencoder.training import reconstruction, train_autoencoder
from calm_core.params import Params
from calm_core.storage.json_io import write_json
from calm_core.storage.model_folder import count_parameters, save_model
from calm_core.storage.provenance import require_intact
from calm_core.tokens.shards import TokenStream, vocabulary_size
from calm_core.tokens.tokenizer import load_tokenizer
from stages.runner.checkpointing import finished
from stages.runner.run import Measured, run_stage
from stages.runner.training_session import training_run

TOKENS, MODEL = Path("data/tokens"), Path("models/autoencoder")


def main(params: Params) -> Measured:
    """Train, measure on the held-out split, write."""
    require_intact(TOKENS)
    with training_run("train_autoencoder", params, Path("results/training/autoencoder")) as run:
        model = train_autoencoder(params, TokenStream(TOKENS, "train"), vocabulary_size(TOKENS), *run)
    checkpoints = run.checkpoints
    if checkpoints is None:
        return {}
    seconds = checkpoints.seconds
    quality = reconstruction(model, TokenStream(TOKENS, "validation"), params.seed)
    save_model(model, load_tokenizer(TOKENS / "tokenizer.json"), MODEL)
    write_json(Path("results/autoencoder.json"), {**quality._asdict(), "parameters": count_parameters(model)})
    finished(checkpoints)
    return {"training_tokens_per_second": params.autoencoder.training_tokens / seconds}


if __name__ == "__main__":
    run_stage("train_autoencoder", main, by_processes=True)
