"""For every subset of an op's inputs that need gradients: the gradients, what is saved for them, and that it is unpacked once."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ditkernels.ops import dispatch
from ditkernels.ops.dispatch import Op, WholeWay

Inputs = dict[str, "Tensor | None"]


def subsets(names: list[str]) -> Iterator[set[str]]:
    for count in range(1, len(names) + 1):
        yield from map(set, itertools.combinations(names, count))


def assert_every_subset(op: Op, function: Callable[..., Tensor], inputs: Inputs) -> None:
    """``function`` takes the inputs by name and calls ``op`` on them once; it returns one tensor.

    A kernel that plain PyTorch stands for on the thin way is looked at on the whole way alone.
    """
    chosen = op.implementations[op.choose(*[inputs.get(i.name) for i in op.declaration.inputs], forced=dispatch.backend_setting())]
    ways = (False, True) if chosen.plain is None else (True,)
    there = [name for name, value in inputs.items() if value is not None]
    want, _ = gradients(function, inputs, set(there), ways[0])
    for needed in subsets(there):
        names = op.declaration.saved([declared.name in needed for declared in op.declaration.inputs])
        kept = {output.name for output in op.declaration.outputs}
        expected = [name for name in names if name in kept or inputs.get(name) is not None]
        for watch in ways:
            got, saved = gradients(function, inputs, needed, watch)
            assert all(torch.equal(got[name], want[name]) for name in needed), needed
            assert len(saved) == len(expected), (needed, expected, [tuple(t.shape) for t, _ in saved])
            addresses = {tensor.data_ptr() for tensor, _ in saved}
            for name in set(expected) & inputs.keys():
                assert inputs[name].data_ptr() in addresses, (needed, name)
            assert [unpacked for _, unpacked in saved] == [1] * len(saved), needed


def gradients(
    function: Callable[..., Tensor], inputs: Inputs, needed: set[str], watch: bool = False
) -> tuple[dict[str, Tensor], list[tuple[Tensor, int]]]:
    """The gradients by name, and each saved tensor with how often it was unpacked."""
    saved: list[Tensor] = []
    unpacked: Counter[int] = Counter()

    def pack(tensor: Tensor) -> int:
        saved.append(tensor)
        return len(saved) - 1

    def unpack(index: int) -> Tensor:
        unpacked[index] += 1
        return saved[index]

    leaves = {n: None if v is None else v.detach().requires_grad_(n in needed) for n, v in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        if watch:
            with WholeWay():
                output = function(**leaves)
        else:
            output = function(**leaves)
    dy = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    order = sorted(needed)
    found = torch.autograd.grad(output, [leaves[name] for name in order], dy)
    return dict(zip(order, found)), [(tensor, unpacked[index]) for index, tensor in enumerate(saved)]
