"""mlp's products with GELU as an epilogue, in the emulation of cuBLASLt: parity, what is asked of it, refusals, the whole model."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ditkernels import ops, reference
from ditkernels.ops import dispatch
from ditkernels.ops.mlp import serves
from tests import numerics
from tests.ops.test_mlp import BF16, COVERING, F16, F32, LAYOUTS, UNEVEN, assert_parity, check_repeats, make_inputs, run
from tests.test_models import SMALL, forward_backward, pair
from tools.kernel_proof import emulated_cuda
from tools.tree import found_from


@pytest.fixture(autouse=True)
def emulation() -> Iterator[ModuleType]:
    with emulated_cuda.running() as module:
        yield module
        assert module.descriptors() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", COVERING, ids=str)
def test_parity(case: tuple, layout: str) -> None:
    assert_parity(make_inputs(*case, layout=layout))


def test_repeats_bit_for_bit_and_writes_every_output() -> None:
    check_repeats()


def test_a_forward_and_a_backward_may_run_on_different_backends() -> None:
    inputs = make_inputs((2, 17, 96, 384, 96), BF16)
    leaves = [v.requires_grad_() for v in inputs.values()]
    dy = torch.randn(2, 17, 96, generator=torch.Generator().manual_seed(7)).to(BF16)
    low, exact = run(reference.mlp, inputs), run(reference.mlp, inputs, wide=True)
    for one, other in (("torch", "cuda"), ("cuda", "torch")):
        with dispatch.use_backend(one):
            y = ops.mlp(*leaves)
        with dispatch.use_backend(other):
            got = torch.autograd.grad(y, leaves, dy)
        for actual, plain, wide in zip(got, low[1:], exact[1:], strict=True):
            numerics.assert_contract(actual, plain, wide)


def test_without_rows_there_is_no_product_and_the_gradients_are_zero() -> None:
    _, dx, *gradients = run(ops.mlp, make_inputs((2, 0, 16, 32, 8), BF16))
    assert dx.shape == (2, 0, 16)
    assert all(g.count_nonzero() == 0 for g in gradients)


def test_without_gradients_nothing_is_written_but_the_output() -> None:
    inputs = make_inputs((2, 5, 16, 32, 8), BF16)
    want = run(ops.mlp, inputs)[0]
    with torch.no_grad():
        assert torch.equal(ops.mlp(**inputs), want)
    for bias in (inputs["fc1_bias"], None):
        kept, z = torch.ops.ditkernels.linear_gelu_cuda(inputs["x"][0], inputs["fc1_weight"], bias, True)
        bare, nothing = torch.ops.ditkernels.linear_gelu_cuda(inputs["x"][0], inputs["fc1_weight"], bias, False)
        assert torch.equal(bare, kept)
        assert (z.shape, nothing.shape) == ((5, 32), (0,))


def test_an_algorithm_chosen_for_aligned_tensors_does_not_serve_others() -> None:
    """The emulation holds the choice to the alignments it was made for."""
    inputs = make_inputs((2, 5, 16, 32, 8), BF16)
    want = run(ops.mlp, inputs)
    weight = inputs["fc1_weight"]
    moved = torch.empty(weight.numel() + 8, dtype=BF16)[8:].view_as(weight).copy_(weight)
    assert moved.data_ptr() % 32 != weight.data_ptr() % 32
    assert all(map(torch.equal, run(ops.mlp, {**inputs, "fc1_weight": moved}), want))


@pytest.mark.parametrize(
    "shape, dtype, words",
    [
        ((2, 3, 8, 16, 8), F32, "torch.float32 is not among the products' dtypes"),
        ((2, 3, 12, 16, 8), BF16, "D is 12; the products need a multiple of 8"),
        ((2, 3, 8, 20, 8), BF16, "F is 20; the products need"),
        ((2, 3, 8, 16, 9), F16, "E is 9; the products need"),
    ],
)
def test_what_the_epilogues_cannot_take_is_refused(shape: tuple, dtype: torch.dtype, words: str) -> None:
    with pytest.raises(dispatch.BackendError, match=words):
        ops.mlp(**make_inputs(shape, dtype))


EPILOGUES = {
    "GELU": 32,
    "GELU_BIAS": 36,
    "GELU_AUX": 160,
    "GELU_AUX_BIAS": 164,
    "DGELU": 192,
    "DGELU_BGRAD": 208,
}
LENGTHS = itertools.count(1001)


def check_a_lack_of_algorithms(emulation: ModuleType, epilogue: int, as_status: bool) -> None:
    """The whole op is refused, before anything runs; answers are remembered, so that each case has sizes of its own."""
    rows = next(LENGTHS)
    inputs = make_inputs((1, rows, 8, 16, 24), BF16)
    product = f"{rows} x 24 times 24 x 16" if epilogue > 164 else f"{rows} x 8 times 8 x 16"
    emulation.lack_algorithms(epilogue, as_status)
    try:
        said = ""
        try:
            ops.mlp(**inputs)
        except dispatch.BackendError as error:
            said = str(error)
        assert f"cuda: cuBLASLt has no algorithm for {product} with the epilogue of" in said, "not refused"
        with dispatch.use_backend("auto"):
            ops.mlp(**inputs)
    finally:
        emulation.lack_algorithms(0, False)


@pytest.mark.parametrize("as_status", [False, True])
@pytest.mark.parametrize("epilogue", EPILOGUES.values(), ids=EPILOGUES)
def test_sizes_without_an_algorithm_are_refused(emulation: ModuleType, epilogue: int, as_status: bool) -> None:
    check_a_lack_of_algorithms(emulation, epilogue, as_status)


def test_a_half_called_all_the_same_says_so(emulation: ModuleType) -> None:
    emulation.lack_algorithms(EPILOGUES["GELU"], False)
    try:
        with pytest.raises(RuntimeError, match=r"has no algorithm for 999 x 8 times 8 x 16 .* of linear_gelu"):
            torch.ops.ditkernels.linear_gelu_cuda(torch.zeros(999, 8, dtype=BF16), torch.zeros(16, 8, dtype=BF16), None, False)
    finally:
        emulation.lack_algorithms(0, False)


def test_an_operand_that_begins_anywhere_is_copied() -> None:
    """No algorithm is asked for at less than 16 bytes, so that what was found for 16 serves all."""
    inputs = make_inputs((2, 5, 16, 32, 8), BF16)
    want = run(ops.mlp, inputs)
    for name in ("x", "fc1_weight", "fc2_weight"):
        value = inputs[name]
        moved = torch.empty(value.numel() + 8, dtype=BF16)[1:][: value.numel()].view_as(value).copy_(value)
        assert moved.data_ptr() % 16
        assert all(map(torch.equal, run(ops.mlp, {**inputs, name: moved}), want))


@pytest.mark.parametrize("case", UNEVEN, ids=str)
def test_what_is_refused_runs_unforced(case: tuple) -> None:
    with dispatch.use_backend("auto"):
        assert_parity(make_inputs(*case))


def test_a_missing_library_is_a_reason() -> None:
    reason = mock.Mock(return_value="libcublasLt.so.13 is not to be found")
    inputs = make_inputs((2, 3, 8, 16, 8), BF16)
    with mock.patch.object(torch.ops.ditkernels, "cuda_blas", reason):
        with pytest.raises(dispatch.BackendError, match=r"cuda: libcublasLt.so.13 is not to be found"):
            ops.mlp(**inputs)
        assert not serves(torch.device("cpu"), BF16, 8, 16, 8)


# In a process of its own: a handle, once made, is kept.
FIRST_CALLS = """
import torch
from ditkernels import ops
from tools.kernel_proof import emulated_cuda

inputs = [torch.ones(size, dtype=torch.bfloat16) for size in ((1, 2, 8), (16, 8), (16,), (8, 16))]
with emulated_cuda.running() as emulation:
    for full in (True, True, False):
        emulation.fill_memory(full)
        try:
            print(tuple(ops.mlp(*inputs).shape))
        except RuntimeError as error:
            print("cublasLtCreate: the resource allocation failed" in str(error))
"""


def test_a_handle_that_could_not_be_made_is_made_once_there_is_memory() -> None:
    command = [sys.executable, "-c", FIRST_CALLS]
    done = subprocess.run(command, env=found_from(os.environ), capture_output=True, text=True)
    assert done.stdout.split("\n") == ["True", "True", "(1, 2, 8)", ""], done.stderr


# ---- In the model ----------------------------------------------------------------------------------------------------


class _Ran(TorchDispatchMode):
    """Names of the package's ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ditkernels":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def step(model: reference.DiT, dtype: torch.dtype = BF16) -> list[str]:
    with _Ran() as ran:
        forward_backward(model, dtype)
    return ran.names


def test_a_model_in_bf16_has_its_mlps_as_one_op() -> None:
    """Its results are held to the reference's in test_model_cuda.py."""
    fused, _ = pair(BF16, **SMALL)
    ran = step(fused)
    assert ran.count("mlp") == ran.count("mlp_backward") == len(fused.blocks)
    assert not [name for name in ran if name.startswith("bias_gelu")]


def test_under_autocast_too() -> None:
    fused, _ = pair(**SMALL)
    with torch.autocast("cpu", dtype=BF16):
        assert step(fused, F32).count("mlp") == len(fused.blocks)


def test_where_the_parts_one_by_one_are_better_they_are_kept() -> None:
    """Unmeasured, in fp32, where a linear is watched, and under selective checkpointing, which keeps products alone."""
    fused, _ = pair(BF16, **SMALL)
    with dispatch.use_backend("auto"):
        assert "mlp" not in step(fused)
    with dispatch.use_backend("auto"), mock.patch.dict(serves.__globals__, fastest=lambda *_: "cuda"):
        assert serves(torch.device("cpu"), BF16, 8, 16, 8)
    fused.checkpointing = "selective"
    assert "mlp" not in step(fused)
    fused.checkpointing = "none"
    fused.blocks[0].mlp.fc2.register_forward_hook(lambda *_: None)
    assert step(fused).count("mlp") == len(fused.blocks) - 1
    assert "mlp" not in step(pair(**SMALL)[0], F32)


def test_a_block_compiles_as_one_graph() -> None:
    fused, _ = pair(BF16, **SMALL)
    want = forward_backward(fused, BF16)
    for block in fused.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for name, value in forward_backward(fused, BF16).items():
        assert torch.equal(value, want[name]), name
