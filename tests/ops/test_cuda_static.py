"""The machine code of the CUDA kernels: no spills, vectorised accesses, no TF32; compiled for GPUs that are not there.

Every kernel for Hopper, a sample for Ampere and Blackwell; ``-m slow`` takes every kernel for all three. The table that goes with
it is printed by ``python -m benchmarks.predicted.static_report``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools import build_native
from tools.kernel_proof import cuda_code, machine_code

pytestmark = pytest.mark.skipif(cuda_code.why_not() is not None, reason=str(cuda_code.why_not()))

FAMILIES = ("norm", "optimizer", "gelu", "image", "qkv")
ROWS = {"registers", "spills", "threads", "arch", "backend", "kernel"}


def assert_sound(rows: list[dict[str, Any]]) -> None:
    """What is asked of every kernel."""
    assert rows
    for row in rows:
        name = f"{row['kernel']} on {row['arch']}"
        assert row.keys() >= ROWS
        assert 0 < row["registers"] <= 255, name
        assert row["spills"] == 0, f"{name} spills"
        assert row["tf32"] == 0, f"{name} rounds to TF32"
        if row["wide"]:
            assert row["wide_fraction"], f"{name}: no access to a big tensor found"
        for tensor, share in row["wide_fraction"].items():
            assert share >= machine_code.WIDE_SHARE, f"{name}: {share:.0%} of {tensor} in 128-bit accesses"


@pytest.mark.parametrize("family", FAMILIES)
def test_proof_of_every_kernel_on_hopper(family: str) -> None:
    assert_sound(cuda_code.rows(family, "90a"))


@pytest.mark.parametrize("family, architecture", [("image", "80"), ("gelu", "100")])
def test_proof_of_a_sample_on_ampere_and_blackwell(family: str, architecture: str) -> None:
    assert_sound(cuda_code.rows(family, architecture, every=6))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "100"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_on_ampere_and_blackwell(family: str, architecture: str) -> None:
    assert_sound(cuda_code.rows(family, architecture))


def test_every_source_is_looked_at() -> None:
    assert {p.stem for p in build_native.sources() if "__global__" in p.read_text(encoding="utf-8")} == set(FAMILIES)


# One kernel that does each thing wrong: spills, moves its tensor narrowly, multiplies in TF32; and one that does none.
FAULTY = """
#include "common.cuh"
namespace ditkernels {
namespace {
struct Move {
  Tokens<float> x, y;
  int width;
};

template <bool VECTORISED>
__global__ void __launch_bounds__(128) moved(const Move a) {
  const int column = threadIdx.x * UNIT;
  store<VECTORISED>(a.y, blockIdx.x, 0, column, a.width, load<VECTORISED>(a.x, blockIdx.x, 0, column, a.width));
}

template <bool VECTORISED>
__global__ void __launch_bounds__(128) claims_to_be_vectorised(const Move a) {
  const int column = threadIdx.x * UNIT;
  store<!VECTORISED>(a.y, blockIdx.x, 0, column, a.width, load<VECTORISED>(a.x, blockIdx.x, 0, column, a.width));
}

template <bool VECTORISED>
__global__ void __launch_bounds__(128) spills(const Move a) {
  float held[64] = {};
  for (int i = 0; i < a.width; ++i) held[i * i % 64] += load_one(a.x, blockIdx.x, i, threadIdx.x);
  store_one(a.y, blockIdx.x, 0, threadIdx.x, held[a.width % 64]);
}

template <bool VECTORISED>
__global__ void __launch_bounds__(128) rounds(const Move a) {
  float d[4] = {};
  uint32_t x = __float_as_uint(load_one(a.x, blockIdx.x, 0, threadIdx.x));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(x));
  store_one(a.y, blockIdx.x, 0, threadIdx.x, d[0]);
}

void instantiate(const Move a) {
  moved<true><<<1, 128>>>(a);
  moved<false><<<1, 128>>>(a);
  claims_to_be_vectorised<true><<<1, 128>>>(a);
  spills<false><<<1, 128>>>(a);
  rounds<false><<<1, 128>>>(a);
}
}  // namespace
void used(const void* a) { instantiate(*static_cast<const Move*>(a)); }
}  // namespace ditkernels
"""


def test_the_reading_of_machine_code_sees_what_it_should(tmp_path: Path) -> None:
    source = tmp_path / "faulty.cu"
    source.write_text(FAULTY, encoding="utf-8")
    ptx, cubin = cuda_code._compiled(source, "90a", 1, tmp_path)
    found = {row["kernel"]: row for row in (cuda_code._row(c, "faulty", "90a") for c in cuda_code.read(ptx, cubin, source))}
    assert found["moved<true>"]["wide_fraction"] == {"x": 1.0, "y": 1.0}
    assert found["claims_to_be_vectorised<true>"]["wide_fraction"] == {"x": 1.0, "y": 0.0}
    assert not found["moved<false>"]["wide"]
    assert {name for name, row in found.items() if row["spills"]} == {"spills<false>"}
    assert {name for name, row in found.items() if row["tf32"]} == {"rounds<false>"}
    assert all(row["threads"] == 128 for row in found.values())
    for name in ("claims_to_be_vectorised<true>", "spills<false>", "rounds<false>"):
        with pytest.raises(AssertionError, match=name):
            assert_sound([found[name]])
    assert_sound([found["moved<true>"], found["moved<false>"]])


def test_a_struct_read_wrongly_is_found_by_its_size(tmp_path: Path) -> None:
    source = tmp_path / "faulty.cu"
    source.write_text(FAULTY, encoding="utf-8")
    structs = cuda_code._structs(source)
    places, size, _ = cuda_code.layout("Move", structs)
    assert places[0] == "x.data"
    assert places[size // 2 - 4] == "y.data"
    with pytest.raises(ValueError, match="the compiler says otherwise"):
        cuda_code._arguments(f".param .b8 kernel_param_0[{size + 8}]", "kernel(Move)", structs)


@pytest.mark.parametrize(
    "registers, threads, shared, share",
    [
        (32, 256, 0, 1.0),
        (64, 256, 0, 0.5),
        (168, 128, 0, 0.1875),
        (32, 128, 100 * 1024, 0.125),
        (255, 1024, 0, 0.0),
    ],
)
def test_occupancy(registers: int, threads: int, shared: int, share: float) -> None:
    assert machine_code.occupancy(90, registers, threads, shared) == share
