"""adamw_ema on the triton backend, interpreted: parity, what the kernels touch, far offsets, and planted faults that are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ditkernels import ops
from ditkernels.ops.optimizer import triton as kernels
from tests.helpers.backends import on_triton  # noqa: F401 (each test runs on it)
from tests.helpers.faults import assert_found
from tests.ops.test_adamw_ema import (
    BF16,
    CASES,
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
from tools.kernel_proof.interpreted import Launch, in_place, reordered, shuffled, traced

# The interpreter computes with NumPy, which warns of what a skipped step throws away.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")


@pytest.mark.parametrize("case", CASES)
def test_parity(case: dict) -> None:
    check_case(case)


def test_first_and_late_steps() -> None:
    check_first_and_late_steps()


def test_a_skipped_step_moves_the_average_alone() -> None:
    check_skipped_step()


def touched(state: State) -> list[Launch]:
    """The launches of a step, with the state's tensors, which the kernels reach by their addresses, among the arguments."""
    with traced() as launches:
        ops.adamw_ema(**state, **OPTIONS, found_inf=torch.zeros(()), grad_scale=torch.ones(()))
    for launch in launches:
        for name, tensors in state.items():
            launch.arguments |= {f"{name}[{index}]": tensor for index, tensor in enumerate(tensors)}
    return launches


def test_every_tensor_is_touched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", 2 * kernels.BLOCK)
    state = make_state(shapes=((0, 3), (5, 7), (8,), (16, 130), (3, 701)))
    launches = touched(state)
    assert [launch.kernel for launch in launches] == ["advance_steps", "update_chunks"] * 2
    for name, expected in TOUCHES.items():
        for index in range(len(state[name])):
            for times, store in zip(expected, (False, True)):
                counts = sum(launch.counts(f"{name}[{index}]", store=store) for launch in launches)
                assert (counts == times).all(), f"{name}[{index}] is touched {counts.unique().tolist()} times"
    for launch in launches:
        assert launch.strays() == 0, launch.kernel
        assert not launch.writers_clash(), launch.kernel
        assert not launch.crosstalk(), launch.kernel
    assert [launch.programs for launch in launches] == [1, 3, 1, 3]


def test_any_order_of_programs_gives_equal_bits_and_nothing_is_left_unwritten() -> None:
    state = make_state(BF16)
    straight = updated(ops.adamw_ema, state)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        with reordered(shuffled(0)):
            assert_equal(updated(ops.adamw_ema, state), straight)
    finally:
        torch.use_deterministic_algorithms(False)


def test_views_that_begin_at_odd_addresses() -> None:
    """16-byte accesses would fault on a GPU; the interpreter shows that such weights go to the other launch."""
    for state, vectorised in (
        (at_odd_addresses(make_state(shapes=((17,),))), False),
        (make_state(shapes=((16,),)), True),
    ):
        with traced() as launches:
            ops.adamw_ema(**state, **OPTIONS)
        assert [launch.arguments["VECTORISED"] for launch in launches if launch.kernel == "update_chunks"] == [vectorised]


def test_more_than_2_to_the_31_elements() -> None:
    with in_place():
        check_more_than_2_to_the_31_elements(reordered(lambda programs: [programs - 1]))


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_the_kernels_cannot_take_is_refused(change: object, words: str) -> None:
    check_refusal(change, words)


MUTANTS = {
    "beta1 and beta2 swapped": (
        "*(1 - lr * weight_decay, 1 - beta1, beta2",
        "*(1 - lr * weight_decay, 1 - beta2, beta1",
    ),
    "decay in place of its complement": ("eps, 1 - decay)", "eps, decay)"),
    "no weight decay": ("new_w = shrink * w -", "new_w = w -"),
    "gradient not divided": ("g = tl.div_rn(g, scale)", "g = g"),
    "eps inside the root": (
        "tl.div_rn(tl.sqrt_rn(new_v), root) + eps",
        "tl.div_rn(tl.sqrt_rn(new_v + eps), root)",
    ),
    "old moment used": ("step_size * tl.div_rn(new_m,", "step_size * tl.div_rn(m,"),
    "average of the old weight": ("towards * (new_w - a)", "towards * (w - a)"),
    "copy of the old weight": ("copy + at, new_w.to", "copy + at, w.to"),
    "steps counted from 0": ("t = (before + 1.0)", "t = before"),
    "a skipped step counted": ("(tl.load(found_inf) != 0).to(tl.float32)", "0.0"),
    "weight changed by a skipped step": ("tl.where(skipped, w, new_w)", "new_w"),
    "moment changed by a skipped step": ("tl.where(skipped, v, new_v)", "new_v"),
    "average left by a skipped step": (
        "a + towards * (new_w - a)",
        "tl.where(skipped, a, a + towards * (new_w - a)) if skipped is not None else a + towards * (new_w - a)",
    ),
    "corrections in fp32": ("t = (before + 1.0).to(tl.float64)", "t = before + 1.0"),
    "factors of another weight": ("tl.load(factors + owner * 2)", "tl.load(factors)"),
    "every chunk is the first": ("first = (program - tl.load(row + 8)) * CHUNK", "first = program * 0"),
    "the mask runs over the chunk": ("inside = at < size", "inside = at < size - 1"),
}


def check() -> None:
    """A weight of one chunk and one of two, no two numbers alike, and a step that is skipped."""
    state = make_state(shapes=((3, 7), (3, 2733)))
    assert_parity(state, grad_scale=torch.tensor(0.7), found_inf=torch.tensor(0.0), eps=0.1)
    check_first_and_late_steps()
    check_skipped_step(shapes=((3, 7),))


def test_the_kernels_as_they_are_pass() -> None:
    check()


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_faults_are_found(name: str, tmp_path: Path) -> None:
    assert_found(kernels, MUTANTS[name], check, tmp_path)
