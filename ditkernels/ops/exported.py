"""What an exported program is without our ops: each as plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload

from ditkernels.ops.choice import OPS, Op


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """What ``ExportedProgram.run_decompositions`` takes to put plain PyTorch in the place of our ops, for a runtime without them.

    >>> exported.run_decompositions(ditkernels.ops.decompositions())        # other ops stay as they are
    >>> table = torch.export.default_decompositions()                       # or all becomes core ATen
    >>> table.update(ditkernels.ops.decompositions())

    Returns:
        a new dict from each op of a forward to a function of its arguments. Ops of a backward and of the optimizer are left out.
    """
    return {op.call: _decomposition(op) for op in OPS.values() if op.declaration.meaning is not None}


def _decomposition(op: Op) -> Callable[..., Any]:
    declaration = op.declaration

    def run(*args: Any, **kwargs: Any) -> Any:
        assert declaration.meaning is not None
        *given, _ = op.with_backend(args, kwargs)
        inputs = declaration.given(given[:-1] if declaration.keeps else given)
        outputs = declaration.meaning(**inputs)
        if not declaration.keeps:
            return outputs
        assert declaration.kept is not None
        kept = declaration.kept(**inputs) if given[-1] else declaration.fake(*given)[declaration.returned :]
        return (*(outputs if declaration.returned > 1 else (outputs,)), *kept)

    return run
