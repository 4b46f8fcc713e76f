"""Vectors shared, per segment, per token and by index on the CUDA kernels, run on the host by tests/ops/emulation."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.backends import emulated  # noqa: F401 (each test runs on it)
from tests.ops.test_adaln import BF16, F16, F32, OPS
from tests.ops.test_adaln_cuda import LARGE
from tests.ops.test_modulations import assert_parity, check_dshift_of_the_op, make_inputs, run
from tests.ops.triton_proof.modulations_access import PASSES
from tests.ops.triton_proof.modulations_parity import (  # noqa: F401 (they run here on the fixture above)
    test_gradient_through_one_output_alone,
    test_nothing_in_gives_nothing_out_and_zero_gradients,
    test_parity,
    test_some_gradients_alone,
    test_some_optional_arguments,
)
from tools.kernel_proof import emulated_cuda

OWN = {"gate", "shift", "scale", "dgate", "dshift", "dscale"}


@pytest.mark.parametrize("kind", ["tokens", "index of a sample"])
@pytest.mark.parametrize("width, dtype", [(384, BF16), (40, F16)])
@pytest.mark.parametrize("op", OPS)
def test_parity_of_vectorised_accesses(op: str, kind: str, width: int, dtype: torch.dtype) -> None:
    inputs = {n: v.contiguous() for n, v in make_inputs(op, kind, 2, 19, width, F32, dtype).items()}
    assert_parity(op, inputs, **({} if op == "gated_residual" else {"out_dtype": dtype}))


@pytest.mark.parametrize("width", [100, 384])
@pytest.mark.parametrize("op, kind, forward, backward", PASSES)
def test_every_tensor_is_touched_once_per_pass(op: str, kind: str, forward: int, backward: int, width: int) -> None:
    inputs = {n: v.contiguous() for n, v in make_inputs(op, kind, 3, 21, width, F32, BF16).items()}
    names = LARGE | (OWN if kind == "tokens" else set())
    with emulated_cuda.running(tracing=True) as emulation:
        run(op, inputs)
        counted = emulated_cuda.passes(emulation, names, 3 * 21 * width)
    assert counted == {"forward_rows": forward, "backward_rows": backward}


@pytest.mark.parametrize("kind", ["tokens", "index of a sample"])
@pytest.mark.parametrize("op", OPS)
def test_any_order_of_blocks_and_warps_gives_equal_bits(op: str, kind: str) -> None:
    inputs = make_inputs(op, kind, 2, 35, 100, F32, BF16)
    straight = run(op, inputs)
    for order in (1, 3):
        with emulated_cuda.running(tracing=True, order=order):
            assert all(map(torch.equal, straight, run(op, inputs)))


def test_dshift_of_the_op() -> None:
    check_dshift_of_the_op()
