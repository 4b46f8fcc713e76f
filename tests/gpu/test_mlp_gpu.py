"""mlp on a GPU, at the models' sizes: cuBLASLt's epilogues and the Triton kernels between products: ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ditkernels import ops, reference
from ditkernels.ops import _native, dispatch
from ditkernels.reference import SIZES
from tests import numerics
from tests.ops.test_mlp import BF16, COVERING, F16, LAYOUTS, NAMES, make_inputs, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTHS = [size["hidden_size"] for size in SIZES.values()]


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda" and not _native.architectures():
        pytest.skip(_native.cuda_library())
    with dispatch.use_backend(request.param):
        yield request.param


def on_gpu(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """With the strides they have."""
    return {
        name: None if v is None else torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda").copy_(v)
        for name, v in inputs.items()
    }


def assert_parity(inputs: dict[str, Tensor | None]) -> None:
    results = [run(ops.mlp, inputs), run(reference.mlp, inputs), run(reference.mlp, inputs, wide=True)]
    names = [name for name in NAMES if inputs["fc1_bias"] is not None or name != "dfc1_bias"]
    for actual, low, exact, name in zip(*results, names, strict=True):
        numerics.assert_contract(actual, low, exact, name)


@pytest.mark.parametrize("dtype, biased", [(BF16, True), (F16, True), (BF16, False)])
@pytest.mark.parametrize("width", WIDTHS)
def test_parity_at_the_models_sizes(width: int, dtype: torch.dtype, biased: bool) -> None:
    assert_parity(on_gpu(make_inputs((8, 256, width, 4 * width, width), dtype, biased)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_parity_at_awkward_sizes(case: tuple, layout: str) -> None:
    assert_parity(on_gpu(make_inputs(*case, layout=layout)))


def test_without_gradients_the_output_is_the_same() -> None:
    inputs = on_gpu(make_inputs((8, 256, 384, 1536, 384), BF16))
    want = run(ops.mlp, inputs)[0]
    with torch.no_grad():
        numerics.assert_contract(ops.mlp(**inputs), want, want.double())


def test_repeats_bit_for_bit() -> None:
    inputs = on_gpu(make_inputs((16, 256, 1152, 4608, 1152), BF16))
    first = run(ops.mlp, inputs)
    for _ in range(3):
        assert all(map(torch.equal, run(ops.mlp, inputs), first))


def test_a_cuda_graph_replays_it() -> None:
    inputs = on_gpu(make_inputs((8, 256, 384, 1536, 384), BF16))
    with torch.no_grad():
        want = ops.mlp(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = ops.mlp(**inputs)
        got.zero_()
        graph.replay()
    assert torch.equal(got, want)


def test_nothing_but_products_passes_over_the_hidden_layer(backend: str) -> None:
    if backend != "cuda":
        pytest.skip("the other backends have kernels of their own between the products")
    inputs = on_gpu(make_inputs((8, 256, 384, 1536, 384), BF16))
    run(ops.mlp, inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(ops.mlp, inputs)
    names = [event.key for event in profile.key_averages()]
    assert not [name for name in names if "forward_tiles" in name or "backward_tiles" in name or "gelu_kernel" in name.lower()]
