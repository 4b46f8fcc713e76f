"""The CUDA kernel of split_qkv's backward, in the emulation: parity, traffic, order, offsets."""

from __future__ import annotations

import pytest
import torch

from ditkernels.ops import dispatch
from tests.helpers.backends import emulated  # noqa: F401 (each test runs on it)
from tests.ops.test_qkv import (
    BF16,
    F32,
    Shape,
    assert_parity,
    backward,
    check_far_strides,
    check_repeats,
    gradients,
    test_parity,  # noqa: F401 (it runs here on the fixture below)
)
from tools.kernel_proof import emulated_cuda


@pytest.mark.parametrize("heads, head_dim", [(16, 72), (6, 64)])
def test_parity_at_the_models_widths(heads: int, head_dim: int) -> None:
    for layout in ("packed", "heads first", "parts of one"):
        assert_parity(gradients((2, 5, 3, heads, head_dim), BF16, layout))


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 6), (2, 0, 2, 2, 6)])
def test_nothing_in_gives_nothing_out_and_zero_gradients(shape: Shape) -> None:
    dpacked, dbias = backward(gradients(shape, F32))
    assert dpacked.shape == shape
    assert torch.equal(dbias, torch.zeros(shape[2] * 12))


def test_repeats_bit_for_bit_and_writes_every_output() -> None:
    check_repeats()


@pytest.mark.parametrize("shape", [(2, 70, 3, 2, 72), (2, 70, 2, 3, 13)])
def test_every_element_is_touched_once_in_any_order_of_blocks(shape: Shape) -> None:
    parts = gradients(shape, F32, "heads first")
    straight = backward(parts)
    for order in range(2):
        with emulated_cuda.running(tracing=True, order=order) as emulation:
            assert all(map(torch.equal, backward(parts), straight))
            elements = parts[0].numel()
            read = emulated_cuda.passes(emulation, {"dq", "dk", "dv"}, elements)
            written = emulated_cuda.passes(emulation, {"dpacked"}, shape[2] * elements)
        assert (read, written) == ({"stack_rows": shape[2]}, {"stack_rows": 1})


@pytest.mark.parametrize("axis", range(4))
def test_strides_beyond_2_to_the_31_elements(axis: int) -> None:
    check_far_strides(axis)


def test_rows_beyond_2_to_the_31_elements() -> None:
    near = [torch.randn(1, 1, 1, 128).to(BF16) for _ in range(2)]
    far = [torch.empty(1, 8_400_001, 1, 128, dtype=BF16) for _ in range(2)]
    assert 2 * far[0].numel() > 1 << 31
    for part, row in zip(far, near):
        part[0, -1] = row[0, 0]
    with emulated_cuda.running(last_block_only=True):
        dpacked, _ = backward(far)
    assert torch.equal(dpacked[0, -1, 1], near[1][0, 0])


def test_fp64_is_refused() -> None:
    part = torch.zeros(1, 2, 1, 4, dtype=torch.float64)
    reasons = dispatch.OPS["split_qkv_backward"].reasons(None, part, part, F32)
    assert "torch.float64 is not among the kernels' dtypes" in str(reasons["cuda"])
