"""Random generators keyed by what they are for, never by how often something ran before.

A run that was interrupted, resumed or spread over processes then draws the same numbers.
"""

import hashlib

import torch


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by ``seed`` and by ``purpose``, for instance ("train_calm", "noise", step)."""
    key = "/".join(str(part) for part in (seed, *purpose))
    # Python's own hash of a string differs from process to process.
    digest = hashlib.sha256(key.encode()).digest()
    # 63 bits, which a signed integer holds.
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
