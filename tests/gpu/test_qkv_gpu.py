"""split_qkv's compiled kernels on a GPU, at the models' heads: ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditkernels import ops
from ditkernels.reference import SIZES
from tests.helpers.backends import on_both  # noqa: F401 (each test runs on it)
from tests.ops.test_qkv import (
    BF16,
    COVERING,
    F16,
    F32,
    LAYOUTS,
    assert_parity,
    backward,
    gradients,
    on_device,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HEADS = [(size["num_heads"], size["hidden_size"] // size["num_heads"]) for size in SIZES.values()]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("dtype, bias", [(BF16, F32), (BF16, BF16), (F32, F32), (F16, F16)])
@pytest.mark.parametrize("heads, head_dim", HEADS)
def test_parity_at_the_models_sizes(heads: int, head_dim: int, dtype: torch.dtype, bias: torch.dtype) -> None:
    for parts in (2, 3):
        assert_parity(on_device(gradients((8, 256, parts, heads, head_dim), dtype), DEVICE), bias)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_parity_at_awkward_sizes(case: tuple, layout: str) -> None:
    shape, dtype, bias = case
    assert_parity(on_device(gradients(shape, dtype, layout), DEVICE), bias)


def test_repeats_bit_for_bit() -> None:
    parts = on_device(gradients((16, 256, 3, 16, 72), BF16), DEVICE)
    first = backward(parts)
    for _ in range(5):
        assert all(map(torch.equal, backward(parts), first))


def attended(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    packed = F.linear(x, weight, bias.detach()).unflatten(-1, (3, 16, 72))
    return ops.attention(packed, bias=bias)


def results(function: object, leaves: list[Tensor]) -> list[Tensor]:
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def test_attention_gives_the_bias_its_gradient_compiled_too() -> None:
    """The layouts of dq, dk and dv are those of the attention that this GPU is given."""
    torch.manual_seed(0)
    leaves = [
        (torch.randn(shape, device=DEVICE) / 8).to(BF16).requires_grad_() for shape in ((4, 256, 1152), (3456, 1152), (3456,))
    ]
    got = results(attended, leaves)
    want = results(lambda x, w, b: ops.attention(F.linear(x, w, b).unflatten(-1, (3, 16, 72))), leaves)
    # Attention's own backward is the same in both, so that only the bias' sum is added in another order.
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[3].float(), want[3].float(), rtol=2**-6, atol=2**-6)
    compiled = torch.compile(attended, fullgraph=True)
    torch.testing.assert_close(results(compiled, leaves)[3].float(), got[3].float(), rtol=2**-6, atol=2**-6)


def test_replays_from_a_cuda_graph() -> None:
    parts = on_device(gradients((4, 64, 3, 16, 72), BF16), DEVICE)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        backward(parts)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backward(parts)
    parts[1].copy_(torch.randn_like(parts[1]))
    graph.replay()
    assert all(map(torch.equal, captured, backward(parts)))


def test_more_than_2_to_the_31_elements() -> None:
    parts = [torch.zeros(1, 700_000, 16, 72, dtype=BF16, device=DEVICE) for _ in range(3)]
    assert 3 * parts[0].numel() > 1 << 31
    for part in parts:
        part[:, -3:] = torch.randn(1, 3, 16, 72, device=DEVICE).to(BF16)
    dpacked, _ = backward(parts)
    assert torch.equal(dpacked[:, -3:], torch.stack([part[:, -3:] for part in parts], 2))
