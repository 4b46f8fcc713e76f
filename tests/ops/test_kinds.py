"""Kinds of tensors that no op takes are refused in a sentence that names them, on every way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.masked import masked_tensor

from ditkernels import ops
from tests.test_torch_tools import MODELS, batch

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of:UserWarning")

V = torch.ones(3, 48)
CALLS: dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]] = {
    "modulate_norm": ((3, 7, 48), lambda x: ops.modulate_norm(x, V, V)),
    "gated_residual": ((3, 7, 48), lambda x: ops.gated_residual(torch.ones(3, 7, 48), x, V)),
    "gated_residual_norm": ((3, 7, 48), lambda x: ops.gated_residual_norm(x, x, V, V, V)),
    "bias_gelu": ((3, 7, 48), lambda x: ops.bias_gelu(x, V[0])),
    "mlp": ((3, 7, 48), lambda x: ops.mlp(x, torch.ones(96, 48), None, torch.ones(48, 96))),
    "attention": ((3, 7, 3, 4, 4), lambda x: ops.attention(x)),
    "split_qkv": ((3, 7, 3, 4, 4), lambda x: ops.split_qkv(x, V[0])),
    "patch_embed": ((3, 4, 6, 6), lambda x: ops.patch_embed(x, torch.ones(8, 4, 2, 2), None, torch.ones(1, 9, 8))),
    "final_layer": ((3, 7, 48), lambda x: ops.final_layer(x, V, V, torch.ones(16, 48), grid=(1, 7), patch_size=2)),
    "unpatchify": ((3, 7, 48), lambda x: ops.unpatchify(x, grid=(1, 7), patch_size=2)),
}


def masked(x: Tensor) -> Tensor:
    return masked_tensor(x, torch.ones_like(x, dtype=torch.bool))  # type: ignore[no-any-return]


def strided(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x), layout=torch.strided)


def jagged(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x), layout=torch.jagged)


KINDS = {masked: "a MaskedTensor", strided: "a nested tensor", jagged: "a nested tensor"}
of_each_kind = pytest.mark.parametrize("kind", KINDS)


@of_each_kind
@pytest.mark.parametrize("name", CALLS)
def test_an_op_names_what_it_refuses(name: str, kind: Callable[[Tensor], Tensor]) -> None:
    shape, call = CALLS[name]
    call(torch.ones(shape))  # a call like the one before takes a shorter way
    with pytest.raises(TypeError, match=f"^{name}: got {KINDS[kind]}"):
        call(kind(torch.ones(shape)))


class Calling(nn.Module):
    def __init__(self, call: Callable[[Any], Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(x)


@pytest.mark.parametrize("name", CALLS)
def test_an_op_names_symbolic_trace(name: str) -> None:
    shape, call = CALLS[name]
    call(torch.ones(shape))
    with pytest.raises(TypeError, match=f"^{name}: got a proxy of torch.fx.symbolic_trace, which is not supported"):
        torch.fx.symbolic_trace(Calling(call))


def test_an_argument_behind_the_first_is_named_too() -> None:
    x, weight = torch.ones(3, 4, 6, 6), torch.ones(8, 4, 2, 2)
    with pytest.raises(TypeError, match=r"^patch_embed: got a proxy of torch.fx.symbolic_trace"):
        torch.fx.symbolic_trace(Calling(lambda positions: ops.patch_embed(x, weight, None, positions)))
    with pytest.raises(TypeError, match=r"^attention: got a MaskedTensor"):
        ops.attention(torch.ones(3, 7, 4, 4), masked(torch.ones(3, 5, 2, 4, 4)))


@pytest.mark.parametrize("name", ["gated_residual", "attention", "split_qkv"])
def test_a_compiled_op_names_what_it_refuses(name: str) -> None:
    shape, call = CALLS[name]
    torch._dynamo.reset()
    with pytest.raises((TypeError, torch._dynamo.exc.Unsupported), match=f"{name}: got a nested tensor"):
        torch.compile(call, backend="eager", fullgraph=True)(jagged(torch.ones(shape)))


@pytest.mark.parametrize("model", MODELS)
def test_a_model_names_what_it_refuses(model: str) -> None:
    made, (x, t, y) = MODELS[model](), batch()
    named = "DiT" if model == "own" else "accelerated model"
    for kind, word in KINDS.items():
        with pytest.raises(TypeError, match=f"^{named}: got {word}"):
            made(kind(x), t, y)
    with pytest.raises(TypeError, match=f"^{named}: got a proxy of torch.fx.symbolic_trace"):
        torch.fx.symbolic_trace(made)
