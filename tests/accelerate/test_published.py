"""accelerate() on stand-ins of public forks, whose blocks are known by what they compute in a call of them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditkernels import accelerate, restore
from ditkernels.accelerate import proof, swap
from ditkernels.accelerate.parts import kind_of_norm
from ditkernels.accelerate.recorded.part import Recorded
from ditkernels.accelerate.refusals import Refused
from ditkernels.accelerate.report import Report
from tests import numerics
from tests.helpers.counting import Graphs, counted
from tests.helpers.forks import randomised
from tests.stand_ins import forks
from tests.stand_ins.forks import FORKS, WIDTH, MoEBlock
from tools.accelerate_sites import Sites, fused

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
Results = dict[str, Tensor]

LEAST = 0.85
"""Of all sites, on average."""


def made(name: str) -> nn.Module:
    """With norms of weights around one, so that the attentions look somewhere."""
    torch.manual_seed(0)
    model = randomised(FORKS[name].make())
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                module.weight += 1
    return model


def call_of(name: str, batch: int = 2, dtype: torch.dtype = F32) -> forks.Arguments:
    args, kwargs = FORKS[name].call(torch.Generator().manual_seed(batch), batch)
    return tuple(value.to(dtype) if value.is_floating_point() else value for value in args), kwargs


def quietly(model: nn.Module, example: forks.Arguments) -> Report:
    return accelerate(model, example=example, file=io.StringIO())


def rewired(name: str) -> nn.Module:
    model = made(name)
    report = quietly(model, call_of(name))
    assert any(isinstance(module, Recorded) for module in model.modules()), str(report)
    return model


def called(model: nn.Module, name: str, batch: int = 2, dtype: torch.dtype = F32) -> tuple[Tensor, ...]:
    args, kwargs = call_of(name, batch, dtype)
    return tuple(proof.tensors_in(model(*args, **kwargs)))


def run(model: nn.Module, name: str, batch: int, dtype: torch.dtype) -> Results:
    """The outputs, and the gradient of every parameter."""
    outputs = called(model, name, batch, dtype)
    parameters = {n: p for n, p in model.named_parameters() if not n.endswith("k_norm.bias")}
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, list(parameters.values()), cotangents, allow_unused=True)
    results = {f"d{n}": g for n, g in zip(parameters, gradients) if g is not None}
    return {**{f"output {i}": out.detach() for i, out in enumerate(outputs)}, **results}


def in_fp64(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


# ---- Agreement and sites ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", list(FORKS))
def test_outputs_and_gradients_agree(name: str, batch: int) -> None:
    model, plain = rewired(name), made(name)
    got, low, want = run(model, name, batch, F32), run(plain, name, batch, F32), run(in_fp64(plain), name, batch, F64)
    assert got.keys() == low.keys() == want.keys()
    assert low["output 0"].abs().max() > 0.1
    for key, value in want.items():
        assert got[key].dtype == low[key].dtype
        numerics.assert_model_contract(got[key], low[key], value, f"{name} {key}")


@pytest.mark.parametrize("name", [name for name in FORKS if name != "DiT-MoE"])
def test_agrees_in_bf16(name: str) -> None:
    """But for the model whose tokens may choose other experts then."""
    plain = made(name).to(BF16)
    model = copy.deepcopy(plain)
    report = quietly(model, call_of(name, dtype=BF16))
    assert any(isinstance(module, Recorded) for module in model.modules()), str(report)
    got, low, want = (run(each, name, 3, dtype) for each, dtype in ((model, BF16), (plain, BF16), (in_fp64(plain), F64)))
    for key, value in want.items():
        assert got[key].dtype == low[key].dtype
        numerics.assert_model_contract(got[key], low[key], value, f"{name} {key}")


def test_sites_run_fused_and_restore_brings_the_bits_back() -> None:
    shares = []
    for name in FORKS:
        model = made(name)
        with torch.no_grad():
            want = called(model, name)
            with Sites(model) as sites:
                called(model, name)
            report = quietly(model, call_of(name))
            with fused() as ran:
                called(model, name)
            shares.append(ran["sites"] / sites.count)
            assert 0 < ran["sites"] <= sites.count, f"{name}: {report}"
            restore(model)
            with counted() as calls:
                assert all(map(torch.equal, called(model, name), want))
        assert set(calls.values()) == {0}
        assert not any(isinstance(module, swap.Fused) for module in model.modules())
    assert sum(shares) / len(shares) >= LEAST


def test_dropout_in_a_branch_draws_the_same_numbers() -> None:
    model, plain = rewired("JiT").train(), made("JiT").train()
    assert isinstance(model.blocks[1], Recorded)
    outputs = []
    for each in (model, plain):
        torch.manual_seed(3)
        outputs.append(called(each, "JiT")[0])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], called(plain.eval(), "JiT")[0], rtol=1e-2)


# ---- What somebody might write ---------------------------------------------------------------------------------------


class TupleBlock(MoEBlock):
    """Returns what it saw of the branches too, and takes the condition by keyword only."""

    def forward(self, hidden: Tensor, *, cond: Tensor, flags: tuple[int, ...] = (), mask: Tensor | None = None) -> Any:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(cond).chunk(6, dim=1)
        branch = self.attn(torch.addcmul(shift1[:, None], self.norm1(hidden), 1 + scale1[:, None]))
        hidden = torch.addcmul(hidden, gate1[:, None], branch)
        h = self.norm2(hidden) * (scale2[:, None] + 1) + shift2[:, None]
        return (hidden + self.moe(h) * gate2[:, None], {"branch": branch}), flags


class Tabled(MoEBlock):
    """Vectors out of a table and the condition, dropped branches, and one more sum of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 6, WIDTH))
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        batch, length, width = x.shape
        vectors = (self.table + self.adaLN_modulation(c).reshape(batch, 6, width)).chunk(6, dim=1)
        x = x + self.drop(vectors[2] * self.attn(self.norm1(x) * (1 + vectors[1]) + vectors[0]))
        h = self.norm2(x) * (1 + vectors[4])
        h += vectors[3]
        x = x + vectors[5] * self.moe(h)
        return x.view(batch, length, width)


class Unseen(MoEBlock):
    """Takes a way by the size of what it is given."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(2 * x if x.shape[0] == 1 else x, c)


class Ambient(MoEBlock):
    """Out of autocast's reach."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x, c)


class Making(MoEBlock):
    """Computes with a tensor of its own making."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x + torch.ones(1, 1, WIDTH).to(self.adaLN_modulation[1].weight), c)


class Hiding(MoEBlock):
    def __init__(self) -> None:
        super().__init__()
        self.closed = True


class Holding(nn.Module):
    """A model of one block, given to it as it likes."""

    def __init__(self, block: nn.Module, call: Callable[[nn.Module, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layers, self._call = nn.ModuleList([block]), call

    def forward(self, x: Tensor, c: Tensor) -> Any:
        return self._call(self.layers[0], x, c)


def plainly(block: nn.Module, x: Tensor, c: Tensor) -> Any:
    return block(x, c)


def tokens(batch: int = 2, length: int = 5) -> forks.Arguments:
    draw = torch.Generator().manual_seed(length)
    return (torch.randn(batch, length, WIDTH, generator=draw), torch.randn(batch, WIDTH, generator=draw)), {}


def held(block: nn.Module, call: Callable[[nn.Module, Tensor, Tensor], Any] = plainly) -> tuple[Holding, Holding]:
    """A model, and the same rewired."""
    plain = Holding(randomised(block), call)
    model = copy.deepcopy(plain)
    quietly(model, tokens())
    return plain, model


def by_keyword(block: nn.Module, x: Tensor, c: Tensor) -> Any:
    return block(x, cond=c, flags=(1, 2))


@pytest.mark.parametrize("block, call, sites", [(TupleBlock, by_keyword, 4), (Tabled, plainly, 4)])
def test_other_forms_are_fused(block: type[nn.Module], call: Callable[..., Any], sites: int) -> None:
    plain, model = held(block(), call)
    for batch, length in ((2, 5), (1, 5), (3, 9)):
        args, _ = tokens(batch, length)
        with torch.no_grad(), fused() as ran:
            got, want = model(*(arg.clone() for arg in args)), plain(*(arg.clone() for arg in args))
        assert proof.structure(got) == proof.structure(want)
        for mine, theirs in zip(proof.tensors_in(got), proof.tensors_in(want)):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert ran["sites"] == sites


@pytest.mark.parametrize(
    "block, reason",
    [
        (Unseen, "by the sizes or the values"),
        (Ambient, "autocast"),
        (Making, "a tensor that it makes itself"),
        (Hiding, "it has closed, which the fused class has too"),
    ],
)
def test_a_block_that_cannot_be_told_is_left_and_the_report_says_why(block: type[nn.Module], reason: str) -> None:
    plain = Holding(randomised(block()), plainly)
    model = copy.deepcopy(plain)
    report = quietly(model, tokens())
    assert reason in str(report)
    assert [part.name for part in report.left] == ["layers.0"]
    with torch.no_grad():
        assert torch.equal(model(*tokens()[0]), plain(*tokens()[0]))


def test_another_call_than_the_proven_takes_the_originals_way() -> None:
    block = TupleBlock()
    plain, model = held(block, by_keyword)
    (x, c), _ = tokens()
    for options in ({"flags": (1,)}, {"flags": (1, 2), "mask": x}, {}):
        with torch.no_grad(), counted() as calls:
            got, want = (each.layers[0](x, cond=c, **options) for each in (model, plain))
        assert torch.equal(got[0][0], want[0][0])
        assert got[1] == want[1]
        assert set(calls.values()) == {0}


def test_vectors_that_no_op_takes_run_as_they_are_written() -> None:
    """One row of vectors for all samples broadcasts in plain PyTorch."""
    plain, model = held(MoEBlock())
    x, _ = tokens(3)[0]
    c = torch.randn(1, WIDTH)
    with torch.no_grad(), counted() as calls:
        torch.testing.assert_close(model(x, c), plain(x, c), rtol=1e-4, atol=1e-5)
    assert set(calls.values()) == {0}


@pytest.mark.parametrize("path", ["norm1", "attn", "adaLN_modulation.1"])
def test_a_layer_that_somebody_hooks_is_called(path: str) -> None:
    plain, model = held(MoEBlock())
    for each in (plain, model):
        each.layers[0].get_submodule(path).register_forward_hook(lambda layer, args, out: 2 * out)
    args = tokens()[0]
    with torch.no_grad():
        torch.testing.assert_close(model(*args), plain(*args), rtol=1e-4, atol=1e-5)


def test_copies_and_pickles_run_fused() -> None:
    _, model = held(MoEBlock())
    args = tokens()[0]
    block = model.layers[0]
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        with torch.no_grad(), counted() as calls:
            assert torch.equal(twin(*args), block(*args))
        assert calls["gated_residual_norm"] == 2


def test_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    plain, model = held(MoEBlock())
    graphs = Graphs()
    model.layers[0].compile(backend=graphs, fullgraph=True)
    args = tokens()[0]
    with torch.no_grad():
        torch.testing.assert_close(model(*args), plain(*args), rtol=1e-4, atol=1e-5)
    assert graphs.calls["gated_residual_norm"] == 1


def test_a_decorated_forward_stays_compiled() -> None:
    graphs = Graphs()
    decorated = type("Decorated", (MoEBlock,), {"forward": torch.compile(MoEBlock.forward, backend=graphs)})
    plain, model = Holding(randomised(MoEBlock()), plainly), Holding(randomised(decorated()), plainly)
    quietly(model, tokens())
    assert isinstance(model.layers[0], Recorded)
    args = tokens()[0]
    with torch.no_grad():
        torch.testing.assert_close(model(*args), plain(*args), rtol=1e-4, atol=1e-5)
    assert graphs.calls["gated_residual_norm"] == 1


# ---- Norms that keep no eps ------------------------------------------------------------------------------------------


class ByDtype(forks.BareNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)


def test_an_eps_that_no_attribute_keeps_is_measured() -> None:
    kind = kind_of_norm("norm", forks.BareNorm(WIDTH), WIDTH)
    assert (kind.norm, kind.eps) == ("rmsnorm", 1e-5)


@pytest.mark.parametrize("norm", [ByDtype(WIDTH), nn.GELU(), nn.Tanh(), nn.ReLU()])
def test_what_is_no_norm_with_one_eps_is_refused(norm: nn.Module) -> None:
    with pytest.raises(Refused):
        kind_of_norm("norm", norm, WIDTH)
