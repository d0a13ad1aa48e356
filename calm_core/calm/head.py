"""What a generative head is: something that learns, from hidden states, to sample the next latent (paper, section 3).

Three heads keep to this interface: energy (``energy_head``), diffusion (``diffusion_head``) and flow matching
(``flow_head``). None has a likelihood. All randomness comes in as tensors, drawn before from a generator
or recorded elsewhere, so that a head is a pure function of its arguments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from calm_core.autoencoder.model import Posterior
from calm_core.nn.draws import Draws

Space = Callable[[Tensor], Tensor]
"""A differentiable map of latents [..., latent] to [..., parts, size]; each part is scored on its own."""


@dataclass(frozen=True)
class HeadObjective:
    """What a head is trained for; the defaults are the published ones."""

    samples: int = 8
    """N: model samples a position for the energy head, targets a position for the other two."""
    target_samples: int = 100
    """M: targets a position of the energy loss, an even number."""
    alpha: float = 1.0
    """Exponent of the distances of the energy loss."""
    spaces: tuple[Space, ...] = ()
    """Where else, beside the latents themselves, the energy loss is taken."""
    scored_targets: int = 1
    """Targets a position that are mapped into ``spaces``."""


class HeadLoss(NamedTuple):
    """``total`` is minimised, a mean over positions; ``terms`` are the scalars it is made of, without gradients."""

    total: Tensor
    terms: dict[str, Tensor]


class Head(Protocol):
    """A module with these methods; P is a number of positions, L the size of a latent."""

    def zero_output(self) -> None:
        """Prepare fresh weights: the last linear starts at zero."""

    def training_draws(self, positions: int, objective: HeadObjective, draws: Draws) -> Any:
        """The random tensors that ``loss`` needs for sequences of ``positions`` positions each, a row of ``draws`` a
        sequence: a NamedTuple of the head's own, in which P is the positions of all sequences, one after the other."""

    def loss(self, hidden_states: Tensor, posterior: Posterior, draws: Any, objective: HeadObjective) -> HeadLoss:
        """Loss of hidden states [P, hidden] against the posterior [P, L] of the patch that follows each."""

    def sampling_draws(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """The random numbers that ``sample`` needs for ``shape`` samples."""

    def sample(self, hidden_states: Tensor, draws: Tensor) -> Tensor:
        """Latents [*shape, L] float32; ``hidden_states`` [..., hidden] may lack leading dimensions of ``shape``."""


def by_position(draws: Tensor) -> Tensor:
    """Numbers drawn by sequence, [sequences, n, positions, ...], as [n, P, ...], sequence after sequence."""
    return draws.transpose(0, 1).flatten(1, 2)


class HeadConfig(Protocol):
    """Shape of a head beside the hidden size D of its backbone and the size L of a latent."""

    @property
    def kind(self) -> str:
        """The head's name in params.yaml and config.json."""

    def build(self, hidden_size: int, latent_size: int) -> Any:
        """The head, with torch's default weights."""

    def training_weights(self, hidden_size: int, latent_size: int, samples: int) -> int:
        """Matrix weights that a position passes through in training with ``samples`` samples; 2 FLOPs each."""

    def sampling_weights(self, hidden_size: int, latent_size: int) -> int:
        """Matrix weights that one sample passes through, all steps together; 2 FLOPs each."""
