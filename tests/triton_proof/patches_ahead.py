"""patch_embed, final_layer and unpatchify compiled for GPUs that are not there: the machine code of every launch at S, B, L, XL."""

from __future__ import annotations

import pytest
import torch
from ahead import Compiled, recorded
from machine_code import WIDE_SHARE, wide_shares

from ditkernels.ops import final_layer_triton, patch_embed_triton, unpatchify_triton
from ditkernels.reference import SIZES

F32, BF16 = torch.float32, torch.bfloat16
BATCH, SIDE, CHANNELS = 2, 32, 4

WIDTHS = [size["hidden_size"] for size in SIZES.values()]
PATCHES = [2, 4, 8]
# The (B, N, D) arguments of each kernel.
TOUCHED = {
    "forward_rows": ("x", "branch"),
    "backward_columns": ("x", "branch", "dx", "dbranch"),
    "weight_products": ("branch", "dy"),
    "embed": ("y",),
    "image_gradients": ("dy",),
    "add_positions": ("dy",),
}


def compile_final_layer(
    width: int, patch: int, stream: torch.dtype, rest: torch.dtype, capability: int, norm: str = "layernorm"
) -> list[Compiled]:
    side, values = SIDE // patch, 2 * CHANNELS * patch * patch
    x, branch = (torch.empty(BATCH, side * side, width, dtype=d) for d in (stream, rest))
    gate, shift, scale, *_ = torch.empty(BATCH, 6 * width, dtype=rest).chunk(6, dim=1)
    weight, bias = torch.empty(values, width, dtype=rest), torch.empty(values, dtype=rest)
    dout = torch.empty(BATCH, 2 * CHANNELS, SIDE, SIDE, dtype=rest)
    rstd = torch.empty(BATCH, side * side)
    mean = rstd if norm == "layernorm" else torch.empty(0)
    tensors = (x, branch, gate, None, shift, scale, None, None, weight, bias)
    with recorded(capability) as kernels:
        final_layer_triton._final_layer(*tensors, side, side, patch, norm, 1e-6, rest)
        final_layer_triton._final_layer_backward(dout, dout, *tensors, mean, rstd, side, side, patch, norm)
    return kernels


def compile_patch_embed(
    width: int, patch: int, stream: torch.dtype, rest: torch.dtype, capability: int
) -> list[Compiled]:
    length = (SIDE // patch) ** 2
    x, dy = torch.empty(BATCH, CHANNELS, SIDE, SIDE), torch.empty(BATCH, length, width, dtype=stream)
    weight, bias = torch.empty(width, CHANNELS, patch, patch, dtype=rest), torch.empty(width, dtype=rest)
    pos = torch.empty(1, length, width)
    with recorded(capability) as kernels:
        patch_embed_triton._patch_embed(x, weight, bias, pos, stream)
        patch_embed_triton._patch_embed_backward(dy, x, weight, bias, pos, [True] * 4)
    return kernels


def check(kernels: list[Compiled], seen: set[bytes]) -> None:
    """Holds every kernel whose machine code was not seen before to what is asked of all."""
    for kernel in kernels:
        if kernel.cubin in seen:
            continue
        seen.add(kernel.cubin)
        assert kernel.resources["REG"] > 0
        assert kernel.spills == 0, f"{kernel.name} spills"
        assert not [o for o in kernel.opcodes if "TF32" in o], f"{kernel.name} rounds to TF32"
        tensors = set(TOUCHED.get(kernel.name, ())) & set(kernel.parameters)
        shares = wide_shares(kernel, tensors)
        assert set(shares) == tensors, f"{kernel.name}: no access found"
        for name, share in shares.items():
            assert share >= WIDE_SHARE, f"{kernel.name}: {share:.0%} of {name} in 128-bit accesses"


@pytest.fixture(scope="module")
def seen() -> set[bytes]:
    return set()


# Complete for the dtypes of training under autocast; the two others at the narrowest and the widest model.
CASES = [(w, p, F32, BF16) for w in WIDTHS for p in PATCHES]
CASES += [(384, 2, BF16, BF16), (1152, 8, BF16, BF16), (384, 8, F32, F32), (1152, 4, F32, F32)]


@pytest.mark.parametrize("width, patch, stream, rest", CASES)
def test_final_layer_on_hopper(
    width: int, patch: int, stream: torch.dtype, rest: torch.dtype, seen: set[bytes]
) -> None:
    check(compile_final_layer(width, patch, stream, rest, 90), seen)


@pytest.mark.parametrize("width, patch, stream, rest", CASES)
def test_patch_embed_on_hopper(
    width: int, patch: int, stream: torch.dtype, rest: torch.dtype, seen: set[bytes]
) -> None:
    check(compile_patch_embed(width, patch, stream, rest, 90), seen)


@pytest.mark.parametrize("capability", [80, 100])
def test_ampere_and_blackwell(capability: int, seen: set[bytes]) -> None:
    check(compile_final_layer(1152, 2, F32, BF16, capability, "rmsnorm"), seen)
    check(compile_patch_embed(1152, 2, F32, BF16, capability), seen)


# Of 4,104 channels Triton does not know that rows are aligned; weight_products then spills, on Triton 3.6 alone.
@pytest.mark.parametrize("width, spilling", [(96, set()), (4112, set()), (4104, {"weight_products"})])
def test_absent_arguments_and_rows_of_any_width_compile(width: int, spilling: set[str]) -> None:
    assert (width > final_layer_triton._WIDEST_HELD) == (width > 96)
    x, weight = torch.empty(2, 4, width, dtype=BF16), torch.empty(16, width, dtype=BF16)
    given = (x, *[None] * 7, weight, None)
    out, rstd = torch.empty(2, 4, 4, 4), torch.empty(2, 4)
    patch_weight = torch.empty(width, 4, 2, 2, dtype=BF16)
    with recorded(90) as kernels:
        final_layer_triton._final_layer(*given, 2, 2, 2, "rmsnorm", 1e-6, F32)
        final_layer_triton._final_layer_backward(out, out, *given, torch.empty(0), rstd, 2, 2, 2, "rmsnorm")
        patch_embed_triton._patch_embed(out, patch_weight, None, None, F32)
        patch_embed_triton._patch_embed_backward(x, out, patch_weight, None, None, [True, True, False, False])
    assert {k.name for k in kernels} >= {"backward_columns", "embed", "image_gradients"}
    assert ("forward_wide_rows" in {k.name for k in kernels}) == (width > 96)
    assert {kernel.name for kernel in kernels if kernel.spills} <= spilling


def test_unpatchify_compiles() -> None:
    tokens = torch.empty(2, 256, 32, dtype=BF16)
    with recorded(90) as kernels:
        unpatchify_triton._unpatchify(tokens, 16, 16, 2)
        unpatchify_triton._unpatchify_backward(torch.empty(2, 8, 32, 32, dtype=BF16), 2)
    assert [(k.name, k.spills) for k in kernels] == [("place_values", 0), ("gather_values", 0)]


def test_the_reading_of_machine_code_sees_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows spread over too few threads must be seen to spill."""
    monkeypatch.setattr(final_layer_triton, "_WARPS", {1152: 1})
    forward, *_ = compile_final_layer(1152, 2, F32, BF16, 90)
    assert forward.name == "forward_rows"
    assert forward.spills > 0
