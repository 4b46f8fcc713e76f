"""adaLN ops on the triton backend, interpreted: what the kernels read and write, in any order of programs, at any offset."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from ditkernels.ops import _triton, dispatch, norm
from ditkernels.ops._triton import Tile
from ditkernels.ops.norm import triton as kernels
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.ops.test_adaln import BF16, F32, OPS, make_inputs, run
from tools.kernel_proof.interpreted import Launch, guarded, in_place, load_sources, reordered, shuffled, traced

ALL = "gate shift scale branch_bias weight bias"
# Reads and writes of (B, N, D) tensors, forward and backward, with these vectors present.
PASSES = [
    ("modulate_norm", ALL, 2, 3),
    ("modulate_norm", "none", 2, 3),
    ("gated_residual", ALL, 3, 3),
    ("gated_residual", "gate", 3, 3),
    ("gated_residual", "branch_bias", 3, 1),
    ("gated_residual_norm", ALL, 4, 6),
    ("gated_residual_norm", "gate shift scale", 4, 6),
    ("gated_residual_norm", "weight bias", 4, 4),
]
# Reads and writes in the backward with all vectors present, where only these inputs need gradients.
NEEDS = [
    ("modulate_norm", "x", 3),
    ("modulate_norm", "scale", 2),
    ("modulate_norm", "weight bias", 2),
    ("modulate_norm", "shift bias", 0),
    ("gated_residual", "x", 0),
    ("gated_residual", "branch", 2),
    ("gated_residual", "gate", 2),
    ("gated_residual", "branch_bias", 1),
    ("gated_residual_norm", "x", 4),
    ("gated_residual_norm", "branch", 4),
    ("gated_residual_norm", "x branch", 5),
    ("gated_residual_norm", "gate", 4),
    ("gated_residual_norm", "branch_bias", 3),
    ("gated_residual_norm", "scale weight", 2),
    ("gated_residual_norm", "shift", 0),
]


def passes(launches: list[Launch], shape: tuple[int, ...]) -> int:
    """Checks that a (B, N, D) tensor is read once and wholly, or written so, or left alone; returns how many are touched."""
    total = 0
    for launch in launches:
        for name, tensor in launch.tensors().items():
            if tuple(tensor.shape) != shape:
                assert tensor.numel() < shape.numel(), f"{launch.kernel}: {name} is a (B, N, D) temporary"
                continue
            for store in (False, True):
                counts = launch.counts(name, store=store).unique().tolist()
                assert counts in ([0], [1]), f"{launch.kernel}: {name} is touched {counts} times"
                total += counts[0]
    return total


@pytest.mark.parametrize(
    "op, present, forward, backward, width, length",
    [(*case, 100, 17) for case in PASSES] + [(*case, width, 5) for case in PASSES if case[1] == ALL for width in (384, 768, 1152)],
)
def test_every_tensor_is_touched_once_per_pass(op: str, present: str, forward: int, backward: int, width: int, length: int) -> None:
    inputs = make_inputs(op, 2, length, width, F32, BF16, present)
    with traced() as launches:
        run(getattr(norm, op), inputs)
    counted = Counter()
    for launch in launches:
        kind = "forward" if launch.kernel == "forward_rows" else "backward"
        counted[kind] += passes([launch], inputs["x"].shape)
    assert counted == {"forward": forward, "backward": backward}


@pytest.mark.parametrize("op, needs, backward", NEEDS)
def test_a_backward_touches_what_the_wanted_gradients_need(op: str, needs: str, backward: int) -> None:
    inputs = make_inputs(op, 2, 17, 100, F32, BF16)
    leaves = {n: v.detach().requires_grad_(n in needs.split()) for n, v in inputs.items()}
    outputs = getattr(norm, op)(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    with traced() as launches:
        torch.autograd.grad(outputs, [leaves[n] for n in needs.split()], [torch.randn_like(o) for o in outputs])
    assert passes(launches, inputs["x"].shape) == backward


@pytest.mark.parametrize("op", OPS)
def test_without_gradients_no_statistics_are_written(op: str) -> None:
    with traced() as launches:
        getattr(norm, op)(**make_inputs(op, 2, 17, 100, F32, BF16))
    (launch,) = launches
    assert launch.arguments["stats"] is None
    written = [name for name in launch.tensors() if launch.counts(name, store=True).any()]
    assert written == [name for name in ("x1", "h") if launch.arguments[name] is not None]


@pytest.mark.parametrize("width", [1152, 100])
@pytest.mark.parametrize("op", OPS)
def test_no_program_depends_on_another(op: str, width: int) -> None:
    """Disjoint writes, no reads of another program's writes, nothing outside the arguments, equal bits in any order."""
    inputs = make_inputs(op, 2, 19, width, F32, BF16) if width == 100 else make_inputs(op, 2, 3, width, F32, F32)
    with traced() as launches:
        straight = run(getattr(norm, op), inputs)
    for launch in launches:
        assert not launch.writers_clash(), launch.kernel
        assert not launch.crosstalk(), launch.kernel
        assert launch.strays() == 0, launch.kernel
    assert max(launch.programs for launch in launches if launch.kernel == "backward_rows") > 1
    for seed in range(2):
        with reordered(shuffled(seed)):
            assert all(torch.equal(a, b) for a, b in zip(straight, run(getattr(norm, op), inputs)))


def test_the_number_of_chunks_depends_on_the_shape_alone_and_fills_a_gpu() -> None:
    for batch, length, rows in [
        (1, 256, 1),
        (256, 256, 1),
        (7, 1024, 2),
        (3, 17, 2),
        (2000, 5, 1),
        (0, 5, 1),
    ]:
        chunks, chunk_rows = kernels.chunking(batch, length, rows)
        assert chunk_rows % rows == 0
        assert (chunks - 1) * chunk_rows < length <= chunks * chunk_rows
    assert kernels.chunking(256, 256, 1) == (4, 64)
    assert kernels.chunking(1, 256, 1) == (16, 16)


# ---- Offsets beyond 2^31 ---------------------------------------------------------------------------------------------

FAR = 1 << 31

# Tensors of more than 2^31 elements, of whose memory only the rows that the last programs touch are ever used.
FAR_SHAPES = {"far row": (1, 131_200, 16384), "far sample": (1_400_000, 16, 96)}


def last(programs: int) -> list[int]:
    return [programs - 1]


def norm_there_and_back(kernels: dict, tensors: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    """x1, h, dx, dbranch of gated_residual_norm."""
    x, branch, dx1, dh = tensors
    gate, shift, scale = vectors
    nothing = (None, None, None)
    x1, h, stats = kernels["gated_residual_norm"](x, branch, gate, shift, scale, *nothing, "layernorm", 1e-6, BF16, True)
    wanted = (*[BF16] * 5, *nothing)
    dx, dbranch, *_ = kernels["gated_residual_norm_backward"](
        dx1, dh, x1, branch, gate, scale, *nothing, stats, "layernorm", wanted
    )
    return [x1, h, dx, dbranch]


def check_rows_beyond(kernels: dict, batch: int, length: int, width: int) -> None:
    """The last row of tensors of more than 2^31 elements gives the bits that the same row gives in small tensors."""
    generator = torch.Generator().manual_seed(0)
    near = [torch.randn(1, 1, width, generator=generator).to(BF16) for _ in range(4)]
    tensors = [torch.empty(batch, length, width, dtype=BF16) for _ in near]
    assert tensors[0].numel() > FAR + width
    for tensor, rows in zip(tensors, near):
        tensor[-1, -1] = rows[0, 0]
    vectors = [torch.randn(1, width, generator=generator) for _ in range(3)]
    expected = norm_there_and_back(kernels, near, vectors)
    with in_place(), guarded(), reordered(last):
        got = norm_there_and_back(kernels, tensors, [v.expand(batch, width) for v in vectors])
    for name, far, small in zip(("x1", "h", "dx", "dbranch"), got, expected):
        assert torch.equal(far[-1, -1], small[0, 0]), name


def check_strides_beyond(kernels: dict) -> None:
    """Tensors and vectors whose samples, rows or channels lie more than 2^31 elements apart give the bits of packed ones."""
    generator = torch.Generator().manual_seed(0)
    packed = [torch.randn(2, 2, 3, generator=generator).to(BF16) for _ in range(4)]
    vectors = [torch.randn(2, 3, generator=generator).to(BF16) for _ in range(3)]
    expected = norm_there_and_back(kernels, packed, vectors)
    spread_vectors = [spread(v, (FAR + 8, 1)) for v in vectors]
    for strides in ((FAR + 8, 3, 1), (3, FAR + 8, 1), (3, 6, FAR // 2 + 24)):
        with in_place(), guarded():
            got = norm_there_and_back(kernels, [spread(t, strides) for t in packed], spread_vectors)
        assert all(map(torch.equal, got, expected)), strides


def spread(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    extent = sum((n - 1) * s for n, s in zip(tensor.shape, strides)) + 1
    return torch.empty(extent, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


def check_sums_beyond(kernels: object) -> None:
    """Partial sums and samples' terms of more than 2^31 elements: the last ones are found and added."""
    samples, width, columns = 6_000_000, 96, 96
    partial = torch.empty(samples, 1, 4, width)
    partial[-1, 0] = torch.arange(4.0).unsqueeze(1) + 1
    gate, scale = (torch.zeros(1, width).expand(samples, width) for _ in range(2))
    dgate, dshift, dscale = (torch.empty(samples, width) for _ in range(3))
    weight, bias, branch_bias = (torch.zeros(width) for _ in range(3))
    terms = torch.empty(samples, 3, width)
    assert partial.numel() > FAR
    with in_place(), guarded(), reordered(last):
        _triton.launch(
            kernels.add_chunks,
            samples,
            Tile(1, 4),
            partial.device,
            *(partial, 1, gate, 0, scale, 0, branch_bias, weight, bias, dgate, dshift, dscale, terms),
            **{"D": width, "SUM_P": 0, "SUM_Q": 1, "SUM_R": 2, "SUM_S": 3, "SUMS": 4},
            **{"OF_WEIGHT": True, "OF_BIAS": True, "OF_BRANCH_BIAS": True, "COLUMNS": columns + 32},
        )
    assert [t[-1, -1].item() for t in (dshift, dgate)] == [1, 3]

    samples, width = 44_000, 16384
    terms = torch.empty(samples, 3, width)
    assert terms.numel() > FAR
    terms[-1, -1, -32:] = 5
    outs = [torch.empty(width) for _ in range(3)]
    with in_place(), guarded(), reordered(last):
        _triton.launch(
            kernels.add_samples,
            width // 32,
            Tile(1, 4),
            terms.device,
            *(terms, samples, *outs),
            D=width,
            KINDS=3,
            SAMPLES=1024,
            COLUMNS=32,
        )
    assert outs[2][-32:].tolist() == [5] * 32


KERNELS = {
    name: dispatch.OPS[name].implementations["triton"].kernel for name in ("gated_residual_norm", "gated_residual_norm_backward")
}


@pytest.mark.parametrize("shape", FAR_SHAPES.values(), ids=FAR_SHAPES)
def test_rows_beyond_2_to_the_31_elements(shape: tuple[int, int, int]) -> None:
    check_rows_beyond(KERNELS, *shape)


def test_strides_beyond_2_to_the_31_elements() -> None:
    check_strides_beyond(KERNELS)


def test_sums_beyond_2_to_the_31_elements() -> None:
    check_sums_beyond(kernels)


def test_kernels_with_32_bit_offsets_would_be_found(tmp_path: Path) -> None:
    narrow, copies = load_sources(kernels, lambda s: s.replace("tl.int64", "tl.int32"), tmp_path)
    for shape in FAR_SHAPES.values():
        with pytest.raises((InterpreterError, AssertionError)):
            check_rows_beyond(narrow, *shape)
    with pytest.raises((InterpreterError, AssertionError)):
        check_strides_beyond(narrow)
    with pytest.raises((InterpreterError, AssertionError)):
        check_sums_beyond(copies[kernels.__name__])
