"""adamw_ema's CUDA C++ kernels on a GPU: the cases of the Triton tests, and a CUDA graph: ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

import pytest
import torch

from ditkernels import ops
from ditkernels.ops import _native
from tests.gpu.test_adamw_gpu import (  # noqa: F401 (they run here on the fixture below)
    XL_SHAPES,
    on_device,
    test_a_skipped_step_changes_the_averages_alone,
    test_first_and_late_steps,
    test_more_than_2_to_the_31_elements,
    test_nothing_waits_for_the_device,
    test_parity_at_the_models_sizes,
    test_repeats_bit_for_bit,
    test_training_with_it_is_training,
)
from tests.helpers.backends import on_cuda  # noqa: F401 (each test runs on it)
from tests.ops.test_adamw_ema import BF16, OPTIONS, assert_equal, cloned, make_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not _native.architectures(), reason=_native.cuda_library()),
]

MORE_THAN_A_LAUNCH = (*XL_SHAPES, *((8,), (7,)) * 250)


def test_a_graph_replays_the_step() -> None:
    """On other gradients, another divisor, and a step that is skipped: all that is read when the graph is replayed."""
    state = on_device(make_state(BF16, shapes=MORE_THAN_A_LAUNCH))
    twin = cloned(state)
    numbers = {"grad_scale": torch.ones((), device="cuda"), "found_inf": torch.zeros((), device="cuda")}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.adamw_ema(**state, **OPTIONS, **numbers)
    for step in range(3):
        for gradient, other in zip(state["gradients"], twin["gradients"]):
            other.copy_(gradient.normal_())
        numbers["grad_scale"].fill_(1.5 + step)
        numbers["found_inf"].fill_(step == 1)
        graph.replay()
        ops.adamw_ema(**twin, **OPTIONS, **numbers)
        assert_equal(state, twin)


def test_a_stream_beside_the_current_one() -> None:
    state = on_device(make_state(BF16, shapes=XL_SHAPES))
    twin = cloned(state)
    ops.adamw_ema(**twin, **OPTIONS)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.adamw_ema(**state, **OPTIONS)
    torch.cuda.current_stream().wait_stream(side)
    assert_equal(state, twin)
