"""An op, its implementations, and the choice among them with reasons.

An op ``ditkernels::name`` chooses a backend and calls the internal op ``ditkernels::name_<backend>`` of the same schema, so that a
graph, a test or a profile shows which backend ran. The backward of an op is an op of its own and is dispatched in the same way.

Backends share one contract (inputs, outputs, what is saved for backward), so a forward may run on one and its backward on another.
"""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ditkernels.ops.context import autocast_dtype, no_forward_mode
from ditkernels.ops.library import LIBRARY, Kernel, boxed, define_op, unboxed
from ditkernels.ops.settings import BACKENDS
from ditkernels.ops.spec import Declaration

AUTOMATIC = ["cpu", "triton", "cuda", "torch"]
"""The order in which ``auto`` asks the backends where ``PREFERRED`` says nothing."""

# The backend that was measured to be fastest, by compute capability and op, as in ("9.0", "modulate_norm"): "cuda".
# benchmarks/gpu/fastest.py rewrites what stands between the braces, from runs whose parity was green.
PREFERRED: dict[tuple[str, str], str] = {}

_Function = TypeVar("_Function", bound=Callable[..., Any])


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve; the message says why, and what the others say."""


def fastest(op: str, device: torch.device) -> str | None:
    """The backend that was measured to be fastest at ``op`` on a device of this kind, or None where that was not measured."""
    if not PREFERRED or device.type != "cuda":
        return None
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return PREFERRED.get((capability, op))


# ---- Ops -------------------------------------------------------------------------------------------------------------

Refusal = Callable[["Op", Sequence[Any]], "str | None"]


def _willing(op: Op, args: Sequence[Any]) -> None:
    return None


@dataclass
class Implementation:
    """One backend's kernel of an op.

    Attributes:
        kernel: takes the op's arguments, ``wanted`` as dtypes; returns its outputs, None for an absent one.
        internal: the op ``ditkernels::<op>_<backend>``, which a profile shows.
        refuse: (op, arguments) -> why the kernel cannot serve, or None if it can.
        plain: the public function in plain PyTorch, which the thin way calls where gradients are wanted; None: the kernels.
    """

    kernel: Kernel
    internal: Any
    refuse: Refusal
    plain: Kernel | None = None


def device_of(args: Iterable[Any]) -> torch.device:
    """That of the first tensor, which may stand in a list; the CPU without one."""
    flat = itertools.chain.from_iterable(arg if isinstance(arg, (list, tuple)) else (arg,) for arg in args)
    return next((arg.device for arg in flat if isinstance(arg, Tensor)), torch.device("cpu"))


def _is_refused_by_device(backend: str, device: torch.device) -> bool:
    """Whether the kernels of a backend, not imported yet, would refuse tensors on this device for certain.

    So a process without a GPU never imports Triton, unless it asks for it.
    """
    return backend == "triton" and device.type != "cuda" and not os.environ.get("TRITON_INTERPRET")


class Op:
    """An op of the package, with the kernels that implement it, and its backward where it has one.

    Attributes:
        declaration: what it takes and returns.
        backward: the op that computes gradients, or None.
        call: ``torch.ops.ditkernels.<name>``. Its last argument is the forced backend, "" for none.
        memory: what is remembered of calls, by all that they read.
        newest: the same of the newest call.
    """

    def __init__(self, declaration: Declaration) -> None:
        self.declaration = declaration
        self.name = declaration.name
        self._implementations: dict[str, Implementation] = {}
        self._later: dict[str, str] = {}
        self.backward: Op | None = None
        self.call: Any = None
        self.memory: dict[Any, Any] = {}
        self.newest: tuple[Any, Any] = (None, None)
        # A call reads these. Python 3.11 makes them under a lock that Dynamo does not trace, so they are made now.
        _ = declaration.keeps, declaration.returned, declaration.public, declaration.arguments

    # ------------------------------------------------------------------------------------------------------- kernels

    def implement(
        self, backend: str, *, refuse: Refusal = _willing, plain: Kernel | None = None
    ) -> Callable[[_Function], _Function]:
        """Decorates the kernel of a backend, which runs as the internal op ``ditkernels::<op>_<backend>``.

        An autograd Function in Python costs the host more than a few operations of torch do, so a backend that is made of
        those may name a ``plain`` function, which torch differentiates by itself.
        """

        def register(kernel: _Function) -> _Function:
            if backend not in self._later:
                self._declare(backend, kernel)
            self._add(backend, kernel, refuse, plain)
            self._later.pop(backend, None)
            return kernel

        return register

    def implement_later(self, backend: str, module: str) -> None:
        """Declares the internal op ``ditkernels::<op>_<backend>``, and leaves it to ``module`` to ``implement`` it.

        The module is imported when the backend is first asked for its kernel or for a reason.
        """

        def kernel(*args: Any) -> Any:
            return self.implementation(backend).kernel(*args)

        self._declare(backend, kernel)
        self._later[backend] = module

    def _declare(self, backend: str, kernel: Kernel) -> None:
        internal = f"{self.name}_{backend}"
        define_op(internal, self.declaration.schema)
        LIBRARY.impl(internal, boxed(self.declaration, kernel), "CompositeExplicitAutograd")

    def implement_elsewhere(self, backend: str, *, refuse: Refusal) -> None:
        """Declares the internal op ``ditkernels::<op>_<backend>``; a compiled library, once loaded, supplies its kernels."""
        internal = f"{self.name}_{backend}"
        define_op(internal, self.declaration.schema, torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"ditkernels::{internal}", self.declaration.fake, lib=LIBRARY)
        self._add(backend, None, refuse)

    def _add(self, backend: str, kernel: Kernel | None, refuse: Refusal, plain: Kernel | None = None) -> None:
        internal = getattr(torch.ops.ditkernels, f"{self.name}_{backend}").default
        called = unboxed(self.declaration, internal) if kernel is None else kernel
        self._implementations[backend] = Implementation(called, internal, refuse, plain)
        self.forget()

    def implementation(self, backend: str) -> Implementation:
        """That of a backend, imported if need be.

        Raises:
            KeyError: there is none.
        """
        module = self._later.get(backend)
        if module is not None:
            importlib.import_module(module)
        return self._implementations[backend]

    @property
    def implementations(self) -> dict[str, Implementation]:
        """Those of all backends, imported if need be."""
        self.import_all()
        return self._implementations

    def import_all(self) -> None:
        """Imports the modules that implement the op later."""
        for module in tuple(self._later.values()):
            importlib.import_module(module)

    @property
    def gradients(self) -> Op:
        """The backward op."""
        assert self.backward is not None
        return self.backward

    def autocast_dtype(self, tensor: Tensor) -> torch.dtype | None:
        """As the function; but a compiled call in forward mode is refused before torch meets the tensor, with our sentence."""
        if forward_ad._current_level >= 0 and torch.compiler.is_dynamo_compiling():
            raise NotImplementedError(no_forward_mode(self.name))
        return autocast_dtype(tensor)

    def with_backend(self, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> list[Any]:
        """All arguments of the op in order, with ``backend``, which torch leaves out where it has its default."""
        names = (*self.declaration.arguments, "backend")[len(args) :]
        return [*args, *[(kwargs or {}).get(name, "" if name == "backend" else None) for name in names]]

    # -------------------------------------------------------------------------------------------------------- choice

    def reasons(self, *args: Any) -> dict[str, str | None]:
        """For every backend: why it cannot serve these arguments, or None if it can."""
        return {backend: self._reason(backend, args) for backend in BACKENDS}

    def _reason(self, backend: str, args: Sequence[Any]) -> str | None:
        if backend not in self._implementations and backend not in self._later:
            return f"there is no {backend} kernel of this op"
        return self.implementation(backend).refuse(self, args)

    def _serves_unasked(self, backend: str, args: Sequence[Any], device: torch.device) -> bool:
        if backend in self._later and _is_refused_by_device(backend, device):
            return False
        return self._reason(backend, args) is None

    def choose(self, *args: Any, forced: str | None = None) -> str:
        """The backend that serves these arguments: the forced one, the one measured to be fastest, or the first that can.

        Raises:
            BackendError: the forced backend cannot, or none can.
        """
        if forced is not None:
            if self._reason(forced, args) is None:
                return forced
            raise BackendError(self._explain(forced, args))
        device = device_of(args)
        preferred = fastest(self.name, device)
        for backend in AUTOMATIC if preferred is None else (preferred, *AUTOMATIC):
            if self._serves_unasked(backend, args, device):
                return backend
        raise BackendError(self._explain(None, args))

    def not_automatic(self, backend: str, *args: Any) -> str | None:
        """Why the backend, though it can serve these arguments, is not the one chosen unasked; None if it is."""
        chosen = self.choose(*args)
        if chosen == backend:
            return None
        measured = fastest(self.name, device_of(args)) is not None
        why = f"{chosen} was measured to be faster on this device" if measured else f"not measured, {chosen} is chosen"
        return f"{why}; DITKERNELS_BACKEND={backend} asks for it"

    def _explain(self, forced: str | None, args: Sequence[Any]) -> str:
        asked = f"backend {forced!r} cannot serve" if forced else "no backend can serve"
        reasons = (f"{name}: {why or 'can serve'}" for name, why in self.reasons(*args).items())
        return f"{self.name}: {asked} ({'; '.join(reasons)})"

    def forget(self) -> None:
        """Drops what is remembered of calls."""
        self.memory.clear()
        self.newest = (None, None)


# ---- All ops ---------------------------------------------------------------------------------------------------------

OPS: dict[str, Op] = {}

_forgotten = 0


def forget() -> None:
    """Drops what is remembered of calls: a library was loaded, or a table has changed."""
    global _forgotten
    _forgotten += 1
    for op in OPS.values():
        op.forget()


def forgotten() -> int:
    """How many times ``forget`` was called: whoever remembers something by this number forgets along."""
    return _forgotten
