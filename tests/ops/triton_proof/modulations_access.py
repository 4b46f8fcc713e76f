"""Vectors per token and by index on the triton backend, interpreted: what the kernels read and write, in any order of programs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.ops.test_adaln import BF16, F32, OPS
from tests.ops.test_modulations import make_inputs, run
from tests.ops.triton_proof.adaln_access import passes
from tools.kernel_proof.interpreted import reordered, shuffled, traced

# Reads and writes of (B, N, D) tensors with all vectors there: those of the op per sample, then of vectors per token and gradients.
PASSES = [
    ("modulate_norm", "tokens", 2 + 2, 3 + 1 + 1),
    ("gated_residual", "tokens", 3 + 1, 3 + 1 + 1),
    ("gated_residual_norm", "tokens", 4 + 3, 6 + 2 + 2),
    ("modulate_norm", "index", 2, 3),
    ("gated_residual", "index", 3, 3),
    ("gated_residual_norm", "index", 4, 6),
    ("gated_residual_norm", "shared", 4, 6),
]


@pytest.mark.parametrize("width", [100, 384])
@pytest.mark.parametrize("op, kind, forward, backward", PASSES)
def test_every_tensor_is_touched_once_per_pass(op: str, kind: str, forward: int, backward: int, width: int) -> None:
    inputs = make_inputs(op, kind, 2, 17, width, F32, BF16)
    with traced() as launches:
        run(op, inputs)
    counted = Counter()
    for launch in launches:
        counted["forward" if launch.kernel.startswith("forward_rows") else "backward"] += passes([launch], inputs["x"].shape)
    assert counted == {"forward": forward, "backward": backward}


def test_a_segment_is_a_view_and_costs_no_pass() -> None:
    inputs = make_inputs("gated_residual_norm", "segments", 2, 18, 100, F32, BF16)
    inputs |= {name: inputs[name].contiguous() for name in ("x", "branch")}
    with traced() as launches:
        run("gated_residual_norm", inputs)
    kernels = Counter(launch.kernel for launch in launches)
    assert kernels == {"forward_rows": 1, "backward_rows": 1, "add_chunks": 1, "add_samples": 1}
    assert sum(passes([launch], torch.Size((4, 9, 100))) for launch in launches) == 10


@pytest.mark.parametrize("width", [1152, 100])
@pytest.mark.parametrize("kind", ["tokens", "index of a sample"])
@pytest.mark.parametrize("op", OPS)
def test_no_program_depends_on_another(op: str, kind: str, width: int) -> None:
    """Disjoint writes, no reads of another program's writes, nothing outside the arguments, equal bits in any order."""
    inputs = make_inputs(op, kind, 2, 19 if width == 100 else 3, width, F32, BF16)
    with traced() as launches:
        straight = run(op, inputs)
    for launch in launches:
        assert not launch.writers_clash(), launch.kernel
        assert not launch.crosstalk(), launch.kernel
        assert launch.strays() == 0, launch.kernel
    with reordered(shuffled(0)):
        assert all(torch.equal(a, b) for a, b in zip(straight, run(op, inputs)))
