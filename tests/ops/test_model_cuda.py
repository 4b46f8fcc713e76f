"""The whole model on the CUDA kernels, in the emulation: four conditionings, every gradient, and twenty steps of training."""

from __future__ import annotations

from tests.helpers.backends import emulated  # noqa: F401 (each test runs on it)
from tests.ops.triton_proof.model_parity import test_twenty_training_steps_stay_with_the_reference  # noqa: F401 (runs here on the fixture below)
from tests.test_models import (  # noqa: F401
    SMALL,
    forward_backward,
    pair,
    test_autocast_keeps_the_stream_in_fp32,
    test_rounds_no_worse_than_the_reference,
)
from tools.kernel_proof import emulated_cuda


def test_every_kernel_of_the_model_is_ours() -> None:
    fused, _ = pair(**SMALL)
    with emulated_cuda.running() as emulation:
        forward_backward(fused)
        ran = {kernel for kernel, _ in emulation.counts()}
    image = {"embed", "final_rows", "gather_values", "place_values"}
    norm = {"forward_rows", "backward_rows", "add_chunks", "add_samples"}
    assert ran == image | norm | {"forward_tiles", "backward_tiles", "stack_rows", "add_groups"}
