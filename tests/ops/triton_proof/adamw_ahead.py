"""The kernels of adamw_ema compiled for GPUs that are not there: spills, and what a thread moves at once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ditkernels.ops.optimizer import triton as kernels
from tools.kernel_proof.ahead import Compiled, recorded

F32, BF16 = torch.float32, torch.bfloat16


def compiled(capability: int, elements: int, gradient: torch.dtype, copied: bool) -> list[Compiled]:
    def tensors(dtype: torch.dtype = F32) -> list[torch.Tensor]:
        return [torch.empty(elements, dtype=dtype)]

    number = torch.zeros(())
    lists = (tensors(), tensors(gradient), tensors(), tensors(), [number], tensors())
    with recorded(capability) as found:
        kernels.update(*lists, tensors(BF16) if copied else [], number, number, 1e-4, 0.9, 0.999, 1e-8, 0.0, 0.9999)
    assert [kernel.name for kernel in found] == ["advance_steps", "update_chunks"]
    assert [kernel.spills for kernel in found] == [0, 0]
    return found


def moved(kernel: Compiled) -> dict[bool, Counter[int]]:
    """Bytes a thread loads and stores, by the width of the access; the table is read 8 bytes at a time, numbers 4."""
    found: dict[bool, Counter[int]] = {False: Counter(), True: Counter()}
    for access in kernel.accesses():
        found[access.store][access.bytes] += access.bytes
    return found


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("gradient, copied", [(F32, False), (BF16, True)])
def test_every_element_moves_in_128_bit_accesses(capability: int, gradient: torch.dtype, copied: bool) -> None:
    _, update = compiled(capability, 1152 * 24, gradient, copied)
    elements = kernels.BLOCK // (32 * kernels.TILE.warps)
    bytes_moved = moved(update)
    assert bytes_moved[False][16] == elements * (16 + gradient.itemsize)
    assert bytes_moved[True] == {16: elements * (16 + 2 * copied)}
    assert update.wide_instructions == sum(bytes_moved[store][16] for store in (False, True)) // 16


def test_weights_that_are_not_aligned_compile_to_narrow_accesses() -> None:
    _, update = compiled(90, 1001, F32, False)
    assert set(moved(update)[True]) == {4}
