"""One training of the study and what became of it; plain data, in results/study.json as it is here."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["planned", "completed", "failed"]

TRANSFORMER = "transformer"


@dataclass(frozen=True)
class Point:
    """A model of one shape, trained for one budget under one seed, evaluated; FLOPs are the analytic count."""

    model: str
    """``transformer``, or ``calm-K``."""
    hidden_size: int
    """Of the language model."""
    budget: float
    """FLOPs that the training of the language model was to have."""
    seed: int
    overrides: list[str]
    """Of params.yaml: section.key=value."""
    parameters: int
    training_tokens: int
    """Tokens seen, repeated ones counted again."""
    training_flops: float
    """Of the language model; within half a step of ``budget``."""
    autoencoder_flops: float
    """What its autoencoder took to train, 0 of a model that has none; points of one K share it."""
    inference_flops_per_token: float
    planned_seconds: float
    state: State = "planned"
    seconds: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    """``brierlm``, ``brierlm_low`` and ``brierlm_high`` (95 % interval over documents); where they were measured
    ``bits_per_byte``, ``bits_per_byte_low`` and ``bits_per_byte_high``, and ``token_accuracy``, the share of held-out
    tokens that the autoencoder rebuilds."""

    @property
    def label(self) -> str:
        """The model's name on the page."""
        return label(self.model)

    def as_json(self) -> dict[str, Any]:
        """The mapping that ``Point(**mapping)`` reads again."""
        return asdict(self)


def calm(patch_size: int) -> str:
    """The key of CALM with patches of ``patch_size`` tokens."""
    return f"calm-{patch_size}"


def label(model: str) -> str:
    """``model``, a key as ``Point.model`` has it, for people."""
    return "Transformer" if model == TRANSFORMER else f"CALM, K = {model.removeprefix('calm-')}"
