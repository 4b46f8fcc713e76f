"""Counts the sites of adaLN that a model has, and those that run fused once it is accelerated.

A site is one norm, with its modulation if there is any, or one residual sum, with its gate if there is any, of the blocks and of
the layer in front of the output. Norms inside an attention are none. Two modulations of one norm are two sites.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ditkernels import ops

FUSED = {"modulate_norm": 1, "gated_residual": 1, "gated_residual_norm": 2, "final_layer": 1}
"""Sites in a call of each op; a norm of the branch is one more."""

_ADDS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_LAST = ("norm", "norm_out", "norm_final", "final_layer", "all_final_layer", "out_layer", "final_norm", "head")


class Sites(TorchFunctionMode):
    """Counts the sites of a model that is as it was written, while it runs on at least two samples.

    A residual sum is one of two tensors of (B, N, D), of the same shape, in a block's own forward. That of a product of normed rows
    and a shift is part of a modulation, and that of such a product and the stream is not: there a branch is normed before its gate.
    What has the class of a block in a list is a block.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.count = 0
        self._inside: list[tuple[str, nn.Module]] = []
        self._names = {id(module): name for name, module in model.named_modules()}
        listed = {name: type(module) for name, module in model.named_modules() if _is_listed(model, name)}
        self._blocks = {name for name, module in model.named_modules() if type(module) in listed.values()}
        self._modulated: list[Tensor] = []
        self._stream: list[Any] = []
        self._handles: list[Any] = []
        for module in model.modules():
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside or self._inside[-1][0] not in self._blocks:
            return result
        of_norm = any(value is known for value in args for known in self._modulated)
        if func in _PRODUCTS and of_norm:
            self._modulated.append(result)
        elif func in _ADDS and _is_sum(*args) and (not of_norm or any(value is known for value in args for known in self._stream)):
            self.count += 1
            self._stream.append(result)
        return result

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._inside.append((self._names[id(module)], module))
        if self._names[id(module)] in self._blocks:  # its stream may come from a norm in front of it
            self._modulated.clear()
            self._stream = list(args)
        if _is_norm(module) and self._counts():
            self.count += 2 if any("NormZeroX" in type(outer).__name__ for _, outer in self._inside[:-1]) else 1

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self._inside.pop()
        if _is_norm(module):
            self._modulated.append(result)

    def _counts(self) -> bool:
        """Whether a norm that is entered belongs to a block, and not to its attention, or to the last layer."""
        *outer, (name, _) = self._inside
        if any("ttention" in type(module).__name__ or "Attn" in type(module).__name__ for _, module in outer):
            return False
        in_block = any(path in self._blocks for path, _ in outer)
        return in_block or name.split(".")[0] in _LAST


def _is_listed(model: nn.Module, name: str) -> bool:
    """Whether a module stands in a list, as blocks do, or is the only thing in one that does."""
    parent, _, last = name.rpartition(".")
    if not last.isdigit():
        return last == "block" and _is_listed(model, parent)
    return isinstance(model.get_submodule(parent), nn.ModuleList) and any(_is_norm(m) for m in model.get_submodule(name).modules())


def _is_norm(module: nn.Module) -> bool:
    return (
        "Norm" in type(module).__name__ and not any(_is_norm(child) for child in module.children()) and not list(module.children())
    )


def _is_sum(*operands: Any) -> bool:
    first, second = (*operands, None, None)[:2]
    tensors = isinstance(first, Tensor) and isinstance(second, Tensor)
    return tensors and first.dim() >= 3 and first.shape == second.shape


@contextlib.contextmanager
def fused() -> Iterator[dict[str, int]]:
    """Counts the sites that run fused, by calls of the ops: ``sites`` in the mapping it gives."""
    counted = {"sites": 0}

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            counted["sites"] += FUSED[name] + ("branch_norm" in options)
            return function(*args, **options)

        return call

    with mock.patch.multiple(ops, **{name: counting(name, getattr(ops, name)) for name in FUSED}):
        yield counted
