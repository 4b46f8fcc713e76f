"""bias_gelu's kernels compiled for GPUs that are not there: spills, and the share of 128-bit accesses."""

from __future__ import annotations

import pytest
import torch

from ditkernels.ops.gelu import triton as kernels
from ditkernels.reference import SIZES
from tools.kernel_proof.ahead import Compiled, recorded
from tools.kernel_proof.machine_code import wide_shares

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOUCHED = {"forward_tiles": {"x", "y"}, "backward_tiles": {"dy", "x", "dx"}, "add_samples": set()}


def compiled(capability: int, width: int, dtype: torch.dtype, bias: torch.Tensor | None) -> list[Compiled]:
    x, dy = (torch.empty(2, 256, width, dtype=dtype) for _ in range(2))
    with recorded(capability) as found:
        kernels.forward(x, bias)
        kernels.backward(dy, x, bias, (dtype, None if bias is None else bias.dtype))
    for kernel in found:
        assert kernel.spills == 0, f"{kernel.name} spills"
    return found


@pytest.mark.parametrize(
    "capability, dtype, size",
    [(90, BF16, "XL"), (90, BF16, "S"), (90, F32, "XL"), (90, F16, "L"), (80, BF16, "XL"), (100, BF16, "XL")],
)
def test_no_spills_and_only_128_bit_accesses(capability: int, dtype: torch.dtype, size: str) -> None:
    width = 4 * SIZES[size]["hidden_size"]
    found = compiled(capability, width, dtype, torch.empty(width))
    assert [kernel.name for kernel in found] == list(TOUCHED)
    for kernel in found:
        assert wide_shares(kernel, TOUCHED[kernel.name]) == dict.fromkeys(TOUCHED[kernel.name], 1.0)


def test_odd_widths_and_absent_biases_compile() -> None:
    compiled(90, 1001, BF16, torch.empty(1001))
    assert [kernel.name for kernel in compiled(90, 4608, F32, None)] == ["forward_tiles", "backward_tiles"]
