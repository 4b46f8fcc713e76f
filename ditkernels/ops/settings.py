"""What the user forces: a backend for a block, for the process, or by the environment.

Each thread and each async task has blocks of its own. torch.compile guards on all of it, so that a compiled function that is
called under another setting is compiled again. For that, what is read while Dynamo traces must be plain attributes and dicts: it
cannot trace ``ContextVar.get``, and guards on no ``os.environ``.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TypeVar

import torch

BACKENDS = ["cpu", "cuda", "triton", "torch"]
ATTENTION_BACKENDS = (
    "cudnn",
    "flash_attn_4",
    "flash_attn_3",
    "flash_attn_2",
    "xformers",
    "torch_flash",
    "torch_efficient",
    "plain",
)

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Forced:
    """What the innermost ``use_backend`` of this thread or async task forces; the object itself where none forces anything.

    The attributes read context variables through properties without Python code: Dynamo takes them for plain attributes.
    """

    OPS: ContextVar[Any] = ContextVar("ditkernels_ops")
    ATTENTION: ContextVar[Any] = ContextVar("ditkernels_attention")
    ops = property(OPS.get)
    attention = property(ATTENTION.get)


class _Process:
    """What ``set_backend`` forces."""

    ops: str | None = None
    attention: str | None = None


_forced = _Forced()
_process = _Process()
# What the blocks around the innermost one forced, for each thread and task.
_outer: ContextVar[tuple[tuple[Any, Any], ...]] = ContextVar("ditkernels_outer", default=())


class _Traced(threading.local):
    """What a block inside a compiled function forces, of each thread: Dynamo cannot set a ContextVar.

    A block is closed before the function ends, which leaves all as it was here.
    """

    def __init__(self) -> None:
        self.ops: str | None = None
        self.attention: str | None = None
        self.outer: Any = None


_traced = _Traced()


def _validated(name: str | None, allowed: Iterable[str], origin: str) -> str | None:
    if name is not None and name != "auto" and name not in allowed:
        raise ValueError(f"{origin}: unknown backend {name!r}, allowed are auto, {', '.join(allowed)}")
    return name


def _checked(ops: str | None, attention: str | None, origin: str) -> None:
    _validated(ops, BACKENDS, origin)
    _validated(attention, ATTENTION_BACKENDS, f"{origin}(attention)")


def set_backend(ops: str | None = None, *, attention: str | None = None) -> None:
    """Forces a backend in the whole process, in every thread and task, wherever ``use_backend`` says nothing.

    >>> ditkernels.set_backend("torch")

    Arguments and errors as of ``use_backend``.
    """
    _checked(ops, attention, "set_backend")
    _process.ops = ops or _process.ops
    _process.attention = attention or _process.attention


class use_backend:
    """Forces a backend inside a ``with`` block or in a decorated function, for the thread or async task that runs it.

    >>> with ditkernels.use_backend("triton", attention="plain"): ...
    >>> @ditkernels.use_backend("torch")
    ... def exact(x): ...

    Args:
        ops: "auto", "cpu", "cuda", "triton" or "torch"; None leaves the setting as it is.
        attention: "auto" or a backend of ``attention``; None leaves the setting as it is.

    Blocks nest, and one object may be entered many times. A forward inside the block takes its setting along to its backward,
    wherever that runs; ``remembered`` does so for a recomputation. The setting goes before ``set_backend``, and that before the
    environment variables DITKERNELS_BACKEND and DITKERNELS_ATTENTION_BACKEND. A backend that cannot serve a call makes that
    call raise ``BackendError``.

    Raises:
        ValueError: an unknown backend; the message lists the known ones.
    """

    def __init__(self, ops: str | None = None, *, attention: str | None = None) -> None:
        _checked(ops, attention, "use_backend")
        self.ops, self.attention = ops, attention

    def __enter__(self) -> use_backend:
        if torch.compiler.is_dynamo_compiling():
            before = (_traced.ops, _traced.attention)
            _traced.outer = (before, _traced.outer)
            _traced.ops = self.ops or before[0]
            _traced.attention = self.attention or before[1]
        else:
            _enter(self.ops or _forced.ops, self.attention or _forced.attention)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if torch.compiler.is_dynamo_compiling():
            before, _traced.outer = _traced.outer
            _traced.ops, _traced.attention = before
        else:
            _leave()

    def __call__(self, function: _Function) -> _Function:
        # The block is made anew at each call, since Dynamo of torch 2.11 enters only one that the traced function makes.
        ops, attention = self.ops, self.attention

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with use_backend(ops, attention=attention):
                return function(*args, **kwargs)

        return inside  # type: ignore[return-value]


def _enter(ops: Any, attention: Any) -> None:
    _outer.set((*_outer.get(), (_forced.ops, _forced.attention)))
    _Forced.OPS.set(ops)
    _Forced.ATTENTION.set(attention)


def _leave() -> None:
    *outer, (ops, attention) = _outer.get()
    _outer.set(tuple(outer))
    _Forced.OPS.set(ops)
    _Forced.ATTENTION.set(attention)


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def _no_contexts() -> Contexts:
    return nullcontext(), nullcontext()


def remembered(context_fn: Callable[[], Contexts] = _no_contexts) -> Contexts:
    """A ``context_fn`` of torch.utils.checkpoint: recomputes on the backends that were forced around the forward.

    >>> torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=ditkernels.ops.remembered)

    Args:
        context_fn: a further one, whose contexts are entered inside.
    """
    forward, again = context_fn()
    return forward, _Again(_forced.ops, _forced.attention, again)


class _Again:
    """What was forced once, forced again, and a context inside; may be entered many times."""

    def __init__(self, ops: Any, attention: Any, inside: AbstractContextManager[Any]) -> None:
        self.ops, self.attention, self.inside = ops, attention, inside

    def __enter__(self) -> None:
        _enter(self.ops, self.attention)
        self.inside.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        _leave()
        return self.inside.__exit__(*error)


# ---- What is in force ------------------------------------------------------------------------------------------------

# The dict below os.environ: reading it costs a tenth, and Dynamo guards on it.
_environment: dict[Any, Any] = os.environ._data  # type: ignore[attr-defined]
_OPS_VARIABLE = os.environ.encodekey("DITKERNELS_BACKEND")  # type: ignore[attr-defined]
_ATTENTION_VARIABLE = os.environ.encodekey("DITKERNELS_ATTENTION_BACKEND")  # type: ignore[attr-defined]


def _known(allowed: Iterable[str]) -> dict[Any, str | None]:
    encoded = os.environ.encodevalue  # type: ignore[attr-defined]
    return {encoded(""): None, encoded("auto"): None, **{encoded(name): name for name in allowed}}


_OPS_VALUES, _ATTENTION_VALUES = _known(BACKENDS), _known(ATTENTION_BACKENDS)


def _in_force(kind: str, key: Any, values: dict[Any, str | None], variable: str, allowed: Iterable[str]) -> str | None:
    name = getattr(_traced, kind) if torch.compiler.is_dynamo_compiling() else None
    if name is None:
        name = getattr(_forced, kind)
        if name is _forced:
            name = getattr(_process, kind)
    if name is not None:
        return None if name == "auto" else name
    value = _environment.get(key)
    if value is None:
        return None
    if value not in values:
        _validated(os.environ[variable], allowed, variable)
    return values[value]


def backend_setting() -> str | None:
    """The backend forced by ``use_backend``, ``set_backend`` or the environment variable DITKERNELS_BACKEND, or None for auto."""
    return _in_force("ops", _OPS_VARIABLE, _OPS_VALUES, "DITKERNELS_BACKEND", BACKENDS)


def attention_setting() -> str | None:
    """As :func:`backend_setting` for attention, with DITKERNELS_ATTENTION_BACKEND."""
    return _in_force(*("attention", _ATTENTION_VARIABLE, _ATTENTION_VALUES), *("DITKERNELS_ATTENTION_BACKEND", ATTENTION_BACKENDS))
