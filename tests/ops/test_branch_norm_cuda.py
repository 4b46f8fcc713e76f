"""The residual of a normed branch on the CUDA kernels, run on the host by tests/ops/emulation."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.backends import emulated  # noqa: F401 (each test runs on it)
from tests.ops.test_adaln import BF16, F16, F32, run
from tests.ops.test_adaln_cuda import LARGE
from tests.ops.test_branch_norm import OPS, assert_parity, make_inputs, normed
from tests.ops.triton_proof.branch_norm_access import PASSES
from tests.ops.triton_proof.branch_norm_parity import (  # noqa: F401 (they run here on the fixture above)
    test_branch_eps_beside_a_mean_square_of_its_size,
    test_each_optional_argument_alone_and_all_but_one,
    test_gradient_through_one_output_alone,
    test_nothing_in_gives_nothing_out_and_zero_gradients,
    test_parity,
    test_some_gradients_alone,
)
from tools.kernel_proof import emulated_cuda


@pytest.mark.parametrize("width, dtype", [(384, BF16), (40, F16)])
@pytest.mark.parametrize("op", OPS)
def test_parity_of_vectorised_accesses(op: str, width: int, dtype: torch.dtype) -> None:
    inputs = {n: v.contiguous() for n, v in make_inputs(op, 2, 19, width, F32, dtype).items()}
    assert_parity(op, inputs, **({} if op == "gated_residual" else {"out_dtype": dtype}))


@pytest.mark.parametrize("width", [100, 384])
@pytest.mark.parametrize("op, forward, backward", PASSES)
def test_every_tensor_is_touched_once_per_pass(op: str, forward: int, backward: int, width: int) -> None:
    inputs = {n: v.contiguous() for n, v in make_inputs(op, 3, 21, width, F32, BF16).items()}
    with emulated_cuda.running(tracing=True) as emulation:
        run(normed(op), inputs)
        counted = emulated_cuda.passes(emulation, LARGE, 3 * 21 * width)
    assert counted == {"forward_rows": forward, "backward_rows": backward}


@pytest.mark.parametrize("op", OPS)
def test_any_order_of_blocks_and_warps_gives_equal_bits(op: str) -> None:
    inputs = make_inputs(op, 2, 35, 100, F32, BF16)
    straight = run(normed(op), inputs)
    for order in (1, 3):
        with emulated_cuda.running(tracing=True, order=order):
            assert all(map(torch.equal, straight, run(normed(op), inputs)))
