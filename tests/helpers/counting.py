"""How often a model calls the norm family: what closes its residuals, and where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ditkernels import ops

CLOSING = ("modulate_norm", "gated_residual", "gated_residual_norm")


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts calls of the norm family's public functions."""
    calls = dict.fromkeys(CLOSING, 0)

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return function(*args, **options)

        return call

    with mock.patch.multiple(ops, **{name: counting(name, getattr(ops, name)) for name in CLOSING}):
        yield calls


def backwards(out: Tensor) -> dict[str, int]:
    """How often each op of the norm family stands, as an op, in the graph that autograd has recorded behind ``out``."""
    nodes = [out.grad_fn]
    for node in nodes:
        nodes.extend(n for n, _ in node.next_functions if n is not None and n not in nodes)
    names = Counter(node.name() for node in nodes)
    thin = {name: name.title().replace("_", "") + "Backward" for name in CLOSING}
    whole = {name: f"GeneratedBackwardFor_ditkernels_{name}_defaultBackward" for name in CLOSING}
    return {name: names[thin[name]] + names[whole[name]] for name in CLOSING}


class Graphs:
    """A backend of ``torch.compile`` that counts its graphs, and the calls of some ops in those that run."""

    def __init__(self, ops: tuple[str, ...] = CLOSING) -> None:
        self.calls = dict.fromkeys(ops, 0)
        self.compiled = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.compiled += 1
        targets = Counter(str(node.target) for node in graph.graph.nodes)

        def run(*args: Any) -> Any:
            for name in self.calls:
                self.calls[name] += targets[f"ditkernels.{name}.default"]
            return graph(*args)

        return run
