"""Every knob of a run: the schema of params.yaml, one class a section, validated as a whole by pydantic.

A stage reads its own sections, but the file is validated whole, so that a mistake anywhere stops a run
before it starts. Defaults stand in params.yaml itself and nowhere else: the file shows all that a run depends on.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from calm_core.errors import CalmError, one_line

Probability = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A section of params.yaml: unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Runtime(Section):
    """How the machine is used."""

    threads: Literal["auto"] | Positive
    precision: Literal["auto", "float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    launcher: Literal["none", "torchrun"]
    processes: Positive
    parallelism: Literal["ddp", "fsdp"]
    gradient_accumulation: Positive
    activation_checkpointing: bool

    @model_validator(mode="after")
    def _processes_are_launched(self) -> Self:
        if self.launcher == "none" and self.processes > 1:
            raise ValueError(f"processes is {self.processes} but launcher is none; set it to torchrun")
        return self


class Corpus(Section):
    """Where the text comes from, and how it is split."""

    source: Literal["botocore", "files", "huggingface"]
    botocore_version: str
    paths: list[str]
    dataset: str
    configuration: str
    dataset_split: str
    text_field: str
    text_unit: Literal["document", "paragraph", "line"]
    documents: Positive | None
    validation_percent: Annotated[float, Field(gt=0, lt=100)]

    @model_validator(mode="after")
    def _source_is_named(self) -> Self:
        if self.source == "files" and not self.paths:
            raise ValueError("paths is empty; source: files needs at least one path or glob")
        if self.source == "huggingface" and not self.dataset:
            raise ValueError("dataset is empty; source: huggingface needs the name or the folder of a dataset")
        return self


class Tokenizer(Section):
    """The byte-level BPE: trained on the training split, or loaded from a tokenizer.json."""

    path: str
    vocabulary_size: Annotated[int, Field(ge=258)]
    training_megabytes: Positive


class Training(Section):
    """What the three trainings share."""

    steps: Positive
    warmup_steps: Annotated[int, Field(ge=0)]
    schedule: Literal["constant", "linear", "cosine"]
    optimiser: Literal["adamw", "muon"]
    learning_rate: PositiveFloat
    embedding_learning_rate: PositiveFloat
    muon_learning_rate: PositiveFloat
    weight_decay: Annotated[float, Field(ge=0)]
    gradient_clip: PositiveFloat

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceeds steps {self.steps}")
        return self


class Autoencoder(Training):
    """The autoencoder's shape, objective and training (paper, section 2)."""

    patch_size: Annotated[int, Field(ge=1, le=16)]
    hidden_size: Positive
    intermediate_size: Positive
    latent_size: Positive
    encoder_layers: Annotated[int, Field(ge=2)]
    decoder_layers: Annotated[int, Field(ge=2)]
    kl_weight: Annotated[float, Field(ge=0)]
    kl_clamp: Annotated[float, Field(ge=0)]
    token_dropout: Probability
    latent_dropout: Probability
    batch_patches: Positive

    @property
    def training_tokens(self) -> int:
        """Tokens that the training sees, repeated ones counted again."""
        return self.steps * self.batch_patches * self.patch_size


class LanguageModel(Training):
    """The backbone and the batches of a language model."""

    hidden_size: Positive
    intermediate_size: Positive
    layers: Positive
    heads: Positive
    key_value_heads: Positive
    rope_theta: PositiveFloat
    context_tokens: Annotated[int, Field(ge=2)]
    batch_sequences: Positive

    @property
    def training_tokens(self) -> int:
        """Tokens that the training sees, repeated ones counted again."""
        return self.steps * self.batch_sequences * self.context_tokens

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"heads {self.heads} does not divide hidden_size {self.hidden_size}")
        if self.hidden_size // self.heads % 2:
            size = self.hidden_size // self.heads
            raise ValueError(f"hidden_size / heads is {size}; rotary embeddings need it even")
        if self.heads % self.key_value_heads:
            raise ValueError(f"key_value_heads {self.key_value_heads} does not divide heads {self.heads}")
        return self


class Transformer(LanguageModel):
    """The baseline."""

    checkpoints: Annotated[int, Field(ge=3)]


class Calm(LanguageModel):
    """The continuous language model, its head and its loss (paper, section 3)."""

    input: Literal["tokens", "latents"]
    head: Literal["energy", "diffusion", "flow"]
    head_blocks: Positive
    noise_size: Positive
    samples: Annotated[int, Field(ge=2)]
    target_samples: Annotated[int, Field(ge=2, multiple_of=2)]
    alpha: Annotated[float, Field(gt=0, lt=2)]
    decoder_score: bool
    diffusion_steps: Annotated[int, Field(ge=2, le=1000)]
    flow_solver: Literal["euler", "midpoint"]
    flow_steps: Annotated[int, Field(ge=1, le=1000)]


class Evaluation(Section):
    """BrierLM (paper, section 4)."""

    samples: Annotated[int, Field(ge=2)]
    batch_sequences: Positive
    tokens: Positive
    checkpoint_tokens: Positive
    bootstrap_resamples: Annotated[int, Field(ge=100)]


class Report(Section):
    """What the report shows beside the measurements."""

    sample_texts: Positive
    prompt_tokens: Positive
    sample_tokens: Positive
    temperature: Annotated[float, Field(gt=0, le=1)]


class Params(Section):
    """params.yaml as a whole."""

    seed: Annotated[int, Field(ge=0)]
    runtime: Runtime
    corpus: Corpus
    tokenizer: Tokenizer
    autoencoder: Autoencoder
    calm: Calm
    transformer: Transformer
    evaluation: Evaluation
    report: Report

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        parts = self.runtime.processes * self.runtime.gradient_accumulation
        for key, batch in (
            ("autoencoder.batch_patches", self.autoencoder.batch_patches),
            ("calm.batch_sequences", self.calm.batch_sequences),
            ("transformer.batch_sequences", self.transformer.batch_sequences),
        ):
            if batch % parts:
                raise ValueError(
                    f"{key} {batch} is no multiple of {parts}, runtime.processes times runtime.gradient_accumulation"
                )
        return self

    @model_validator(mode="after")
    def _patches_fill_the_context(self) -> Self:
        size, context = self.autoencoder.patch_size, self.calm.context_tokens
        if context % size:
            raise ValueError(f"autoencoder.patch_size {size} does not divide calm.context_tokens {context}")
        if context < 2 * size:
            raise ValueError(f"calm.context_tokens {context} holds fewer than 2 patches of {size} tokens")
        return self


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate ``path``.

    Raises:
        CalmError: the file is missing, is not YAML, or does not fit the schema; names every wrong key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CalmError(f"{path} is missing; run from the repository's root, or restore it with git") from None
    except UnicodeDecodeError:
        raise CalmError(f"{path} is not UTF-8 text") from None
    try:
        return parse_params(yaml.safe_load(text), str(path))
    except yaml.YAMLError as error:
        raise CalmError(f"{path} is not valid YAML: {one_line(error)}") from None


def parse_params(values: Any, name: str = "params") -> Params:
    """Validate ``values``, the mapping that params.yaml holds; errors as in ``load_params``."""
    if not isinstance(values, dict):
        raise CalmError(f"{name} holds no mapping of sections; see the committed params.yaml for its layout")
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise CalmError(f"{name}: " + "; ".join(_explain(problem) for problem in error.errors())) from None


def _explain(problem: Any) -> str:
    """One pydantic error as 'section.key: what is wrong (got value)'."""
    key = " ".join(".".join(str(part) for part in problem["loc"]).split())
    if problem["type"] == "extra_forbidden":
        section = Params.model_fields.get(str(problem["loc"][0]))
        owner = section.annotation if section and len(problem["loc"]) > 1 else Params
        allowed = ", ".join(owner.model_fields)  # type: ignore[union-attr]
        return f"{key} is unknown; allowed here: {allowed}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key} is {problem['input']!r}: {message[0].lower()}{message[1:]}"
