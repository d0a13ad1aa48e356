"""Stage train_transformer: tokens -> models/transformer, the baseline, and checkpoints of its training."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from calm_core.params import Params, with_transformer_steps
from calm_core.storage.atomic import whole_directory
from calm_core.storage.json_io import read_json
from calm_core.storage.model_folder import save_model
from calm_core.storage.provenance import require_intact
from calm_core.tokens.shards import TokenStream, vocabulary_size
from calm_core.tokens.tokenizer import end_of_text_id, load_tokenizer
from calm_core.transformer.model import Transformer
from calm_core.transformer.training import checkpoint_steps, train_transformer
from stages.runner.places import RUN, Places
from stages.runner.run import Measured, run_repeatable_stage
from stages.runner.training_session import training_session

TOKENS, STEPS = Path("data/tokens"), Path("data/transformer_steps.json")


def main(params: Params, places: Places = RUN) -> Measured:
    """Train and write."""
    params = with_transformer_steps(params, read_json(STEPS)["steps"])
    context = params.transformer.context_tokens
    stage, curves = places.stage("train_transformer"), places.results / "training/transformer"
    with training_session(stage, params, curves, partial(require_intact, TOKENS)) as session:
        checkpoints = session.run.checkpoints  # of the first process, which alone keeps models

        def keep(step: int, model: Transformer) -> None:
            assert checkpoints is not None
            with session.timer.stopped():
                save_model(model, None, checkpoints.kept_files / f"step-{step:07d}", context)

        run = replace(session.run, keep=keep, kept_after=checkpoint_steps(params.transformer))
        model = train_transformer(params, TokenStream(TOKENS, "train"), vocabulary_size(TOKENS), run)
    if checkpoints is None:
        return {}
    # Copied at the end, from outside the outputs: DVC deletes those before an interrupted training resumes.
    with whole_directory(places.models / "transformer_checkpoints") as folder:
        shutil.copytree(checkpoints.kept_files, folder, dirs_exist_ok=True)
    tokenizer = load_tokenizer(TOKENS / "tokenizer.json")
    save_model(model, tokenizer, places.models / "transformer", context, [end_of_text_id(tokenizer)])
    return session.finish(params.transformer.training_tokens)


if __name__ == "__main__":
    run_repeatable_stage("train_transformer", main, by_processes=True)
