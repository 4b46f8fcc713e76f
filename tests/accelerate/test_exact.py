"""accelerate(exact=True): the bits of the original, without gradients, on the cpu backend and in Triton's interpreter."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from ditkernels import accelerate, restore
from ditkernels.accelerate.recorded import exact
from ditkernels.accelerate.report import Report
from ditkernels.ops import dispatch
from ditkernels.ops.product_sum import product_sum
from tests.helpers import forks
from tests.helpers.native_cpu import needs_library
from tools.diffusers_models import MODELS, Inputs
from tools.tree import ROOT

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BACKEND = os.environ.get("DITKERNELS_TEST_EXACT", "cpu")
Call = tuple[tuple[Any, ...], dict[str, Any]]

pytestmark = needs_library if BACKEND == "cpu" else []


@pytest.fixture(autouse=True)
def on_backend(no_forced_backend: None) -> Iterator[None]:
    with dispatch.use_backend(BACKEND), torch.no_grad():
        yield


class Embedder(forks.TimestepEmbedder):
    """Of the model's dtype, as the public one is not."""

    def forward(self, t: Tensor) -> Tensor:
        weight = self.mlp[0].weight
        angles = t[:, None] * torch.exp(-torch.arange(4.0))
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(weight.dtype))


def tiny_dit(dtype: torch.dtype, batch: int = 2) -> tuple[nn.Module, Call]:
    torch.manual_seed(0)
    model = forks.DiT()
    model.t_embedder = Embedder()
    image = torch.randn(batch, forks.CHANNELS, forks.SIDE, forks.SIDE).to(dtype)
    return forks.randomised(model).to(dtype), ((image, torch.arange(batch) * 7.0, torch.arange(batch)), {})


def of_diffusers(name: str, dtype: torch.dtype, batch: int = 2) -> tuple[nn.Module, Call]:
    pytest.importorskip("diffusers")
    return MODELS[name].make().to(dtype), ((), MODELS[name].call(Inputs(batch, dtype)))


GATES_AND_MODULATIONS = {"DiT": (4, 5), "SD3": (10, 12), "Wan": (6, 6)}
"""Of the tiny models: two blocks; three of two streams, of which the last ends its text in the attention; three blocks."""


def made(name: str, dtype: torch.dtype) -> tuple[nn.Module, Call]:
    if name == "DiT":
        return tiny_dit(dtype)
    return of_diffusers({"SD3": "SD3Transformer2DModel", "Wan": "WanTransformer3DModel"}[name], dtype)


def quietly(model: nn.Module, call: Call) -> Report:
    return accelerate(model, example=call, exact=True, file=io.StringIO())


def called(model: nn.Module, call: Call) -> Tensor:
    result = model(*call[0], **call[1])
    return result if isinstance(result, Tensor) else result.sample


@contextmanager
def sums() -> Iterator[list[Any]]:
    """The calls of the kernel."""
    calls: list[Any] = []

    def counting(*args: Any) -> Tensor:
        calls.append(args)
        return product_sum(*args)

    with mock.patch.object(exact, "product_sum", counting):
        yield calls


# ---- Bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", ["DiT", "SD3", "Wan"])
def test_outputs_keep_their_bits_and_every_gate_is_fused(name: str, dtype: torch.dtype) -> None:
    model, call = made(name, dtype)
    want = called(model, call)
    report = quietly(model, call)
    assert not report.left, str(report)
    assert "with the bits of the original, which runs under gradients" in str(report)
    with sums() as ran:
        assert torch.equal(called(model, call), want)
    assert len(ran) == sum(GATES_AND_MODULATIONS[name])
    restore(model)
    with sums() as ran:
        assert torch.equal(called(model, call), want)
    assert not ran


DTYPES = [(F32, F32, F32, F32, F32), (BF16, BF16, BF16, BF16, BF16), (F16, F16, F16, F16, F16), (BF16, F32, F32, F32, BF16)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("width", [24, 45, 1152])
def test_the_kernel_rounds_where_pytorch_rounds(dtypes: tuple[torch.dtype, ...], width: int) -> None:
    of_value, of_factor, product, total, out = dtypes
    generator = torch.Generator().manual_seed(width)
    sizes = 2.0 ** torch.arange(-6, 1).repeat(15)[:35].reshape(5, 7, 1)
    value = (torch.randn(5, 7, width, generator=generator) * sizes).to(of_value)
    if BACKEND == "cpu":  # Triton's interpreter misreads subnormal numbers of bf16
        value[0, 0, :4] = torch.tensor(1e-39).to(of_value)
    for shape in ((5, 1, width), (5, 7, width), (width,)):
        factor = torch.randn(shape, generator=generator).to(of_factor)
        addend = torch.randn(5, 7, width, generator=generator).to(of_value)
        addend[0, 0, :4] = 0
        want = (value.to(product) * factor.to(product) + addend.to(total)).to(out)
        assert torch.equal(product_sum(value, factor, addend, product, total, out), want)
        strided = value.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(product_sum(strided, factor, addend, product, total, out), want)


# ---- When the original runs ------------------------------------------------------------------------------------------


def under_gradients(model: nn.Module, call: Call) -> Tensor:
    with torch.enable_grad():
        return called(model, call)


def under_autocast(model: nn.Module, call: Call) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return called(model, call)


def on_another_backend(model: nn.Module, call: Call) -> Tensor:
    with dispatch.use_backend("torch"):
        return called(model, call)


def in_another_dtype(model: nn.Module, call: Call) -> Tensor:
    args = tuple(value.to(BF16) if value.is_floating_point() else value for value in call[0])
    return called(copy.deepcopy(model).to(BF16), (args, call[1]))


@pytest.mark.parametrize("run", [under_gradients, under_autocast, on_another_backend, in_another_dtype])
def test_the_original_runs(run: Callable[[nn.Module, Call], Tensor]) -> None:
    model, call = tiny_dit(F32)
    want = run(model, call)
    quietly(model, call)
    with sums() as ran:
        assert torch.equal(run(model, call), want)
    assert not ran


def test_another_batch_keeps_its_bits() -> None:
    model, call = tiny_dit(F32)
    quietly(model, call)
    plain, other = tiny_dit(F32, batch=3)
    with sums() as ran:
        assert torch.equal(called(model, other), called(plain, other))
    assert ran


def test_sites_whose_bits_differ_stay_eager() -> None:
    """As with a kernel that contracts the two roundings into one."""

    def contracted(value: Tensor, factor: Tensor, addend: Tensor, *dtypes: torch.dtype) -> Tensor:
        return (value.double() * factor.double() + addend.double()).to(dtypes[-1])

    model, call = tiny_dit(F32)
    want = called(model, call)
    with mock.patch.object(exact, "product_sum", contracted):
        report = quietly(model, call)
        assert torch.equal(called(model, call), want)
    assert {part.reason for part in report.left} == {f"the bits of {BACKEND} kernels differ from its own forward's"}
    assert not report.fused


# ---- Refusals --------------------------------------------------------------------------------------------------------


def test_it_needs_an_example() -> None:
    with pytest.raises(ValueError, match="exact=True came without an example"):
        accelerate(tiny_dit(F32)[0], exact=True)


def test_without_a_kernel_everything_is_left_and_the_report_says_why() -> None:
    model, call = tiny_dit(F32)
    with dispatch.use_backend("torch"):
        report = quietly(model, call)
        with pytest.raises(RuntimeError, match="no kernel serves cpu with the backend torch"):
            product_sum(*[torch.ones(1, 1, 4)] * 3, F32, F32, F32)
    assert {part.reason for part in report.left} == {"no kernel serves its device"}


def test_a_model_without_sites_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="nothing that exact=True fuses was found in Sequential"):
        quietly(model, ((torch.ones(1, 4),), {}))


@pytest.mark.skipif(BACKEND != "cpu", reason="that is this run")
def test_on_interpreted_triton() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "DITKERNELS_TEST_EXACT": "triton"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-k",
        "keep_their_bits or rounds",
        __file__,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:]
