"""The CUDA kernels of bias_gelu, in the emulation: parity, traffic, order, offsets."""

from __future__ import annotations

import pytest
import torch

from ditkernels import ops
from ditkernels.ops import dispatch
from ditkernels.ops.spec import encoded
from tests.helpers.backends import emulated  # noqa: F401 (each test runs on it)
from tests.ops.test_bias_gelu import (
    BF16,
    F16,
    F32,
    assert_parity,
    check_both_tails,
    check_repeats,
    make_inputs,
    run,
    test_every_subset_of_inputs_gets_its_gradients_and_saves_what_they_need,  # noqa: F401 (it runs here on the fixture below)
    test_parity,  # noqa: F401
)
from tools.kernel_proof import emulated_cuda


@pytest.mark.parametrize("dtype, bias", [(F32, F32), (BF16, F32), (F16, None)])
@pytest.mark.parametrize("width", [1536, 4608])
def test_parity_of_vectorised_accesses(width: int, dtype: torch.dtype, bias: torch.dtype | None) -> None:
    assert_parity(make_inputs((2, 5, width), dtype, bias))


def test_a_cotangent_of_another_dtype() -> None:
    x, bias = torch.randn(2, 5, 16), torch.randn(16)
    backward, wanted = torch.ops.ditkernels.bias_gelu_backward, encoded((F32, F32))
    for dtype in (BF16, F16):
        dy = torch.randn(2, 5, 16).to(dtype)
        for got, want in zip(backward(dy, x, bias, wanted), backward(dy.float(), x, bias, wanted)):
            assert torch.equal(got, want)


def test_both_tails_repeats_and_nothing() -> None:
    check_both_tails()
    check_repeats()
    _, _, dbias = run(ops.bias_gelu, make_inputs((2, 0, 12), F32, F32))
    assert torch.equal(dbias, torch.zeros(12))


@pytest.mark.parametrize("shape", [(2, 70, 136), (2, 70, 13)])
def test_every_element_is_touched_once_in_any_order_of_blocks(shape: tuple[int, int, int]) -> None:
    inputs = make_inputs(shape, F32, F32)
    straight = run(ops.bias_gelu, inputs)
    for order in range(2):
        with emulated_cuda.running(tracing=True, order=order) as emulation:
            assert all(map(torch.equal, run(ops.bias_gelu, inputs), straight))
            found = emulated_cuda.passes(emulation, {"x", "y", "dx", "dy"}, inputs["x"].numel())
        assert found == {"forward_tiles": 2, "backward_tiles": 3}


@pytest.mark.parametrize("width", [13, 136])
def test_only_what_is_wanted_is_computed(width: int) -> None:
    dy, x, bias = torch.randn(2, 70, width), torch.randn(2, 70, width).to(BF16), torch.randn(width)
    backward = torch.ops.ditkernels.bias_gelu_backward_cuda
    dx, dbias = backward(dy, x, bias, encoded((BF16, F32)))
    with emulated_cuda.running(tracing=True) as emulation:
        alone, nothing = backward(dy, x, bias, encoded((BF16, None)))
        assert {kernel for kernel, _ in emulation.counts()} == {"backward_tiles"}
    assert torch.equal(alone, dx)
    assert nothing.shape == (0,)
    with emulated_cuda.running(tracing=True) as emulation:
        nothing, alone = backward(dy, x, bias, encoded((None, F32)))
        assert emulated_cuda.passes(emulation, {"dy", "x", "dx"}, x.numel()) == {"backward_tiles": 2}
    assert torch.equal(alone, dbias)
    assert nothing.shape == (0,)
    # mlp has z, with its bias in it, and wants the bias' gradient all the same.
    z = x.float() + bias
    for got, want in zip(backward(dy, z, None, encoded((F32, F32))), (dx, dbias)):
        torch.testing.assert_close(got.float(), want.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("strides", [((1 << 31) + 8, 8, 1), (8, (1 << 31) + 8, 1), (3, 6, (1 << 28) + 24)])
def test_strides_beyond_2_to_the_31_elements(strides: tuple[int, int, int]) -> None:
    inputs = make_inputs((2, 2, 8), BF16, F32, "samples apart")
    want = run(ops.bias_gelu, inputs)
    extent = sum((n - 1) * s for n, s in zip((2, 2, 8), strides)) + 1
    far = torch.empty(extent, dtype=BF16).as_strided((2, 2, 8), strides).copy_(inputs["x"])
    assert all(map(torch.equal, run(ops.bias_gelu, {**inputs, "x": far}), want))


def test_rows_beyond_2_to_the_31_elements() -> None:
    near = torch.randn(1, 1, 512).to(BF16)
    x = torch.empty(1, 4_200_001, 512, dtype=BF16)
    assert x.numel() > 1 << 31
    x[0, -1] = near[0, 0]
    want = run(ops.bias_gelu, {"x": near})[0]
    with emulated_cuda.running(last_block_only=True):
        assert torch.equal(torch.ops.ditkernels.bias_gelu(x, None)[0, -1], want[0, 0])


def test_fp64_is_refused() -> None:
    x = torch.zeros(1, 2, 3, dtype=torch.float64)
    with pytest.raises(dispatch.BackendError, match=r"torch.float64 is not among the kernels' dtypes"):
        ops.bias_gelu(x)
