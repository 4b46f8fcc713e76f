"""The kernels of split_qkv's backward compiled for GPUs that are not there: spills, and the share of 128-bit accesses."""

from __future__ import annotations

import pytest
import torch

from ditkernels.ops.qkv import triton as kernels
from ditkernels.reference import SIZES
from tests.ops.test_qkv import gradients
from tools.kernel_proof.ahead import Compiled, recorded
from tools.kernel_proof.machine_code import wide_shares

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BIG = ("dq", "dk", "dv", "dpacked")


def compiled(capability: int, dtype: torch.dtype, heads: int, head_dim: int, layout: str, parts: int = 3) -> Compiled:
    """The kernel that stacks; neither it nor the one that adds spills."""
    *dq, dk, dv = gradients((2, 256, parts, heads, head_dim), dtype, layout)
    with recorded(capability) as found:
        kernels.backward(dq[0] if dq else None, dk, dv, F32)
    assert [kernel.name for kernel in found] == ["stack_tiles", "add_samples"]
    for kernel in found:
        assert kernel.spills == 0, f"{kernel.name} spills"
    return found[0]


@pytest.mark.parametrize(
    "capability, dtype, size",
    [(90, BF16, "XL"), (90, F32, "S"), (80, F16, "XL"), (100, BF16, "XL")],
)
def test_no_spills_and_only_128_bit_accesses(capability: int, dtype: torch.dtype, size: str) -> None:
    heads = SIZES[size]["num_heads"]
    kernel = compiled(capability, dtype, heads, SIZES[size]["hidden_size"] // heads, "packed")
    assert wide_shares(kernel, BIG) == dict.fromkeys(BIG, 1.0)


@pytest.mark.parametrize("layout", ["heads first", "parts of one"])
def test_heads_of_64_that_lie_apart_are_read_in_128_bit_accesses(layout: str) -> None:
    assert wide_shares(compiled(90, BF16, 6, 64, layout), BIG) == dict.fromkeys(BIG, 1.0)


def test_odd_heads_and_two_parts_compile() -> None:
    compiled(90, BF16, 5, 7, "each its own")
    kernel = compiled(90, F32, 16, 72, "packed", parts=2)
    assert wide_shares(kernel, BIG) == dict.fromkeys(BIG[1:], 1.0)
