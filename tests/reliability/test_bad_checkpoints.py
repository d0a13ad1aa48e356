"""Models, tokens, latents and other people's checkpoints, damaged in every way: refused in one line, or used.

Some damage cannot be seen without a hash, such as a bit of one weight. What reads it then goes on with that weight; the
stages look at the hashes first (``provenance``), which test_faults.py tries.
"""

import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.diffusion_head import DiffusionHeadConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.model import Calm, CalmConfig
from calm_core.errors import CalmError
from calm_core.inference.language_model import load_language_model
from calm_core.latents.shards import LatentCorpus
from calm_core.nn.backbone import BackboneConfig
from calm_core.reference.exporting import export_checkpoint
from calm_core.reference.importing import import_checkpoint
from calm_core.storage.model_folder import AUTOENCODER, save_model
from calm_core.storage.provenance import require_intact
from calm_core.tokens.round_trip import told_losses
from calm_core.tokens.shards import TokenStream, TokenWriter, vocabulary_size
from calm_core.tokens.tokenizer import load_tokenizer, train_tokenizer
from calm_core.transformer.model import Transformer, TransformerConfig
from tests.calm_core.reference.reference_data import reference_weights, write_reference
from tests.calm_core.tokens.published import PUBLISHED, write
from tests.reliability.support.bad_input import PLAIN, Content, bounded, complaint, damaged, tries

BACKBONE = BackboneConfig(8, 12, 1, 2, 1)
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64,
          torch.float8_e4m3fn, torch.uint16]  # fmt: skip
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 5, 8, 12, 10**4, 2**20, 2**31, 2**40, 2**63, 10**30, 0.5, 1e300, True, None])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small models of every kind that generates."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["some words, and some more"], 262)
    for name, head in (("calm", EnergyHeadConfig(1, 4)), ("diffusion", DiffusionHeadConfig(1, 6, 3))):
        _save(Calm(CalmConfig(262, 2, 4, BACKBONE, head)), tokenizer, folder / name, 8)
        _save(Autoencoder(AutoencoderConfig(262, 2, 8, 12, 4)), tokenizer, folder / name / AUTOENCODER)
    _save(Transformer(TransformerConfig(262, BACKBONE)), tokenizer, folder / "transformer", 8)
    return folder


def _save(model: Any, tokenizer: Any, folder: Path, context: int | None = None) -> None:
    model.initialise(torch.Generator().manual_seed(0))
    save_model(model, tokenizer, folder, context)


@contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """``path`` holds ``content`` within the block."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def use(folder: Path) -> Callable[[], object]:
    return lambda: load_language_model(folder).generate(["some"], tokens=3)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damaged_file(content: bytes, name: str) -> st.SearchStrategy[bytes]:
    """``content`` damaged; of a safetensors file the header more often than the numbers."""
    if not name.endswith(".safetensors"):
        return damaged(content)
    size = 8 + struct.unpack("<Q", content[:8])[0]
    return (
        st.one_of(
            damaged(content),
            damaged(content[:size]).map(lambda header: header + content[size:]),
            damaged(content[8:size]).map(lambda header: struct.pack("<Q", len(header)) + header + content[size:]),
            headers(content[8:size]).map(lambda header: struct.pack("<Q", len(header)) + header + content[size:]),
            st.integers(0, 2**64 - 1).map(lambda claimed: struct.pack("<Q", claimed) + content[8:]),
        )
        .filter(lambda changed: changed != content)
        .map(Content)
    )


def try_damage(path: Path, examples: int, act: Callable[[], object]) -> None:
    """Call ``act`` while ``path`` is damaged, in so many ways."""

    @tries(examples)
    @given(changed=damaged_file(path.read_bytes(), path.name))
    def attempt(changed: bytes) -> None:
        with replaced(path, changed):
            act()

    attempt()


def try_mutations(path: Path, examples: int, act: Callable[[], object]) -> None:
    """Call ``act`` while the JSON in ``path`` has other values."""

    @tries(examples)
    @given(changed=mutated(path.read_bytes()))
    def attempt(changed: bytes) -> None:
        with replaced(path, changed):
            act()

    attempt()


@st.composite
def headers(draw: st.DrawFn, header: bytes) -> bytes:
    """A header of safetensors with other types, shapes, offsets or names."""
    values = json.loads(header)
    for name in draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=2, unique=True)):
        changes: dict[str, st.SearchStrategy[Any]] = {
            "dtype": st.sampled_from(
                ["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "F8_E8M0", "C64", "", "X"]
            ),
            "shape": st.lists(NUMBERS, max_size=4),
            "data_offsets": st.lists(NUMBERS, max_size=3),
        }
        key = draw(st.sampled_from(sorted(changes)))
        values[name] = {**values[name], key: draw(changes[key])} if draw(st.integers(0, 5)) else draw(PLAIN)
    return json.dumps(values, default=str).encode()


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """JSON with other values in one or two places, at any depth."""
    values = json.loads(content)
    for _ in range(draw(st.integers(1, 2))):
        at = values
        for _ in range(draw(st.integers(0, 3))):
            inner = [
                value
                for value in (at.values() if isinstance(at, dict) else at)
                if isinstance(value, dict | list) and value
            ]
            if not inner:
                break
            at = draw(st.sampled_from(inner[:20]))
        place = draw(st.sampled_from(list(at)[:50] if isinstance(at, dict) else list(range(min(50, len(at))))))
        if draw(st.integers(0, 4)):
            at[place] = draw(NUMBERS | PLAIN | st.sampled_from(list(at.values() if isinstance(at, dict) else at)[:20]))
        else:
            del at[place]
        if not values:
            break
    return Content(json.dumps(values, default=str, skipkeys=True).encode())


@pytest.mark.parametrize(("kind", "examples"), [("calm", 40), ("transformer", 40), ("diffusion", 10)])
def test_any_damage_to_a_model(kind: str, examples: int, models: Path) -> None:
    folder = models / kind
    for path in files(folder):
        content = path.read_bytes()
        try_damage(path, examples, lambda: complaint(use(folder)))
        path.unlink()
        assert complaint(use(folder)) or path.parent.name == AUTOENCODER
        path.mkdir()
        assert complaint(use(folder)) or path.parent.name == AUTOENCODER
        path.rmdir()
        path.write_bytes(content)
    assert complaint(use(folder)) is None


@pytest.mark.parametrize("name", [
    "calm/config.json", "calm/autoencoder/config.json", "transformer/config.json", "diffusion/config.json",
    "calm/tokenizer.json",
])  # fmt: skip
def test_any_values_in_the_files_of_a_model(name: str, models: Path) -> None:
    try_mutations(models / name, 100, lambda: complaint(use(models / name.split("/")[0])))


@pytest.mark.parametrize("key", ["hidden_size", "vocabulary_size", "layers", "intermediate_size", "heads", "blocks",
                                 "sampling_steps", "training_steps", "patch_size", "latent_size",
                                 "context_tokens"])  # fmt: skip
def test_sizes_that_a_model_only_claims_cost_nothing(key: str, models: Path) -> None:
    path = models / "diffusion/config.json"
    values = json.loads(path.read_text())
    section = next(part for part in (values, values["backbone"], values["head"]) if key in part)
    for claimed in (10**5, 10**9, 10**18, 10**30, -1, 0, None, "8", 8.5, [8], True, float("nan")):
        section[key] = claimed
        refused: list[str | None] = []
        with replaced(path, json.dumps(values).encode()), bounded(memory=1 << 28, seconds=10):
            refused.append(complaint(use(models / "diffusion")))
        assert refused[0] or key == "context_tokens"


def test_weights_of_other_types_and_shapes(models: Path) -> None:
    path = models / "transformer/model.safetensors"
    weights = load_file(path)
    names = sorted(weights)

    def changed(name: str, how: Callable[[Tensor], Tensor]) -> bytes:
        return save({**weights, name: how(weights[name]).contiguous()})

    for name in names:
        for dtype in DTYPES:
            with replaced(path, changed(name, lambda weight, dtype=dtype: weight.to(dtype))):
                refused = complaint(use(models / "transformer"))
                assert bool(refused) == (not dtype.is_floating_point)
        for how in (lambda w: w[None], lambda w: w[..., :-1], lambda w: w.flatten()[:0], lambda w: w.flatten()[0]):
            with replaced(path, changed(name, how)):
                assert complaint(use(models / "transformer"))
        for value in (float("nan"), float("inf"), -1e38):
            with replaced(path, changed(name, lambda weight, value=value: torch.full_like(weight, value))):
                assert complaint(use(models / "transformer")) is None
    with replaced(path, save({name: weights[name] for name in names[1:]})):
        assert complaint(use(models / "transformer"))
    with replaced(path, save({**weights, "extra": torch.zeros(1)})):
        assert complaint(use(models / "transformer"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of tokens and latents in two shards."""
    folder = tmp_path_factory.mktemp("shards")
    writer = TokenWriter(folder, "train", 300)
    for length in (5, 9, 1):
        writer.write(list(range(length)))
        writer.flush()
    latents = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).half()
    save_file({"mean": latents, "log_std": latents.clone()}, folder / "posteriors-00000.safetensors")
    save_file({"patches": torch.tensor([0, 5, 3, 3], dtype=torch.int32)}, folder / "index.safetensors")
    (folder / "description.json").write_text(json.dumps({"vocabulary_size": 300, "sha256": {}, "splits": {}}))
    return folder


def read_shards(folder: Path) -> None:
    vocabulary_size(folder)
    stream = TokenStream(folder, "train")
    stream.windows(torch.arange(max(0, len(stream) - 3)), 3)
    assert stream.document_ends.dtype == torch.int64
    latents = LatentCorpus(folder)
    posterior = latents.posterior(torch.arange(len(latents)))
    assert posterior.mean.shape == posterior.log_std.shape


def test_any_damage_to_tokens_and_latents(shards: Path) -> None:
    def act() -> None:
        complaint(lambda: read_shards(shards))
        complaint(lambda: require_intact(shards))

    for path in files(shards):
        try_damage(path, 60, act)
    assert complaint(lambda: read_shards(shards)) is None


def test_tokens_and_latents_of_other_types_and_shapes(shards: Path) -> None:
    for path in files(shards):
        if path.suffix != ".safetensors":
            continue
        tensors = load_file(path)
        for name, tensor in tensors.items():
            others = [tensor.to(dtype) for dtype in (*DTYPES, torch.int32, torch.float32) if dtype != tensor.dtype]
            wrong = [other for other in others if path.name[:5] == "index" and other.dtype == torch.int64]
            for other in (*others, tensor[None], tensor[..., None], tensor.flatten()[0]):
                if name == "token_ids" and other.dtype == torch.int32 and other.ndim == 1:
                    continue
                if any(other is same for same in wrong):
                    continue
                with replaced(path, save({**tensors, name: other.contiguous()})):
                    assert complaint(lambda: read_shards(shards)), (path.name, name, other.dtype, other.shape)
        with replaced(path, save({})):
            assert complaint(lambda: read_shards(shards))
        with replaced(path, save({**tensors, "more": torch.zeros(1)})):
            assert complaint(lambda: read_shards(shards))
    for index in ([6], [-1], [2**31 - 1]):
        with replaced(shards / "index.safetensors", save({"patches": torch.tensor(index, dtype=torch.int32)})):
            assert "do not fit together" in (complaint(lambda: read_shards(shards)) or "")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "", "a/b"])
def test_a_description_names_no_file_elsewhere(name: str, shards: Path) -> None:
    for description in ({"sha256": {name: "0"}}, {"splits": {"train": {"sha256": {name: "0"}}}}):
        with replaced(shards / "description.json", json.dumps(description).encode()):
            assert "description.json is damaged" in (complaint(lambda: require_intact(shards)) or "")


@pytest.fixture()
def source(tmp_path: Path) -> Path:
    """A checkpoint of the reference implementation."""
    return write_reference("flow", tmp_path)


def imported(source: Path, export: bool = False) -> str | None:
    """What the importer says against ``source``; it leaves nothing behind then, and a whole model otherwise.

    ``export``: that model is also written back.
    """
    destination = source.parent / "own"
    refused = complaint(lambda: import_checkpoint(source, destination))
    assert destination.exists() == (refused is None)
    if destination.exists():
        if export:
            assert complaint(lambda: export_checkpoint(destination, source.parent / "back")) is None
            shutil.rmtree(source.parent / "back")
        shutil.rmtree(destination)
    assert [path.name for path in source.parent.iterdir()] == [source.name]
    return refused


def test_any_damage_to_a_reference_checkpoint(source: Path) -> None:
    try_damage(source / "model.safetensors", 120, lambda: imported(source))
    try_damage(source / "config.json", 30, lambda: imported(source))
    try_mutations(source / "config.json", 60, lambda: imported(source))
    assert imported(source, export=True) is None


def test_any_damage_to_what_export_reads(source: Path) -> None:
    own, back = source.parent / "own", source.parent / "back"
    weights = {name: weight.half() for name, weight in reference_weights("flow").items()}
    save_file(weights, source / "model.safetensors")
    import_checkpoint(source, own)

    def act() -> None:
        refused = complaint(lambda: export_checkpoint(own, back))
        assert back.exists() == (refused is None)
        shutil.rmtree(back, ignore_errors=True)

    try_mutations(own / "reference.json", 40, act)
    try_damage(own / "reference.json", 20, act)


def test_any_damage_to_a_pickle(source: Path) -> None:
    smallest = sorted(reference_weights("flow").items(), key=lambda item: item[1].numel())[:3]
    weights = {name: weight.clone() for name, weight in smallest}
    (source / "model.safetensors").unlink()
    for zipped in (True, False):
        saved = io.BytesIO()
        torch.save(weights, saved, _use_new_zipfile_serialization=zipped)

        @tries(100)
        @given(changed=damaged(saved.getvalue()))
        def attempt(changed: bytes) -> None:
            (source / "pytorch_model.bin").write_bytes(changed)
            assert imported(source)  # three tensors are no model

        attempt()


class Harmful:
    """Unpickling it would run a command."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._call, self._arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call, self._arguments


def test_no_pickle_runs_code(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (source / "model.safetensors").unlink()
    harm = tmp_path / "harm"
    target = source / "pytorch_model.bin"
    payloads = [
        Harmful(Path.touch, harm),
        Harmful(exec, f"open({str(harm)!r}, 'w')"),
        Harmful(eval, f"open({str(harm)!r}, 'w')"),
        Harmful(getattr(__import__("os"), "system"), f"touch {harm}"),  # noqa: B009
        Harmful(__import__("subprocess").check_call, ["touch", str(harm)]),
        Harmful(torch.load, str(harm)),
        Harmful(torch.hub.load, str(tmp_path), "harm"),
    ]
    for payload in payloads:
        for content in (
            {"weight": payload},
            payload,
            {"weight": torch.zeros(1), payload.__class__.__name__: [payload]},
        ):
            for save_it in (
                lambda it: torch.save(it, target),
                lambda it: torch.save(it, target, _use_new_zipfile_serialization=False),
                lambda it: target.write_bytes(pickle.dumps(it)),
            ):
                save_it(content)
                assert imported(source)
                assert not harm.exists()
    # Also where a shard of an index, or a file of another name, is the pickle.
    torch.save({"weight": payloads[0]}, source / "tensors.pt")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": "tensors.pt"}}))
    target.unlink()
    assert imported(source)
    assert not harm.exists()


def test_pickles_that_claim_more_than_they_hold(source: Path) -> None:
    whole = reference_weights("flow")
    (source / "model.safetensors").unlink()
    target = source / "pytorch_model.bin"
    embedding = "transformer.embed_tokens.weight"
    wide = {
        name: (torch.zeros(1).expand(2**33, weight.shape[1]) if name == embedding else weight)
        for name, weight in whole.items()
    }
    for other in (
        wide,
        {**whole, embedding: whole[embedding].to_sparse()},
        {**whole, embedding: whole[embedding].to("meta")},
        {**whole, embedding: torch.quantize_per_tensor(whole[embedding], 0.1, 0, torch.qint8)},
        {**whole, embedding: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])},
        {**whole, embedding: 3},
        {3: torch.zeros(1)},
        [torch.zeros(1)],
        {},
    ):
        torch.save(other, target)
        assert imported(source)
    torch.save(
        {name: weight.T.contiguous().T if weight.ndim == 2 else weight for name, weight in whole.items()}, target
    )
    assert imported(source, export=True) is None  # another order in memory is no damage


def test_a_compressed_archive_is_refused(source: Path) -> None:
    saved = io.BytesIO()
    torch.save({"weight": torch.zeros(1 << 24)}, saved)
    (source / "model.safetensors").unlink()
    with (
        zipfile.ZipFile(saved) as plain,
        zipfile.ZipFile(source / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (source / "pytorch_model.bin").stat().st_size < 1 << 18
    assert "its archive is compressed" in (imported(source) or "")


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_weights_of_other_types(dtype: torch.dtype, source: Path) -> None:
    weights = {name: weight.to(dtype) for name, weight in reference_weights("flow").items()}
    save_file(weights, source / "model.safetensors")
    known = dtype in (torch.float64, torch.float16, torch.bfloat16)
    assert (imported(source, export=True) is None) == known


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "\0", 3, None, []]
)
def test_an_index_names_files_of_its_folder(shard: Any, source: Path) -> None:
    (source / "model.safetensors").rename(source.parent / "secret.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(reference_weights("flow"), shard)}))
    refused = complaint(lambda: import_checkpoint(source, source.parent / "own"))
    assert refused
    assert not (source.parent / "own").exists()


def test_files_that_are_built_to_harm(source: Path) -> None:
    header = struct.pack("<Q", 2**63)
    for content in (
        b"",
        b"\0" * 8,
        header,
        header + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 100_008) + b'{"a":' + b"[" * 100_003,
        struct.pack("<Q", 99)
        + json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}}).ljust(99).encode(),
        np.zeros(1 << 20, np.uint8).tobytes(),
    ):
        with replaced(source / "model.safetensors", content):
            assert imported(source)
    for content in (
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"NaN",
        b"1e999",
        b"\xff",
        b'{"hidden_size": 1' + b"0" * 10_000 + b"}",
    ):
        with replaced(source / "config.json", content):
            assert imported(source)


@pytest.mark.parametrize("name", ["llama-2", "bert", "roberta"])
def test_any_values_in_a_tokenizer_of_many_parts(name: str, tmp_path: Path) -> None:
    path = write(PUBLISHED[name](), tmp_path)
    try_mutations(path, 100, lambda: complaint(lambda: told_losses(load_tokenizer(path))))


@pytest.mark.parametrize("content", [
    b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 100, b"{}",
    b'{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}',
    b'{"model": {"type": "BPE", "vocab": {"<eos>": 1, "a": 0}, "merges": [["a", "b"]]}}',
    b'{"model": {"type": "WordLevel", "vocab": {"<eos>": 0}, "unk_token": "x"}}',
    b'{"model": [], "added_tokens": 3}',
    b'{"model": {"type": "WordLevel", "vocab": {"<eos>": 0, "a": 1}, "unk_token": "a"}, "post_processor": {"type":'
    b'"TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],'
    b'"special_tokens": {}}}',
    b'{"model": {}, "added_tokens": [3], "normalizer": [], "decoder": {"decoders": 1}}',
    b'{"model": {"vocab": {"<eos>": 0}, "merges": []}, "normalizer": ' + b'{"type":"Sequence","normalizers":[' * 5000,
])  # fmt: skip
def test_tokenizers_that_are_built_to_harm(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    complaint(lambda: told_losses(load_tokenizer(path)))
    with pytest.raises(CalmError):
        load_tokenizer(tmp_path / ("x" * 300))
