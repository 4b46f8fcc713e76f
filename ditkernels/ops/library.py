"""The library ``ditkernels`` of torch.library, and its schema language beside what our kernels take and return.

in a schema                  in a kernel
(0,), an empty tensor        None, for an output that is absent
int[] wanted, numbers        the dtypes of the wanted gradients, the last argument of a backward op
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditkernels.ops.spec import Declaration, decoded, encoded

Kernel = Callable[..., Any]

_LOADED_ONCE = "ditkernels was loaded once already in this process; restart it"

try:
    LIBRARY = torch.library.Library("ditkernels", "DEF")
except RuntimeError as error:  # torch holds on to what was declared when the modules that declared it have gone
    raise ImportError(_LOADED_ONCE) from error

# ---- Ops of the library ----------------------------------------------------------------------------------------------


def define(schema: str) -> None:
    """Declares a further op of a compiled library, ``name(Tensor x, ...) -> Tensor``."""
    name, bracket, rest = schema.partition("(")
    define_op(name, bracket + rest)


def define_op(name: str, schema: str, *tags: torch.Tag) -> None:
    """Declares an op to torch.

    Raises:
        ImportError: it was declared before, by a first import that was interrupted.
    """
    if hasattr(torch.ops.ditkernels, name):
        raise ImportError(_LOADED_ONCE)
    LIBRARY.define(name + schema, tags=tags)


# ---- Kernels in Python and ops of torch as each other ----------------------------------------------------------------


def boxed(declaration: Declaration, kernel: Kernel) -> Kernel:
    """A kernel as torch's schema language has it: ``wanted`` as numbers, (0,) for what is absent."""

    def run(*args: Any) -> Any:
        if declaration.is_backward:
            args = (*args[:-1], decoded(args[-1]))
        outputs = kernel(*args)
        if outputs is None or isinstance(outputs, Tensor):
            return outputs
        like = next(value for value in args if isinstance(value, Tensor))
        made = tuple(like.new_empty(0) if output is None else output for output in outputs)
        return made[0] if len(declaration.outputs) == 1 else made

    return run


def in_schema(declaration: Declaration, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a kernel in Python as torch's schema language has them."""
    return (*args[:-1], encoded(args[-1])) if declaration.is_backward else args


def unboxed(declaration: Declaration, call: Any, *rest: Any) -> Kernel:
    """An op of torch as a kernel in Python; ``rest`` are further arguments of the op."""

    def run(*args: Any) -> Any:
        outputs = call(*in_schema(declaration, args), *rest)
        return _absent_as_none((outputs,) if declaration.is_backward and isinstance(outputs, Tensor) else outputs)

    return run


def _absent_as_none(outputs: Any) -> Any:
    if outputs is None or isinstance(outputs, Tensor):
        return outputs
    return tuple(None if o.dim() == 1 and o.numel() == 0 else o for o in outputs)
