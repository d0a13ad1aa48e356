"""Random numbers keyed by what they are for, never by how often something was drawn before.

A run that was interrupted, resumed or spread over processes then draws the same numbers. ``generator`` gives torch's
own generators, of which a run needs few. The noise of a training comes from ``StepStreams``: a stream for every
(seed, stage, name, step, row) by a counter-based generator, Philox4x64-10 (Salmon et al., 2011).

Notable:
- a stream is a place in the counter, so no two streams meet whatever a run's length: the key is 128 bits of (seed,
  stage, name), the counter (block, row, step). torch's CPU generator keeps 32 bits of a seed, which many of a run's
  64 million rows would share;
- the number at a place needs none before it: any process draws any rows, and a GPU all of them at once;
- numpy draws on the CPU, torch's integer operators on a GPU: the same bits.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
"""Constants of Philox4x64: factors of a round, and what its two keys grow by."""
ROUNDS = 10

_LOW = 0xFFFFFFFF


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by ``seed`` and by ``purpose``, for instance ("train_calm", "weights")."""
    # 63 bits, which a signed integer holds.
    return torch.Generator(device).manual_seed(int.from_bytes(_digest(seed, *purpose)[:8], "big") >> 1)


class StepStreams:
    """The streams of ``rows`` of the batch of ``step``, as ``nn.draws.Draws``; numbers are made on ``device``."""

    def __init__(self, seed: int, stage: str, step: int, rows: range, device: torch.device | str = "cpu") -> None:
        self._key, self._step = (seed, stage), step
        self._rows, self._device = rows, torch.device(device)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """[rows, *shape] float32 in [0, 1)."""
        return to_uniform(self._words(name, self._rows, math.prod(shape))).view(len(self._rows), *shape)

    def normal(self, name: str, *shape: int) -> Tensor:
        """[rows, *shape] float32, standard normal."""
        return self._normal(name, self._rows, shape)

    def shared_normal(self, name: str, *shape: int) -> Tensor:
        """[*shape] float32, standard normal: the same for all rows of the batch."""
        # A name has either a stream a row or one for all, so row 0 is free.
        return self._normal(name, range(1), shape)[0]

    def _normal(self, name: str, rows: range, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        # Box and Muller make two numbers of two.
        return to_normal(self._words(name, rows, count + count % 2))[:, :count].reshape(len(rows), *shape)

    def _words(self, name: str, rows: range, count: int) -> Tensor:
        digest = _digest(*self._key, name)
        key = (int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big"))
        if self._device.type not in ("cpu", "mps"):  # of Apple's GPUs the memory is the CPU's
            return philox_words(key, self._step, rows, count, self._device)
        words = np.empty((len(rows), 2 * -(-count // 2)), np.uint32)
        # As arrays, since numpy reads a list with a number above 2^63 as floats.
        of_stream = np.array(key, np.uint64)
        for out, row in zip(words, rows, strict=True):
            stream = np.random.Philox(counter=np.array([0, row, self._step, 0], np.uint64), key=of_stream)
            out[:] = stream.random_raw(len(out) // 2).view(np.uint32)
        return torch.from_numpy(words[:, :count].view(np.int32)).to(self._device)


def philox_words(key: tuple[int, int], step: int, rows: range, count: int, device: torch.device | str) -> Tensor:
    """The first ``count`` words of 32 bits of the streams of ``rows``, [rows, count] int32, on any device.

    The bits that ``numpy.random.Philox(counter=[0, row, step, 0], key=key)`` gives, in its order.
    """
    # A block is four words of 64 bits; numpy counts before it draws, so the first block is number 1.
    blocks = torch.arange(1, -(-count // 8) + 1, device=device).expand(len(rows), -1)
    of_rows = torch.arange(rows.start, rows.stop, device=device)[:, None].expand_as(blocks)
    words = [blocks, of_rows, torch.full_like(blocks, _signed(step)), torch.zeros_like(blocks)]
    keys = list(key)
    for _ in range(ROUNDS):
        (high_0, low_0), (high_1, low_1) = _multiply(words[0], MULTIPLIERS[0]), _multiply(words[2], MULTIPLIERS[1])
        words = [high_1 ^ words[1] ^ _signed(keys[0]), low_1, high_0 ^ words[3] ^ _signed(keys[1]), low_0]
        keys = [key + weyl for key, weyl in zip(keys, WEYL, strict=True)]
    wide = torch.stack(words, dim=-1).flatten(1)
    # The low half of a word first, as a little-endian machine lays it out in memory.
    halves = torch.stack([wide & _LOW, _unsigned_high(wide)], dim=-1).flatten(1)[:, :count]
    return torch.where(halves < 1 << 31, halves, halves - (1 << 32)).to(torch.int32)


def to_uniform(words: Tensor) -> Tensor:
    """Float32 in [0, 1), of 24 bits, from words of 32 bits in int32."""
    # The sign's bit and the seven lowest are left out: float32 holds 24 bits, and would round more of them up to 1.
    return ((words & 0x7FFFFFFF) >> 7).float() * 2**-24


def to_normal(words: Tensor) -> Tensor:
    """Standard normal float32 from words [..., even number] of 32 bits in int32, by Box and Muller's method."""
    first, second = words.chunk(2, dim=-1)
    # 31 bits and a half: never 0, and fine steps near it, where the largest numbers come from, up to 6.7.
    radius = ((first & 0x7FFFFFFF).float() + 0.5).mul_(2**-31).log_().mul_(-2).clamp_(min=0).sqrt_()
    angle = second.float().mul_(math.pi * 2**-31)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)


def _digest(*key: str | int) -> bytes:
    # Python's own hash of a string differs from process to process.
    return hashlib.sha256("/".join(str(part) for part in key).encode()).digest()


def _multiply(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 64 bits of the products of unsigned ``words``, in int64, with ``factor``."""
    # Halves of 32 bits: their products fit into 64 bits, those of whole words do not.
    word_high, word_low = _unsigned_high(words), words & _LOW
    high, low = factor >> 32, factor & _LOW
    lowest, first, second = word_low * low, word_low * high, word_high * low
    carried = _unsigned_high(lowest) + (first & _LOW) + (second & _LOW)
    highest = word_high * high + _unsigned_high(first) + _unsigned_high(second) + _unsigned_high(carried)
    return highest, words * _signed(factor)


def _unsigned_high(words: Tensor) -> Tensor:
    # A shift to the right copies the sign's bit, which is one of the word's here.
    return (words >> 32) & _LOW


def _signed(word: int) -> int:
    """The int64 of the lowest 64 bits of ``word``."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)
