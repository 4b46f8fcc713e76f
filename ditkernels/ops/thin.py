"""The thin way: an eager call of plain tensors goes straight to the kernel, or to one autograd Function around it.

Checks and choice are remembered as a ``Plan`` by all that they read: types, shapes, dtypes and devices of the tensors, options, the
forced backend. A call that is none of the thin way's is handed to torch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx.proxy import TraceError

from ditkernels.ops import _native
from ditkernels.ops.backward import Thin, Whole, as_declared, gradients_of
from ditkernels.ops.choice import Implementation, Op, device_of
from ditkernels.ops.compiled import asked, said
from ditkernels.ops.context import (
    PLAIN,
    exporting_to_onnx,
    is_plain,
    profiler_enabled,
    refuse_forward_ad,
    refuse_kinds,
    watched_by_torch,
)
from ditkernels.ops.library import Kernel
from ditkernels.ops.settings import backend_setting
from ditkernels.ops.sharding import prepare
from ditkernels.reference import transformed

_MEMORY = 1024  # calls remembered an op

# ---- What is remembered of a call -------------------------------------------------------------------------------------


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
        op: CallableOp,
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
            self.formula = declaration.gradient.formula or as_declared  # type: ignore[union-attr]
            self.thin, self.whole = Thin(op, options, forced), Whole(op, options, forced or "auto")


class Composed:
    """As a plan, for a call that is made of other calls, which remember plans of their own."""

    function = public = None

    def __init__(self, make: Callable[..., Any], options: tuple[Any, ...], forced: str | None) -> None:
        self.options = options

        def kernel(*args: Any) -> Any:
            count = len(args) - len(options)
            return make(args[:count], options, forced or "auto")

        self.kernel = self.internal = kernel


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


class ThinFunction(torch.autograd.Function):
    """An op of the thin way; each has a subclass, so that the nodes of a graph bear the op's name."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> Any:
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        run = plan.kernel if not profiler_enabled() else plan.internal
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
            return (None, *gradients_of(plan.op, plan.whole, grads, read, plan.options, plan.wanted))
        return (None, *plan.formula(plan.thin, grads, read, plan.options, plan.wanted))


def _all_plain(grads: Sequence[Tensor | None]) -> bool:
    """Whether there are gradients, and none is of a kind that torch must handle."""
    some = False
    for grad in grads:
        if grad is not None:
            some = True
            if type(grad) not in PLAIN:
                return False
    return some


def _picker(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Takes the elements at these places, as ``operator.itemgetter`` does for two places or more."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[at] for at in places)


# ---- Calls -----------------------------------------------------------------------------------------------------------


class CallableOp(Op):
    """An op that is called as a public function calls it."""

    @cached_property
    def function(self) -> type[torch.autograd.Function]:
        """The autograd Function of the thin way."""
        return type("".join(word.capitalize() for word in self.name.split("_")), (ThinFunction,), {})

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
        try:
            for t in tensors:
                if t is None:
                    key.append(None)
                else:
                    key += t.__class__, t.shape, t.dtype, t.device, differentiable and t.requires_grad
            # Most calls are like the one before, and to compare is cheaper than to hash.
            newest, plan = self.newest
            is_new = newest != key
        except (RuntimeError, TraceError):  # some kinds of tensors have no shape, or cannot be compared
            refuse_kinds(self.name, *tensors)
            raise
        if is_new:
            plan = self._found(key, backend, tensors, options)
            if plan is None:
                return self._whole(backend, tensors, options)
        if plan.function is not None:
            return plan.function.apply(plan, *tensors)
        run = plan.kernel if not profiler_enabled() else plan.internal
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
        # A call that is made of others would displace the newest of these, which are calls of the same op.
        if not isinstance(plan, Composed):
            self.newest = (key, plan)
        return plan

    def _whole(self, backend: str | None, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> Any:
        """The call through torch's dispatcher."""
        prepare()
        refuse_kinds(self.name, *tensors)
        refuse_forward_ad(self.name, *tensors)
        declaration = self.declaration
        make = declaration.wider(tensors)
        if make is not None:
            return make(tensors, options, backend or "auto")
        if declaration.meaning is not None and (transformed() or exporting_to_onnx()):
            return self._meant(tensors, options)
        if declaration.keeps:
            needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
            options = (*options, needed)
        outputs = self.call(*tensors, *options, asked(backend))
        return outputs if declaration.public is None else outputs[declaration.public]

    def _meant(self, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> Any:
        """The call in plain PyTorch, which ``torch.func`` can transform."""
        declaration = self.declaration
        declaration.checked((*tensors, *options, *([False] if declaration.keeps else [])))
        assert declaration.meaning is not None
        return declaration.meaning(**dict(zip(declaration.arguments, (*tensors, *options))))

    def _plan(
        self, forced: str | None, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...], differentiable: bool
    ) -> Plan | Composed | None:
        """Checks the arguments and chooses; None where it has no gradient to give: torch's way refuses that."""
        make = self.declaration.wider(tensors)
        if make is not None:
            return Composed(make, options, forced)
        needed = tuple(differentiable and t is not None and t.requires_grad for t in tensors)
        if any(needed) and self.declaration.gradient is None:
            return None
        keep = (any(needed),) if self.declaration.keeps else ()
        args = (*tensors, *options, *keep)
        self.declaration.checked(args)
        chosen = self.choose(*args, forced=forced)
        if chosen == "torch" and forced is None and device_of(args).type == "cpu":
            _native.CPU.tell_of_absence()
        return Plan(self, self.implementation(chosen), (*options, *keep), tensors, needed, forced)
