"""split_qkv's backward on the triton backend, interpreted: parity, what is touched, far offsets, planted faults that are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ditkernels.ops import dispatch
from ditkernels.ops.qkv import triton as kernels
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.helpers.faults import assert_found
from tests.ops.test_qkv import (
    BF16,
    COVERING,
    F32,
    LAYOUTS,
    assert_parity,
    backward,
    check_far_strides,
    check_repeats,
    gradients,
)
from tools.kernel_proof.interpreted import guarded, in_place, reordered, shuffled, traced


@pytest.mark.parametrize("index", range(len(COVERING)))
def test_parity(index: int) -> None:
    """Each layout in turn, and the one that is three further on."""
    shape, dtype, sums = COVERING[index]
    for apart in (0, 3):
        assert_parity(gradients(shape, dtype, LAYOUTS[(index + apart) % len(LAYOUTS)]), sums)


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 6), (2, 0, 2, 2, 6)])
def test_nothing_in_gives_nothing_out_and_zero_gradients(shape: tuple) -> None:
    dpacked, dbias = backward(gradients(shape, F32))
    assert dpacked.shape == shape
    assert torch.equal(dbias, torch.zeros(shape[2] * 12))


def test_repeats_bit_for_bit_and_writes_every_output() -> None:
    check_repeats()


@pytest.mark.parametrize("layout", ["packed", "each its own"])
def test_every_element_is_touched_once_by_programs_that_share_nothing(layout: str) -> None:
    parts = gradients((2, 70, 3, 2, 17), BF16, layout)
    with traced() as launches:
        straight = backward(parts)
    stacking, adding = launches
    assert (stacking.kernel, adding.kernel) == ("stack_tiles", "add_samples")
    for launch in launches:
        assert launch.strays() == 0, launch.kernel
        assert not launch.writers_clash(), launch.kernel
        assert not launch.crosstalk(), launch.kernel
    for name in ("dq", "dk", "dv"):
        assert (stacking.counts(name, store=False) == 1).all(), name
        assert not stacking.counts(name, store=True).any(), name
    for launch, name in ((stacking, "dpacked"), (stacking, "partial"), (adding, "out_0")):
        assert (launch.counts(name, store=True) == 1).all(), name
        assert not launch.counts(name, store=False).any(), name
    assert (adding.counts("terms", store=False) == 1).all()
    assert stacking.programs > 2
    with reordered(shuffled(0)):
        assert all(map(torch.equal, backward(parts), straight))


@pytest.mark.parametrize("axis", range(4))
def test_strides_beyond_2_to_the_31_elements(axis: int) -> None:
    with in_place(), guarded():
        check_far_strides(axis)


def test_rows_beyond_2_to_the_31_elements() -> None:
    """Only the last program runs, so that of tensors of 4 GB only the end is ever used."""
    near = [torch.randn(1, 1, 1, 128).to(BF16) for _ in range(2)]
    far = [torch.empty(1, 8_400_001, 1, 128, dtype=BF16) for _ in range(2)]
    assert 2 * far[0].numel() > 1 << 31
    for part, row in zip(far, near):
        part[0, -1] = row[0, 0]
    with in_place(), guarded(), reordered(lambda programs: [programs - 1]):
        dpacked, _ = kernels.backward(None, *far, F32)
    assert torch.equal(dpacked[0, -1, 1], near[1][0, 0])


def test_fp64_is_refused() -> None:
    with pytest.raises(dispatch.BackendError, match=r"torch\.float64 is not among"):
        backward(gradients((1, 2, 3, 1, 4), torch.float64))


MUTANTS = {
    "head's stride forgotten": ("(columns // HEAD) * source[3]", "(columns // HEAD) * HEAD"),
    "channel's stride forgotten": ("(columns % HEAD) * source[4]", "(columns % HEAD)"),
    "stride of one long head forgotten": ("return columns * source[4]", "return columns"),
    "heads taken as one": ("return heads * head_dim if together else head_dim", "return heads * head_dim"),
    "one part's heads decide": ("together = all(", "together = any("),
    "sample of a part dropped": ("source[0] + sample * source[1]", "source[0]"),
    "sample of the packed rows dropped": ("dpacked + (sample * N + rows)", "dpacked + (rows)"),
    "dk for dv": ("v = _read((dv, dv_b, dv_n, dv_h, dv_c)", "v = _read((dk, dk_b, dk_n, dk_h, dk_c)"),
    "dk for dq": ("q = _read((dq, dq_b, dq_n, dq_h, dq_c)", "q = _read((dk, dk_b, dk_n, dk_h, dk_c)"),
    "dk and dv swapped in the packed row": ("tl.store(out + begin_k, k", "tl.store(out + begin_k, v"),
    "the sum of dk for that of dv": ("total_v += v", "total_v += k"),
    "a sum beside its place": ("tl.store(sums + begin_v", "tl.store(sums + begin_k"),
    "rows beyond the chunk": ("mask_of(rows < last", "mask_of(rows >= 0"),
    "every chunk is the first": ("first = (chunk % chunks) * chunk_rows", "first = chunk * 0"),
    "the last chunk lost": ("tl.minimum(first + chunk_rows, N)", "tl.minimum(first + chunk_rows - 1, N)"),
    "sum of the last rows alone": ("total_q += q", "total_q = q"),
    "masked columns": ("mask = live & (columns < D)", "mask = live & (columns < D - 1)"),
}


def check() -> None:
    """Strides of its own for each part, samples that lie apart in one, a masked tile; then what is taken together."""
    with guarded():
        for layout in ("each its own", "channels apart"):
            assert_parity(gradients((2, 70, 3, 2, 65), F32, layout))


def test_the_kernels_as_they_are_pass() -> None:
    check()


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_faults_are_found(name: str, tmp_path: Path) -> None:
    assert_found(kernels, MUTANTS[name], check, tmp_path)
