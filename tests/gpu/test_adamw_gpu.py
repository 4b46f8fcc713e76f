"""adamw_ema's compiled kernels on a GPU: ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ditkernels import ops, reference
from ditkernels.ops import dispatch
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.ops.test_adamw_ema import BF16, CASES, F32, SHAPES, State, assert_equal, make_state, updated
from tests.ops.test_adamw_ema import assert_parity as assert_parity_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
XL_SHAPES = (*SHAPES, (6 * 1152, 1152), (1152,), (4608, 1152), (1001, 1152), (32, 1152))


def on_device(state: State) -> State:
    return {name: [tensor.to(DEVICE) for tensor in tensors] for name, tensors in state.items()}


def options_of(case: dict) -> dict:
    named = {name: value for name, value in case.items() if name not in ("gradient", "copied")}
    return {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in named.items()}


@pytest.mark.parametrize("case", CASES)
def test_parity_at_the_models_sizes(case: dict) -> None:
    state = on_device(make_state(case["gradient"], case["copied"], shapes=XL_SHAPES))
    assert_parity_of(state, **options_of(case))


@pytest.mark.parametrize("taken", [0, 1_000_000])
def test_first_and_late_steps(taken: int) -> None:
    state = on_device(make_state(shapes=((3, 40),), taken=taken))
    for moments in (state["exp_avgs"], state["exp_avg_sqs"]):
        moments[0].zero_()
    assert_parity_of(state, lr=1.0)


def test_a_skipped_step_changes_the_averages_alone() -> None:
    state = on_device(make_state(shapes=XL_SHAPES))
    state["copies"] = [weight.to(BF16) for weight in state["weights"]]
    for gradient in state["gradients"]:
        gradient.fill_(torch.nan)
    got = updated(ops.adamw_ema, state, found_inf=torch.ones((), device=DEVICE))
    assert_equal(got, state, "weights", "exp_avgs", "exp_avg_sqs", "steps", "copies")
    assert not torch.equal(got["averages"][-1], state["averages"][-1])


def test_repeats_bit_for_bit() -> None:
    state = on_device(make_state(BF16, shapes=XL_SHAPES))
    first = updated(ops.adamw_ema, state)
    for _ in range(5):
        assert_equal(updated(ops.adamw_ema, state), first)


def test_nothing_waits_for_the_device() -> None:
    state = on_device(make_state(shapes=XL_SHAPES))
    numbers = {name: torch.zeros((), device=DEVICE) + 1 for name in ("grad_scale", "found_inf")}
    ops.adamw_ema(**state, lr=1e-3, **numbers)  # compiles, and keeps whose chunk is whose
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.adamw_ema(**state, lr=1e-3, **numbers)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_auto_chooses_triton_and_a_graph_that_is_captured_torch() -> None:
    state = on_device(make_state(F32, None, shapes=((16, 520),)))
    arguments = (*state.values(), None, None, 1e-3, 0.9, 0.999, 1e-8, 0.0, 0.99)
    op = dispatch.OPS["adamw_ema"]
    with dispatch.use_backend("auto"):
        assert op.choose(*arguments) == "triton"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            assert op.choose(*arguments) == "torch"  # cuda could, and is not chosen unasked
            torch.zeros((), device=DEVICE)


def test_more_than_2_to_the_31_elements() -> None:
    count = (1 << 31) + 24
    state = {
        name: [torch.full((count,), value, device=DEVICE)]
        for name, value in (("weights", 1.0), ("gradients", 2.0), ("exp_avgs", 0.5), ("exp_avg_sqs", 4.0))
    }
    small = {name: [tensors[0][-16:].clone()] for name, tensors in state.items()}
    for chosen in (state, small):
        ops.adamw_ema(**chosen, steps=[torch.zeros((), device=DEVICE)], lr=1e-2)
    assert_equal({name: [tensors[0][-16:]] for name, tensors in state.items()}, small, "weights", "exp_avg_sqs")


def test_training_with_it_is_training() -> None:
    """Ten steps on a quadratic: the loss falls as it does with plain PyTorch."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, device=DEVICE)
    x = torch.randn(32, 64, device=DEVICE)
    losses = {}
    for name, function in (("ours", ops.adamw_ema), ("plain", reference.adamw_ema)):
        weights = [nn.Parameter(p.detach().clone()) for p in layer.parameters()]
        state = {kind: [torch.zeros_like(w) for w in weights] for kind in ("exp_avgs", "exp_avg_sqs")}
        steps = [torch.zeros((), device=DEVICE) for _ in weights]
        for _ in range(10):
            loss = (x @ weights[0].t() + weights[1] - x).square().mean()
            gradients = list(torch.autograd.grad(loss, weights))
            function(weights, gradients, **state, steps=steps, lr=1e-2)
        losses[name] = loss.item()
    assert losses["ours"] == pytest.approx(losses["plain"], rel=1e-4)
