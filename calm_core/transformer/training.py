"""Training the baseline: next-token cross entropy on blocks of the token stream."""

from collections.abc import Callable, Mapping

from torch import Tensor

from calm_core.errors import CalmError
from calm_core.nn.backbone import BackboneConfig
from calm_core.params import LanguageModelParams, Params
from calm_core.runtime.process_group import ALONE, Processes
from calm_core.runtime.randomness import generator
from calm_core.tokens.shards import TokenStream
from calm_core.training.batches import batch_indices, described_batch
from calm_core.training.checkpoints import CheckpointStore
from calm_core.training.loop import train
from calm_core.training.shape import shape_from
from calm_core.transformer.model import Transformer, TransformerConfig, next_token_loss

STAGE = "train_transformer"


def transformer_config(section: LanguageModelParams, vocabulary_size: int) -> TransformerConfig:
    """The shape that params.yaml asks for."""
    return TransformerConfig(vocabulary_size, shape_from(BackboneConfig, section))


def train_transformer(
    params: Params,
    tokens: TokenStream,
    vocabulary_size: int,
    log: Callable[[int, Mapping[str, float]], None],
    keep: Callable[[int, Transformer], None],
    checkpoints: CheckpointStore | None = None,
    processes: Processes = ALONE,
) -> Transformer:
    """Train a Transformer on the training split ``tokens``; the other arguments as in ``training.train``.

    ``keep`` receives the number of steps done and the model ``params.transformer.checkpoints`` times, evenly spread,
    the end included; a training that goes on after a checkpoint does not hand over those before it again.

    Raises:
        CalmError: the split is shorter than one context and the token that follows it.
    """
    section, seed = params.transformer, params.seed
    context = section.context_tokens
    blocks = (len(tokens) - 1) // context
    if blocks < 1:
        raise CalmError(
            f"the training split has {len(tokens)} tokens, fewer than transformer.context_tokens {context} and one "
            "more; use more text or a shorter context"
        )
    model = Transformer(transformer_config(section, vocabulary_size))
    model.initialise(generator(seed, STAGE, "weights"))

    def sequence_starts(step: int) -> Tensor:
        return batch_indices(step, section.batch_sequences, blocks, seed, STAGE) * context

    def batch_of(step: int) -> str:
        return described_batch("sequences", sequence_starts(step))

    def objective(step: int, rows: range) -> Mapping[str, Tensor]:
        token_ids = tokens.windows(sequence_starts(step)[rows.start : rows.stop], context + 1)
        return {"loss": next_token_loss(model, token_ids.to(processes.device))}

    return train(
        model,
        objective,
        section,
        params.runtime,
        "transformer",
        log,
        section.batch_sequences,
        context,
        keep=keep,
        keep_at={section.steps * (index + 1) // section.checkpoints for index in range(section.checkpoints)},
        checkpoints=checkpoints,
        batch_of=batch_of,
        processes=processes,
    )
