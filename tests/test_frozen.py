"""Training a part of a model saves no more for backward than the reference does, and gives the same gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import ditkernels
from ditkernels import models, reference
from ditkernels.reference import CONDITIONINGS
from tests import numerics
from tests.helpers.frozen import add_lora, saved_bytes, train_only
from tests.helpers.native_cpu import SERVING
from tests.test_models import BF16, F64, SMALL, batch, pair

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
TRAINED: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "attention": lambda name: "attn." in name,
    "qkv_bias": lambda name: name.endswith("qkv.bias"),
    "adaLN": lambda name: "adaLN" in name,
    "head": lambda name: name.startswith("final_layer.linear"),
    "head_with_its_norm": lambda name: name.startswith("final_layer"),
    "last_mlp": lambda name: name.startswith("blocks.2.mlp"),
    "lora": lambda name: name.endswith((".down", ".up")),
}


def prepared(model: reference.DiT, trained: str) -> reference.DiT:
    torch.manual_seed(0)
    if trained == "lora":
        add_lora(model, LINEARS)
    train_only(model, TRAINED[trained])
    return model


@pytest.mark.parametrize("backend", sorted({"torch", SERVING}))
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("trained", TRAINED)
def test_saves_at_most_what_the_reference_saves(trained: str, conditioning: str, autocast: bool, backend: str) -> None:
    fused, plain = (
        prepared(m, trained)
        for m in (models.DiT(conditioning=conditioning, **SMALL), reference.DiT(conditioning=conditioning, **SMALL))
    )
    if not any(p.requires_grad for p in plain.parameters()):
        pytest.skip("this conditioning has no such part")
    inputs = batch(plain, 8)
    with ditkernels.use_backend(backend), torch.autocast("cpu", BF16, enabled=autocast):
        got, want = (saved_bytes(model, lambda model=model: model(*inputs)) for model in (fused, plain))
    assert got <= want


@pytest.mark.parametrize("backend", sorted({"torch", SERVING}))
@pytest.mark.parametrize("conditioning", ["adaln_zero", "in_context"])
@pytest.mark.parametrize("trained", [name for name in TRAINED if name != "all"])
def test_the_gradients_of_a_part_are_the_references(trained: str, conditioning: str, backend: str) -> None:
    fused, plain = (prepared(model, trained) for model in pair(conditioning=conditioning, **SMALL))
    if not any(p.requires_grad for p in plain.parameters()):
        pytest.skip("this conditioning has no such part")
    exact = prepared(pair(F64, conditioning=conditioning, **SMALL)[1], trained).double()
    exact.load_state_dict(plain.state_dict())

    def gradients(model: reference.DiT, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        x, t, y = batch(model, dtype=dtype)
        out = model(x, t, y)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return {"output": out, **dict(zip(named, torch.autograd.grad(out, list(named.values()), cotangent)))}

    with ditkernels.use_backend(backend):
        got = gradients(fused, torch.float32)
    low, ideal = gradients(plain, torch.float32), gradients(exact, F64)
    for name, value in ideal.items():
        numerics.assert_model_contract(got[name], low[name], value, name)
