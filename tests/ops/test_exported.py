"""An exported program keeps our ops, until ``ops.decompositions()`` or an ONNX export puts plain PyTorch in their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter import _flags

from ditkernels import ops, use_backend
from ditkernels.ops import _native, dispatch
from ditkernels.ops.exported import decompositions
from ditkernels.ops.spec import Example
from tests import numerics
from tests.helpers.native_cpu import needs_library
from tests.test_torch_tools import batch, oracles, own

DECOMPOSED = [op for op in dispatch.OPS.values() if op.call in decompositions()]
DEFAULTS = {"norm": "layernorm", "eps": 1e-6, "branch_eps": 1e-6, "out_dtype": torch.float64, "channels_first": False}


def exported(model: nn.Module, **options: Any) -> torch.export.ExportedProgram:
    dynamic = ({0: torch.export.Dim.DYNAMIC},) * 3
    return torch.export.export(model, batch(), dynamic_shapes=dynamic, **options)


def ours(program: torch.export.ExportedProgram) -> set[str]:
    targets = {str(node.target) for node in program.graph.nodes}
    return {target.split(".")[1] for target in targets if target.startswith("ditkernels.")}


def test_a_program_keeps_our_ops_until_it_is_told_what_they_are() -> None:
    program = exported(own())
    kept = {"patch_embed", "modulate_norm", "gated_residual_norm", "final_layer"}
    assert kept <= ours(program)
    assert kept <= ours(program.run_decompositions())

    for table in (ops.decompositions(), torch.export.default_decompositions()):
        table.update(ops.decompositions())
        plain = program.run_decompositions(table)
        assert not ours(plain)
        low, exact = oracles("own")
        with torch.no_grad():
            for size in (1, 5):
                x, t, y = batch(size)
                numerics.assert_model_contract(plain.module()(x, t, y), low(x, t, y), exact(x.double(), t, y))


@pytest.mark.parametrize("strict", [False, True])
def test_an_onnx_export_traces_no_op_of_ours(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flags, "_is_onnx_exporting", True)
    torch._dynamo.reset()
    with use_backend(attention="plain"):  # a kernel may be one that no other runtime has
        program = exported(own(), strict=strict)
    assert not ours(program)
    assert torch.ops.aten.scaled_dot_product_attention.default in [node.target for node in program.graph.nodes]


def test_every_op_of_a_forward_has_a_decomposition() -> None:
    assert {op.declaration.called or op.name for op in DECOMPOSED} == {*ops.__all__} & {*dispatch.OPS} - {"adamw_ema"}


def arguments_of(op: dispatch.Op, example: Example, keep: bool) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    shapes = op.declaration.shapes(example.sizes, None if example.present is None else example.present.split())
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    options: dict[str, Any] = {**DEFAULTS, **example.options, "keep": keep}
    options["grid_h"], options["grid_w"] = options.get("grid", (0, 0))
    return [(tensors | options).get(name) for name in op.declaration.arguments]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("op", DECOMPOSED, ids=lambda op: op.name)
def test_a_decomposition_returns_what_the_op_does(op: dispatch.Op, keep: bool) -> None:
    for example in op.declaration.examples:
        args = arguments_of(op, example, keep)
        actual, expected = decompositions()[op.call](*args), op.call(*args, "torch")
        if len(op.declaration.outputs) == 1:
            actual, expected = (actual,), (expected,)
        for got, want in zip(actual, expected, strict=True):
            assert got.dtype == want.dtype
            numerics.assert_fp64_agreement(got, want)


@needs_library
def test_a_program_does_not_hold_what_was_asked_about_the_processor() -> None:
    _native.cpu_isa.cache_clear()
    assert "cpu_isa" not in ours(exported(own()))
