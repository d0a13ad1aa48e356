"""Stage train_calm: tokens, latents and autoencoder -> models/calm, and checkpoints of its training."""

from pathlib import Path

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.folder import load_calm
from calm_core.calm.model import Calm
from calm_core.calm.training import checkpoint_steps, train_calm
from calm_core.errors import CalmError
from calm_core.latents.online import OnlineLatents
from calm_core.latents.shards import LatentCorpus
from calm_core.params import Params
from calm_core.storage.base_model import base_model_of
from calm_core.storage.model_folder import AUTOENCODER, load_model, save_model
from calm_core.storage.provenance import require_intact, require_latents_of, require_tokenizer_of
from calm_core.tokens.document_marks import kind_of_tokens
from calm_core.tokens.openings import commonest_document_end
from calm_core.tokens.shards import TokenStream
from calm_core.tokens.tokenizer import load_tokenizer
from calm_core.training.initial import require_agreement, require_unchanged
from stages.runner.initial import INITIAL, initial_base_model, initial_folder
from stages.runner.places import RUN, Places
from stages.runner.run import Measured, run_repeatable_stage
from stages.runner.training_session import training_session

TOKENS = Path("data/tokens")


def main(params: Params, places: Places = RUN) -> Measured:
    """Train and write, the frozen autoencoder beside the model; with a token head its folder is empty."""
    decoded = params.calm.needs_autoencoder
    encoded = decoded and params.calm.latents == "encoded"
    started = initial_folder("calm", params)
    trained, model_folder = places.autoencoder, places.models / "calm"
    # What BrierLM is compared with along the training is measured of the run's own CALM alone.
    kept = checkpoint_steps(params.calm) if places.preset is None else frozenset()

    def verify() -> None:
        # Before hours of training: tokens, latents and autoencoder have to be those of one run.
        require_intact(TOKENS)
        require_tokenizer_of(trained, TOKENS)
        if encoded:
            require_intact(places.latents)
            require_latents_of(places.latents, trained, TOKENS)
        if started is not None:
            require_agreement("calm", params, started, TOKENS / "tokenizer.json")
            require_unchanged(started, INITIAL / "calm.json")

    with training_session(places.stage("train_calm"), params, places.results / "training/calm", verify) as session:
        tokens, autoencoder = TokenStream(TOKENS, "train"), load_model(Autoencoder, trained)
        online = OnlineLatents(tokens, autoencoder, params.runtime.precision)
        latents = LatentCorpus(places.latents) if encoded else online
        run = session.keeping(kept, params.calm.context_tokens)
        initial = None if started is None else _initial(started, autoencoder, trained)
        model = train_calm(params, tokens, latents, autoencoder, run, initial)
    if not session.run.is_first:
        return {}
    if kept:
        # Without the autoencoder, which is that of models/calm for all of them.
        session.write_kept(places.models / "calm_checkpoints")
    # From the autoencoder's folder, which the checks above have tied to the tokens.
    tokenizer = load_tokenizer(trained / "tokenizer.json")
    opening = commonest_document_end(tokens, model.config.patch_size)
    kind, base = kind_of_tokens(TOKENS), initial_base_model(params.calm.initial, started)
    context = params.calm.context_tokens
    save_model(model, tokenizer, model_folder, context, opening, document_marks=kind, base_model=base)
    if decoded:
        # A CALM is useless without the decoder of its latents, so its folder has both.
        base = base_model_of(trained, trained)
        save_model(autoencoder, tokenizer, model_folder / AUTOENCODER, base_model=base)
    else:
        (model_folder / AUTOENCODER).mkdir(exist_ok=True)  # dvc.yaml names it as an output, whatever the head
    return session.finish(params.calm.training_tokens)


def _initial(folder: Path, autoencoder: Autoencoder, trained: Path) -> Calm:
    """The CALM to go on from; raises CalmError unless ``autoencoder``, from ``trained``, is the one of its latents."""
    model, own = load_calm(folder)
    if own is not None:
        weights = autoencoder.state_dict()
        same = own.config == autoencoder.config
        if not (same and all(weight.equal(weights[name]) for name, weight in own.state_dict().items())):
            raise CalmError(f"{trained} is not the autoencoder in {folder}; run `dvc repro --force train_autoencoder`")
    return model


if __name__ == "__main__":
    run_repeatable_stage("train_calm", main, by_processes=True, of_calm=True)
