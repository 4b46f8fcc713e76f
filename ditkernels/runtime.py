"""What a process runs on and among: its device, its numerics, the signals that end it, and the processes beside it."""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch

from ditkernels._version import __version__
from ditkernels.files import FolderLock

Value = TypeVar("Value")

logger = logging.getLogger(__name__)

PORTS = range(1, 2**16)
# Environment variables that say how a process computes, or where it ran.
TELLING = ("CUDA_", "CUBLAS_", "DITKERNELS_", "MKL_", "NCCL_", "OMP_", "PYTORCH_", "SLURM_JOB_ID", "TORCH_")


# ---- Device and numerics ---------------------------------------------------------------------------------------------


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allowed = "allowed are auto, cpu, cuda, cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: got {name!r}, {allowed}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {name!r}, {allowed}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: got {name!r}, but this machine has {torch.cuda.device_count()} usable CUDA devices")
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """bf16, fp16, tf32 or fp32; "auto" is bf16 on GPUs that have it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


@contextmanager
def numerics(*, tf32: bool, deterministic: bool) -> Iterator[None]:
    """Sets for the whole process whether fp32 products may be TF32, and whether torch refuses what rounds differently each time.

    The settings are put back at the end; where ``deterministic`` is False, torch's own setting stands.
    """
    before = torch.get_float32_matmul_precision()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.use_deterministic_algorithms(was_deterministic)


@contextmanager
def pinned_threads(threads: int) -> Iterator[None]:
    """PyTorch computes with that many CPU threads: rounding depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment(device: torch.device, world: World) -> dict[str, Any]:
    """What a command is computed on and with, as JSON values: versions, machine, device, variables."""
    on_gpu = device.type == "cuda"
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "ditkernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "cuda": torch.version.cuda if on_gpu else None,
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(TELLING)},
    }


# ---- Signals ---------------------------------------------------------------------------------------------------------


# Those that end a run, in the order in which one is chosen if several came. Slurm can send SIGUSR1 ahead of the end of a job.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(BaseException):
    """A signal has come, and what was done can be dropped.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopSignal:
    """STOP_SIGNALS end the run after the step in progress and a checkpoint; a second one ends the process at once.

    Args:
        once: later ones change nothing. Where torchrun and a scheduler both pass a signal on, a process gets it twice; torchrun
            itself ends at once those that take too long.

    Attributes:
        number: the signal that came, or None.
    """

    def __init__(self, *, once: bool = False) -> None:
        self.once = once
        self.number: int | None = None
        self._waiting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # Python delivers signals to the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def while_waiting(self) -> Iterator[None]:
        """A block that does nothing but wait; a signal ends it at once."""
        try:
            self._waiting = True
            yield
        except Stopped:
            pass
        finally:
            self._waiting = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.number is not None:
            if self.once:
                return
            os._exit(128 + number)
        self.number = number
        if self._waiting:
            raise Stopped(number)

    def check(self) -> None:
        """Raises Stopped if a signal has come."""
        if self.number is not None:
            raise Stopped(self.number)


# ---- A process's place among those of torchrun -----------------------------------------------------------------------


class Place(NamedTuple):
    """A process among those that torchrun has started.

    Attributes:
        size: how many there are, WORLD_SIZE.
        rank: which this is, RANK, 0..size − 1.
        local_rank: which it is on its machine, LOCAL_RANK.
    """

    size: int
    rank: int
    local_rank: int


def place() -> Place:
    """The place of this process, as environment variables tell it; without torchrun it is alone.

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


def process_device(name: str) -> torch.device:
    """The device of that name; of several processes each has its own GPU, which becomes the current one.

    Raises:
        ValueError: as :func:`local_device` and :func:`resolve_device`.
    """
    device = resolve_device(local_device(name))
    if device.type == "cuda" and place().size > 1:
        torch.cuda.set_device(device)
    return device


# ---- Processes that work together ------------------------------------------------------------------------------------


class World:
    """The processes of a run as one of them sees them; this class is a process on its own, which agrees with itself.

    Attributes:
        rank: this process, 0..size − 1.
        size: how many there are.
    """

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, logs and prints."""
        return self.rank == 0

    def on_first(self, function: Callable[[], Value]) -> Value:
        """What ``function`` returns on the first process, where alone it is called; what it raises there is raised everywhere."""
        return function()

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, by rank."""
        return [value]

    def agree(self, **values: Any) -> None:
        """Raises ValueError on every process if a value differs between ranks; it is named, with two ranks that differ."""

    def barrier(self) -> None:
        """Returns once all processes are here."""

    def tell(self, value: Any) -> None:
        """Leaves a JSON value that the others may read, whatever they do meanwhile; it is no collective."""

    def told(self) -> dict[int, Any]:
        """What has been left so far, by rank; nothing where that cannot be known any more."""
        return {}


class Group(World):
    """The processes of torch's default process group."""

    def __init__(self) -> None:
        from torch import distributed

        self._distributed: Any = distributed
        self._store: Any = distributed.distributed_c10d._get_default_store()
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def on_first(self, function: Callable[[], Value]) -> Value:
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = function()
            except (ValueError, OSError, ImportError) as error:
                outcome[1] = error
        self._distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        result: Value = outcome[0]
        return result

    def gather(self, value: Value) -> list[Value]:
        values: list[Any] = [None] * self.size
        self._distributed.all_gather_object(values, value)
        return values

    def agree(self, **values: Any) -> None:
        everyone = self.gather(values)
        differing = [
            f"{name}: {everyone[0][name]!r} on rank 0, {theirs[name]!r} on rank {rank}"
            for rank, theirs in enumerate(everyone)
            for name in values
            if theirs[name] != everyone[0][name]
        ]
        if differing:
            more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
            raise ValueError(f"the ranks disagree: {'; '.join(differing[:8])}{more}")

    def barrier(self) -> None:
        self._distributed.barrier()

    def tell(self, value: Any) -> None:
        try:
            self._store.set(f"told/{self.rank}", json.dumps(value))
        except RuntimeError as error:
            # The process that keeps the store is gone.
            logger.warning("the other ranks cannot be told (%s)", error)

    def told(self) -> dict[int, Any]:
        try:
            there = [rank for rank in range(self.size) if self._store.check([f"told/{rank}"])]
            return {rank: json.loads(self._store.get(f"told/{rank}")) for rank in there}
        except RuntimeError:
            return {}


def take_folder(folder: Path, world: World) -> FolderLock | None:
    """Takes a folder for all processes of ``world``; the lock is the first one's, and None on the others.

    Raises:
        FolderInUseError: on all of them, where somebody else has it.
    """
    taken: list[FolderLock] = []

    def take() -> None:
        # A lock cannot be sent to the others, so this returns none.
        taken.append(FolderLock(folder))

    world.on_first(take)
    return taken[0] if taken else None


@contextmanager
def owned_folder(folder: Path, world: World) -> Iterator[None]:
    """The block has the folder for all processes of ``world``; errors as of :func:`take_folder`."""
    lock = take_folder(folder, world)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@contextmanager
def processes(backend: str = "gloo", *, timeout: timedelta) -> Iterator[World]:
    """Brings together the processes that torchrun has started, and parts them at the end; without torchrun there is this one.

    Args:
        backend: of torch.distributed.
        timeout: how long processes wait for each other.

    Raises:
        ValueError: as :func:`place`.
        RuntimeError: a process did not come, died, or did not answer.
    """
    if place().size == 1:
        yield World()
        return
    from torch import distributed

    try:
        distributed.init_process_group(backend, timeout=timeout)
        yield Group()
    finally:
        if distributed.is_initialized():
            _keep_groups()
            distributed.destroy_process_group()


def recorded(function: Callable[..., Value]) -> Callable[..., Value]:
    """The function; under torchrun, what it raises is shown in torchrun's own summary too, as it is shown of no other function."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return function
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(function)  # type: ignore[return-value]


def gather_unless_stopped(world: World, stop: StopSignal, compute: Callable[[], Value]) -> list[Value]:
    """What each process has computed, by rank.

    Raises:
        Stopped: a signal has come to one of them, by the end of its computing.
    """
    try:
        told = world.gather((stop.number, compute()))
    except Stopped as stopped:
        told = world.gather((stopped.number, None))  # type: ignore[arg-type]
    numbers = {number for number, _ in told}
    for number in STOP_SIGNALS:
        if number in numbers:
            raise Stopped(number)
    return [value for _, value in told]


_kept_groups: list[Any] = []


def _keep_groups() -> None:
    # A group that is freed by this thread waits for its own threads, holding the interpreter's lock; one of them may want that
    # lock to let go of the last tensor it has sent. So none is freed before the process ends. Seen with gloo and DDP, PyTorch 2.11.
    from torch.distributed import distributed_c10d

    _kept_groups.extend(distributed_c10d._world.pg_map)
