"""bias_gelu's compiled kernels on a GPU, at the models' hidden widths: ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditkernels import ops
from ditkernels.reference import SIZES
from tests.helpers.backends import on_both  # noqa: F401 (each test runs on it)
from tests.ops.test_bias_gelu import BF16, COVERING, F16, F32, LAYOUTS, assert_parity, make_inputs, on_device, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTHS = [4 * size["hidden_size"] for size in SIZES.values()]


def on_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return on_device(inputs, torch.device("cuda"))


@pytest.mark.parametrize("dtype, bias", [(BF16, F32), (BF16, BF16), (F32, F32), (F16, F16), (BF16, None)])
@pytest.mark.parametrize("width", WIDTHS)
def test_parity_at_the_models_sizes(width: int, dtype: torch.dtype, bias: torch.dtype | None) -> None:
    assert_parity(on_gpu(make_inputs((8, 256, width), dtype, bias)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_parity_at_awkward_sizes(case: tuple, layout: str) -> None:
    assert_parity(on_gpu(make_inputs(*case, layout)), cotangent=LAYOUTS[LAYOUTS.index(layout) - 1])


def test_repeats_bit_for_bit() -> None:
    inputs = on_gpu(make_inputs((16, 256, 4608), BF16, F32))
    first = run(ops.bias_gelu, inputs)
    for _ in range(5):
        assert all(map(torch.equal, run(ops.bias_gelu, inputs), first))


def test_compiles_as_one_graph_with_equal_bits() -> None:
    inputs = on_gpu(make_inputs((4, 256, 1536), BF16, F32))
    compiled = torch.compile(ops.bias_gelu, fullgraph=True)
    assert all(map(torch.equal, run(compiled, inputs), run(ops.bias_gelu, inputs)))


def test_replays_from_a_cuda_graph() -> None:
    inputs = on_gpu(make_inputs((4, 64, 4608), BF16, F32))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ops.bias_gelu(**inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.bias_gelu(**inputs)
    inputs["x"].copy_(torch.randn_like(inputs["x"]))
    graph.replay()
    assert torch.equal(captured, ops.bias_gelu(**inputs))


def test_more_than_2_to_the_31_elements() -> None:
    x = torch.zeros(1, 500_000, 4608, dtype=BF16, device="cuda")
    assert x.numel() > 1 << 31
    x[:, -3:] = torch.randn(1, 3, 4608, device="cuda").to(BF16)
    assert torch.equal(ops.bias_gelu(x)[:, -3:], ops.bias_gelu(x[:, -3:].clone()))
