"""What the interpreter lets us see of a kernel: every address it touches, and what happens when programs run in another order.

Needs a process with TRITON_INTERPRET=1.

    with traced() as launches: ...           every launch with its arguments and every load and store of each program
    with reordered(lambda n: order): ...     programs run in another order, or only some of them
    with in_place(): ...                     arguments are not copied, so that they may be views of storage too large to copy
    with guarded(): ...                      a stray load or store is an exception and not a crash
    with mutant(module, old, new, folder):   the ops run on the kernels of ``module`` with ``old`` replaced by ``new`` in its source
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from ditkernels.ops import _rows, _triton, dispatch

BUILDER = interpreter.interpreter_builder


@dataclass
class Touch:
    """The elements one program loads or stores in one instruction: their addresses, masked ones left out."""

    program: int
    store: bool
    addresses: np.ndarray


@dataclass
class Launch:
    """One launch: the kernel's name, its arguments by name, and what its programs touched."""

    kernel: str
    programs: int
    arguments: dict[str, Any]
    touches: list[Touch] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        return {n: v for n, v in self.arguments.items() if isinstance(v, Tensor) and v.numel()}

    def traffic(self) -> dict[int, dict[str, tuple[int, int]]]:
        """By program and argument: bytes read and written. Arguments must lie apart from each other in memory.

        Raises:
            ValueError: an access to none of the arguments.
        """
        spans = sorted((t.data_ptr(), n, t) for n, t in self.tensors().items())
        starts = np.array([start for start, *_ in spans], np.uint64)
        ends = np.array([t.data_ptr() + _extent(t) * t.element_size() for *_, t in spans], np.uint64)
        found: dict[int, dict[str, tuple[int, int]]] = {}
        for touch in self.touches:
            at = np.searchsorted(starts, touch.addresses, side="right") - 1
            if (at < 0).any() or (touch.addresses >= ends[at]).any():
                raise ValueError(f"{self.kernel}: an access to none of its arguments")
            mine = found.setdefault(touch.program, {})
            for index, count in zip(*np.unique(at, return_counts=True)):
                _, name, tensor = spans[index]
                read, written = mine.get(name, (0, 0))
                moved = int(count) * tensor.element_size()
                mine[name] = (read, written + moved) if touch.store else (read + moved, written)
        return found

    def counts(self, name: str, *, store: bool) -> Tensor:
        """How often each element of an argument was loaded, or stored: integers in the argument's shape."""
        tensor = self.arguments[name]
        addresses = element_addresses(tensor)
        touched = [t.addresses for t in self.touches if t.store == store] or [np.empty(0, np.uint64)]
        seen, times = np.unique(np.concatenate(touched), return_counts=True)
        if len(seen) == 0:
            return torch.zeros(tensor.shape, dtype=torch.int64)
        at = np.searchsorted(seen, addresses).clip(max=len(seen) - 1)
        return torch.from_numpy(np.where(seen[at] == addresses, times[at], 0)).reshape(tensor.shape)

    def strays(self) -> int:
        """Accesses to an address that is no element of an argument."""
        known = np.unique(np.concatenate([element_addresses(t) for t in self.tensors().values()]))
        return sum(int((~np.isin(t.addresses, known)).sum()) for t in self.touches)

    def _writers(self) -> tuple[np.ndarray, np.ndarray]:
        """Every stored address with the program that stored it, sorted; an address comes once for each of its programs."""
        stores = [t for t in self.touches if t.store]
        addresses = np.concatenate([t.addresses for t in stores] or [np.empty(0, np.uint64)])
        owners = np.concatenate([np.full(len(t.addresses), t.program) for t in stores] or [np.empty(0, np.int64)])
        order = np.lexsort((owners, addresses))
        addresses, owners = addresses[order], owners[order]
        first = np.ones(len(addresses), bool)
        first[1:] = (addresses[1:] != addresses[:-1]) | (owners[1:] != owners[:-1])
        return addresses[first], owners[first]

    def writers_clash(self) -> bool:
        """Whether two programs store to the same address."""
        addresses, _ = self._writers()
        return len(np.unique(addresses)) != len(addresses)

    def crosstalk(self) -> bool:
        """Whether a program loads what another program of the launch stores; only asked where no writers clash."""
        addresses, owners = self._writers()
        for touch in self.touches:
            if touch.store or len(addresses) == 0:
                continue
            at = np.searchsorted(addresses, touch.addresses).clip(max=len(addresses) - 1)
            if ((addresses[at] == touch.addresses) & (owners[at] != touch.program)).any():
                return True
        return False


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))


def element_addresses(tensor: Tensor) -> np.ndarray:
    """The address of every element, in row-major order of its shape."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride()):
        offsets = offsets.unsqueeze(-1) + torch.arange(size) * stride
    return (tensor.data_ptr() + offsets.flatten().numpy() * tensor.element_size()).astype(np.uint64)


@contextlib.contextmanager
def traced() -> Iterator[list[Launch]]:
    """Records every launch made through ``_triton.launch``."""
    launches: list[Launch] = []
    launch, load, store = _triton.launch, BUILDER.create_masked_load, BUILDER.create_masked_store

    def recording(kernel: Any, programs: int, tile: Any, device: Any, *args: Any, **constants: Any) -> None:
        names = list(inspect.signature(kernel.fn).parameters)
        given = {**dict(zip(names, args)), **constants}
        launches.append(Launch(kernel.fn.__name__, programs, given))
        launch(kernel, programs, tile, device, *args, **constants)

    def note(pointers: Any, mask: Any, store: bool) -> None:
        addresses = pointers.data.reshape(-1)[np.broadcast_to(mask.data, pointers.data.shape).reshape(-1)]
        launches[-1].touches.append(Touch(int(BUILDER.grid_idx[0]), store, addresses.astype(np.uint64)))

    def loading(pointers: Any, mask: Any, *rest: Any) -> Any:
        note(pointers, mask, False)
        return load(pointers, mask, *rest)

    def storing(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(pointers, mask, True)
        return store(pointers, value, mask, *rest)

    with (
        mock.patch.object(_triton, "launch", recording),
        mock.patch.object(BUILDER, "create_masked_load", loading),
        mock.patch.object(BUILDER, "create_masked_store", storing),
    ):
        yield launches


@contextlib.contextmanager
def reordered(order: Callable[[int], Sequence[int]]) -> Iterator[None]:
    """Runs the programs ``order(n)`` of every launch of n programs, in that order; it may leave programs out."""
    launch = _triton.launch

    def chosen(kernel: Any, programs: int, tile: Any, device: Any, *args: Any, **constants: Any) -> None:
        indices = list(order(programs)) if programs else []

        def set_index(x: int, y: int, z: int) -> None:
            BUILDER.grid_idx = (indices[x], y, z)

        with mock.patch.object(BUILDER, "set_grid_idx", set_index):
            launch(kernel, len(indices), tile, device, *args, **constants)

    with mock.patch.object(_triton, "launch", chosen):
        yield


def shuffled(seed: int) -> Callable[[int], list[int]]:
    return lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    """Stops the interpreter from copying the storage of every argument to the host and back."""

    def as_they_are(self: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    def nothing(self: Any, *args: Any) -> None:
        return None

    with (
        mock.patch.object(interpreter.GridExecutor, "_init_args_hst", as_they_are),
        mock.patch.object(interpreter.GridExecutor, "_restore_args_dev", nothing),
    ):
        yield


class OutOfBounds(AssertionError):
    """A kernel would have touched memory outside the storage of its arguments."""


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Raises OutOfBounds before a load or store outside the storage of the launch's arguments, which could end the process."""
    launch, load, store = _triton.launch, BUILDER.create_masked_load, BUILDER.create_masked_store
    starts, ends = np.empty(0, np.uint64), np.empty(0, np.uint64)

    def watching(kernel: Any, programs: int, tile: Any, device: Any, *args: Any, **constants: Any) -> None:
        nonlocal starts, ends
        storages = {
            a.untyped_storage().data_ptr(): a.untyped_storage() for a in (*args, *constants.values()) if isinstance(a, Tensor)
        }
        starts = np.array(sorted(storages), np.uint64)
        ends = np.array([p + storages[p].nbytes() for p in sorted(storages)], np.uint64)
        launch(kernel, programs, tile, device, *args, **constants)

    def check(pointers: Any, mask: Any) -> None:
        addresses = pointers.data.reshape(-1)[np.broadcast_to(mask.data, pointers.data.shape).reshape(-1)]
        at = np.searchsorted(starts, addresses.astype(np.uint64), side="right") - 1
        if ((at < 0) | (addresses >= ends[at])).any():
            raise OutOfBounds("an address outside the storage of the arguments")

    def loading(pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(pointers, mask, *rest)

    def storing(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(pointers, value, mask, *rest)

    with (
        mock.patch.object(_triton, "launch", watching),
        mock.patch.object(BUILDER, "create_masked_load", loading),
        mock.patch.object(BUILDER, "create_masked_store", storing),
    ):
        yield


SHARED = (_rows,)
"""Modules whose device functions other modules' kernels call, in the order in which they import each other."""


def load_sources(
    module: types.ModuleType, change: Callable[[str], str], folder: Path, beneath: Sequence[types.ModuleType] = ()
) -> tuple[dict[str, Callable[..., Any]], dict[str, types.ModuleType]]:
    """Runs the changed sources of ``module``, of SHARED and of those ``beneath`` as other copies, without registering anything.

    Returns the kernels that they would register, by op, and the copies by the name of what they copy.
    """
    registered: dict[str, Callable[..., Any]] = {}

    def collect(op: Any, backend: str, *, refuse: Any = None) -> Callable[[Any], Any]:
        def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
            registered[op.name] = kernel
            return kernel

        return register

    copies: dict[str, types.ModuleType] = {}
    with mock.patch.object(dispatch.Op, "implement", collect), mock.patch.dict(sys.modules):
        for original in (*(m for m in SHARED if m is not module), *beneath, module):
            name = original.__name__
            path = folder / f"{name.split('.')[-1]}.py"
            path.write_text(change(Path(original.__file__ or "").read_text(encoding="utf-8")), encoding="utf-8")
            sys.modules[name] = copies[name] = types.ModuleType(name)
            copies[name].__file__ = str(path)  # the interpreter reads a kernel's source from its file
            exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), copies[name].__dict__)
    return registered, copies


@contextlib.contextmanager
def mutant(module: types.ModuleType, old: str, new: str, folder: Path, beneath: Sequence[types.ModuleType] = ()) -> Iterator[None]:
    """Runs the ops on the kernels of ``module`` with ``old`` replaced by ``new`` in its source, in SHARED, or ``beneath``."""
    sources = [Path(m.__file__ or "").read_text(encoding="utf-8") for m in (module, *SHARED, *beneath)]
    assert any(old in source for source in sources), f"the source of {module.__name__} has no {old!r}"
    registered, _ = load_sources(module, lambda source: source.replace(old, new), folder, beneath)
    with contextlib.ExitStack() as stack:
        stack.callback(dispatch.forget)  # a call that is remembered holds its kernel
        for name, kernel in registered.items():
            implementation = dispatch.OPS[name].implementations["triton"]
            stack.enter_context(mock.patch.object(implementation, "kernel", kernel))
        dispatch.forget()
        yield
