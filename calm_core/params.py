"""Every knob of a run: the schema of params.yaml, one class a section, validated as a whole by pydantic.

A stage reads its own sections, but the file is validated whole, so that a mistake anywhere stops a run
before it starts. Defaults stand in params.yaml itself and nowhere else: the file shows all that a run depends on.
Limits of sizes are those of the models' own config types (nn/limits.py).
"""

import contextlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from calm_core.errors import CalmError
from calm_core.nn.limits import (
    HalvedLayers,
    Layers,
    PatchSize,
    PositiveFloat,
    SamplingSteps,
    VocabularySize,
    Width,
    require_heads,
)
from calm_core.storage.yaml_io import read_yaml

Probability = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1, le=10**12)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Temperature = Annotated[float, Field(gt=0, le=1)]
Samples = Annotated[int, Field(ge=2, le=10_000)]
PresetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
DocumentMarksKind = Literal["end_of_text", "post_processor"]
LanguageModelSection = Literal["calm", "transformer"]
"""The sections that are of a language model."""

MOST_PROBLEMS, LONGEST_VALUE = 20, 200
"""How many mistakes one error lists, and how many characters of each value."""


class Section(BaseModel):
    """A section of params.yaml: unknown keys, values of another type, infinity and NaN are refused."""

    # Strict: YAML has types of its own, and "3" or 3.0 where an integer belongs is a mistake worth stopping for.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RuntimeParams(Section):
    """How the machine is used."""

    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)]
    precision: Literal["auto", "float32", "tf32", "bfloat16"]
    device: Literal["auto", "cpu", "cuda", "mps"]
    launcher: Literal["none", "torchrun"]
    processes: Positive
    parallelism: Literal["ddp", "fsdp"]
    gradient_accumulation: Positive
    activation_checkpointing: bool
    compile: bool

    @model_validator(mode="after")
    def _processes_are_launched(self) -> Self:
        if self.launcher == "none" and self.processes > 1:
            raise ValueError(f"processes is {self.processes} but launcher is none; set it to torchrun")
        if self.device == "mps" and self.processes > 1:
            raise ValueError(f"device is mps, which is one device, but processes is {self.processes}; set it to 1")
        return self


class CorpusParams(Section):
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
    split_by: Annotated[str, Field(min_length=1)]
    validation_percent: Annotated[float, Field(gt=0, lt=100)]
    test_percent: Annotated[float, Field(gt=0, lt=100)]
    deduplicate: bool

    @property
    def split_unit(self) -> str:
        """``split_by``, and what ``auto`` stands for: document, file, or the name of a field."""
        if self.split_by != "auto":
            return self.split_by
        return "service" if self.source == "botocore" else "document"

    @model_validator(mode="after")
    def _source_is_named(self) -> Self:
        if self.source == "files" and not self.paths:
            raise ValueError("paths is empty; source: files needs at least one path or glob")
        if self.source == "huggingface" and not self.dataset:
            raise ValueError("dataset is empty; source: huggingface needs the name or the folder of a dataset")
        return self

    @model_validator(mode="after")
    def _training_has_a_share(self) -> Self:
        if self.validation_percent + self.test_percent >= 100:
            raise ValueError(
                f"validation_percent {self.validation_percent:g} and test_percent {self.test_percent:g} leave nothing "
                "to train on; their sum has to be below 100"
            )
        return self

    @model_validator(mode="after")
    def _source_has_the_unit(self) -> Self:
        allowed = {"botocore": "auto, document, service", "huggingface": "auto, document, or the name of a field"}
        if (self.source == "botocore" and self.split_unit not in ("document", "service")) or (
            self.source == "huggingface" and self.split_unit == "file"
        ):
            raise ValueError(
                f"split_by is {_shown(self.split_by, repr)} but source is {self.source}, which can be split by: "
                f"{allowed[self.source]}"
            )
        return self


class TokenizerParams(Section):
    """The byte-level BPE: trained on the training split, or loaded from a tokenizer.json; and how documents join."""

    path: str
    vocabulary_size: VocabularySize
    training_megabytes: Positive
    document_marks: DocumentMarksKind

    @model_validator(mode="after")
    def _bytes_have_entries(self) -> Self:
        # 256 bytes and two special tokens are the smallest byte-level vocabulary; a tokenizer.json may have fewer.
        if not self.path and self.vocabulary_size < 258:
            raise ValueError(f"vocabulary_size is {self.vocabulary_size}; a trained tokenizer needs 258 or more")
        return self

    @model_validator(mode="after")
    def _marks_are_there(self) -> Self:
        if not self.path and self.document_marks == "post_processor":
            raise ValueError(
                "document_marks is post_processor but path is empty, and a trained tokenizer has none; name a "
                "tokenizer.json, or set document_marks to end_of_text"
            )
        return self


class TrainingParams(Section):
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
        # Steps that are still to be matched are compared once they are a number (``with_transformer_steps``).
        if isinstance(self.steps, int) and self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceeds steps {self.steps}")
        return self


class AutoencoderParams(TrainingParams):
    """The autoencoder's shape, objective and training (paper, section 2)."""

    patch_size: PatchSize
    hidden_size: Width
    intermediate_size: Width
    latent_size: Width
    encoder_layers: HalvedLayers
    decoder_layers: HalvedLayers
    kl_weight: Annotated[float, Field(ge=0)]
    kl_clamp: Annotated[float, Field(ge=0)]
    token_dropout: Probability
    latent_dropout: Probability
    batch_patches: Annotated[int, Field(ge=1, le=10**7)]

    @property
    def training_tokens(self) -> int:
        """Tokens that the training sees, repeated ones counted again."""
        return self.steps * self.batch_patches * self.patch_size


class LanguageModelParams(TrainingParams):
    """The backbone and the batches of a language model; ``initial`` names the one that its training goes on from."""

    initial: str
    hidden_size: Width
    intermediate_size: Width
    layers: Layers
    heads: Width
    key_value_heads: Width
    rope_theta: PositiveFloat
    context_tokens: Annotated[int, Field(ge=2, le=1 << 20)]
    batch_sequences: Width

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.batch_sequences * self.context_tokens

    @property
    def training_tokens(self) -> int:
        """Tokens that the training sees, repeated ones counted again."""
        return self.steps * self.step_tokens

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        require_heads(self.hidden_size, self.heads, self.key_value_heads)
        return self


class TransformerParams(LanguageModelParams):
    """The baseline.

    ``steps`` is a number, or "match": as many as take the training FLOPs of CALM with its autoencoder. How many these
    are depends on the other sections, see costs/matching.py; ``with_transformer_steps`` puts the number there.
    """

    # Wider than in the class above, whose users get a section with a number.
    steps: Literal["match"] | Positive  # type: ignore[assignment]
    # A correlation over two checkpoints would be 1 or -1 whatever was measured.
    checkpoints: Annotated[int, Field(ge=3, le=10_000)]

    @property
    def known_steps(self) -> int:
        """``steps``; raises ValueError if they are still to be matched."""
        if not isinstance(self.steps, int):
            raise ValueError("transformer.steps is still to be matched; see with_matched_steps in costs/matching.py")
        return self.steps

    @property
    def training_tokens(self) -> int:
        """Tokens that the training sees; raises ValueError as ``known_steps``."""
        return self.known_steps * self.step_tokens


class CalmParams(LanguageModelParams):
    """The continuous language model, its head and its loss (paper, section 3)."""

    # As of the Transformer's.
    checkpoints: Annotated[int, Field(ge=3, le=10_000)]
    input: Literal["tokens", "latents"]
    latents: Literal["encoded", "online"]
    head: Literal["tokens", "energy", "diffusion", "flow"]
    token_hidden_size: Width
    token_intermediate_size: Width
    token_layers: Layers
    head_blocks: Layers
    noise_size: Width
    samples: Samples
    # Even, since targets come in antithetic pairs (calm/energy_score.py).
    target_samples: Annotated[int, Field(ge=2, le=10_000, multiple_of=2)]
    # At 2 the energy score sees means alone; only below it is it strictly proper.
    alpha: Annotated[float, Field(gt=0, lt=2)]
    decoder_score: bool
    diffusion_steps: Annotated[int, Field(ge=2, le=1000)]
    flow_solver: Literal["euler", "midpoint"]
    flow_steps: SamplingSteps

    @property
    def needs_autoencoder(self) -> bool:
        """Whether the head has latents, whose autoencoder has to be trained before."""
        return self.head != "tokens"

    @property
    def has_given_autoencoder(self) -> bool:
        """Whether the autoencoder is that of the model in ``initial``, and not trained in the run."""
        return bool(self.initial) and self.needs_autoencoder

    @model_validator(mode="after")
    def _a_token_head_has_no_latents(self) -> Self:
        if self.input == "latents" and not self.needs_autoencoder:
            raise ValueError(
                "input latents needs a head that predicts latents; head tokens does not, write input: tokens"
            )
        return self


class EvaluationParams(Section):
    """BrierLM, quality and diversity (paper, sections 4 and 5)."""

    seeds: Annotated[list[Seed], Field(max_length=1000)]
    beside: Annotated[list[PresetName], Field(max_length=20)]
    split: Literal["validation", "test"]
    samples: Samples
    batch_sequences: Width
    tokens: Positive
    checkpoint_tokens: Positive
    likelihood_tokens: Positive
    bootstrap_resamples: Annotated[int, Field(ge=100, le=10**6)]
    temperatures: Annotated[list[Temperature], Field(min_length=1, max_length=100)]
    diversity_prompts: Annotated[int, Field(ge=16, le=10**6)]

    @model_validator(mode="after")
    def _temperatures_differ(self) -> Self:
        # Results are told apart by their temperature.
        if len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(f"temperatures are {self.temperatures}; each belongs there once")
        return self

    @model_validator(mode="after")
    def _models_beside_are_told_apart(self) -> Self:
        if len(set(self.beside)) < len(self.beside):
            raise ValueError(f"beside is {self.beside}; each preset belongs there once")
        # Scores of a preset lie in calm-PRESET, those of a repetition in calm-seed-SEED or calm-PRESET-seed-SEED.
        if meant := [name for name in self.beside if re.search(r"(^|-)seed-\d+$", name)]:
            raise ValueError(f"beside has {meant[0]}, which would be a repetition's name; call the preset otherwise")
        return self


class ReportParams(Section):
    """What the report shows beside the measurements."""

    sample_texts: Annotated[int, Field(ge=1, le=1000)]
    prompt_tokens: Width
    sample_tokens: Width
    temperature: Temperature


class Params(Section):
    """params.yaml as a whole."""

    seed: Seed
    runtime: RuntimeParams
    corpus: CorpusParams
    tokenizer: TokenizerParams
    autoencoder: AutoencoderParams
    calm: CalmParams
    transformer: TransformerParams
    evaluation: EvaluationParams
    report: ReportParams

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        # Here as well as in the training loop: a mistake then stops the run before its first stage.
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
    def _seeds_differ(self) -> Self:
        seeds = [self.seed, *self.evaluation.seeds]
        if repeated := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            raise ValueError(
                f"evaluation.seeds has {repeated[0]} twice, or it is the run's own seed; repetitions need others"
            )
        return self

    @model_validator(mode="after")
    def _models_beside_have_an_autoencoder_of_the_run(self) -> Self:
        if self.calm.initial and self.evaluation.beside:
            raise ValueError(
                f"calm.initial is {_shown(self.calm.initial, repr)} but evaluation.beside {self.evaluation.beside}, "
                "whose CALMs are trained from the beginning; set evaluation.beside to []"
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
    return parse_params(read_yaml(path), str(path))


def parse_params(values: Any, name: str = "params") -> Params:
    """Validate ``values``, the mapping that params.yaml holds; errors as in ``load_params``."""
    if not isinstance(values, dict):
        raise CalmError(f"{name} holds no mapping of sections; see the committed params.yaml for its layout")
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        # A file of nothing but mistakes still makes a readable line.
        told = [_explain(problem) for problem in problems[:MOST_PROBLEMS]]
        if len(problems) > MOST_PROBLEMS:
            told.append(f"and {len(problems) - MOST_PROBLEMS} more")
        raise CalmError(f"{name}: " + "; ".join(told)) from None


def with_transformer_steps(params: Params, steps: int) -> Params:
    """``params`` with the number ``steps`` where transformer.steps is to be matched; as they are where it is a number.

    Raises:
        CalmError: with so many steps the section is wrong: its warm-up is longer, for instance.
    """
    if params.transformer.steps != "match":
        return params
    values = params.model_dump()
    values["transformer"]["steps"] = steps
    return parse_params(values, "params with the number that transformer.steps: match stands for")


def _explain(problem: Any) -> str:
    """One pydantic error as 'section.key: what is wrong (got value)'."""
    # Beyond section and key there are places in a list, and which part of a union pydantic has tried.
    place = [part for depth, part in enumerate(problem["loc"]) if depth < 2 or isinstance(part, int)]
    key = " ".join(".".join(map(_shown, place)).split())
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
    return f"{key} is {_shown(problem['input'], repr)}: {message[0].lower()}{message[1:]}{_remedy(problem)}"


def _remedy(problem: Any) -> str:
    """What to write instead, where a value is right but for how it is written in YAML; empty if that is not known."""
    value, wanted = problem["input"], problem["type"]
    if wanted == "string_type" and not isinstance(value, dict | list):
        return '; write ""' if value is None else "; put it in quotes"
    if wanted == "bool_type" and isinstance(value, str) and value.lower() in _BOOLS:
        return f"; write {str(_BOOLS[value.lower()]).lower()}"
    if wanted in ("int_type", "float_type") and isinstance(value, float | str):
        with contextlib.suppress(ValueError, OverflowError):  # no number, or none that is finite
            number = float(value)
            if wanted == "float_type" and math.isfinite(number):
                return f"; write {number}"
            if wanted == "int_type" and number == int(number):
                return f"; write {_shown(int(number))}"
    return ""


_BOOLS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
"""What other readers of YAML take for one."""


def _shown(value: Any, how: Callable[[Any], str] = str) -> str:
    try:
        text = how(value)
    except (ValueError, RecursionError):  # Python prints no integer of 5000 digits
        text = f"a large {type(value).__name__}"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
