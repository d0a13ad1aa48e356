"""Checkpoints of the reference implementation, converted to this project's folders.

Notable:
- sizes come from the weights' shapes; config.json adds what shapes cannot tell (heads, rotary base) and has to agree;
- the head's kind comes from the weights' names and shapes, since the reference leaves model_type empty;
- a checkpoint that lacks tensors, has others or has wrong shapes is refused with the list of them;
- published language models and their autoencoder are separate, and a config.json names the latter by a folder of the
  machine that trained them: the user names it. Where a file has the autoencoder inside, too, that one counts, as in the
  reference, and the other has to be the same;
- names and shapes are compared before any number is read; then tensors pass from file to file a piece at a time, so
  that memory does not grow with the model. They keep 16 bits where they have them: ``load_model`` makes float32 of
  them without loss, in float32 the folder would be twice as large, and export gives back what came.
"""

import hashlib
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import nn

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.diffusion_head import DiffusionHeadConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.flow_head import FlowHeadConfig
from calm_core.calm.model import AnyHeadConfig, Calm, CalmConfig
from calm_core.errors import CalmError
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.layers import NORM_EPSILON
from calm_core.reference.llama import import_llama, is_llama
from calm_core.reference.names import (
    AUTOENCODER_PREFIX,
    DTYPES,
    EMBEDDING,
    LANGUAGE_MODEL_PREFIXES,
    ORIGIN,
    OUTPUT_MATRIX,
    autoencoder_keys,
    calm_keys,
    reference_names,
)
from calm_core.reference.settings import norm_epsilon, number, rope_theta, unbuilt
from calm_core.reference.streamed_weights import StreamedTensor, write_weights
from calm_core.reference.untrusted_weights import Pickles, Stored, StoredTensor, read_checkpoint
from calm_core.storage.atomic import whole_directory
from calm_core.storage.hub import local_folder
from calm_core.storage.json_io import write_json
from calm_core.storage.model_folder import AUTOENCODER, POST_PROCESSOR, require_new_folder, save_description
from calm_core.tokens.round_trip import told_losses
from calm_core.tokens.tokenizer import TOKENIZER, load_tokenizer, require_fit

HELD: dict[Any, torch.dtype] = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float16}
"""Types that a model's folder keeps; of all others it has float32."""


class Found(NamedTuple):
    """A model without numbers, on the meta device, and the stored tensor of each of its names."""

    model: Any
    stored: Stored


def import_checkpoint(
    source: str | Path, destination: Path, tokenizer: Path | None = None, autoencoder: str | Path | None = None
) -> str:
    """Convert the checkpoint ``source`` into the new folder ``destination``; returns what it was.

    ``source`` is a folder or a name on the Hugging Face hub (``storage.hub``), and so is ``autoencoder``, for a
    language model that comes without its own. ``tokenizer`` is a tokenizer.json to put beside the weights; without it,
    that of ``source`` or else of ``autoencoder``, if they have one.

    Raises:
        CalmError: ``destination`` exists; ``source`` cannot be read, is no checkpoint that this project knows, does
            not hold exactly the tensors that its sizes call for, or has another vocabulary than the tokenizer; a
            language model comes without an autoencoder, or with another one than ``autoencoder``.
    """
    require_new_folder(destination)
    place, pickles = local_folder(source), Pickles()
    config, weights = read_checkpoint(place, pickles)
    if is_llama(weights):
        if autoencoder is not None:
            raise CalmError(f"{source} is a Llama; --autoencoder goes with a CALM")
        whole = {name: weight.whole() for name, weight in weights.items()}
        return import_llama(config, whole, _vocabulary(None, tokenizer, place), Path(source), destination)
    # A language model's file may have its autoencoder inside; an autoencoder's file has no prefix.
    own = {name: weight for name, weight in weights.items() if not name.startswith(AUTOENCODER_PREFIX)}
    inner = {name.removeprefix(AUTOENCODER_PREFIX): weights[name] for name in weights.keys() - own.keys()}
    if not inner and not any(name.startswith(LANGUAGE_MODEL_PREFIXES) for name in own):
        if autoencoder is not None:
            raise CalmError(f"{source} is an autoencoder itself; --autoencoder goes with a language model")
        alone = match_autoencoder(config, own, str(source))
        vocabulary = _vocabulary(alone, tokenizer, place)
        with whole_directory(destination) as folder:
            _write(alone, vocabulary, folder)
            write_json(folder / ORIGIN, _origin(config, own))
        return "autoencoder"
    if autoencoder is None and not inner:
        raise CalmError(
            f"{source} is a language model without its autoencoder: name that by --autoencoder{_named(config)}"
        )
    latent_config: dict[str, Any] = {}
    places = [place]
    # Without a config: config.json describes the language model, and shapes are enough for the autoencoder.
    latent = match_autoencoder({}, inner, f"{source} ({AUTOENCODER_PREFIX}*)") if inner else None
    if autoencoder is not None:
        places.append(local_folder(autoencoder))
        latent_config, apart = read_checkpoint(places[1], pickles)
        if any(name.startswith((AUTOENCODER_PREFIX, *LANGUAGE_MODEL_PREFIXES)) for name in apart):
            raise CalmError(f"{autoencoder} is a language model; --autoencoder takes its autoencoder's checkpoint")
        other = match_autoencoder(latent_config, apart, str(autoencoder))
        if latent is None:
            latent, inner = other, apart
        else:
            _require_same(latent, other, f"{source} has an autoencoder of its own, other than {autoencoder}")
    assert latent is not None
    model = match_calm(config, own, latent.model.config, str(source))
    vocabulary = _vocabulary(model, tokenizer, *places)
    # The reference counts positions, which are patches; a model's folder here counts tokens.
    positions = max(1, int(number(config, "max_position_embeddings", 2048, str(source))))
    with whole_directory(destination) as folder:
        _write(model, vocabulary, folder, positions * model.model.config.patch_size)
        _write(latent, vocabulary, folder / AUTOENCODER)
        prefixed = {AUTOENCODER_PREFIX + name: weight for name, weight in inner.items()}
        write_json(folder / ORIGIN, _origin(config, own | prefixed))
        write_json(folder / AUTOENCODER / ORIGIN, _origin(latent_config, inner))
    return f"language model with {model.model.config.head.kind} head"


def _named(config: dict[str, Any]) -> str:
    """What config.json calls the autoencoder: a folder of the machine that trained the model, which nothing reads."""
    told = [f"{key} {config[key]!r}" for key in ("ae_path", "ae_name_or_path") if config.get(key)]
    return f" (config.json names {', '.join(told) or 'none'})"


def _origin(config: dict[str, Any], weights: Stored) -> dict[str, Any]:
    dtypes = {name: str(weight.dtype).removeprefix("torch.") for name, weight in weights.items()}
    return {"config": config, "dtypes": {name: dtype for name, dtype in dtypes.items() if dtype != "float32"}}


def _vocabulary(found: Found | None, tokenizer: Path | None, *places: Path) -> Tokenizer | None:
    """``tokenizer``, or the first that there is in ``places``; it has to fit the model ``found``, if there is one."""
    path = tokenizer or next((place / TOKENIZER for place in places if (place / TOKENIZER).is_file()), None)
    if path is None:
        return None
    vocabulary = load_tokenizer(path)
    if told := told_losses(vocabulary):
        print(f"{path}: {told}", file=sys.stderr, flush=True)
    if found is not None:
        require_fit(vocabulary, found.model.config.vocabulary_size, str(path))
    return vocabulary


def _write(found: Found, vocabulary: Tokenizer | None, folder: Path, context_tokens: int | None = None) -> None:
    # As the reference feeds its language models: what the tokenizer itself puts around a text, and nothing else.
    marks = POST_PROCESSOR if context_tokens else None
    save_description(found.model, vocabulary, folder, context_tokens, document_marks=marks)
    # A file after the other, for of .bin files one is open at a time.
    in_order = sorted(found.stored.items(), key=lambda item: (item[1].path, item[1].start))
    weights = {
        name: StreamedTensor(HELD.get(stored.dtype, torch.float32), stored.shape, stored.pieces)
        for name, stored in in_order
    }
    write_weights(weights, folder / "model.safetensors")


def _require_same(first: Found, second: Found, told: str) -> None:
    """Raise CalmError, which begins with ``told``, unless both models have the same numbers, bar rounding."""
    if first.model.config != second.model.config:
        raise CalmError(f"{told}: {first.model.config} and {second.model.config}; leave --autoencoder out to keep it")
    for name, stored in first.stored.items():
        for one, other in zip(stored.pieces(), second.stored[name].pieces(), strict=True):
            # One of the two may have been saved in fewer bits.
            coarser = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            if not torch.equal(one.to(coarser), other.to(coarser)):
                raise CalmError(f"{told}: their {name} differ; leave --autoencoder out to keep it")


def match_autoencoder(config: dict[str, Any], weights: Stored, source: str) -> Found:
    """The autoencoder that ``weights`` make, in the reference's names; ``config`` has to agree with their shapes."""
    sizes = _Sizes(weights, source)
    # Tools that save no tensor twice keep one of the two names, whichever comes first.
    vocabulary_size, hidden_size = sizes.of(OUTPUT_MATRIX if OUTPUT_MATRIX in weights else EMBEDDING)
    shape = AutoencoderConfig(
        vocabulary_size=vocabulary_size,
        patch_size=sizes.of("encoder.squeeze_layer.weight")[1] // hidden_size,
        hidden_size=hidden_size,
        intermediate_size=sizes.of("encoder.encoder_layers.0.mlp.gate_proj.weight")[0],
        latent_size=sizes.of("encoder.hidden_to_latent.weight")[0] // 2,
        encoder_layers=sizes.count("encoder.encoder_layers"),
        decoder_layers=sizes.count("decoder.decoder_layers"),
    )
    disagreements = _disagreements(config, autoencoder_keys(shape))
    if (epsilon := norm_epsilon(config, source)) != NORM_EPSILON:
        disagreements.append(f"rms_norm_eps is {epsilon!r}, an autoencoder's is always {NORM_EPSILON!r}")
    return _matched(Autoencoder, shape, weights, disagreements, source)


def match_calm(config: dict[str, Any], weights: Stored, autoencoder: AutoencoderConfig, source: str) -> Found:
    """The CALM that ``weights`` make, the autoencoder's left out, in the reference's names."""
    sizes = _Sizes(weights, source)
    vocabulary_size, hidden_size = sizes.of("transformer.embed_tokens.weight")
    heads = config.get("num_attention_heads")
    if type(heads) is not int or heads < 1 or hidden_size % heads:
        told = "; ".join([*unbuilt(config), f"it has to divide the hidden size {hidden_size}"])
        raise CalmError(f"{source} is refused: config.json: num_attention_heads is {heads!r}; {told}")
    head_size = hidden_size // heads
    shape = CalmConfig(
        vocabulary_size=vocabulary_size,
        patch_size=sizes.of("embed_proj.0.weight")[1] // hidden_size,
        latent_size=autoencoder.latent_size,
        backbone=BackboneConfig(
            hidden_size=hidden_size,
            intermediate_size=sizes.of("transformer.layers.0.mlp.gate_proj.weight")[0],
            layers=sizes.count("transformer.layers"),
            heads=heads,
            # From the shape: config.json may leave num_key_value_heads out.
            key_value_heads=max(1, sizes.of("transformer.layers.0.self_attn.k_proj.weight")[0] // head_size),
            rope_theta=rope_theta(config, source),
            norm_epsilon=norm_epsilon(config, source),
        ),
        head=_head_shape(sizes, autoencoder.latent_size, source),
    )
    if heads % shape.backbone.key_value_heads or head_size % 2:
        raise CalmError(
            f"{source} is refused: {heads} heads of {head_size} features over {shape.backbone.key_value_heads} "
            "key/value heads"
        )
    if (shape.vocabulary_size, shape.patch_size) != (autoencoder.vocabulary_size, autoencoder.patch_size):
        raise CalmError(
            f"{source}: the language model has vocabulary {shape.vocabulary_size} and K {shape.patch_size}, its "
            f"autoencoder {autoencoder.vocabulary_size} and {autoencoder.patch_size}"
        )
    # What no tensor tells was read above, the base from wherever it stands.
    sizes_told = {key: value for key, value in calm_keys(shape).items() if key not in ("rope_theta", "rms_norm_eps")}
    disagreements = _disagreements(config, sizes_told | {"head_dim": head_size})
    if (kind := config.get("model_type")) in ("energy", "diffusion", "flow") and kind != shape.head.kind:
        disagreements.append(f"model_type is {kind!r}, the weights have a head of kind {shape.head.kind!r}")
    return _matched(Calm, shape, weights, disagreements, source)


def _head_shape(sizes: "_Sizes", latent_size: int, source: str) -> AnyHeadConfig:
    if sizes.has("generative_head.net."):
        blocks = sizes.count("generative_head.net.res_blocks")
        outputs = sizes.of("generative_head.net.final_layer.linear.weight")[0]
        # Both heads have the same network and tensor names; only the output's width differs: a velocity, or noise and
        # variance.
        if outputs == latent_size:
            return FlowHeadConfig(blocks)
        if outputs == 2 * latent_size:  # the noise and the variance
            return DiffusionHeadConfig(blocks)
        raise CalmError(
            f"{source}: the head gives {outputs} numbers; a flow head would give {latent_size}, a diffusion head "
            f"{2 * latent_size}"
        )
    # Checkpoints have the energy head under two names, and some tools keep only one of the two.
    prefix = "generative_head" if sizes.has("generative_head.") else "mlp_generator"
    if not sizes.has(f"{prefix}."):
        raise CalmError(f"{source} has no head: no tensor is named generative_head.* or mlp_generator.*")
    return EnergyHeadConfig(sizes.count(f"{prefix}.mlp_blocks"), sizes.of(f"{prefix}.noise_embd.weight")[1])


class _Sizes:
    """Shapes by name; a missing name is an error that names it."""

    def __init__(self, weights: Stored, source: str) -> None:
        self._weights, self._source = weights, source

    def of(self, name: str) -> tuple[int, int]:
        """The shape of the matrix ``name``."""
        if name not in self._weights:
            raise CalmError(f"{self._source} is refused: lacks {name}, which tells its sizes")
        shape = self._weights[name].shape
        # Sizes are divided by each other: one of 0 must not get so far.
        if len(shape) != 2 or 0 in shape:
            raise CalmError(f"{self._source} is refused: wrong shape {name} {list(shape)}, a matrix is needed")
        return shape[0], shape[1]

    def has(self, prefix: str) -> bool:
        """Whether any name starts with ``prefix``."""
        return any(name.startswith(prefix) for name in self._weights)

    def count(self, prefix: str) -> int:
        """How many layers are numbered after ``prefix``."""
        numbers = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in self._weights]
        # Counted by distinct numbers: a gap shows below, as tensors that are missing.
        return len({number[1] for number in numbers if number})


def _matched(model_class: Any, shape: Any, weights: Stored, disagreements: list[str], source: str) -> Found:
    """A model of ``shape`` and its ``weights``, or CalmError with all that is missing, left over or misshapen."""
    # For names and shapes alone.
    with torch.device("meta"):
        model: nn.Module = model_class(shape)
    own, names = model.state_dict(), reference_names(model)
    copies = {name: [theirs for theirs in names[name] if theirs in weights] for name in own}
    # Tools that save no tensor twice drop one copy, with all that stands under its first name.
    first_names = {name.split(".")[0] for name in weights}
    # A second copy may be missing: one name of the tied matrix, or the whole second name of the energy head.
    lacking = [
        theirs
        for name, found in copies.items()
        for theirs in names[name]
        if theirs not in weights
        and not (found and (theirs in (EMBEDDING, OUTPUT_MATRIX) or theirs.split(".")[0] not in first_names))
    ]
    known = {theirs for group in names.values() for theirs in group}
    misshapen = [
        f"{theirs} {list(weights[theirs].shape)} instead of {list(own[name].shape)}"
        for name, found in copies.items()
        for theirs in found
        if weights[theirs].shape != tuple(own[name].shape)
    ]
    problems = {
        "config.json:": disagreements,
        "lacks": lacking,
        "has unknown": sorted(set(weights) - known),
        "wrong shapes:": misshapen,
        f"neither of {', '.join(DTYPES)}:": sorted(
            name for name in known & set(weights) if weights[name].dtype not in DTYPES.values()
        ),
    }
    if any(problems.values()):
        told = "; ".join(f"{problem} {', '.join(names)}" for problem, names in problems.items() if names)
        raise CalmError(f"{source} is refused: {told}")
    for first, *others in copies.values():
        for second in others:
            # Two names for one tensor may differ in a file that was edited; picking one would change the model.
            if _digest(weights[second]) != _digest(weights[first]):
                raise CalmError(f"{source} is refused: {second} differs from {first}; here they are one tensor")
    return Found(model, {name: weights[found[0]] for name, found in copies.items()})


def _digest(weight: StoredTensor) -> tuple[Any, bytes]:
    """What tells tensors apart; of one at a time, since of .bin files one is open at a time."""
    digest = hashlib.sha256()
    for piece in weight.pieces():
        digest.update(piece.contiguous().view(torch.uint8).numpy().data)
    return weight.dtype, digest.digest()


def _disagreements(config: dict[str, Any], shape: dict[str, Any]) -> list[str]:
    """Where config.json contradicts the weights, or asks for what no model here can do."""
    # A key that config.json lacks contradicts nothing.
    return unbuilt(config) + [
        f"{key} is {config[key]!r}, the weights have {value!r}"
        for key, value in shape.items()
        if config.get(key) is not None and config[key] != value
    ]
