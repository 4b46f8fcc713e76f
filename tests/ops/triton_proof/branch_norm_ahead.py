"""The kernels of a normed branch's residual compiled for GPUs that are not there: no launch at the paper's widths spills."""

from __future__ import annotations

import pytest
import torch

from ditkernels.ops._triton import pieces
from ditkernels.ops.norm import branch_norm_triton as kernels
from tests.ops.triton_proof.adaln_ahead import BF16, F32, WIDTHS
from tools.kernel_proof.ahead import recorded
from tools.kernel_proof.machine_code import wide_shares

TOKENS = 256
TOUCHED = {
    "forward_rows_branch_norm": ("x", "branch", "x1", "h"),
    "backward_rows_branch_norm": ("dx1", "dh", "x1", "branch", "dx", "dbranch"),
}


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stream", [BF16, pytest.param(F32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_kernel_spills_and_rows_are_read_wide(width: int, stream: torch.dtype, capability: int) -> None:
    x, dx = (torch.empty(2, TOKENS, width, dtype=stream) for _ in range(2))
    u, dh = (torch.empty(2, TOKENS, width, dtype=BF16) for _ in range(2))
    gate, shift, scale = torch.empty(2, 3 * width, dtype=BF16).chunk(3, dim=-1)
    shared = [torch.empty(width) for _ in range(3)]
    stats = torch.empty(2, TOKENS, 2), torch.empty(2, TOKENS, 1)
    wanted = (stream, *[BF16] * 4, F32, F32, F32)
    with recorded(capability) as made:
        kernels.gated_residual_norm_branch_norm(x, u, gate, shift, scale, *shared, 1e-6, "layernorm", 1e-6, BF16, True)
        kernels.gated_residual_norm_branch_norm_backward(dx, dh, x, u, gate, scale, *shared, *stats, "layernorm", wanted)
    assert {kernel.name for kernel in made} == {*TOUCHED, "add_chunks", "add_samples"}
    for kernel in made:
        assert kernel.spills == 0, f"{kernel.name} spills at width {width}"
        for name, share in wide_shares(kernel, TOUCHED.get(kernel.name, ())).items():
            assert share >= pieces(width)[0] / width - 0.01, f"{kernel.name}: {share:.0%} of {name} in 128-bit accesses"
