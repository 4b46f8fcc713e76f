"""adamw_ema: torch's fused AdamW and the moving average bit for bit, the formula in fp64, skipped steps, and torch citizenship."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ditkernels import ops, reference
from ditkernels.data.order import Batch
from ditkernels.ops import _native, dispatch
from ditkernels.training.config import TrainConfig
from ditkernels.training.ema import EMA
from ditkernels.training.optimizer import AdamWEMA, make_optimizer, optimizer_tensors
from ditkernels.training.trainer import Trainer
from tests import numerics
from tests.helpers.native_cpu import on_both_backends  # noqa: F401
from tests.helpers.subsets import WholeWay
from tests.training.test_trainer import make_trainer, same_bits, small_model

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
State = dict[str, list[Tensor]]

# Nothing, less than a block, a multiple of 8 and not, more than a chunk of 8,192 of either kind.
SHAPES = ((0, 3), (5, 7), (8,), (3, 1027), (16, 520), (3, 2733))
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "decay": 0.99}


def make_state(gradient: torch.dtype = F32, copied: torch.dtype | None = BF16, shapes: tuple = SHAPES, taken: int = 3) -> State:
    """Weights in fp32 with all that belongs to them; step counts differ from weight to weight."""
    generator = torch.Generator().manual_seed(0)

    def normals() -> list[Tensor]:
        return [torch.randn(shape, generator=generator) for shape in shapes]

    return {
        "weights": normals(),
        "gradients": [g.to(gradient) for g in normals()],
        "exp_avgs": normals(),
        "exp_avg_sqs": [v.square() for v in normals()],
        "steps": [torch.tensor(float(taken + index)) for index in range(len(shapes))],
        "averages": normals(),
        "copies": [] if copied is None else [c.to(copied) for c in normals()],
    }


def cloned(state: State, wide: bool = False) -> State:
    """Another copy of the state; ``wide``: with everything but the gradients' and copies' rounding in fp64."""
    convert = (lambda t: t.double()) if wide else (lambda t: t.clone())
    copies = {"copies": [c.clone() for c in state["copies"]], "steps": [s.clone() for s in state["steps"]]}
    return {name: copies.get(name) or [convert(t) for t in tensors] for name, tensors in state.items()}


def updated(function: object, state: State, wide: bool = False, **options: object) -> State:
    """What a step makes of a copy of the state; the gradients, which are left undefined, are taken out."""
    state = cloned(state, wide)
    function(**state, **{**OPTIONS, **options})
    return {name: tensors for name, tensors in state.items() if name != "gradients"}


def assert_parity(state: State, **options: object) -> None:
    exact = updated(reference.adamw_ema, state, wide=True, **options)
    low = updated(reference.adamw_ema, state, **options)
    for name, tensors in updated(ops.adamw_ema, state, **options).items():
        for index, tensor in enumerate(tensors):
            numerics.assert_contract(tensor, low[name][index], exact[name][index], f"{name}[{index}]")


def assert_equal(got: State, want: State, *names: str) -> None:
    for name in names or want:
        assert all(map(torch.equal, got[name], want[name])), f"{name} are not equal"


# Reads and writes of each tensor of a weight in a step.
TOUCHES = {
    "weights": (1, 1),
    "gradients": (1, 0),
    "exp_avgs": (1, 1),
    "exp_avg_sqs": (1, 1),
    "steps": (1, 1),
    "averages": (1, 1),
    "copies": (0, 1),
}

CASES = [
    {"gradient": F32, "copied": None},
    {"gradient": BF16, "copied": BF16},
    {"gradient": F16, "copied": F16, "grad_scale": torch.tensor(3.0)},
    {"gradient": F32, "copied": BF16, "grad_scale": torch.tensor(0.7), "found_inf": torch.tensor(0.0)},
    {"gradient": F32, "copied": BF16, "found_inf": torch.tensor(1.0)},
    {"gradient": F32, "copied": None, "betas": (0.0, 0.5), "eps": 0.1, "weight_decay": 0.0, "decay": 0.0},
]


def check_case(case: dict) -> None:
    options = {name: value for name, value in case.items() if name not in ("gradient", "copied")}
    assert_parity(make_state(case["gradient"], case["copied"]), **options)


@pytest.mark.parametrize("case", CASES)
def test_parity(case: dict) -> None:
    check_case(case)


def check_first_and_late_steps() -> None:
    """1 − β₂ᵗ is 0.001 at the first step, where fp32 would lose four digits of it, and 1 in the end."""
    for taken in (0, 1_000_000):
        state = make_state(shapes=((3, 40),), taken=taken)
        for moments in (state["exp_avgs"], state["exp_avg_sqs"]):
            moments[0].zero_()
        assert_parity(state, lr=1.0)


def test_the_processs_default_device_changes_nothing() -> None:
    state = make_state(shapes=((3, 41), (7,)))
    with torch.device("meta"):
        assert_parity(state)


def test_first_and_late_steps() -> None:
    check_first_and_late_steps()


def test_the_formula_in_fp64() -> None:
    state = cloned(make_state(copied=None), wide=True)
    got, want = updated(ops.adamw_ema, state), updated(reference.adamw_ema, state)
    for name, tensors in want.items():
        for actual, expected in zip(got[name], tensors):
            numerics.assert_fp64_agreement(actual, expected, name)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@dispatch.use_backend("torch")
def test_bit_for_bit_torchs_fused_adamw_and_then_the_moving_average(weight_decay: float) -> None:
    """Over steps with a divisor and with one that is skipped, whose gradient is not finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 33), nn.Linear(33, 5))
    average = EMA(model, 0.99)
    config = TrainConfig(data_path="digits", learning_rate=1e-2, weight_decay=weight_decay, weight_decay_on="all")
    oracle = make_optimizer(dict(model.named_parameters()), config)
    ours: State = {name: [] for name in ("weights", "exp_avgs", "exp_avg_sqs", "steps", "averages", "copies")}
    for weight in model.parameters():
        ours["weights"].append(weight.detach().clone())
        ours["averages"].append(weight.detach().clone())
        ours["exp_avgs"].append(torch.zeros_like(weight))
        ours["exp_avg_sqs"].append(torch.zeros_like(weight))
        ours["steps"].append(torch.zeros(()))
        ours["copies"].append(torch.empty_like(weight, dtype=BF16))
    for step in range(5):
        skipped = torch.tensor(float(step == 2))
        divisor = None if step == 3 else torch.tensor(1.5 + step)
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight)
            weight.grad[0] += math.nan if step == 2 else 0.0
        gradients = [weight.grad.clone() for weight in model.parameters()]
        oracle.grad_scale, oracle.found_inf = divisor, skipped
        oracle.step()
        average.update()
        ops.adamw_ema(
            gradients=gradients,
            **ours,
            **{"lr": 1e-2, "weight_decay": weight_decay, "decay": 0.99, "grad_scale": divisor},
            found_inf=skipped,
        )
        for index, (weight, mean) in enumerate(zip(model.parameters(), average.model.parameters())):
            found = oracle.state[weight]
            assert torch.equal(ours["weights"][index], weight), step
            assert torch.equal(ours["averages"][index], mean), step
            assert torch.equal(ours["exp_avgs"][index], found["exp_avg"]), step
            assert torch.equal(ours["exp_avg_sqs"][index], found["exp_avg_sq"]), step
            assert ours["steps"][index] == found["step"] == step + 1 - (step >= 2)
            assert torch.equal(ours["copies"][index], weight.to(BF16)), step


def trained(tmp_path: Path, name: str, **changes: object) -> Trainer:
    """A run's state after six steps, of which the third is skipped: its loss is not finite."""
    trainer = make_trainer(tmp_path / name, model=small_model(random=True), ema_decay=0.9, **changes)
    for step in range(6):
        images, labels, *_ = trainer.data.train[step]
        trainer.train_step(Batch(images * (math.nan if step == 2 else 1), labels), step, 1e-2)
    return trainer


@pytest.mark.parametrize("changes", [{}, {"grad_clip": 0.5, "weight_decay": 0.1, "accumulation": 2}])
@dispatch.use_backend("torch")
def test_a_run_with_the_fused_optimizer_is_that_with_torchs_bit_for_bit(tmp_path: Path, changes: dict) -> None:
    ours, torchs = (trained(tmp_path, name, optimizer=name, **changes) for name in ("fused", "torch"))
    assert isinstance(ours.optimizer, AdamWEMA)
    assert same_bits(ours.model, torchs.model)
    assert same_bits(ours.ema.model, torchs.ema.model)
    assert not same_bits(ours.ema.model, ours.model)
    found, want = (optimizer_tensors(run.optimizer, run.model) for run in (ours, torchs))
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
    ours.optimizer.load_state_dict(torchs.optimizer.state_dict())


def test_weights_without_a_gradient_stay_and_their_averages_move() -> None:
    model = nn.Linear(4, 3)
    average = EMA(model, 0.5)
    optimizer = AdamWEMA(model.parameters(), average, lr=0.1, weight_decay=0.0)
    with torch.no_grad():
        model.weight.add_(1.0)
    before = copy.deepcopy(model)
    model.bias.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(model.weight, before.weight)
    assert not torch.equal(model.bias, before.bias)
    torch.testing.assert_close(average.model.weight, before.weight - 0.5)
    torch.testing.assert_close(average.model.bias, (model.bias + before.bias) / 2)


def check_skipped_step(shapes: tuple = SHAPES) -> None:
    state = make_state(shapes=shapes)
    # Exact in bf16: the interpreter of the Triton kernels cuts off where a GPU rounds.
    state["weights"] = [w.to(BF16).float() for w in state["weights"]]
    state["copies"] = [w.to(BF16) for w in state["weights"]]
    for g in state["gradients"]:
        g.fill_(math.inf)
    got = updated(ops.adamw_ema, state, found_inf=torch.tensor(1.0))
    assert_equal(got, state, "weights", "exp_avgs", "exp_avg_sqs", "steps", "copies")
    for average, before, weight in zip(got["averages"], state["averages"], state["weights"]):
        numerics.assert_contract(average, before.lerp(weight, 1 - 0.99), before.double().lerp(weight.double(), 1 - 0.99))
        assert average.numel() == 0 or not torch.equal(average, before)


def test_a_skipped_step_moves_the_average_alone() -> None:
    check_skipped_step()


def check_more_than_2_to_the_31_elements(last_program_alone: AbstractContextManager[object]) -> None:
    """Of the memory of a weight of 8 GB only its end is ever used."""
    count = (1 << 31) + 24

    def far(value: float, dtype: torch.dtype = F32) -> list[Tensor]:
        tensor = torch.empty(count, dtype=dtype)
        tensor[-16:] = value
        return [tensor]

    state = {
        **{"weights": far(1.0), "gradients": far(2.0), "exp_avgs": far(0.5), "exp_avg_sqs": far(4.0)},
        **{"steps": [torch.zeros(())], "averages": far(0.0), "copies": far(0.0, BF16)},
    }
    near = {name: [(t[-16:] if t.dim() else t).clone() for t in tensors] for name, tensors in state.items()}
    ops.adamw_ema(**near, **OPTIONS)
    with last_program_alone:
        ops.adamw_ema(**state, **OPTIONS)
    for name in ("weights", "exp_avgs", "exp_avg_sqs", "averages", "copies"):
        assert torch.equal(state[name][0][-16:], near[name][0]), name


def at_odd_addresses(state: State) -> State:
    """Views that begin one element later: none of them at a multiple of 16 bytes."""
    return {name: [t.flatten()[1:] if t.dim() else t for t in tensors] for name, tensors in state.items()}


REFUSED = [
    (lambda s: {n: [t.double() for t in ts] for n, ts in s.items()}, "torch.float64 is not among"),
    (
        lambda s: {**s, "gradients": [g.t().contiguous().t() for g in s["gradients"]]},
        r"gradients\[0\] is not contiguous",
    ),
]


def check_refusal(change: object, words: str) -> None:
    """The forced backend says why it cannot; left to itself the op finds another."""
    state = make_state(shapes=((3, 4),))
    state = change(state) | {"steps": state["steps"], "copies": state["copies"]}
    with pytest.raises(dispatch.BackendError, match=words):
        ops.adamw_ema(**state, **OPTIONS)
    with dispatch.use_backend("auto"):
        ops.adamw_ema(**cloned(state), **OPTIONS)


def test_without_averages_and_copies() -> None:
    state = make_state()
    bare = updated(ops.adamw_ema, {**state, "averages": [], "copies": []})
    assert_equal(bare, updated(ops.adamw_ema, state), "weights", "exp_avgs", "exp_avg_sqs", "steps")


@pytest.mark.parametrize("backend", [*dispatch.BACKENDS, "auto"])
def test_without_weights_there_is_nothing_to_do(backend: str) -> None:
    with dispatch.use_backend(backend):
        ops.adamw_ema([], [], [], [], [], lr=1e-3)
        with pytest.raises(ValueError, match="gradients: got 1 tensors, expected one for each of 0 weights"):
            ops.adamw_ema([], [torch.zeros(2)], [], [], [], lr=1e-3)


def test_repeats_bit_for_bit() -> None:
    state = make_state(BF16)
    assert_equal(updated(ops.adamw_ema, state), updated(ops.adamw_ema, state))


def test_opcheck() -> None:
    state = make_state(shapes=((2, 3), (5,)))
    numbers = (torch.tensor(2.0), torch.tensor(0.0), 1e-3, 0.9, 0.999, 1e-8, 0.1, 0.99)
    torch.library.opcheck(dispatch.OPS["adamw_ema"].call, (*state.values(), *numbers))


def test_through_torchs_dispatcher_the_bits_are_the_same_and_a_profile_shows_the_backend() -> None:
    state = make_state()
    want = updated(ops.adamw_ema, state)
    numbers = (None, None, 1e-2, 0.9, 0.999, 1e-8, 0.1, 0.99)
    chosen = dispatch.OPS["adamw_ema"].choose(*state.values(), *numbers, forced=dispatch.backend_setting())
    with WholeWay():
        assert_equal(updated(ops.adamw_ema, state), want)
    with torch.profiler.profile() as profile:
        assert_equal(updated(ops.adamw_ema, state), want)
    assert f"ditkernels::adamw_ema_{chosen}" in {event.name for event in profile.events()}


def test_compiles_as_one_graph() -> None:
    state = make_state(shapes=((2, 3), (5,)))
    compiled = torch.compile(ops.adamw_ema, fullgraph=True, backend="aot_eager")
    assert_equal(updated(compiled, state), updated(ops.adamw_ema, state))


def test_weights_that_want_gradients_are_updated_and_keep_wanting_them() -> None:
    state = make_state(shapes=((2, 3),))
    want = updated(ops.adamw_ema, state)
    weight = nn.Parameter(state["weights"][0].clone())
    ops.adamw_ema(**{**copy.deepcopy(state), "weights": [weight]}, **OPTIONS)
    assert torch.equal(weight.detach(), want["weights"][0])
    assert weight.requires_grad
    assert weight.is_leaf


@pytest.mark.parametrize("kind", ["weights", "copies"])
def test_a_graph_that_saved_a_weight_notices_its_update(kind: str) -> None:
    state = make_state(shapes=((2, 3),))
    state[kind] = [nn.Parameter(state[kind][0])]
    x = torch.randn(4, 3, dtype=state[kind][0].dtype, requires_grad=True)
    loss = nn.functional.linear(x, state[kind][0]).sum()
    ops.adamw_ema(**state, **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"gradients": []}, ValueError, "gradients: got 0 tensors, expected one for each of 2 weights"),
        (
            {"exp_avgs": [torch.zeros(2, 3), torch.zeros(4)]},
            ValueError,
            r"exp_avgs\[1\]: got shape \(4,\), expected \(5\)",
        ),
        (
            {"exp_avg_sqs": [torch.zeros(2, 3, dtype=BF16), torch.zeros(5, dtype=BF16)]},
            TypeError,
            r"exp_avg_sqs\[0\]: got dtype torch.bfloat16, allowed is one of torch.float32",
        ),
        (
            {"gradients": [torch.zeros(2, 3), torch.zeros(5, dtype=BF16)]},
            TypeError,
            r"gradients\[1\]: got dtype torch.bfloat16",
        ),
        (
            {"averages": [torch.zeros(2, 3), torch.zeros(5, device="meta")]},
            ValueError,
            r"averages\[1\]: got device meta",
        ),
        ({"copies": [torch.zeros(2, 3), torch.zeros(5)]}, TypeError, r"copies\[0\]: got dtype torch.float32"),
        (
            {"steps": [torch.zeros(()), torch.zeros((), dtype=torch.int64)]},
            ValueError,
            r"steps\[1\]: got shape \(\)",
        ),
        ({"steps": []}, ValueError, "steps: got 0 tensors, expected one"),
        ({"found_inf": torch.zeros(2)}, ValueError, r"found_inf: got shape \(2,\) of torch.float32"),
        ({"grad_scale": torch.zeros((), device="meta")}, ValueError, "grad_scale: got device meta"),
        ({"lr": -1.0}, ValueError, "lr: got -1.0, allowed is 0 or more"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]: got 1.0, allowed is 0 up to"),
        ({"decay": 1.5}, ValueError, "decay: got 1.5, allowed is 0..1"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type, words: str) -> None:
    state = make_state(shapes=((2, 3), (5,)))
    for way in (nullcontext(), WholeWay()):
        with way, pytest.raises(error, match=words):
            ops.adamw_ema(**{**state, **OPTIONS, **change})


def test_a_forced_backend_that_cannot_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native.CUDA, "absence", "the library is on holiday")
    with (
        dispatch.use_backend("cuda"),
        pytest.raises(dispatch.BackendError, match="cuda: the library is on holiday"),
    ):
        ops.adamw_ema(**make_state(shapes=((2, 3),)), **OPTIONS)
