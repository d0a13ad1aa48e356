"""Stage correlate_brierlm: held-out tokens, checkpoints of both models -> results/correlation, two measures of each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.model import Calm
from calm_core.calm.token_head import TokenHead
from calm_core.corpus.groups import read_groups
from calm_core.evaluation.brier import by_document, with_groups
from calm_core.evaluation.brierlm import cross_entropy, evaluate_calm, evaluate_transformer
from calm_core.evaluation.correlation import correlation
from calm_core.evaluation.intervals import estimate_brierlm
from calm_core.evaluation.likelihood import TEMPERATURES, calm_surprise, likelihood_blocks, token_head_surprise
from calm_core.params import Params
from calm_core.runtime.device import choose_device
from calm_core.runtime.precision import set_threads
from calm_core.runtime.randomness import generator
from calm_core.storage.json_io import read_json, write_json
from calm_core.storage.model_folder import AUTOENCODER, load_model
from calm_core.storage.provenance import require_intact
from calm_core.tokens.blocks import EvaluationBlocks
from calm_core.tokens.shards import TokenStream
from calm_core.transformer.model import Transformer
from stages.runner.places import RUN, Places
from stages.runner.run import run_repeatable_stage

STAGE = "correlate_brierlm"
TOKENS, GROUPS = Path("data/tokens"), Path("data/groups.parquet")

SAMPLES_OF_TRANSFORMER, SAMPLES_OF_CALM = 1, 6
"""A position, for BrierLM. Of the Transformer, and of a CALM with a token head, the accuracy term is exact: positions
are worth more than samples. Of another CALM, six have fifteen pairs, from which the collision term is estimated."""

SAMPLES_OF_BOUND, FEWER_TOKENS = 16, 4
"""N of the bound of CALM's likelihood, on so many times fewer tokens than evaluate_calm's."""


def main(params: Params, places: Places = RUN) -> None:
    """Score every checkpoint by both measures, at the places where the final models are scored."""
    set_threads(params.runtime.threads)
    require_intact(TOKENS)
    found = {"calm": _of_calm(params, places), "transformer": _of_transformer(params, places)}
    places.correlation.parent.mkdir(parents=True, exist_ok=True)
    write_json(places.correlation, found)
    for name, model in found.items():
        print(
            f"{name}: BrierLM and likelihood over {len(model['checkpoints'])} checkpoints: "
            f"Pearson {model['pearson']}, Spearman {model['spearman']}"
        )


def _of_calm(params: Params, places: Places) -> dict[str, Any]:
    device, blocks = choose_device(params.runtime.device), _blocks(params, params.calm.context_tokens)
    measure, some = "nats_per_token", likelihood_blocks(blocks, params.evaluation.likelihood_tokens // FEWER_TOKENS)
    checkpoints = places.models / "calm_checkpoints"
    if isinstance(load_model(Calm, min(checkpoints.iterdir())).head, TokenHead):

        def known(folder: Path) -> tuple[Any, float]:
            model = load_model(Calm, folder).to(device)
            nats = token_head_surprise(model, some).nats.mean()
            return evaluate_calm(model, None, blocks, SAMPLES_OF_TRANSFORMER), float(nats)

        rows = _checkpoints(params, checkpoints, measure, known)
        return {**_correlation(rows, measure), "checkpoints": rows}
    autoencoder = load_model(Autoencoder, places.models / "calm" / AUTOENCODER).to(device)
    # That of the final model for all: the bounds of models with other decoders could not be compared.
    temperature = float(read_json(places.scores("calm").with_suffix(".json"))["decoder_temperature"])

    def score(folder: Path) -> tuple[Any, float]:
        model = load_model(Calm, folder).to(device)
        surprise = calm_surprise(model, autoencoder, some, (SAMPLES_OF_BOUND,))
        nats = surprise.nats[TEMPERATURES.index(temperature), 0].sum() / surprise.tokens.sum()
        return evaluate_calm(model, autoencoder, blocks, SAMPLES_OF_CALM), float(nats)

    rows = _checkpoints(params, checkpoints, measure, score)
    return {
        **_correlation(rows, measure),
        "samples": SAMPLES_OF_BOUND,
        "decoder_temperature": temperature,
        "checkpoints": rows,
    }


def _of_transformer(params: Params, places: Places) -> dict[str, Any]:
    device, blocks = choose_device(params.runtime.device), _blocks(params, params.transformer.context_tokens)

    def score(folder: Path) -> tuple[Any, float]:
        model = load_model(Transformer, folder).to(device)
        documents = evaluate_transformer(model, blocks, params.autoencoder.patch_size, SAMPLES_OF_TRANSFORMER)
        return documents, cross_entropy(model, blocks)

    rows = _checkpoints(params, places.models / "transformer_checkpoints", "cross_entropy_nats", score)
    return {**_correlation(rows, "cross_entropy_nats"), "checkpoints": rows}


def _blocks(params: Params, context: int) -> EvaluationBlocks:
    settings = params.evaluation
    tokens = TokenStream(TOKENS, settings.split)
    return EvaluationBlocks(tokens, context, settings.batch_sequences, settings.checkpoint_tokens, params.seed)


def _checkpoints(
    params: Params, folder: Path, measure: str, score: Callable[[Path], tuple[Any, float]]
) -> list[dict[str, Any]]:
    """A row for each checkpoint in ``folder``; ``score`` gives sums of Brier scores, and ``measure`` of likelihood."""
    split = params.evaluation.split
    groups = read_groups(GROUPS, split, len(TokenStream(TOKENS, split).document_ends))
    rows = []
    for checkpoint in sorted(folder.iterdir()):
        sums, nats = score(checkpoint)
        draws = generator(params.seed, STAGE, "bootstrap")
        found = estimate_brierlm([by_document(with_groups(sums, groups))], params.evaluation.bootstrap_resamples, draws)
        rows.append(
            {
                "step": int(checkpoint.name.removeprefix("step-")),
                measure: nats,
                "brierlm": found.brierlm,
                "brierlm_ci95": found.brierlm_ci95,
                "brier_1": found.brier[0],
            }
        )
    return rows


def _correlation(rows: list[dict[str, Any]], measure: str) -> dict[str, Any]:
    nats = [row[measure] for row in rows]
    of_brier_1 = correlation([row["brier_1"] for row in rows], nats)
    return {
        **correlation([row["brierlm"] for row in rows], nats)._asdict(),
        # A weak CALM's BrierLM is 0 as soon as Brier-4 is estimated below; this is not.
        "brier_1": of_brier_1._asdict(),
    }


if __name__ == "__main__":
    run_repeatable_stage(STAGE, main)
