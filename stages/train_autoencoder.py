"""Stage train_autoencoder: tokens -> models/autoencoder and its reconstruction accuracy.

The autoencoder of a CALM to go on from, `calm.initial`, is measured and not trained.
"""

from functools import partial
from pathlib import Path

from calm_core.autoencoder.model import Autoencoder
from calm_core.autoencoder.training import reconstruction, train_autoencoder
from calm_core.params import Params
from calm_core.runtime.precision import set_threads
from calm_core.runtime.process_group import joined
from calm_core.storage.atomic import whole_directory
from calm_core.storage.json_io import write_json
from calm_core.storage.model_folder import AUTOENCODER, count_parameters, load_model, save_model
from calm_core.storage.provenance import require_intact
from calm_core.tokens.shards import TokenStream, vocabulary_size
from calm_core.tokens.tokenizer import load_tokenizer
from calm_core.training.initial import require_unchanged
from stages.runner.initial import INITIAL, initial_base_model, initial_folder
from stages.runner.places import RUN, Places
from stages.runner.run import Measured, run_repeatable_stage
from stages.runner.training_session import training_session
from stages.runner.verification import verify_once

TOKENS = Path("data/tokens")


def main(params: Params, places: Places = RUN) -> Measured:
    """Train, measure on the test split, write."""
    if params.calm.has_given_autoencoder:
        _take_given(params, places)
        return {}
    stage, curves = places.stage("train_autoencoder"), places.results / "training/autoencoder"
    with training_session(stage, params, curves, partial(require_intact, TOKENS)) as session:
        model = train_autoencoder(params, TokenStream(TOKENS, "train"), vocabulary_size(TOKENS), session.run)
    if not session.run.is_first:
        return {}
    # After the training session: the other processes need not wait for it.
    model.to(session.run.processes.device)
    _write(model, params, places)
    return session.finish(params.autoencoder.training_tokens)


def _take_given(params: Params, places: Places) -> None:
    initial = initial_folder("calm", params)
    assert initial is not None
    given = initial / AUTOENCODER

    def verify() -> None:
        require_intact(TOKENS)
        require_unchanged(given, INITIAL / "autoencoder.json")

    set_threads(params.runtime.threads)
    with joined(params.runtime.device) as processes:
        verify_once(processes, verify)
        if not processes.is_first:
            return
        base = initial_base_model(params.calm.initial, given)
        _write(load_model(Autoencoder, given).to(processes.device), params, places, base)
    with whole_directory(places.results / "training/autoencoder") as curves:
        # An output of the stage all the same: without points, but no empty folder, which DVC would not restore.
        write_json(curves / "metrics.json", {})
    print(f"the autoencoder is that of {params.calm.initial}; it is not trained")


def _write(model: Autoencoder, params: Params, places: Places, base_model: str | None = None) -> None:
    quality = reconstruction(model, TokenStream(TOKENS, "test"), params.seed)
    save_model(model, load_tokenizer(TOKENS / "tokenizer.json"), places.autoencoder, base_model=base_model)
    write_json(places.results / "autoencoder.json", {**quality._asdict(), "parameters": count_parameters(model)})


if __name__ == "__main__":
    run_repeatable_stage("train_autoencoder", main, by_processes=True)
