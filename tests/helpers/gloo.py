"""A function in several processes that gloo connects."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 240  # seconds, for a machine that does much else


def together(forked: ForkServerContext, folder: Path, function: Callable[..., None], *args: Any, size: int = 2) -> None:
    """Runs ``function(*args)`` in ``size`` processes of one group, and fails with what those have raised that fail."""
    pipes, processes = [], []
    for rank in range(size):
        here, there = forked.Pipe()
        process = forked.Process(target=_among, args=(rank, size, str(folder / "store"), there, function, args))
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        told = [pipe.recv() if pipe.poll(LIMIT) else "no answer" for pipe in pipes]
        assert told == [None] * size, "\n".join(map(str, told))
    finally:
        for process in processes:
            process.kill()
            process.join()


def _among(rank: int, size: int, store: str, told: Connection, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
    try:
        function(*args)
        # Who is done first must not leave while others still ask it for something.
        dist.barrier()
    except BaseException:
        told.send(traceback.format_exc())
        raise
    told.send(None)
