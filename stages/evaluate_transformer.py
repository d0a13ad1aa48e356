"""Stage evaluate_transformer: held-out tokens and a Transformer -> results/scores/transformer, with likelihood."""

from functools import partial
from pathlib import Path

from calm_core.corpus.groups import read_groups
from calm_core.evaluation.brierlm import cross_entropy, evaluate_transformer
from calm_core.evaluation.likelihood import (
    described,
    grouped,
    likelihood,
    likelihood_blocks,
    scored_bytes,
    transformer_surprise,
)
from calm_core.evaluation.scores import score_places, write_scores
from calm_core.params import Params
from calm_core.runtime.device import choose_device
from calm_core.runtime.precision import set_threads
from calm_core.runtime.randomness import generator
from calm_core.storage.model_folder import load_model
from calm_core.storage.provenance import require_intact, require_tokenizer_of
from calm_core.tokens.blocks import EvaluationBlocks
from calm_core.tokens.shards import TokenStream
from calm_core.tokens.tokenizer import TOKENIZER, load_tokenizer
from calm_core.transformer.model import Transformer
from stages.runner.places import RUN, Places
from stages.runner.run import run_repeatable_stage

STAGE, TOKENS = "evaluate_transformer", Path("data/tokens")
GROUPS = Path("data/groups.parquet")


def main(params: Params, places: Places = RUN) -> None:
    """Score the model where ``evaluate_calm`` asks a CALM of ``autoencoder.patch_size``, by its own context."""
    set_threads(params.runtime.threads)
    device, settings, folder = choose_device(params.runtime.device), params.evaluation, places.models / "transformer"
    require_intact(TOKENS)
    require_tokenizer_of(folder, TOKENS)
    model = load_model(Transformer, folder).to(device)
    tokens, context = TokenStream(TOKENS, settings.split), params.transformer.context_tokens
    groups = read_groups(GROUPS, settings.split, len(tokens.document_ends))
    blocks = EvaluationBlocks(tokens, context, settings.batch_sequences, settings.tokens, params.seed)
    patch_size, draws = params.autoencoder.patch_size, generator(params.seed, STAGE, "bootstrap")
    score = partial(evaluate_transformer, model, patch_size=patch_size, samples=settings.samples)
    found = score_places(score, blocks, patch_size, settings.split, groups, settings.bootstrap_resamples, draws)
    # The tokens that the bound of a CALM is of; the cross entropy is of all.
    some = likelihood_blocks(blocks, settings.likelihood_tokens)
    surprise = grouped(transformer_surprise(model, some, patch_size), groups)
    text_bytes = scored_bytes(load_tokenizer(folder / TOKENIZER), some, patch_size)
    more = {
        "cross_entropy_nats": cross_entropy(model, blocks),
        **described(likelihood(surprise, text_bytes), surprise, text_bytes),
    }
    write_scores(places.scores("transformer"), found._replace(summary={**found.summary, **more}))


if __name__ == "__main__":
    run_repeatable_stage(STAGE, main)
