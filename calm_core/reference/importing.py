"""Checkpoints of the reference implementation, converted to this project's folders.

Notable:
- sizes come from the weights' shapes; config.json adds what shapes cannot tell (heads, rotary base) and has to agree;
- the head's kind comes from the weights' names and shapes, since the reference leaves model_type empty;
- a checkpoint that lacks tensors, has others or has wrong shapes is refused with the list of them;
- published language models and their autoencoder are separate, and a config.json names the latter by a folder of the
  machine that trained them: the user names it. Where a file has the autoencoder inside, too, that one counts, as in the
  reference, and the other has to be the same;
- no more than a piece of a tensor is in memory at a time (``matched``).
"""

import re
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.diffusion_head import DiffusionHeadConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.flow_head import FlowHeadConfig
from calm_core.calm.model import AnyHeadConfig, Calm, CalmConfig
from calm_core.errors import CalmError
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.layers import NORM_EPSILON
from calm_core.reference.llama import is_llama, llama_context, llama_weights, match_llama
from calm_core.reference.matched import Found, matched, require_same, write_found
from calm_core.reference.names import (
    AUTOENCODER_PREFIX,
    EMBEDDING,
    LANGUAGE_MODEL_PREFIXES,
    OUTPUT_MATRIX,
    autoencoder_keys,
    calm_keys,
    reference_names,
)
from calm_core.reference.origin import origin_of
from calm_core.reference.settings import norm_epsilon, number, rope_theta, unbuilt
from calm_core.reference.untrusted_weights import Pickles, Stored, read_checkpoint
from calm_core.storage.atomic import whole_directory
from calm_core.storage.hub import local_folder, repository_of
from calm_core.storage.json_io import write_json
from calm_core.storage.model_folder import AUTOENCODER, ORIGIN, POST_PROCESSOR, require_new_folder
from calm_core.tokens.document_marks import told_kind
from calm_core.tokens.round_trip import told_losses
from calm_core.tokens.tokenizer import TOKENIZER, load_tokenizer, require_fit
from calm_core.tokens.tokenizer_config import opening_of


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
    place, pickles, base = local_folder(source), Pickles(), repository_of(source)
    config, weights = read_checkpoint(place, pickles)
    if is_llama(weights):
        if autoencoder is not None:
            raise CalmError(f"{source} is a Llama; --autoencoder goes with a CALM")
        llama = match_llama(config, weights, str(source))
        vocabulary = _vocabulary(llama, tokenizer, place)
        with whole_directory(destination) as folder:
            # Its texts are marked by the tokenizer's own template if this project says so, of a model that it exported.
            kind = told_kind(config, place / "config.json")
            opening = None if vocabulary is None or kind == POST_PROCESSOR else opening_of(vocabulary)
            context = llama_context(config, str(source))
            write_found(llama, vocabulary, folder, context, opening, kind, base)
            write_json(folder / ORIGIN, origin_of(config, llama_weights(config, weights)))
        return "Transformer, from a Llama"
    # A language model's file may have its autoencoder inside; an autoencoder's file has no prefix.
    own = {name: weight for name, weight in weights.items() if not name.startswith(AUTOENCODER_PREFIX)}
    inner = {name.removeprefix(AUTOENCODER_PREFIX): weights[name] for name in weights.keys() - own.keys()}
    if not inner and not any(name.startswith(LANGUAGE_MODEL_PREFIXES) for name in own):
        if autoencoder is not None:
            raise CalmError(f"{source} is an autoencoder itself; --autoencoder goes with a language model")
        alone = match_autoencoder(config, own, str(source))
        vocabulary = _vocabulary(alone, tokenizer, place)
        with whole_directory(destination) as folder:
            write_found(alone, vocabulary, folder, base_model=base)
            write_json(folder / ORIGIN, origin_of(config, own))
        return "autoencoder"
    if autoencoder is None and not inner:
        raise CalmError(
            f"{source} is a language model without its autoencoder: name that by --autoencoder{_named(config)}"
        )
    latent_config: dict[str, Any] = {}
    places, latent_base = [place], base
    # Without a config: config.json describes the language model, and shapes are enough for the autoencoder.
    latent = match_autoencoder({}, inner, f"{source} ({AUTOENCODER_PREFIX}*)") if inner else None
    if autoencoder is not None:
        places.append(local_folder(autoencoder))
        latent_config, apart = read_checkpoint(places[1], pickles)
        if any(name.startswith((AUTOENCODER_PREFIX, *LANGUAGE_MODEL_PREFIXES)) for name in apart):
            raise CalmError(f"{autoencoder} is a language model; --autoencoder takes its autoencoder's checkpoint")
        other = match_autoencoder(latent_config, apart, str(autoencoder))
        if latent is None:
            latent, inner, latent_base = other, apart, repository_of(autoencoder)
        else:
            require_same(latent, other, f"{source} has an autoencoder of its own, other than {autoencoder}")
    assert latent is not None
    model = match_calm(config, own, latent.model.config, str(source))
    vocabulary = _vocabulary(model, tokenizer, *places)
    # The reference counts positions, which are patches; a model's folder here counts tokens.
    positions = max(1, int(number(config, "max_position_embeddings", 2048, str(source))))
    with whole_directory(destination) as folder:
        context = positions * model.model.config.patch_size
        # As the reference feeds its language models: what the tokenizer itself puts around a text, and nothing else.
        write_found(model, vocabulary, folder, context, document_marks=POST_PROCESSOR, base_model=base)
        write_found(latent, vocabulary, folder / AUTOENCODER, base_model=latent_base)
        prefixed = {AUTOENCODER_PREFIX + name: weight for name, weight in inner.items()}
        write_json(folder / ORIGIN, origin_of(config, own | prefixed))
        write_json(folder / AUTOENCODER / ORIGIN, origin_of(latent_config, inner))
    return f"language model with {model.model.config.head.kind} head"


def _named(config: dict[str, Any]) -> str:
    """What config.json calls the autoencoder: a folder of the machine that trained the model, which nothing reads."""
    told = [f"{key} {config[key]!r}" for key in ("ae_path", "ae_name_or_path") if config.get(key)]
    return f" (config.json names {', '.join(told) or 'none'})"


def _vocabulary(found: Found | None, tokenizer: Path | None, *places: Path) -> Tokenizer | None:
    """``tokenizer``, or the first that there is in ``places``; it has to fit the model ``found``, if there is one."""
    if tokenizer is not None and not (file := tokenizer / TOKENIZER if tokenizer.is_dir() else tokenizer).exists():
        raise CalmError(f"--tokenizer {tokenizer}: {file} is missing; name a tokenizer.json or its folder")
    path = tokenizer or next((place / TOKENIZER for place in places if (place / TOKENIZER).is_file()), None)
    if path is None:
        return None
    try:
        vocabulary = load_tokenizer(path)
    except CalmError as error:
        raise CalmError(f"{error}; --tokenizer names another in its place") from None
    if told := told_losses(vocabulary):
        print(f"{path}: {told}", file=sys.stderr, flush=True)
    if found is not None:
        require_fit(vocabulary, found.model.config.vocabulary_size, str(path))
    return vocabulary


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
    return matched(Autoencoder, shape, reference_names, weights, disagreements, source)


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
    return matched(Calm, shape, reference_names, weights, disagreements, source)


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


def _disagreements(config: dict[str, Any], shape: dict[str, Any]) -> list[str]:
    """Where config.json contradicts the weights, or asks for what no model here can do."""
    # A key that config.json lacks contradicts nothing.
    return unbuilt(config) + [
        f"{key} is {config[key]!r}, the weights have {value!r}"
        for key, value in shape.items()
        if config.get(key) is not None and config[key] != value
    ]
