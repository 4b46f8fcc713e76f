"""The host emulation itself: every fault it looks for is found, a sound kernel passes, and its counters count."""

from __future__ import annotations

import pytest
import torch

from ditkernels.ops import norm
from tools.kernel_proof import emulated_cuda

FAULTS = {
    "beyond_the_end": "write to memory out of bounds: byte 256 of 256",
    "before_the_start": "read from memory out of bounds: byte -4 of 256",
    "misaligned": "misaligned access to memory",
    "barrier_for_some": "a barrier not reached by all threads",
    "shuffle_without_a_lane": "a shuffle with missing lanes",
    "shuffle_of_half_a_warp": "a shuffle of part of a warp",
    "shared_memory_unwritten": "read of shared memory that nobody wrote: byte 12",
    "shared_memory_beyond_the_launch": "shared memory out of bounds: byte 256 of 256",
    "read_before_the_barrier": "read of shared memory that nobody wrote",
    "written_before_all_have_read": "two threads share memory without a barrier between them",
    "blocks_that_overlap": "memory: a block touches what another block wrote",
}


@pytest.mark.parametrize("kernel, words", FAULTS.items(), ids=FAULTS)
def test_a_fault_is_reported(kernel: str, words: str) -> None:
    with emulated_cuda.running(tracing=True) as emulation:
        assert f"{kernel}: {words}" in emulation.fault_of(kernel)


@pytest.mark.parametrize("order", range(4))
def test_a_sound_kernel_passes_in_any_order(order: int) -> None:
    with emulated_cuda.running(tracing=True, order=order) as emulation:
        assert emulation.fault_of("sound") == ""


def test_counters_count_elements_by_kernel_and_tensor() -> None:
    with emulated_cuda.running(tracing=True) as emulation:
        norm.modulate_norm(torch.ones(2, 3, 8), torch.ones(2, 8))
        counts = emulation.counts()
    assert counts["forward_rows", "x"] == (48, 0, {1: 48}, {})
    assert counts["forward_rows", "h"] == (0, 48, {}, {1: 48})
    assert counts["forward_rows", "shift"] == (48, 0, {3: 16}, {})


def test_every_kernel_is_registered_with_its_block_and_shared_memory() -> None:
    with emulated_cuda.running() as emulation:
        kernels = emulation.registered()
    names = {name.partition("<")[0] for name, _, _ in kernels}
    assert {"forward_rows", "backward_rows", "add_chunks", "add_samples", "embed", "final_rows"} <= names
    assert len({name for name, _, _ in kernels}) >= len(names)
    assert all(32 <= threads <= 1024 and 0 <= shared <= 160 * 1024 for _, threads, shared in kernels)
