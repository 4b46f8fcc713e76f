"""The CUDA kernels of adaln, run on the host by tests/emulation: parity, traffic, faults, refusals."""

from __future__ import annotations

from collections.abc import Iterator

import emulated_cuda
import pytest
import torch
from test_adaln import BF16, COVERING, F16, F32, F64, OPS, assert_parity, make_inputs, run

import ditkernels
from ditkernels.ops import _cuda, adaln
from ditkernels.ops import _registry as registry

LONGEST = 33
"""Three chunks of a sample: as much as parity needs of the covering set's longest rows."""


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if emulated_cuda.compiler() is None:
        pytest.skip("the emulation needs g++")
    monkeypatch.setattr(_cuda, "_absence", _cuda._absence)
    _cuda.load(emulated_cuda.library())
    with ditkernels.use_backend("cuda"):
        yield


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", COVERING, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c))
def test_parity(emulated: None, op: str, case: tuple) -> None:
    batch, length, width, stream, branch, norm = case
    options = {} if op == "gated_residual" else {"norm": norm, "out_dtype": branch}
    assert_parity(op, make_inputs(op, batch, min(length, LONGEST), width, stream, branch), **options)


@pytest.mark.parametrize(
    "present", ["none", "gate", "shift weight", "scale bias branch_bias", "gate branch_bias scale"]
)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("op", OPS)
def test_optional_arguments(emulated: None, op: str, norm: str, present: str) -> None:
    options = {} if op == "gated_residual" else {"norm": norm}
    assert_parity(op, make_inputs(op, 2, 19, 72, F32, F32, present), **options)


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16), (1, 1, 1), (2, 3, 2050)])
@pytest.mark.parametrize("op", OPS)
def test_awkward_shapes(emulated: None, op: str, shape: tuple[int, int, int]) -> None:
    options = {} if op == "gated_residual" else {"out_dtype": F16}
    assert_parity(op, make_inputs(op, *shape, F32, F16), **options)


def contiguous_inputs(op: str, batch: int, length: int, width: int) -> dict[str, torch.Tensor]:
    return {n: v.contiguous() for n, v in make_inputs(op, batch, length, width, F32, BF16).items()}


@pytest.mark.parametrize("width", [384, 768, 1024, 1152])
@pytest.mark.parametrize("op", OPS)
def test_the_wide_path(emulated: None, op: str, width: int) -> None:
    options = {} if op == "gated_residual" else {"out_dtype": BF16}
    assert_parity(op, contiguous_inputs(op, 2, 19, width), **options)


@pytest.mark.parametrize("width", [100, 384])
@pytest.mark.parametrize("op", OPS)
def test_each_large_tensor_is_touched_once(emulated: None, op: str, width: int) -> None:
    inputs = contiguous_inputs(op, 3, 21, width)
    options = {} if op == "gated_residual" else {"out_dtype": BF16}
    emulated_cuda.reset_counts()
    run(lambda **leaves: getattr(adaln, op)(**leaves, **options), inputs)
    once = {
        "modulate_norm": {"x": (1, 0), "h": (0, 1), "dh": (1, 0), "x1": (1, 0), "dx": (0, 1)},
        "gated_residual": {"x": (1, 0), "x1": (0, 1), "branch": (2, 0), "dx1": (1, 0), "dbranch": (0, 1)},
        "gated_residual_norm": {
            **{"x": (1, 0), "x1": (1, 1), "h": (0, 1), "branch": (2, 0), "dx1": (1, 0), "dh": (1, 0)},
            **{"dx": (0, 1), "dbranch": (0, 1)},
        },
    }[op]
    counts = emulated_cuda.counts()
    large = {n: c for n, c in counts.items() if n in ("x", "x1", "h", "branch", "dx1", "dh", "dx", "dbranch")}
    elements = 3 * 21 * width
    assert large == {n: (read * elements, written * elements) for n, (read, written) in once.items()}


@pytest.mark.parametrize("op", OPS)
def test_repeats_bit_for_bit_and_writes_every_output(emulated: None, op: str) -> None:
    inputs = make_inputs(op, 2, 33, 100, BF16, BF16)
    first = run(getattr(adaln, op), inputs)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        second = run(getattr(adaln, op), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(
    "kernel, words",
    [
        ("beyond_the_end", "write to memory out of bounds"),
        ("barrier_for_some", "a barrier not reached by all threads"),
        ("shuffle_without_a_lane", "a shuffle with missing lanes"),
        ("shared_memory_unwritten", "read of shared memory that nobody wrote: element 3"),
    ],
)
def test_the_emulation_reports(emulated: None, kernel: str, words: str) -> None:
    assert f"{kernel}: {words}" in emulated_cuda.fault_of(kernel)
    assert emulated_cuda.fault_of("sound") == ""


def test_refusals_name_what_came(emulated: None) -> None:
    for x, words in (
        (torch.zeros(1, 2, 8, dtype=F64), "torch.float64 is not among the kernels' dtypes"),
        (torch.zeros(1, 1, 4100), "a row of 4100 channels is wider than a block"),
    ):
        with pytest.raises(registry.BackendError, match=words):
            adaln.modulate_norm(x)
    with pytest.raises(registry.BackendError, match=r"branch is torch.bfloat16 and out_dtype torch.float32"):
        adaln.gated_residual_norm(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8, dtype=BF16), out_dtype=F32)


def test_cuda_is_not_chosen_unasked(emulated: None) -> None:
    x = torch.zeros(1, 2, 8)
    arguments = (x, None, None, None, None, "layernorm", 1e-6, F32)
    assert adaln.MODULATE_NORM.choose(*arguments) == "cuda"
    with ditkernels.use_backend("auto"):
        assert adaln.MODULATE_NORM.choose(*arguments) != "cuda"
        assert adaln.MODULATE_NORM.reasons(*arguments)["cuda"] is None
        assert "not measured" in str(adaln.MODULATE_NORM.not_automatic("cuda"))


def test_without_the_library_the_reason_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "_absence", None)
    monkeypatch.setenv("DITKERNELS_CUDA_LIBRARY", "/nowhere/_C.so")
    _cuda.load_if_present()
    with (
        ditkernels.use_backend("cuda"),
        pytest.raises(registry.BackendError, match=r"/nowhere/_C.so does not load"),
    ):
        adaln.modulate_norm(torch.zeros(1, 2, 8))
