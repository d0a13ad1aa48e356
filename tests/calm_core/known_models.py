"""Models with weights set by hand, whose distribution over the next tokens is known exactly, and their exact scores.

The models are the project's own classes and go through ``save_model``. The scores are enumerated in plain Python from
the distribution that the weights were set for, so nothing here asks the code under test what is right.
"""

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, AutoencoderConfig
from calm_core.calm.energy_head import EnergyHead, EnergyHeadConfig
from calm_core.calm.model import Calm, CalmConfig
from calm_core.calm.token_head import TokenHead, TokenHeadConfig
from calm_core.nn.backbone import BackboneConfig, Layer
from calm_core.nn.layers import initialise
from calm_core.tokens.shards import TokenWriter
from calm_core.transformer.model import Transformer, TransformerConfig

Paths = dict[tuple[int, ...], float]
"""Probability of each possible continuation of four tokens."""

NEVER = -20.0
"""Log-probability that stands for 0: far too little to be seen in a score."""


COIN = {
    1: [[[1], [2]], [[2], [0]], [[3], [1]], [[0], [3]]],
    2: [[[1, 2], [1, 3]], [[2, 3], [0, 0]], [[3, 0], [1, 2]], [[0, 1], [0, 2]]],
    4: [[[1, 2, 3, 0], [1, 2, 0, 0]], [[2, 3, 0, 1], [2, 3, 0, 2]], [[3, 0, 1, 2], [1, 1, 1, 1]],
        [[0, 1, 2, 3], [0, 0, 2, 3]]],
}  # fmt: skip
"""By K, two different next patches for each of four tokens: they part at one token or another."""


@dataclass(frozen=True)
class Text:
    """Documents of token ids, end-of-text tokens included."""

    documents: list[list[int]]

    @property
    def stream(self) -> list[int]:
        return [token for document in self.documents for token in document]

    def write(self, folder: Path, split: str, vocabulary_size: int, documents_a_shard: int) -> None:
        """Token shards of ``documents_a_shard`` documents each."""
        writer = TokenWriter(folder, split, vocabulary_size)
        for number, document in enumerate(self.documents, start=1):
            writer.write(document)
            if number % documents_a_shard == 0:
                writer.flush()
        writer.flush()


class Place(NamedTuple):
    """Where a model is asked: after ``history``, the tokens of the block so far; ``following`` are the true four."""

    document: int
    history: tuple[int, ...]
    following: tuple[int, ...]


def places(text: Text, context: int, patch_size: int, limit: int | None = None) -> list[Place]:
    """All places at which BrierLM asks, block after block."""
    stream = text.stream
    length = min(len(stream), limit or len(stream))
    ends = list(itertools.accumulate(map(len, text.documents)))
    found = []
    # So many blocks as fit into the limit, at equal distances among all that fit into the text.
    asked, there = (length - 4) // context, (len(stream) - 4) // context
    for start in (context * math.floor(number * there / asked) for number in range(asked)):
        for place in range(start + patch_size, start + context + 1, patch_size):
            document = next(number for number, end in enumerate(ends) if place < end)
            found.append(Place(document, tuple(stream[start:place]), tuple(stream[place : place + 4])))
    return found


def chain_text(table: np.ndarray, lengths: Sequence[int], follow: float, seed: int) -> Text:
    """Documents of ``lengths`` tokens: with probability ``follow`` the table's most probable next token, or any."""
    draws = random.Random(seed)
    token, documents = 0, []
    for length in lengths:
        document = []
        for _ in range(length):
            token = int(table[token].argmax()) if draws.random() < follow else draws.randrange(len(table))
            document.append(token)
        documents.append(document)
    return Text(documents)


def walk(size: int, choices: int) -> np.ndarray:
    """A table [size, size]: the next token is one of ``choices`` with equal probability, never another.

    Any continuation of n tokens that can be has probability ``choices`` to the -n, so that no estimator of its Brier
    scores has any variance where probabilities are known. The first choice is a little the most probable.
    """
    table = np.full((size, size), math.exp(NEVER))
    for token in range(size):
        for choice in range(choices):
            table[token, (3 * token + 1 + choice) % size] = (1 + 1e-7 * (choice == 0)) / choices
    return table


# Models


def bigram_transformer(table: np.ndarray) -> Transformer:
    """A Transformer whose next token depends on the last alone: P(b | a) is ``table``[a, b]."""
    size = len(table)
    hidden_size = size + size % 2
    model = _silent_transformer(size, hidden_size)
    # The final norm turns the one-hot embedding into sqrt(hidden) times itself.
    model.output.weight[:, :size] = torch.from_numpy(np.log(table)).T / math.sqrt(hidden_size)
    return model.eval().requires_grad_(False)


def history_transformer(table: np.ndarray, weight: float) -> tuple[Transformer, Callable[[Sequence[int]], np.ndarray]]:
    """A Transformer that adds up logits of the last token and, times ``weight``, of the mean of all tokens it sees.

    Returns it with its distribution of the next token after a history.
    """
    size, hidden_size = len(table), 2 * len(table)
    model = _silent_transformer(size, hidden_size)
    attention = next(layer for layer in model.modules() if isinstance(layer, Layer)).attention
    torch.nn.init.zeros_(attention.query.weight)  # it looks at all that it sees alike
    torch.nn.init.zeros_(attention.value.weight)
    torch.nn.init.zeros_(attention.output.weight)
    for feature in range(size):
        attention.value.weight[size + feature, feature] = 1
        attention.output.weight[size + feature, size + feature] = weight / math.sqrt(hidden_size)
    logits = np.log(table)
    model.output.weight[:, :size] = torch.from_numpy(logits).T
    model.output.weight[:, size:] = torch.from_numpy(logits).T

    def after(history: Sequence[int]) -> np.ndarray:
        features = np.zeros(hidden_size)
        features[history[-1]] = 1
        for token in history:
            features[size + token] += weight / len(history)
        features /= np.sqrt((features**2).mean())
        scores = np.exp(features[:size] @ logits + features[size:] @ logits)
        return np.asarray(scores / scores.sum())

    return model.eval().requires_grad_(False), after


def _silent_transformer(size: int, hidden_size: int) -> Transformer:
    """One-hot embeddings, layers that add nothing, and an output matrix of zeros."""
    model = Transformer(TransformerConfig(size, BackboneConfig(hidden_size, 4, 1, 1, 1))).requires_grad_(False)
    model.initialise(torch.Generator().manual_seed(0))
    model.embedding.weight.copy_(torch.eye(size, hidden_size))
    model.output.weight.zero_()
    return model


def code_autoencoder(codes: Tensor, patch_size: int, scale: float = 1.0, log_std: float = 0.0) -> Autoencoder:
    """An autoencoder in closed form: a latent holds, token by token, ``scale`` times ``codes`` [vocabulary, features].

    The codes have length 1. Decoding finds the code of largest product, the first if there are two.
    """
    size, features = codes.shape
    latent_size = patch_size * features
    hidden_size = latent_size + 1
    model = Autoencoder(AutoencoderConfig(size, patch_size, hidden_size, 2, latent_size)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    for norm in (model.encoder.norm, model.decoder.norm):
        norm.weight.fill_(1)
    model.encoder.embedding.weight[:, :features] = codes
    # The encoder's norm divides a patch of ``patch_size`` codes by the root of their mean square.
    to_mean = scale * math.sqrt(patch_size / hidden_size)
    for place, feature in itertools.product(range(patch_size), range(features)):
        entry = place * features + feature
        model.encoder.squeeze.weight[entry, place * hidden_size + feature] = 1
        model.encoder.to_posterior.weight[entry, entry] = to_mean
        model.decoder.from_latent.weight[entry, entry] = 1
        model.decoder.expand.weight[place * hidden_size + feature, entry] = 1
    model.encoder.to_posterior.bias[latent_size:] = log_std
    return model.eval()


def coin_calm(
    next_patches: Sequence[Sequence[Sequence[int]]], inputs: Literal["tokens", "latents"] = "tokens"
) -> tuple[Calm, Autoencoder]:
    """A CALM that follows a patch ending in token a by one of the two ``next_patches``[a], each with probability 1/2.

    The energy head gets one random number, of which its norm leaves the sign; the last linear is then solved for the
    latents that the two signs at each token shall give.
    """
    size, patch_size = len(next_patches), len(next_patches[0][0])
    autoencoder = code_autoencoder(torch.eye(size), patch_size)
    backbone = BackboneConfig(6 * size, 4, 1, 1, 1)
    config = CalmConfig(size, patch_size, patch_size * size, backbone, EnergyHeadConfig(1, 1), inputs)
    model = Calm(config).requires_grad_(False)
    initialise(model, torch.Generator().manual_seed(1), embedding_std=1.0)
    model.backbone.zero_residuals()
    head = model.head
    assert isinstance(head, EnergyHead)
    _read_last_token_alone(model)
    head.noise_projection.weight.mul_(1e6)
    ends = torch.arange(size)[:, None, None].expand(-1, 1, patch_size)
    hidden_states = model(model.inputs(ends, autoencoder))[:, 0]
    features: list[Tensor] = []
    hook = head.output[-1].register_forward_pre_hook(lambda _, arguments: features.append(arguments[0]))
    for sign in (-0.25, 0.25):
        head.sample(hidden_states, torch.full((size, 1), sign))
    hook.remove()
    known = torch.nn.functional.pad(torch.cat(features), (0, 1), value=1.0).double()
    wanted = [torch.eye(size)[torch.tensor(next_patches)[:, coin]].flatten(1) for coin in (0, 1)]
    solution = torch.linalg.lstsq(known, torch.cat(wanted).double(), driver="gelsd").solution.float()
    head.output[-1].weight.copy_(solution[:-1].T)
    head.output[-1].bias.copy_(solution[-1])
    return model.eval(), autoencoder


def bigram_calm(table: np.ndarray, patch_size: int) -> Calm:
    """A CALM with a token head whose next token depends on the last alone: P(b | a) is ``table``[a, b].

    The hidden state gives the last token of the last patch to the first position, and each later position reads that
    of the token before it; every state is one-hot.
    """
    size = len(table)
    config = CalmConfig(size, patch_size, 6 * size, BackboneConfig(6 * size, 4, 1, 1, 1), TokenHeadConfig(size, 4, 1))
    model = Calm(config).requires_grad_(False)
    initialise(model, torch.Generator().manual_seed(1), embedding_std=1.0)
    model.backbone.zero_residuals()
    head = model.head
    assert isinstance(head, TokenHead)
    head.zero_output()
    _read_last_token_alone(model)
    hidden_states = model(torch.arange(size)[:, None, None].expand(-1, 1, patch_size))[:, 0]
    known = torch.nn.functional.pad(hidden_states, (0, 1), value=1.0).double()
    solution = torch.linalg.lstsq(known, torch.eye(size).double(), driver="gelsd").solution.float()
    head.from_hidden_state.weight.zero_()
    head.from_hidden_state.weight[:size] = solution[:-1].T
    head.from_hidden_state.bias.zero_()
    head.from_hidden_state.bias[:size] = solution[-1]
    head.embedding.weight.copy_(torch.eye(size))
    for earlier in head.from_earlier:
        earlier.zero_()
        earlier[:, -size:] = torch.eye(size)
    # The norm turns a one-hot state into sqrt(size) times itself.
    head.unembedding.weight.copy_(torch.from_numpy(np.log(table)).T / math.sqrt(size))
    return model.eval()


def _read_last_token_alone(model: Calm) -> None:
    into = model.patch_embedding.projection[0]  # type: ignore[union-attr, index]
    assert isinstance(into, torch.nn.Linear)
    patch_size = model.config.patch_size
    into.weight[:, : into.in_features * (patch_size - 1) // patch_size] = 0


# Exact scores


def paths_of_tokens(after: Callable[[Sequence[int]], np.ndarray]) -> Callable[[Sequence[int]], Paths]:
    """All continuations of a history by four tokens, of a model with distribution ``after`` of the next one."""

    def paths(history: Sequence[int]) -> Paths:
        found: Paths = {(): 1.0}
        for _ in range(4):
            found = {
                (*path, token): probability * step
                for path, probability in found.items()
                for token, step in enumerate(after([*history, *path]))
            }
        return found

    return paths


def paths_of_bigrams(table: np.ndarray) -> Callable[[Sequence[int]], Paths]:
    """The same where only the last token counts."""
    known = {token: paths_of_tokens(lambda history: table[history[-1]])([token]) for token in range(len(table))}
    return lambda history: known[history[-1]]


def paths_of_patches(next_patches: Sequence[Sequence[Sequence[int]]]) -> Callable[[Sequence[int]], Paths]:
    """All continuations by four tokens where each next patch is one of ``next_patches``[last token], all alike."""

    def paths(history: Sequence[int]) -> Paths:
        found: Paths = {(): 1.0}
        while len(next(iter(found))) < 4:
            longer: defaultdict[tuple[int, ...], float] = defaultdict(float)
            for path, probability in found.items():
                patches = next_patches[[*history, *path][-1]]
                for patch in patches:
                    longer[(*path, *patch)] += probability / len(patches)
            found = longer
        return found

    return paths


class Moments(NamedTuple):
    """Exact mean and variance of what an estimator gives at one place, Brier-1 to Brier-4."""

    mean: np.ndarray
    variance: np.ndarray


def _prefixes(paths: Paths, length: int) -> Paths:
    found: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for path, probability in paths.items():
        found[path[:length]] += probability
    return found


def moments_of_sampling(paths: Paths, following: Sequence[int], samples: int) -> Moments:
    """Of the estimator from ``samples`` independent continuations: a U-statistic, by Hoeffding's formula."""
    means, variances = [], []
    for length in range(1, 5):
        probability = _prefixes(paths, length)
        right = {path: float(path == tuple(following[:length])) for path in probability}
        mean = sum(p * (2 * right[path] - p) for path, p in probability.items())
        given_one = {path: right[path] + probability.get(tuple(following[:length]), 0.0) - p
                     for path, p in probability.items()}  # fmt: skip
        one = sum(p * (given_one[path] - mean) ** 2 for path, p in probability.items())
        two = sum(
            p * q * (right[first] + right[second] - (first == second) - mean) ** 2
            for first, p in probability.items()
            for second, q in probability.items()
        )
        means.append(mean)
        variances.append((4 * (samples - 2) * one + 2 * two) / (samples * (samples - 1)))
    return Moments(np.array(means), np.array(variances))


def moments_of_probabilities(paths: Paths, following: Sequence[int], samples: int) -> Moments:
    """Of the estimator that samples the prefixes of the collision term alone."""
    means, variances = [], []
    for length in range(1, 5):
        probability = _prefixes(paths, length)
        # Given the prefix x, the collision term is P(x) sum_v P(v | x)^2 = sum_v P(xv)^2 / P(x).
        before = _prefixes(paths, length - 1)
        squares: defaultdict[tuple[int, ...], float] = defaultdict(float)
        for path, p in probability.items():
            squares[path[:-1]] += p * p
        collision = sum(squares.values())
        means.append(2 * probability.get(tuple(following[:length]), 0.0) - collision)
        variances.append(sum(p * (squares[path] / p - collision) ** 2 for path, p in before.items()) / samples)
    return Moments(np.array(means), np.array(variances))


class Expected(NamedTuple):
    """What an evaluation must give: documents in order, and for each its positions, mean and variance of its sums."""

    document: list[int]
    positions: list[int]
    mean: np.ndarray
    variance: np.ndarray


def expected(asked: Sequence[Place], moments: Callable[[Place], Moments]) -> Expected:
    """``moments`` added up over the places of each document."""
    documents = sorted({place.document for place in asked})
    found: dict[int, list[Moments]] = {document: [] for document in documents}
    for place in asked:
        found[place.document].append(moments(place))
    return Expected(
        documents,
        [len(found[document]) for document in documents],
        np.array([sum(one.mean for one in found[document]) for document in documents]),
        np.array([sum(one.variance for one in found[document]) for document in documents]),
    )
