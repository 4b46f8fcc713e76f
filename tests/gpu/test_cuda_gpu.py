"""The CUDA C++ kernels on a GPU: the cases of the Triton tests, on the cuda backend: ``pytest -m gpu tests/gpu``."""

from __future__ import annotations

import pytest
import torch

from ditkernels.ops import _native, dispatch, norm
from tests.gpu import test_adaln_gpu
from tests.gpu.test_adaln_gpu import (  # noqa: F401 (they run here on the fixture below)
    BF16,
    F32,
    TAKES,
    assert_parity,
    make_inputs,
    test_checkpointing_gives_equal_bits,
    test_compiles_as_one_graph_with_equal_bits,
    test_more_than_2_to_the_31_elements,
    test_parity_at_the_models_sizes,
    test_repeats_bit_for_bit,
    test_replays_from_a_cuda_graph,
)
from tests.gpu.test_model_gpu import (  # noqa: F401
    test_a_cuda_graph_replays_the_forward,
    test_activation_checkpointing_changes_no_gradient,
    test_rounds_no_worse_than_the_reference,
)
from tests.gpu.test_patches_gpu import (  # noqa: F401
    test_parity_of_final_layer,
    test_parity_of_patch_embed,
    test_values_moved_by_unpatchify,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not _native.architectures(), reason=_native.cuda_library()),
]


@pytest.fixture(autouse=True)
def _on_cuda():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with dispatch.use_backend("cuda"):
        yield


@pytest.mark.parametrize("shape", [(1, 1, 384), (3, 49, 100), (2, 17, 7), (5, 33, 2500), (2, 3, 4096)])
@pytest.mark.parametrize("op", TAKES)
def test_parity_at_awkward_sizes(op: str, shape: tuple[int, int, int]) -> None:
    assert_parity(op, make_inputs(op, *shape, F32, F32), "layernorm", F32)


@pytest.mark.parametrize("op", TAKES)
def test_channels_that_are_not_side_by_side(op: str) -> None:
    inputs = make_inputs(op, 2, 19, 2 * 384, BF16, BF16)
    assert_parity(op, {name: value[..., ::2] for name, value in inputs.items()}, "layernorm", BF16)


@pytest.mark.parametrize("op", TAKES)
def test_a_stream_beside_the_current_one(op: str) -> None:
    inputs = make_inputs(op, 8, 256, 1152, BF16, BF16)
    expected = test_adaln_gpu.there_and_back(getattr(norm, op), inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = test_adaln_gpu.there_and_back(getattr(norm, op), inputs)
    torch.cuda.current_stream().wait_stream(side)
    assert all(map(torch.equal, got, expected))


def test_the_device_tells_what_its_kernels_take() -> None:
    """What the compiler said of spills is what the driver says."""
    kernels = _native.kernel_attributes(torch.device("cuda"))
    assert len(kernels) > 100
    assert [k.name for k in kernels if k.local_bytes] == []
    assert all(k.registers > 0 and k.blocks > 0 for k in kernels)
