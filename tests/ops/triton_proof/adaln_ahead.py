"""adaLN kernels compiled for GPUs that are not there: what the machine code of every launch at the paper's widths looks like."""

from __future__ import annotations

import itertools

import pytest
import torch

from ditkernels.ops import _triton
from ditkernels.ops.norm import triton as norm
from ditkernels.reference import SIZES
from tools.kernel_proof.ahead import Compiled, recorded
from tools.kernel_proof.machine_code import WIDE_SHARE, wide_shares

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BATCH, TOKENS = 2, 256
TENSOR_CORES = (
    "HMMA",
    "HGMMA",
    "QGMMA",
    "UTCHMMA",
    "UTCQMMA",
)  # there is no product here, so nothing to round to TF32

# The (B, N, D) arguments of the two kernels that walk through rows.
TOUCHED = {
    "modulate_norm": {"forward_rows": ("x", "h"), "backward_rows": ("dh", "x1", "dx")},
    "gated_residual": {"forward_rows": ("x", "branch", "x1"), "backward_rows": ("dx1", "branch", "dbranch")},
    "gated_residual_norm": {
        "forward_rows": ("x", "branch", "x1", "h"),
        "backward_rows": ("dx1", "dh", "x1", "branch", "dx", "dbranch"),
    },
}


def compile_op(op: str, width: int, stream: torch.dtype, branch: torch.dtype, kind: str, capability: int) -> list[Compiled]:
    """Every kernel of the op's forward and backward, as launched with all vectors, those of a sample being chunks of one tensor."""
    x, dx = (torch.empty(BATCH, TOKENS, width, dtype=stream) for _ in range(2))
    u, dh = (torch.empty(BATCH, TOKENS, width, dtype=branch) for _ in range(2))
    gate, shift, scale, *_ = torch.empty(BATCH, 6 * width, dtype=branch).chunk(6, dim=1)
    weight, bias, branch_bias = (torch.empty(width) for _ in range(3))
    stats = torch.empty(BATCH, TOKENS, 2 if kind == "layernorm" else 1)
    with recorded(capability) as kernels:
        if op == "modulate_norm":
            norm.modulate_norm(x, shift, scale, weight, bias, kind, 1e-6, branch, True)
            wanted = (stream, branch, branch, F32, F32)
            norm.modulate_norm_backward(dh, x, scale, weight, bias, stats, kind, wanted)
        elif op == "gated_residual":
            norm.gated_residual(x, u, gate, branch_bias)
            norm.gated_residual_backward(dx, u, gate, branch_bias, (branch, branch, F32))
        else:
            vectors = (branch_bias, weight, bias)
            norm.gated_residual_norm(x, u, gate, shift, scale, *vectors, kind, 1e-6, branch, True)
            wanted = (stream, *[branch] * 4, F32, F32, F32)
            norm.gated_residual_norm_backward(dx, dh, x, u, gate, scale, *vectors, stats, kind, wanted)
    return kernels


def check(op: str, width: int, stream: torch.dtype, branch: torch.dtype, kind: str, capability: int) -> None:
    kernels = compile_op(op, width, stream, branch, kind, capability)
    assert [k.name for k in kernels] == ["forward_rows", "backward_rows", "add_chunks", "add_samples"]
    for kernel in kernels:
        assert kernel.resources["REG"] > 0
        assert kernel.spills == 0, f"{kernel.name} spills"
        products = [o for o in kernel.opcodes if "TF32" in o or o.startswith(TENSOR_CORES)]
        assert not products, f"{kernel.name}: {products}"
        shares = wide_shares(kernel, TOUCHED[op].get(kernel.name, ()))
        assert set(shares) == set(TOUCHED[op].get(kernel.name, ())), f"{kernel.name}: no access found"
        for name, share in shares.items():
            assert share >= WIDE_SHARE, f"{kernel.name}: {share:.0%} of {name} in 128-bit accesses"


WIDTHS = [size["hidden_size"] for size in SIZES.values()]
DTYPES = [(BF16, BF16), (F32, BF16), (F32, F32), (F16, F16)]
# The op that a block calls in the dtypes of training; the others do less of the same.
USUAL = ("gated_residual_norm", [(BF16, BF16), (F32, BF16)])
CASES = [
    pytest.param(op, width, *dtypes, marks=[] if op == USUAL[0] and dtypes in USUAL[1] else pytest.mark.slow)
    for op, width, dtypes in itertools.product(TOUCHED, WIDTHS, DTYPES)
]


@pytest.mark.parametrize("op, width, stream, branch", CASES)
def test_hopper(op: str, width: int, stream: torch.dtype, branch: torch.dtype) -> None:
    check(op, width, stream, branch, "layernorm", 90)


@pytest.mark.parametrize("width", WIDTHS)
def test_hopper_rmsnorm(width: int) -> None:
    check("gated_residual_norm", width, BF16, BF16, "rmsnorm", 90)


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("width, stream, branch", [(1152, BF16, BF16), (1152, F32, BF16), (384, F32, F32)])
def test_ampere_and_blackwell(capability: int, width: int, stream: torch.dtype, branch: torch.dtype) -> None:
    check("gated_residual_norm", width, stream, branch, "layernorm", capability)


@pytest.mark.parametrize("width", [96, 100, 2048, 4096])
def test_other_widths_compile_and_do_not_spill(width: int) -> None:
    for kernel in compile_op("gated_residual_norm", width, BF16, BF16, "layernorm", 90):
        assert kernel.spills == 0, f"{kernel.name} spills at width {width}"


def test_absent_arguments_and_channel_strides_compile() -> None:
    x = torch.empty(2, 5, 384 * 2)[..., ::2]
    stats = torch.empty(2, 5, 2)
    with recorded(90) as kernels:
        norm.modulate_norm(x, None, None, None, None, "rmsnorm", 1e-6, F32, False)
        norm.modulate_norm_backward(x, x, None, None, None, stats[..., 1:], "rmsnorm", (F32, *[None] * 4))
        norm.gated_residual(x, x, None, None)
        norm.gated_residual_backward(x, None, None, torch.empty(384), (None, None, F32))
        norm.gated_residual_norm_backward(*(None, x, x, x, *[None] * 5, stats, "layernorm"), (F32, F32, *[None] * 6))
    assert all(k.cubin for k in kernels)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_backward_of_some_gradients_does_not_spill(width: int) -> None:
    """Of the vectors alone, and of the branch alone, as where a model is partly frozen."""
    x, stats, vector = torch.empty(2, 5, width), torch.empty(2, 5, 2), torch.empty(2, width)
    read = (x, x, x, x, vector, vector, None, None, None, stats, "layernorm")
    with recorded(90) as kernels:
        norm.gated_residual_norm_backward(*read, (*[None] * 3, F32, F32, *[None] * 3))
        norm.gated_residual_norm_backward(*read, (None, F32, F32, *[None] * 5))
    assert [k.name for k in kernels] == ["backward_rows", "add_chunks"] * 2
    assert all(k.spills == 0 for k in kernels)


def forget_plans() -> None:
    norm.forward_plan.cache_clear()
    norm.backward_plan.cache_clear()


def test_the_reading_of_machine_code_sees_what_it_should() -> None:
    """A tile too large must be seen to spill, and one row of 768 channels over four warps to be read narrow."""
    tiles = {key: _triton.Tile(16, 1) for key in norm._BACKWARD}
    narrow = {key: _triton.Tile(1, 4) for key in norm._FORWARD}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "_BACKWARD", tiles)
        patch.setattr(norm, "_FORWARD", narrow)
        forget_plans()
        forward, backward, *_ = compile_op("gated_residual_norm", 384, BF16, BF16, "layernorm", 90)
    forget_plans()
    assert backward.spills > 0
    shares = wide_shares(forward, TOUCHED["gated_residual_norm"]["forward_rows"])
    assert max(shares.values()) < WIDE_SHARE
