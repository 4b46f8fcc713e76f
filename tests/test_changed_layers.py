"""A layer that somebody changed is called: every change on every layer, against the plain model with the same change."""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

import ditkernels
from tests import numerics
from tests.helpers.changes import CHANGES, Change, Log, covering
from tests.test_models import pair

SMALL = {"input_size": 4, "hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
Results = dict[str, Tensor]
Pair = tuple[nn.Module, nn.Module]


# ---- Who is changed --------------------------------------------------------------------------------------------------


def _own(conditioning: str) -> Pair:
    """With embedders that count as much as the blocks do, so that int8 in one of their linears shows."""
    models = pair(conditioning=conditioning, **SMALL)
    with torch.no_grad():
        for name, parameter in (named for model in models for named in model.named_parameters()):
            if name.startswith(("t_embedder", "y_embedder")):
                parameter.mul_(3)
    return models


def _written_by_others(make: Callable[[], nn.Module]) -> Pair:
    torch.manual_seed(0)
    plain = make().eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3)
    fused = copy.deepcopy(plain)
    accelerate(fused)
    return fused, plain


def _public() -> nn.Module:
    public = importlib.import_module("tests.stand_ins.public")
    return public.DiT(input_size=4, hidden_size=24, depth=2, num_heads=2)


def _lightning() -> nn.Module:
    lightning = importlib.import_module("tests.stand_ins.lightning")
    return lightning.LightningDiT(input_size=4, hidden_size=24, depth=2, num_heads=2, qk_norm=True)


def _hugging_face() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    small = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "sample_size": 4, "out_channels": 4}
    return DiTTransformer2DModel(**small, num_embeds_ada_norm=10, norm_elementwise_affine=False)


SUBJECTS: dict[str, Callable[[], Pair]] = {
    **{conditioning: partial(_own, conditioning) for conditioning in ditkernels.reference.CONDITIONINGS},
    "public": partial(_written_by_others, _public),
    "lightning": partial(_written_by_others, _lightning),
    "diffusers": partial(_written_by_others, _hugging_face),
}
OTHERS = ("public", "lightning", "diffusers")
NEEDED = {"public": ("torchvision", "timm"), "lightning": ("torchvision", "timm"), "diffusers": ("diffusers",)}


def accelerate(model: nn.Module) -> None:
    ditkernels.accelerate(model, file=io.StringIO())


@cache
def _subject(name: str) -> Pair:
    return SUBJECTS[name]()


def subject(name: str) -> Pair:
    """The fused and the plain model, for this test to change."""
    for package in NEEDED.get(name, ()):
        pytest.importorskip(package)
    return copy.deepcopy(_subject(name))


KINDS: dict[str, Callable[[str, nn.Module], bool]] = {
    "linear": lambda name, module: isinstance(module, nn.Linear),
    "convolution": lambda name, module: isinstance(module, nn.Conv2d),
    "embedding": lambda name, module: isinstance(module, nn.Embedding),
    "norm": lambda name, module: "Norm" in type(module).__name__,
    "activation": lambda name, module: isinstance(module, (nn.SiLU, nn.GELU)),
    "nothing": lambda name, module: isinstance(module, (nn.Dropout, nn.Identity)),
    "attention": lambda name, module: name.endswith(("attn", "attn1")),
    "mlp": lambda name, module: name.endswith(("mlp", ".ff")),
    "block": lambda name, module: name.split(".")[-2:-1] in (["blocks"], ["transformer_blocks"]),
    "whole": lambda name, module: name in ("x_embedder", "t_embedder", "y_embedder", "final_layer", "pos_embed"),
    "all": lambda name, module: name != "",
}


def layers(model: nn.Module, change: Change, kind: str) -> list[str]:
    return [name for name, module in model.named_modules() if name and KINDS[kind](name, module) and change.suits(module)]


# ---- Against the plain model -----------------------------------------------------------------------------------------


def run(model: nn.Module, trains: bool) -> Results:
    """The output, and every gradient of a model that can be differentiated."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 4, 4, 4, generator=generator).requires_grad_(trains)
    # A label comes twice, for the sake of gradients that are scaled by frequency.
    t, y = torch.tensor([3, 900, 41, 7]), torch.tensor([1, 4, 1, 0])
    with torch.set_grad_enabled(trains):
        out = model(x, t, y)
    out = getattr(out, "sample", out)
    if not trains:
        return {"output": out}
    named = {"x": x, **{n.replace("_orig_mod.", ""): p for n, p in model.named_parameters() if p.requires_grad}}
    cotangent = torch.randn(out.shape, generator=generator)
    grads = torch.autograd.grad(out, list(named.values()), cotangent, allow_unused=True)
    return {"output": out.detach(), **{f"d{n}": g for n, g in zip(named, grads) if g is not None}}


def assert_same(got: Results, want: Results) -> None:
    assert got.keys() == want.keys()
    largest = max(value.abs().max() for name, value in want.items() if name != "output") if len(want) > 1 else 0
    for name, value in want.items():
        numerics.assert_changed_agreement(got[name], value, value.abs().max() if name == "output" else largest, name)


def differs(a: Results, b: Results) -> bool:
    """By several times what ``assert_same`` allows, in a result that both have."""
    same = numerics.CHANGED_AGREEMENT * numerics.CHANGED_SHOWS
    both = [(a[name], b[name]) for name in a.keys() & b.keys()]
    return any(one.shape != other.shape or (one - other).abs().max() > same * other.abs().max() for one, other in both)


def moved(model: nn.Module) -> nn.Module:
    """With other storage for every parameter, and the same values."""
    return model.double().float() if all(p.requires_grad or p.dtype == torch.float32 for p in model.parameters()) else model.cpu()


THEN: dict[str, Callable[[nn.Module], nn.Module]] = {
    "kept": lambda model: model,
    "moved": moved,
    "copied": copy.deepcopy,
}


def changed(model: nn.Module, change: Change, names: list[str], log: Log) -> None:
    torch.manual_seed(1)
    for name in names:
        change.apply(model, name, log)


def check(how: str, names: list[str], fused: nn.Module, plain: nn.Module, then: Callable[[nn.Module], nn.Module]) -> None:
    """``fused`` and ``plain`` with the same change agree, it is seen in both as often, and it matters where it is seen."""
    change = CHANGES[how]
    before, logs = run(plain, change.trains), ([], [])
    for model, log in zip((fused, plain), logs):
        changed(model, change, names, log)
    want = run(plain, change.trains)
    got = run(then(fused), change.trains)
    assert_same(got, want)
    assert sorted(logs[0]) == sorted(logs[1])
    if "hook" not in how and how != "own_forward":
        assert differs(want, before), "the change does nothing, and would not be missed"


def require(how: str) -> None:
    package = CHANGES[how].package
    if package is not None:
        pytest.importorskip(package)


# Kinds with layers that a change of weights suits, and the subjects that have them.
OF_KIND: dict[str, type[nn.Module]] = {
    "linear": nn.Linear,
    "convolution": nn.Conv2d,
    "embedding": nn.Embedding,
    "norm": nn.LayerNorm,
}
WITH_WEIGHTED_NORMS = ("cross_attention", "in_context", "lightning")
WITHOUT = {
    ("adaln_zero", "norm"),
    ("adaln", "norm"),
    *((conditioning, "nothing") for conditioning in ditkernels.reference.CONDITIONINGS),
}


def _allowed(how: str, kind: str, name: str, then: str) -> bool:
    kinds = CHANGES[how].kinds
    if (name, kind) in WITHOUT or (kind == "norm" and kinds != (nn.Module,) and name not in WITH_WEIGHTED_NORMS):
        return False
    suits = kind == "all" or kinds == (nn.Module,) or issubclass(OF_KIND.get(kind, nn.Module), kinds)
    # In the plain model as well: a bound method still means its first instance in a copy, and a computed weight cannot be copied.
    bound = how in ("own_forward", "fp8", "offload", "lora", "prune", "weight_norm", "spectral_norm")
    return suits and (then != "copied" or not bound)


COVERING = list(covering(_allowed, tuple(CHANGES), tuple(KINDS), tuple(SUBJECTS), tuple(THEN)))


@pytest.mark.parametrize("how, kind, name, then", COVERING)
def test_a_changed_layer_is_called(how: str, kind: str, name: str, then: str) -> None:
    require(how)
    fused, plain = subject(name)
    names = layers(plain, CHANGES[how], kind)
    # One layer of the kind, another one for every subject; "all" changes them together.
    some = names if kind == "all" else [names[list(SUBJECTS).index(name) % len(names)]]
    check(how, some, fused, plain, THEN[then])


@pytest.mark.slow
@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("how", CHANGES)
def test_every_changed_layer_is_called(how: str, name: str, then: str) -> None:
    require(how)
    _, plain = subject(name)
    for layer in layers(plain, CHANGES[how], "all"):
        if _allowed(how, "all", name, then):
            check(how, [layer], *subject(name), THEN[then])


@pytest.mark.parametrize("how, name", [("own_forward", "adaln_zero"), ("prune", "public")])
def test_changed_layers_are_called_in_compiled_models(how: str, name: str) -> None:
    _check_compiled(how, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("how", CHANGES)
def test_every_change_is_kept_by_compiled_models(how: str, name: str) -> None:
    _check_compiled(how, name)


def _check_compiled(how: str, name: str) -> None:
    require(how)
    fused, plain = subject(name)
    torch._dynamo.reset()
    check(how, layers(plain, CHANGES[how], "all"), fused, plain, partial(torch.compile, backend="eager"))
    torch._dynamo.reset()


# Whoever changes all layers at once leaves little to fuse; what is proven beside one changed layer shows more.
@pytest.mark.parametrize(
    "how, kind, name", [("lora", "linear", "public"), ("torchao", "linear", "diffusers"), ("fp8", "convolution", "public")]
)
def test_a_layer_changed_before_accelerate_is_called(how: str, kind: str, name: str) -> None:
    _check_before(how, kind, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", CHANGES)
def test_every_layer_changed_before_accelerate_is_called(how: str, kind: str, name: str) -> None:
    if not _allowed(how, kind, name, "kept"):
        pytest.skip("no such layer")
    _check_before(how, kind, name)


def _check_before(how: str, kind: str, name: str) -> None:
    require(how)
    change, (_, plain) = CHANGES[how], subject(name)
    fused = copy.deepcopy(plain)
    names = layers(plain, change, kind)
    for model in (fused, plain):
        changed(model, change, names if kind == "all" else names[-1:], [])
    accelerate(fused)
    assert_same(run(fused, change.trains), run(plain, change.trains))


# ---- All modules of the process, and what shards them ----------------------------------------------------------------

GLOBAL = {
    "forward": (everywhere.register_module_forward_hook, lambda module, args, out: None),
    "forward_pre": (everywhere.register_module_forward_pre_hook, lambda module, args: None),
    "full_backward": (everywhere.register_module_full_backward_hook, lambda module, grads, outs: None),
    "full_backward_pre": (everywhere.register_module_full_backward_pre_hook, lambda module, outs: None),
}


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("kind", GLOBAL)
def test_a_global_hook_sees_every_call(kind: str, name: str) -> None:
    register, seen = GLOBAL[kind][0], []
    results = []
    for model in subject(name):
        names = {id(module): path for path, module in model.named_modules()}
        calls: Log = []
        handle = register(lambda module, *values, names=names, calls=calls: calls.append(names[id(module)]))
        try:
            results.append(run(model, True))
        finally:
            handle.remove()
        seen.append(calls)
    assert sorted(seen[0]) == sorted(seen[1])
    assert_same(*results)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["adaln_zero", "cross_attention", "public", "diffusers"])
def test_leaves_sharded_one_by_one_are_called(name: str, process_group: None) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    fused, plain = subject(name)
    want = run(plain, False)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for module in list(fused.modules()):
        if not list(module.children()) and list(module.parameters()):
            fsdp.fully_shard(module, mesh=mesh)
    fsdp.fully_shard(fused, mesh=mesh)
    assert_same(run(fused, False), want)


def test_what_computes_in_another_dtype_than_it_stores_is_given_the_models() -> None:
    """fp8 weights in a bf16 model, every one of them: nothing but the latents says what the model computes in."""
    pytest.importorskip("diffusers")
    for conditioning in ditkernels.reference.CONDITIONINGS:
        fused, plain = (model.to(torch.bfloat16) for model in subject(conditioning))
        x, t, y = torch.randn(2, 4, 4, 4).bfloat16(), torch.tensor([3, 900]), torch.tensor([1, 4])
        for model in (fused, plain):
            changed(model, CHANGES["fp8"], layers(model, CHANGES["fp8"], "all"), [])
        with torch.no_grad():
            got, want = fused(x, t, y), plain(x, t, y)
        assert got.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(got, want, **numerics.ROUNDED_MODEL)
