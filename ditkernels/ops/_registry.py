"""The only place that touches torch.library: declaration, fake kernels, autograd, and the choice of a backend with reasons.

An op ``ditkernels::name`` is one Python op. Its kernel chooses a backend and calls an internal op ``ditkernels::name_<backend>``
of the same schema, so that a profile, a graph or a test shows which backend ran. The backward of an op is an op of its own and
is dispatched in the same way.

Backends share one contract (inputs, outputs, what is saved for backward), so a forward may run on one and its backward on another.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ditkernels.ops import _measured

BACKENDS = ("cuda", "triton", "torch")
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

Refusal = Callable[..., "str | None"]
_Function = TypeVar("_Function", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("ditkernels", "DEF")


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve; the message says why, and what the others say."""


@dataclass
class Implementation:
    """One backend's kernel of an op; ``not_automatic`` says why it runs only where it is asked for or was measured fastest."""

    call: Callable[..., Any]
    refuse: Refusal
    not_automatic: str | None = None


@dataclass
class Op:
    """An op of the package.

    Attributes:
        name: its name in ``torch.ops.ditkernels``.
        schema: arguments and returns, in torch's schema language.
        check: raises ValueError or TypeError on arguments no backend can take; runs in the fake and in the real kernel.
        implementations: by backend.
    """

    name: str
    schema: str
    check: Callable[..., None]
    implementations: dict[str, Implementation] = field(default_factory=dict)

    @property
    def call(self) -> Any:
        return getattr(torch.ops.ditkernels, self.name).default

    def reasons(self, *args: Any) -> dict[str, str | None]:
        """For every backend: why it cannot serve these arguments, or None if it can."""
        return {backend: self._reason(backend, args) for backend in BACKENDS}

    def _reason(self, backend: str, args: tuple[Any, ...]) -> str | None:
        implementation = self.implementations.get(backend)
        if implementation is None:
            return f"there is no {backend} kernel of this op"
        return implementation.refuse(*args)

    def not_automatic(self, backend: str, *args: Any) -> str | None:
        """Why the backend, though it can serve these arguments, is not chosen unasked; None if it is."""
        implementation = self.implementations.get(backend)
        if implementation is None or implementation.not_automatic is None:
            return None
        winner = _measured.fastest(self.name, _device_of(args))
        if winner is None or winner == backend:
            return implementation.not_automatic if winner is None else None
        return f"{winner} was measured to be faster on this device; DITKERNELS_BACKEND={backend} asks for it"

    def choose(self, *args: Any) -> str:
        """The backend that serves these arguments: the forced one, or the first of ``BACKENDS`` that can.

        Raises:
            BackendError: the forced backend cannot, or none can.
        """
        forced = backend_setting()
        if forced is not None:
            reason = self._reason(forced, args)
            if reason is None:
                return forced
        else:
            for backend in BACKENDS:
                if self._reason(backend, args) is None and self.not_automatic(backend, *args) is None:
                    return backend
        raise BackendError(self._explain(forced, args))

    def _explain(self, forced: str | None, args: tuple[Any, ...]) -> str:
        asked = f"backend {forced!r} cannot serve" if forced else "no backend can serve"
        reasons = (f"{name}: {why or 'can serve'}" for name, why in self.reasons(*args).items())
        return f"{self.name}: {asked} ({'; '.join(reasons)})"


def _device_of(args: Iterable[Any]) -> torch.device:
    """That of the first tensor, which may stand in a list; the CPU without one."""
    flat = itertools.chain.from_iterable(arg if isinstance(arg, (list, tuple)) else (arg,) for arg in args)
    return next((arg.device for arg in flat if isinstance(arg, Tensor)), torch.device("cpu"))


OPS: dict[str, Op] = {}


def declare(name: str, schema: str, *, check: Callable[..., None], fake: Callable[..., Any]) -> Op:
    """Declares ``ditkernels::name`` with its fake kernel and its dispatch to backends.

    Args:
        schema: ``(Tensor x, ...) -> Tensor``; functional: nothing is mutated, no output aliases an input.
        check: raises on bad arguments.
        fake: returns empty tensors of the right shape, dtype and device.
    """
    op = OPS[name] = Op(name, schema, check)
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

    def dispatch(*args: Any) -> Any:
        check(*args)
        return op.implementations[op.choose(*args)].call(*args)

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    _LIBRARY.impl(name, dispatch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ditkernels::{name}", checked_fake, lib=_LIBRARY)
    return op


def define(schema: str) -> None:
    """Declares an internal op, ``name(Tensor x, ...) -> Tensor``; a compiled library, once loaded, supplies its kernels."""
    _LIBRARY.define(schema)


def implement(
    op: Op,
    backend: str,
    kernel: Callable[..., Any],
    *,
    refuse: Refusal | None = None,
    not_automatic: str | None = None,
) -> None:
    """Gives ``op`` a kernel for ``backend``, as the internal op ``ditkernels::<op>_<backend>`` of the same schema."""
    internal = f"{op.name}_{backend}"
    _LIBRARY.define(internal + op.schema)
    _LIBRARY.impl(internal, kernel, "CompositeExplicitAutograd")
    call = getattr(torch.ops.ditkernels, internal).default
    op.implementations[backend] = Implementation(call, refuse or (lambda *args: None), not_automatic)


def implement_elsewhere(op: Op, backend: str, *, refuse: Refusal, not_automatic: str | None = None) -> None:
    """Declares the internal op ``ditkernels::<op>_<backend>``; a compiled library, once loaded, supplies its kernels."""
    internal = f"{op.name}_{backend}"
    _LIBRARY.define(internal + op.schema)
    call = getattr(torch.ops.ditkernels, internal).default
    op.implementations[backend] = Implementation(call, refuse, not_automatic)


def differentiate(op: Op, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Registers autograd for ``op``; ``backward`` calls the op's backward op."""
    torch.library.register_autograd(
        f"ditkernels::{op.name}", backward, setup_context=setup_context, lib=_LIBRARY
    )


def refuse_double_backward(op: Op) -> None:
    """Makes the derivative of a backward op an error: without this torch would take it for zero, with a warning only."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"ditkernels::{op.name} is not differentiable; for second derivatives use ditkernels.reference"
        )

    torch.library.register_autograd(
        f"ditkernels::{op.name}", backward, setup_context=lambda ctx, inputs, output: None, lib=_LIBRARY
    )


def register_flops(op: Op, formula: Callable[..., int]) -> None:
    """Tells torch.utils.flop_counter how many FLOPs (2 per multiply-add) the products inside ``op`` cost.

    ``formula`` receives the op's arguments with shapes in place of tensors, and ``out_val``.
    """
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(getattr(torch.ops.ditkernels, op.name))(formula)


# ------------------------------------------------------------------------------------------------------------------
# What the user forces
# ------------------------------------------------------------------------------------------------------------------

# Process-wide rather than a context variable: backward runs on autograd's own threads and must see the same choice.
_settings: dict[str, str | None] = {"ops": None, "attention": None}


def _validated(name: str | None, allowed: Iterable[str], origin: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in allowed:
        raise ValueError(f"{origin}: unknown backend {name!r}, allowed are auto, {', '.join(allowed)}")
    return name


def backend_setting() -> str | None:
    """The backend forced by ``use_backend`` or by the environment variable DITKERNELS_BACKEND, or None for auto."""
    if _settings["ops"] is not None:
        return None if _settings["ops"] == "auto" else _settings["ops"]
    return _validated(os.environ.get("DITKERNELS_BACKEND"), BACKENDS, "DITKERNELS_BACKEND")


def attention_setting() -> str | None:
    """The attention backend forced by ``use_backend`` or by DITKERNELS_ATTENTION_BACKEND, or None for auto."""
    if _settings["attention"] is not None:
        return None if _settings["attention"] == "auto" else _settings["attention"]
    return _validated(
        os.environ.get("DITKERNELS_ATTENTION_BACKEND"), ATTENTION_BACKENDS, "DITKERNELS_ATTENTION_BACKEND"
    )


class use_backend:
    """Forces a backend, from here on or inside a ``with`` block.

    >>> ditkernels.use_backend("torch")                        # from here on
    >>> with ditkernels.use_backend("triton", attention="plain"): ...

    Args:
        ops: "auto", "cuda", "triton" or "torch"; None leaves the setting as it is.
        attention: "auto" or a backend of ``attention``; None leaves the setting as it is.

    The setting holds for the whole process and goes before the environment variables DITKERNELS_BACKEND and
    DITKERNELS_ATTENTION_BACKEND. A backend that cannot serve a call makes that call raise ``BackendError``.

    Raises:
        ValueError: an unknown backend; the message lists the known ones.
    """

    def __init__(self, ops: str | None = None, *, attention: str | None = None) -> None:
        _validated(ops, BACKENDS, "use_backend")
        _validated(attention, ATTENTION_BACKENDS, "use_backend(attention)")
        self._before = dict(_settings)
        if ops is not None:
            _settings["ops"] = ops
        if attention is not None:
            _settings["attention"] = attention

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _settings.update(self._before)


# ------------------------------------------------------------------------------------------------------------------
# What every public function asks first
# ------------------------------------------------------------------------------------------------------------------


def refuse_forward_ad(name: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError if a tensor carries a forward-mode tangent, which a custom op would silently drop."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    inside_jvp = any(
        interpreter.key() == torch._C._functorch.TransformType.Jvp
        for interpreter in torch._C._functorch.get_interpreter_stack() or ()
    )
    if inside_jvp or any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            f"{name}: forward-mode differentiation is not supported; use ditkernels.reference.{name}"
        )


def constant_when_traced(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result``, which would import all of Dynamo, a second's work, on ``import ditkernels``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype autocast would compute in on the tensor's device, or None where it is off or, as for fp64, leaves the tensor be."""
    device = tensor.device.type
    if device == "meta" or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
