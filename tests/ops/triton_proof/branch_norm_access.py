"""The residual of a normed branch on the triton backend, interpreted: what the kernels read and write, in any order of programs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.ops.test_adaln import BF16, F32, run
from tests.ops.test_branch_norm import OPS, make_inputs, normed
from tests.ops.triton_proof.adaln_access import passes
from tools.kernel_proof.interpreted import reordered, shuffled, traced

# Reads and writes of (B, N, D) tensors: those of the ops without a branch norm.
PASSES = [("gated_residual", 3, 3), ("gated_residual_norm", 4, 6)]


@pytest.mark.parametrize("width", [100, pytest.param(384, marks=pytest.mark.slow)])
@pytest.mark.parametrize("op, forward, backward", PASSES)
def test_every_tensor_is_touched_once_per_pass(op: str, forward: int, backward: int, width: int) -> None:
    inputs = make_inputs(op, 2, 17, width, F32, BF16)
    with traced() as launches:
        run(normed(op), inputs)
    counted = Counter()
    for launch in launches:
        counted["forward" if launch.kernel.startswith("forward_rows") else "backward"] += passes([launch], inputs["x"].shape)
    assert counted == {"forward": forward, "backward": backward}


def test_a_branch_of_which_nothing_is_wanted_is_not_read() -> None:
    inputs = make_inputs("gated_residual_norm", 2, 17, 100, F32, BF16)
    inputs["x"].requires_grad_()
    with traced() as launches:
        torch.autograd.backward(normed("gated_residual_norm")(**inputs), [torch.ones_like(inputs["x"]) for _ in range(2)])
    backward = [launch for launch in launches if launch.kernel == "backward_rows"]
    assert passes(backward, inputs["x"].shape) == 4


@pytest.mark.parametrize("width", [pytest.param(1152, marks=pytest.mark.slow), 100])
@pytest.mark.parametrize("op", OPS)
def test_no_program_depends_on_another(op: str, width: int) -> None:
    """Disjoint writes, no reads of another program's writes, nothing outside the arguments, equal bits in any order."""
    inputs = make_inputs(op, 2, 19 if width == 100 else 3, width, F32, BF16)
    with traced() as launches:
        straight = run(normed(op), inputs)
    for launch in launches:
        assert not launch.writers_clash(), launch.kernel
        assert not launch.crosstalk(), launch.kernel
        assert launch.strays() == 0, launch.kernel
    with reordered(shuffled(0)):
        assert all(torch.equal(a, b) for a, b in zip(straight, run(normed(op), inputs)))
