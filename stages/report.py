"""Stage report: the results of all stages -> results/report.html."""

from pathlib import Path

import torch

from calm_core.artefacts import read_json, write_text
from calm_core.autoencoder import Autoencoder, AutoencoderConfig
from calm_core.calm import Calm, CalmConfig
from calm_core.generation import generate_with_calm, generate_with_transformer
from calm_core.machine import describe_machine
from calm_core.model_files import load_model, load_model_tokenizer
from calm_core.params import Params
from calm_core.precision import set_threads
from calm_core.randomness import generator
from calm_core.report import read_curves, render_report
from calm_core.token_files import DESCRIPTION, TokenStream
from calm_core.transformer import Transformer, TransformerConfig
from stages.running import run_stage

STAGE = "report"
RESULTS, TOKENS, MODELS = Path("results"), Path("data/tokens"), Path("models")


def main(params: Params) -> None:
    """Gather, sample, render."""
    set_threads(params.runtime.threads)
    page = render_report(
        params=params,
        params_text=Path("params.yaml").read_text(encoding="utf-8"),
        corpus=read_json(TOKENS / DESCRIPTION),
        autoencoder=read_json(RESULTS / "autoencoder.json"),
        brierlm=read_json(RESULTS / "brierlm.json"),
        flops=read_json(RESULTS / "flops.json"),
        curves=read_curves(RESULTS / "training"),
        samples=_samples(params),
        machine=describe_machine(),
    )
    write_text(RESULTS / "report.html", page)
    print(f"wrote {RESULTS / 'report.html'}; open it in a browser")


def _samples(params: Params) -> list[dict[str, str]]:
    """Prompts from evenly spaced places of the validation split, continued by both models."""
    settings = params.report
    autoencoder = load_model(Autoencoder, AutoencoderConfig, MODELS / "autoencoder")
    calm = load_model(Calm, CalmConfig, MODELS / "calm")
    transformer = load_model(Transformer, TransformerConfig, MODELS / "transformer")
    tokenizer = load_model_tokenizer(MODELS / "calm")
    tokens = TokenStream(TOKENS, "validation")
    patch_size, length = calm.config.patch_size, settings.sample_tokens
    prompt_length = -(-settings.prompt_tokens // patch_size) * patch_size  # whole patches
    last = max(0, len(tokens) - prompt_length - length)
    starts = torch.linspace(0, last, settings.sample_texts + 2).long()[1:-1]
    windows = tokens.windows(starts, min(prompt_length + length, len(tokens)))
    prompts = windows[:, :prompt_length]
    by_calm = generate_with_calm(
        calm, autoencoder, prompts, length, settings.temperature, generator(params.seed, STAGE, "calm")
    )
    by_transformer = generate_with_transformer(
        transformer, prompts, length, settings.temperature, generator(params.seed, STAGE, "transformer")
    )
    texts = [
        tokenizer.decode_batch(token_ids.tolist(), skip_special_tokens=False)
        for token_ids in (prompts, windows[:, prompt_length:], by_calm, by_transformer)
    ]
    return [dict(zip(("prompt", "truth", "calm", "transformer"), row, strict=True)) for row in zip(*texts, strict=True)]


if __name__ == "__main__":
    run_stage(STAGE, main)
