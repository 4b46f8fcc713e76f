"""torch.onnx.export of our DiT, of an accelerated one and of single ops: what onnxruntime makes of it, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditkernels import models, ops, reference
from tests import numerics
from tests.test_torch_tools import MODELS, TINY, batch, oracles, randomised, widened

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

Inputs = tuple[Tensor, ...]
BATCH = 3


def any_batch(inputs: Inputs) -> tuple[dict[int, Any] | None, ...]:
    return tuple({0: torch.export.Dim.DYNAMIC} if len(value) == BATCH else None for value in inputs)


def straight(model: nn.Module, inputs: Inputs) -> Any:
    return torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=any_batch(inputs), verbose=False)


def decomposed(model: nn.Module, inputs: Inputs) -> Any:
    exported = torch.export.export(model, inputs, dynamic_shapes=any_batch(inputs))
    return torch.onnx.export(exported.run_decompositions(ops.decompositions()), verbose=False)


Export = Callable[[nn.Module, Inputs], Any]
BOTH = pytest.mark.parametrize("export", [straight, decomposed])


def ran(program: Any) -> Callable[[Inputs], Sequence[Tensor]]:
    """Runs an exported program, which holds no op of ours."""
    assert not [node for node in program.model.graph if "ditkernels" in node.domain]
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(inputs: Inputs) -> Sequence[Tensor]:
        outputs = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        return [torch.from_numpy(output) for output in outputs]

    return run


@torch.no_grad()
def assert_runs(program: Any, low: nn.Module, exact: nn.Module) -> None:
    run = ran(program)
    for size in (1, 2, 5):
        x, t, y = batch(size)
        (actual,) = run((x, t, y))
        numerics.assert_model_contract(actual, low(x, t, y), exact(x.double(), t, y))


@BOTH
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_runs_in_onnxruntime(kind: str, export: Export) -> None:
    assert_runs(export(MODELS[kind](), batch(BATCH)), *oracles(kind))


@pytest.mark.parametrize("export", [straight, pytest.param(decomposed, marks=pytest.mark.slow)])
@pytest.mark.parametrize("conditioning", ["adaln", "cross_attention", "in_context"])
def test_every_conditioning_runs_in_onnxruntime(conditioning: str, export: Export) -> None:
    settings: dict[str, Any] = {**TINY, "depth": 1, "conditioning": conditioning}
    low = randomised(reference.DiT(**settings)).eval()
    assert_runs(export(randomised(models.DiT(**settings)).eval(), batch(BATCH)), low, widened(low))


class Rest(nn.Module):
    """What the models above do not call, of ``room``, the ops or the reference."""

    def __init__(self, room: Any) -> None:
        super().__init__()
        self.room = room

    def forward(self, x: Tensor, vector: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        normed = self.room.modulate_norm(x, vector, vector, weight=weights[0], norm="rmsnorm", out_dtype=x.dtype)
        product = self.room.mlp(normed, weights, weights[:, 1], weights.t())
        stream, closed = self.room.gated_residual_norm(x, product, vector, None, vector, branch_bias=weights[1], norm="rmsnorm")
        packed = F.linear(closed, weights.repeat(3, 1), weights[2].repeat(3)).unflatten(-1, (3, 4, -1))
        q, k, v = self.room.split_qkv(packed, weights[2].repeat(3))
        return self.room.unpatchify(stream, grid=(2, 3), patch_size=2), self.room.attention(q + k - v, packed[:, :, 1:], scale=0.3)


@BOTH
def test_the_other_ops_run_in_onnxruntime(export: Export) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(16, 16, generator=generator) / 4

    def inputs(size: int) -> Inputs:
        return torch.randn(size, 6, 16, generator=generator), torch.randn(size, 16, generator=generator), weights

    run = ran(export(Rest(ops).eval(), inputs(BATCH)))
    for given in (inputs(1), inputs(2), inputs(5)):
        low = Rest(reference)(*given)
        exact = Rest(reference)(*(value.double() for value in given))
        for actual, expected, wide in zip(run(given), low, exact, strict=True):
            numerics.assert_model_contract(actual, expected, wide)
