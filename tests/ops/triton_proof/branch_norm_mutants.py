"""Every fault planted in what the Triton kernels do for a normed branch is found by the parity check."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditkernels.ops.norm import branch_norm_triton as kernels
from ditkernels.ops.norm import triton as beneath
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.helpers.faults import assert_found
from tests.ops.test_adaln import F32
from tests.ops.test_branch_norm import assert_parity, make_inputs
from tools.kernel_proof.interpreted import guarded

# What is replaced in the kernels' source, and by what.
MUTANTS = {
    "mean square of the head alone": ("squares += _squares(early_u)", "squares += 0.0 * _squares(early_u)"),
    "branch's eps dropped": ("tl.div_rn(squares, D * 1.0) + branch_norm[2]", "tl.div_rn(squares, D * 1.0)"),
    "branch's norm of another width": ("tl.rsqrt(tl.div_rn(squares, D * 1.0)", "tl.rsqrt(tl.div_rn(squares, HEAD * 1.0)"),
    "branch's statistics of one sample": ("_store(branch_norm[1], line", "_store(branch_norm[1], rows"),
    "branch not normed": ("normed = u.to(tl.float32) * r", "normed = u.to(tl.float32) + 0.0 * r"),
    "branch's weight ignored": ("normed *= channels_of(weight, columns", "normed *= 1.0 + 0.0 * channels_of(weight, columns"),
    "tail not normed": ("tail_u = _normed_branch(early_u, of_branch", "tail_u = _normed_branch(early_u, 1.0"),
    "statistics of another row": ("sample * N + start, line, live", "sample * N, line, live"),
    "statistics of the first sample": ("sample * N + start, line, live", "start, line, live"),
    "gate forgotten beside the weight": ("value *= channels_of(gate,", "value *= 1.0 + 0.0 * channels_of(gate,"),
    "weight forgotten beside the gate": ("value *= channels_of(weight,", "value *= 1.0 + 0.0 * channels_of(weight,"),
    "mean of the tail lost": ("along_u += _along(_through_gate(tail_d", "along_u += 0.0 * _along(_through_gate(tail_d"),
    "mean without the gate": ("_through_gate(d * u, gate, branch", "_through_gate(d * u, None, branch"),
    "mean not divided": ("along_u = tl.div_rn(along_u, D * 1.0)", "along_u = along_u + 0.0"),
    "branch's share not subtracted": ("_through_norm(through, u, of_branch", "_through_norm(through, 0.0 * u, of_branch"),
    "tail's share not subtracted": ("_through_norm(tail_through, tail_u", "_through_norm(tail_through, 0.0 * tail_u"),
    "T without the branch": ("            d *= u\n", "            d *= 1.0 + 0.0 * u\n"),
    "T of the tail without the branch": ("                tail_d *= tail_u\n", "                tail_d *= 1.0 + 0.0 * tail_u\n"),
    "T without a weight lost": ("                r += over_rows(d)\n", "                r += 0.0 * over_rows(d)\n"),
    "tail of T without a weight lost": (
        "                    tail_r += _folded(tail_d, ONE_WARP)\n        elif",
        "                    tail_r += 0.0 * _folded(tail_d, ONE_WARP)\n        elif",
    ),
    "T twice": ("of_gate and not (branch_norm and has_branch_bias)", "of_gate"),
    "every chunk starts at the first": ("first = (program % chunks) * chunk_rows", "first = 0 * chunk_rows"),
    "gate of another sample": ("gate = of_sample((gate, gate_b), sample)", "gate = of_sample((gate, gate_b), 0 * sample)"),
    "gradients of the branch's weight alone not made": ("or wanted[5]):", "):"),
}


def check() -> None:
    """Several samples and chunks, a masked tail, every vector and none, the gradient of the branch's weight alone."""
    with guarded():
        assert_parity("gated_residual_norm", make_inputs("gated_residual_norm", 2, 3, 7, F32, F32))
        assert_parity("gated_residual", make_inputs("gated_residual", 1, 17, 7, F32, F32))
        assert_parity("gated_residual", make_inputs("gated_residual", 2, 2, 7, F32, F32, "gate"))
        assert_parity("gated_residual_norm", make_inputs("gated_residual_norm", 2, 2, 7, F32, F32), "branch_weight")


def test_the_kernels_as_they_are_pass() -> None:
    check()


@pytest.mark.parametrize("name", MUTANTS)
def test_killed(name: str, tmp_path: Path) -> None:
    assert_found(kernels, MUTANTS[name], check, tmp_path, "contract", "OutOfBounds", "not finite", beneath=(beneath,))
