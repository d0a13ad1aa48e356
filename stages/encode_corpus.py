"""Stage encode_corpus: tokens and autoencoder -> data/latents."""

from pathlib import Path

from calm_core.autoencoder.model import Autoencoder
from calm_core.latents.encode import encode_corpus, help_to_encode
from calm_core.params import Params
from calm_core.runtime.machine import numerics
from calm_core.runtime.precision import set_threads
from calm_core.runtime.process_group import joined
from calm_core.storage.atomic import whole_directory
from calm_core.storage.model_folder import load_model
from calm_core.storage.provenance import describe_latents, require_intact, require_tokenizer_of
from calm_core.storage.resumable import FinishedFiles
from calm_core.tokens.shards import TokenStream
from stages.runner.resume import folder_of, mark_finished
from stages.runner.run import run_stage

TOKENS, TRAINED = Path("data/tokens"), Path("models/autoencoder")


def main(params: Params) -> None:
    """Encode every distinct patch of the training split once."""
    set_threads(params.runtime.threads)
    require_intact(TOKENS)
    require_tokenizer_of(TRAINED, TOKENS)
    model = load_model(Autoencoder, TRAINED)
    precision = params.runtime.precision
    with joined(params.runtime.device) as processes:
        model.to(processes.device)
        # Keyed by the numerics too: shards of one encoding must not come from machines that round differently.
        numbers = numerics(precision, processes.device)
        kept = FinishedFiles(folder_of("encode_corpus", params, numbers), "encode_corpus")
        # The others help, and leave the output to the first process.
        if not processes.is_first:
            help_to_encode(model, precision, kept, processes)
            return
        with whole_directory(Path("data/latents")) as folder:
            counts = encode_corpus(model, TokenStream(TOKENS, "train"), folder, precision, kept, processes)
            describe_latents(folder, TRAINED, TOKENS, counts._asdict())
    mark_finished(kept.folder)
    print(f"{counts.patches:,} patches, {counts.distinct:,} distinct ({counts.distinct / counts.patches:.1%})")


if __name__ == "__main__":
    run_stage("encode_corpus", main, by_processes=True)
