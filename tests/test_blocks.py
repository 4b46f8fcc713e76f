"""Blocks and final layers as modules: what torch's own tools see of them and do with them, against the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import ditkernels
from ditkernels import models, reference
from ditkernels.reference import CONDITIONINGS
from tests import numerics
from tests.helpers.counting import Graphs, backwards, counted
from tests.helpers.native_cpu import SERVING, as_ops
from tests.test_models import BF16, F32, F64, SMALL, batch, pair, without_keys

MODULES = ("blocks.1", "final_layer")


def step(model: reference.DiT) -> dict[str, Tensor]:
    """Output and all gradients, by a backward that reentrant checkpointing allows."""
    x, t, y = batch(model, dtype=F64)
    x.requires_grad_()
    model.zero_grad()
    out = model(x, t, y)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(F64))
    # A wrapper's name is part of its parameters' names.
    inner = {n.replace("_checkpoint_wrapped_module.", "").replace("inner.", ""): p for n, p in model.named_parameters()}
    named = [("x", x), *inner.items()]
    return without_keys({"output": out, **{f"d{name}": leaf.grad.clone() for name, leaf in named if leaf.grad is not None}})


def assert_agreement(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """In fp64."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        numerics.assert_fp64_agreement(got[name], value, name)


# ---- Called alone ----------------------------------------------------------------------------------------------------


def gradients(module: nn.Module, *inputs: Any) -> dict[str, Tensor]:
    """The output, and the gradient of every tensor and parameter that has one."""
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    out = module(*inputs)
    assert type(out) is Tensor
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    leaves = {**{f"argument {i}": t for i, t in enumerate(tensors)}, **dict(module.named_parameters())}
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
    return {"output": out, **{name: grad for name, grad in zip(leaves, grads) if grad is not None}}


def inputs_of(model: reference.DiT, name: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """What the model gives the module."""
    seen: list[tuple[Any, ...]] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args))
    model(*batch(model, dtype=dtype))
    handle.remove()
    return tuple(t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in seen[0])


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_module_called_alone_is_the_references(conditioning: str, name: str) -> None:
    fused, plain = pair(F64, conditioning=conditioning, **SMALL)
    inputs = inputs_of(plain, name, F64)
    got, want = (without_keys(gradients(model.get_submodule(name), *inputs)) for model in (fused, plain))
    assert_agreement(got, want)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_block_called_alone_rounds_no_worse(dtype: torch.dtype) -> None:
    fused, plain = pair(dtype, **SMALL)
    inputs = inputs_of(plain, "blocks.1", dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    ideal = gradients(copy.deepcopy(plain.blocks[1]).double(), *exact)
    got, low = (gradients(model.blocks[1], *inputs) for model in (fused, plain))
    for name in ("output", "argument 0", "argument 1"):
        numerics.assert_model_contract(got[name], low[name], ideal[name], name)


# ---- Hooks -----------------------------------------------------------------------------------------------------------

anywhere = torch.nn.modules.module
HOOKS: dict[str, Callable[..., Any]] = {
    "forward": nn.Module.register_forward_hook,
    "forward_pre": nn.Module.register_forward_pre_hook,
    "full_backward": nn.Module.register_full_backward_hook,
    "full_backward_pre": nn.Module.register_full_backward_pre_hook,
    "global_forward": lambda module, hook: anywhere.register_module_forward_hook(hook),
    "global_forward_pre": lambda module, hook: anywhere.register_module_forward_pre_hook(hook),
    "global_full_backward": lambda module, hook: anywhere.register_module_full_backward_hook(hook),
    "global_full_backward_pre": lambda module, hook: anywhere.register_module_full_backward_pre_hook(hook),
}


def seen_by(model: reference.DiT, name: str, register: Callable[..., Any]) -> list[Any]:
    """What a hook on a module is given in a step, flat."""
    watched, seen = model.get_submodule(name), []

    def hook(module: nn.Module, *values: Any) -> None:
        if module is watched:
            flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
            seen.extend(v.detach().clone() if isinstance(v, Tensor) else v for v in flat)

    handle = register(watched, hook)
    try:
        model(*batch(model, dtype=F64)).square().sum().backward()
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("conditioning", ["adaln_zero", "in_context"])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_sees_what_it_sees_on_the_reference(kind: str, name: str, conditioning: str) -> None:
    fused, plain = pair(F64, conditioning=conditioning, **SMALL)
    got, want = (seen_by(model, name, HOOKS[kind]) for model in (fused, plain))
    assert len(got) == len(want) > 0
    for a, b in zip(got, want):
        if isinstance(b, Tensor):
            numerics.assert_fp64_agreement(a, b, kind)
        else:
            assert a == b


def scaled(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * 1.5, *args[1:])


EDITS: dict[str, Callable[[nn.Module], Any]] = {
    "input": lambda module: module.register_forward_pre_hook(scaled),
    "output": lambda module: module.register_forward_hook(lambda module, args, out: out * 1.5),
    "gradient": lambda module: module.register_full_backward_hook(
        lambda module, grads, outs: (*(None if g is None else 1.5 * g for g in grads),)
    ),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("edit", EDITS)
def test_what_a_hook_changes_takes_effect(edit: str, name: str) -> None:
    fused, plain = pair(F64, **SMALL)
    unedited = step(plain)
    for model in (fused, plain):
        EDITS[edit](model.get_submodule(name))
    want = step(plain)
    assert not torch.allclose(want["dx"], unedited["dx"])
    assert_agreement(step(fused), want)


# ---- Who closes the stream -------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """A module of somebody else's, which takes tensors alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        assert isinstance(x, Tensor)
        return self.inner(x, *rest)


def subclassed(module: nn.Module) -> nn.Module:
    def forward(self: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        assert isinstance(x, Tensor)
        return super(kind, self).forward(x, *rest)  # type: ignore[misc]

    kind = type("Changed", (type(module),), {"forward": forward})
    module.__class__ = kind
    return module


def replaced_on_the_instance(module: nn.Module) -> nn.Module:
    genuine = module.forward
    module.forward = lambda *inputs: genuine(*inputs)  # type: ignore[method-assign]
    return module


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *values: None)
    return module


TOUCHES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "hook": hooked,
    "class": subclassed,
    "instance": replaced_on_the_instance,
    "foreign": Wrapper,
    "checkpoint": checkpoint_wrapper,
    "reentrant": partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT),
}


def touch(model: nn.Module, name: str, how: str) -> None:
    model.set_submodule(name, TOUCHES[how](model.get_submodule(name)))


@pytest.mark.parametrize("backend", sorted({"torch", SERVING}))
def test_an_untouched_model_closes_one_residual_a_branch(backend: str) -> None:
    model = models.DiT(**{**SMALL, "depth": 4})
    inputs = batch(model)
    with ditkernels.use_backend(backend):
        with counted() as eager, as_ops(backend):
            out = model(*inputs)
        graphs = Graphs()
        for block in model.blocks:
            block.compile(fullgraph=True, backend=graphs)
        torch._dynamo.reset()
        model(*inputs)
    assert eager == graphs.calls == backwards(out) == {"modulate_norm": 1, "gated_residual": 0, "gated_residual_norm": 7}


@pytest.mark.parametrize("how", TOUCHES)
def test_a_touched_block_closes_the_stream_before_and_behind_it_alone(how: str) -> None:
    fused, plain = pair(F64, **SMALL)
    want = step(plain)
    with counted() as untouched:
        fused(*batch(fused, dtype=F64))
    assert untouched == {"modulate_norm": 1, "gated_residual": 0, "gated_residual_norm": 5}
    touch(fused, "blocks.1", how)
    with torch.no_grad(), counted() as touched:
        fused(*batch(fused, dtype=F64))
    assert touched == {"modulate_norm": 3, "gated_residual": 2, "gated_residual_norm": 3}
    assert_agreement(step(fused), want)


@pytest.mark.parametrize("how", TOUCHES)
def test_a_touched_final_layer_is_given_tensors(how: str) -> None:
    fused, plain = pair(F64, conditioning="in_context", **SMALL)
    want = step(plain)
    touch(fused, "final_layer", how)
    with torch.no_grad(), counted() as calls:
        fused(*batch(fused, dtype=F64))
    assert calls == {"modulate_norm": 1, "gated_residual": 1, "gated_residual_norm": 5}
    assert_agreement(step(fused), want)


@pytest.mark.parametrize("checkpointing", models.CHECKPOINTING)
def test_touched_blocks_can_be_checkpointed(checkpointing: str) -> None:
    fused, plain = pair(F64, **SMALL)
    want = step(plain)
    fused.checkpointing = checkpointing
    for block, how in enumerate(("hook", "foreign", "class")):
        touch(fused, f"blocks.{block}", how)
    assert_agreement(step(fused), want)


def test_compiled_blocks_carry_the_stream_until_they_are_watched() -> None:
    block = models.DiT(**SMALL).blocks[0]
    block.compile(backend="eager")
    wrapped = torch.compile(block, backend="eager")
    assert models.carries_stream(block)
    assert models.carries_stream(wrapped)
    handle = wrapped.register_forward_hook(lambda *values: None)
    assert not models.carries_stream(wrapped)
    handle.remove()
    block.register_forward_hook(lambda *values: None)
    assert not models.carries_stream(wrapped)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "model"])
def test_a_hook_set_before_compile_works_compiled(whole: bool) -> None:
    fused, plain = pair(F64, **{**SMALL, "depth": 2})
    torch._dynamo.reset()
    for model in (fused, plain):
        model.blocks[1].register_forward_hook(lambda module, args, out: out * 1.5)
    want = step(plain)
    if whole:
        fused.compile(backend="eager", fullgraph=True)
    else:
        for block in fused.blocks:
            block.compile(backend="eager", fullgraph=True)
    assert_agreement(step(fused), want)


def test_parts_of_a_block_that_somebody_put_in_their_place_are_called() -> None:
    fused, plain = pair(F64, **SMALL)
    want = step(plain)
    for name in (
        "blocks.0.attn",
        "blocks.0.mlp",
        "blocks.1.attn.qkv",
        "blocks.1.mlp.fc1",
        "blocks.2.attn.proj",
        "blocks.2.mlp.fc2",
    ):
        fused.set_submodule(name, Wrapper(fused.get_submodule(name)))
    assert_agreement(step(fused), want)
