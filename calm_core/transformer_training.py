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
    params: Params, tokens: TokenStream, vocabulary_size: int, log: Callable[[int, Mapping[str, float]], None]
) -> Transformer:
    """Train a fresh Transformer on the training split ``tokens``; ``log`` is that of ``training.train``.

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

    train(model, objective, section, params.runtime, "transformer", log, section.batch_sequences * context)
    return model
