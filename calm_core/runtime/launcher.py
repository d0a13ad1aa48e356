"""Rank and world size of this process, from the environment variables that torchrun and its like set."""

import os


def is_one_of_many() -> bool:
    """Whether a launcher has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank_in_environment() -> int:
    """The number that the launcher gave this process, 0 without one."""
    return int(os.environ["RANK"]) if is_one_of_many() else 0


def processes_of_run() -> int:
    """How many processes the launcher has started, on all machines, 1 without one."""
    return int(os.environ["WORLD_SIZE"]) if is_one_of_many() else 1


def processes_here() -> int:
    """How many processes the launcher has started on this machine, 1 without one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_one_of_many() else 1
