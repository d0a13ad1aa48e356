"""Checkpoints of the reference implementation: read, converted to this project's folders, and written back.

Notable:
- sizes come from the weights' shapes; config.json adds what shapes cannot tell (heads, rotary base) and has to agree;
- the head's kind comes from the weights' names and shapes, since the reference leaves model_type empty;
- a checkpoint that lacks tensors, has others or has wrong shapes is refused with the list of them;
- weights come from safetensors, whole or in shards, or from a .bin read with ``weights_only``: nothing in it is run.
"""

import math
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from calm_core.artefacts import read_json, whole_directory, write_json
from calm_core.autoencoder import Autoencoder, AutoencoderConfig
from calm_core.backbone import BackboneConfig
from calm_core.calm import AnyHeadConfig, Calm, CalmConfig
from calm_core.diffusion_head import DiffusionHeadConfig
from calm_core.energy_head import EnergyHeadConfig
from calm_core.errors import CalmError, one_line
from calm_core.flow_head import FlowHeadConfig
from calm_core.layers import NORM_EPSILON
from calm_core.model_files import AUTOENCODER, load_model, read_config, save_model
from calm_core.reference_names import AUTOENCODER_PREFIX, OUTPUT_MATRIX, reference_names
from calm_core.tokenizer import load_tokenizer
from calm_core.whole_files import load_tensors

Weights = dict[str, Tensor]

ORIGIN = "reference.json"
"""Beside an imported model: the config.json it came with, and the tensors that were not float32, for the way back."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

_DTYPES = {"float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

_FIXED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,
    "rms_norm_eps": NORM_EPSILON,
    "rope_scaling": None,
}
"""Settings of config.json that this project's models have no choice in."""


def import_checkpoint(source: Path, destination: Path, tokenizer: Path | None = None) -> str:
    """Convert the checkpoint in the folder ``source`` into the new folder ``destination``; returns what it was.

    ``tokenizer`` is a tokenizer.json to put beside the weights; without it, that of ``source``, if it has one.

    Raises:
        CalmError: ``destination`` exists; ``source`` cannot be read, is no checkpoint that this project knows, or
            does not hold exactly the tensors that its sizes call for.
    """
    _require_new(destination)
    config, weights = read_checkpoint(source)
    dtypes = {name: str(weight.dtype).removeprefix("torch.") for name, weight in weights.items()}
    origin = {"config": config, "dtypes": {name: dtype for name, dtype in dtypes.items() if dtype != "float32"}}
    found = tokenizer or source / "tokenizer.json"
    vocabulary = load_tokenizer(found) if tokenizer or found.is_file() else None
    own = {name: weight for name, weight in weights.items() if not name.startswith(AUTOENCODER_PREFIX)}
    inner = {name.removeprefix(AUTOENCODER_PREFIX): weights[name] for name in weights.keys() - own.keys()}
    if not inner:
        autoencoder = build_autoencoder(config, weights, str(source))
        with whole_directory(destination) as folder:
            save_model(autoencoder, vocabulary, folder)
            write_json(folder / ORIGIN, origin)
        return "autoencoder"
    autoencoder = build_autoencoder({}, inner, f"{source} ({AUTOENCODER_PREFIX}*)")
    model = build_calm(config, own, autoencoder.config, str(source))
    context = max(1, int(_number(config, "max_position_embeddings", 2048, str(source)))) * model.config.patch_size
    with whole_directory(destination) as folder:
        save_model(model, vocabulary, folder, context)
        save_model(autoencoder, vocabulary, folder / AUTOENCODER)
        write_json(folder / ORIGIN, origin)
    return f"language model with {model.config.head.kind} head"


def export_checkpoint(source: Path, destination: Path) -> None:
    """Write the model in the folder ``source`` as the reference implementation saves its own, into a new folder.

    Raises:
        CalmError: ``destination`` exists, or ``source`` holds no autoencoder or CALM that the reference has.
    """
    _require_new(destination)
    kind = read_config(source)["kind"]
    weights: Weights = {}
    shape: dict[str, Any]
    if kind == "autoencoder":
        autoencoder = load_model(Autoencoder, AutoencoderConfig, source)
        weights, shape = _named(autoencoder), _autoencoder_shape(autoencoder.config)
        shape["architectures"] = ["Autoencoder"]
    elif kind == "calm":
        model = load_model(Calm, CalmConfig, source)
        if model.config.input != "tokens":
            raise CalmError(f"{source} takes latents as input, which the reference implementation's models do not")
        autoencoder = load_model(Autoencoder, AutoencoderConfig, source / AUTOENCODER)
        weights = _named(model) | {AUTOENCODER_PREFIX + name: w for name, w in _named(autoencoder).items()}
        shape = _calm_shape(model.config)
    else:
        raise CalmError(f"{source} is of kind {kind!r}; the reference implementation saves autoencoders and CALMs")
    origin = _origin(source / ORIGIN)
    for name, dtype in origin["dtypes"].items():
        if name not in weights or not isinstance(dtype, str) or dtype not in _DTYPES:
            raise CalmError(f"{source / ORIGIN} is damaged: {name!r} is {dtype!r}; delete it to export float32")
        weights[name] = weights[name].to(_DTYPES[dtype])
    with whole_directory(destination) as folder:
        write_json(folder / "config.json", {**(origin["config"] or _FIXED), **shape})
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        if (source / "tokenizer.json").is_file():
            shutil.copy(source / "tokenizer.json", folder)


def _origin(path: Path) -> dict[str, Any]:
    origin = _read_mapping(path) if path.is_file() else {}
    if not all(isinstance(origin.setdefault(key, {}), dict) for key in ("config", "dtypes")):
        raise CalmError(f"{path} is damaged; delete it to export float32")
    return origin


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], Weights]:
    """config.json and all tensors of a checkpoint in ``folder``; raises CalmError where they cannot be read."""
    if not folder.is_dir():
        raise CalmError(f"{folder} is no folder; a checkpoint is a folder with config.json and {_WEIGHTS[0]}")
    config = _read_mapping(folder / "config.json")
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise CalmError(f"{folder} holds no weights; one of {', '.join(_WEIGHTS)} is needed")
    if path.suffix != ".json":
        return config, _read_weights(path)
    shards = _read_mapping(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CalmError(f"{path} names no shards: it has no weight_map")
    weights: Weights = {}
    for name in sorted({str(shard) for shard in shards.values()}):
        if Path(name).name != name or name in ("", ".."):
            raise CalmError(f"{path} names the shard {name!r}, which lies outside its folder")
        weights |= _read_weights(folder / name)
    if missing := sorted(set(shards) - set(weights)):
        raise CalmError(f"{path} lists tensors that its shards lack: {', '.join(missing)}")
    return config, weights


def build_autoencoder(config: dict[str, Any], weights: Weights, source: str) -> Autoencoder:
    """The autoencoder that ``weights`` make, in the reference's names; ``config`` has to agree with their shapes."""
    sizes = _Sizes(weights, source)
    vocabulary_size, hidden_size = sizes.of("encoder.embed_tokens.weight")
    shape = AutoencoderConfig(
        vocabulary_size=vocabulary_size,
        patch_size=sizes.of("encoder.squeeze_layer.weight")[1] // hidden_size,
        hidden_size=hidden_size,
        intermediate_size=sizes.of("encoder.encoder_layers.0.mlp.gate_proj.weight")[0],
        latent_size=sizes.of("encoder.hidden_to_latent.weight")[0] // 2,
        encoder_layers=sizes.count("encoder.encoder_layers"),
        decoder_layers=sizes.count("decoder.decoder_layers"),
    )
    return _filled(Autoencoder, shape, weights, _disagreements(config, _autoencoder_shape(shape)), source)


def build_calm(config: dict[str, Any], weights: Weights, autoencoder: AutoencoderConfig, source: str) -> Calm:
    """The CALM that ``weights`` make, the autoencoder's left out, in the reference's names."""
    sizes = _Sizes(weights, source)
    vocabulary_size, hidden_size = sizes.of("transformer.embed_tokens.weight")
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1 or hidden_size % heads:
        raise CalmError(f"{source}: num_attention_heads is {heads!r}; it has to divide the hidden size {hidden_size}")
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
            key_value_heads=max(1, sizes.of("transformer.layers.0.self_attn.k_proj.weight")[0] // head_size),
            rope_theta=_number(config, "rope_theta", 10_000.0, source),
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
    disagreements = _disagreements(config, _calm_shape(shape) | {"head_dim": head_size})
    return _filled(Calm, shape, weights, disagreements, source)


def _head_shape(sizes: "_Sizes", latent_size: int, source: str) -> AnyHeadConfig:
    if sizes.has("generative_head.net."):
        blocks = sizes.count("generative_head.net.res_blocks")
        outputs = sizes.of("generative_head.net.final_layer.linear.weight")[0]
        if outputs == latent_size:
            return FlowHeadConfig(blocks)
        if outputs == 2 * latent_size:  # the noise and the variance
            return DiffusionHeadConfig(blocks)
        raise CalmError(
            f"{source}: the head gives {outputs} numbers; a flow head would give {latent_size}, a diffusion head "
            f"{2 * latent_size}"
        )
    prefix = "generative_head" if sizes.has("generative_head.") else "mlp_generator"
    if not sizes.has(f"{prefix}."):
        raise CalmError(f"{source} has no head: no tensor is named generative_head.* or mlp_generator.*")
    return EnergyHeadConfig(sizes.count(f"{prefix}.mlp_blocks"), sizes.of(f"{prefix}.noise_embd.weight")[1])


class _Sizes:
    """Shapes by name; a name that is missing is told as such."""

    def __init__(self, weights: Weights, source: str) -> None:
        self._weights, self._source = weights, source

    def of(self, name: str) -> tuple[int, int]:
        """The shape of the matrix ``name``."""
        if name not in self._weights:
            raise CalmError(f"{self._source} is refused: lacks {name}, which tells its sizes")
        shape = tuple(self._weights[name].shape)
        if len(shape) != 2 or 0 in shape:
            raise CalmError(f"{self._source} is refused: wrong shape {name} {list(shape)}, a matrix is needed")
        return shape[0], shape[1]

    def has(self, prefix: str) -> bool:
        """Whether any name starts with ``prefix``."""
        return any(name.startswith(prefix) for name in self._weights)

    def count(self, prefix: str) -> int:
        """How many layers are numbered after ``prefix``."""
        numbers = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in self._weights]
        return len({number[1] for number in numbers if number})


def _filled(model_class: Any, shape: Any, weights: Weights, disagreements: list[str], source: str) -> Any:
    """A model of ``shape`` that holds ``weights``, or CalmError with all that is missing, left over or misshapen."""
    with torch.device("meta"):
        model: nn.Module = model_class(shape)
    own, names = model.state_dict(), reference_names(model)
    copies = {name: [theirs for theirs in names[name] if theirs in weights] for name in own}
    # Tools that save no tensor twice drop one copy, with all that stands under its first name.
    first_names = {name.split(".")[0] for name in weights}
    lacking = [
        theirs
        for name, found in copies.items()
        for theirs in names[name]
        if theirs not in weights
        and not (found and (theirs == OUTPUT_MATRIX or theirs.split(".")[0] not in first_names))
    ]
    known = {theirs for group in names.values() for theirs in group}
    misshapen = [
        f"{theirs} {list(weights[theirs].shape)} instead of {list(own[name].shape)}"
        for name, found in copies.items()
        for theirs in found
        if weights[theirs].shape != own[name].shape
    ]
    problems = {
        "config.json:": disagreements,
        "lacks": lacking,
        "has unknown": sorted(set(weights) - known),
        "wrong shapes:": misshapen,
        f"neither of {', '.join(_DTYPES)}:": sorted(
            name for name in known & set(weights) if weights[name].dtype not in _DTYPES.values()
        ),
    }
    if any(problems.values()):
        told = "; ".join(f"{problem} {', '.join(names)}" for problem, names in problems.items() if names)
        raise CalmError(f"{source} is refused: {told}")
    for found in copies.values():
        for second in found[1:]:
            if not torch.equal(weights[second], weights[found[0]]):
                raise CalmError(f"{source} is refused: {second} differs from {found[0]}; here they are one tensor")
    model.load_state_dict({name: weights[found[0]].float() for name, found in copies.items()}, assign=True)
    return model.eval().requires_grad_(False)


def _named(model: nn.Module) -> Weights:
    """All tensors of ``model`` under the reference's names, second copies as tensors of their own."""
    own = model.state_dict()
    return {theirs: own[name].clone() for name, group in reference_names(model).items() for theirs in group}


def _autoencoder_shape(shape: AutoencoderConfig) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "latent_size": shape.latent_size,
        "num_decoder_layers": shape.decoder_layers,
        "num_encoder_layers": shape.encoder_layers,
        "patch_size": shape.patch_size,
        "vocab_size": shape.vocabulary_size,
    }


def _calm_shape(shape: CalmConfig) -> dict[str, Any]:
    backbone, head = shape.backbone, shape.head
    return {
        "hidden_size": backbone.hidden_size,
        "intermediate_size": backbone.intermediate_size,
        "latent_size": shape.latent_size,
        "num_attention_heads": backbone.heads,
        "num_hidden_layers": backbone.layers,
        "num_key_value_heads": backbone.key_value_heads,
        "num_mlp_layers": head.blocks,
        "patch_size": shape.patch_size,
        "rope_theta": backbone.rope_theta,
        "vocab_size": shape.vocabulary_size,
        **({"noise_size": head.noise_size} if isinstance(head, EnergyHeadConfig) else {}),
    }


def _disagreements(config: dict[str, Any], shape: dict[str, Any]) -> list[str]:
    """Where config.json contradicts the weights, or asks for what no model here can do."""
    wrong = [
        f"{key} is {config[key]!r}, the weights have {value!r}"
        for key, value in shape.items()
        if config.get(key) is not None and config[key] != value
    ]
    return wrong + [
        f"{key} is {config[key]!r}, here it is always {value!r}"
        for key, value in _FIXED.items()
        if key in config and config[key] != value
    ]


def _number(config: dict[str, Any], key: str, default: float, source: str) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise CalmError(f"{source} is refused: config.json: {key} is {value!r}, a positive number is needed")
    return float(value)


def _require_new(destination: Path) -> None:
    if destination.exists() or destination.resolve().exists():  # "new/.." is where we are
        raise CalmError(f"{destination} exists; name a new folder, or remove it first")


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CalmError(f"{path} is missing; a checkpoint is a folder with config.json and {_WEIGHTS[0]}")
    try:
        values = read_json(path)
    except CalmError:
        raise CalmError(f"{path} is no JSON") from None
    if not isinstance(values, dict):
        raise CalmError(f"{path} holds no JSON object")
    return values


def _read_weights(path: Path) -> Weights:
    if path.suffix == ".safetensors":
        return load_tensors(path, "fetch it again")
    try:
        _require_stored(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except CalmError:
        raise
    except Exception as error:  # the unpickler fails in as many ways as there are bytes, for want of memory too
        raise CalmError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise CalmError(f"{path} holds no tensors by name; the weights of a model are needed, not a training state")
    for name, weight in weights.items():
        if not isinstance(name, str) or not _fills_its_shape(weight):
            raise CalmError(f"{path}: {name!r} is no plain tensor with a number for each place")
    return weights


def _require_stored(path: Path) -> None:
    """Raise CalmError if the archive ``path`` is compressed: torch writes none, and a small one can fill all memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            sizes = [(entry.file_size, entry.compress_size) for entry in archive.infolist()]
        if any(size != stored for size, stored in sizes) or sum(size for size, _ in sizes) > path.stat().st_size:
            raise CalmError(f"{path} cannot be read: its archive is compressed, which torch.save does not do")


def _fills_its_shape(weight: Tensor) -> bool:
    """Whether a tensor of a pickle has the memory that its shape claims; a stride of 0 claims any size for nothing."""
    if weight.layout != torch.strided or weight.device.type != "cpu" or weight.is_quantized or weight.is_nested:
        return False
    return math.prod(weight.shape) * weight.element_size() <= weight.untyped_storage().nbytes()
