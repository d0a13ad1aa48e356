"""Training the baseline: next-token cross entropy on blocks of the token stream."""

from collections.abc import Callable, Mapping

from torch import Tensor

from calm_core.errors import CalmError
from calm_core.params import Params
from calm_core.randomness import generator
from calm_core.token_files import TokenStream
from calm_core.training import batch_indices, train
from calm_core.transformer import Transformer, TransformerConfig, next_token_loss

STAGE = "train_transformer"


def train_transformer(
    params: Params,
    tokens: TokenStream,
    vocabulary_size: int,
    log: Callable[[int, Mapping[str, float]], None],
    keep: Callable[[int, Transformer], None],
) -> Transformer:
    """Train a fresh Transformer on the training split ``tokens``; ``log`` is that of ``training.train``.

    ``keep`` receives the number of steps done and the model ``checkpoints`` times, evenly spread, the end included.

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
    model = Transformer(TransformerConfig.from_params(section, vocabulary_size))
    model.initialise(generator(seed, STAGE, "weights"))

    def objective(step: int) -> Mapping[str, Tensor]:
        starts = batch_indices(step, section.batch_sequences, blocks, seed, STAGE) * context
        return {"loss": next_token_loss(model, tokens.windows(starts, context + 1))}

    kept_steps = {section.steps * (index + 1) // section.checkpoints for index in range(section.checkpoints)}

    def after_step(done: int) -> None:
        if done in kept_steps:
            keep(done, model)

    tokens_per_step = section.batch_sequences * context
    train(model, objective, section, params.runtime, "transformer", log, tokens_per_step, after_step=after_step)
    return model
