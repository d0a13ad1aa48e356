"""Stage train_transformer: tokens -> models/transformer, the baseline, and checkpoints of its training."""

from pathlib import Path

from calm_core.params import Params, with_transformer_steps
from calm_core.storage.json_io import read_json
from calm_core.storage.model_folder import load_model, save_model
from calm_core.storage.provenance import require_intact
from calm_core.tokens.document_marks import document_marks, kind_of_tokens
from calm_core.tokens.shards import TokenStream, vocabulary_size
from calm_core.tokens.tokenizer import load_tokenizer
from calm_core.training.initial import require_agreement, require_unchanged
from calm_core.transformer.model import Transformer
from calm_core.transformer.training import checkpoint_steps, train_transformer
from stages.runner.initial import INITIAL, initial_base_model, initial_folder
from stages.runner.places import RUN, Places
from stages.runner.run import Measured, run_repeatable_stage
from stages.runner.training_session import training_session

TOKENS, STEPS = Path("data/tokens"), Path("data/transformer_steps.json")


def main(params: Params, places: Places = RUN) -> Measured:
    """Train and write."""
    params = with_transformer_steps(params, read_json(STEPS)["steps"])
    context = params.transformer.context_tokens
    stage, curves = places.stage("train_transformer"), places.results / "training/transformer"
    started = initial_folder("transformer", params)

    def verify() -> None:
        require_intact(TOKENS)
        if started is not None:
            require_agreement("transformer", params, started, TOKENS / "tokenizer.json")
            require_unchanged(started, INITIAL / "transformer.json")

    with training_session(stage, params, curves, verify) as session:
        run = session.keeping(checkpoint_steps(params.transformer), context)
        initial = None if started is None else load_model(Transformer, started)
        model = train_transformer(params, TokenStream(TOKENS, "train"), vocabulary_size(TOKENS), run, initial)
    if not session.run.is_first:
        return {}
    session.write_kept(places.models / "transformer_checkpoints")
    tokenizer = load_tokenizer(TOKENS / "tokenizer.json")
    kind = kind_of_tokens(TOKENS)
    marks = document_marks(kind, tokenizer)
    # A document that begins with a token of its own needs none before it.
    opening = None if marks.before else [marks.filler]
    base = initial_base_model(params.transformer.initial, started)
    save_model(model, tokenizer, places.models / "transformer", context, opening, document_marks=kind, base_model=base)
    return session.finish(params.transformer.training_tokens)


if __name__ == "__main__":
    run_repeatable_stage("train_transformer", main, by_processes=True)
