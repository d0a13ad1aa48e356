"""Stage correlate_brierlm: held-out tokens and the Transformer's checkpoints -> results/correlation.json."""

from pathlib import Path
from typing import Any

from calm_core.evaluation.brier import by_document
from calm_core.evaluation.brierlm import cross_entropy, evaluate_transformer
from calm_core.evaluation.correlation import correlation
from calm_core.evaluation.intervals import estimate_brierlm
from calm_core.params import Params
from calm_core.runtime.device import choose_device
from calm_core.runtime.precision import set_threads
from calm_core.runtime.randomness import generator
from calm_core.storage.json_io import write_json
from calm_core.storage.model_folder import load_model
from calm_core.storage.provenance import require_intact
from calm_core.tokens.blocks import EvaluationBlocks
from calm_core.tokens.shards import TokenStream
from calm_core.transformer.model import Transformer
from stages.runner.run import run_stage

STAGE = "correlate_brierlm"
TOKENS = Path("data/tokens")

SAMPLES = 1
"""Sampled prefixes a position: what is saved here is better spent on positions, whose accuracy term is exact."""


def main(params: Params) -> None:
    """Score every checkpoint by both measures, at the places where ``evaluate_brierlm`` scores the final model."""
    set_threads(params.runtime.threads)
    device = choose_device(params.runtime.device)
    settings, context = params.evaluation, params.transformer.context_tokens
    require_intact(TOKENS)
    tokens = TokenStream(TOKENS, settings.split)
    blocks = EvaluationBlocks(tokens, context, settings.batch_sequences, settings.checkpoint_tokens, params.seed)
    rows: list[dict[str, Any]] = []
    for folder in sorted(Path("models/transformer_checkpoints").iterdir()):
        model = load_model(Transformer, folder).to(device)
        documents = by_document(evaluate_transformer(model, blocks, params.autoencoder.patch_size, SAMPLES))
        score = estimate_brierlm([documents], settings.bootstrap_resamples, generator(params.seed, STAGE, "bootstrap"))
        rows.append(
            {
                "step": int(folder.name.removeprefix("step-")),
                "cross_entropy_nats": cross_entropy(model, blocks),
                "brierlm": score.brierlm,
                "brierlm_ci95": score.brierlm_ci95,
            }
        )
    found = correlation([row["brierlm"] for row in rows], [row["cross_entropy_nats"] for row in rows])
    write_json(Path("results/correlation.json"), {**found._asdict(), "checkpoints": rows})
    print(f"BrierLM and cross entropy over {len(rows)} checkpoints: Pearson {found.pearson}, Spearman {found.spearman}")


if __name__ == "__main__":
    run_stage(STAGE, main)
