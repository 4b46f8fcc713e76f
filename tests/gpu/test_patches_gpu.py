"""The compiled kernels of patch_embed, final_layer and unpatchify on a GPU, at real sizes: ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ditkernels import reference
from ditkernels.ops import dispatch, final_layer, patch_embed, unpatchify
from ditkernels.reference import SIZES
from tests import numerics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
WIDTHS = [size["hidden_size"] for size in SIZES.values()]
DTYPES = [(BF16, BF16), (F32, BF16), (F32, F32), (F16, F16)]
LATENT = 32  # 256 x 256 pixels


@pytest.fixture(autouse=True)
def _on_triton():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with dispatch.use_backend("triton"):
        yield


def normals(width: int) -> Callable[..., Tensor]:
    generator = torch.Generator("cuda").manual_seed(width)
    return lambda *shape: torch.randn(*shape, generator=generator, device="cuda")


def final_inputs(
    width: int, patch: int, stream: torch.dtype, rest: torch.dtype, batch: int = 8
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The last residual left open; x the first tokens of a longer sequence, the vectors of a sample chunks of one tensor."""
    grid, values, normal = (LATENT // patch, LATENT // patch), 8 * patch * patch, normals(width)
    length = grid[0] * grid[1]
    gate, shift, scale = normal(batch, 6 * width).chunk(6, dim=1)[3:]
    made = {
        "branch": normal(batch, length, width),
        "gate": gate,
        "shift": shift,
        "scale": scale,
        "weight": normal(values, width) / width**0.5,
        "bias": normal(values),
    }
    inputs = {"x": normal(batch, length + 2, width)[:, :length].to(stream)}
    inputs |= {name: value.to(rest) for name, value in made.items()}
    return inputs, {"grid": grid, "patch_size": patch, "out_dtype": rest}


def embed_inputs(width: int, patch: int, weight: torch.dtype, batch: int = 8) -> dict[str, Tensor]:
    """fp32 latents, a slice of channels, and fp32 positions."""
    normal = normals(width)
    return {
        "x": normal(batch, 5, LATENT, LATENT)[:, 1:],
        "weight": normal(width, 4, patch, patch).to(weight),
        "bias": normal(width).to(weight),
        "pos_embed": normal(1, (LATENT // patch) ** 2, width),
    }


def plain_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The reference, with the cast that its convolution needs where x and weight differ in dtype."""
    return reference.patch_embed(x.to(weight.dtype), weight, bias, pos_embed, out_dtype=out_dtype)


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
    assert_parity(patch_embed, plain_embed, embed_inputs(width, patch, rest), out_dtype=stream)


def test_rows_too_wide_for_registers() -> None:
    inputs, options = final_inputs(4224, 2, F32, BF16, batch=2)
    assert_parity(final_layer, reference.final_layer, inputs, **options)


@pytest.mark.parametrize("patch, channels", [(2, 4), (2, 8), (4, 8), (8, 3), (1, 3)])
def test_values_moved_by_unpatchify(patch: int, channels: int) -> None:
    tokens = torch.randn(16, 96, patch * patch * channels, device="cuda", dtype=BF16, requires_grad=True)
    got = unpatchify(tokens, grid=(8, 12), patch_size=patch)
    want = reference.unpatchify(tokens, grid=(8, 12), patch_size=patch)
    assert torch.equal(got, want)
    cotangent = torch.randn_like(got)
    assert torch.equal(torch.autograd.grad(got, tokens, cotangent)[0], torch.autograd.grad(want, tokens, cotangent)[0])


def test_one_graph_checkpointing_and_cuda_graphs_give_the_same_bits() -> None:
    inputs, options = final_inputs(1152, 2, F32, BF16)
    embedded = embed_inputs(1152, 2, BF16)

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
    embedded = embed_inputs(1152, 2, F32)
    with torch.autocast("cuda", dtype=BF16):
        assert patch_embed(**embedded).dtype == F32
        image = final_layer(**inputs, **{**options, "out_dtype": None})
    assert image.dtype == BF16
    low = {n: v.to(BF16) if n == "weight" else v for n, v in inputs.items()}
    assert torch.equal(image, final_layer(**low, **{**options, "out_dtype": BF16}))


def test_a_narrower_image_is_rounded_after_the_op_and_changes_no_gradient() -> None:
    inputs, options = final_inputs(1152, 2, F32, F32)
    wide = there_and_back(final_layer, inputs, **options)
    narrow = there_and_back(final_layer, inputs, **{**options, "out_dtype": BF16})
    assert torch.equal(narrow[0], wide[0].to(BF16))
    assert all(map(torch.equal, narrow[1:], wide[1:]))
