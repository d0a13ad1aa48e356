"""From a model's folder to a hub on the loopback and back, and what is not published."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.energy_head import EnergyHeadConfig
from calm_core.calm.model import Calm, CalmConfig
from calm_core.errors import CalmError
from calm_core.inference.language_model import load_language_model
from calm_core.inference.publishing import publication, publish, sizes
from calm_core.nn.backbone import BackboneConfig
from calm_core.nn.layers import initialise
from calm_core.reference.exporting import export_checkpoint
from calm_core.reference.importing import import_checkpoint
from calm_core.storage.hub import local_folder
from calm_core.storage.model_folder import AUTOENCODER, load_model, save_model
from calm_core.tokens.tokenizer import load_tokenizer, train_tokenizer
from calm_core.transformer.model import Transformer, TransformerConfig
from tests.calm_core.reference.reference_data import reference_weights, write_reference
from tests.calm_core.reference.test_newer_configs import vocabulary
from tests.support.hub_server import Hub, hub_on_loopback, use_hub

BACKBONE = BackboneConfig(16, 24, 2, 2, 1)
OF_A_MODEL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
INNER = {"autoencoder/config.json", "autoencoder/model.safetensors", "autoencoder/tokenizer.json"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CALM, its autoencoder and a Transformer, with cards, and with files beside them that are nobody's."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["the name of the bucket"], 270)
    calm, autoencoder, transformer = (
        Calm(CalmConfig(270, 3, 8, BACKBONE, EnergyHeadConfig(1, 8))),
        Autoencoder(AutoencoderConfig(270, 3, 16, 24, 8)),
        Transformer(TransformerConfig(270, BACKBONE)),
    )
    for model in (calm, autoencoder, transformer):
        initialise(model, torch.Generator().manual_seed(0), embedding_std=1.0)
    save_model(calm, tokenizer, folder / "calm", 24, [2, 3, 1])
    save_model(autoencoder, tokenizer, folder / "calm" / AUTOENCODER)
    save_model(autoencoder, tokenizer, folder / "autoencoder")
    save_model(transformer, tokenizer, folder / "transformer", 24, [1])
    for kind in ("calm", "autoencoder", "transformer"):
        (folder / kind / "README.md").write_text(f'---\nlicense: mit\n---\nload("models/{kind}"), ü')
        for stray in ("checkpoints/1.safetensors", "results.json", ".env", "autoencoder/notes.txt"):
            (folder / kind / stray).parent.mkdir(exist_ok=True)
            (folder / kind / stray).write_text("not the model's")
    return folder


@pytest.fixture()
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_on_loopback() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "home")
        # The older of the two ways to send large files, which needs no other server; the library chooses it itself
        # where its companion for the newer is not installed.
        monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.chdir(tmp_path)
        yield hub


def refusal(folder: Path, name: str = "someone/model", private: bool = False) -> str:
    with pytest.raises(CalmError) as raised:
        publish(publication(folder, name), name, private)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("kind", ["calm", "transformer"])
def test_a_published_model_is_loaded_by_its_name(kind: str, models: Path, hub: Hub) -> None:
    address = publish(publication(models / kind, "someone/model"), "someone/model")
    assert address == f"{hub.url}/someone/model"
    assert hub.models["someone/model"].keys() == OF_A_MODEL | (INNER if kind == "calm" else set())
    ours, theirs = load_language_model(models / kind), load_language_model("someone/model")
    token_ids = torch.randint(270, (2, 4, 3) if kind == "calm" else (2, 12), generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours.model(token_ids), theirs.model(token_ids))
    assert ours.opening == theirs.opening
    assert ours.generate(["the na"], tokens=6, seed=1) == theirs.generate(["the na"], tokens=6, seed=1)


def test_files_are_those_of_the_folder_and_the_card_names_the_model(models: Path, hub: Hub) -> None:
    contents = publication(models / "calm", "someone/model")
    publish(contents, "someone/model")
    published = hub.models["someone/model"]
    for name in OF_A_MODEL - {"README.md", "tokenizer_config.json"} | INNER:
        assert published[name] == (models / "calm" / name).read_bytes()
    assert published["README.md"].decode() == '---\nlicense: mit\n---\nload("someone/model"), ü'
    assert sizes(contents) == {name: len(content) for name, content in published.items()}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def publish_with_card(folder: Path, name: str, base: str) -> None:
    """Publish the imported model in ``folder`` as its user does, who is told what its card has to say."""
    told = refusal(folder, name)
    assert "README.md is missing, the card that says what" in told
    assert f"for another model write one, with `base_model: {base}` between two lines of ---" in told
    (folder / "README.md").write_text(f"---\nbase_model: {base}\n---\nAs it was.")
    publish(publication(folder, name), name)


def test_an_imported_calm_is_exported_from_the_hub_as_it_came(hub: Hub, tmp_path: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in reference_weights("energy").items()}
    source = write_reference("energy", tmp_path, weights)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    vocabulary(96).save(str(source / "tokenizer.json"))
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | {"mine": [1]}))
    hub.models["author/CALM"] = files(source)
    import_checkpoint("author/CALM", tmp_path / "own")
    publish_with_card(tmp_path / "own", "someone/model", "author/CALM")
    assert hub.models["someone/model"].keys() == OF_A_MODEL | INNER | {"reference.json", "autoencoder/reference.json"}
    for place, name in (("here", tmp_path / "own"), ("hub", "someone/model")):
        export_checkpoint(name, tmp_path / place)
    assert files(tmp_path / "hub") == files(tmp_path / "here")
    assert (tmp_path / "hub/model.safetensors").read_bytes() == hub.models["author/CALM"]["model.safetensors"]
    assert json.loads((tmp_path / "hub/config.json").read_text()) == json.loads((source / "config.json").read_text())
    # And so is the autoencoder in it.
    for place, name in (("here", tmp_path / "own"), ("hub", local_folder("someone/model"))):
        export_checkpoint(Path(name) / AUTOENCODER, tmp_path / f"{place} alone")
    assert files(tmp_path / "hub alone") == files(tmp_path / "here alone")


def test_an_imported_llama_is_exported_from_the_hub_as_it_came(hub: Hub, tmp_path: Path) -> None:
    sizes = {"vocab_size": 270, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, rms_norm_eps=1e-5, pretraining_tp=7)
    LlamaForCausalLM(config).half().save_pretrained(tmp_path / "llama")
    train_tokenizer(["the name of the bucket"], 270).save(str(tmp_path / "llama/tokenizer.json"))
    hub.models["author/Llama"] = files(tmp_path / "llama")
    import_checkpoint("author/Llama@main", tmp_path / "own")
    publish_with_card(tmp_path / "own", "someone/model", "author/Llama")
    for place, name in (("here", tmp_path / "own"), ("hub", "someone/model")):
        export_checkpoint(name, tmp_path / place)
    assert files(tmp_path / "hub") == files(tmp_path / "here")
    came, went = (load_file(tmp_path / name / "model.safetensors") for name in ("llama", "hub"))
    assert came.keys() == went.keys()
    assert all(torch.equal(came[name], went[name]) and went[name].dtype == torch.float16 for name in came)
    assert LlamaConfig.from_pretrained(tmp_path / "hub").pretraining_tp == 7


def test_an_autoencoder_goes_alone(models: Path, hub: Hub) -> None:
    publish(publication(models / "autoencoder", "someone/autoencoder"), "someone/autoencoder")
    assert hub.models["someone/autoencoder"].keys() == OF_A_MODEL
    ours = load_model(Autoencoder, models / "autoencoder")
    theirs = load_model(Autoencoder, local_folder("someone/autoencoder"))
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_transformers_reads_the_published_tokenizer(models: Path, hub: Hub) -> None:
    publish(publication(models / "transformer", "someone/model"), "someone/model")
    theirs, ours = AutoTokenizer.from_pretrained(local_folder("someone/model")), load_language_model("someone/model")
    for text in ("the name of", "a <eos> b <pad>", " ü\n"):
        assert theirs(text).input_ids == ours.encode(text)
    assert (theirs.eos_token, theirs.bos_token, theirs.pad_token) == ("<eos>", "<eos>", "<pad>")
    assert theirs.model_max_length == 24


def test_the_token_that_begins_an_imported_models_documents_is_told(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "transformer", tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"opening": None, "document_marks": "post_processor"}))
    tokenizer = load_tokenizer(folder)
    tokenizer.post_processor = TemplateProcessing(["<pad>", "$A"], special_tokens=[("<pad>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = publication(folder, "someone/model")["tokenizer_config.json"]
    assert isinstance(about, bytes)
    assert json.loads(about)["bos_token"] == "<pad>"
    (folder / "tokenizer_config.json").write_bytes(about)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs("the name").input_ids == load_language_model(folder).encode("the name")
    assert theirs.bos_token_id == 0


def test_a_dry_run_asks_nothing_of_anyone(models: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert publication(models / "calm", "someone/model").keys() == OF_A_MODEL | INNER
    assert not hub.requests


def test_a_private_model_is_private(models: Path, hub: Hub) -> None:
    contents = publication(models / "transformer", "someone/model")
    publish(contents, "someone/hidden", private=True)
    publish(contents, "someone/hidden")  # again, with what has changed: nothing
    assert hub.private == {"someone/hidden"}
    publish(contents, "someone/model")
    del hub.models["someone/model"]["model.safetensors"]
    assert "is there for everyone to see" in refusal(models / "transformer", private=True)
    assert "model.safetensors" not in hub.models["someone/model"]


def test_who_may_not_write_is_told_how_to_log_in(models: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "the token is no good there, or may not write; `hf auth login`" in refusal(models / "transformer")
    assert "hf_another" not in refusal(models / "transformer")
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    told = refusal(models / "transformer")
    assert "cannot be published without a token" in told and "`hf auth login` (huggingface-cli login" in told
    assert not hub.requests
    assert not hub.models


def test_a_hub_that_cannot_be_reached_is_told(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with hub_on_loopback() as hub:
        use_hub(monkeypatch, hub.url, tmp_path)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert f"the hub at {hub.url} cannot be reached" in refusal(models / "transformer")


def test_what_is_no_whole_model_is_not_published(models: Path, tmp_path: Path) -> None:
    assert "is no folder" in refusal(tmp_path / "nothing")
    assert "config.json is missing" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "transformer", "context_tokens": 24}))
    assert "is missing or damaged" in refusal(tmp_path)
    for name in ("model", "someone/model/more", "someone/..", "someone/model@main", "some one/model", ""):
        assert "OWNER/NAME is needed" in refusal(models / "transformer", name)
    for name in ("some--one/model", "someone/model-", "someone/model.git"):
        assert f"{name} is no name on the Hugging Face hub: " in refusal(models / "transformer", name)
    card = models / "transformer/README.md"
    text = card.read_text()
    card.unlink()
    assert "README.md is missing, the card" in refusal(models / "transformer")
    card.write_bytes(text.encode("utf-16"))
    assert "README.md is no UTF-8 text" in refusal(models / "transformer")
    card.write_text(text)
