"""Tensors of more than 2^31 elements on a GPU, forward and backward of every op: ``pytest -m gpu tests/gpu/test_beyond_gpu.py``.

All samples but the last are zero, in the inputs and in the cotangents, so that every result, sums over samples too, is that of
the last sample alone, which is small enough for the reference in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from ditkernels import ops, reference
from ditkernels.diagnostics import check
from ditkernels.diagnostics.check import Case
from ditkernels.ops import _native, dispatch
from tests import numerics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FAR = 1 << 31
ROOM = 60e9  # bytes: the largest case holds a dozen such tensors in bf16
BF16 = check.Precision("bf16", torch.bfloat16, torch.bfloat16)
OF_A_SAMPLE = {"x", "branch", "gate", "shift", "scale", "tokens", "qkv_or_q", "packed"}

SIDE, WIDTH = 32, 1152  # XL/2 at 512 px
TOKENS = {"x": (1, SIDE * SIDE, WIDTH)}
RESIDUAL = {"branch": (1, SIDE * SIDE, WIDTH), "gate": (1, WIDTH)}
MODULATION = {"shift": (1, WIDTH), "scale": (1, WIDTH)}
PATCHES = {"grid": (SIDE, SIDE), "patch_size": 2}
CASES = (
    Case("modulate_norm", {**TOKENS, **MODULATION}),
    Case("gated_residual", {**TOKENS, **RESIDUAL}),
    Case("gated_residual_norm", {**TOKENS, **RESIDUAL, **MODULATION}),
    Case("patch_embed", {"x": (1, 4, 64, 64), "weight": (WIDTH, 4, 2, 2), "bias": (WIDTH,)}),
    Case("final_layer", {**TOKENS, **RESIDUAL, **MODULATION, "weight": (32, WIDTH), "bias": (32,)}, PATCHES),
    Case("bias_gelu", {"x": (1, SIDE * SIDE, 4 * WIDTH), "bias": (4 * WIDTH,)}),
    Case("split_qkv", {"packed": (1, SIDE * SIDE, 3, 16, 72), "bias": (3 * WIDTH,)}),
    Case("unpatchify", {"tokens": (1, SIDE * SIDE, 32)}, PATCHES),
)
ATTENTION = Case("attention", {"qkv_or_q": (1, 256, 3, 16, 72)})
LARGEST = {"patch_embed": SIDE * SIDE * WIDTH}  # its output, where others have their largest argument


def last_of(near: Tensor, batch: int) -> Tensor:
    """(batch, ...) of zeros that ends in the one sample of ``near``."""
    far = torch.zeros(batch, *near.shape[1:], dtype=near.dtype, device=near.device)
    far[-1:] = near
    return far


def there_and_back(function: object, case: Case, inputs: Mapping[str, Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    """Outputs, then the gradient of every input."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    out = function(**leaves, **case.options)
    outputs = out if isinstance(out, tuple) else (out,)
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), cotangents)]


def check_beyond(case: Case, backend: dispatch.use_backend, device: torch.device, elements: int) -> None:
    """Holds the last of so many samples that the largest tensor has more than ``elements`` against the reference."""
    near = case.inputs(BF16, device)
    largest = LARGEST.get(case.op) or max(math.prod(near[name].shape) for name in near if name in OF_A_SAMPLE)
    batch = elements // largest + 2
    plain = getattr(reference, case.op)
    out = plain(**near, **case.options)
    # Sixteenths are exact in every dtype, so that all computations start from one cotangent.
    cotangents = [(torch.randn_like(o) * 16).round() / 16 for o in (out if isinstance(out, tuple) else (out,))]
    low = there_and_back(plain, case, near, cotangents)
    wide = {name: value.double() for name, value in near.items()}
    exact = there_and_back(plain, case, wide, [cotangent.double() for cotangent in cotangents])
    far = {name: last_of(value, batch) if name in OF_A_SAMPLE else value for name, value in near.items()}
    with backend:
        actual = there_and_back(getattr(ops, case.op), case, far, [last_of(c, batch) for c in cotangents])
    names = [*(f"output {i}" for i in range(len(cotangents))), *(f"d{name}" for name in near)]
    for name, got, plain_one, true in zip(names, actual, low, exact, strict=True):
        mine = got[-1:] if len(got) == batch else got
        numerics.assert_contract(mine, plain_one, true, f"{case.op}: {name}")


def skip_without_room() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < ROOM:
        pytest.skip(f"{free / 1e9:.0f} GB of the device are free, this needs {ROOM / 1e9:.0f}")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_the_last_of_many_samples(case: Case, backend: str) -> None:
    skip_without_room()
    if backend == "cuda" and not _native.architectures():
        pytest.skip(_native.cuda_library())
    check_beyond(case, dispatch.use_backend(backend), torch.device("cuda"), FAR)


@pytest.mark.parametrize("backend", dispatch.ATTENTION_BACKENDS)
def test_attention_of_the_last_of_many_samples(backend: str) -> None:
    skip_without_room()
    if backend == "plain":
        pytest.skip("its weights alone would take 80 GB")
    device = torch.device("cuda")
    reason = check.refusals(ATTENTION, ATTENTION.inputs(BF16, device))[backend]
    if reason is not None:
        pytest.skip(reason)
    check_beyond(ATTENTION, dispatch.use_backend(attention=backend), device, FAR)
