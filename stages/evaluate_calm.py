"""Stage evaluate_calm: held-out tokens and a CALM -> results/scores/calm, its BrierLM."""

from functools import partial
from pathlib import Path

from calm_core.calm.folder import load_calm
from calm_core.evaluation.brierlm import evaluate_calm
from calm_core.evaluation.scores import score_places, write_scores
from calm_core.params import Params
from calm_core.runtime.device import choose_device
from calm_core.runtime.precision import set_threads
from calm_core.runtime.randomness import generator
from calm_core.storage.provenance import require_intact, require_tokenizer_of
from calm_core.tokens.blocks import EvaluationBlocks
from calm_core.tokens.shards import TokenStream
from stages.runner.places import RUN, Places
from stages.runner.run import run_repeatable_stage

STAGE, TOKENS = "evaluate_calm", Path("data/tokens")


def main(params: Params, places: Places = RUN) -> None:
    """Score the model on the split ``evaluation.split``, at the context it was trained with."""
    set_threads(params.runtime.threads)
    device, settings, folder = choose_device(params.runtime.device), params.evaluation, places.models / "calm"
    require_intact(TOKENS)
    require_tokenizer_of(folder, TOKENS)
    model, autoencoder = load_calm(folder)
    model.to(device)
    autoencoder.to(device)
    tokens, context = TokenStream(TOKENS, settings.split), params.calm.context_tokens
    blocks = EvaluationBlocks(tokens, context, settings.batch_sequences, settings.tokens, params.seed)
    score = partial(evaluate_calm, model, autoencoder, samples=settings.samples)
    draws = generator(params.seed, STAGE, "bootstrap")
    patch_size = model.config.patch_size
    found = score_places(score, blocks, patch_size, settings.split, settings.bootstrap_resamples, draws)
    write_scores(places.scores("calm"), found)


if __name__ == "__main__":
    run_repeatable_stage(STAGE, main)
