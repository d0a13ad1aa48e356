"""AdamW for vectors and embeddings, Muon for the matrices, and the learning-rate schedules.

Muon takes the momentum of a matrix and steps along its nearest semi-orthogonal matrix, found by a
Newton-Schulz iteration (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon). torch.optim.Muon runs
that iteration in bfloat16, some fifty times slower than float32 on a CPU without bfloat16 units, and one
matrix at a time; here matrices of one shape go together, in the dtype of the training's own matrix products,
and are divided among the threads that share a batch's rows, where there are any.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from calm_core.nn.layers import is_embedding
from calm_core.params import TrainingParams
from calm_core.runtime.threads import made_ahead
from calm_core.training.sharding import full_tensor, shard_like

# Coefficients of the quintic x -> a x + b x^3 + c x^5 that pushes singular values towards 1 (ibid.).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values end up in about [0.7, 1.2].

    ``matrices`` is a float32 batch [n, rows, columns]; the result has its shape, and the products are in ``dtype``.
    """
    a, b, c = NEWTON_SCHULZ
    # The Gram matrix is the smaller of the two; a transposed matrix has the transposed answer.
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    # The Frobenius norm bounds the largest singular value: all start in [0, 1], where the iteration converges. The
    # summand keeps a matrix of zeros at zero.
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        # a x + (b G + c G^2) x with G = x x^T, two fused products.
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices [rows, columns]; steps have size lr * sqrt(max(1, rows / columns))."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._dtype, self._threads = dtype, threads

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            # A batch of small matrices is one product; one by one, the overhead of each call dominates.
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            parts = [same[first :: self._threads] for same in by_shape.values() for first in range(self._threads)]
            parts = [part for part in parts if part]
            if self._threads == 1:
                for part in parts:
                    self._update(part, group)
            else:
                # The longest first, so that threads end at about the same time.
                parts.sort(key=lambda part: len(part) * part[0].numel() * min(part[0].shape), reverse=True)
                update = partial(self._update, group=group)
                deque(made_ahead(update, parts, len(parts), self._threads), maxlen=0)

    @torch.no_grad()  # a setting of the thread
    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Move ``parameters``, which have one shape."""
        # A matrix that is sharded over processes is orthogonalised in one piece, by each of them.
        directions = [full_tensor(self._nesterov(p, group["momentum"])) for p in parameters]
        updates = orthogonalise(torch.stack(directions), dtype=self._dtype).unbind()
        # Decoupled weight decay, as in AdamW: scaled by the learning rate and kept out of the momentum.
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        # An orthogonal update has singular values near 1; the factor keeps the size of what it does to
        # activations independent of the matrix's shape (ibid.).
        rows, columns = parameters[0].shape
        scale = group["lr"] * math.sqrt(max(1.0, rows / columns))
        sharded = [shard_like(update, p) for update, p in zip(updates, parameters, strict=True)]
        torch._foreach_add_(parameters, sharded, alpha=-scale)

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        gradient: Tensor = parameter.grad  # type: ignore[assignment]
        state: dict[str, Any] = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        # An average instead of a sum: a constant factor, which orthogonalisation removes.
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum)


def build_optimisers(
    model: nn.Module, training: TrainingParams, products: torch.dtype = torch.float32, threads: int = 1
) -> list[torch.optim.Optimizer]:
    """The optimisers that ``training`` asks for, over all parameters of ``model``.

    Muon multiplies in ``products``, and divides its matrices among ``threads`` whose operators have one thread.

    "adamw" is the published one: AdamW with betas (0.9, 0.95) for everything; embeddings and all other matrices decay,
    gains and biases do not. "muon" takes the matrices between hidden layers; the rest stays as it is under "adamw".
    Embeddings have a learning rate of their own: an entry moves only in steps that see its token.
    """
    matrices: list[nn.Parameter] = []
    embeddings: list[nn.Parameter] = []
    outputs: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        # By name, since a shape does not say that rows are looked up. "output." is the Transformer's output matrix,
        # "unembedding" that of CALM's token head: a row a token, too, and no map between hidden layers.
        if is_embedding(name):
            embeddings.append(parameter)
        elif parameter.ndim < 2:
            vectors.append(parameter)
        else:
            of_tokens = name.startswith("output.") or name.endswith("unembedding.weight")
            (outputs if of_tokens else matrices).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": embeddings, "lr": training.embedding_learning_rate},
        {"params": vectors, "weight_decay": 0.0},
        {"params": outputs},
    ]
    optimisers: list[torch.optim.Optimizer] = []
    if training.optimiser == "muon":
        optimisers.append(
            Muon(
                matrices,
                training.muon_learning_rate,
                weight_decay=training.weight_decay,
                dtype=products,
                threads=threads,
            )
        )
    else:
        groups.append({"params": matrices})
    # Most models lack some of these, and torch cannot gather optimiser state with an empty group.
    groups = [group for group in groups if group["params"]]
    decay = training.weight_decay
    optimisers.append(
        torch.optim.AdamW(groups, training.learning_rate, betas=(0.9, 0.95), weight_decay=decay, fused=True)
    )
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["initial_lr"] = group["lr"]  # as torch's schedulers name the rate that they scale
    return optimisers


def learning_rate_factor(step: int, training: TrainingParams) -> float:
    """What the peak learning rates are multiplied with at ``step`` (0 is the first), in (0, 1].

    Linear warm-up over ``warmup_steps``, then constant, or down to zero along a line or half a cosine.
    """
    # step + 1, so that the first step already moves; rest stays below 1, so that the last one still does.
    warmup = min(1.0, (step + 1) / max(1, training.warmup_steps))
    rest = max(0, step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    if training.schedule == "linear":
        return warmup * (1 - rest)
    if training.schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * rest))
    return warmup


def set_learning_rates(optimisers: Iterable[torch.optim.Optimizer], step: int, training: TrainingParams) -> None:
    """Give every group of ``optimisers`` its learning rate at ``step``, its peak times ``learning_rate_factor``."""
    factor = learning_rate_factor(step, training)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["initial_lr"] * factor
