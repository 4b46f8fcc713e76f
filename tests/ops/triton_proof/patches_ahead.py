"""patch_embed, final_layer and unpatchify compiled for GPUs that are not there: the machine code of every launch at S, B, L, XL."""

from __future__ import annotations

import pytest
import torch

from ditkernels.ops.image import triton as image
from ditkernels.reference import SIZES
from tools.kernel_proof.ahead import Compiled, recorded
from tools.kernel_proof.machine_code import WIDE_SHARE, wide_shares

F32, BF16 = torch.float32, torch.bfloat16
BATCH, SIDE, CHANNELS = 2, 32, 4

WIDTHS = [size["hidden_size"] for size in SIZES.values()]
PATCHES = [2, 4, 8]
# The (B, N, D) arguments of each kernel.
TOUCHED = {"final_rows": ("x", "branch"), "embed": ("y",)}


def compile_final_layer(
    width: int, patch: int, stream: torch.dtype, rest: torch.dtype, capability: int, norm: str = "layernorm"
) -> list[Compiled]:
    side, values = SIDE // patch, 2 * CHANNELS * patch * patch
    x, branch = (torch.empty(BATCH, side * side, width, dtype=d) for d in (stream, rest))
    gate, shift, scale, *_ = torch.empty(BATCH, 6 * width, dtype=rest).chunk(6, dim=1)
    weight, bias = torch.empty(values, width, dtype=rest), torch.empty(values, dtype=rest)
    tensors = (x, branch, gate, None, shift, scale, None, None, weight, bias)
    with recorded(capability) as kernels:
        image._final_layer(*tensors, side, side, patch, norm, 1e-6, rest)
    return kernels


def compile_patch_embed(width: int, patch: int, stream: torch.dtype, rest: torch.dtype, capability: int) -> list[Compiled]:
    x, pos = torch.empty(BATCH, CHANNELS, SIDE, SIDE), torch.empty(1, (SIDE // patch) ** 2, width)
    weight, bias = torch.empty(width, CHANNELS, patch, patch, dtype=rest), torch.empty(width, dtype=rest)
    with recorded(capability) as kernels:
        image._patch_embed(x, weight, bias, pos, stream)
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
CASES = [pytest.param(w, p, F32, BF16, marks=[] if p == 2 or w == 768 else pytest.mark.slow) for w in WIDTHS for p in PATCHES]
CASES += [(384, 2, BF16, BF16), (1152, 8, BF16, BF16), (384, 8, F32, F32), (1152, 4, F32, F32)]


@pytest.mark.parametrize("width, patch, stream, rest", CASES)
def test_final_layer_on_hopper(width: int, patch: int, stream: torch.dtype, rest: torch.dtype, seen: set[bytes]) -> None:
    check(compile_final_layer(width, patch, stream, rest, 90), seen)


@pytest.mark.parametrize("width, patch, stream, rest", CASES)
def test_patch_embed_on_hopper(width: int, patch: int, stream: torch.dtype, rest: torch.dtype, seen: set[bytes]) -> None:
    check(compile_patch_embed(width, patch, stream, rest, 90), seen)


@pytest.mark.parametrize("capability", [80, 100])
def test_ampere_and_blackwell(capability: int, seen: set[bytes]) -> None:
    check(compile_final_layer(1152, 2, F32, BF16, capability, "rmsnorm"), seen)
    check(compile_patch_embed(1152, 2, F32, BF16, capability), seen)


@pytest.mark.parametrize("width", [96, 4104, 4112])
def test_absent_arguments_and_rows_of_any_width_compile(width: int) -> None:
    x, weight = torch.empty(2, 4, width, dtype=BF16), torch.empty(16, width, dtype=BF16)
    latents, patch_weight = torch.empty(2, 4, 4, 4), torch.empty(width, 4, 2, 2, dtype=BF16)
    with recorded(90) as kernels:
        image._final_layer(x, *[None] * 7, weight, None, 2, 2, 2, "rmsnorm", 1e-6, F32)
        image._patch_embed(latents, patch_weight, None, None, F32)
    assert [(k.name, k.spills) for k in kernels] == [("final_rows", 0), ("embed", 0)]


@pytest.mark.parametrize("channels_first", [False, True])
def test_unpatchify_and_patchify_compile(channels_first: bool) -> None:
    tokens, pixels = torch.empty(2, 256, 32, dtype=BF16), torch.empty(2, 8, 32, 32)
    with recorded(90) as kernels:
        image._unpatchify(tokens, 16, 16, 2, channels_first)
        image._patchify(pixels, 2, channels_first, BF16)
    assert [(k.name, k.spills) for k in kernels] == [("place_values", 0), ("gather_values", 0)]


def test_the_reading_of_machine_code_sees_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows spread over too few threads must be seen to spill."""
    monkeypatch.setattr(image, "_WARPS", {1152: 1})
    (forward,) = compile_final_layer(1152, 2, F32, BF16, 90)
    assert forward.name == "final_rows"
    assert forward.spills > 0
