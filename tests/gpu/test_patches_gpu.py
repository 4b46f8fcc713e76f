"""The compiled kernels of patch_embed, final_layer and unpatchify on a GPU, at real sizes: ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

import numerics
import pytest
import test_final_layer
import test_patch_embed
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ditkernels import reference
from ditkernels.ops import _registry as registry
from ditkernels.ops.final_layer import final_layer, unpatchify
from ditkernels.ops.patch_embed import patch_embed
from ditkernels.reference import SIZES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
WIDTHS = [size["hidden_size"] for size in SIZES.values()]
DTYPES = [(BF16, BF16), (F32, BF16), (F32, F32), (F16, F16)]
MODELS_OWN = ("branch", "gate", "shift", "scale", "bias")
LATENT = 32  # 256 x 256 pixels


@pytest.fixture(autouse=True)
def _on_triton():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with registry.use_backend("triton"):
        yield


def on_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cuda() for name, value in inputs.items()}


def there_and_back(function: object, inputs: dict[str, Tensor], **options: object) -> list[Tensor]:
    """The output, then the gradient of every input, for one cotangent that every dtype holds exactly."""
    leaves = {n: v.detach().requires_grad_() for n, v in inputs.items()}
    out = function(**leaves, **options)
    cotangent = torch.randint(-16, 17, out.shape, generator=torch.Generator().manual_seed(1)) / 8
    return [out, *torch.autograd.grad(out, list(leaves.values()), cotangent.to(out))]


def assert_parity(fused: object, plain: object, inputs: dict[str, Tensor], **options: object) -> None:
    actual, low = there_and_back(fused, inputs, **options), there_and_back(plain, inputs, **options)
    wide = {n: v.double() for n, v in inputs.items()}
    exact = there_and_back(plain, wide, **{**options, "out_dtype": torch.float64})
    for got, near, true, name in zip(actual, low, exact, ["out", *(f"d{n}" for n in inputs)]):
        numerics.assert_contract(got, near, true, name)


def final_inputs(
    width: int, patch: int, stream: torch.dtype, rest: torch.dtype, batch: int = 8
) -> tuple[dict[str, Tensor], dict[str, object]]:
    grid = (LATENT // patch, LATENT // patch)
    made = test_final_layer.make_inputs(batch, grid, width, patch, stream, rest, 8, MODELS_OWN)
    return on_gpu(made), {"grid": grid, "patch_size": patch, "out_dtype": rest}


@pytest.mark.parametrize("stream, rest", DTYPES)
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("width", WIDTHS)
def test_parity_of_final_layer(width: int, patch: int, stream: torch.dtype, rest: torch.dtype) -> None:
    inputs, options = final_inputs(width, patch, stream, rest)
    assert_parity(final_layer, reference.final_layer, inputs, **options)


@pytest.mark.parametrize("stream, rest", DTYPES)
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("width", WIDTHS)
def test_parity_of_patch_embed(width: int, patch: int, stream: torch.dtype, rest: torch.dtype) -> None:
    grid = (LATENT // patch, LATENT // patch)
    inputs = on_gpu(test_patch_embed.make_inputs(8, grid, width, patch, F32, rest, F32))
    assert_parity(patch_embed, test_patch_embed.plain, inputs, out_dtype=stream)


@pytest.mark.parametrize("patch, channels", [(2, 4), (2, 8), (4, 8), (8, 3), (1, 3)])
def test_values_moved_by_unpatchify(patch: int, channels: int) -> None:
    tokens = torch.randn(16, 96, patch * patch * channels, device="cuda", dtype=BF16, requires_grad=True)
    got = unpatchify(tokens, grid=(8, 12), patch_size=patch)
    want = reference.unpatchify(tokens, grid=(8, 12), patch_size=patch)
    assert torch.equal(got, want)
    cotangent = torch.randn_like(got)
    assert torch.equal(
        torch.autograd.grad(got, tokens, cotangent)[0], torch.autograd.grad(want, tokens, cotangent)[0]
    )


def test_one_graph_checkpointing_and_cuda_graphs_give_the_same_bits() -> None:
    inputs, options = final_inputs(1152, 2, F32, BF16)
    embedded = on_gpu(test_patch_embed.make_inputs(8, (16, 16), 1152, 2, F32, BF16, F32))

    def both(final: object, embed: object) -> list[Tensor]:
        return [*there_and_back(final, inputs, **options), *there_and_back(embed, embedded)]

    eager = both(final_layer, patch_embed)
    assert all(map(torch.equal, eager, both(final_layer, patch_embed)))
    compiled = both(torch.compile(final_layer, fullgraph=True), torch.compile(patch_embed, fullgraph=True))
    assert all(map(torch.equal, eager, compiled))

    def again(**leaves: object) -> Tensor:
        return checkpoint(final_layer, use_reentrant=False, **leaves)

    assert all(map(torch.equal, eager, both(again, patch_embed)))
    graph, held = torch.cuda.CUDAGraph(), {n: v.clone() for n, v in inputs.items()}
    with torch.no_grad():
        with torch.cuda.graph(graph):
            image = final_layer(**held, **options)
        graph.replay()
    assert torch.equal(image, eager[0])


def test_autocast_keeps_the_stream_in_fp32() -> None:
    inputs, options = final_inputs(1152, 2, F32, F32)
    embedded = on_gpu(test_patch_embed.make_inputs(8, (16, 16), 1152, 2, F32, F32, F32))
    with torch.autocast("cuda", dtype=BF16):
        assert patch_embed(**embedded).dtype == F32
        image = final_layer(**inputs, **{**options, "out_dtype": None})
    assert image.dtype == BF16
    low = {n: v.to(BF16) if n == "weight" else v for n, v in inputs.items()}
    assert torch.equal(image, final_layer(**low, **{**options, "out_dtype": BF16}))
