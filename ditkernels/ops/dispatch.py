"""From a declaration to an op: its registration with torch, the choice of a backend with reasons, and the way a call takes.

A call takes one of two ways, and both run the same kernels of compiled backends:

    thin     An eager call of plain tensors goes straight to the kernel, or to one autograd Function around it; with the torch
             backend and gradients it may go to plain PyTorch. Checks and choice are remembered by all that they read: types,
             shapes, dtypes and devices of the tensors, options, the forced backend.

    whole    Under torch.compile, export, modes, functorch and forward-mode AD, and for tensor subclasses and meta tensors, the
             call goes through ``torch.ops.ditkernels.<op>``, which those tools know how to handle.

An op ``ditkernels::name`` chooses a backend and calls the internal op ``ditkernels::name_<backend>`` of the same schema, so that a
graph, a test or a profile shows which backend ran. The backward of an op is an op of its own and is dispatched in the same way.

Backends share one contract (inputs, outputs, what is saved for backward), so a forward may run on one and its backward on another.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from operator import itemgetter
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ditkernels._version import __version__
from ditkernels.ops import _triton
from ditkernels.ops.settings import (  # noqa: F401 (others import them from here)
    ATTENTION_BACKENDS,
    BACKENDS,
    attention_setting,
    backend_setting,
    remembered,
    set_backend,
    use_backend,
)
from ditkernels.ops.spec import Declaration, Wanted, decoded, encoded

AUTOMATIC = ["cpu", "triton", "cuda", "torch"]
"""The order in which ``auto`` asks the backends where ``PREFERRED`` says nothing."""

# The backend that was measured to be fastest, by compute capability and op, as in ("9.0", "modulate_norm"): "cuda".
# benchmarks/gpu/fastest.py rewrites what stands between the braces, from runs whose parity was green.
PREFERRED: dict[tuple[str, str], str] = {}

_Function = TypeVar("_Function", bound=Callable[..., Any])

_LOADED_ONCE = "ditkernels was loaded once already in this process; restart it"
_MEMORY = 1024  # calls remembered an op

try:
    _LIBRARY = torch.library.Library("ditkernels", "DEF")
except RuntimeError as error:  # torch holds on to what was declared when the modules that declared it have gone
    raise ImportError(_LOADED_ONCE) from error


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve; the message says why, and what the others say."""


# ---- Which way a call takes ------------------------------------------------------------------------------------------

_functorch = torch._C._functorch
_profiler_enabled = torch.autograd._profiler_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_in_function_mode = torch._C._is_torch_function_mode_enabled
_transform = torch._C._functorch.peek_interpreter_stack
_PLAIN = (Tensor, torch.nn.Parameter)


def refuse_forward_ad(name: str, *tensors: Tensor | None) -> None:
    """Raises NotImplementedError if a tensor carries a forward-mode tangent, which a custom op would silently drop.

    While Dynamo traces, tangents cannot be seen: it refuses wherever forward mode is on. Dynamo guards on the level, so that a
    compiled function asks again where it is called in forward mode.
    """
    if forward_ad._current_level < 0:
        return
    if torch.compiler.is_dynamo_compiling():
        raise NotImplementedError(_no_forward_mode(name))
    inside_jvp = any(interpreter.key() == _functorch.TransformType.Jvp for interpreter in _functorch.get_interpreter_stack() or ())
    if inside_jvp:
        raise NotImplementedError(_no_forward_mode(name))
    _refuse_tangents(name, [t for t in tensors if t is not None])


def _refuse_tangents(name: str, tensors: Sequence[Tensor]) -> None:
    # Where Dynamo has fallen back to eager for a caller, it starts again with this frame, and cannot see tangents here either.
    if torch.compiler.is_dynamo_compiling() or any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(_no_forward_mode(name))


def _no_forward_mode(name: str) -> str:
    return f"{name}: forward-mode differentiation is not supported; use ditkernels.reference.{name}"


def watched_by_torch() -> bool:
    """Whether a tool of torch looks at calls: a mode, a functorch transform, forward-mode AD."""
    return forward_ad._current_level >= 0 or _dispatch_modes() > 0 or _in_function_mode() or _transform() is not None


class WholeWay(TorchDispatchMode):
    """A mode that changes nothing: calls inside it take the whole way, and so run the kernels of every backend."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def is_plain(tensor: Tensor) -> bool:
    """Whether the thin way may take the tensor: it is of no subclass and holds data."""
    return type(tensor) in _PLAIN and not tensor.is_meta


def constant_when_traced(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result``, which would import all of Dynamo, a second's work, on ``import ditkernels``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype autocast would compute in on the tensor's device, or None where it is off or, as for fp64, leaves the tensor be."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device = "cpu" if tensor.is_cpu else tensor.device.type
    if device == "meta" or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast from touching products of a kernel, whose dtypes are settled."""
    if autocast_dtype(tensor) is None:
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


# ---- Under torch.compile ---------------------------------------------------------------------------------------------

_TRACED = (Tensor, FunctionalTensor)
_OPENED = ("triton", "torch")
"""Backends whose kernels a compiler sees from inside: launches, or plain PyTorch that it fuses."""
_DIRECT = ("cpu",)
"""Backends whose internal op stands in the graph, so that no Python of ours runs per call. Others stay the op that chooses."""


def asked(backend: str | None) -> str:
    """What a call says of its backend: its name or "auto", under torch.compile ``name:fingerprint``, and nothing in an export.

    So the setting, and which kernels it stands for, are in a graph before any compiler's cache looks at it.
    """
    if not torch.compiler.is_compiling():
        return backend or "auto"
    # Not is_exporting(), which Dynamo of torch 2.11 takes for True always.
    return "" if torch.compiler._is_exporting_flag else f"{backend or 'auto'}:{fingerprint()}"


def said(text: str) -> str | None:
    """The forced backend in what ``asked`` has said, None for none."""
    name = text.partition(":")[0]
    return None if name in ("", "auto") else name


@constant_when_traced
def fingerprint() -> str:
    """Stands for what decides which code an op runs: version and files of the ops, libraries, Triton, what was measured."""
    return _fingerprint()


@cache
def _fingerprint() -> str:
    digest = hashlib.sha256()
    for content in _files_of_ops():
        digest.update(content)
    from ditkernels.ops import _native

    libraries = (_native.cuda_library(), _native.cpu_library())
    facts = (__version__, sorted(PREFERRED.items()), *libraries, _triton.MISSING, _triton.INTERPRETED)
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:16]


def _files_of_ops() -> Iterator[bytes]:
    """The files that the modules of the ops were loaded from, in a folder or an archive: ``.py``, or ``.pyc`` without it."""
    package = __name__.rpartition(".")[0]
    for module in (sys.modules[name] for name in sorted(sys.modules) if name.startswith(package)):
        with suppress(AttributeError, OSError):  # a loader of another kind, which gives no files; the version is left
            yield module.__loader__.get_data(module.__file__)  # type: ignore[union-attr]


def _opening(op: Op) -> Callable[..., Any]:
    """What AOTAutograd runs in the place of the op while it traces a graph for torch.compile: the kernel that was chosen.

    An op that was called without ``setting:fingerprint``, by torch.export or through torch.ops, stays one op of the graph.
    """

    def rule(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if any(t not in _TRACED and not issubclass(t, FakeTensor) for t in types):
            return NotImplemented
        *given, text = op.with_backend(args, kwargs)
        if ":" in text:
            backend = op.choose(*given, forced=said(text))
            implementation = op.implementations[backend]
            if backend in _OPENED and not (backend == "triton" and _triton.INTERPRETED):
                with mode, _triton.traced():
                    return _boxed(op.declaration, implementation.kernel)(*given)
            if backend in _DIRECT and not implementation.internal._schema.is_mutable:
                return mode.__torch_dispatch__(implementation.internal, types, tuple(given), {})
        return mode.__torch_dispatch__(func, types, args, kwargs)

    return rule


# ---- Ops -------------------------------------------------------------------------------------------------------------

Kernel = Callable[..., Any]
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


def _absent_as_none(outputs: Any) -> Any:
    if outputs is None or isinstance(outputs, Tensor):
        return outputs
    return tuple(None if o.dim() == 1 and o.numel() == 0 else o for o in outputs)


def _device_of(args: Iterable[Any]) -> torch.device:
    """That of the first tensor, which may stand in a list; the CPU without one."""
    flat = itertools.chain.from_iterable(arg if isinstance(arg, (list, tuple)) else (arg,) for arg in args)
    return next((arg.device for arg in flat if isinstance(arg, Tensor)), torch.device("cpu"))


class Op:
    """An op of the package, and its backward where it has one.

    Attributes:
        declaration: what it takes and returns.
        implementations: by backend.
        backward: the op that computes gradients, or None.
        call: ``torch.ops.ditkernels.<name>``. Its last argument is the forced backend, "" for none.
    """

    def __init__(self, declaration: Declaration) -> None:
        self.declaration = declaration
        self.name = declaration.name
        self.implementations: dict[str, Implementation] = {}
        self.backward: Op | None = None
        self.call: Any = None
        self.memory: dict[Any, Plan] = {}
        self.newest: tuple[Any, Any] = (None, None)
        # A call reads these. Python 3.11 makes them under a lock that Dynamo does not trace, so they are made now.
        _ = declaration.keeps, declaration.returned, declaration.public

    # ------------------------------------------------------------------------------------------------------- kernels

    def implement(
        self, backend: str, *, refuse: Refusal = _willing, plain: Kernel | None = None
    ) -> Callable[[_Function], _Function]:
        """Decorates the kernel of a backend, which becomes the internal op ``ditkernels::<op>_<backend>``.

        An autograd Function in Python costs the host more than a few operations of torch do, so a backend that is made of
        those may name a ``plain`` function, which torch differentiates by itself.
        """

        def register(kernel: _Function) -> _Function:
            internal = f"{self.name}_{backend}"
            _define(internal, self.declaration.schema)
            _LIBRARY.impl(internal, _boxed(self.declaration, kernel), "CompositeExplicitAutograd")
            self._add(backend, kernel, refuse, plain)
            return kernel

        return register

    def implement_elsewhere(self, backend: str, *, refuse: Refusal) -> None:
        """Declares the internal op ``ditkernels::<op>_<backend>``; a compiled library, once loaded, supplies its kernels."""
        internal = f"{self.name}_{backend}"
        _define(internal, self.declaration.schema, torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"ditkernels::{internal}", self.declaration.fake, lib=_LIBRARY)
        self._add(backend, None, refuse)

    def _add(self, backend: str, kernel: Kernel | None, refuse: Refusal, plain: Kernel | None = None) -> None:
        internal = getattr(torch.ops.ditkernels, f"{self.name}_{backend}").default
        called = _through(self.declaration, internal) if kernel is None else kernel
        self.implementations[backend] = Implementation(called, internal, refuse, plain)
        self.forget()

    @property
    def gradients(self) -> Op:
        """The backward op."""
        assert self.backward is not None
        return self.backward

    @cached_property
    def function(self) -> type[torch.autograd.Function]:
        """The autograd Function of the thin way."""
        return type("".join(word.capitalize() for word in self.name.split("_")), (_ThinFunction,), {})

    def autocast_dtype(self, tensor: Tensor) -> torch.dtype | None:
        """As the function; but a compiled call in forward mode is refused before torch meets the tensor, with our sentence."""
        if forward_ad._current_level >= 0 and torch.compiler.is_dynamo_compiling():
            raise NotImplementedError(_no_forward_mode(self.name))
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
        implementation = self.implementations.get(backend)
        if implementation is None:
            return f"there is no {backend} kernel of this op"
        return implementation.refuse(self, args)

    def choose(self, *args: Any, forced: str | None = None) -> str:
        """The backend that serves these arguments: the forced one, the one measured to be fastest, or the first that can.

        Raises:
            BackendError: the forced backend cannot, or none can.
        """
        if forced is not None:
            if self._reason(forced, args) is None:
                return forced
            raise BackendError(self._explain(forced, args))
        preferred = fastest(self.name, _device_of(args))
        for backend in AUTOMATIC if preferred is None else (preferred, *AUTOMATIC):
            if self._reason(backend, args) is None:
                return backend
        raise BackendError(self._explain(None, args))

    def not_automatic(self, backend: str, *args: Any) -> str | None:
        """Why the backend, though it can serve these arguments, is not the one chosen unasked; None if it is."""
        chosen = self.choose(*args)
        if chosen == backend:
            return None
        measured = fastest(self.name, _device_of(args)) is not None
        why = f"{chosen} was measured to be faster on this device" if measured else f"not measured, {chosen} is chosen"
        return f"{why}; DITKERNELS_BACKEND={backend} asks for it"

    def _explain(self, forced: str | None, args: Sequence[Any]) -> str:
        asked = f"backend {forced!r} cannot serve" if forced else "no backend can serve"
        reasons = (f"{name}: {why or 'can serve'}" for name, why in self.reasons(*args).items())
        return f"{self.name}: {asked} ({'; '.join(reasons)})"

    # ---------------------------------------------------------------------------------------------------------- call

    def __call__(self, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...] = (), asked: str | None = None) -> Any:
        """Runs the op on its inputs and options, ``keep`` left out, and returns the outputs that are not kept.

        Args:
            asked: the backend that was forced earlier, "auto" for none, whatever is forced now; by default what is forced now.
        """
        backend = backend_setting() if asked is None else said(asked)
        if torch.compiler.is_compiling() or watched_by_torch():
            return self._whole(backend, tensors, options)
        differentiable = torch.is_grad_enabled()
        key: list[Any] = [backend, options]
        for t in tensors:
            if t is None:
                key.append(None)
            else:
                key += t.__class__, t.shape, t.dtype, t.device, differentiable and t.requires_grad
        # Most calls are like the one before, and to compare is cheaper than to hash.
        newest, plan = self.newest
        if newest != key:
            plan = self._found(key, backend, tensors, options)
            if plan is None:
                return self._whole(backend, tensors, options)
        if plan.function is not None:
            return plan.function.apply(plan, *tensors)
        run = plan.kernel if not _profiler_enabled() else plan.internal
        outputs = run(*tensors, *plan.options)
        return outputs if plan.public is None else outputs[plan.public]

    def _found(self, key: list[Any], backend: str | None, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> Any:
        """The plan remembered for a call, or a new one; None where torch must handle the call."""
        # Asked before anything is hashed: sizes of a subclass may be symbols, which have no hash.
        if not all(t is None or is_plain(t) for t in tensors):
            return None
        remembered_as = tuple(key)
        plan = self.memory.get(remembered_as)
        if plan is None:
            plan = self._plan(backend, tensors, options, torch.is_grad_enabled())
            if plan is None:
                return None
            if len(self.memory) >= _MEMORY:
                self.memory.clear()
            self.memory[remembered_as] = plan
        self.newest = (key, plan)
        return plan

    def forget(self) -> None:
        """Drops what is remembered of calls."""
        self.memory.clear()
        self.newest = (None, None)

    def _whole(self, backend: str | None, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> Any:
        """The call through torch's dispatcher."""
        refuse_forward_ad(self.name, *tensors)
        declaration = self.declaration
        if declaration.keeps:
            needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
            options = (*options, needed)
        outputs = self.call(*tensors, *options, asked(backend))
        return outputs if declaration.public is None else outputs[declaration.public]

    def _plan(
        self, forced: str | None, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...], differentiable: bool
    ) -> Plan | None:
        """Checks the arguments and chooses; None where it has no gradient to give: torch's way refuses that."""
        needed = tuple(differentiable and t is not None and t.requires_grad for t in tensors)
        if any(needed) and self.declaration.gradient is None:
            return None
        keep = (any(needed),) if self.declaration.keeps else ()
        args = (*tensors, *options, *keep)
        self.declaration.checked(args)
        chosen = self.choose(*args, forced=forced)
        if chosen == "torch" and forced is None and _device_of(args).type == "cpu":
            from ditkernels.ops import _native

            _native.CPU.tell_of_absence()
        return Plan(self, self.implementations[chosen], (*options, *keep), tensors, needed, forced)


OPS: dict[str, Op] = {}


def forget() -> None:
    """Drops what is remembered of calls: a library was loaded, or a table has changed."""
    _fingerprint.cache_clear()
    for op in OPS.values():
        op.forget()


def _boxed(declaration: Declaration, kernel: Kernel) -> Kernel:
    """A kernel as torch's schema language has it: ``wanted`` as numbers, (0,) for what is absent."""

    def boxed(*args: Any) -> Any:
        if declaration.is_backward:
            args = (*args[:-1], decoded(args[-1]))
        outputs = kernel(*args)
        if outputs is None or isinstance(outputs, Tensor):
            return outputs
        like = next(value for value in args if isinstance(value, Tensor))
        made = tuple(like.new_empty(0) if output is None else output for output in outputs)
        return made[0] if len(declaration.outputs) == 1 else made

    return boxed


def _in_schema(declaration: Declaration, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a kernel in Python as torch's schema language has them."""
    return (*args[:-1], encoded(args[-1])) if declaration.is_backward else args


def _through(declaration: Declaration, call: Any, *rest: Any) -> Kernel:
    """An op of torch as a kernel in Python; ``rest`` are further arguments of the op."""

    def through(*args: Any) -> Any:
        outputs = call(*_in_schema(declaration, args), *rest)
        return _absent_as_none((outputs,) if declaration.is_backward and isinstance(outputs, Tensor) else outputs)

    return through


def fastest(op: str, device: torch.device) -> str | None:
    """The backend that was measured to be fastest at ``op`` on a device of this kind, or None where that was not measured."""
    if not PREFERRED or device.type != "cuda":
        return None
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return PREFERRED.get((capability, op))


# ---- Backward, either way --------------------------------------------------------------------------------------------


class Whole:
    """Calls the backward op of an op through torch's dispatcher."""

    def __init__(self, op: Op, options: tuple[Any, ...], text: str) -> None:
        self.op, self.text = op, text
        names = op.declaration.gradient_options
        self.options = tuple(v for option, v in zip(op.declaration.options, options) if option.name in names)

    def __call__(self, grads: Sequence[Tensor | None], read: Sequence[Tensor | None], wanted: Wanted) -> Any:
        """The gradients that the backward op gives, None for those that are not wanted."""
        return self.run(self.op.gradients, *grads, *read, *self.options, wanted)

    def run(self, op: Op, *args: Any) -> Any:
        """An op on the backend that was forced around the forward; takes and returns what the op's kernels do."""
        return _through(op.declaration, op.call, self.text)(*args)

    def differentiate(self, op: Op, options: tuple[Any, ...], grads: Any, read: Any, wanted: Wanted) -> Sequence[Tensor | None]:
        """The gradients of all inputs of another op, for a formula that is made of ops."""
        return _gradients(op, self.of(op, options), grads, read, options, wanted)  # type: ignore[no-any-return]

    def of(self, op: Op, options: tuple[Any, ...]) -> Whole:
        """What calls the backward op of another op."""
        return Whole(op, options, self.text)


class Thin(Whole):
    """Calls the kernel of the backward op that was chosen the first time."""

    def __init__(self, op: Op, options: tuple[Any, ...], forced: str | None) -> None:
        super().__init__(op, options, forced or "auto")
        self.forced = forced
        self.chosen: dict[Any, Implementation] = {}
        self.others: dict[Any, Thin] = {}

    def __call__(self, grads: Sequence[Tensor | None], read: Sequence[Tensor | None], wanted: Wanted) -> Any:
        key = (wanted, *[grad is None for grad in grads])
        chosen = self.chosen.get(key)
        if chosen is not None and not _profiler_enabled():
            return chosen.kernel(*grads, *read, *self.options, wanted)
        return self._run_as(key, self.op.gradients, (*grads, *read, *self.options, wanted))

    def run(self, op: Op, *args: Any) -> Any:
        key = (op.name, *[(a.shape, a.dtype) if isinstance(a, Tensor) else a for a in args])
        return self._run_as(key, op, args)

    def of(self, op: Op, options: tuple[Any, ...]) -> Thin:
        other = self.others.get((op.name, options))
        if other is None:
            other = self.others[op.name, options] = Thin(op, options, self.forced)
        return other

    def _run_as(self, key: Any, op: Op, args: tuple[Any, ...]) -> Any:
        implementation = self.chosen.get(key)
        if implementation is None:
            given = _in_schema(op.declaration, args)
            op.declaration.checked(given)
            implementation = op.implementations[op.choose(*given, forced=self.forced)]
            self.chosen[key] = implementation
        if _profiler_enabled():
            return _through(op.declaration, implementation.internal)(*args)
        return implementation.kernel(*args)


def _as_declared(call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> Any:
    """The gradients of all inputs where the backward op gives them all."""
    return call(grads, read, wanted)


class _Refusing(torch.autograd.Function):
    """Hands gradients on that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, name: str, anchors: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tuple(None if t is None else t.view_as(t) for t in tensors[anchors:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(_no_second_derivative(ctx.name))


def _no_second_derivative(name: str) -> str:
    return f"ditkernels::{name} is not differentiable; for second derivatives use ditkernels.reference"


def _gradients(op: Op, call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> Any:
    """The gradients of all inputs."""
    if not any(grad is not None for grad in grads):
        return (None,) * len(wanted)
    gradient = op.declaration.gradient
    assert gradient is not None
    formula = gradient.formula or _as_declared
    if op.backward is not None or not torch.is_grad_enabled():
        return formula(call, grads, read, options, wanted)
    with torch.no_grad():
        made = formula(call, grads, read, options, wanted)
    return _Refusing.apply(f"{op.name}_backward", len(grads) + len(read), *grads, *read, *made)


# ---- The thin way ----------------------------------------------------------------------------------------------------


class Plan:
    """What is remembered of a call: the kernel that serves it, and what its backward saves, wants and runs.

    Attributes:
        function: the autograd Function, or None where no input needs a gradient or torch differentiates the kernel itself.
        wanted: for each input the dtype of its gradient, None where it needs none.
        pick_saved: takes what is saved from inputs and outputs.
        pick_read: takes what backward reads from what was saved and a None behind it, which stands for all else.
        public: of several outputs those that the public function returns; None where there is one output.
    """

    def __init__(
        self,
        op: Op,
        implementation: Implementation,
        options: tuple[Any, ...],
        tensors: tuple[Tensor | None, ...],
        needed: tuple[bool, ...],
        forced: str | None,
    ) -> None:
        declaration = op.declaration
        self.op, self.options = op, options
        self.kernel, self.internal = implementation.kernel, implementation.internal
        self.public = declaration.public
        self.function: type[torch.autograd.Function] | None = None
        if any(needed) and implementation.plain is not None:
            names = (*[i.name for i in declaration.inputs], *[o.name for o in declaration.options if o.name != "keep"])
            self.kernel, self.internal = _plain(implementation, names)
            self.public = None
        elif any(needed):
            self.function = op.function
            self.wanted = tuple(t.dtype if need and t is not None else None for t, need in zip(tensors, needed))
            saved = declaration.saved(needed)
            self.pick_saved = _picker([declaration.tensors.index(name) for name in saved])
            places = (saved.index(name) if name in saved else len(saved) for name in declaration.reads)
            self.pick_read = _picker(list(places))
            self.formula = declaration.gradient.formula or _as_declared  # type: ignore[union-attr]
            self.thin, self.whole = Thin(op, options, forced), Whole(op, options, forced or "auto")


def _plain(implementation: Implementation, names: tuple[str, ...]) -> tuple[Kernel, Kernel]:
    """The plain function of a backend as a kernel, and as a profile shows it."""
    plain, shown = implementation.plain, implementation.internal.name()
    assert plain is not None

    def kernel(*args: Any) -> Any:
        return plain(**dict(zip(names, args)))

    def internal(*args: Any) -> Any:
        with torch.profiler.record_function(shown):
            return kernel(*args)

    return kernel, internal


class _ThinFunction(torch.autograd.Function):
    """An op of the thin way; each has a subclass, so that the nodes of a graph bear the op's name."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> Any:
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        run = plan.kernel if not _profiler_enabled() else plan.internal
        outputs = run(*tensors, *plan.options)
        if plan.public is None:
            ctx.save_for_backward(*plan.pick_saved((*tensors, outputs)))
            return outputs
        ctx.save_for_backward(*plan.pick_saved((*tensors, *outputs)))
        return outputs[plan.public]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        plan: Plan = ctx.plan
        read = plan.pick_read((*ctx.saved_tensors, None))
        if torch.is_grad_enabled() or watched_by_torch() or not _all_plain(grads):
            return (None, *_gradients(plan.op, plan.whole, grads, read, plan.options, plan.wanted))
        return (None, *plan.formula(plan.thin, grads, read, plan.options, plan.wanted))


def _all_plain(grads: Sequence[Tensor | None]) -> bool:
    """Whether there are gradients, and none is of a kind that torch must handle."""
    some = False
    for grad in grads:
        if grad is not None:
            some = True
            if type(grad) not in _PLAIN:
                return False
    return some


def _picker(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Takes the elements at these places, as ``operator.itemgetter`` does for two places or more."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[at] for at in places)


# ---- The whole way: registration with torch.library, the only place that touches it ----------------------------------


def declare(name: str, *, inputs: str, options: str = "", outputs: str, **rest: Any) -> Op:
    """Declares ``ditkernels::name``, with its backward op if it has one, as ``spec.Declaration`` describes it."""
    op = register(Declaration.parse(name, inputs, options, outputs, **rest))
    gradient = op.declaration.gradient
    if gradient is not None:
        if gradient.by_op:
            op.backward = register(op.declaration.backward)
            _refuse_derivative(op.backward)
        _differentiate(op)
    else:
        _refuse_derivative(op)
    return op


def define(schema: str) -> None:
    """Declares a further op of a compiled library, ``name(Tensor x, ...) -> Tensor``."""
    name, bracket, rest = schema.partition("(")
    _define(name, bracket + rest)


def _define(name: str, schema: str, *tags: torch.Tag) -> None:
    """Declares an op to torch.

    Raises:
        ImportError: it was declared before, by a first import that was interrupted.
    """
    if hasattr(torch.ops.ditkernels, name):
        raise ImportError(_LOADED_ONCE)
    _LIBRARY.define(name + schema, tags=tags)


def register(declaration: Declaration) -> Op:
    op = OPS[declaration.name] = Op(declaration)
    schema = declaration.schema.replace(") ->", ', str backend="") ->')
    _define(declaration.name, schema, torch.Tag.pt2_compliant_tag)

    def dispatch(*args: Any) -> Any:
        *given, text = op.with_backend(args)
        declaration.checked(given)
        backend = op.choose(*given, forced=said(text) if text else backend_setting())
        return op.implementations[backend].internal(*given)

    def fake(*args: Any) -> Any:
        return declaration.fake(*op.with_backend(args)[:-1])

    _LIBRARY.impl(declaration.name, dispatch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ditkernels::{declaration.name}", fake, lib=_LIBRARY)
    torch.library.register_torch_dispatch(f"ditkernels::{declaration.name}", FunctionalTensorMode, _opening(op), lib=_LIBRARY)
    op.call = getattr(torch.ops.ditkernels, declaration.name).default
    if declaration.flops is not None:
        _register_flops(op, declaration.flops)
    return op


def _differentiate(op: Op) -> None:
    """Registers autograd for the op on the whole way; saves and computes what the thin way does."""
    declaration = op.declaration
    count = len(declaration.inputs)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *given, text = op.with_backend(inputs)
        needed = ctx.needs_input_grad[:count]
        outputs = output if isinstance(output, tuple) else (output,)
        values = dict(zip(declaration.tensors, (*given[:count], *outputs)))
        ctx.mark_non_differentiable(*outputs[declaration.returned :])
        ctx.set_materialize_grads(False)
        ctx.kept = not declaration.keeps or given[-1]
        ctx.saved = declaration.saved(needed)
        ctx.save_for_backward(*[values[name] for name in ctx.saved])
        ctx.wanted = tuple(t.dtype if need and t is not None else None for t, need in zip(given, needed))
        ctx.options = tuple(given[count:])
        ctx.call = Whole(op, ctx.options, text)

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if not ctx.kept:
            raise RuntimeError(f"{op.name}: called with keep=False, which keeps nothing for a backward")
        saved = dict(zip(ctx.saved, ctx.saved_tensors))
        read = [saved.get(name) for name in declaration.reads]
        grads = grads[: declaration.returned]
        made = _gradients(op, ctx.call, grads, read, ctx.options, ctx.wanted)
        return (*made, *[None] * (len(declaration.options) + 1))

    _register_autograd(op, backward, setup_context)


def _register_autograd(op: Op, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """``torch.library.register_autograd``, which would drop a forward-mode tangent in silence, and a refusal before it."""
    made = make_autograd_impl(op.call, Info(backward, setup_context))

    def call(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0:
            flat = itertools.chain.from_iterable(a if isinstance(a, list) else (a,) for a in args)
            _refuse_tangents(op.name, [a for a in flat if isinstance(a, Tensor)])
        return made(keyset, *args, **kwargs)

    _LIBRARY.impl(op.name, call, "Autograd", with_keyset=True)


def _refuse_derivative(op: Op) -> None:
    """Makes the derivative of a backward op an error: without this torch would take it for zero, with a warning only."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(_no_second_derivative(op.name))

    _register_autograd(op, backward, lambda ctx, inputs, output: None)


def _register_flops(op: Op, formula: Callable[..., int]) -> None:
    """Tells torch.utils.flop_counter how many FLOPs (2 per multiply-add) the products inside ``op`` cost."""
    from torch.utils.flop_counter import register_flop_formula

    def count(*args: Any, **rest: Any) -> int:
        return formula(op.declaration.given(args))

    register_flop_formula(getattr(torch.ops.ditkernels, op.name))(count)
