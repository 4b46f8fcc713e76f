"""Tells torch.utils.flop_counter how many FLOPs (2 per multiply-add) the products inside an op cost.

That module imports Triton, so it is not imported here. Whoever imports it finds the formulas of all ops in it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

from ditkernels.ops.choice import OPS, Op

_COUNTER = "torch.utils.flop_counter"


def register(op: Op) -> None:
    """Registers the formula of an op, if it has one, with a counter that is imported already."""
    counter = sys.modules.get(_COUNTER)
    if counter is not None:
        _register(counter, op)


def _register(counter: ModuleType, op: Op) -> None:
    formula = op.declaration.flops
    if formula is None:
        return

    def count(*args: Any, **rest: Any) -> int:
        return formula(op.declaration.given(args))

    counter.register_flop_formula(getattr(torch.ops.ditkernels, op.name))(count)


class _Finder(MetaPathFinder):
    """Finds the counter where it lies, and has it execute with the formulas behind it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _COUNTER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(counter: ModuleType) -> None:
            from ditkernels.ops import _triton

            with _triton.absent_if_broken():
                execute(counter)
            for op in OPS.values():
                _register(counter, op)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign, assignment]
        return spec


sys.meta_path.insert(0, _Finder())
