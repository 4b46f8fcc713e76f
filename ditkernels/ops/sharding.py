"""DTensors in the ops: torch gets the sharding rules, which follow from the declarations, when it first needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ditkernels.ops.choice import OPS, Op
from ditkernels.ops.context import constant_when_traced
from ditkernels.ops.spec import Rule

_known: set[str] = set()


@constant_when_traced
def prepare() -> None:
    """Registers the rules of all ops, once there can be DTensors; imports nothing before."""
    if "torch.distributed.tensor" in sys.modules and len(_known) < len(OPS):
        for name in OPS.keys() - _known:
            _register(OPS[name])
            _known.add(name)


def _register(op: Op) -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import register_sharding

    def rules(*args: Any, **kwargs: Any) -> list[Rule]:
        return op.declaration.rules(op.declaration.given(op.with_backend(args, kwargs)))

    register_sharding(op.call)(rules)
    torch_s = DTensor._op_dispatcher.sharding_propagator
    torch_s.op_strategy_funcs[op.call] = _finding_the_mesh(torch_s.op_strategy_funcs[op.call])
    # torch remembers what a rule has said by the tensors, and by what stands behind the first int of the schema. Ours reads more:
    # which tensors are None, which outputs are kept, which gradients are wanted.
    torch_s.op_to_schema_info[op.call] = replace(torch_s.op_to_schema_info[op.call], static_argnum=0)


def _finding_the_mesh(strategy: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Of torch 2.11, which asks the first argument for the mesh, also where that is None."""

    def found(schema: Any) -> Any:
        if schema.args_schema[0] is None:
            mesh = next(arg for arg in schema.args_schema if arg is not None).mesh
            schema.get_mesh_from_args = lambda: mesh
        return strategy(schema)

    return found
