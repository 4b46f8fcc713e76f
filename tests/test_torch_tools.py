"""What torch's own tools do with a model works with ours and with accelerated ones: caches, unknown sizes, torch.func, tracing."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch._functorch._aot_autograd.autograd_cache import check_cacheable
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ditkernels import accelerate, models, ops, reference
from tests import numerics
from tests.helpers.native_cpu import needs_compiler

TINY = {"input_size": 4, "hidden_size": 48, "depth": 2, "num_heads": 2, "num_classes": 5}


def randomised(model: nn.Module) -> nn.Module:
    """A fresh DiT returns exactly zero, which any kernel reproduces: make every trained parameter count."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                std = 0.5 / max(1, parameter.shape[-1]) ** 0.5 if parameter.dim() > 1 else 0.2
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def own() -> nn.Module:
    return randomised(models.DiT(**TINY)).eval()


def unaccelerated() -> nn.Module:
    pytest.importorskip("timm")
    from tests.stand_ins import public

    return randomised(public.DiT(**TINY)).eval()


def accelerated() -> nn.Module:
    model = unaccelerated()
    accelerate(model, file=io.StringIO())
    return model


def plain() -> nn.Module:
    return randomised(reference.DiT(**TINY)).eval()


MODELS = {"own": own, "accelerated": accelerated}
ALL = {"plain": plain, **MODELS}


def batch(size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, 4, 4, 4, generator=generator)
    t = torch.randint(0, 1000, (size,), generator=generator)
    return x, t, torch.randint(0, 6, (size,), generator=generator)


# ---- The compiler's cache on disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_the_graph_of_a_model_may_enter_the_compilers_cache(kind: str) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        check_cacheable(graph)
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    out = torch.compile(MODELS[kind](), fullgraph=True, backend=keep)(*batch())
    assert out.requires_grad
    assert len(graphs) == 1


PROCESS = """
import json, sys, torch
from torch._dynamo.utils import counters
from tests import test_torch_tools

torch.set_num_threads(1)
model = test_torch_tools.MODELS[sys.argv[1]]()
torch.compile(model, fullgraph=True)(*test_torch_tools.batch()).square().mean().backward()
print(json.dumps([counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("miss", "hit", "bypass")]))
"""


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", MODELS)
def test_a_second_process_finds_the_training_step_compiled(kind: str, tmp_path: Path) -> None:
    settings = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    command = [sys.executable, "-c", PROCESS, kind]
    found = []
    for _ in range(2):
        ran = subprocess.run(command, env=os.environ | settings, check=True, stdout=subprocess.PIPE)
        found.append(json.loads(ran.stdout))
    assert found == [[1, 0, 0], [0, 1, 0]]


# ---- Sizes that a compiler does not know -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "own"])
def test_a_batch_of_unknown_size_compiles(kind: str) -> None:
    model = ALL[kind]()
    torch._dynamo.reset()
    inputs = batch(3)
    for tensor in inputs:
        torch._dynamo.decorators.mark_unbacked(tensor, 0)
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for given in (inputs, batch(1), batch(5)):
        assert torch.equal(compiled(*given), model(*given))
    assert graphs.frame_count == 1
    x, t, y = batch(5)
    with pytest.raises(RuntimeError):
        compiled(x, t[:4], y)


def test_tokens_of_unknown_number_compile() -> None:
    block = own().blocks[0].attn
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(3))
    torch._dynamo.reset()
    torch._dynamo.decorators.mark_unbacked(x, 1)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    for tokens in (x, x[:, :1], x[:, :5]):
        assert torch.equal(compiled(tokens), block(tokens))


@pytest.mark.parametrize("kind", ["plain", "own"])
def test_an_empty_batch_has_an_empty_answer_and_no_gradient(kind: str) -> None:
    model = ALL[kind]()
    out = model(*batch(0))
    assert out.shape == (0, 8, 4, 4)
    out.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


# ---- torch.func: against a loop over samples, or models, of the plain reference ---------------------------------------


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def squares(model: nn.Module, weights: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    return torch.func.functional_call(model, weights, inputs).square().mean()


def of_a_sample(model: nn.Module, weights: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    return squares(model, weights, *[value[None] for value in inputs])


def plain_gradients(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(squares(model, named, *inputs), named.values())))


def assert_contracts(actual: dict[str, Tensor], low: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        numerics.assert_model_contract(value, low[name], exact[name], name)


def oracles(kind: str) -> tuple[nn.Module, nn.Module]:
    """The plain model with the same weights, in fp32 and in fp64."""
    low = plain() if kind != "accelerated" else unaccelerated()
    return low, widened(low)


def widened(low: nn.Module) -> nn.Module:
    exact = copy.deepcopy(low).double()
    # The public code computes its sinusoids in fp32.
    exact.t_embedder.mlp.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    return exact


def looped(kind: str, gradients: Callable[[nn.Module, tuple[Tensor, ...]], dict[str, Tensor]]) -> tuple[dict[str, Tensor], ...]:
    """What the plain model answers, in fp32 and in fp64."""
    low, exact = oracles(kind)
    x, t, y = batch()
    return gradients(low, (x, t, y)), gradients(exact, (x.double(), t, y))


def sample_by_sample(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    single = [plain_gradients(model, *[value[i : i + 1] for value in inputs]) for i in range(len(inputs[0]))]
    return {name: torch.stack([one[name] for one in single]) for name in single[0]}


@pytest.fixture
def no_slow_fallback() -> Iterator[None]:
    """torch warns where vmap has no rule for an op, and runs it call by call."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.usefixtures("no_slow_fallback")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ALL)
def test_gradients_by_torch_func(kind: str, compiled: bool) -> None:
    model = ALL[kind]()
    whole = torch.func.grad(partial(squares, model))
    samples = torch.func.vmap(torch.func.grad(partial(of_a_sample, model)), in_dims=(None, 0, 0, 0))
    if compiled:
        torch._dynamo.reset()
        whole, samples = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (whole, samples))
    assert_contracts(whole(weights(model), *batch()), *looped(kind, lambda model, inputs: plain_gradients(model, *inputs)))
    assert_contracts(samples(weights(model), *batch()), *looped(kind, sample_by_sample))


@pytest.mark.usefixtures("no_slow_fallback")
@pytest.mark.parametrize("kind", ALL)
def test_a_jacobian_and_an_ensemble(kind: str) -> None:
    def of(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        x, t, y = inputs
        corner = lambda x: model(x, t, y)[0, :, 0, 0]  # noqa: E731
        x = x.clone().requires_grad_()
        rows = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in corner(x)]
        halved = {name: p.detach().to(x.dtype) / 2 for name, p in weights(model).items()}
        members = [torch.func.functional_call(model, w, (x, t, y)) for w in (weights(model), halved)]
        return {"jacobian": torch.stack(rows), "ensemble": torch.stack(members).detach()}

    model, (x, t, y) = ALL[kind](), batch()
    stacked = {name: torch.stack([p, p / 2]) for name, p in weights(model).items()}
    actual = {
        "jacobian": torch.func.jacrev(lambda x: model(x, t, y)[0, :, 0, 0])(x),
        "ensemble": torch.func.vmap(lambda w: torch.func.functional_call(model, w, (x, t, y)))(stacked),
    }
    assert_contracts(actual, *looped(kind, of))


@pytest.mark.parametrize("kind", ["plain", "own"])
def test_a_bad_label_is_refused_under_transforms_and_tracing(kind: str) -> None:
    model = ALL[kind]()
    x, t, _ = batch()
    y = torch.tensor([0, 1, 77])
    samples = torch.func.vmap(torch.func.grad(partial(of_a_sample, model)), in_dims=(None, 0, 0, 0))
    with pytest.raises(ValueError, match="label 77"):
        samples(weights(model), x, t, y)
    with pytest.raises(ValueError, match="label 77"):
        make_fx(lambda *inputs: model(*inputs))(x, t, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ops_of_mixed_dtypes_can_be_transformed(dtype: torch.dtype) -> None:
    """The patch embedding of fp32 latents with weights of another dtype, as on the ops' own way."""
    generator = torch.Generator().manual_seed(3)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 4, 4, 4), (8, 4, 2, 2), (8,)))
    weight = weight.to(dtype)
    actual = torch.func.vmap(lambda x: ops.patch_embed(x[None], weight, bias)[0])(x)
    exact = reference.patch_embed(x.double(), weight.double(), bias.double())
    low = reference.patch_embed(x.to(dtype), weight, bias.to(dtype), out_dtype=torch.float32)
    numerics.assert_contract(actual, low, exact)


# ---- Tracing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("kind", ALL)
def test_make_fx_traces_a_model(kind: str, mode: str) -> None:
    model = ALL[kind]()
    graph = make_fx(lambda *inputs: model(*inputs), tracing_mode=mode, _allow_non_fake_inputs=True)(*batch())
    assert torch.equal(graph(*batch()), model(*batch()))


@pytest.mark.parametrize("kind", ["plain", "own"])
def test_a_model_of_fake_tensors_trains(kind: str) -> None:
    with FakeTensorMode() as mode:
        model = ALL[kind]().train()
        x, t, y = (mode.from_tensor(value) for value in batch())
        out = model(x, t, y)
        out.sum().backward()
    assert out.shape == (3, 8, 4, 4)
    assert isinstance(model.final_layer.linear.weight.grad, FakeTensor)


# ---- How many graphs -------------------------------------------------------------------------------------------------

MODES = {"training": torch.enable_grad, "no_grad": torch.no_grad}


def deep(kind: str, depth: int) -> nn.Module:
    made = {"plain": reference.DiT, "own": models.DiT}[kind]
    return randomised(made(**{**TINY, "depth": depth})).eval()


def graphs_of_a_model(kind: str) -> list[int]:
    """Graphs compiled until batches of three sizes, other timesteps and guidance have run, in each mode."""
    torch._dynamo.reset()
    model, graphs = ALL[kind](), torch._dynamo.testing.CompileCounter()
    model.compile(fullgraph=True, backend=graphs)
    counts = []
    for mode in MODES.values():
        with mode():
            for size in (3, 5, 8):
                x, t, y = batch(size)
                model(x, t, y)
                model(x, t // 2, y)
                model(torch.cat((x, x)), torch.cat((t, t)), torch.cat((y, torch.full_like(y, 5))))
        counts.append(graphs.frame_count)
    return counts


def test_a_model_has_as_many_graphs_as_the_reference() -> None:
    assert graphs_of_a_model("own") == graphs_of_a_model("plain")


def graphs_of_blocks(kind: str) -> list[int]:
    """Graphs of 28 blocks, each compiled, after a call in each mode."""
    torch._dynamo.reset()
    model, graphs = deep(kind, 28), torch._dynamo.testing.CompileCounter()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=graphs)
    counts = []
    for mode in MODES.values():
        with mode():
            model(*batch())
        counts.append(graphs.frame_count)
    return counts


def test_equal_blocks_share_graphs_but_for_the_first_ones() -> None:
    own, plain = graphs_of_blocks("own"), graphs_of_blocks("plain")
    assert plain == [1, 2]
    assert all(a <= b + modes for a, b, modes in zip(own, plain, (1, 2)))
