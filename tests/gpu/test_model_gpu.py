"""The whole fused DiT on a GPU, on compiled Triton kernels: ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from ditkernels import reference
from ditkernels.ops import dispatch
from ditkernels.reference import CONDITIONINGS, SIZES
from tests import numerics
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.test_models import BF16, F32, F64, pair, without_keys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
XL = {"input_size": 32, **SIZES["XL"], "depth": 2, "num_classes": 1000}


def there_and_back(model: reference.DiT, dtype: torch.dtype, batch: int = 4) -> dict[str, Tensor]:
    """Output and the gradient of every parameter that is not zero."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 4, *model.input_size, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    y = torch.randint(0, 1000, (batch,), generator=generator)
    cotangent = torch.randn(batch, 8, *model.input_size, generator=generator)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    out = model(x.to(DEVICE, dtype), t.to(DEVICE), y.to(DEVICE))
    gradients = torch.autograd.grad(out, list(named.values()), cotangent.to(out))
    return without_keys({"output": out.detach(), **{f"d{n}": g for n, g in zip(named, gradients)}})


def models(dtype: torch.dtype, **config: object) -> tuple[reference.DiT, reference.DiT]:
    fused, plain = pair(dtype, **{**XL, **config})
    return fused.to(DEVICE), plain.to(DEVICE)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_rounds_no_worse_than_the_reference(conditioning: str, dtype: torch.dtype) -> None:
    fused, plain = models(dtype, conditioning=conditioning)
    exact = there_and_back(copy.deepcopy(plain).double(), F64)
    got, low = there_and_back(fused, dtype), there_and_back(plain, dtype)
    for name, value in exact.items():
        numerics.assert_model_contract(got[name], low[name], value, name)


def test_autocast_and_compile_run_the_same_kernels() -> None:
    fused, plain = models(F32)
    exact = there_and_back(copy.deepcopy(plain).double(), F64)
    with torch.autocast(DEVICE, dtype=BF16):
        low = there_and_back(plain, F32)
        found = {
            "eager": there_and_back(fused, F32),
            "compiled": there_and_back(torch.compile(fused, fullgraph=True), F32),
        }
    for mode, got in found.items():
        for name, value in got.items():
            plain_name = name.replace("_orig_mod.", "")
            narrow = [tensor.to(BF16) for tensor in (value, low[plain_name])]
            numerics.assert_model_contract(*narrow, exact[plain_name], f"{mode} {plain_name}")


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient(checkpointing: str) -> None:
    fused, _ = models(BF16)
    with dispatch.use_backend(attention="torch_efficient"):
        want = there_and_back(fused, BF16)
        fused.checkpointing = checkpointing
        for name, value in there_and_back(fused, BF16).items():
            assert torch.equal(value, want[name]), name


def test_a_cuda_graph_replays_the_forward() -> None:
    fused, _ = models(BF16)
    fused.eval()
    x, t, y = (
        torch.randn(4, 4, 32, 32, device=DEVICE, dtype=BF16),
        torch.arange(4).to(DEVICE),
        torch.arange(4).to(DEVICE),
    )
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            fused(x, t, y)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused(x, t, y)
        x.normal_()
        graph.replay()
        assert torch.equal(out, fused(x, t, y))
