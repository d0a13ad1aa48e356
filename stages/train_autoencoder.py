"""Stage train_autoencoder: tokens -> models/autoencoder and its reconstruction accuracy."""

from functools import partial
from pathlib import Path

from calm_core.autoencoder.training import reconstruction, train_autoencoder
from calm_core.params import Params
from calm_core.storage.json_io import write_json
from calm_core.storage.model_folder import count_parameters, save_model
from calm_core.storage.provenance import require_intact
from calm_core.tokens.shards import TokenStream, vocabulary_size
from calm_core.tokens.tokenizer import load_tokenizer
from stages.runner.places import RUN, Places
from stages.runner.run import Measured, run_repeatable_stage
from stages.runner.training_session import training_session

TOKENS = Path("data/tokens")


def main(params: Params, places: Places = RUN) -> Measured:
    """Train, measure on the test split, write."""
    stage, curves = places.stage("train_autoencoder"), places.results / "training/autoencoder"
    with training_session(stage, params, curves, partial(require_intact, TOKENS)) as session:
        model = train_autoencoder(params, TokenStream(TOKENS, "train"), vocabulary_size(TOKENS), session.run)
    if not session.run.is_first:
        return {}
    # After the training session: the other processes need not wait for it.
    model.to(session.run.processes.device)
    quality = reconstruction(model, TokenStream(TOKENS, "test"), params.seed)
    save_model(model, load_tokenizer(TOKENS / "tokenizer.json"), places.autoencoder)
    write_json(places.results / "autoencoder.json", {**quality._asdict(), "parameters": count_parameters(model)})
    return session.finish(params.autoencoder.training_tokens)


if __name__ == "__main__":
    run_repeatable_stage("train_autoencoder", main, by_processes=True)
