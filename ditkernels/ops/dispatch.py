"""From a declaration to an op, and its registration with torch.

A call takes one of two ways, and both run the same kernels of compiled backends:

    thin     An eager call of plain tensors goes straight to the kernel, or to one autograd Function around it; with the torch
             backend and gradients it may go to plain PyTorch. Checks and choice are remembered by all that they read: types,
             shapes, dtypes and devices of the tensors, options, the forced backend.

    whole    Under torch.compile, export, modes, functorch and forward-mode AD, and for tensor subclasses and meta tensors, the
             call goes through ``torch.ops.ditkernels.<op>``, which those tools know how to handle.

Each file imports only from those above it:

    context.py     what torch has in force around a call        library.py    the library of torch.library, its schema language
    choice.py      an op and the choice of its backend          compiled.py   what torch.compile sees of an op
    backward.py    which kernel computes the gradients          sharding.py   what DTensors see of an op
    thin.py        the thin way                                 dispatch.py   the whole way: what an op is to torch
    exported.py    an exported program without our ops
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch._subclasses.functional_tensor import FunctionalTensorMode

from ditkernels.ops import _flops
from ditkernels.ops.backward import Whole, gradients_of, no_second_derivative
from ditkernels.ops.choice import (  # noqa: F401 (others import some of these from here)
    OPS,
    PREFERRED,
    BackendError,
    Implementation,
    Op,
    Refusal,
    fastest,
    forget,
)
from ditkernels.ops.compiled import fingerprint, opening, said  # noqa: F401 (as above)
from ditkernels.ops.context import (  # noqa: F401 (as above)
    WholeWay,
    autocast_dtype,
    certainly,
    compiled_alone,
    constant_when_traced,
    exporting_to_onnx,
    is_plain,
    refuse_forward_ad,
    refuse_kinds,
    refuse_tangents,
    watched_by_torch,
    without_autocast,
)
from ditkernels.ops.library import LIBRARY, define, define_op  # noqa: F401 (as above)
from ditkernels.ops.settings import (  # noqa: F401 (as above)
    ATTENTION_BACKENDS,
    BACKENDS,
    attention_setting,
    backend_setting,
    set_backend,
    use_backend,
)
from ditkernels.ops.spec import Declaration
from ditkernels.ops.thin import CallableOp


def declare(name: str, *, inputs: str, options: str = "", outputs: str, **rest: Any) -> CallableOp:
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


def register(declaration: Declaration) -> CallableOp:
    """Declares an op to torch with its checks, the choice of its backend and its fake kernel; ``declare`` adds the derivative."""
    op = OPS[declaration.name] = CallableOp(declaration)
    schema = declaration.schema.replace(") ->", ', str backend="") ->')
    define_op(declaration.name, schema, torch.Tag.pt2_compliant_tag)

    def dispatch(*args: Any) -> Any:
        *given, text = op.with_backend(args)
        declaration.checked(given)
        backend = op.choose(*given, forced=said(text) if text else backend_setting())
        return op.implementation(backend).internal(*given)

    def fake(*args: Any) -> Any:
        return declaration.fake(*op.with_backend(args)[:-1])

    LIBRARY.impl(declaration.name, dispatch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ditkernels::{declaration.name}", fake, lib=LIBRARY)
    torch.library.register_torch_dispatch(f"ditkernels::{declaration.name}", FunctionalTensorMode, opening(op), lib=LIBRARY)
    op.call = getattr(torch.ops.ditkernels, declaration.name).default
    _flops.register(op)
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
        made = gradients_of(op, ctx.call, grads, read, ctx.options, ctx.wanted)
        return (*made, *[None] * (len(declaration.options) + 1))

    _register_autograd(op, backward, setup_context)


def _register_autograd(op: Op, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """``torch.library.register_autograd``, which would drop a forward-mode tangent in silence, and a refusal before it."""
    made = make_autograd_impl(op.call, Info(backward, setup_context))

    def call(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level >= 0:
            flat = itertools.chain.from_iterable(a if isinstance(a, list) else (a,) for a in args)
            refuse_tangents(op.name, [a for a in flat if isinstance(a, Tensor)])
        return made(keyset, *args, **kwargs)

    LIBRARY.impl(op.name, call, "Autograd", with_keyset=True)


def _refuse_derivative(op: Op) -> None:
    """Makes the derivative of a backward op an error: without this torch would take it for zero, with a warning only."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(no_second_derivative(op.name))

    _register_autograd(op, backward, lambda ctx, inputs, output: None)
