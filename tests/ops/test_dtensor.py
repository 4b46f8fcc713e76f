"""DTensors: two processes compute what one does, and each op leaves sharded what it can.

A call is written with its placements: ``x@0`` is x sharded along axis 0, ``x`` is replicated, ``x@+`` a partial sum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import product
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch.distributed.tensor")
import torch._dynamo  # imported once, in the server
import torch.distributed.tensor.experimental  # likewise
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)

from ditkernels import models, ops, reference, use_backend
from ditkernels.ops import _native
from ditkernels.ops.sharding import prepare
from tests import numerics
from tests.helpers.gloo import together

# ---- Ops -------------------------------------------------------------------------------------------------------------

# U samples are not as many for one process as for the other.
SIZES = {
    "B": 4,
    "U": 3,
    "N": 6,
    "D": 12,
    "F": 20,
    "V": 8,
    "C": 4,
    "H": 4,
    "W": 6,
    "P": 2,
    "L": 1,
    "G": 3,
    "A": 2,
    "E": 36,
    "I": 6,
    "S": 32,
    "X": 64,
    "Y": 512,
}
ROWS = {"x": "UND", "shift": "UD", "scale": "UD", "weight": "D", "bias": "D"}
RESIDUAL = {"x": "BND", "branch": "BND", "gate": "BD", "branch_bias": "D"}
GRID: dict[str, Any] = {"grid": (2, 3), "patch_size": 2}


class Case(NamedTuple):
    """A function, the axes of its tensors, and its calls: placements of the inputs, of the outputs, and of the gradients."""

    function: Callable[..., Any]
    axes: Mapping[str, str]
    calls: list[tuple[str, str, str]]


CASES = {
    "modulate_norm": Case(
        ops.modulate_norm,
        ROWS,
        [
            ("x shift scale weight bias", "h", "x shift scale weight bias"),
            ("x@0 shift@0 scale@0 weight bias", "h@0", "x@0 shift@0 scale@0 weight@+ bias@+"),
            ("x@0 shift scale weight bias", "h@0", "x@0 shift@0 scale@0 weight@+ bias@+"),
            ("x@1 shift scale weight bias", "h@1", "x@1 shift@+ scale@+ weight@+ bias@+"),
            # One call after the other that differs only in which gradients are wanted, or in which tensors there are.
            ("x@1 shift scale weight", "h@1", "x@1 weight@+"),
            ("x@1 shift scale weight", "h@1", "x@1 shift@+ weight@+"),
            ("x@1 shift@0 weight", "h@1", "x@1 shift@+ weight@+"),
            ("x@1 scale@0 weight", "h@1", "x@1 scale@+ weight@+"),
            ("x@1 shift weight", "h@1", "x@1 shift@+ weight@+"),
            ("x@1 scale weight", "h@1", "x@1 scale@+ weight@+"),
            ("x@1 scale bias", "h@1", "x@1 scale@+ bias@+"),
            # Gathered.
            ("x@2 shift@1 scale@1 weight@0 bias@0", "h", "x shift scale weight bias"),
        ],
    ),
    # So large that to shard it along another axis moves less than to gather it.
    "wide norm": Case(ops.modulate_norm, {"x": "SXY"}, [("x@2", "h", "x")]),
    "rmsnorm": Case(
        partial(ops.modulate_norm, norm="rmsnorm"),
        ROWS,
        [("x@1 shift scale weight bias", "h@1", "x@1 shift@+ scale@+ weight@+ bias@+")],
    ),
    "gated_residual": Case(
        ops.gated_residual,
        RESIDUAL,
        [
            ("x branch gate branch_bias", "y", "x branch gate branch_bias"),
            ("x@0 branch@0 gate@0 branch_bias", "y@0", "x@0 branch@0 gate@0 branch_bias@+"),
            ("x@1 branch@1 gate branch_bias", "y@1", "x@1 branch@1 gate@+ branch_bias@+"),
            ("x@2 branch@2 gate@1 branch_bias@0", "y@2", "x@2 branch@2 gate@1 branch_bias@0"),
            ("x@2 branch@2", "y@2", "x@2 branch@2"),
        ],
    ),
    "gated_residual_norm": Case(
        ops.gated_residual_norm,
        {**RESIDUAL, "shift": "BD", "scale": "BD", "weight": "D", "bias": "D"},
        [
            ("x branch gate shift scale branch_bias", "x h", "x branch gate shift scale branch_bias"),
            ("x@0 branch@0 gate@0 shift@0 scale@0 branch_bias", "x@0 h@0", "x@0 branch@0 gate@0 shift@0 scale@0 branch_bias@+"),
            ("x@1 branch@1 gate shift scale branch_bias", "x@1 h@1", "x@1 branch@1 gate@+ shift@+ scale@+ branch_bias@+"),
            ("x@1 branch@1 weight bias", "x@1 h@1", "x@1 branch@1 weight@+ bias@+"),
            ("x@2 branch@2 gate@1 shift@1 scale@1 branch_bias@0", "x h", "x branch gate shift scale branch_bias"),
        ],
    ),
    "bias_gelu": Case(
        ops.bias_gelu,
        {"x": "BND", "bias": "D"},
        [
            ("x bias", "y", "x bias"),
            ("x@0 bias", "y@0", "x@0 bias@+"),
            ("x@1 bias", "y@1", "x@1 bias@+"),
            ("x@2 bias@0", "y@2", "x@2 bias@0"),
        ],
    ),
    "mlp": Case(
        ops.mlp,
        {"x": "BND", "fc1_weight": "FD", "fc1_bias": "F", "fc2_weight": "DF"},
        [
            ("x fc1_weight fc1_bias fc2_weight", "y", "x fc1_weight fc1_bias fc2_weight"),
            ("x@0 fc1_weight fc1_bias fc2_weight", "y@0", "x@0 fc1_weight@+ fc1_bias@+ fc2_weight@+"),
            ("x@1 fc1_weight fc1_bias fc2_weight", "y@1", "x@1 fc1_weight@+ fc1_bias@+ fc2_weight@+"),
            ("x fc1_weight@0 fc1_bias@0 fc2_weight@1", "y@+", "x@+ fc1_weight@0 fc1_bias@0 fc2_weight@1"),
        ],
    ),
    "patch_embed": Case(
        ops.patch_embed,
        {"x": "BCHW", "weight": "DCPP", "bias": "D", "pos_embed": "LID"},
        [
            ("x weight bias pos_embed", "y", "x weight bias pos_embed"),
            ("x@0 weight bias pos_embed", "y@0", "x@0 weight@+ bias@+ pos_embed@+"),
            ("x weight@0 bias@0 pos_embed@2", "y@2", "x weight@0 bias@0 pos_embed@2"),
        ],
    ),
    "unpatchify": Case(
        partial(ops.unpatchify, **GRID),
        {"tokens": "BNV"},
        [("tokens", "y", "tokens"), ("tokens@0", "y@0", "tokens@0"), ("tokens@1", "y", "tokens")],
    ),
    "final_layer": Case(
        partial(ops.final_layer, **GRID),
        {**RESIDUAL, "shift": "BD", "scale": "BD", "weight": "VD", "bias": "V"},
        [
            ("x shift scale weight bias", "y", "x shift scale weight bias"),
            ("x@0 shift@0 scale@0 weight bias", "y@0", "x@0 shift@0 scale@0 weight@+ bias@+"),
            (
                "x@0 branch@0 gate@0 shift@0 scale@0 branch_bias weight bias",
                "y@0",
                "x@0 branch@0 gate@0 shift@0 scale@0 branch_bias@+ weight@+ bias@+",
            ),
            ("x@1 shift scale weight bias", "y", "x@1 shift@+ scale@+ weight@+ bias"),
        ],
    ),
    "split_qkv": Case(
        ops.split_qkv,
        {"packed": "BNGAI", "bias": "E"},
        [
            ("packed bias", "q k v", "packed bias"),
            ("packed@0 bias", "q@0 k@0 v@0", "packed@0 bias@+"),
            ("packed@1 bias", "q@1 k@1 v@1", "packed@1 bias@+"),
        ],
    ),
    "attention": Case(
        ops.attention,
        {"qkv_or_q": "BNGAI", "bias": "E"},
        [
            ("qkv_or_q bias", "y", "qkv_or_q bias"),
            ("qkv_or_q@0 bias", "y@0", "qkv_or_q@0 bias@+"),
        ],
    ),
}


def placements(text: str) -> dict[str, Placement]:
    kinds = {"": Replicate(), "+": Partial()}
    found = (word.partition("@") for word in text.split())
    return {name: kinds[mark] if mark in kinds else Shard(int(mark)) for name, _, mark in found}


def values(case: Case, names: Iterable[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn([SIZES[axis] for axis in case.axes[name]], generator=generator) for name in names}


def derivatives(case: Case, inputs: Mapping[str, Tensor], wanted: Iterable[str]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the wanted gradients where the outputs' are the same in one process as in many."""
    leaves = {name: value.detach().requires_grad_(name in wanted) for name, value in inputs.items()}
    made = case.function(**leaves)
    outputs = [made] if isinstance(made, Tensor) else list(made)
    generator = torch.Generator().manual_seed(6)
    grads = [torch.randn(output.shape, generator=generator) for output in outputs]
    for at, output in enumerate(outputs):
        if isinstance(output, DTensor):
            grads[at] = distribute_tensor(grads[at], output.device_mesh, [_of_gradient(p) for p in output.placements])
    return outputs, list(torch.autograd.grad(outputs, [leaves[name] for name in wanted], grads))


def _of_gradient(placement: Placement) -> Placement:
    return Replicate() if placement.is_partial() else placement


def check(name: str) -> None:
    case, mesh = CASES[name], init_device_mesh("cpu", (2,))
    for inputs, outputs, gradients in case.calls:
        come, expected = placements(inputs), [placements(outputs), placements(gradients)]
        whole = values(case, come)
        spread = {name: distribute_tensor(value, mesh, [come[name]]) for name, value in whole.items()}
        for got, want, where in zip(derivatives(case, spread, expected[1]), derivatives(case, whole, expected[1]), expected):
            found = [t.placements for t in got]
            assert found == [(p,) for p in where.values()], (inputs, found)
            for one, many in zip(want, got):
                torch.testing.assert_close(many.full_tensor(), one)


@pytest.mark.parametrize("name", CASES)
def test_an_op_computes_what_one_process_does_and_leaves_sharded_what_it_can(
    name: str, forked: ForkServerContext, tmp_path: Path
) -> None:
    together(forked, tmp_path, check, name)


# ---- The optimizer's step --------------------------------------------------------------------------------------------


def public_step(*lists: list[Tensor]) -> None:
    ops.adamw_ema(*lists, lr=0.1, decay=0.9)


def op_step(*lists: list[Tensor]) -> None:
    prepare()
    torch.ops.ditkernels.adamw_ema(*lists, [], None, None, 0.1, 0.9, 0.999, 1e-8, 0.0, 0.9)


def check_step() -> None:
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(5)
    where: list[Placement] = [Shard(0), Replicate(), Shard(1)]
    shapes = [(6, 4), (5,), (3, 8)]

    def tensors() -> list[Tensor]:
        return [torch.rand(shape, generator=generator) for shape in shapes]

    lists = [tensors() for _ in range(5)]
    of_gradients = [Shard(0), Replicate(), Replicate()]
    spread = [
        [distribute_tensor(t, mesh, [p]) for t, p in zip(each, of_gradients if at == 1 else where)] for at, each in enumerate(lists)
    ]
    for lists_of, step in product((lists, spread), (public_step, op_step)):
        weights, gradients, m, v, averages = lists_of
        steps = [torch.zeros(()) for _ in shapes]
        step(weights, gradients, m, v, steps, averages)
        assert [int(count) for count in steps] == [1, 1, 1]
    for at in (0, 2, 3, 4):
        for one, many, placement in zip(lists[at], spread[at], where):
            assert many.placements == (placement,)
            torch.testing.assert_close(many.full_tensor(), one)
    mixed = [spread[2][0], distribute_tensor(lists[2][1], mesh, [Shard(0)]), spread[2][2]]
    with pytest.raises(ValueError, match=r"exp_avgs\[1\]: got placements"):
        ops.adamw_ema(spread[0], spread[1], mixed, spread[3], [torch.zeros(()) for _ in shapes], lr=0.1)


def test_a_step_changes_the_shards_of_each_process(forked: ForkServerContext, tmp_path: Path) -> None:
    together(forked, tmp_path, check_step)


# ---- Models ----------------------------------------------------------------------------------------------------------

MODELS = {"reference": reference.DiT, "own": models.DiT}
TINY = {"input_size": 4, "hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
BATCH = 4


def model_of(kind: str, conditioning: str) -> nn.Module:
    """A fresh DiT returns exactly zero, whatever its blocks do: here every trained parameter counts."""
    model = MODELS[kind](**TINY, conditioning=conditioning).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCH, 4, 4, 4, generator=generator)
    return x, torch.randint(0, 1000, (BATCH,), generator=generator), torch.randint(0, 6, (BATCH,), generator=generator)


def assert_same_step(one: nn.Module, many: nn.Module, placement: Placement, left: Placement) -> None:
    """Outputs and all gradients of one process and of many; ``left`` is how the many leave the output."""
    mesh, (x, t, y) = init_device_mesh("cpu", (2,)), batch()
    exact = model_of("reference", one.conditioning).double()
    made = [
        one(x, t, y),
        exact(x.double(), t, y),
        many(*(distribute_tensor(tensor, mesh, [placement]) for tensor in (x, t, y))),
    ]
    assert made[-1].placements == (left,)
    for output in made:
        output.square().sum().backward()
    numerics.assert_model_contract(made[-1].full_tensor(), *made[:-1])
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in (one, exact, many)]
    for name, of_many in gradients[-1].items():
        numerics.assert_model_contract(of_many.full_tensor(), *[of_one[name] for of_one in gradients[:-1]], name)


def check_model(kind: str, placement: Placement) -> None:
    for conditioning in reference.CONDITIONINGS:
        many = distribute_module(model_of(kind, conditioning), init_device_mesh("cpu", (2,)))
        assert_same_step(model_of(kind, conditioning), many, placement, placement)


@pytest.mark.parametrize("placement", [Replicate(), Shard(0)], ids=["replicated", "batch"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_dit_of_two_processes_is_that_of_one(kind: str, placement: Placement, forked: ForkServerContext, tmp_path: Path) -> None:
    together(forked, tmp_path, check_model, kind, placement)


def check_labels() -> None:
    mesh = init_device_mesh("cpu", (2,))
    embed = distribute_module(reference.LabelEmbedder(5, 8, 1.0).train(), mesh)
    labels = torch.tensor([3, 0, 5, 1])
    made = embed(distribute_tensor(labels, mesh, [Shard(0)]))
    assert made.placements == (Shard(0),)
    assert torch.equal(made.full_tensor(), embed.embedding_table.weight.full_tensor()[-1:].expand(4, -1))
    with pytest.raises(ValueError, match="got label 6"):
        embed(distribute_tensor(labels + 1, mesh, [Replicate()]))


def test_labels_are_checked_and_dropped(forked: ForkServerContext, tmp_path: Path) -> None:
    together(forked, tmp_path, check_labels)


def in_parallel_modules(model: nn.Module) -> nn.Module:
    """Tensor-parallel as torch's tutorials have it, with hooks; tokens are sharded wherever there are norms."""
    mesh = init_device_mesh("cpu", (2,))
    whole, tokens = Replicate(), Shard(1)
    stays: dict[str, Any] = {"use_local_output": False}
    gathered = PrepareModuleInput(input_layouts=tokens, desired_input_layouts=whole, **stays)
    plan = {
        "x_embedder": PrepareModuleOutput(output_layouts=whole, desired_output_layouts=tokens, **stays),
        "blocks.*.attn": gathered,
        # The three of a packed qkv are not two: its columns meet before they are split.
        "blocks.*.attn.qkv": ColwiseParallel(output_layouts=whole, **stays),
        "blocks.*.attn.proj": RowwiseParallel(input_layouts=whole, output_layouts=tokens, **stays),
        "blocks.*.mlp": gathered,
        "blocks.*.mlp.fc1": ColwiseParallel(**stays),
        "blocks.*.mlp.fc2": RowwiseParallel(output_layouts=tokens, **stays),
        "blocks.*.adaLN_modulation.1": ColwiseParallel(output_layouts=whole, **stays),
    }
    return distribute_module(parallelize_module(model, mesh, plan), mesh)


def by_weights(model: nn.Module) -> nn.Module:
    """Tensor-parallel by its weights alone, so that the ops take over biases and see sharded channels."""
    mesh = init_device_mesh("cpu", (2,))

    def place(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        where = {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1}
        for own, parameter in list(module.named_parameters(recurse=False)):
            at = where.get(f"{name.rpartition('.')[2]}.{own}")
            placement = Replicate() if at is None else Shard(at)
            placed = nn.Parameter(distribute_tensor(parameter, mesh, [placement]), requires_grad=parameter.requires_grad)
            module.register_parameter(own, placed)

    return distribute_module(model, mesh, place)


PARALLEL = {"modules": in_parallel_modules, "weights": by_weights}


def check_tensor_parallel(way: str, expected: dict[str, set[Placement]]) -> None:
    one, many, seen = model_of("own", "adaln_zero"), PARALLEL[way](model_of("own", "adaln_zero")), defaultdict(set)

    def watched(name: str) -> Callable[..., Any]:
        function = getattr(ops, name)

        def called(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if isinstance(x, DTensor):
                seen[name].update(x.placements)
            return function(x, *args, **kwargs)

        return called

    with pytest.MonkeyPatch.context() as patch, use_backend("cpu" if _native.cpu_serves() else "torch"):
        for name in expected:
            patch.setattr(ops, name, watched(name))
        assert_same_step(one, many, Replicate(), Replicate())
    assert seen == expected, seen


TOKENS, WHOLE = {Shard(1)}, {Replicate()}


@pytest.mark.parametrize(
    "way, expected",
    [
        ("modules", {"modulate_norm": TOKENS, "gated_residual_norm": TOKENS, "attention": WHOLE, "final_layer": TOKENS}),
        ("weights", {"modulate_norm": WHOLE, "gated_residual_norm": WHOLE, "bias_gelu": {Shard(2)}, "final_layer": WHOLE}),
    ],
)
def test_a_tensor_parallel_dit_is_that_of_one_process(
    way: str, expected: dict[str, set[Placement]], forked: ForkServerContext, tmp_path: Path
) -> None:
    together(forked, tmp_path, check_tensor_parallel, way, expected)
