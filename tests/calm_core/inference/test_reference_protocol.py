"""The reference's protocol: its packing, its estimator, and runs that are killed."""

import json
import math
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from scipy.integrate import quad
from scipy.stats import norm
from tokenizers import Tokenizer, models
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.energy_head import EnergyHead
from calm_core.calm.model import Calm
from calm_core.errors import CalmError
from calm_core.inference import reference_protocol as protocol
from calm_core.inference.language_model import LanguageModel
from calm_core.reference.importing import import_checkpoint
from calm_core.runtime.randomness import generator
from calm_core.storage.model_folder import load_model
from calm_core.tokens.document_marks import DocumentMarks
from tests import ROOT
from tests.calm_core.inference.test_document_marks import imported
from tests.calm_core.known_models import COIN, bigram_calm, coin_calm, moments_of_sampling, paths_of_patches, walk
from tests.calm_core.reference.reference_data import DATA, write_reference
from tests.calm_core.tokens.published import PUBLISHED
from tests.support.pretend_device import pretend_device
from tests.support.tiny_models import TEXT

SHARED = ROOT.parent / "shared/conformance"
BLOCK, JOINED, BEGIN = 16, 4, 3
SEED = 7


def coin_model(**changes: Any) -> LanguageModel:
    """A CALM whose next patch is one of two by the last token; four letters are its tokens, one begins documents."""
    model, autoencoder = coin_calm(COIN[4])
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate("abcd")}, []))
    tokenizer.add_special_tokens(["<eos>"])  # which no model here is given
    parts: dict[str, Any] = {
        "model": model,
        "autoencoder": autoencoder,
        "tokenizer": tokenizer,
        "context_tokens": BLOCK,
    }
    return LanguageModel(**parts | {"marks": DocumentMarks(before=(BEGIN,))} | changes)


def documents(count: int, opening: int = 1) -> list[list[int]]:
    """Of up to 40 tokens: ``opening`` of any kind, then patches, most of them what the model may say."""
    draws = random.Random(1)
    found = []
    for _ in range(count):
        document: list[int] = [draws.randrange(4) for _ in range(opening)]
        for _ in range(draws.randrange(10)):
            document += draws.choice(COIN[4][document[-1]]) if draws.random() < 0.8 else [draws.randrange(4)] * 4
        found.append(document)
    return found


def write_corpus(folder: Path, texts: Sequence[Sequence[int]]) -> str:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": "".join("abcd"[token] for token in text)}) + "\n" for text in texts))
    return str(path)


def packed(texts: Sequence[Sequence[int]], joined: int, size: int) -> list[list[int]]:
    """Blocks of ``size`` tokens, as the reference cuts them."""
    blocks = []
    for first in range(0, len(texts), joined):
        stream = [token for text in texts[first : first + joined] for token in [BEGIN, *text]]
        while len(stream) >= size:
            blocks.append(stream[:size])
            stream = stream[size:]
    return blocks


@pytest.fixture()
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "BLOCK_TOKENS", BLOCK)
    monkeypatch.setattr(protocol, "JOINED_DOCUMENTS", JOINED)


def starts(lengths: list[int]) -> list[int]:
    return protocol.block_starts(torch.tensor(lengths).cumsum(0)).tolist()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([20, 10, 1, 1, 40], [0, 16, 32, 48]),  # 32 tokens fill two blocks; of 40 eight are left over
        ([20, 10, 1, 2, 16], [0, 16, 33]),  # one of 33 is left over, and the next block begins behind it
        ([5, 5, 5, 0, 33, 1, 1, 1], [15, 31]),  # 15 tokens are no block
        ([15], []),
        ([16], [0]),
    ],
)
def test_what_is_left_over_of_joined_documents_is_dropped(lengths: list[int], expected: list[int]) -> None:
    assert starts(lengths) == expected


def test_a_thousand_documents_are_joined() -> None:
    # 1,000 documents of 9 tokens are one block and 808 tokens; so are the next; 500 more are none.
    assert starts([9] * 2500) == [0, 9000]


@pytest.mark.usefixtures("small")
def test_scores_are_those_of_a_loop_over_places(tmp_path: Path) -> None:
    """All of it in plain Python: packing, the model, its draws, the estimator, the means."""
    texts = documents(90, opening=3)  # which end a patch, behind the token that begins a document
    blocks = packed(texts, JOINED, BLOCK)
    assert len(blocks) * BLOCK < sum(len(text) + 1 for text in texts) - BLOCK  # enough is left over to be seen
    spec = write_corpus(tmp_path, texts)
    found = protocol.evaluate_by_reference(coin_model(), spec, tmp_path / "out", seed=SEED)
    of_blocks = []
    moments = []
    for number, block in enumerate(blocks):
        coins = torch.rand(2, BLOCK // 4 - 1, generator=generator(SEED, "reference", number)) >= 0.5
        scores = []
        for place in range(1, BLOCK // 4):
            true, last = block[4 * place : 4 * place + 4], block[4 * place - 1]
            first, second = (COIN[4][last][int(coin)] for coin in coins[:, place - 1])
            scores.append(
                [(first[:n] == true[:n]) + (second[:n] == true[:n]) - (first[:n] == second[:n]) for n in range(1, 5)]
            )
            moments.append(moments_of_sampling(paths_of_patches(COIN[4])([last]), true, 2))
        of_blocks.append([sum(column) / len(scores) for column in zip(*scores, strict=True)])
    means = [sum(column) / len(blocks) for column in zip(*of_blocks, strict=True)]
    assert found["brier"] == pytest.approx(means, abs=1e-12)
    assert found["brierlm"] == pytest.approx(100 * math.prod(means) ** 0.25, abs=1e-9)
    assert min(means) > 0.1
    assert found["brierlm_ci95"][0] < found["brierlm"] < found["brierlm_ci95"][1]
    assert (found["blocks"], found["positions"]) == (len(blocks), 3 * len(blocks))
    # And they are of the model, whose distribution is known.
    exact = sum(one.mean for one in moments) / len(moments)
    errors = sum(one.variance for one in moments) ** 0.5 / len(moments)
    assert all(abs(score - mean) < 4 * error for score, mean, error in zip(means, exact, errors, strict=True))
    # The decoder finds the largest of four numbers: one is 1 higher, and all have noise of standard deviation 1.
    share = quad(lambda x: norm.pdf(x - 1) * norm.cdf(x) ** 3, -10, 10)[0]
    assert found["reconstruction_of_mean"] == 1
    spread = (share * (1 - share) / found["tokens"]) ** 0.5
    assert abs(found["reconstruction_of_sample"] - share) < 4 * spread


@pytest.mark.usefixtures("small")
def test_the_table_of_documents(tmp_path: Path) -> None:
    texts = documents(40)
    found = protocol.evaluate_by_reference(coin_model(), write_corpus(tmp_path, texts), tmp_path / "out", seed=SEED)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["brierlm.json", "documents.parquet"]
    assert json.loads((tmp_path / "out/brierlm.json").read_text()) == found
    assert found["protocol"] == "reference"
    table = pl.read_parquet(tmp_path / "out/documents.parquet")
    assert table["positions"].sum() == found["positions"]
    weighted = (table["brier_2"] * table["positions"]).sum() / found["positions"]
    assert weighted == pytest.approx(found["brier"][1], abs=1e-12)
    # A patch belongs to the document that its first token is of.
    numbered = [[number] * (len(text) + 1) for number, text in enumerate(texts)]
    blocks = []
    for first in range(0, len(texts), JOINED):
        stream = [number for text in numbered[first : first + JOINED] for number in text]
        blocks += [stream[at : at + BLOCK] for at in range(0, len(stream) - BLOCK + 1, BLOCK)]
    owners = [block[place] for block in blocks for place in range(4, BLOCK, 4)]
    assert table["document"].to_list() == sorted(set(owners))
    assert table["positions"].to_list() == [owners.count(number) for number in sorted(set(owners))]
    for number, begins in table.select("document", "begins").iter_rows():
        assert begins == "".join("abcd"[token] for token in texts[number])


@pytest.mark.parametrize("recorded", ["shipped", "k4"])
def test_the_recorded_scores(recorded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents that the reference decoded and scored, in place of the head's."""
    if recorded == "shipped":
        source, data = write_reference("energy", tmp_path), DATA
    else:
        source, data = SHARED / recorded / "energy", SHARED / recorded
        if not source.is_dir():
            pytest.skip(f"{source} is not here")
    import_checkpoint(source, tmp_path / "own")
    model, autoencoder = load_model(Calm, tmp_path / "own"), load_model(Autoencoder, tmp_path / "own/autoencoder")
    expected = load_file(data / "expected.safetensors")
    targets, latents = expected["energy.brier_mixed_targets"], expected["energy.brier_mixed_predictions"]
    scores = []
    for number in range(len(targets)):
        monkeypatch.setattr(EnergyHead, "sample", lambda self, states, draws, n=number: latents[:, n : n + 1])
        block = torch.cat([expected["input_ids"][number, :4], targets[number]])
        scores.append(protocol.block_scores(model, autoencoder, block, torch.Generator())[0])
    torch.testing.assert_close(torch.cat(scores).mean(dim=0), expected["energy.brier_mixed"], atol=1e-6, rtol=0.0)


def test_samples_are_of_what_stands_before_a_patch(tmp_path: Path) -> None:
    """The head gets the hidden states that the reference has for these tokens, one for each patch but the first."""
    import_checkpoint(write_reference("energy", tmp_path), tmp_path / "own")
    model, autoencoder = load_model(Calm, tmp_path / "own"), load_model(Autoencoder, tmp_path / "own/autoencoder")
    expected = load_file(DATA / "expected.safetensors")
    seen: list[Tensor] = []
    model.backbone.register_forward_hook(lambda module, given, states: seen.append(states))
    protocol.block_scores(model, autoencoder, expected["input_ids"][0], torch.Generator())
    torch.testing.assert_close(seen[0], expected["energy.hidden_states"][:1], atol=1e-4, rtol=0.0)


def test_a_negative_product_is_0_and_two_negative_factors_are_not() -> None:
    assert protocol.brierlm_of([0.1, -0.1, 0.1, 0.1]) == 0
    assert protocol.brierlm_of([0.1, 0.1, -0.1, -0.1]) == pytest.approx(10)


@pytest.mark.usefixtures("small")
def test_a_score_of_negative_means_has_no_interval(tmp_path: Path) -> None:
    """A model that is always wrong, and whose samples agree at times: all four means are below 0."""
    found = protocol.evaluate_by_reference(coin_model(), write_corpus(tmp_path, [[0] * 31] * 8), tmp_path / "out")
    assert max(found["brier"]) < 0
    assert found["brierlm"] > 0
    assert found["brierlm_ci95"] is None


@pytest.mark.usefixtures("small")
def test_tokens_limit_the_blocks(tmp_path: Path) -> None:
    spec = write_corpus(tmp_path, [[0] * 24] * 9)  # 100 tokens are joined: six blocks, four tokens left over
    for tokens, blocks in ((16, 1), (31, 1), (99, 6), (115, 6), (116, 7), (None, 13)):
        found = protocol.evaluate_by_reference(coin_model(), spec, tmp_path / "out", tokens)
        assert found["blocks"] == blocks
    with pytest.raises(CalmError, match="15 tokens hold no block of 16; --tokens 16 is the least"):
        protocol.evaluate_by_reference(coin_model(), spec, tmp_path / "out", 15)
    spec = write_corpus(tmp_path, [[0] * 14])
    with pytest.raises(CalmError, match=r"corpus.jsonl: 15 tokens hold no block of 16; use more text"):
        protocol.evaluate_by_reference(coin_model(), spec, tmp_path / "out")


@pytest.mark.usefixtures("small")
def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    spec, score = write_corpus(tmp_path, documents(40)), protocol.block_scores
    measured = 0

    def run(name: str, blocks: int | None = None, seed: int = SEED) -> None:
        nonlocal measured
        measured = 0

        def scored(*arguments: Any) -> Any:
            nonlocal measured
            if measured == blocks:
                raise KeyboardInterrupt
            measured += 1
            return score(*arguments)

        monkeypatch.setattr(protocol, "block_scores", scored)
        protocol.evaluate_by_reference(coin_model(), spec, tmp_path / name, seed=seed)

    run("whole")
    all_blocks = measured
    assert all_blocks > 8
    for blocks in (3, 2, 0):
        with pytest.raises(KeyboardInterrupt):
            run("parts", blocks)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["blocks.json"]
    assert "begun anew" not in capsys.readouterr().err
    run("parts")
    assert measured == all_blocks - 5
    for name in ("brierlm.json", "documents.parquet"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    # Blocks of another seed are none of this run, nor are damaged ones.
    with pytest.raises(KeyboardInterrupt):
        run("parts", 4, seed=SEED + 1)
    run("parts")
    assert measured == all_blocks
    assert (
        "blocks.json is damaged or of another model, text, seed or device; it is begun anew" in capsys.readouterr().err
    )
    (tmp_path / "parts/blocks.json").write_text('{"key": ')
    run("parts")
    assert measured == all_blocks
    assert "begun anew" in capsys.readouterr().err
    for name in ("brierlm.json", "documents.parquet"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.usefixtures("small")
def test_what_the_blocks_on_disk_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []
    finished = protocol._finished
    monkeypatch.setattr(protocol, "_finished", lambda path, key: keys.append(key) or finished(path, key))

    def run(model: LanguageModel, texts: Sequence[Sequence[int]], **options: Any) -> str:
        protocol.evaluate_by_reference(model, write_corpus(tmp_path, texts), tmp_path / "out", **options)
        return keys[-1]

    texts = documents(12)
    first = run(coin_model(), texts)
    assert run(coin_model(), texts) == first
    other, inner = coin_model(), coin_model()
    other.model.head.output[-1].bias[0] += 1e-6
    inner.autoencoder.decoder.from_latent.bias[0] += 1e-6
    elsewhere = [[*texts[0][:-1], (texts[0][-1] + 1) % 4], *texts[1:]]
    changed = [
        run(other, texts), run(inner, texts), run(coin_model(), elsewhere), run(coin_model(), texts, seed=1),
        run(coin_model(), texts, tokens=40),
    ]  # fmt: skip
    assert len({first, *changed}) == 6


@pytest.mark.usefixtures("small")
def test_other_files_are_left_alone(tmp_path: Path) -> None:
    spec = write_corpus(tmp_path, documents(12))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/blocks.txt").write_text("the user's")
    with pytest.raises(CalmError, match="holds something else than results of an evaluation"):
        protocol.evaluate_by_reference(coin_model(), spec, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["blocks.txt"]


@pytest.mark.usefixtures("small")
def test_models_that_it_cannot_measure(tmp_path: Path) -> None:
    spec = write_corpus(tmp_path, documents(12))
    calm, autoencoder = coin_calm(COIN[2])
    for model, told in (
        (
            coin_model(model=calm, autoencoder=autoencoder),
            "the model's K is 2; .* K is 4 or more and divides 16; without",
        ),
        (coin_model(model=bigram_calm(walk(4, 2), 4), autoencoder=None), "a CALM with a token head has none; without"),
    ):
        with pytest.raises(CalmError, match=told):
            protocol.evaluate_by_reference(model, spec, tmp_path / "out")


@pytest.mark.usefixtures("small")
def test_on_another_device(tmp_path: Path) -> None:
    """All tensors are where the model is; the pretend device samples what the CPU does."""
    spec = write_corpus(tmp_path, documents(12))
    expected = protocol.evaluate_by_reference(coin_model(), spec, tmp_path / "cpu")
    with pretend_device(float64=False) as pretend:
        model = coin_model()
        model.model.to(pretend.device), model.autoencoder.to(pretend.device)
        found = protocol.evaluate_by_reference(model, spec, tmp_path / "other")
        assert pretend.from_device
    assert found == expected | {"device": "meta"}


KILLED = """
import os, signal, sys
from pathlib import Path
replace, done = os.replace, 0
def counted(source, destination):
    global done
    if Path(destination).name == "blocks.json":
        if done == int(os.environ["KILLED_AFTER"]):
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
    replace(source, destination)
os.replace = counted
from calm_core.cli import main
sys.argv = ["calm", "evaluate", "--model", "own", "--corpus", "corpus.jsonl", "--protocol", "reference", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Killed with a block computed and not yet in place, at the protocol's own size."""
    imported(tmp_path, PUBLISHED["llama-3"]())
    lines = "".join(json.dumps({"text": f"{TEXT * 20}{number}"}) + "\n" for number in range(100))
    (tmp_path / "corpus.jsonl").write_text(lines)

    def run(output: str, killed_after: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", KILLED, "--output", output],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "KILLED_AFTER": str(killed_after)},
            capture_output=True,
            text=True,
        )

    whole = run("whole", 1000)
    assert whole.returncode == 0, whole.stderr
    blocks = json.loads((tmp_path / "whole/brierlm.json").read_text())["blocks"]
    assert blocks >= 4
    for killed_after, done in ((1, 1), (2, 3)):
        assert run("parts", killed_after).returncode == -signal.SIGKILL
        assert len(json.loads((tmp_path / "parts/blocks.json").read_text())["blocks"]) == done
    assert (tmp_path / "parts/.blocks.json.new").exists()
    rest = run("parts", blocks - 3)
    assert rest.returncode == 0, rest.stderr
    assert rest.stdout.replace("parts", "whole") == whole.stdout
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["brierlm.json", "documents.parquet"]
    for name in ("brierlm.json", "documents.parquet"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
