"""Stage report: the results of all stages -> results/report.html."""

from collections import deque
from pathlib import Path

import torch

from calm_core.inference.decoding import Sampling
from calm_core.inference.language_model import load_language_model
from calm_core.params import Params
from calm_core.report.page import read_curves, render_report
from calm_core.runtime.device import choose_device
from calm_core.runtime.machine import describe_machine
from calm_core.runtime.precision import set_threads
from calm_core.storage.atomic import write_text
from calm_core.storage.json_io import read_json
from calm_core.storage.provenance import DESCRIPTION, require_intact, require_tokenizer_of
from calm_core.tokens.shards import TokenStream
from stages.runner.places import Places
from stages.runner.run import run_stage

RESULTS, TOKENS = Path("results"), Path("data/tokens")
CALM, TRANSFORMER = Path("models/calm"), Path("models/transformer")


def main(params: Params) -> None:
    """Gather, sample, render."""
    set_threads(params.runtime.threads)
    require_intact(TOKENS)
    for folder in (CALM, TRANSFORMER):
        require_tokenizer_of(folder, TOKENS)
    page = render_report(
        params=params,
        params_text=Path("params.yaml").read_text(encoding="utf-8"),
        corpus=read_json(TOKENS / DESCRIPTION),
        autoencoder=read_json(RESULTS / "autoencoder.json"),
        brierlm=read_json(RESULTS / "brierlm.json"),
        flops=read_json(RESULTS / "flops.json"),
        correlations=[read_json(Places(seed).correlation) for seed in (None, *params.evaluation.seeds)],
        diversity=read_json(RESULTS / "diversity.json"),
        curves=read_curves(RESULTS / "training"),
        samples=_samples(params),
        machine=describe_machine(),
    )
    write_text(RESULTS / "report.html", page)
    print(f"wrote {RESULTS / 'report.html'}; open it in a browser")


def _samples(params: Params) -> list[dict[str, str]]:
    """Prompts from evenly spaced places of the test split, continued by both models."""
    settings = params.report
    device = choose_device(params.runtime.device)
    models = [load_language_model(folder, device) for folder in (CALM, TRANSFORMER)]
    tokens = TokenStream(TOKENS, "test")
    prompt_length, length = settings.prompt_tokens, settings.sample_tokens
    last = max(0, len(tokens) - prompt_length - length)
    # Two more than asked for, without both ends: prompts from within the split.
    starts = torch.linspace(0, last, settings.sample_texts + 2).long()[1:-1]
    windows = tokens.windows(starts, min(prompt_length + length, len(tokens))).tolist()
    prompts = [window[:prompt_length] for window in windows]
    columns = [prompts, [window[prompt_length:] for window in windows]]
    for model in models:
        # As the start of a document, which a piece of a text is given to the models as.
        begun = [[*model.document_marks.before, *prompt] for prompt in prompts]
        # The stream yields growing continuations; the last are the complete ones.
        (continuations,) = deque(model.stream(begun, length, Sampling(settings.temperature), params.seed), maxlen=1)
        # Both models share a tokenizer, checked above, so one of them decodes all columns.
        columns.append([continuation.token_ids for continuation in continuations])
    texts = [[models[0].decode(token_ids) for token_ids in column] for column in columns]
    return [dict(zip(("prompt", "truth", "calm", "transformer"), row, strict=True)) for row in zip(*texts, strict=True)]


if __name__ == "__main__":
    run_stage("report", main)
