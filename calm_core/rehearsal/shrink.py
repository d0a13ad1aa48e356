"""The params of a rehearsal: the shapes of a run, and everything that only takes time or text as small as it can be."""

from typing import Any, NamedTuple

from calm_core.costs.matching import with_matched_steps
from calm_core.params import Params, parse_params

FEWEST_STEPS = 2
"""The first step is warm-up, and only those after it are timed."""
CORRELATED_CHECKPOINTS = 3
"""The fewest checkpoints of CALM and of the Transformer that the schema allows, and so their fewest steps."""
BATCH_TOKENS = 2048
"""Tokens of a batch, or one sequence: fewer would time the optimiser and the overhead of small operators."""

TRAINING_BLOCKS, HELD_OUT_BLOCKS = 3.0, 1.5
"""Contexts of text that training and each held-out split hold, about."""
CHARACTERS_PER_TOKEN = 5.5
FEWEST_CHARACTERS = 40_000


class Shrunk(NamedTuple):
    """Valid params of the rehearsal, and what makes them smaller than the run, a line each."""

    params: Params
    notes: list[str]


def characters_of_sliver(params: Params) -> int:
    """How much text fills the splits of a rehearsal."""
    context = max(params.calm.context_tokens, params.transformer.context_tokens)
    blocks = TRAINING_BLOCKS + 2 * HELD_OUT_BLOCKS
    return max(FEWEST_CHARACTERS, int(blocks * context * CHARACTERS_PER_TOKEN))


def batches_of(params: Params) -> dict[str, dict[str, int]]:
    """By section, the size of the rehearsed batch under its key: no larger than the run's."""
    patches = min(params.autoencoder.batch_patches, BATCH_TOKENS // params.autoencoder.patch_size)
    sequences = {
        name: {"batch_sequences": min(section.batch_sequences, max(1, BATCH_TOKENS // section.context_tokens))}
        for name, section in (("calm", params.calm), ("transformer", params.transformer))
    }
    return {"autoencoder": {"batch_patches": patches}, **sequences}


def shrink(params: Params, steps: int, documents: int, tokenizer: str) -> Shrunk:
    """``params`` for ``steps`` steps on ``documents`` documents; ``tokenizer`` is the path of one."""
    params = with_matched_steps(params)
    values: dict[str, Any] = params.model_dump()
    language_steps = max(steps, CORRELATED_CHECKPOINTS)
    batches = batches_of(params)
    values["runtime"] |= {"launcher": "none", "processes": 1, "gradient_accumulation": 1}
    if params.runtime.device != "cpu":
        # The shape is rehearsed on the CPU of a machine without the GPU that the run asks for.
        values["runtime"]["device"] = "auto"
    if params.runtime.precision != "float32":
        # A preset for GPUs asks for bf16, which some processors only emulate, at a fiftieth of the speed.
        values["runtime"]["precision"] = "auto"
    percent = 100 * HELD_OUT_BLOCKS / (TRAINING_BLOCKS + 2 * HELD_OUT_BLOCKS)
    values["corpus"] |= {
        "source": "botocore",
        "documents": documents,
        "validation_percent": percent,
        "test_percent": percent,
        # So little text is of one service, and too little to leave any of it out.
        "split_by": "document",
        "deduplicate": False,
    }
    values["tokenizer"]["path"] = tokenizer
    for section, changes in (
        ("autoencoder", {"steps": steps}),
        ("calm", {"steps": language_steps, "checkpoints": CORRELATED_CHECKPOINTS}),
        ("transformer", {"steps": language_steps, "checkpoints": CORRELATED_CHECKPOINTS}),
    ):
        values[section] |= changes | batches[section]
        values[section]["warmup_steps"] = min(values[section]["warmup_steps"], values[section]["steps"])
    context = max(params.calm.context_tokens, params.transformer.context_tokens)
    values["evaluation"] |= {
        "seeds": [],
        "beside": [],
        "samples": 2,
        "batch_sequences": 1,
        # One block, and the four tokens after it that are asked for.
        "tokens": context + 4,
        "checkpoint_tokens": context + 4,
        "likelihood_tokens": context + 4,
        "bootstrap_resamples": 100,
        # Below 1 each patch is chosen among hundreds, which the text of the report tries.
        "temperatures": [1.0],
        "diversity_prompts": 16,
    }
    values["report"] |= {"sample_texts": 1, "prompt_tokens": 8, "sample_tokens": 8}
    small = parse_params(values, "params of the rehearsal")
    notes = [f"corpus: {documents:,} documents of botocore's"]
    for section, batch in batches.items():
        if section == "autoencoder" and params.calm.has_given_autoencoder:
            continue
        now, whole, ((key, count),) = getattr(small, section), getattr(params, section), batch.items()
        notes.append(
            f"{section}: {now.steps:,} steps of {whole.steps:,}, each of {count:,} instead of {getattr(whole, key):,} "
            f"{key.removeprefix('batch_')}, in one process"
        )
    notes.append(f"evaluation: one block of {context:,} tokens; report: one text of 8 tokens")
    return Shrunk(small, notes)
