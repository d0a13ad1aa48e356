"""A published model, from its import over more training on one's own text to what it then writes and scores.

A checkpoint in the layout of the reference implementation, and its autoencoder's; a tokenizer that begins a document as
Llama 3's does; the commands and stages that a user calls.
"""

import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.model import Calm
from calm_core.calm.training import CalmObjective
from calm_core.cli import main
from calm_core.errors import CalmError
from calm_core.latents.online import OnlineLatents
from calm_core.latents.shards import LatentCorpus
from calm_core.params import load_params
from calm_core.reference.names import reference_names
from calm_core.report.page import read_curves
from calm_core.storage.model_folder import AUTOENCODER, load_model, read_config
from calm_core.tokens.shards import TokenStream
from calm_core.tokens.tokenizer import load_tokenizer
from stages import check_params, digest_corpus, encode_corpus, tokenise, train_autoencoder, train_calm
from tests.calm_core.reference.reference_data import reference_weights, write_reference
from tests.calm_core.reference.test_newer_configs import resized
from tests.calm_core.tokens.published import PUBLISHED, write
from tests.reliability.support.stage_processes import make_project

BEGIN, END, ROWS = 300, 301, 305
"""What `published` gives Llama 3's tokens; and the models' rows, one for [PAD]."""

STEPS = 20


def calm(*arguments: str) -> None:
    sys.argv = ["calm", *arguments]
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


def write_published(folder: Path) -> None:
    """The language model in ``folder``/energy, with its tokenizer; the autoencoder beside it."""
    for kind in ("energy", "autoencoder"):
        weights = resized(reference_weights(kind), ROWS)
        own = {name: weight for name, weight in weights.items() if not name.startswith("ae_model.")}
        config = write_reference(kind, folder, own) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": ROWS}))
    write(PUBLISHED["llama-3"](), folder / "energy")


def set_told(folder: Path, told: str) -> dict[str, Any]:
    """Write what the refusal ``told`` says to set into params.yaml; returns it by key."""
    words = shlex.split(told.partition("`dvc exp run` ")[2])
    settings = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words[1::2])}
    values = yaml.safe_load((folder / "params.yaml").read_text())
    for key, value in settings.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    return settings


@pytest.fixture(scope="module", params=["online", pytest.param("encoded", marks=pytest.mark.slow)])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that imported a model, was told what its params have to be, and trained it."""
    folder = make_project(tmp_path_factory.mktemp("import") / "project")
    write_published(folder / "downloaded")
    values = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "corpus.txt").write_text((folder / "corpus.txt").read_text()[:20_000])
    values["corpus"].update(deduplicate=False)  # its words are few
    values["calm"].update(initial="imported", latents=request.param, steps=STEPS, warmup_steps=0, samples=4)
    values["calm"].update(decoder_score=False, learning_rate=3e-3, optimiser="adamw", batch_sequences=8)
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    with contextlib.chdir(folder):
        calm("import-checkpoint", "downloaded/energy", "imported", "--autoencoder", "downloaded/autoencoder")
        check_params.main(load_params())
        with pytest.raises(CalmError, match=r"^calm\.initial: imported needs other params") as refused:
            digest_corpus.main(load_params())
        settings = set_told(folder, str(refused.value))
        assert settings["tokenizer.document_marks"] == "post_processor"
        assert settings["tokenizer.path"] == "imported/tokenizer.json"
        for stage in (check_params, digest_corpus, tokenise, train_autoencoder, encode_corpus, train_calm):
            stage.main(load_params())
    return folder


def loss_of_first_batch(folder: Path, model: Path) -> float:
    """Of the model in ``model``, on what the training's first step read, with its draws."""
    params, tokens = load_params(folder / "params.yaml"), TokenStream(folder / "data/tokens", "train")
    autoencoder = load_model(Autoencoder, folder / "imported" / AUTOENCODER)
    online = OnlineLatents(tokens, autoencoder, params.runtime.precision)
    latents = online if params.calm.latents == "online" else LatentCorpus(folder / "data/latents")
    objective = CalmObjective(params.calm, tokens, latents, autoencoder, params.seed, load_model(Calm, model))
    with torch.no_grad():
        return float(objective.loss(objective.batch(0, range(objective.rows))).total)


def test_the_training_begins_with_the_imported_weights_and_learns(trained: Path) -> None:
    (step, first), *_ = read_curves(trained / "results/training")["calm"]["loss"].iter_rows()
    assert step == 1
    imported, after = (loss_of_first_batch(trained, trained / name) for name in ("imported", "models/calm"))
    assert first == pytest.approx(imported, rel=1e-5)
    assert after < 0.9 * imported


def test_the_autoencoder_comes_out_as_it_came(trained: Path) -> None:
    given = resized(reference_weights("autoencoder"), ROWS)
    for folder in ("models/autoencoder", "models/calm/autoencoder"):
        autoencoder = load_model(Autoencoder, trained / folder)
        held, names = autoencoder.state_dict(), reference_names(autoencoder)
        assert {theirs for several in names.values() for theirs in several} == given.keys()
        for name, several in names.items():
            for theirs in several:
                assert held[name].numpy().tobytes() == given[theirs].numpy().tobytes(), name


def test_documents_are_joined_as_the_tokenizer_joins_them(trained: Path) -> None:
    tokenizer = PUBLISHED["llama-3"]()
    lines = (trained / "corpus.txt").read_text().splitlines()
    documents = {tuple(tokenizer.encode(line).ids) for line in lines}
    tokens = TokenStream(trained / "data/tokens", "train")
    token_ids, ends = tokens.slice(0, len(tokens)).tolist(), tokens.document_ends.tolist()
    assert {tuple(token_ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)} <= documents
    assert token_ids.count(BEGIN) == len(ends)
    config = read_config(trained / "models/calm")
    assert config["document_marks"] == "post_processor"
    # What stands before a prompt is the end of a document, as ever; the BOS is the prompt's own.
    assert tuple(config["opening"]) in {document[-4:] for document in documents}
    assert load_tokenizer(trained / "models/calm/tokenizer.json").get_vocab() == tokenizer.get_vocab()


def test_it_writes_and_is_scored(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    on_cpu = ("--model", "models/calm", "--device", "cpu", "--json")
    calm("generate", *on_cpu, "--prompt", "word1 word2", "--tokens", "12")
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["prompt"] == "word1 word2"
    assert 0 <= row["tokens"] <= 12
    # Of the run's own tokens, which are joined as the model knows it, and of the text itself.
    for corpus in ("data/tokens", "corpus.txt"):
        calm("evaluate", *on_cpu, "--corpus", corpus, "--tokens", "400", "--output", f"scores/{Path(corpus).stem}")
        assert 0 <= json.loads(capsys.readouterr().out)["brierlm"] <= 100
