"""accelerate() and restore() on models and in wrappers that neither was written for: no crash, nothing half done."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ditkernels
from ditkernels import accelerate, restore
from ditkernels.accelerate import proof, swap
from tests.helpers.counting import Graphs, counted

pytest.importorskip("torchvision", reason="timm needs torchvision, which cannot be had here")
pytest.importorskip("timm")

from tests.stand_ins import lightning, public

Call = tuple[Tensor, Tensor, Tensor]


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter counts: a fresh DiT returns exactly zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def small(kind: Callable[..., nn.Module] = public.DiT) -> nn.Module:
    return randomised(kind(hidden_size=24, num_heads=2))


def with_block(block: type[nn.Module]) -> nn.Module:
    """A DiT of three blocks, the middle one a ``block``."""
    model = public.DiT(hidden_size=24, num_heads=2)
    model.blocks[1] = block(24, 2)
    return randomised(model)


def quietly(model: nn.Module, **options: object) -> ditkernels.accelerate.Report:
    return accelerate(model, file=io.StringIO(), **options)


def reason(report: ditkernels.accelerate.Report, name: str) -> str:
    """Why the part was left; "" if it was fused."""
    return next(part.reason for part in report.parts if part.name == name)


def call() -> Call:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 700]), torch.tensor([1, 9])


def assert_same(model: nn.Module, plain: nn.Module, *args: object, **tolerance: float) -> None:
    with torch.no_grad():
        got, want = (each(*(args or call())) for each in (model, plain))
    torch.testing.assert_close(got, want, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))


def assert_restored(model: nn.Module, plain: nn.Module, run: Callable[[], Tensor] | None = None) -> None:
    """``model``, or ``run``, gives the plain model's bits, by the plain model's means."""
    with torch.no_grad(), counted() as calls:
        assert torch.equal(run() if run else model(*call()), plain(*call()))
    assert set(calls.values()) == {0}
    assert not any(isinstance(module, swap.Fused) for module in model.modules())


# ---- Whatever a trial raises -----------------------------------------------------------------------------------------


class Unlike(BaseException):
    """No Exception at all."""


class RaisingBlock(public.DiTBlock):
    fault: BaseException

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        raise self.fault


@pytest.mark.parametrize("kind", [SystemExit, NameError, AssertionError, MemoryError, GeneratorExit, Unlike])
def test_what_a_trial_raises_refuses_that_part_by_name(kind: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RaisingBlock, "fault", kind("of its own\nand more"), raising=False)
    model = with_block(RaisingBlock)
    report = quietly(model)
    assert reason(report, "blocks.1") == f"{proof.OWN_FAILS} ({kind.__name__}: of its own)"
    assert reason(report, "blocks.0") == reason(report, "blocks.1.attn") == reason(report, "blocks.2") == ""
    assert type(model.blocks[1]) is RaisingBlock


def test_an_interrupt_passes_on_and_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RaisingBlock, "fault", KeyboardInterrupt(), raising=False)
    model = with_block(RaisingBlock)
    classes = [type(module) for module in model.modules()]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        quietly(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


class UnreadableBlock(public.DiTBlock):
    def __deepcopy__(self, memo: dict) -> nn.Module:
        raise SystemExit(3)


class UnreadableAttention(public.Attention):
    """Does not say how many heads it has."""

    @property
    def num_heads(self) -> int:
        raise OSError("no such file")

    @num_heads.setter
    def num_heads(self, value: int) -> None:
        self.heads = value


def test_what_cannot_be_copied_or_read_is_refused_by_name() -> None:
    model = with_block(UnreadableBlock)
    model.blocks[0].attn.__class__ = UnreadableAttention
    report = quietly(model)
    assert reason(report, "blocks.1") == "it cannot be copied (SystemExit: 3)"
    assert reason(report, "blocks.0.attn") == "it cannot be read (OSError: no such file)"
    assert reason(report, "blocks.2") == ""


class UncopyingBlock(public.DiTBlock):
    def __deepcopy__(self, memo: dict) -> nn.Module:
        return self


def test_a_copy_that_is_the_module_itself_is_never_overwritten() -> None:
    model = with_block(UncopyingBlock)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = quietly(model)
    assert "its copy has the same parameters" in reason(report, "blocks.1")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_nothing_is_rewired_by_a_call_that_cannot_print_its_report() -> None:
    closed = io.StringIO()
    closed.close()
    model = small()
    with pytest.raises(ValueError, match="closed file"):
        accelerate(model, file=closed)
    assert not any(isinstance(module, swap.Fused) for module in model.modules())


# ---- Several lists of blocks -----------------------------------------------------------------------------------------


class TwoLists(public.DiT):
    """Its first block is an encoder, the rest a decoder."""

    def __init__(self, **config: object) -> None:
        super().__init__(**config)
        blocks = list(self.blocks)
        del self.blocks
        self.encoder, self.decoder = nn.ModuleList(blocks[:1]), nn.ModuleList(blocks[1:])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in (*self.encoder, *self.decoder):
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


def test_several_lists_of_blocks_are_fused_and_reported() -> None:
    model = small(TwoLists)
    plain = copy.deepcopy(model)
    report = quietly(model)
    assert [part.name for part in report.left] == [""]
    assert "its blocks stand in several lists, encoder and decoder" in reason(report, "")
    assert {"encoder.0", "decoder.0", "decoder.1", "final_layer", "x_embedder"} <= {part.name for part in report.fused}
    assert len({part.name for part in report.parts}) == len(report.parts)
    assert "decoder.0-1 " in str(report)
    assert_same(model, plain)


# ---- Blocks under their own torch.compile ----------------------------------------------------------------------------


def wrapped_in_place(model: nn.Module, graphs: Graphs) -> None:
    model.blocks[1].compile(backend=graphs, fullgraph=True)


def wrapped_around(model: nn.Module, graphs: Graphs) -> None:
    model.blocks[1] = torch.compile(model.blocks[1], backend=graphs, fullgraph=True)


def decorated(model: nn.Module, graphs: Graphs) -> None:
    kind = type("CompiledBlock", (public.DiTBlock,), {})
    kind.forward = torch.compile(public.DiTBlock.forward, backend=graphs, fullgraph=True)
    model.blocks[1].__class__ = kind


@pytest.mark.parametrize("compiled", [wrapped_in_place, wrapped_around, decorated])
def test_a_block_keeps_its_own_compilation_and_the_trial_runs_without(compiled: Callable[[nn.Module, Graphs], None]) -> None:
    torch._dynamo.reset()
    model, graphs = small(), Graphs()
    plain = copy.deepcopy(model)
    compiled(model, graphs)
    report = quietly(model)
    assert graphs.compiled == 0
    assert not report.left, str(report)
    assert_same(model, plain)
    assert graphs.calls == {"modulate_norm": 0, "gated_residual": 0, "gated_residual_norm": 2}
    restore(model)
    fused = graphs.compiled
    assert_same(model, plain)
    assert graphs.compiled > fused
    assert graphs.calls["gated_residual_norm"] == 2
    assert not any(isinstance(module, swap.Fused) for module in model.modules())


# ---- restore() inside wrappers ---------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def in_ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def in_compile(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def in_prepare(model: nn.Module) -> nn.Module:
    package = pytest.importorskip("accelerate")
    package.state.AcceleratorState._reset_state(True)
    return package.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


def in_dispatch_hooks(model: nn.Module) -> nn.Module:
    hooks = pytest.importorskip("accelerate.hooks")
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook())
    return model


def in_checkpoint_wrappers(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    return model


def in_a_kept_method(model: nn.Module) -> nn.Module:
    forward = model.forward
    model.forward = lambda *args: forward(*args)
    return model


WRAPPERS = [in_ddp, in_compile, in_prepare, in_dispatch_hooks, in_checkpoint_wrappers, in_a_kept_method]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_restore_finds_its_way_through(wrap: Callable[[nn.Module], nn.Module], process_group: None) -> None:
    plain, model = wrap(small()), small()
    quietly(model)
    wrapped = wrap(model)
    assert_same(wrapped, plain, **({"rtol": 0.1, "atol": 0.1} if wrap is in_prepare else {}))  # in bf16
    restore(wrapped)
    assert_restored(wrapped, plain)
    assert_restored(model, plain)


def test_restore_says_so_where_a_class_was_laid_over_ours() -> None:
    model = small()
    quietly(model)
    nn.utils.parametrize.register_parametrization(model, "pos_embed", nn.Tanh(), unsafe=True)
    want = model(*call())
    with pytest.raises(ValueError, match=r"restore: the model was made a ParametrizedDiT since .*; undo it first, or restore"):
        restore(model)
    assert torch.equal(model(*call()), want)
    nn.utils.parametrize.remove_parametrizations(model, "pos_embed", leave_parametrized=False)
    restore(model)
    assert_restored(model, small())


# ---- Examples --------------------------------------------------------------------------------------------------------


class TextDiT(public.DiT):
    """Conditioned on vectors of text in the place of labels."""

    def __init__(self, **config: object) -> None:
        super().__init__(**config)
        self.y_embedder = nn.Linear(12, self.pos_embed.shape[-1])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert y.shape[-1] == 12, "text has 12 channels"
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


class MarkedBlock(public.DiTBlock):
    """Takes positions that have to be as many as the tokens, which are sixteen."""

    def forward(self, x: Tensor, c: Tensor, marks: Tensor | None = None) -> Tensor:
        assert x.shape[1] == 16, "there are 16 tokens"
        return super().forward(x if marks is None else x + marks, c)


class MarkedDiT(TextDiT):
    """Counts its calls in a buffer, draws noise, and hands its blocks ``marks`` if there are any."""

    block = MarkedBlock

    def __init__(self, **config: object) -> None:
        super().__init__(**config)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, marks: Tensor | None = None) -> Tensor:
        self.calls += 1
        x = self.x_embedder(x) + self.pos_embed + 0 * torch.rand(1)
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c, marks)
        return self.unpatchify(self.final_layer(x, c))


def text_call() -> Call:
    x, t, _ = call()
    return x, t, torch.randn(2, 12, generator=torch.Generator().manual_seed(2))


def test_an_example_shows_inputs_that_cannot_be_guessed() -> None:
    model = small(TextDiT)
    plain = copy.deepcopy(model)
    assert reason(quietly(copy.deepcopy(model)), "") == f"{proof.OWN_FAILS} (AssertionError: text has 12 channels)"
    report = quietly(model, example=(text_call(), {}))
    assert not report.left, str(report)
    with counted() as calls:
        assert_same(model, plain, *text_call())
    assert calls == {"modulate_norm": 1, "gated_residual": 0, "gated_residual_norm": 5}


def test_an_example_gives_the_true_number_of_tokens_and_leaves_no_trace() -> None:
    model = small(MarkedDiT)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x, t, y = text_call()
    report = quietly(model, example=((x,), {"t": t, "y": y}))
    assert [part.name for part in report.left] in ([], [""]), str(report)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_the_example_gives_and_no_fused_forward_takes_is_refused_by_name() -> None:
    model = small(MarkedDiT)
    plain = copy.deepcopy(model)
    report = quietly(model, example=((*text_call(), torch.ones(16, 24)), {}))
    assert reason(report, "blocks.0") == "the example gives it marks, which its fused forward does not take"
    assert reason(report, "blocks.0.attn") == reason(report, "blocks.0.mlp") == ""
    assert_same(model, plain, *text_call(), torch.ones(16, 24))


class PerTokenBlock(public.DiTBlock):
    """Takes conditioning of samples or of tokens."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        c = c.unsqueeze(1) if c.dim() == 2 else c
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PerTokenDiT(public.DiT):
    block = PerTokenBlock

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        tokens = c.unsqueeze(1) * torch.linspace(0, 1, x.shape[1])[:, None]
        for block in self.blocks:
            x = block(x, tokens)
        return self.unpatchify(self.final_layer(x, c))


def test_a_block_that_a_family_takes_and_its_call_does_not_fit_is_fused_by_what_it_computes() -> None:
    """The family's forward takes conditioning per sample, and would hand this one to its own."""
    model = small(PerTokenDiT)
    plain = copy.deepcopy(model)
    report = quietly(model, example=(call(), {}))
    assert reason(report, "blocks.0") == reason(report, "blocks.0.attn") == reason(report, "final_layer") == ""
    assert_same(model, plain)


@pytest.mark.parametrize(
    "example, why",
    [
        (call(), "example is tuple; it must be a pair"),
        ((call(), {}), r"the model does not run on the example \(AssertionError: text has 12 channels\)"),
        ((text_call(), {"z": 1}), r"the model does not run on the example \(TypeError: .*'z'"),
    ],
    ids=["no_pair", "fails", "unknown_argument"],
)
def test_an_example_that_is_none_is_an_error(example: tuple, why: str) -> None:
    model = small(TextDiT)
    with pytest.raises(ValueError, match=why):
        quietly(model, example=example)
    assert not any(isinstance(module, swap.Fused) for module in model.modules())


# ---- Reasons that help -----------------------------------------------------------------------------------------------


class RealTimesteps(nn.Linear):
    """Takes times between 0 and 1, which it does not convert."""

    def __init__(self, width: int) -> None:
        super().__init__(1, width)

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(t[:, None])


def test_timesteps_that_must_be_real_are_drawn_so() -> None:
    model = small()
    model.t_embedder = RealTimesteps(24)
    plain = copy.deepcopy(model)
    assert not quietly(model).left
    x, _, y = call()
    assert_same(model, plain, x, torch.tensor([0.1, 0.9]), y)


class ReentrantDiT(public.DiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, c, use_reentrant=True)
        return self.unpatchify(self.final_layer(x, c))


class ReentrantBlock(public.DiTBlock):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, x, c, use_reentrant=True)


def test_reentrant_checkpointing_is_called_by_its_name() -> None:
    assert "checkpointing with use_reentrant=True" in reason(quietly(small(ReentrantDiT)), "")
    why = reason(quietly(with_block(ReentrantBlock)), "blocks.1")
    assert why.startswith("its gradients cannot be taken (RuntimeError: When use_reentrant=True")


class Branching(nn.Module):
    """An MLP that is a tree of modules, whose description takes several lines."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Sequential(nn.Linear(24, 48), nn.Linear(48, 48)), nn.Tanh())
        self.last = nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


MLPS = [
    (Branching, "it is Branching(Sequential, Linear); the op takes two linears with tanh-GELU between them"),
    (lambda: lightning.SwiGLU(24, 48), "it is SwiGLU(Linear, Linear), where w12 gives 96 channels and w3 takes 48; no op covers"),
    (lambda: nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24)), "1 is GELU(approximate='none'); the op computes"),
]


@pytest.mark.parametrize("mlp, why", MLPS, ids=["tree", "gated", "exact_gelu"])
def test_an_mlp_is_left_for_a_reason_of_one_line(mlp: Callable[[], nn.Module], why: str) -> None:
    model = small()
    model.blocks[1].mlp = mlp()
    report = quietly(model)
    assert why in reason(report, "blocks.1.mlp")
    assert "\n" not in reason(report, "blocks.1.mlp")


# ---- The MLP ---------------------------------------------------------------------------------------------------------


class OtherMlp(nn.Module):
    """Other names, and the activation in a module with its linear, as in diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Sequential(nn.Linear(24, 48), public.tanh_gelu()), nn.Dropout(0.0), nn.Linear(48, 24))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_an_mlp_of_other_names_is_fused() -> None:
    model = small()
    model.blocks[1].mlp = OtherMlp()
    randomised(model)
    plain = copy.deepcopy(model)
    assert not quietly(model).left
    assert_same(model, plain)


def relu_in_place_of_gelu(mlp: nn.Module) -> None:
    mlp.act = nn.ReLU()


def a_hook_on_gelu(mlp: nn.Module) -> None:
    mlp.act.register_forward_hook(lambda module, args, out: 2 * out)


def a_hook_on_dropout(mlp: nn.Module) -> None:
    mlp.drop1.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def a_hook_on_fc1(mlp: nn.Module) -> None:
    mlp.fc1.register_forward_hook(lambda module, args, out: 2 * out)


def a_hook_on_fc2(mlp: nn.Module) -> None:
    mlp.fc2.register_forward_hook(lambda module, args, out: 2 * out)


def a_hook_on_mlp(mlp: nn.Module) -> None:
    mlp.register_forward_hook(lambda module, args, out: 2 * out)


def another_fc1(mlp: nn.Module) -> None:
    mlp.fc1 = nn.Sequential(mlp.fc1, nn.Tanh())


def a_forward_of_fc2(mlp: nn.Module) -> None:
    weight = mlp.fc2.weight
    mlp.fc2.forward = lambda x: 2 * nn.functional.linear(x, weight)


CHANGES = [relu_in_place_of_gelu, a_hook_on_gelu, a_hook_on_dropout, a_hook_on_fc1]
CHANGES += [a_hook_on_fc2, a_hook_on_mlp, another_fc1, a_forward_of_fc2]


@pytest.mark.parametrize("change", CHANGES)
def test_a_fused_mlp_calls_what_somebody_changed(change: Callable[[nn.Module], None]) -> None:
    model = small()
    quietly(model)
    plain = small()
    assert_same(model, plain)
    untouched = plain(*call())
    for changed in (model, plain):
        change(changed.blocks[1].mlp)
    assert not torch.allclose(plain(*call()), untouched)
    assert_same(model, plain)
