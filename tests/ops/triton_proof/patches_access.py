"""patch_embed, final_layer, unpatchify, interpreted: what the kernels read and write, in any order of programs, at any offset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from ditkernels.ops import dispatch
from ditkernels.ops.image import final_layer, patch_embed, triton, unpatchify
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.ops import test_final_layer, test_patch_embed
from tests.ops.test_final_layer import BF16, F32, OPTIONAL
from tools.kernel_proof.interpreted import Launch, guarded, in_place, load_sources, reordered, shuffled, traced

GRID = (5, 8)  # 40 tokens: blocks of 16, 32 and 64 that are not full


def run_final_layer(
    width: int = 100, patch: int = 2, kept: tuple[str, ...] = OPTIONAL, grid: tuple[int, int] = GRID
) -> list[Tensor]:
    inputs = test_final_layer.make_inputs(2, grid, width, patch, F32, BF16, kept=kept)
    return test_final_layer.forward_and_gradients(final_layer, inputs, grid=grid, patch_size=patch)


def run_patch_embed(
    width: int = 100, wanted: tuple[str, ...] = test_patch_embed.NAMES, grid: tuple[int, int] = GRID
) -> list[Tensor]:
    inputs = test_patch_embed.make_inputs(2, grid, width, 2, F32, BF16, F32)
    return test_patch_embed.forward_and_gradients(patch_embed, inputs, wanted)


def run_unpatchify() -> list[Tensor]:
    tokens = torch.arange(2 * 40 * 32.0).reshape(40, 2, 32).transpose(0, 1).requires_grad_()
    image = unpatchify(tokens, grid=GRID, patch_size=2)
    return [
        image,
        *torch.autograd.grad(image, tokens, image.detach().transpose(0, 1).contiguous().transpose(0, 1)),
    ]


def passes(launches: list[Launch], shape: tuple[int, int, int]) -> Counter[str]:
    """By kernel: how many (B, N, D) tensors are read or written, each element exactly once. No other tensor may be as large."""
    counted: Counter[str] = Counter()
    for launch in launches:
        for name, tensor in launch.tensors().items():
            if tuple(tensor.shape) != shape:
                assert tensor.numel() < shape[0] * shape[1] * shape[2], f"{launch.kernel}: {name} is a temporary"
                continue
            for store in (False, True):
                counts = launch.counts(name, store=store).unique().tolist()
                assert counts in ([0], [1]), f"{launch.kernel}: {name} is touched {counts} times"
                counted[launch.kernel] += counts[0]
    return counted


@pytest.mark.parametrize("width", [40, 192])
@pytest.mark.parametrize(
    "kept, expected",
    [
        (OPTIONAL, {"final_rows": 2, "forward_rows": 4, "backward_rows": 5}),
        (("shift", "scale", "bias"), {"final_rows": 1, "forward_rows": 2, "backward_rows": 3}),
    ],
)
def test_final_layer_touches_every_tensor_once_a_pass(width: int, kept: tuple[str, ...], expected: dict[str, int]) -> None:
    """Beside the norm family's passes the products of the backward read h and write dh: 11 in all, 7 without a branch."""
    with traced() as launches:
        run_final_layer(width, kept=kept, grid=(17, 8))
    assert +passes(launches, (2, 136, width)) == expected


@pytest.mark.parametrize("width", [40, 384])
def test_patch_embed_touches_every_tensor_once_a_pass(width: int) -> None:
    """The product and the sums of the backward, in plain PyTorch, read dy."""
    with traced() as launches:
        run_patch_embed(width, grid=(17, 8))
    assert +passes(launches, (2, 136, width)) == {"embed": 1}
    assert [launch.kernel for launch in launches] == ["embed", "place_values", "gather_values"]


@pytest.mark.parametrize("run", [run_final_layer, run_patch_embed, run_unpatchify])
def test_no_program_depends_on_another(run: Callable[[], list[Tensor]]) -> None:
    """Disjoint writes, no reads of another program's writes, nothing outside the arguments, equal bits in any order."""
    with traced() as launches:
        straight = run()
    for launch in launches:
        assert not launch.writers_clash(), launch.kernel
        assert not launch.crosstalk(), launch.kernel
        assert launch.strays() == 0, launch.kernel
    assert max(launch.programs for launch in launches) > 2
    with reordered(shuffled(0)):
        assert all(torch.equal(a, b) for a, b in zip(straight, run()))


# ---- Offsets beyond 2^31 ---------------------------------------------------------------------------------------------

FAR = 1 << 31


def spread(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    extent = sum((n - 1) * s for n, s in zip(tensor.shape, strides)) + 1
    return torch.empty(extent, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


def check_strides_beyond(kernels: dict[str, Callable]) -> None:
    """Tensors whose samples, rows or channels lie more than 2^31 elements apart give the bits of packed ones."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, branch, image = randn(2, 2, 3).to(BF16), randn(2, 2, 3).to(BF16), randn(2, 1, 2, 4).to(BF16)
    gate, shift, scale = (randn(2, 3).to(BF16) for _ in range(3))
    weight, bias = randn(4, 3).to(BF16), randn(4)
    tokens, patch_weight, pos = randn(2, 2, 4).to(BF16), randn(3, 1, 2, 2), randn(2, 3).to(BF16)

    def everything(
        x: Tensor,
        branch: Tensor,
        image: Tensor,
        vectors: list[Tensor],
        weight: Tensor,
        tokens: Tensor,
        pos: Tensor,
    ) -> list[Tensor]:
        tensors = (x, branch, vectors[0], None, *vectors[1:], None, None, weight, bias)
        return [
            kernels["final_layer"](*tensors, 1, 2, 2, "layernorm", 1e-6, F32),
            kernels["patch_embed"](image, patch_weight, None, pos[None], F32),
            *(kernels["unpatchify"](tokens, 1, 2, 2, first) for first in (False, True)),
            *(kernels["patchify"](image, 2, first, BF16) for first in (False, True)),
        ]

    expected = everything(x, branch, image, [gate, shift, scale], weight, tokens, pos)
    far, near = FAR + 8, FAR // 2 + 24  # the latter for three and more
    for tall, wide, of_weight, of_image in (
        ((far, 4, 1), (far, 1), (near, 1), (far, 8, 4, 1)),
        ((4, far, 1), (1, near), (1, near), (8, 8, far, 1)),
        ((3, 6, near), (far, 1), (1, near), (8, 8, 4, near)),
    ):
        with in_place(), guarded():
            got = everything(
                spread(x, tall),
                spread(branch, tall),
                spread(image, of_image),
                [spread(v, (far, 1)) for v in (gate, shift, scale)],
                spread(weight, of_weight),
                spread(tokens, tall),
                spread(pos, wide),
            )
        for i, (a, b) in enumerate(zip(got, expected)):
            assert torch.equal(a, b), f"output {i} at strides {tall}, {wide}, {of_image}"


# Tensors of more than 2^31 elements, of whose memory only what the last programs touch is ever used.
FAR_LENGTH, FAR_WIDTH = 131_200, 16384


def last(programs: int) -> list[int]:
    return [programs - 1]


def far_like(near: Tensor) -> Tensor:
    """A (1, FAR_LENGTH, D) tensor that ends in the one row of ``near``."""
    far = torch.empty(1, FAR_LENGTH, near.shape[2], dtype=near.dtype)
    far[:, -1:] = near
    return far


def assert_same_end(far: Tensor, near: Tensor, channels: int, name: str) -> None:
    """The last channels of the last token, which the last program writes."""
    torch.testing.assert_close(far[-1, -1, -channels:], near[-1, -1, -channels:], msg=name)


def check_final_layer_beyond(kernels: dict[str, Callable]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(1, 1, FAR_WIDTH, generator=generator).to(BF16) for _ in range(2))
    gate, shift, scale = torch.randn(3, 1, FAR_WIDTH, generator=generator)
    weight = torch.randn(4, FAR_WIDTH, generator=generator) / FAR_WIDTH**0.5

    def forward(x: Tensor, branch: Tensor) -> Tensor:
        tensors = (x, branch, gate, None, shift, scale, None, None, weight, None)
        out = kernels["final_layer"](*tensors, x.shape[1], 1, 1, "layernorm", 1e-6, F32)
        return out.transpose(1, 2)[..., 0]

    expected = forward(x, branch)
    with in_place(), guarded(), reordered(last):
        got = forward(far_like(x), far_like(branch))
    assert_same_end(got, expected, 4, "out")


def check_patch_embed_beyond(kernels: dict[str, Callable]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 1, 1, 1), torch.randn(FAR_WIDTH, 1, 1, 1, generator=generator)
    pos = torch.randn(1, 1, FAR_WIDTH, generator=generator).to(BF16)
    expected = kernels["patch_embed"](x, weight, None, pos, BF16)
    with in_place(), guarded(), reordered(last):
        got = kernels["patch_embed"](x.expand(-1, -1, FAR_LENGTH, -1), weight, None, far_like(pos), BF16)
    assert_same_end(got, expected, 128, "y")


def check_unpatchify_beyond(kernels: dict[str, Callable]) -> None:
    grid, values = (FAR_LENGTH, 1024), 16
    tokens = torch.empty(1, grid[0] * grid[1], values, dtype=BF16)
    assert tokens.numel() > FAR
    tokens[0, -64:] = torch.arange(64 * values).reshape(64, values).to(BF16)
    with in_place(), guarded(), reordered(last):
        image = kernels["unpatchify"](tokens, *grid, 1, False)
        assert torch.equal(image[0, -1, -1, -64:], tokens[0, -64:, -1])
        image[0, :, -1, -64:] = tokens[0, -64:].t()
        assert torch.equal(kernels["patchify"](image, 1, False, BF16)[0, -64:], tokens[0, -64:])


BEYOND = {
    "final_layer": check_final_layer_beyond,
    "patch_embed": check_patch_embed_beyond,
    "unpatchify": check_unpatchify_beyond,
}


KERNELS = {
    name: dispatch.OPS[name].implementations["triton"].kernel for name in ("final_layer", "patch_embed", "unpatchify", "patchify")
}


def test_strides_beyond_2_to_the_31_elements() -> None:
    check_strides_beyond(KERNELS)


@pytest.mark.parametrize("op", BEYOND)
def test_rows_beyond_2_to_the_31_elements(op: str) -> None:
    BEYOND[op](KERNELS)


def test_kernels_with_32_bit_offsets_would_be_found(tmp_path: Path) -> None:
    narrow, _ = load_sources(triton, lambda s: s.replace("tl.int64", "tl.int32"), tmp_path)
    assert set(narrow) == set(KERNELS)
    for check in (check_strides_beyond, *BEYOND.values()):
        with pytest.raises((InterpreterError, AssertionError)):
            check(narrow)
