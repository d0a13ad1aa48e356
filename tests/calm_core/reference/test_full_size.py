"""CALM-M and its autoencoder at their full vocabulary and shapes, in 16 bits and in shards, with random weights.

Two folders as on the hub: the import holds little in memory, the model writes a patch, and the export gives every
tensor back. Takes 4 GB of disk and 3 GB of memory. A Llama, as wide as TinyLlama, is imported in as little.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.model import Calm, CalmConfig
from calm_core.nn.backbone import BackboneConfig
from calm_core.reference.llama import llama_config, llama_names
from calm_core.reference.names import autoencoder_keys, calm_keys, reference_names
from calm_core.reference.settings import FIXED
from calm_core.storage.model_folder import count_parameters
from calm_core.transformer.model import Transformer, TransformerConfig
from tests import ROOT, needs_linux

TOKENS, ROWS = 128_256, 128_257
"""Llama 3's ids, and the models' rows: the reference adds one for [PAD]."""

SHARD = 400 << 20
"""Bytes of a shard; the embedding, the largest tensor, has 263 MB."""

MEASURED = """
import json, sys
from pathlib import Path
import torch
from calm_core.inference.decoding import Sampling
from calm_core.inference.language_model import load_language_model
from calm_core.reference.exporting import export_checkpoint
from calm_core.reference.importing import import_checkpoint
from calm_core.storage.hub import local_folder

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

torch.set_num_threads(1)
before = peak()
import_checkpoint("model", Path("own"), autoencoder=sys.argv[2] if sys.argv[2:] else None)
found = {"imported": peak() - before}
if sys.argv[1] == "whole":
    model = load_language_model("own")
    found["encoded"] = model.encode("the")
    (continuation,) = next(model.stream([model.encode("the")], 4, Sampling(), 0))
    found["written"] = continuation.token_ids
    found["text"] = model.decode([0, 128_256])
    del model
    export_checkpoint(Path("own"), Path("back"))
print(json.dumps(found))
"""


def tensors(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Random weights under the reference's names, second copies too, or under Llama's."""
    own = model.state_dict()
    names = llama_names(model) if isinstance(model, Transformer) else reference_names(model)
    for number, (name, theirs) in enumerate(names.items()):
        draws = torch.Generator().manual_seed(1000 * seed + number)
        weight = torch.empty(own[name].shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=draws)
        yield from ((each, weight.clone()) for each in theirs)


def write_sharded(model: nn.Module, config: dict[str, object], folder: Path, suffix: str, seed: int) -> int:
    """Write a checkpoint; returns the bytes of its largest shard."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**FIXED, **config}))
    save, stem = (save_file, "model") if suffix == "safetensors" else (torch.save, "pytorch_model")
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    written: list[Path] = []

    def flush() -> None:
        written.append(folder / f"{stem}-{len(written):05d}.{suffix}")
        save(dict(shard), written[-1])
        places.update(dict.fromkeys(shard, written[-1].name))
        shard.clear()

    for name, weight in tensors(model, seed):
        if shard and sum(held.nbytes for held in shard.values()) + weight.nbytes > SHARD:
            flush()
        shard[name] = weight
    flush()
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    return max(path.stat().st_size for path in written)


def llama_3() -> Tokenizer:
    """As many ids as Llama 3's tokenizer, its special tokens and its template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [f"Ġ{number}" for number in range(128_000 - len(alphabet))]
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(254)]
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", *reserved])
    begin = ("<|begin_of_text|>", 128_000)
    template = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[begin])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    assert tokenizer.get_vocab_size() == TOKENS
    return tokenizer


def measured(folder: Path, *arguments: str) -> dict[str, Any]:
    """What ``MEASURED`` prints of the checkpoints in ``folder``, in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout))


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_llama_comes_in_little_memory(suffix: str, tmp_path: Path) -> None:
    shape = TransformerConfig(32_000, BackboneConfig(2048, 5632, 2, 32, 4, norm_epsilon=1e-5))
    with torch.device("meta"):
        llama = Transformer(shape)
    largest_shard = write_sharded(llama, llama_config(shape, 2048), tmp_path / "model", suffix, 1)
    assert measured(tmp_path, "import")["imported"] <= largest_shard < 0.8 * 2 * count_parameters(llama)
    own = load_file(tmp_path / "own/model.safetensors")
    for name, weight in tensors(llama, 1):
        (ours,) = (ours for ours, (theirs,) in llama_names(llama).items() if theirs == name)
        assert torch.equal(own[ours], weight)
        assert own[ours].dtype == torch.bfloat16


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_calm_m_comes_and_goes(suffix: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        calm = Calm(CalmConfig(ROWS, 4, 128, BackboneConfig(1024, 2752, 16, 16, 16), EnergyHeadConfig(4, 64)))
        autoencoder = Autoencoder(AutoencoderConfig(ROWS, 4, 512, 1280, 128))
    config = {**calm_keys(calm.config), "ae_path": "/mnt/autoencoder", "max_position_embeddings": 2048}
    shards = [
        write_sharded(calm, config, tmp_path / "model", suffix, 1),
        write_sharded(autoencoder, autoencoder_keys(autoencoder.config), tmp_path / "autoencoder", suffix, 2),
    ]
    llama_3().save(str(tmp_path / "model/tokenizer.json"))
    whole = suffix == "safetensors"
    found = measured(tmp_path, "whole" if whole else "import", "autoencoder")
    assert found["imported"] <= 1.3 * max(shards)
    if not whole:
        return
    assert found["encoded"][0] == 128_000
    assert len(found["written"]) == 4
    assert all(0 <= token_id < ROWS for token_id in found["written"])
    with safe_open(tmp_path / "back/model.safetensors", framework="pt") as back:
        names = set(back.keys())
        for prefix, model, seed in (("", calm, 1), ("ae_model.", autoencoder, 2)):
            for name, weight in tensors(model, seed):
                given_back = back.get_tensor(prefix + name)
                assert given_back.dtype == torch.bfloat16
                assert torch.equal(given_back, weight)
                names.remove(prefix + name)
        assert not names
