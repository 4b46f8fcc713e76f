"""The fused DiT against the reference: outputs, every parameter gradient, trajectories, state dicts, torch citizenship."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ditkernels
from ditkernels import models, reference
from ditkernels.ops import dispatch
from ditkernels.reference import CONDITIONINGS
from tests import numerics
from tests.helpers.native_cpu import SERVING, as_ops, needs_compiler

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
SMALL = {"input_size": (4, 6), "hidden_size": 48, "depth": 3, "num_heads": 4, "num_classes": 5}
HEAD_DIM_72 = {"input_size": 4, "hidden_size": 144, "depth": 2, "num_heads": 2, "num_classes": 5}


def randomise(model: reference.DiT) -> reference.DiT:
    """A fresh DiT returns exactly zero, which any kernel reproduces: make every trained parameter count."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                std = 0.5 / max(1, parameter.shape[-1]) ** 0.5 if parameter.dim() > 1 else 0.2
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def pair(dtype: torch.dtype = F32, **config: object) -> tuple[models.DiT, reference.DiT]:
    plain = randomise(reference.DiT(**config)).to(dtype).eval()
    fused = models.DiT(**config).to(dtype).eval()
    fused.load_state_dict(plain.state_dict())
    return fused, plain


def batch(model: reference.DiT, size: int = 3, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, model.in_channels, *model.input_size, generator=generator).to(dtype)
    t = torch.randint(0, 1000, (size,), generator=generator)
    return x, t, torch.randint(0, model.num_classes + 1, (size,), generator=generator)


def without_keys(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of qkv biases without their K part, whose true value is zero: softmax ignores it."""
    kept = dict(results)
    for name, value in results.items():
        if name.endswith("attn.qkv.bias"):
            q, _, v = value.chunk(3)
            kept[name] = torch.cat([q, v])
        if name.endswith("cross_attn.kv.bias"):
            kept[name] = value.chunk(2)[1]
    return kept


def forward_backward(model: reference.DiT, dtype: torch.dtype = F32) -> dict[str, Tensor]:
    """Output, input gradient and the gradient of every parameter that is not zero, for a fixed random cotangent."""
    x, t, y = batch(model, dtype=dtype)
    x.requires_grad_()
    out = model(x, t, y)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out, [x, *named.values()], cotangent)
    return without_keys({"output": out, **{f"d{n}": g for n, g in zip(["x", *named], grads)}})


@pytest.mark.parametrize("config", [SMALL, HEAD_DIM_72], ids=["small", "head_dim_72"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_agrees_with_the_reference_in_fp64(conditioning: str, config: dict) -> None:
    fused, plain = pair(F64, conditioning=conditioning, **config)
    got, want = forward_backward(fused, F64), forward_backward(plain, F64)
    assert want["output"].abs().max() > 0.1
    for name, value in want.items():
        numerics.assert_fp64_agreement(got[name], value, name)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_rounds_no_worse_than_the_reference(conditioning: str, dtype: torch.dtype) -> None:
    fused, plain = pair(dtype, conditioning=conditioning, **HEAD_DIM_72)
    exact = forward_backward(copy.deepcopy(plain).double(), F64)
    got, low = forward_backward(fused, dtype), forward_backward(plain, dtype)
    for name, value in exact.items():
        numerics.assert_model_contract(got[name], low[name], value, name)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_autocast_keeps_the_stream_in_fp32(conditioning: str) -> None:
    fused, plain = pair(conditioning=conditioning, **HEAD_DIM_72)
    exact = forward_backward(copy.deepcopy(plain).double(), F64)
    streams = []
    fused.blocks[1].register_forward_pre_hook(lambda module, args: streams.append(args[0].dtype))
    with torch.autocast("cpu", dtype=BF16):
        got, low = forward_backward(fused), forward_backward(plain)
    assert streams == [F32]
    for name, value in exact.items():
        numerics.assert_model_contract(got[name].to(BF16), low[name].to(BF16), value, name)


def _always(x: Tensor) -> bool:
    return True


@contextmanager
def biases_left() -> Iterator[None]:
    """As where compiled kernels serve, linears leave their biases to the ops behind them; these run on plain PyTorch."""
    with ditkernels.use_backend("torch"), mock.patch.object(models, "_pays", _always):
        yield


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_biases_left_to_the_kernels_agree_in_fp64(conditioning: str) -> None:
    fused, plain = pair(F64, conditioning=conditioning, **SMALL)
    want = forward_backward(plain, F64)
    with biases_left():
        for checkpointing in models.CHECKPOINTING:
            fused.checkpointing = checkpointing
            got = forward_backward(fused, F64)
            for name, value in want.items():
                numerics.assert_fp64_agreement(got[name], value, name)


class _BiasSums(TorchDispatchMode):
    """Counts sums of a (B, N, D), (B, N, 3·D) or (B, N, 4·D) gradient over its tokens; what happens inside an op is not seen."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.sizes = {tokens * width * times for times in (1, 3, 4)}
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += func is torch.ops.aten.sum.dim_IntList and args[0].numel() in self.sizes
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("left, sums", [(False, 13), (True, 1)])
def test_no_gradient_of_a_blocks_linear_is_read_again_for_its_bias(left: bool, sums: int) -> None:
    """One sum is that of the patch embedding's bias, whose backward is made of library products."""
    fused, _ = pair(**{**SMALL, "input_size": 8})
    with biases_left() if left else ditkernels.use_backend("torch"), _BiasSums(3 * 16, 48) as counted:
        fused(*batch(fused)).sum().backward()
    assert counted.found == sums


def test_a_linear_that_was_replaced_or_is_watched_is_called_as_it_is() -> None:
    class Low(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    fused, _ = pair(**SMALL)
    want = fused(*batch(fused))
    seen = []
    fused.blocks[0].mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
    with biases_left():
        torch.testing.assert_close(fused(*batch(fused)), want)
        for linear in (fused.blocks[1].mlp.fc2, fused.blocks[1].attn.proj, fused.blocks[1].attn.qkv):
            linear.__class__ = Low
        changed = fused(*batch(fused))
    assert seen == [4 * 48] * 2
    assert not torch.allclose(changed, want)
    torch.testing.assert_close(fused(*batch(fused)), changed)


def _replace_forward(module: torch.nn.Module, seen: Callable[..., None]) -> None:
    genuine = module.forward

    def forward(*inputs: Tensor) -> Tensor:
        seen()
        return genuine(*inputs)

    module.forward = forward


@pytest.mark.parametrize(
    "watch",
    [
        torch.nn.Module.register_forward_hook,
        torch.nn.Module.register_forward_pre_hook,
        torch.nn.Module.register_full_backward_hook,
        torch.nn.Module.register_full_backward_pre_hook,
        _replace_forward,
    ],
)
@pytest.mark.parametrize("parts", [("attn.qkv", "attn.proj", "mlp.fc1"), ("attn", "cross_attn", "mlp")])
def test_whoever_watches_a_part_sees_its_call(watch: Callable[..., object], parts: tuple[str, ...]) -> None:
    fused, _ = pair(conditioning="cross_attention", **SMALL)
    seen: list[str] = []
    with biases_left():
        want = fused(*batch(fused))
        for name in parts:
            watch(fused.blocks[0].get_submodule(name), lambda *_, name=name: seen.append(name))
        got = fused(*batch(fused))
        got.square().sum().backward()
    assert sorted(seen) == sorted(parts)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("conditioning", ["adaln_zero", "cross_attention"])
def test_a_bias_of_qkv_that_is_frozen_or_absent_stays_with_its_linear(conditioning: str) -> None:
    fused, plain = pair(F64, conditioning=conditioning, **SMALL)
    for model in (fused, plain):
        model.blocks[0].attn.qkv.bias.requires_grad_(False)
        model.blocks[1].attn.qkv.bias = None
        if conditioning == "cross_attention":
            model.blocks[0].cross_attn.kv.bias.requires_grad_(False)
            model.blocks[1].cross_attn.kv.bias = None
    want = forward_backward(plain, F64)
    with biases_left():
        got = forward_backward(fused, F64)
    for name, value in want.items():
        numerics.assert_fp64_agreement(got[name], value, name)


def test_residual_dtype_is_the_streams() -> None:
    fused = models.DiT(**SMALL, residual_dtype=BF16)
    streams = []
    fused.blocks[2].register_forward_pre_hook(lambda module, args: streams.append(args[0].dtype))
    with torch.autocast("cpu", dtype=BF16):
        fused(*batch(fused))
    assert streams == [BF16]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient(checkpointing: str, conditioning: str) -> None:
    """Where each block closes its stream, a residual and a norm are two ops, which round once more than one."""
    fused, _ = pair(conditioning=conditioning, **SMALL)
    want = forward_backward(fused)
    fused.checkpointing = checkpointing
    for name, value in forward_backward(fused).items():
        if checkpointing == "selective" and SERVING == "cpu":  # on torch the mode has kernels in plain PyTorch's place
            assert torch.equal(value, want[name]), name
        else:
            torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5, msg=name)


@needs_compiler
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_compiled_blocks_can_be_checkpointed(checkpointing: str) -> None:
    fused, _ = pair(**{**SMALL, "depth": 1})
    want = forward_backward(fused)
    fused.checkpointing = checkpointing
    for block in fused.blocks:
        block.compile(dynamic=False)
    for name, value in forward_backward(fused).items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5, msg=name)


def test_checkpointing_can_be_set_and_a_wrong_one_is_named() -> None:
    fused = models.DiT(**SMALL)
    fused.checkpointing = "selective"
    assert all(block.selective for block in fused.blocks)
    with pytest.raises(ValueError, match="checkpointing: got 'some', allowed are none, selective, full"):
        fused.checkpointing = "some"
    assert fused.checkpointing == "selective"


def saved_bytes(model: models.DiT) -> int:
    """Bytes that autograd keeps for backward, each storage once, parameters left out."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(*batch(model, 8))
        assert out.requires_grad
    return sum(kept.values())


def test_full_checkpointing_keeps_little() -> None:
    fused, _ = pair(**SMALL)
    everything = saved_bytes(fused)
    fused.checkpointing = "full"
    assert saved_bytes(fused) < everything / 4


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_compiles_as_one_graph(conditioning: str) -> None:
    fused, _ = pair(conditioning=conditioning, **SMALL)
    with as_ops(SERVING):
        want = forward_backward(fused)
    torch._dynamo.reset()
    compiled = forward_backward(torch.compile(fused, fullgraph=True, backend="aot_eager"))
    for name, value in compiled.items():
        numerics.assert_model_contract(value, want[name.replace("_orig_mod.", "")], want[name.replace("_orig_mod.", "")].double())


def test_compiles_as_one_graph_with_biases_left_to_the_kernels() -> None:
    fused, _ = pair(**SMALL)
    with biases_left():
        want = forward_backward(fused)
        torch._dynamo.reset()
        compiled = forward_backward(torch.compile(fused, fullgraph=True, backend="aot_eager"))
    for name, value in compiled.items():
        plain = want[name.replace("_orig_mod.", "")]
        numerics.assert_model_contract(value, plain, plain.double(), name)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_state_dicts_load_both_ways(conditioning: str) -> None:
    fused = randomise(models.DiT(conditioning=conditioning, **SMALL))
    plain = reference.DiT(conditioning=conditioning, **SMALL)
    assert plain.load_state_dict(fused.state_dict()).missing_keys == []
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in fused.state_dict().items())


def test_same_seed_same_initialisation() -> None:
    torch.manual_seed(0)
    plain = reference.DiT(**SMALL)
    torch.manual_seed(0)
    fused = models.DiT(**SMALL)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in fused.state_dict().items())


def test_copies_and_pickles_use_their_own_weights() -> None:
    fused, _ = pair(**SMALL)
    inputs = batch(fused)
    want = fused(*inputs)
    twins = copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    for twin in twins:
        assert torch.equal(twin(*inputs), want)


@pytest.mark.parametrize("method", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_guided_trajectories_equal_the_references_step_by_step(conditioning: str, method: str) -> None:
    fused, plain = pair(conditioning=conditioning, **SMALL)
    exact = copy.deepcopy(plain).double()
    diffusion = ditkernels.create_diffusion("8" if method == "p_sample_loop" else "ddim8")

    def trajectory(model: reference.DiT, dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(11)
        noise = torch.randn(2, 4, *model.input_size)
        y = torch.tensor([1, 4, 5, 5])
        keywords = {"y": y, "cfg_scale": 3.0}
        steps = getattr(diffusion, method + "_progressive")(
            lambda x, t, **kw: model.forward_with_cfg(x.to(dtype), t, **kw).float(),
            (4, 4, *model.input_size),
            torch.cat([noise, noise]),
            clip_denoised=False,
            model_kwargs=keywords,
        )
        return [step["sample"] for step in steps]

    got, low, ideal = trajectory(fused, F32), trajectory(plain, F32), trajectory(exact, F64)
    assert len(got) == 8
    for step, (a, b, c) in enumerate(zip(got, low, ideal)):
        numerics.assert_model_contract(a, b, c, f"step {step}")


def test_unknown_keywords_list_what_exists() -> None:
    with pytest.raises(ValueError, match="checkpointing: got 'some', allowed are none, selective, full"):
        models.DiT(**SMALL, checkpointing="some")
    with pytest.raises(ValueError, match="attention_backend: got 'fast', allowed are auto, cudnn"):
        models.DiT(**SMALL, attention_backend="fast")


def test_attention_backend_reaches_the_kernels() -> None:
    fused = models.DiT(**SMALL, attention_backend="cudnn")
    with pytest.raises(ditkernels.BackendError, match="cudnn"):
        fused(*batch(fused))


def test_every_op_of_the_library_runs() -> None:
    fused, _ = pair(**SMALL)
    with biases_left(), dispatch.WholeWay(), torch.profiler.profile() as profile:
        fused(*batch(fused)).sum().backward()
    seen = {event.name for event in profile.events()}
    for op in ("patch_embed", "modulate_norm", "gated_residual_norm", "bias_gelu", "final_layer", "patchify"):
        assert f"ditkernels::{op}_torch" in seen, op
    for op in ("modulate_norm", "gated_residual_norm", "bias_gelu", "split_qkv"):
        assert f"ditkernels::{op}_backward_torch" in seen, op


def test_top_level_names() -> None:
    assert len(ditkernels.DiT_models) == 12
    assert ditkernels.DiT_XL_2 is ditkernels.DiT_models["DiT-XL/2"]
    model = ditkernels.DiT_models["DiT-S/8"](depth=1)
    assert isinstance(model, ditkernels.DiT)
    assert model.patch_size == 8
    with pytest.raises(KeyError, match="unknown model 'DiT-H/2', known are DiT-XL/2"):
        ditkernels.DiT_models["DiT-H/2"]
