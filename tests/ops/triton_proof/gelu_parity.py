"""bias_gelu on the triton backend, interpreted: parity, what the kernels touch, far offsets, and planted faults that are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ditkernels import ops
from ditkernels.ops import dispatch
from ditkernels.ops.gelu import triton as kernels
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.helpers.faults import assert_found
from tests.ops.test_bias_gelu import (
    BF16,
    COVERING,
    F32,
    LAYOUTS,
    assert_parity,
    check_both_tails,
    check_repeats,
    make_inputs,
    poisoned,
    run,
)
from tools.kernel_proof.interpreted import guarded, in_place, reordered, shuffled, traced


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_parity(case: tuple, layout: str) -> None:
    assert_parity(make_inputs(*case, layout), cotangent=LAYOUTS[LAYOUTS.index(layout) - 1])


@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12)])
def test_nothing_in_gives_nothing_out_and_zero_gradients(shape: tuple[int, int, int]) -> None:
    _, _, dbias = run(ops.bias_gelu, make_inputs(shape, F32, F32))
    assert torch.equal(dbias, torch.zeros(12))


def test_both_tails() -> None:
    check_both_tails()


def test_repeats_bit_for_bit_and_writes_every_output() -> None:
    check_repeats()


@pytest.mark.parametrize("layout", ["packed", "channels apart"])
def test_every_element_is_touched_once_by_programs_that_share_nothing(layout: str) -> None:
    inputs = make_inputs((2, 70, 134), BF16, F32, layout)
    with traced() as launches:
        straight = run(ops.bias_gelu, inputs)
    expected = {
        "forward_tiles": {"x": (1, 0), "y": (0, 1)},
        "backward_tiles": {"x": (1, 0), "dy": (1, 0), "dx": (0, 1)},
        "add_samples": {},
    }
    assert [launch.kernel for launch in launches] == list(expected)
    for launch in launches:
        assert launch.strays() == 0, launch.kernel
        assert not launch.writers_clash(), launch.kernel
        assert not launch.crosstalk(), launch.kernel
        for name, times in expected[launch.kernel].items():
            for store, count in zip((False, True), times):
                assert (launch.counts(name, store=store) == count).all(), f"{launch.kernel}: {name}"
        big = {name for name, tensor in launch.tensors().items() if tensor.numel() >= 2 * 70 * 134}
        assert big == set(expected[launch.kernel])
    assert launches[1].programs > 2
    with reordered(shuffled(0)):
        assert all(map(torch.equal, run(ops.bias_gelu, inputs), straight))


def test_the_number_of_chunks_depends_on_the_shape_alone() -> None:
    for batch, length, width in [(1, 65536, 4608), (3, 7, 1), (256, 256, 96), (0, 5, 8), (1, 0, 8)]:
        chunks, rows = kernels.chunking(batch, length, width, 32)
        assert rows % 32 == 0
        assert (chunks - 1) * rows < max(length, 1) <= max(chunks, 1) * rows
    assert kernels.chunking(1, 65536, 4608, 32) == (114, 576)


@pytest.mark.parametrize("strides", [((1 << 31) + 8, 3, 1), (3, (1 << 31) + 8, 1), (3, 6, (1 << 30) + 24)])
def test_strides_beyond_2_to_the_31_elements(strides: tuple[int, int, int]) -> None:
    inputs = make_inputs((2, 2, 3), BF16, F32, "samples apart")
    want = run(ops.bias_gelu, inputs)
    extent = sum((n - 1) * s for n, s in zip((2, 2, 3), strides)) + 1
    far = torch.empty(extent, dtype=BF16).as_strided((2, 2, 3), strides).copy_(inputs["x"])
    with in_place(), guarded():
        got = run(ops.bias_gelu, {**inputs, "x": far})
    assert all(map(torch.equal, got, want))


def test_rows_beyond_2_to_the_31_elements() -> None:
    """Only the last program runs, so that of tensors of 4 GB only the end is ever used."""
    near = torch.randn(1, 1, 128).to(BF16)
    bias = torch.randn(128)
    x = torch.empty(1, 16_800_001, 128, dtype=BF16)
    assert x.numel() > 1 << 31
    x[0, -1] = near[0, 0]
    forward, backward = kernels.forward, kernels.backward
    with in_place(), guarded(), reordered(lambda programs: [programs - 1]):
        y, (dx, _) = forward(x, bias), backward(x, x, None, (BF16, None))
    assert torch.equal(y[0, -1], forward(near, bias)[0, 0])
    assert torch.equal(dx[0, -1], backward(near, near, None, (BF16, None))[0][0, 0])


def test_fp64_is_refused() -> None:
    with pytest.raises(dispatch.BackendError, match=r"torch\.float64 is not among"):
        ops.bias_gelu(torch.zeros(1, 2, 3, dtype=torch.float64))


MUTANTS = {
    "bias ignored": ("z += channels_of(bias", "z += 0.0 * channels_of(bias"),
    "half the steepness": ("double_u = 2.0 * ROOT", "double_u = ROOT"),
    "cube forgotten": ("(1.0 + KAPPA * z * z)\n", "(1.0 + KAPPA * z)\n"),
    "signs of the tails swapped": ("tl.where(double_u >= 0.0", "tl.where(double_u < 0.0"),
    "derivative of sigma from one sigma": ("nearer * farther", "farther"),
    "derivative of sigma without z": ("sigma + z * dsigma", "sigma + dsigma"),
    "derivative of the cube once": ("3.0 * KAPPA", "KAPPA"),
    "gradient ignored": ("d = gradient * (", "d = 1.0 * ("),
    "dx written where it is not wanted": ("if dx is not None:", "if partial is not None:"),
    "sum of the gradient alone": ("total += d", "total += gradient"),
    "rows beyond the chunk": ("mask_of(rows < last", "mask_of(rows >= 0"),
    "every chunk is the first": ("first = (chunk % chunks) * chunk_rows", "first = chunk * 0"),
    "the last chunk lost": ("tl.minimum(first + chunk_rows, N)", "tl.minimum(first + chunk_rows - 1, N)"),
    "sample forgotten": ("sample = (block // blocks)", "sample = (block * 0)"),
    "samples taken as one": ("if batch == 1 or any(", "if batch == 1 or all("),
    "one chunk's sums lost": ("(samples < batch) & inside", "(samples < batch - 1) & inside"),
    "masked columns": ("mask = live & (columns < D)", "mask = live & (columns < D - 1)"),
}


def check() -> None:
    inputs = make_inputs((2, 70, 130), F32, F32, "samples apart")
    with guarded(), poisoned():
        for cotangent in ("tokens first", "packed"):
            assert_parity(inputs, cotangent=cotangent)
        want = run(ops.bias_gelu, inputs)[2]
        bias = inputs["bias"].detach().requires_grad_()
        dy = make_inputs((2, 70, 130), F32, None, "packed", seed=7)["x"]
        assert torch.equal(torch.autograd.grad(ops.bias_gelu(inputs["x"], bias), bias, dy)[0], want)


def test_the_kernels_as_they_are_pass() -> None:
    check()


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_faults_are_found(name: str, tmp_path: Path) -> None:
    assert_found(kernels, MUTANTS[name], check, tmp_path)
