"""The `calm` command: a mistake of the user's is one line and exit status 2.

Commands import what they need when they run, so that `calm --help` waits neither for torch nor for pydantic.
"""

import contextlib
import io
import json
import os
import re
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

# While this program still imports, Ctrl-C ends it without a traceback; ``main`` then has a handler of its own.
_IS_PROGRAM = __name__ == "__main__" or Path(sys.argv[0]).name == "calm"
if _IS_PROGRAM and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import typer
from typer.exceptions import TyperException

from calm_core.errors import CalmError, one_line, single_line
from calm_core.runtime.caches import use_writable_caches
from calm_core.runtime.standard_streams import give_up, open_closed_streams
from calm_core.runtime.waiting import wait_asleep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calm_core.inference.language_model import Continuation

T = TypeVar("T")

app = typer.Typer(
    help="Reproduce CALM, a language model that predicts one vector for every K tokens.\n\n"
    "Start with `dvc repro`: it trains the models and writes results/report.html. Change params.yaml, or write a "
    "preset over it, and run it again. Then `calm generate --model models/calm --prompt TEXT`.",
    add_completion=False,
)

# Text, since a path would lose the ./ that says that no name on the hub is meant.
ModelName = Annotated[
    str,
    typer.Option("--model", help="A folder such as models/calm, or OWNER/NAME\\[@REVISION] on the Hugging Face hub."),
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same result on the same kind of device.")
]


class Device(StrEnum):
    """What a model runs on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


OnDevice = Annotated[
    Device, typer.Option("--device", help="auto: a CUDA GPU if there is one, else Apple's (mps), else the CPU.")
]


class Sampler(StrEnum):
    """How a CALM that samples latents sharpens below temperature 1."""

    batch = "batch"
    exact = "exact"
    softmax = "softmax"


class Protocol(StrEnum):
    """How BrierLM is measured."""

    own = "own"
    reference = "reference"


@app.command()
def check() -> None:
    """Validate params.yaml; say so if DVC cannot work here."""
    from calm_core.checkout import require_checkout
    from calm_core.params import load_params
    from calm_core.presets import sections_beside

    sections_beside(load_params())
    typer.echo("params.yaml is valid")
    try:
        require_checkout(Path.cwd())
    except CalmError as error:  # what was asked for is fine
        typer.echo(f"but `dvc repro` cannot run: {error}", err=True)


@app.command()
def preset(name: Annotated[str, typer.Argument(help="A file of presets/, without its ending.")] = "") -> None:
    """Write a preset over params.yaml; without a name, list the presets."""
    from calm_core.presets import apply_preset, preset_names

    if not name:
        typer.echo("\n".join(preset_names()))
        return
    apply_preset(name)
    typer.echo(f"params.yaml now follows presets/{name}.yaml; `git diff params.yaml` shows how, `dvc repro` runs it")


@app.command()
def plan(
    preset: Annotated[str, typer.Option(help="A preset; params.yaml as it is if none is named.")] = "",
    devices: Annotated[int, typer.Option(help="How many accelerators train.")] = 1,
    utilisation: Annotated[float, typer.Option(help="Share of their peak that training reaches, in (0, 1].")] = 0.4,
    device_flops: Annotated[float, typer.Option(help="Peak FLOPs a second of one; an H100's in bf16.")] = 989e12,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a run would take, without running it: parameters, FLOPs, memory, disk and time."""
    from rich.console import Console

    from calm_core.costs.plan import plan as make_plan
    from calm_core.costs.plan import render_plan
    from calm_core.params import load_params
    from calm_core.presets import load_preset

    params = load_preset(preset) if preset else load_params()
    made = make_plan(params, devices, device_flops, utilisation)
    if as_json:
        typer.echo(made.model_dump_json(indent=2))
    else:
        Console().print(render_plan(made))


@app.command()
def rehearse(
    preset: Annotated[str, typer.Option(help="A preset; params.yaml as it is if none is named.")] = "",
    steps: Annotated[
        int,
        typer.Option(
            min=2, max=1000, help="Steps of each training, of a language model at least 3; the first is not timed."
        ),
    ] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run all stages of a run at its full shape with the smallest batch: memory, time of a step, time of the run.

    Works in a folder of its own, on some of the default corpus; data, models and results stay as they are.
    """
    from rich.console import Console

    from calm_core.params import load_params
    from calm_core.presets import load_preset, preset_models
    from calm_core.rehearsal.rehearse import rehearse as run_rehearsal
    from calm_core.rehearsal.rehearse import render_rehearsal

    params = load_preset(preset) if preset else load_params()
    rehearsal = run_rehearsal(params, preset_models(preset) if preset else (), steps)
    if as_json:
        typer.echo(rehearsal.model_dump_json(indent=2))
    else:
        Console().print(render_rehearsal(rehearsal))


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[str | None, typer.Option(help="Text to go on from; '' for the start of a document.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file of prompts, one a line; in a .jsonl file each line has a 'prompt'. - reads lines."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, max=10**9, help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(help="In (0, 1]; lower is closer to the likeliest text.")] = 1.0,
    sampler: Annotated[
        Sampler,
        typer.Option(
            help="For a CALM that samples latents. Below temperature 1: exact, or chosen from a batch of samples; "
            "softmax draws tokens from the decoder's softmax, at temperature 1 too."
        ),
    ] = Sampler.batch,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End a text before the first place where this stands; may be repeated."),
    ] = None,
    continuations: Annotated[
        int | None, typer.Option(min=1, max=10**6, help="Independent texts a prompt; one if it is not said.")
    ] = None,
    seed: Seed = 0,
    device: OnDevice = Device.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a text.")] = False,
) -> None:
    """Continue text with a CALM or a Transformer. How fast it was is said on standard error."""
    from calm_core.inference.decoding import Sampling
    from calm_core.inference.language_model import load_language_model
    from calm_core.inference.prompt_files import require_utf8
    from calm_core.inference.temperature import whole_exponent
    from calm_core.inference.text_stream import stop_texts
    from calm_core.runtime.device import choose_device
    from calm_core.runtime.precision import set_threads
    from calm_core.runtime.progress import progress

    # Before the model is loaded, which takes longer than finding a mistake in the prompts.
    texts = _prompts(prompt, prompts)
    stops = stop_texts([require_utf8(text, "--stop") for text in stop or ()])
    set_threads("auto")
    language_model = load_language_model(model, choose_device(device.value, "--device"))
    sampling = Sampling(temperature, sampler.value)
    encoded = [language_model.encode(text) for text in texts]
    if cut := sum(len(language_model.read_part(prompt)) < len(prompt) for prompt in encoded):
        context = f"the context of {language_model.context_tokens:,} tokens"
        typer.echo(f"{cut} of {len(encoded)} prompts are longer than {context}; their ends are read", err=True)
    each = continuations or 1
    count = each * len(texts)
    watch = _Stopwatch()
    # Token by token only for a single text: several are generated side by side, as one batch.
    if count == 1 and not as_json:
        steps = watch.over(language_model.stream(encoded, tokens, sampling, seed, stops))
        inexact, written = _printed(texts[0], steps)
    else:
        inexact = written = 0
        finished = watch.over(language_model.continuations(encoded, tokens, sampling, seed, stops or None, each))
        # On a terminal the texts themselves show how far it is.
        quiet = count == 1 or sys.stdout.isatty()
        with nullcontext(lambda: None) if quiet else progress("generate", count, "texts") as advance:
            for number, continuation in enumerate(finished):
                text = texts[number // each]
                inexact += continuation.inexact_steps
                written += len(continuation.token_ids)
                if as_json:
                    about: dict[str, Any] = {
                        "temperature": temperature,
                        "sampler": sampler.value,
                        "seed": seed,
                        "model": model,
                        "device": language_model.device.type,
                    }
                    # For those alone who ask for it.
                    which = {} if continuations is None else {"continuation": number % each}
                    about |= {"stop": list(stops)} if stops else {}
                    row = {"prompt": text, **which, "text": continuation.text, **_summary(continuation), **about}
                    typer.echo(json.dumps(row))
                else:
                    typer.echo(f"{_dim(text)}{continuation.text}\n")
                advance()
    if written:
        sys.stdout.flush()
        typer.echo(
            f"{written:,} tokens in {watch.seconds:.2f} s, reading of prompts included: "
            f"{written / watch.seconds:,.1f} tokens/s by {single_line(model)} on {language_model.device.type}",
            err=True,
        )
    if sampler is Sampler.exact and inexact:
        exact = "" if whole_exponent(temperature) else "; as 1/T is no whole number, the others are not exact either"
        typer.echo(
            f"{inexact} patches needed more than {sampling.budget:,} samples and were chosen from {sampling.draws} "
            f"instead{exact}; a higher temperature needs fewer",
            err=True,
        )


@app.command()
def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="A model's folder or OWNER/NAME on the hub, once for each; by default models/calm and "
            "models/transformer.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the loopback; 0 for any free one.")] = 8000,
    device: OnDevice = Device.auto,
) -> None:
    """Watch models write side by side on a page in the browser, step by step; Ctrl-C ends it."""
    from calm_core.demo.server import DEFAULT_MODELS, listen, serve
    from calm_core.inference.language_model import load_language_model
    from calm_core.runtime.device import choose_device
    from calm_core.runtime.precision import set_threads

    for folder in DEFAULT_MODELS if not model else ():
        if not folder.is_dir():
            raise CalmError(f"{folder} is missing: `dvc repro` makes it, or name other models by --model FOLDER")
    listener = listen(port)  # before the models are loaded, which takes longer
    set_threads("auto")
    place = choose_device(device.value, "--device")
    names = model or [str(folder) for folder in DEFAULT_MODELS]
    models = {single_line(name): load_language_model(name, place) for name in names}
    serve(models, listener, lambda address: typer.echo(f"{address}  (Ctrl-C ends it)"))


@app.command()
def evaluate(
    model: ModelName,
    corpus: Annotated[
        str,
        typer.Option(
            help="A file, folder or glob (.txt, .jsonl, .parquet, also compressed), data/tokens (its test split), "
            "botocore, or hf:NAME[:CONFIGURATION[:SPLIT]]."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="New folder for the results, or one with earlier results; by default under results/evaluations."
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    tokens: Annotated[int | None, typer.Option(min=1, max=10**12, help="Look at so many tokens at most.")] = None,
    protocol: Annotated[
        Protocol,
        typer.Option(
            help="own: in blocks as trained. reference: as the reference implementation measures its CALMs, in blocks "
            "of 8192 tokens, for figures beside the published ones; a run that ended early goes on."
        ),
    ] = Protocol.own,
    samples: Annotated[
        int | None, typer.Option(min=2, max=1000, help="Continuations drawn a position, by default 2.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, max=1 << 20, help="Tokens of a block; by default as trained.")
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            min=1, max=1 << 20, help="Ask a Transformer after so many tokens, by default 4 (CALM: each patch)."
        ),
    ] = None,
    seed: Seed = 0,
    device: OnDevice = Device.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """BrierLM with its 95 % interval on any text, and a table of its documents."""
    from calm_core.inference.evaluate_corpus import Settings, evaluate_corpus
    from calm_core.inference.language_model import load_language_model
    from calm_core.inference.reference_protocol import evaluate_by_reference
    from calm_core.runtime.device import choose_device
    from calm_core.runtime.precision import set_threads

    by_reference = protocol is Protocol.reference
    for name, value in (("samples", samples), ("context", context), ("every", every)):
        if by_reference and value is not None:
            raise CalmError(f"--{name} {value}: --protocol reference has its own; leave --{name} out, or the protocol")
    set_threads("auto")
    name = f"{_model_slug(model)}-{_slug(corpus)}" + ("-reference" if by_reference else "")
    folder = output or Path("results/evaluations") / name
    language_model = load_language_model(model, choose_device(device.value, "--device"))
    if by_reference:
        results = evaluate_by_reference(language_model, corpus, folder, tokens, seed, text_field)
    else:
        settings = Settings(samples or 2, tokens, context, every or 4, seed)
        results = evaluate_corpus(language_model, corpus, folder, settings, text_field)
    if as_json:
        typer.echo(json.dumps(results))
        return
    interval = results["brierlm_ci95"]
    told = "(one document: no interval)"
    if interval:
        told = "[{:.2f}, {:.2f}]".format(*interval)
    elif by_reference and min(results["brier"]) < 0:
        told = "(no score: a mean below 0, and two of them make a positive product)"
    typer.echo(f"BrierLM {results['brierlm']:.2f} {told}")
    typer.echo("Brier-1 to Brier-4: " + ", ".join(f"{score:.5f}" for score in results["brier"]))
    if "cross_entropy_nats" in results:
        typer.echo(f"cross entropy {results['cross_entropy_nats']:.3f} nats a token")
    if by_reference:
        rebuilt = [f"{100 * results[f'reconstruction_of_{latent}']:.3f} %" for latent in ("mean", "sample")]
        typer.echo(f"tokens rebuilt by the autoencoder: {rebuilt[0]} from a latent's mean, {rebuilt[1]} from a sample")
    typer.echo(f"{results['positions']:,} positions in {results['documents']:,} documents; details in {folder}")


@app.command("import-checkpoint")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of the reference implementation or a Llama, with config.json and weights; or OWNER/NAME on "
            "the hub."
        ),
    ],
    destination: Annotated[Path, typer.Argument(help="New folder for the model.")],
    autoencoder: Annotated[
        str | None,
        typer.Option(help="Folder or OWNER/NAME of a language model's autoencoder, unless it is in the same file."),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json; by default the source's, if any.")] = None,
) -> None:
    """Convert a checkpoint of the reference implementation, or a Llama; the kind is told from its weights."""
    from calm_core.reference.importing import import_checkpoint

    kind = import_checkpoint(source, destination, tokenizer, autoencoder)
    missing = "" if (destination / "tokenizer.json").is_file() else "; it has no tokenizer, see --tokenizer"
    typer.echo(f"{destination}: {kind}{missing}")


@app.command("export-checkpoint")
def export(
    source: Annotated[
        str, typer.Argument(help="Folder of an autoencoder, a CALM or a Transformer, or OWNER/NAME on the hub.")
    ],
    destination: Annotated[Path, typer.Argument(help="New folder for the checkpoint.")],
) -> None:
    """Write a model as the reference implementation saves its own, a Transformer as a Llama for transformers."""
    from calm_core.reference.exporting import export_checkpoint

    export_checkpoint(source, destination)
    typer.echo(f"{destination}: written")


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Folder of a model, such as models/calm.")],
    name: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="For its owner's eyes alone.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded, and upload nothing.")
    ] = False,
) -> None:
    """Upload a model with its card to the Hugging Face hub, where `--model OWNER/NAME` finds it."""
    from calm_core.inference.publishing import publication, sizes
    from calm_core.inference.publishing import publish as upload

    contents = publication(folder, name)
    for path, size in sorted(sizes(contents).items()):
        typer.echo(f"{size:>15,} bytes  {path}")
    if dry_run:
        typer.echo(f"nothing was uploaded; without --dry-run these go to {name}")
    else:
        typer.echo(upload(contents, name, private))


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as it was until everything above was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    wait_asleep()
    use_writable_caches()
    if "stdout" in open_closed_streams():
        sys.exit(_told("standard output is closed; send it to a file, or to /dev/null"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold what the terminal's encoding cannot say
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except CalmError as error:
        status = _told(str(error))
    except TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "calm"
        status = _told(f"{error.format_message()} (see `{command} --help`)")
    except (typer.Abort, KeyboardInterrupt):
        status = 130
    except (BrokenPipeError, SystemExit) as error:
        # The libraries that print turn the first into status 1.
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # The reader has seen enough, as in `calm generate ... | head`.
        give_up(sys.stdout, sys.stderr)
        status = 0
    except OSError as error:
        if error.filename is None:  # perhaps of standard output
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            give_up(sys.stdout)
        told = f"{error.filename or 'output'}: {error.strerror or one_line(error)}"
        status = _told(f"{told}; set TMPDIR to a folder that can be written" if "temporary directory" in told else told)
    except (MemoryError, RuntimeError) as error:
        # torch's allocators raise a RuntimeError; any other is a fault of this program and keeps its traceback.
        text = str(error)
        if isinstance(error, RuntimeError) and "can't allocate memory" not in text and "out of memory" not in text:
            raise
        status = _told("out of memory; ask for less: a shorter context, fewer samples or fewer prompts at a time")
    sys.exit(status)


def _told(message: str) -> int:
    with contextlib.suppress(OSError):  # the status tells, too
        print(f"calm: {single_line(message)}", file=sys.stderr)
    return 2


def _prompts(prompt: str | None, path: Path | None) -> list[str]:
    from calm_core.inference.prompt_files import read_prompts, require_utf8

    # None and "" differ: an empty prompt asks for text from the start of a document.
    if path is None and prompt is not None:
        return [require_utf8(prompt, "--prompt")]
    if path is None or prompt is not None:
        raise CalmError("one of --prompt TEXT and --prompts FILE is needed")
    return read_prompts(Path("/dev/stdin") if str(path) == "-" else path)


def _printed(prompt: str, steps: "Iterator[list[Continuation]]") -> tuple[int, int]:
    """Print the prompt and what follows as it comes; returns how many steps were approximated, and tokens written."""
    shown = 0
    for (continuation,) in steps:
        if prompt:
            typer.echo(_dim(prompt), nl=False)
            prompt = ""
        typer.echo(continuation.text[shown:], nl=False)
        sys.stdout.flush()
        shown = len(continuation.text)
    typer.echo()
    return continuation.inexact_steps, len(continuation.token_ids)


@dataclass
class _Stopwatch:
    """How long the steps of something took, without what is done between them."""

    seconds: float = 0.0

    def over(self, steps: "Iterator[T]") -> "Iterator[T]":
        while True:
            start = time.perf_counter()
            try:
                step = next(steps)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield step


def _dim(text: str) -> str:
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain else typer.style(text, dim=True)


def _summary(continuation: "Continuation") -> dict[str, Any]:
    return {
        "tokens": len(continuation.token_ids),
        "finish_reason": continuation.finish_reason,
        "draws": continuation.draws,
        "inexact_steps": continuation.inexact_steps,
        "exact": continuation.exact,
    }


def _slug(text: str) -> str:
    """A path or a dataset as part of a file name: its last part without an ending; letters, digits, dots and dashes."""
    return _file_name(Path(text.rstrip("/")).stem) or "corpus"


def _model_slug(model: str) -> str:
    """A model as part of a file name: a folder's own name; on the hub the whole name, for others have one of the same
    NAME."""
    if Path(model).is_dir():
        model = Path(model).name
    return _file_name(model) or "model"


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-.")


if __name__ == "__main__":
    main()
