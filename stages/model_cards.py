"""Stage model_cards: descriptions and results of the models -> README.md in each model's folder.

And tokenizer_config.json, by which transformers' AutoTokenizer reads the tokenizer of that folder.
"""

from pathlib import Path

from calm_core.params import Params, with_transformer_steps
from calm_core.report.model_card import render_model_card
from calm_core.storage.atomic import write_text
from calm_core.storage.json_io import read_json, write_json
from calm_core.storage.model_folder import read_config
from calm_core.storage.provenance import DESCRIPTION
from calm_core.tokens.tokenizer import TOKENIZER, load_tokenizer
from calm_core.tokens.tokenizer_config import TOKENIZER_CONFIG, prompt_opening, tokenizer_config
from stages.runner.run import run_stage


def main(params: Params) -> None:
    """Write the three cards, and what transformers reads beside each tokenizer."""
    params = with_transformer_steps(params, read_json(Path("data/transformer_steps.json"))["steps"])
    corpus = read_json(Path("data/tokens") / DESCRIPTION)
    results = {"autoencoder": read_json(Path("results/autoencoder.json")), **read_json(Path("results/brierlm.json"))}
    autoencoder = (
        {"initial": params.calm.initial} if params.calm.has_given_autoencoder else params.autoencoder.model_dump()
    )
    for kind, section in (
        ("autoencoder", autoencoder),
        ("calm", params.calm.model_dump()),
        ("transformer", params.transformer.model_dump()),
    ):
        folder = Path("models") / kind
        # A stage of its own: a card has results of the evaluation, which comes after the models are written.
        config = read_config(folder)
        card = render_model_card(kind, config, corpus, section, results[kind])
        write_text(folder / "README.md", card)
        tokenizer = load_tokenizer(folder / TOKENIZER)
        about = tokenizer_config(tokenizer, config["context_tokens"], prompt_opening(config, folder, tokenizer))
        write_json(folder / TOKENIZER_CONFIG, about)


if __name__ == "__main__":
    run_stage("model_cards", main)
