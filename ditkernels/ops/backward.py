"""Backward, on either way: which kernel computes the gradients of an op, and what refuses to be differentiated twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ditkernels.ops.choice import Implementation, Op
from ditkernels.ops.context import profiler_enabled
from ditkernels.ops.library import in_schema, unboxed
from ditkernels.ops.spec import Wanted


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
        return unboxed(op.declaration, op.call, self.text)(*args)

    def differentiate(self, op: Op, options: tuple[Any, ...], grads: Any, read: Any, wanted: Wanted) -> Sequence[Tensor | None]:
        """The gradients of all inputs of another op, for a formula that is made of ops."""
        return gradients_of(op, self.of(op, options), grads, read, options, wanted)  # type: ignore[no-any-return]

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
        if chosen is not None and not profiler_enabled():
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
            given = in_schema(op.declaration, args)
            op.declaration.checked(given)
            implementation = op.implementation(op.choose(*given, forced=self.forced))
            self.chosen[key] = implementation
        if profiler_enabled():
            return unboxed(op.declaration, implementation.internal)(*args)
        return implementation.kernel(*args)


def as_declared(call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> Any:
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
        raise NotImplementedError(no_second_derivative(ctx.name))


def no_second_derivative(name: str) -> str:
    """The message of a refusal to differentiate a backward op."""
    return f"ditkernels::{name} is not differentiable; for second derivatives use ditkernels.reference"


def gradients_of(op: Op, call: Whole, grads: Any, read: Any, options: Any, wanted: Wanted) -> Any:
    """The gradients of all inputs."""
    if not any(grad is not None for grad in grads):
        return (None,) * len(wanted)
    gradient = op.declaration.gradient
    assert gradient is not None
    formula = gradient.formula or as_declared
    if op.backward is not None or not torch.is_grad_enabled():
        return formula(call, grads, read, options, wanted)
    with torch.no_grad():
        made = formula(call, grads, read, options, wanted)
    return _Refusing.apply(f"{op.name}_backward", len(grads) + len(read), *grads, *read, *made)
