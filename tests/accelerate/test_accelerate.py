"""accelerate() on models of the public family with real timm, and on diffusers' own: agreement, refusals, what must survive."""

from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ditkernels
from ditkernels import accelerate, restore
from tests import numerics
from tests.helpers.counting import Graphs, backwards, counted
from tests.helpers.frozen import add_lora, saved_bytes, train_only
from tests.helpers.native_cpu import SERVING, as_ops
from tools.kernel_proof import emulated_cuda
from tools.tree import ROOT

pytest.importorskip("torchvision", reason="timm needs torchvision, which cannot be had here")
pytest.importorskip("timm")

from tests.stand_ins import lightning, public

diffusers = pytest.importorskip("diffusers")

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
Results = dict[str, Tensor]


def hugging_face(**config: object) -> nn.Module:
    small = {"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 3, "sample_size": 8}
    return diffusers.DiTTransformer2DModel(**{**small, "num_embeds_ada_norm": 10, **config})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "DiT": public.DiT,
    "DiT-head_dim_72": partial(public.DiT, hidden_size=144, num_heads=2, depth=2),
    "DiT-patch_4-no_sigma": partial(public.DiT, patch_size=4, learn_sigma=False, class_dropout_prob=0.0),
    "DiT-qk_norm": partial(public.DiT, qk_norm=True, norm_layer=nn.LayerNorm, depth=2),
    "SiT": public.SiT,
    "Lightning": lightning.LightningDiT,
    "Lightning-no_shift-qk_norm": partial(lightning.LightningDiT, wo_shift=True, qk_norm=True),
    "Lightning-layernorm-no_rope": partial(lightning.LightningDiT, rms=False, rope=False, swiglu=False, learn_sigma=False),
    "diffusers": hugging_face,
    "diffusers-patch_4-eps": partial(hugging_face, patch_size=4, norm_eps=1e-6, out_channels=8, attention_bias=False, num_layers=2),
}
TINY: dict[str, Callable[[], nn.Module]] = {
    "DiT-tiny": partial(public.DiT, input_size=4, hidden_size=24, depth=2, num_heads=2),
    "diffusers-tiny": partial(hugging_face, sample_size=4, num_attention_heads=2, num_layers=2, out_channels=4),
}


def make(name: str, seed: int = 0) -> nn.Module:
    """A model whose every parameter counts: a fresh DiT returns exactly zero, which any kernel reproduces."""
    torch.manual_seed(seed)
    model = (MODELS | TINY)[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                std = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
                parameter.normal_(std=std)
    return model


def quietly(model: nn.Module) -> ditkernels.accelerate.Report:
    return accelerate(model, file=io.StringIO())


def call(model: nn.Module, size: int = 3, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    """The model's output for fixed random inputs of a batch, and the latents, which ask for a gradient."""
    generator = torch.Generator().manual_seed(3)
    inner = getattr(model, "module", model)
    side = inner.config.sample_size if hasattr(inner, "config") else inner.x_embedder.img_size[0]
    x = torch.randn(size, 4, side, side, generator=generator).to(dtype).requires_grad_()
    t = torch.randint(0, 1000, (size,), generator=generator)
    y = torch.randint(0, 10, (size,), generator=generator)
    torch.manual_seed(11)
    return output(model(x, t, y)), x


def output(out: object) -> Tensor:
    """The image in what a model returned, diffusers' in a class of its own."""
    return getattr(out, "sample", out)


def forward_backward(model: nn.Module, size: int = 3, dtype: torch.dtype = F32) -> Results:
    """Output and every gradient."""
    out, x = call(model, size, dtype)
    named = {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(out, [x, *named.values()], cotangent(out), allow_unused=True)
    gradients = {f"d{n}": g for n, g in zip(["x", *named], grads) if g is not None}
    return comparable({"output": out.detach(), **gradients})


def cotangent(out: Tensor) -> Tensor:
    """A fixed random one."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)


def comparable(results: Results) -> Results:
    """Without the gradients of biases of keys, whose true value is zero: softmax ignores them."""
    for name in [n for n in results if n.endswith(("attn.qkv.bias", "to_k.bias", "k_norm.bias"))]:
        whole = results.pop(name)
        if name.endswith("qkv.bias"):
            results[name] = torch.cat([whole.chunk(3)[0], whole.chunk(3)[2]])
    return results


def exact(model: nn.Module, size: int = 3) -> Results:
    """The plain model's results in fp64, on the same inputs; public timestep embedders compute their sinusoids in fp32."""
    return forward_backward(at(copy.deepcopy(model), F64), size, F64)


def at(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in a dtype, its sinusoids with it: the public code runs in fp32 or under autocast only."""
    model.to(dtype)
    if hasattr(model, "t_embedder"):
        model.t_embedder.mlp.register_forward_pre_hook(lambda module, args: (args[0].to(dtype),))
    return model


def fused_ops(run: Callable[[], object]) -> set[str]:
    """The ops of the library that ran, by their internal names, which say the backend."""
    with as_ops(SERVING), torch.profiler.profile() as profile:
        run()
    return {e.name.removeprefix("ditkernels::") for e in profile.events() if e.name.startswith("ditkernels::")}


# ---- Agreement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_itself_in_fp64(name: str, training: bool) -> None:
    model = make(name).train(training)
    fused = copy.deepcopy(model)
    assert quietly(fused).fused
    want, got = exact(model), exact(fused)
    assert want["output"].abs().max() > 0.1
    assert got.keys() == want.keys()
    for key, value in want.items():
        numerics.assert_accelerated_agreement(got[key], value, key)


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_rounds_no_worse_than_itself(name: str, dtype: torch.dtype, size: int) -> None:
    model = make(name).to(dtype).float()
    fused = copy.deepcopy(model)
    quietly(fused)
    ideal = exact(model, size)
    low, got = (forward_backward(at(m, dtype), size, dtype) for m in (model, fused))
    for key, value in ideal.items():
        numerics.assert_model_contract(got[key], low[key], value, key)


@pytest.mark.parametrize("name", MODELS)
def test_autocast_keeps_dtypes(name: str) -> None:
    model = make(name)
    fused = copy.deepcopy(model)
    quietly(fused)
    ideal = exact(model)
    with torch.autocast("cpu", dtype=BF16):
        low, got = forward_backward(model), forward_backward(fused)
    assert got["output"].dtype == low["output"].dtype
    for key, value in ideal.items():
        numerics.assert_model_contract(got[key].to(BF16), low[key].to(BF16), value, key)


@pytest.mark.parametrize("name", ["DiT", "SiT", "Lightning", "diffusers"])
def test_everything_the_ops_cover_is_fused(name: str) -> None:
    model = make(name)
    report = quietly(model)
    assert {type(model.get_submodule(p.name)) for p in report.left} <= {lightning.SwiGLU}, str(report)
    ran = fused_ops(lambda: forward_backward(model))
    blocks = 3
    for op in ("modulate_norm", "gated_residual_norm"):
        assert {f"{op}_{SERVING}", f"{op}_backward_{SERVING}"} <= ran, op
    assert {f"patch_embed_{SERVING}", f"final_layer_{SERVING}", f"patchify_{SERVING}"} <= ran
    assert f"gated_residual_{SERVING}" not in ran, "a residual was closed on its own"
    assert len([p for p in report.fused if p.name.endswith(tuple(f"s.{i}" for i in range(blocks)))]) == blocks


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_guidance_and_labels_drop_as_before(training: bool) -> None:
    model = make("DiT").train(training)
    fused = copy.deepcopy(model)
    quietly(fused)
    x, t = torch.randn(4, 4, 8, 8), torch.tensor([3, 3, 900, 900])
    y = torch.tensor([1, 4, 10, 10])
    outs = []
    for m in (model, fused):
        torch.manual_seed(5)
        outs.append(m.forward_with_cfg(x, t, y, 4.0))
    torch.testing.assert_close(outs[1], outs[0])


BACKEND_PROGRAM = """
import copy
from tests.accelerate import test_accelerate as t
model = t.make("{name}")
fused = copy.deepcopy(model)
import ditkernels
with ditkernels.use_backend("{backend}"):
    report = t.quietly(fused)
    assert not report.left, str(report)
    got = t.forward_backward(fused, 2)
    assert "gated_residual_norm_backward_{backend}" in t.fused_ops(lambda: t.forward_backward(fused, 2))
low, ideal = t.forward_backward(model, 2), t.exact(model, 2)
for key, value in ideal.items():
    t.numerics.assert_model_contract(got[key], low[key], value, key)
"""


@pytest.mark.parametrize("name", ["DiT-tiny", "diffusers-tiny"])
def test_triton(name: str) -> None:
    """Under Triton's interpreter, in a process of its own, since the variable is read at import."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "DITKERNELS", "TRITON"))}
    done = subprocess.run(
        [sys.executable, "-c", BACKEND_PROGRAM.format(name=name, backend="triton")],
        env={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("timm", ["0.9.16"])
def test_an_older_timm(timm: str) -> None:
    """The agreement of this file once more, on a release of timm before attention learned its options."""
    folder = ROOT / f"build/timm-{timm}"
    if not (folder / "timm").is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        if subprocess.run([*install, f"timm=={timm}"], capture_output=True).returncode:
            pytest.skip(f"timm {timm} cannot be had here")
    tests = "(agrees_with_itself and eval or everything or look_alike) and not diffusers"
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", tests)
    version = f"import timm; assert timm.__version__ == {timm!r}; import pytest, sys; sys.exit(pytest.main())"
    done = subprocess.run(
        [sys.executable, "-c", version.replace("main()", f"main({[*options, __file__]!r})")],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("name", ["DiT-tiny", "diffusers-tiny"])
def test_cuda_on_the_host(name: str) -> None:
    """The CUDA sources, compiled for the host."""
    if emulated_cuda.why_not() is not None:
        pytest.skip(str(emulated_cuda.why_not()))
    model = make(name)
    fused = copy.deepcopy(model)
    low, ideal = forward_backward(model, 2), exact(model, 2)
    with emulated_cuda.running():
        report = quietly(fused)
        got = forward_backward(fused, 2)
        ran = fused_ops(lambda: forward_backward(fused, 2))
    assert not report.left, str(report)
    assert {"gated_residual_norm_cuda", "gated_residual_norm_backward_cuda"} <= ran
    for key, value in ideal.items():
        numerics.assert_model_contract(got[key], low[key], value, key)


# ---- Refusals --------------------------------------------------------------------------------------------------------


def reason(report: ditkernels.accelerate.Report, name: str) -> str:
    """Why the part was left; "" if it was fused."""
    return next(part.reason for part in report.parts if part.name == name)


def assert_unchanged(model: nn.Module, untouched: nn.Module) -> None:
    """Both compute the same, to rounding."""
    assert_agreement(forward_backward(model), untouched)


def assert_agreement(got: Results, plain: nn.Module) -> None:
    """``got`` rounds no worse than the plain model does."""
    low = forward_backward(plain)
    for key, value in exact(plain).items():
        key_of_got = key if key in got else f"d_orig_mod.{key[1:]}"
        numerics.assert_model_contract(got[key_of_got], low[key], value, key)


@pytest.mark.parametrize("block", [public.SwappedBlock, public.PostNormBlock, public.OtherGeluBlock])
def test_a_look_alike_is_left_alone_by_name(block: type[public.DiTBlock]) -> None:
    model = public.look_alike(block)
    report = quietly(model)
    assert "its own forward computes something else" in reason(report, "blocks.1")
    assert reason(report, "blocks.0") == reason(report, "blocks.2") == reason(report, "") == ""
    assert type(model.blocks[1]) is block


def test_a_fresh_layer_that_returns_zero_proves_nothing() -> None:
    model = public.DiT()
    model.final_layer.__class__ = public.SwappedFinalLayer
    report = quietly(model)
    assert "its own forward computes something else" in reason(report, "final_layer")
    assert type(model.final_layer) is public.SwappedFinalLayer
    assert reason(report, "") == ""


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("model_class", [public.SkippingDiT, public.CheckpointedDiT])
def test_a_model_that_does_more_between_its_blocks_keeps_its_forward(model_class: type[nn.Module]) -> None:
    model = randomised(model_class())
    untouched = copy.deepcopy(model)
    report = quietly(model)
    assert reason(report, "") != ""
    assert type(model) is model_class
    assert reason(report, "blocks.1") == ""
    assert_unchanged(model, untouched)


def test_checkpointing_switched_on_later_is_obeyed() -> None:
    for name, switch in (
        ("Lightning", lambda m: setattr(m, "use_checkpoint", True)),
        ("diffusers", lambda m: m.enable_gradient_checkpointing()),
    ):
        model = make(name).train()
        untouched = copy.deepcopy(model)
        quietly(model)
        for m in (model, untouched):
            switch(m)
        calls: list[int] = []
        block = model.get_submodule("blocks.0" if name == "Lightning" else "transformer_blocks.0")
        block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        assert_unchanged(model, untouched)
        assert len(calls) == 2, name


def lora(linear: nn.Linear) -> nn.Module:
    class LoraLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = linear
            self.lora_A = nn.Linear(linear.in_features, 2, bias=False)
            self.lora_B = nn.Linear(2, linear.out_features, bias=False)
            self.in_features, self.out_features = linear.in_features, linear.out_features

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora_B(self.lora_A(x))

    return LoraLinear()


def set_dropout(model: nn.Module) -> None:
    model.blocks[1].attn.proj_drop.p = 0.1


def set_drop_path(model: nn.Module) -> None:
    from timm.layers import DropPath

    model.blocks[1].mlp.drop2 = DropPath(0.2)


def set_hook(model: nn.Module) -> None:
    model.blocks[1].mlp.fc1.register_forward_hook(lambda module, args, out: 2 * out)


def set_pre_hook(model: nn.Module) -> None:
    model.blocks[1].norm2.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def set_backward_hook(model: nn.Module) -> None:
    model.blocks[1].norm1.register_full_backward_hook(lambda module, i, o: None)


def set_hook_outside(model: nn.Module) -> None:
    model.t_embedder.mlp.register_forward_hook(lambda module, args, out: 2 * out)


def set_hook_on_model(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, args, out: 2 * out)


def set_forward(model: nn.Module) -> None:
    inner = model.blocks[1]
    inner.forward = partial(type(inner).forward, inner)


def set_lora(model: nn.Module) -> None:
    model.blocks[1].attn.qkv = lora(model.blocks[1].attn.qkv)


def set_eps(model: nn.Module) -> None:
    model.blocks[1].norm2 = nn.RMSNorm(48)


def set_norm(model: nn.Module) -> None:
    model.blocks[1].norm2 = nn.GroupNorm(1, 48)


def set_proj_lora(model: nn.Module) -> None:
    model.final_layer.linear = lora(model.final_layer.linear)


def set_quantised(model: nn.Module) -> None:
    model.blocks[1].attn.proj = torch.ao.nn.quantized.dynamic.Linear(48, 48)


REFUSED = [
    (set_dropout, "blocks.1.attn", "proj_drop is Dropout with probability 0.1"),
    (set_dropout, "blocks.1", "attn.proj_drop is Dropout with probability 0.1"),
    (set_drop_path, "blocks.1", "mlp.drop2 is DropPath with probability 0.2"),
    (set_hook, "blocks.1", "mlp.fc1 has forward hooks"),
    (set_pre_hook, "blocks.1", "norm2 has forward pre hooks"),
    (set_backward_hook, "blocks.1", "norm1 has backward hooks"),
    (set_hook_outside, "", "t_embedder.mlp has forward hooks"),
    (set_hook_on_model, "", "it has forward hooks"),
    (set_forward, "blocks.1", "the forward of it was replaced on the instance"),
    (set_lora, "blocks.1.attn", "qkv is .*LoraLinear, not torch's Linear"),
    (set_quantised, "blocks.1.attn", "proj is .*quantized.*, not torch's Linear"),
    (set_eps, "blocks.1", "norm2.eps is None; the ops need a number"),
    (set_norm, "blocks.1", "norm2 is GroupNorm"),
]


@pytest.mark.parametrize("change, part, why", REFUSED, ids=[f"{c.__name__}-{p}" for c, p, _ in REFUSED])
def test_what_would_change_the_mathematics_is_left_alone(change: Callable, part: str, why: str) -> None:
    model = make("DiT")
    change(model)
    report = quietly(model)
    assert re.search(why, reason(report, part)), str(report)
    assert reason(report, "blocks.0") == ""


def test_lora_is_called_and_never_read() -> None:
    model = make("DiT")
    set_lora(model)
    set_proj_lora(model)
    untouched = copy.deepcopy(model)
    report = quietly(model)
    assert reason(report, "blocks.1") == reason(report, "final_layer") == ""
    assert_unchanged(model, untouched)


@pytest.mark.parametrize("option", [{"gated": True}, {"scale_norm": True, "norm_layer": nn.LayerNorm}])
def test_timms_options_are_left_alone(option: dict) -> None:
    if not option.keys() <= inspect.signature(public.Attention.__init__).parameters.keys():
        pytest.skip("this release of timm has no such option")
    model = randomised(public.DiT(**option))
    untouched = copy.deepcopy(model)
    report = quietly(model)
    assert "which the op does not know" in reason(report, "blocks.1.attn")
    assert reason(report, "blocks.1") == ""
    assert_unchanged(model, untouched)


def test_a_mask_given_in_a_call_is_obeyed() -> None:
    attn = make("DiT").blocks[0].attn
    if "attn_mask" not in inspect.signature(attn.forward).parameters:
        pytest.skip("this release of timm knows no mask")
    model = make("DiT")
    untouched = copy.deepcopy(model.blocks[0].attn)
    quietly(model)
    x, mask = torch.randn(2, 5, 48), torch.ones(5, 5).tril().bool()
    assert torch.equal(model.blocks[0].attn(x, attn_mask=mask), untouched(x, attn_mask=mask))
    assert not torch.equal(model.blocks[0].attn(x), untouched(x, attn_mask=mask))


def test_a_custom_attention_processor_is_left_alone() -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Custom(AttnProcessor2_0):
        def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: object, **options: object) -> Tensor:
            return 2 * super().__call__(attn, hidden_states, *args, **options)

    model = make("diffusers")
    model.transformer_blocks[1].attn1.set_processor(Custom())
    untouched = copy.deepcopy(model)
    report = quietly(model)
    assert "its attention processor is Custom" in reason(report, "transformer_blocks.1.attn1")
    model.transformer_blocks[0].attn1.set_processor(Custom())
    untouched.transformer_blocks[0].attn1.set_processor(Custom())
    assert_unchanged(model, untouched)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("wrapper", ["checkpoint", "fsdp"])
def test_a_wrapped_model_is_told_to_accelerate_first(wrapper: str) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make("DiT")
    if wrapper == "checkpoint":
        model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    else:
        fsdp = pytest.importorskip("torch.distributed.fsdp")
        block = model.blocks[1]
        block.__class__ = type("FSDPDiTBlock", (fsdp.FSDPModule, type(block)), {})
    with pytest.raises(ValueError, match=r"blocks.1 is already wrapped in .*; accelerate the model first, then wrap it"):
        quietly(model)
    assert type(model) is public.DiT


def test_no_dit_at_all() -> None:
    with pytest.raises(ValueError, match=r"no DiT found in Sequential: looked for blocks of norm1.*; found 0 \(Linear\)"):
        quietly(nn.Sequential(nn.Linear(2, 2)))


def test_twice_changes_nothing() -> None:
    model = make("DiT")
    quietly(model)
    classes = [type(m) for m in model.modules()]
    report = quietly(model)
    assert "accelerated already" in str(report)
    assert [type(m) for m in model.modules()] == classes


def test_our_own_model_needs_no_rewiring() -> None:
    report = quietly(ditkernels.DiT(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3))
    assert not report.fused
    assert "runs the fused ops as it is" in str(report)


def test_an_exception_in_the_middle_leaves_no_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    from ditkernels.accelerate import swap

    model, joined, calls = make("DiT"), swap.fused_class, []

    def failing(mixin: type, original: type) -> type:
        calls.append(mixin)
        if type(original) is type and len(calls) > breaking:
            raise MemoryError
        return joined(mixin, original)

    breaking = 10**6
    monkeypatch.setattr(swap, "fused_class", failing)
    quietly(copy.deepcopy(model))
    breaking, total = len(calls) - 3, len(calls)
    calls.clear()
    with pytest.raises(MemoryError):
        quietly(model)
    assert len(calls) == breaking + 1 < total
    assert not any(isinstance(m, swap.Fused) or hasattr(m, swap.SETTINGS) for m in model.modules())


# ---- What must survive -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DiT", "Lightning", "diffusers"])
def test_the_model_is_left_as_it_was_found(name: str) -> None:
    model = make(name).train()
    model.get_submodule("final_layer" if name != "diffusers" else "norm_out").eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {n: m.training for n, m in model.named_modules()}
    parameters = [(n, id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()]
    state = torch.get_rng_state()
    quietly(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert [(n, id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()] == parameters
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("name", ["DiT", "Lightning", "diffusers"])
def test_restore_gives_the_old_bits(name: str) -> None:
    model = make(name)
    classes, want = [type(m) for m in model.modules()], forward_backward(model)
    attributes = [set(vars(m)) for m in model.modules()]
    quietly(model)
    assert [type(m) for m in model.modules()] != classes
    restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    got = forward_backward(model)
    assert all(torch.equal(got[key], value) for key, value in want.items())


@pytest.mark.parametrize("name", ["DiT", "Lightning", "diffusers"])
def test_copies_and_pickles_use_their_own_weights(name: str) -> None:
    model = make(name)
    quietly(model)
    want = call(model)[0]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for twin in twins:
        assert torch.equal(call(twin)[0], want)
        assert f"gated_residual_norm_{SERVING}" in fused_ops(partial(call, twin))


def test_state_dicts_load_both_ways_and_dtypes_move() -> None:
    plain, fused = make("DiT", seed=1), make("DiT", seed=2)
    quietly(fused)
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(call(fused)[0], call(plain)[0])
    assert call(fused.to(F64).to(F32))[0].dtype == F32


def test_the_optimizer_keeps_its_parameters() -> None:
    models = [make("DiT"), make("DiT")]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in models]
    quietly(models[1])
    losses = []
    for model, optimizer in zip(models, optimizers):
        for _ in range(3):
            loss = call(model)[0].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(call(model)[0].square().mean().item())
    start = call(make("DiT"))[0].square().mean().item()
    assert losses[1] < 0.9 * start
    assert losses[1] == pytest.approx(losses[0], rel=numerics.ACCELERATED_TRAINING)


@pytest.mark.parametrize("name", ["DiT", "SiT", "Lightning", "diffusers"])
@pytest.mark.parametrize("first", ["accelerate", "compile"])
def test_compiled_models_run_the_fused_ops(name: str, first: str) -> None:
    model = make(name)
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    graphs = []

    def recording(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    if first == "accelerate":
        quietly(model)
    compiled = torch.compile(model, backend=recording, fullgraph=name != "diffusers")
    if first == "compile":
        call(compiled)
        graphs.clear()
        quietly(compiled)
    got = forward_backward(compiled)
    assert any("gated_residual_norm" in graph for graph in graphs)
    assert_agreement(got, plain)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["accelerate", "ddp"])
def test_ddp_runs_the_fused_ops(process_group: None, first: str) -> None:
    model = make("DiT")
    plain = copy.deepcopy(model)
    if first == "accelerate":
        quietly(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    report = quietly(wrapped)
    assert "accelerated already" in str(report) if first == "accelerate" else report.fused
    got = forward_backward(wrapped)
    ran = fused_ops(lambda: call(wrapped)[0].sum().backward())
    assert {f"gated_residual_norm_{SERVING}", f"gated_residual_norm_backward_{SERVING}"} <= ran
    assert_agreement(got, plain)


def test_fsdp2_shards_an_accelerated_model(process_group: None) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = make("DiT")
    plain = copy.deepcopy(model)
    quietly(model)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fsdp.fully_shard(block, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    out, x = call(model)
    out.backward(cotangent(out))
    got = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    assert_agreement(comparable({"output": out, "dx": x.grad, **{f"d{n}": g for n, g in got.items()}}), plain)
    with pytest.raises(ValueError, match="restore: the model was made a FSDPDiT since it was accelerated, as FSDP2"):
        restore(model)


def test_a_checkpoint_wrapper_over_an_accelerated_block_closes_the_stream() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make("DiT")
    plain = copy.deepcopy(model)
    quietly(model)
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(type(args[0])))
    out, _ = call(model)
    torch.testing.assert_close(out, call(plain)[0])
    assert seen == [Tensor]


BLOCK = {"DiT": "blocks.1", "Lightning": "blocks.1", "diffusers": "transformer_blocks.1"}


@pytest.mark.parametrize("name", BLOCK)
def test_a_hook_on_a_block_sees_and_changes_tensors(name: str) -> None:
    model = make(name)
    fused = copy.deepcopy(model)
    quietly(fused)
    want, seen = call(model)[0], []
    for m in (model, fused):
        block = m.get_submodule(BLOCK[name])
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        block.register_full_backward_hook(lambda module, grads, outs: seen.extend((grads[0], *outs)))
        block.register_forward_hook(lambda module, args, out: out * 1.5)
        out, _ = call(m)
        assert not torch.allclose(out, want)
        out.square().sum().backward()
    assert len(seen) == 6
    for got, plain in zip(seen[3:], seen[:3]):
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BLOCK)
def test_a_touched_block_closes_the_stream_before_and_behind_it_alone(name: str) -> None:
    model = make(name)
    quietly(model)
    compiled, graphs = copy.deepcopy(model), Graphs()
    for block in compiled.get_submodule(BLOCK[name].removesuffix(".1")):
        block.compile(backend=graphs)
    with counted() as untouched, as_ops(SERVING):
        out, _ = call(model)
    torch._dynamo.reset()
    call(compiled)
    assert untouched == graphs.calls == backwards(out) == {"modulate_norm": 1, "gated_residual": 0, "gated_residual_norm": 5}
    handle = model.get_submodule(BLOCK[name]).register_forward_hook(lambda *values: None)
    with torch.no_grad(), counted() as touched:
        call(model)
    assert touched == {"modulate_norm": 3, "gated_residual": 2, "gated_residual_norm": 3}
    handle.remove()
    if name == "diffusers":  # its last norm and linear are no module of their own
        return
    model.final_layer.register_forward_hook(lambda module, args, out: out * 1.5)
    with torch.no_grad(), counted() as touched:
        call(model)
    assert touched == {"modulate_norm": 2, "gated_residual": 1, "gated_residual_norm": 5}


TRAINED: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "attention": lambda name: ".attn" in name,
    "qkv_bias": lambda name: name.endswith(("qkv.bias", "to_q.bias")),
    "adaLN": lambda name: "adaLN" in name or "norm1.linear" in name,
    "head": lambda name: name.startswith(("final_layer.linear", "proj_out_2")),
    "lora": lambda name: name.endswith((".down", ".up")),
}


@pytest.mark.parametrize("backend", sorted({"torch", SERVING}))
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", ["DiT", "SiT", "Lightning", "diffusers"])
@pytest.mark.parametrize("trained", TRAINED)
def test_saves_at_most_what_it_saved_before(trained: str, name: str, autocast: bool, backend: str) -> None:
    model = make(name)
    if trained == "lora":
        add_lora(model, ("qkv", "to_q", "to_k", "to_v", "proj", "fc1", "fc2"))
    train_only(model, TRAINED[trained])
    fused = copy.deepcopy(model)
    quietly(fused)
    latents, t, y = call(model, 8)[1].detach(), torch.arange(8) * 100, torch.arange(8)
    with ditkernels.use_backend(backend), torch.autocast("cpu", BF16, enabled=autocast):
        got, want = (saved_bytes(m, lambda m=m: output(m(latents, t, y))) for m in (fused, model))
    assert got <= want


def test_a_block_in_several_places_is_rewired_once() -> None:
    model = make("DiT")
    model.blocks[2] = model.blocks[0]
    plain = copy.deepcopy(model)
    quietly(model)
    assert_unchanged(model, plain)
    restore(model)
    assert type(model.blocks[2]) is public.DiTBlock


def test_on_the_meta_device_nothing_can_be_proven() -> None:
    with torch.device("meta"):
        model = public.DiT()
    report = quietly(model)
    assert not report.fused
    assert "meta device" in reason(report, "blocks.1")


def test_blocks_stay_callable_on_their_own() -> None:
    model = make("DiT")
    block, x, c = copy.deepcopy(model.blocks[1]), torch.randn(2, 16, 48), torch.randn(2, 48)
    quietly(model)
    torch.testing.assert_close(model.blocks[1](x, c), block(x, c))
    tokens = copy.deepcopy(model.final_layer)
    restore(tokens)
    torch.testing.assert_close(model.final_layer(x, c), tokens(x, c))


@pytest.mark.parametrize("name", ["DiT", "diffusers"])
def test_mixed_dtypes_promote_as_before(name: str) -> None:
    model = make(name)
    block = copy.deepcopy(model.get_submodule("blocks.1" if name == "DiT" else "transformer_blocks.1"))
    quietly(model)
    fused = model.get_submodule("blocks.1" if name == "DiT" else "transformer_blocks.1")
    x = torch.randn(2, 16, 48, dtype=BF16)
    if name == "DiT":
        outs = [b(x, torch.randn(2, 48, generator=torch.Generator().manual_seed(1))) for b in (fused, block)]
        assert [out.dtype for out in outs] == [F32, F32]
        torch.testing.assert_close(*outs, **numerics.ROUNDED_NORM)
    else:
        with torch.autocast("cpu", dtype=BF16):
            outs = [b(x, timestep=torch.tensor([1, 2]), class_labels=torch.tensor([1, 2])) for b in (fused, block)]
        assert outs[0].dtype == outs[1].dtype


def test_a_fused_class_builds_the_plain_model() -> None:
    model = make("diffusers")
    quietly(model)
    assert type(type(model).from_config(model.config)) is diffusers.DiTTransformer2DModel
    assert (type(model).__name__, type(model).__module__) == (
        "DiTTransformer2DModel",
        diffusers.DiTTransformer2DModel.__module__,
    )
    assert isinstance(model, diffusers.DiTTransformer2DModel)
    assert "FusedBasicTransformerBlock" in repr(model)


def test_save_pretrained_writes_the_originals_name(tmp_path: Path) -> None:
    model = make("diffusers")
    quietly(model)
    model.save_pretrained(tmp_path)
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(call(again)[0], call(model)[0])


def test_the_report_is_printed_and_readable(capsys: pytest.CaptureFixture[str]) -> None:
    report = accelerate(make("DiT"))
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    lines = printed.splitlines()
    assert lines[0] == "ditkernels.accelerate: DiT, 12 parts fused, 0 left"
    assert "  blocks.0-2       fused: modulate_norm, gated_residual_norm, gated_residual" in lines
    assert len([line for line in lines[1:] if re.match("  [a-z(]", line)]) == 6
    assert "                   watched: norm_final.eps, norm_final.normalized_shape" in lines


def test_importing_stays_light() -> None:
    program = "import sys, ditkernels; print([m for m in ('timm', 'diffusers', 'torchvision') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
