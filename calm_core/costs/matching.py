"""Steps of the baseline that take the training compute of CALM with its autoencoder (paper, section 6).

The paper compares models by their training FLOPs and leaves the autoencoder out, which takes 2 % of its CALM-M's. In a
small run it may take a third, so it is charged here. FLOPs are those of ``flops``, in the paper's accounting.
"""

from calm_core.costs.run_shapes import run_shapes
from calm_core.params import Params, with_transformer_steps


def matched_steps(params: Params) -> int:
    """The whole number of steps at which the Transformer's training FLOPs come closest to CALM's and the autoencoder's.

    A token head has no autoencoder, and one that came with calm.initial is not trained here: what is counted is the
    run's own training. Whatever transformer.steps is. It may be 0, where one step already takes more than twice as
    much.
    """
    flops = run_shapes(params).analytic_flops()
    budget = flops.calm.training_per_token * params.calm.training_tokens
    if params.calm.needs_autoencoder and not params.calm.has_given_autoencoder:
        budget += flops.autoencoder.training_per_token * params.autoencoder.training_tokens
    return round(budget / (flops.transformer.training_per_token * params.transformer.step_tokens))


def with_matched_steps(params: Params) -> Params:
    """``params`` in which transformer.steps is a number: ``matched_steps`` where it says match.

    Raises:
        CalmError: the Transformer cannot be trained for so many steps: its warm-up is longer, for instance.
    """
    return with_transformer_steps(params, matched_steps(params)) if params.transformer.steps == "match" else params
