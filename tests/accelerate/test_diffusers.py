"""accelerate() on diffusers' transformers: agreement, sites, refusals, and what the library does with blocks by their class."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditkernels
from ditkernels import accelerate, restore
from ditkernels.accelerate import swap
from ditkernels.accelerate.diffusers.table import known
from tests import numerics
from tests.helpers.counting import Graphs, counted
from tools.accelerate_sites import Sites, fused
from tools.diffusers_models import MODELS, Inputs

pytest.importorskip("diffusers")

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
Results = dict[str, Tensor]

FORMS = ["FluxTransformer2DModel", "PixArtTransformer2DModel", "Kandinsky5Transformer3DModel"]
"""One class of each form of block: joint attention with parallel blocks, cross-attention, others."""

QUICK = [*FORMS, "SD3Transformer2DModel", "SD3Transformer2DModel-3.5", "WanTransformer3DModel", "LTXVideoTransformer3DModel"]
QUICK += ["AuraFlowTransformer2DModel", "CogVideoXTransformer3DModel", "Lumina2Transformer2DModel"]

SITES = {
    "modulate_norm": 1,
    "gated_residual": 1,
    "gated_residual_norm": 2,
    "gated_residual_branch_norm": 2,
    "gated_residual_norm_branch_norm": 3,
}
"""In a call of an op."""

LEAST = 0.9
"""Of all sites of adaLN. A tiny model has few blocks, so that the last norm, which some models modulate themselves, weighs more."""

WITHOUT_A_GRADIENT = ("to_k.bias", "add_k_proj.bias", "norm_k.bias", "norm_added_k.bias", "key_norm.bias")
"""Softmax ignores the biases of keys, so their true gradient is zero."""


NOT_IN_FP64 = ("CosmosTransformer3DModel",)
"""The library sums in fp32 what it will not round to it."""


ROUNDS_TO_BF16 = ("Kandinsky5Transformer3DModel",)
"""Its rotary positions leave queries and keys in bf16 whatever the model's dtype, so that a unit of fp32 may turn one of theirs."""


def marked(names: list[str], quick: list[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def quietly(model: nn.Module, **options: Any) -> ditkernels.accelerate.Report:
    return accelerate(model, file=io.StringIO(), **options)


def made(name: str) -> nn.Module:
    return MODELS[name].make()


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    items = result.values() if isinstance(result, dict) else result
    return [tensor for item in items for tensor in tensors(item)] if isinstance(result, (dict, list, tuple)) else []


def called(model: nn.Module, name: str, batch: int = 2, dtype: torch.dtype = F32) -> Tensor:
    """The output for fixed random inputs."""
    return tensors(model(**MODELS[name].call(Inputs(batch, dtype))))[0]


def run(model: nn.Module, name: str, batch: int, dtype: torch.dtype) -> Results:
    """The output, and the gradient of every parameter."""
    out = called(model, name, batch, dtype)
    parameters = dict(model.named_parameters())
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    gradients = torch.autograd.grad(out, list(parameters.values()), cotangent, allow_unused=True)
    results = {f"d{n}": g for n, g in zip(parameters, gradients) if g is not None and not n.endswith(WITHOUT_A_GRADIENT)}
    return {"output": out.detach(), **results}


def at(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in a dtype, as ``from_pretrained`` has it: some modules stay in fp32 beside bf16."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not (dtype == BF16 and set(kept) & set(name.split("."))):
            tensor.data = tensor.data.to(dtype)
    return model


def ideal_of(model: nn.Module) -> nn.Module:
    """The model in fp64, whose sinusoids the library computes in fp32."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_pre_hook(lambda layer, args: (args[0].to(layer.weight.dtype), *args[1:]))
    return at(model, F64)


def assert_agrees(name: str, batch: int, dtype: torch.dtype) -> None:
    model = at(made(name), dtype)
    rewired = copy.deepcopy(model)
    report = quietly(rewired)
    assert not report.left, str(report)
    low, got = run(model, name, batch, dtype), run(rewired, name, batch, dtype)
    assert low["output"].abs().max() > 0.1
    assert got.keys() == low.keys()
    if name in NOT_IN_FP64:
        for key, value in low.items():
            numerics.assert_changed_agreement(got[key], value, value.abs().max().item(), f"{name} {key}")
        return
    precision = BF16 if name in ROUNDS_TO_BF16 else None
    for key, value in run(ideal_of(model), name, batch, F64).items():
        assert got[key].dtype == low[key].dtype
        numerics.assert_model_contract(got[key].to(precision), low[key].to(precision), value, f"{name} {key}")


# ---- Agreement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", marked(list(MODELS), QUICK))
def test_outputs_and_gradients_agree(name: str, batch: int) -> None:
    assert_agrees(name, batch, F32)


@pytest.mark.parametrize("name", marked([name for name in MODELS if name not in NOT_IN_FP64], FORMS))
def test_agrees_in_bf16(name: str) -> None:
    assert_agrees(name, 3, BF16)


@pytest.mark.parametrize("name", list(MODELS))
def test_sites_run_fused_and_restore_brings_the_bits_back(name: str) -> None:
    model = made(name)
    with torch.no_grad():
        want = called(model, name)
        with Sites(model) as sites:
            called(model, name)
        report = quietly(model)
        assert not report.left, str(report)
        with fused() as ran:
            called(model, name)
        assert LEAST * sites.count <= ran["sites"] <= sites.count
        restore(model)
        with counted() as calls:
            assert torch.equal(called(model, name), want)
    assert set(calls.values()) == {0}
    assert not any(isinstance(module, swap.Fused) for module in model.modules())


def parts_of(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if known(module) is not None)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_fused_class_hides_no_layer_and_no_attribute_of_its_original(name: str) -> None:
    for part in parts_of(made(name)):
        mixin = known(part)
        assert mixin is not None
        ours = {key for base in mixin.__mro__ if issubclass(base, swap.Fused) for key in vars(base) if not key.startswith("__")}
        theirs = {*part._modules, *part._parameters, *part._buffers, *vars(part), *vars(type(part))} - {
            *vars(nn.Module()),
            "forward",
        }
        assert not ours & theirs, type(part).__name__


# ---- Refusals --------------------------------------------------------------------------------------------------------


def as_another_release(model: nn.Module, kind: type[nn.Module], forward: Callable[..., Any]) -> None:
    """Gives the blocks of class ``kind`` a class of the same module and name with another forward."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "forward": forward}
    changed = type(kind.__name__, (kind,), names)
    for module in model.modules():
        if type(module) is kind:
            module.__class__ = changed


def of_flux() -> type[nn.Module]:
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    return FluxTransformerBlock


def test_a_changed_copy_is_refused_by_name_and_runs_as_before() -> None:
    name, kind = "FluxTransformer2DModel", of_flux()
    genuine = kind.forward

    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: Any = None,
    ) -> Any:
        text, image = genuine(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        return text, image + 1e-3 * hidden_states

    model = made(name)
    as_another_release(model, kind, forward)
    plain = copy.deepcopy(model)
    report = quietly(model)
    blocks = [part for part in report.parts if part.name in ("transformer_blocks.0", "transformer_blocks.1")]
    assert len(blocks) == 2
    assert all("its own forward computes something else" in part.reason for part in blocks)
    assert all(part.fused for part in report.parts if part not in blocks)
    with torch.no_grad():
        torch.testing.assert_close(called(model, name), called(plain, name), rtol=1e-4, atol=1e-5)


def test_a_release_whose_forward_agrees_is_fused() -> None:
    name, kind = "FluxTransformer2DModel", of_flux()
    genuine = kind.forward

    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: Any = None,
    ) -> Any:
        return genuine(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)

    model = made(name)
    as_another_release(model, kind, forward)
    report = quietly(model)
    assert not report.left, str(report)


def test_a_subclass_that_keeps_the_forward_counts_as_its_parent() -> None:
    name, kind = "FluxTransformer2DModel", of_flux()
    model = made(name)
    for block in model.transformer_blocks:
        block.__class__ = type("Mine", (kind,), {})
    assert {part.name for part in quietly(model).fused} >= {"transformer_blocks.0", "transformer_blocks.1"}


def test_a_second_call_says_so_and_changes_nothing() -> None:
    model = made("PixArtTransformer2DModel")
    quietly(model)
    classes = [type(module) for module in model.modules()]
    assert {part.reason for part in quietly(model).parts} == {"it is accelerated already"}
    assert [type(module) for module in model.modules()] == classes


def test_nothing_is_rewired_by_a_call_that_raises() -> None:
    closed = io.StringIO()
    closed.close()
    model = made("FluxTransformer2DModel")
    with pytest.raises(ValueError, match="closed file"):
        accelerate(model, file=closed)
    assert not any(isinstance(module, swap.Fused) for module in model.modules())


def test_conditioning_by_frame_takes_the_originals_way() -> None:
    """As Wan 2.2 has it: the condition is one of tokens, (B, N, 6, D)."""
    model = made("WanTransformer3DModel")
    plain = copy.deepcopy(model)
    quietly(model)
    arguments = MODELS["WanTransformer3DModel"].call(Inputs(2))
    arguments["timestep"] = arguments["timestep"][:, None].repeat(1, 8)
    with torch.no_grad(), counted() as calls:
        assert torch.equal(model(**arguments).sample, plain(**arguments).sample)
    assert set(calls.values()) == {0}


@pytest.mark.parametrize("path", ["norm1", "norm1.linear", "norm1.norm", "norm2", "ff", "attn"])
def test_a_layer_that_somebody_hooks_is_called(path: str) -> None:
    name = "FluxTransformer2DModel"
    model, plain = made(name), made(name)
    quietly(model)
    for each in (model, plain):
        each.transformer_blocks[0].get_submodule(path).register_forward_hook(lambda layer, args, out: twofold(out))
    with torch.no_grad(), counted() as calls:
        torch.testing.assert_close(called(model, name), called(plain, name), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(called(model, name), called(made(name), name), rtol=1e-3)
    assert calls["gated_residual_norm"] > 0


def twofold(out: Any) -> Any:
    return tuple(map(twofold, out)) if isinstance(out, tuple) else 2 * out


# ---- What the library does with blocks -------------------------------------------------------------------------------


def compiled(model: nn.Module, graphs: Graphs, name: str) -> Tensor:
    return called(torch.compile(model, backend=graphs), name)


def compiled_by_block(model: nn.Module, graphs: Graphs, name: str) -> Tensor:
    for part in parts_of(model):
        part.compile(backend=graphs, fullgraph=True)
    return called(model, name)


@pytest.mark.parametrize(
    "name, compile_",
    [pytest.param(name, compiled_by_block) for name in FORMS]
    + [pytest.param(name, compiled, marks=pytest.mark.slow) for name in MODELS],
)
def test_compiles(name: str, compile_: Callable[[nn.Module, Graphs, str], Tensor]) -> None:
    torch._dynamo.reset()
    model, graphs = made(name), Graphs(tuple(SITES))
    with torch.no_grad():
        want = called(model, name)
        quietly(model)
        with fused() as ran:
            called(model, name)
        got = compile_(model, graphs, name)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert sum(SITES[op] * calls for op, calls in graphs.calls.items()) == ran["sites"]


def first_block_cache(model: nn.Module) -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.5))


def layer_skip(model: nn.Module) -> None:
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    lists = [name for name, child in model.named_children() if isinstance(child, nn.ModuleList) and "block" in name]
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn=lists[0]))


def twice(model: nn.Module, name: str) -> Tensor:
    """Of two calls the second, of which a cache knows the first."""
    from diffusers.models.cache_utils import CacheMixin

    with torch.no_grad(), CacheMixin.cache_context(model, "a sampling"):
        called(model, name)
        return called(model, name)


CACHED = [
    ("FluxTransformer2DModel", first_block_cache),
    ("LTXVideoTransformer3DModel", first_block_cache),
    ("LTXVideoTransformer3DModel", layer_skip),
]
"""What diffusers 0.42.1 can do: skipping a block of Flux swaps its two streams there, and of Kandinsky's it seeks hidden_states."""


@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("name, apply", CACHED)
def test_caches_and_layer_skip_give_what_they_gave(name: str, apply: Callable[[nn.Module], None], after: bool) -> None:
    plain, model = made(name), made(name)
    apply(plain)
    if after:
        quietly(model)
        apply(model)
    else:
        apply(model)
        quietly(model)
    with counted() as calls:
        got = twice(model, name)
    assert sum(calls.values()) > 0 or not after
    with torch.no_grad():
        torch.testing.assert_close(got, twice(plain, name), rtol=1e-4, atol=1e-5)
        assert apply is first_block_cache or not torch.allclose(got, called(made(name), name), rtol=1e-2)
