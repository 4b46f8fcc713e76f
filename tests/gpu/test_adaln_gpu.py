"""The compiled adaLN kernels on a GPU, at the models' real sizes: ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ditkernels import ops, reference
from ditkernels.ops import dispatch
from ditkernels.reference import SIZES
from tests import numerics
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
VECTORS = ("gate", "shift", "scale", "branch_bias", "weight", "bias")
TAKES = {
    "modulate_norm": ("x", "shift", "scale", "weight", "bias"),
    "gated_residual": ("x", "branch", "gate", "branch_bias"),
    "gated_residual_norm": ("x", "branch", *VECTORS),
}
WIDTHS = [size["hidden_size"] for size in SIZES.values()]
DTYPES = [(BF16, BF16), (F32, BF16), (F32, F32), (F16, F16)]


def make_inputs(op: str, batch: int, length: int, width: int, stream: torch.dtype, branch: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(width + length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    made = {"x": normal(batch, length, width).to(stream), "branch": normal(batch, length, width).to(branch)}
    chunks = normal(batch, 6 * width).to(branch).chunk(6, dim=1)
    made |= dict(zip(("gate", "shift", "scale"), chunks))
    made |= {name: normal(width).to(branch) for name in ("branch_bias", "weight", "bias")}
    return {name: made[name] for name in TAKES[op]}


def there_and_back(
    function: object, inputs: dict[str, Tensor], dtype: torch.dtype | None = None, **options: object
) -> list[Tensor]:
    """Outputs, then the gradient of every input, for fixed cotangents."""
    leaves = {n: (v if dtype is None else v.to(dtype)).detach().requires_grad_() for n, v in inputs.items()}
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator("cuda").manual_seed(1)
    # Sixteenths are exact in every dtype, so all three computations start from one cotangent.
    sixteenths = [torch.randn(o.shape, generator=generator, device="cuda").mul(16).round() for o in outputs]
    cotangents = [(c / 16).to(o.dtype) for c, o in zip(sixteenths, outputs)]
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), cotangents)]


def assert_parity(op: str, inputs: dict[str, Tensor], norm: str, out_dtype: torch.dtype) -> None:
    options = {} if op == "gated_residual" else {"norm": norm, "out_dtype": out_dtype}
    exact_options = {} if op == "gated_residual" else {"norm": norm, "out_dtype": F64}
    plain = getattr(reference, op)
    results = zip(
        there_and_back(getattr(ops, op), inputs, **options),
        there_and_back(plain, inputs, **options),
        there_and_back(plain, inputs, F64, **exact_options),
    )
    for index, (actual, low, exact) in enumerate(results):
        numerics.assert_contract(actual, low, exact, f"{op} result {index}")


@pytest.mark.parametrize("op, width, dtypes", itertools.product(TAKES, WIDTHS, DTYPES))
def test_parity_at_the_models_sizes(op: str, width: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for norm, length in (("layernorm", 256), ("rmsnorm", 1024)):
        assert_parity(op, make_inputs(op, 16, length, width, *dtypes), norm, dtypes[1])


@pytest.mark.parametrize("shape", [(1, 1, 384), (3, 49, 100), (2, 17, 7), (5, 33, 2500), (2, 3, 16384)])
@pytest.mark.parametrize("op", TAKES)
def test_parity_at_awkward_sizes(op: str, shape: tuple[int, int, int]) -> None:
    assert_parity(op, make_inputs(op, *shape, F32, F32), "layernorm", F32)


@pytest.mark.parametrize("op", TAKES)
def test_repeats_bit_for_bit(op: str) -> None:
    inputs = make_inputs(op, 64, 256, 1152, BF16, BF16)
    first = there_and_back(getattr(ops, op), inputs)
    for _ in range(5):
        assert all(map(torch.equal, first, there_and_back(getattr(ops, op), inputs)))


def test_auto_chooses_triton() -> None:
    with dispatch.use_backend("auto"):
        x = torch.zeros(1, 2, 384, device="cuda")
        assert dispatch.OPS["modulate_norm"].choose(x, None, None, None, None, "layernorm", 1e-6, F32, False) == "triton"


@pytest.mark.parametrize("op", TAKES)
def test_compiles_as_one_graph_with_equal_bits(op: str) -> None:
    inputs = make_inputs(op, 4, 256, 384, F32, BF16)
    compiled = torch.compile(getattr(ops, op), fullgraph=True)
    assert all(map(torch.equal, there_and_back(compiled, inputs), there_and_back(getattr(ops, op), inputs)))


def test_autocast_keeps_the_stream_and_lowers_the_normed_output() -> None:
    inputs = make_inputs("gated_residual_norm", 2, 16, 384, F32, BF16)
    with torch.autocast("cuda", dtype=BF16):
        stream, normed = ops.gated_residual_norm(**inputs)
    assert (stream.dtype, normed.dtype) == (F32, BF16)


@pytest.mark.parametrize("op", TAKES)
def test_checkpointing_gives_equal_bits(op: str) -> None:
    inputs = make_inputs(op, 4, 64, 768, F32, BF16)

    def checkpointed(**leaves: Tensor) -> object:
        return checkpoint(lambda: getattr(ops, op)(**leaves), use_reentrant=False)

    assert all(map(torch.equal, there_and_back(checkpointed, inputs), there_and_back(getattr(ops, op), inputs)))


@pytest.mark.parametrize("op", TAKES)
def test_replays_from_a_cuda_graph(op: str) -> None:
    inputs = make_inputs(op, 4, 64, 1152, BF16, BF16)
    call = getattr(ops, op)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(**inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(**inputs)
    inputs["x"].copy_(torch.randn_like(inputs["x"]))
    graph.replay()
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (captured, call(**inputs))))
    assert all(torch.equal(a, b) for a, b in pairs)


def test_more_than_2_to_the_31_elements() -> None:
    x = torch.zeros(1, 1_900_000, 1152, dtype=BF16, device="cuda")
    assert x.numel() > 1 << 31
    x[:, -3:] = torch.randn(1, 3, 1152, device="cuda").to(BF16)
    normed = ops.modulate_norm(x)
    assert torch.equal(normed[:, -3:], ops.modulate_norm(x[:, -3:].clone()))
