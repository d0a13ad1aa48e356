"""Stage encode_corpus: tokens and autoencoder -> data/latents, or a description alone where CALM's training encodes."""

from functools import partial
from pathlib import Path

from calm_core.autoencoder.model import Autoencoder
from calm_core.latents.encode import encode_corpus, help_to_encode
from calm_core.params import Params
from calm_core.runtime.launcher import rank_in_environment
from calm_core.runtime.machine import numerics
from calm_core.runtime.precision import set_threads
from calm_core.runtime.process_group import joined
from calm_core.storage.atomic import whole_directory
from calm_core.storage.model_folder import load_model
from calm_core.storage.provenance import describe_latents, describe_no_latents, require_intact, require_tokenizer_of
from calm_core.storage.resumable import FinishedFiles
from calm_core.tokens.shards import TokenStream
from stages.runner.places import RUN, Places
from stages.runner.resume import folder_of, mark_finished
from stages.runner.run import run_repeatable_stage
from stages.runner.verification import verify_once

TOKENS = Path("data/tokens")


def main(params: Params, places: Places = RUN) -> None:
    """Encode every distinct patch of the training split once, unless ``calm.latents`` is online."""
    if params.calm.latents == "online":
        _write_none(places.latents)
        return
    stage, trained = places.stage("encode_corpus"), places.autoencoder
    set_threads(params.runtime.threads)
    precision = params.runtime.precision
    with joined(params.runtime.device) as processes:
        verify_once(processes, partial(_verify, trained))
        model = load_model(Autoencoder, trained).to(processes.device)
        # Keyed by the numerics too: shards of one encoding must not come from machines that round differently.
        numbers = numerics(precision, processes.device)
        kept = FinishedFiles(folder_of(stage, params, numbers), stage)
        # The others help, and leave the output to the first process.
        if not processes.is_first:
            help_to_encode(model, precision, kept, processes)
            return
        with whole_directory(places.latents) as folder:
            counts = encode_corpus(model, TokenStream(TOKENS, "train"), folder, precision, kept, processes)
            describe_latents(folder, trained, TOKENS, counts._asdict())
    mark_finished(kept.folder)
    print(f"{counts.patches:,} patches, {counts.distinct:,} distinct ({counts.distinct / counts.patches:.1%})")


def _verify(trained: Path) -> None:
    require_intact(TOKENS)
    require_tokenizer_of(trained, TOKENS)


def _write_none(latents: Path) -> None:
    if rank_in_environment() == 0:
        # The folder is an output of the stage all the same: DVC wants it there.
        with whole_directory(latents) as folder:
            describe_no_latents(folder)
        print("calm.latents is online: nothing to encode")


if __name__ == "__main__":
    run_repeatable_stage("encode_corpus", main, by_processes=True)
