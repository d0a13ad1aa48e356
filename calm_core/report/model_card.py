"""The model card beside the weights: what a model is, what it was trained on, how well it does, how to load it.

Markdown under a YAML header, both as the Hugging Face hub reads them: its own library writes the header, in which the
results stand as a model index.
"""

import html
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from calm_core.storage.base_model import BASE_MODEL
from calm_core.storage.hub import NAME

TITLES = {
    "autoencoder": "Autoencoder of CALM",
    "calm": "CALM, a continuous autoregressive language model",
    "transformer": "Transformer, the baseline of CALM",
}

_ABOUT = {
    "autoencoder": "It packs K tokens into one latent vector and back; a CALM predicts these vectors.",
    "calm": "It predicts one latent vector for every K tokens; its autoencoder, in `autoencoder/`, decodes them.",
    "transformer": "It predicts one token a step by a softmax, on the same backbone code as CALM.",
}

_ABOUT_TOKEN_HEAD = (
    "Its backbone takes one step for every K tokens, and a small decoder, the token head, then writes the tokens of "
    "the patch one by one. So it has an exact likelihood, and neither continuous latents nor an autoencoder; the "
    "models of the paper have both, and no likelihood."
)
"""Of a CALM whose head is no head of the paper's."""

_TASKS = {
    "autoencoder": ("feature-extraction", "Reconstruction of text from latent vectors"),
    "calm": ("text-generation", "Language modelling"),
    "transformer": ("text-generation", "Language modelling"),
}

_METRICS = {
    "brierlm": ("brierlm", "BrierLM"),
    "cross_entropy_nats": ("cross_entropy", "Cross entropy, nats a token"),
    "token_accuracy": ("accuracy", "Token accuracy"),
    "token_accuracy_noisy": ("accuracy", "Token accuracy under latent noise"),
}
"""Of results that go into the model index: the metric's identifier and name there."""

_LOADING = {
    "autoencoder": """from calm_core.autoencoder.model import Autoencoder
from calm_core.storage.hub import local_folder
from calm_core.storage.model_folder import load_model

autoencoder = load_model(Autoencoder, local_folder("models/autoencoder"))""",
    "calm": """from calm_core.inference.language_model import load_language_model

model = load_language_model("models/calm")
print(model.generate(["The bucket"], tokens=32, temperature=0.5, seed=0))""",
}
_LOADING["transformer"] = _LOADING["calm"].replace("models/calm", "models/transformer")

_NO_SHAPE = ("kind", BASE_MODEL)
"""Keys of config.json that stand elsewhere on a card."""

_LICENCE = "What may be done with these weights is for the makers of that model to say: this card names no licence."

_MEASURED = {
    "autoencoder": "at the end of its training (stage `train_autoencoder`, results/autoencoder.json)",
    "calm": "after the training (stages `evaluate_calm` and `evaluate_brierlm`, results/brierlm.json)",
    "transformer": "after the training (stages `evaluate_transformer` and `evaluate_brierlm`, results/brierlm.json)",
}
"""Where the results come from."""


def render_model_card(
    kind: str, config: dict[str, Any], corpus: dict[str, Any], params: dict[str, Any], results: dict[str, Any]
) -> str:
    """The card of a model of ``kind``.

    ``config`` is its config.json, ``corpus`` the description of the tokens, ``params`` the section it was trained
    with (``initial`` alone, the CALM's, of an autoencoder that came with a CALM and was not trained), ``results`` a
    mapping of measured figures; lists are printed as intervals, and tables are left out. ``split`` among them names
    what they were measured on; an autoencoder's, which name none, are of the test split.
    """
    split = results.get("split", "test")
    about = _ABOUT_TOKEN_HEAD if kind == "calm" and config["head"]["kind"] == "tokens" else _ABOUT[kind]
    train, held_out = corpus["splits"]["train"], corpus["splits"][split]
    base, is_trained = config.get(BASE_MODEL), kind != "autoencoder" or not params.get("initial")
    header = ModelCardData(
        # Of weights that came from elsewhere the licence is not ours to give.
        license=None if params.get("initial") else "mit",
        library_name="calm_core",
        tags=sorted({"calm", "arxiv:2510.27688", kind}),
        model_name=TITLES[kind],
        base_model=base,
        # The hub has no word for a model that was taken as it is.
        base_model_relation="finetune" if base and is_trained else None,
        eval_results=_evaluations(kind, corpus["source"], split, results),
    )
    lines = [
        "---",
        header.to_yaml(),
        "---",
        f"# {TITLES[kind]}",
        "",
        f"{about} Paper: [arXiv 2510.27688](https://arxiv.org/abs/2510.27688). Made by the pipeline of this",
        "repository (`dvc repro`).",
        "",
        "## Load",
        "```python",
        _LOADING[kind],
        "```",
        "In place of the folder a name on the Hugging Face hub, OWNER/NAME, does as well.",
        "",
        "## Data",
        f"{_text(corpus['source'])}; licence: {_text(corpus['licence'])}.",
        f"Training split: {train['documents']:,} documents,",
        f"{train['tokens']:,} tokens; {split} split: {held_out['tokens']:,} tokens.",
        "",
        f"## Results, {split} split",
        f"Measured by the pipeline itself {_MEASURED[kind]}, on documents that it kept apart from the training split;",
        "nobody else has measured them. BrierLM is the paper's likelihood-free score, 0 to 100, higher is better.",
        "",
        *_table({key: value for key, value in results.items() if not _is_table(value)}),
        "",
        "## Shape",
        *_table(_flat({key: config[key] for key in config if key not in _NO_SHAPE and config[key] is not None})),
        "",
        "## Training",
        *_training(kind, params, base),
        "",
        "A model of this size writes text that is neither true nor safe to act on; it is here to be measured.",
    ]
    return str(ModelCard("\n".join(lines) + "\n"))


def _training(kind: str, params: dict[str, Any], base: str | None) -> list[str]:
    named = params.get("initial") or ""
    # A name that may be the hub's as it is, but of a folder its own alone: what lies above it is of one machine.
    initial = _text(named if NAME.fullmatch(named) else Path(named).name)
    settings = _table({key: value for key, value in params.items() if key != "initial"})
    if not initial:
        return settings
    # A folder's name tells others nothing.
    whence = f"`{initial}`" if base is None or named.partition("@")[0] == base else f"`{initial}`, of `{_text(base)}`"
    if kind == "autoencoder":
        return [f"None here: it came with the CALM {whence}, and is as it was there. {_LICENCE}"]
    told = f"Not from the beginning: it went on from {whence}. Data, steps and compute are of that part alone."
    return [f"{told} {_LICENCE}", "", *settings]


def _evaluations(kind: str, source: str, split: str, results: dict[str, Any]) -> list[EvalResult]:
    task, task_name = _TASKS[kind]
    return [
        EvalResult(
            task_type=task,
            task_name=task_name,
            dataset_type=_text(_dataset_identifier(source)),
            dataset_name=_text(source),
            dataset_split=split,
            metric_type=metric,
            metric_name=name,
            metric_value=results[key],
        )
        for key, (metric, name) in _METRICS.items()
        if key in results
    ]


def _dataset_identifier(source: str) -> str:
    """Of a source as ``calm_core.corpus.documents.describe`` names it: the dataset's name on the hub, or the kind."""
    kind, _, name = source.partition(" ")
    return name.split()[0] if kind == "dataset:" and name.split() else kind.removesuffix(":")


def _table(values: dict[str, Any]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {_text(key)} | {_text(value)} |" for key, value in values.items())]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    if isinstance(value, float):
        return f"{value:.5g}"
    # Names come from elsewhere: neither HTML nor the end of a table's cell.
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", "&#124;")


def _is_table(value: Any) -> bool:
    """Whether it is a list of mappings, as the scores by place are; the report shows those."""
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
