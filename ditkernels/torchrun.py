"""What torchrun tells a process by environment variables: its place among those that it has started."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

PORTS = range(1, 2**16)


class Place(NamedTuple):
    """A process among those of a run.

    Attributes:
        size: how many there are, WORLD_SIZE.
        rank: which this is, RANK, 0..size − 1.
        local_rank: which it is on its machine, LOCAL_RANK.
    """

    size: int
    rank: int
    local_rank: int


def place() -> Place:
    """The place of this process; without torchrun it is alone.

    Raises:
        ValueError: a variable is missing, empty or wrong.
    """
    if not any(name in os.environ for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")):
        return Place(1, 0, 0)
    size = _number("WORLD_SIZE", range(1, 2**31), "1 or more")
    ranks, in_words = range(size), f"0..{size - 1}, for WORLD_SIZE is {size}"
    without = "0" if size == 1 else ""
    found = Place(size, _number("RANK", ranks, in_words, without), _number("LOCAL_RANK", ranks, in_words, without))
    if size > 1:
        _check_meeting_place()
    return found


def _check_meeting_place() -> None:
    if not os.environ.get("MASTER_ADDR"):
        raise ValueError(_wrong("MASTER_ADDR", "a name or an address of the machine of rank 0"))
    _number("MASTER_PORT", PORTS, f"1..{PORTS[-1]}")


def _number(name: str, allowed: range, in_words: str, without: str = "") -> int:
    try:
        number = int(os.environ.get(name, without))
    except ValueError:
        raise ValueError(_wrong(name, f"a whole number, {in_words}")) from None
    if number not in allowed:
        raise ValueError(_wrong(name, in_words))
    return number


def _wrong(name: str, allowed: str) -> str:
    got = f"got {os.environ[name]!r}" if name in os.environ else "it is missing"
    return f"environment variable {name}: {got}, allowed is {allowed}; torchrun sets it"


def local_device(name: str) -> str:
    """The device that ``name`` means in this process: of several processes each takes the GPU of its local rank.

    Raises:
        ValueError: as :func:`place`; one GPU for all of them, or more processes than GPUs on this machine.
    """
    here = place()
    if here.size == 1:
        return name
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, allowed with several processes are auto, cpu, cuda: each takes its own")
    if name == "cpu" or not torch.cuda.is_available():
        return name
    count = torch.cuda.device_count()
    if here.local_rank >= count:
        raise ValueError(f"device: process {here.local_rank} of this machine has no GPU, it has {count}; --nproc-per-node {count}")
    return f"cuda:{here.local_rank}"
