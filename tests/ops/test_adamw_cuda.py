"""The CUDA kernels of adamw_ema, in the emulation: parity, traffic, order, offsets, and more weights than a launch takes."""

from __future__ import annotations

import pytest
import torch

from ditkernels import ops
from tests.helpers.backends import emulated  # noqa: F401 (each test runs on it)
from tests.ops.test_adamw_ema import (
    BF16,
    CASES,
    F16,
    F32,
    OPTIONS,
    REFUSED,
    TOUCHES,
    State,
    assert_equal,
    assert_parity,
    at_odd_addresses,
    check_case,
    check_first_and_late_steps,
    check_more_than_2_to_the_31_elements,
    check_refusal,
    check_skipped_step,
    make_state,
    updated,
)
from tools.kernel_proof import emulated_cuda


@pytest.mark.parametrize("case", [*CASES, {"gradient": BF16, "copied": F16}, {"gradient": F16, "copied": None}])
def test_parity(case: dict) -> None:
    check_case(case)


def test_first_and_late_steps() -> None:
    check_first_and_late_steps()


def test_a_skipped_step_moves_the_average_alone() -> None:
    check_skipped_step()


def test_without_averages_and_copies() -> None:
    state = make_state()
    bare = updated(ops.adamw_ema, {**state, "averages": [], "copies": []})
    assert_equal(bare, updated(ops.adamw_ema, state), "weights", "exp_avgs", "exp_avg_sqs", "steps")


@pytest.mark.parametrize("order", range(2))
def test_every_element_is_touched_once_in_any_order_of_blocks(order: int) -> None:
    state = make_state(BF16)
    straight = updated(ops.adamw_ema, state)
    numbers = {"grad_scale": torch.ones(()), "found_inf": torch.zeros(())}
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        with emulated_cuda.running(tracing=True, order=order) as emulation:
            assert_equal(updated(ops.adamw_ema, state, **numbers), straight)
            counts = emulation.counts()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, expected in TOUCHES.items():
        for index, tensor in enumerate(state[name]):
            kernel = "advance_steps" if name == "steps" else "update_chunks"
            found = counts.get((kernel, f"{name}[{index}]"), (0, 0, {}, {}))
            wanted = [{1: tensor.numel()} if times and tensor.numel() else {} for times in expected]
            assert list(found[2:]) == wanted, f"{name}[{index}]"


def launched(state: State) -> list[str]:
    """The kernels of a step by name, with their template arguments; of each launch two blocks run."""
    with emulated_cuda.running(sample=emulated_cuda.ends) as emulation:
        ops.adamw_ema(**state, **OPTIONS)
        return [kernel for kernel, *_ in emulation.sampled()]


def test_more_weights_than_a_launch_takes() -> None:
    """Each is updated as it would be alone, vectorised ones, others and empty ones in turn."""
    shapes = ((8,), (5,), (0,), (2, 12), (7,)) * 100
    state = make_state(shapes=shapes)
    together = updated(ops.adamw_ema, state)
    assert_parity(state)
    for index in range(0, len(shapes), 7):
        alone = updated(ops.adamw_ema, {name: [tensors[index]] for name, tensors in state.items()})
        assert_equal(alone, {name: [tensors[index]] for name, tensors in together.items()})
    vectorised = [kernel for kernel in launched(state) if kernel.endswith(", true>")]
    assert vectorised == ["update_chunks<float, BFloat16, true>"] * 5  # 300 of 8, 24 and no elements, 64 at a time
    others = [kernel for kernel in launched(state) if kernel.endswith(", false>")]
    assert others == ["update_chunks<Any, Any, false>"] * 4
    assert launched(state).count("advance_steps") == 2


@pytest.mark.parametrize(
    "gradient, copied, kernel",
    [(F32, None, "float, float"), (BF16, BF16, "BFloat16, BFloat16"), (F16, BF16, "Any, Any")],
)
def test_weights_that_are_aligned_go_by_vectorised_accesses(gradient: torch.dtype, copied: torch.dtype | None, kernel: str) -> None:
    """The emulation faults on an access that is not aligned."""
    assert launched(make_state(gradient, copied, ((16,),)))[1:] == [f"update_chunks<{kernel}, true>"]
    state = at_odd_addresses(make_state(gradient, copied, ((17,),)))
    assert launched(state)[1:] == ["update_chunks<Any, Any, false>"]


def test_more_than_2_to_the_31_elements() -> None:
    check_more_than_2_to_the_31_elements(emulated_cuda.running(last_block_only=True))


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_the_kernels_cannot_take_is_refused(change: object, words: str) -> None:
    check_refusal(change, words)


def test_without_weights_there_is_nothing_to_do() -> None:
    ops.adamw_ema([], [], [], [], [], lr=1e-3)
