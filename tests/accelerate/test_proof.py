"""What a proof sees, what is watched afterwards, and what is outside of what was proven: small forks, one for each kind."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ditkernels
from ditkernels import restore
from ditkernels.accelerate import Report, proof, same, swap, watch
from tests.helpers.counting import counted
from tests.helpers.forks import Attention, Block, DiT, FinalLayer, randomised


def made(block: type[Block] = Block, model: type[DiT] = DiT, final: type[FinalLayer] = FinalLayer) -> DiT:
    return randomised(model(block, final))


def accelerated(model: nn.Module) -> tuple[nn.Module, Report]:
    """An accelerated copy, and its report."""
    fused = copy.deepcopy(model)
    return fused, ditkernels.accelerate(fused, file=io.StringIO())


def reason(report: Report, name: str) -> str:
    return next(part.reason for part in report.parts if part.name == name)


def batch(size: int = 3, side: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 4, side, side, generator=generator)
    t = torch.randint(0, 1000, (size,), generator=generator)
    return x, t, torch.randint(0, 10, (size,), generator=generator)


def ran(model: nn.Module, *args: object, **options: object) -> tuple[object, dict[str, int]]:
    """What a call returns, and the ops of the norm family that it ran."""
    torch.manual_seed(4)
    random.seed(4)
    np.random.seed(4)
    with torch.no_grad(), counted() as calls:
        return model(*args, **options), {name: count for name, count in calls.items() if count}


def assert_same(fused: nn.Module, plain: nn.Module, *args: object, **options: object) -> dict[str, int]:
    """Asserts that both give the same, and returns the ops that the fused one ran."""
    (got, calls), (want, _) = ran(fused, *args, **options), ran(plain, *args, **options)
    assert proof.structure(got) == proof.structure(want)
    for one, other in zip(proof.tensors_in(got), proof.tensors_in(want)):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    return calls


FUSED = {"modulate_norm": 1, "gated_residual_norm": 3}
"""Of a model of two blocks: the last of its norms and residuals is within final_layer."""


# ---- What a proof sees -----------------------------------------------------------------------------------------------


class DropsTokensByTorch(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if self.training and torch.rand(()) < 0.01:
            return x
        return super().forward(x, c)


class DropsTokensByNumpy(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x if self.training and np.random.rand() < 0.01 else super().forward(x, c)


class DropsTokensByPython(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x if self.training and random.random() < 0.01 else super().forward(x, c)


class ReturnsTuple(Block):
    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x, c), None


class ReturnsTupleOfList(Block):
    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, list]:  # type: ignore[override]
        return super().forward(x, c), []


class ReturnsDict(Block):
    def forward(self, x: Tensor, c: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"x": super().forward(x, c)}


class ReturnsHalf(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, c).bfloat16()


class OnlyOneSample(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(2 * x if len(x) == 1 else x, c)


class OnlyInTraining(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(2 * x if self.training else x, c)


class KeepsSomeTokens(Block):
    """Right where a proof looks at few tokens only."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return torch.cat([super().forward(x[:, :12], c), x[:, 12:]], dim=1)


class KeepsManyTokens(Block):
    """Right at the model's own token count, and wrong above it."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return torch.cat([super().forward(x[:, :16], c), x[:, 16:]], dim=1)


class Counts(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x, c)


class KeepsFeatures(Block):
    def __init__(self, *config: Any) -> None:
        super().__init__(*config)
        self.features: list[Tensor] = []

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.features.append(x.detach().mean())
        return super().forward(x, c)


class MovesBuffer(Block):
    def __init__(self, *config: Any) -> None:
        super().__init__(*config)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.mean.add_(1)
        return super().forward(x, c)


REFUSED = [
    (DropsTokensByTorch, r"draws random numbers \(torch\)"),
    (DropsTokensByNumpy, r"draws random numbers \(numpy\)"),
    (DropsTokensByPython, r"draws random numbers \(Python\)"),
    (ReturnsTuple, r"returns tuple\(a tensor of float64, None\), the fused one a tensor of float64"),
    (ReturnsTupleOfList, r"returns tuple\(a tensor of float64, list\(\)\)"),
    (ReturnsDict, r"returns dict\(x: a tensor of float64\)"),
    (ReturnsHalf, r"returns a tensor of bfloat16, the fused one a tensor of float64"),
    (OnlyOneSample, "computes something else"),
    (OnlyInTraining, "computes something else"),
    (KeepsSomeTokens, "computes something else"),
    (KeepsManyTokens, "computes something else"),
    (Counts, "its own forward writes calls"),
    (KeepsFeatures, "its own forward writes features"),
    (MovesBuffer, "its own forward writes mean"),
]


@pytest.mark.parametrize("block, why", REFUSED, ids=[block.__name__ for block, _ in REFUSED])
def test_a_block_that_does_more_is_refused(block: type[Block], why: str) -> None:
    model = made()
    model.blocks[1] = randomised(block())
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    fused, report = accelerated(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (str(np.random.get_state()), random.getstate()) == states[1:]
    assert reason(report, "blocks.0") == "", str(report)
    assert why.replace("\\", "") in reason(report, "blocks.1"), str(report)
    assert type(fused.blocks[1]) is block


class Masked(Attention):
    """With a table made for the model's own number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros(16, 16))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) + self.mask


def test_a_table_for_the_models_own_tokens_does_not_keep_a_part_from_being_fused() -> None:
    model = made()
    for block in model.blocks:
        block.attn = randomised(Masked())
    fused, report = accelerated(model)
    assert reason(report, "blocks.0.attn") == reason(report, "blocks.1.attn") == "", str(report)
    assert assert_same(fused, model, *batch()) == FUSED


class PerTokenBlock(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        c = c if c.dim() == 3 else c.unsqueeze(1)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PerTokenDiT(DiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c.unsqueeze(1) + self.pos_embed)
        return self.unpatchify(self.final_layer(x, c))


def test_conditioning_of_every_token_runs_the_originals() -> None:
    model = made(PerTokenBlock, PerTokenDiT)
    fused, report = accelerated(model)
    assert "(3, 16, 24) for conditioning; the ops take (B, D)" in reason(report, "")
    assert assert_same(fused, model, *batch()) == {"modulate_norm": 1}
    block, plain = fused.blocks[0], model.blocks[0]
    x, c = torch.randn(2, 16, 24), torch.randn(2, 24)
    assert assert_same(block, plain, x, c) == {"modulate_norm": 1, "gated_residual_norm": 1, "gated_residual": 1}
    for other in (c[:, None].expand(2, 16, 24), c[:1]):
        assert assert_same(block, plain, x, other) == {}


# ---- What was proven is what runs ------------------------------------------------------------------------------------


class Switched(Block):
    """Reads attributes: its own, a child's, one by name in a string, one with a default, one outside of a trial's way."""

    def __init__(self, *config: Any) -> None:
        super().__init__(*config)
        self.input_scale, self.exit_early, self.keep = 1.0, False, None
        self.mlp.off = False

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if self.exit_early or self.mlp.off:
            return x
        if getattr(self, "doubled", False):
            x = 2 * x
        if self.keep is not None:
            x = x * (torch.arange(x.shape[1]) < self.limit)[:, None]
        return super().forward(x * getattr(self, "input_" + "scale"), c)

    limit = 8


SWITCHES = [("input_scale", 0.5), ("exit_early", True), ("keep", "some"), ("mlp.off", True), ("doubled", True), ("norm1.eps", 0.1)]


@pytest.mark.parametrize("name, value", SWITCHES, ids=[name for name, _ in SWITCHES])
def test_a_changed_attribute_runs_the_original_until_it_is_changed_back(name: str, value: object) -> None:
    plain = made(Switched)
    fused, report = accelerated(plain)
    part = next(part for part in report.parts if part.name == "blocks.1")
    assert name in part.watched
    assert "exit_early" in str(report)
    assert assert_same(fused, plain, *batch()) == FUSED
    path, _, key = name.rpartition(".")
    owners = [model.blocks[1].get_submodule(path) for model in (fused, plain)]
    before, _ = ran(plain, *batch())
    kept = vars(owners[0]).get(key, watch.MISSING)
    for owner in owners:
        setattr(owner, key, value)
    assert assert_same(fused, plain, *batch()) == {"modulate_norm": 1, "gated_residual_norm": 1, "gated_residual": 1}
    assert not torch.equal(ran(plain, *batch())[0], before)
    for owner in owners:
        delattr(owner, key) if kept is watch.MISSING else setattr(owner, key, kept)
    assert assert_same(fused, plain, *batch()) == FUSED


def scaled(block: nn.Module, x: Tensor) -> Tensor:
    """Reads an attribute of a block in no method of its class."""
    return x * block.factor


class Processed(Block):
    factor: float

    def __init__(self, *config: Any) -> None:
        super().__init__(*config)
        self.factor, self.processor = 1.0, scaled

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(self.processor(self, x), c)


def test_what_a_processor_reads_is_watched() -> None:
    plain = made(Processed)
    fused, report = accelerated(plain)
    assert "factor" in next(part.watched for part in report.parts if part.name == "blocks.0")
    assert "factor" not in watch.names_in(Processed)
    for model in (fused, plain):
        model.blocks[0].factor = 3.0
    assert assert_same(fused, plain, *batch()) == {"modulate_norm": 1, "gated_residual_norm": 1}


class SkippingDiT(DiT):
    def __init__(self, *config: Any) -> None:
        super().__init__(*config)
        self.skipped: tuple[int, ...] = ()
        self.blocks[0].off = False

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for index, block in enumerate(self.blocks):
            if index not in self.skipped and not getattr(block, "off", False):
                x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


def test_attributes_of_the_model_and_those_it_reads_of_its_blocks() -> None:
    plain = made(model=SkippingDiT)
    fused, report = accelerated(plain)
    assert {"skipped", "blocks.0.off", "blocks.1.off"} <= set(report.parts[-1].watched)
    assert assert_same(fused, plain, *batch()) == FUSED
    for change in (lambda m: setattr(m, "skipped", (1,)), lambda m: setattr(m.blocks[1], "off", True)):
        models = copy.deepcopy(fused), copy.deepcopy(plain)
        for model in models:
            change(model)
        assert assert_same(*models, *batch()) == {"modulate_norm": 2, "gated_residual_norm": 1, "gated_residual": 1}


class NosyDiT(DiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        factor = 2 if getattr(self.blocks[1], "mlp", None) is not None else 1
        return super().forward(factor * x, t, y)


def test_a_model_that_asks_for_modules_of_a_block_keeps_its_forward() -> None:
    plain = made(model=NosyDiT)
    fused, report = accelerated(plain)
    assert reason(report, "") == "it reads mlp of a block"
    assert_same(fused, plain, *batch())


def test_attributes_of_a_called_child_are_its_own_matter() -> None:
    plain = made()
    fused, _ = accelerated(plain)
    for model in (fused, plain):
        model.blocks[0].mlp[1].approximate = "none"
    assert assert_same(fused, plain, *batch()) == FUSED


def test_attention_watches_the_dropouts_that_it_passes_over() -> None:
    plain = made().train()
    fused, _ = accelerated(plain)
    for model in (fused, plain):
        model.blocks[0].attn.proj_drop.p = 1.0
    assert assert_same(fused, plain, *batch()) == FUSED


class Rare(Block):
    """Reads an attribute where no trial comes by."""

    def __init__(self) -> None:
        super().__init__()
        self.rarely = 1.0

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x * self.rarely if c.abs().max() > 1e6 else x, c)


def test_what_no_trial_reads_is_watched_by_its_name_in_the_bytecode() -> None:
    plain = made(Rare)
    fused, _ = accelerated(plain)
    assert assert_same(fused, plain, *batch()) == FUSED
    for model in (fused, plain):
        model.blocks[0].rarely = 2.0
    assert assert_same(fused, plain, *batch()) == {"modulate_norm": 1, "gated_residual_norm": 1}


def test_copies_watch_their_own_attributes() -> None:
    plain = made(Switched)
    fused, _ = accelerated(plain)
    twin = copy.deepcopy(fused)
    twin.blocks[0].exit_early = True
    assert assert_same(fused, plain, *batch()) == FUSED
    plain.blocks[0].exit_early = True
    assert "gated_residual" not in assert_same(twin, plain, *batch())
    restore(fused)
    assert all("_ditkernels" not in vars(module) for module in fused.modules())


def test_a_compiled_model_follows_a_change() -> None:
    plain = made(Switched)
    fused, _ = accelerated(plain)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    for value in (1.0, 0.5, 1.0):
        for model in (fused, plain):
            model.blocks[1].input_scale = value
        assert_same(compiled, plain, *batch())


def test_the_bytecode_of_what_a_class_is_made_of() -> None:
    class Kind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only_at_first = 1

        def forward(self) -> object:
            return (lambda: self.in_lambda), getattr(self, "in_string"), [self.in_list for _ in range(3)]  # noqa: B009

        @property
        def wide(self) -> object:
            return self.in_property

        @staticmethod
        def help(module: Kind) -> object:
            return module.in_static

    names = watch.names_in(Kind)
    assert {"in_lambda", "in_string", "in_list", "in_property", "in_static"} <= names
    assert "only_at_first" not in names


def test_looking_on_leaves_no_trace() -> None:
    before = {name: getattr(nn.Module, name) for name in ("__getattribute__", "__setattr__", "__delattr__")}
    block = made().blocks[0]
    with pytest.raises(ValueError), watch.Trace(block, ("attn",))():
        raise ValueError
    assert {name: getattr(nn.Module, name) for name in before} == before
    assert "__getattribute__" not in vars(nn.Module)
    assert not block.attn._forward_hooks
    assert not block.attn._forward_pre_hooks


# ---- Outside of what was proven --------------------------------------------------------------------------------------


class OptionalBlock(Block):
    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        x = x if mask is None else x * mask
        return super().forward(x if scale is None else x * scale, c)


class OptionalFinal(FinalLayer):
    def forward(self, x: Tensor, c: Tensor, skip: Tensor | None = None) -> Tensor:
        return super().forward(x if skip is None else x + skip, c)


def test_more_arguments_run_the_original_and_none_of_them_does_not() -> None:
    model = made(OptionalBlock, final=OptionalFinal)
    fused, _ = accelerated(model)
    x, c = torch.randn(2, 16, 24), torch.randn(2, 24)
    mask = torch.rand(2, 16, 1)
    whole = {"modulate_norm": 1, "gated_residual_norm": 1, "gated_residual": 1}
    pair = fused.blocks[0], model.blocks[0]
    calls: list[tuple[tuple, dict, dict]] = [
        ((x, c), {}, whole),
        ((x, c, None), {}, whole),
        ((x,), {"c": c, "mask": None}, whole),
        ((), {"x": x, "c": c}, whole),
        ((x, c, mask), {}, {}),
        ((x, c), {"mask": mask}, {}),
        ((x, c), {"scale": 0.5}, {}),
        ((x, c, mask, 0.5), {}, {}),
    ]
    for args, options, ops in calls:
        assert assert_same(*pair, *args, **options) == ops, (len(args), options.keys())
    pair = fused.final_layer, model.final_layer
    for args, options, ops in [
        ((x, c), {}, {"modulate_norm": 1}),
        ((x, c, None), {}, {"modulate_norm": 1}),
        ((x, c, x), {}, {}),
        ((x, c), {"skip": x}, {}),
    ]:
        assert assert_same(*pair, *args, **options) == ops
    with pytest.raises(TypeError):
        fused.blocks[0](x, c, None, None, None)
    with pytest.raises(TypeError):
        fused.blocks[0](x, c, unheard_of=None)
    with pytest.raises(TypeError):
        fused.blocks[0](x)


class HandsNoneOn(DiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c, None, scale=None)
        return self.unpatchify(self.final_layer(x, c))


class Demanding(Block):
    """Not fused, and not to be called with less than its own model gives it."""

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        return super().forward(x, -c)


def test_arguments_of_none_reach_the_blocks_that_ask_for_them() -> None:
    model = made(OptionalBlock, HandsNoneOn)
    fused, report = accelerated(model)
    assert reason(report, "") == "", str(report)
    assert assert_same(fused, model, *batch()) == FUSED
    model.blocks[1] = randomised(Demanding())
    fused, report = accelerated(model)
    assert reason(report, "blocks.1") != ""
    assert reason(report, "") == "", str(report)
    assert_same(fused, model, *batch())


class InterpolatingDiT(DiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        size = x.shape[-1]
        x = self.x_embedder(x)
        positions = self.pos_embed
        if x.shape[1] != positions.shape[1]:
            positions = nn.functional.interpolate(positions.transpose(1, 2), x.shape[1], mode="linear").transpose(1, 2)
        c = self.t_embedder(t)
        x, c = x + positions, c if y is None else c + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        assert size == 2 * round(x.shape[1] ** 0.5)
        return self.unpatchify(self.final_layer(x, c))


def test_other_sizes_and_missing_labels_run_the_original() -> None:
    model = made(model=InterpolatingDiT)
    fused, report = accelerated(model)
    assert reason(report, "") == "", str(report)
    assert assert_same(fused, model, *batch()) == FUSED
    assert assert_same(fused, model, **dict(zip("xty", batch()))) == FUSED
    x, t, y = batch()
    assert assert_same(fused, model, x, t[:1], y) == FUSED
    closed = {"modulate_norm": 3, "gated_residual_norm": 2, "gated_residual": 2}
    for args in ((x, t), (x, t, None), batch(2, 12)):
        assert assert_same(fused, model, *args) == closed
    with pytest.raises(TypeError):
        fused(x)


# ---- Equal blocks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The classes of what is proven."""
    seen: list[str] = []
    prove = proof.prove

    def counting(module: nn.Module, *rest: object) -> object:
        seen.append(type(module).__name__)
        return prove(module, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(proof, "prove", counting)
    return seen


def test_equal_blocks_are_proven_once(proofs: list[str]) -> None:
    model = made(Switched)
    _, report = accelerated(model)
    assert proofs.count("Switched") == proofs.count("Attention") == 1
    assert len([part for part in report.fused if part.name.startswith("blocks.")]) == 6


def one(change: Callable[[Block], object]) -> DiT:
    model = made(Switched)
    change(model.blocks[1])
    return model


UNEQUAL: dict[str, Callable[[Block], object]] = {
    "value": lambda block: setattr(block, "input_scale", 2.0),
    "deep": lambda block: setattr(block.mlp[1], "approximate", "none"),
    "class": lambda block: setattr(block.mlp, "1", nn.SiLU()),
    "function": lambda block: setattr(block, "helper", lambda x: x),
    "buffer": lambda block: block.register_buffer("table", torch.ones(3)),
    "dtype": lambda block: block.attn.qkv.double(),
    "shape": lambda block: setattr(block.attn, "proj", nn.Linear(24, 24, bias=False)),
    "hook": lambda block: block.mlp.register_forward_hook(print),
}


@pytest.mark.parametrize("change", UNEQUAL.values(), ids=UNEQUAL)
def test_blocks_that_differ_are_told_apart(change: Callable[[Block], object]) -> None:
    first, second = made(Switched).blocks
    assert same.description(first) == same.description(second)
    for name in ("helper", "table"):
        assert not hasattr(first, name)
    change(second)
    assert same.description(first) != same.description(second)


def test_tables_of_other_values_are_told_apart() -> None:
    first, second = Masked(), Masked()
    assert same.description(first) == same.description(second)
    second.mask[3, 3] = 1.0
    assert same.description(first) != same.description(second)


def test_a_change_in_one_block_is_seen_in_that_block() -> None:
    model = one(lambda block: setattr(block, "input_scale", 2.0))
    fused, report = accelerated(model)
    assert reason(report, "blocks.0") == ""
    assert "computes something else" in reason(report, "blocks.1")
    assert type(fused.blocks[1]) is Switched
    assert isinstance(fused.blocks[0], swap.Fused)
    assert_same(fused, model, *batch())
