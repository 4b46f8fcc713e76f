"""gated_residual and gated_residual_norm of a branch that is normed first: parity, gradients and torch citizenship."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ditkernels import reference
from ditkernels.ops import dispatch, norm
from ditkernels.ops.norm import branch_norm
from ditkernels.ops.spec import Declaration, encoded
from tests import numerics
from tests.helpers.native_cpu import as_ops, on_both_backends, run_formulas  # noqa: F401
from tests.helpers.subsets import WholeWay
from tests.ops import test_adaln, test_modulations
from tests.ops.test_adaln import BF16, F32, F64, run

OPS = ("gated_residual", "gated_residual_norm")
VECTORS = ("gate", "shift", "scale", "branch_weight", "weight", "bias")
TAKES = {"gated_residual": ("gate", "branch_weight"), "gated_residual_norm": VECTORS}
EPS = 0.01


def normed(op: str, of: object = norm) -> Callable[..., object]:
    """The op, or its reference, with a branch norm."""
    return functools.partial(getattr(of, op), branch_norm="rmsnorm", branch_eps=EPS)


def make_inputs(
    op: str, batch: int, length: int, width: int, stream: torch.dtype, branch: torch.dtype, present: str = "all"
) -> dict[str, Tensor]:
    made = test_adaln.make_inputs(op, batch, length, width, stream, branch)
    made["branch_weight"] = made.pop("branch_bias") + 1
    return {n: v for n, v in made.items() if present == "all" or n in ("x", "branch") or n in present.split()}


def assert_parity(op: str, inputs: dict[str, Tensor], needs: str = "", **options: object) -> None:
    test_adaln.assert_parity(op, inputs, needs, branch_norm="rmsnorm", branch_eps=EPS, **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", test_adaln.COVERING, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c))
def test_parity(op: str, case: tuple, on_both_backends: str) -> None:  # noqa: F811
    *shape, stream, branch, kind = case
    options = {} if op == "gated_residual" else {"norm": kind, "out_dtype": branch}
    with as_ops(on_both_backends):
        assert_parity(op, make_inputs(op, *shape, stream, branch), **options)


@pytest.mark.parametrize("op", OPS)
def test_every_combination_of_optional_arguments(op: str, on_both_backends: str) -> None:  # noqa: F811
    norms = itertools.cycle(reference.NORMS)
    for count in range(len(TAKES[op]) + 1):
        for names in itertools.combinations(TAKES[op], count):
            inputs = make_inputs(op, 2, 5, 12, F32, F32, " ".join(names) or "none")
            with as_ops(on_both_backends):
                assert_parity(op, inputs, **({} if op == "gated_residual" else {"norm": next(norms)}))


# Which gradients are wanted alone.
NEEDS = ["x", "branch", "gate", "scale", "shift", "weight", "bias", "branch_weight", "x gate", "scale branch_weight", "branch bias"]


@pytest.mark.parametrize("present", ["all", "scale weight bias gate"])
@pytest.mark.parametrize("needs", NEEDS)
def test_some_gradients_alone(needs: str, present: str) -> None:
    inputs = make_inputs("gated_residual_norm", 2, 6, 11, F32, F32, present)
    if set(needs.split()) <= inputs.keys():
        assert_parity("gated_residual_norm", inputs, needs)


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_branch_eps_beside_a_mean_square_of_its_size(eps: float) -> None:
    inputs = make_inputs("gated_residual", 2, 3, 12, F32, F32)
    inputs["branch"] = inputs["branch"] * eps**0.5
    test_adaln.assert_parity("gated_residual", inputs, branch_norm="rmsnorm", branch_eps=eps)


@pytest.mark.parametrize("kind", reference.NORMS)
@pytest.mark.parametrize("op", OPS)
def test_formulas_by_gradcheck(op: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {
        "gated_residual": (branch_norm.residual_forward, branch_norm.residual_backward),
        "gated_residual_norm": (branch_norm.residual_norm_forward, branch_norm.residual_norm_backward),
    }
    run_formulas(monkeypatch, f"{op}_branch_norm", *kernels[op])
    inputs = {n: v.detach().requires_grad_() for n, v in make_inputs(op, 2, 3, 5, F64, F64).items()}
    options = {} if op == "gated_residual" else {"norm": kind}
    call = lambda *values: normed(op)(**dict(zip(inputs, values)), **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, list(inputs.values()))


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_through_one_output_alone(which: int) -> None:
    inputs = make_inputs("gated_residual_norm", 2, 6, 12, F32, F32)

    def gradients(of: object, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = {n: v.to(dtype).detach().requires_grad_() for n, v in inputs.items()}
        loss = normed("gated_residual_norm", of)(**leaves)[which].square().sum()
        return torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)

    found = gradients(norm, F32), gradients(reference, F32), gradients(reference, F64)
    for actual, rounded, ideal, name in zip(*found, inputs):
        numerics.assert_contract(actual, rounded, ideal, f"d{name} through output {which}")


@pytest.mark.parametrize("op", OPS)
def test_each_subset_of_inputs_gets_its_gradients_and_saves_what_they_need(op: str, on_both_backends: str) -> None:  # noqa: F811
    inputs = make_inputs(op, 2, 5, 12, F32, F32)
    declaration = dispatch.OPS[f"{op}_branch_norm"].declaration

    def gradients(needed: set[str]) -> tuple[dict[str, Tensor], int]:
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += 1
            return tensor

        leaves = {n: v.detach().requires_grad_(n in needed) for n, v in inputs.items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), as_ops(on_both_backends):
            outputs = normed(op)(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator) for o in outputs]
        grads = torch.autograd.grad(outputs, [v for v in leaves.values() if v.requires_grad], cotangents)
        return dict(zip([n for n in inputs if n in needed], grads)), saved

    everything, _ = gradients(set(inputs))
    for count in range(1, len(inputs)):
        for needed in map(set, itertools.combinations(inputs, count)):
            got, saved = gradients(needed)
            for name, gradient in got.items():
                torch.testing.assert_close(gradient, everything[name], msg=f"d{name} where {needed}")
            assert saved == len(declaration.saved([given.name in needed for given in declaration.inputs])), needed


def raw_arguments(declaration: Declaration, absent: str = "", unwanted: str = "") -> tuple[object, ...]:
    """Arguments of an op of torch: leaves for the inputs of a forward but those that are absent."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"B": 2, "N": 5, "D": 12, "S": 2, "R": 1}
    made = {name: torch.rand(shape, generator=generator) for name, shape in declaration.shapes(sizes).items()}
    if not declaration.is_backward:
        made = {name: tensor.requires_grad_() for name, tensor in made.items()}
    wanted = [None if output.name.removeprefix("d") in unwanted.split() else F32 for output in declaration.outputs]
    options = {
        "branch_eps": EPS,
        "norm": "layernorm",
        "eps": 1e-6,
        "out_dtype": BF16,
        "keep": True,
        "wanted": encoded(tuple(wanted)),
    }
    given = {**options, **made, **dict.fromkeys(absent.split())}
    return tuple(given[name] for name in declaration.arguments)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    declared = dispatch.OPS[f"{op}_branch_norm"]
    for absent in ("", "gate shift weight", "scale branch_weight bias"):
        torch.library.opcheck(declared.call, raw_arguments(declared.declaration, absent))
    for absent, unwanted in (("", ""), ("gate weight", "gate shift weight x"), ("branch_weight", "branch branch_weight")):
        torch.library.opcheck(declared.gradients.call, raw_arguments(declared.gradients.declaration, absent, unwanted))


@pytest.mark.parametrize("op", OPS)
def test_compiles_as_one_graph(op: str, on_both_backends: str) -> None:  # noqa: F811
    inputs = make_inputs(op, 2, 6, 12, F32, F32)
    found = run(torch.compile(normed(op), fullgraph=True, backend="aot_eager"), inputs)
    with as_ops(on_both_backends):
        wanted = run(normed(op), inputs)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("op", OPS)
def test_repeats_bit_for_bit_and_writes_every_output(op: str) -> None:
    inputs = make_inputs(op, 3, 17, 100, BF16, BF16)
    first = run(normed(op), inputs)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        second = run(normed(op), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("shape", [(0, 6, 12), (2, 0, 12)])
@pytest.mark.parametrize("op", OPS)
def test_nothing_in_gives_nothing_out_and_zero_gradients(op: str, shape: tuple[int, int, int]) -> None:
    inputs = make_inputs(op, *shape, F32, F32)
    assert all((gradient == 0).all() for gradient in run(normed(op), inputs))


def test_a_row_of_zeros_stays_one() -> None:
    inputs = make_inputs("gated_residual", 2, 3, 12, F32, F32)
    inputs["branch"][1, 2] = 0
    assert_parity("gated_residual", inputs)
    assert torch.equal(normed("gated_residual")(**inputs)[1, 2], inputs["x"][1, 2])


@pytest.mark.parametrize("kind", ["shared", "segments", "tokens", "mixed", "index", "index of a sample"])
@pytest.mark.parametrize("op", OPS)
def test_parity_of_other_vectors(op: str, kind: str, on_both_backends: str) -> None:  # noqa: F811
    inputs = test_modulations.make_inputs(op, kind, 2, 6, 12, F32, BF16)
    inputs["branch_weight"] = inputs.pop("branch_bias")
    with as_ops(on_both_backends):
        test_modulations.assert_parity(op, inputs, branch_norm="rmsnorm", branch_eps=EPS)


def test_autocast_keeps_the_stream_and_lowers_the_normed_output() -> None:
    inputs = make_inputs("gated_residual_norm", 2, 5, 12, F32, BF16)
    with torch.autocast("cpu", dtype=BF16):
        assert [out.dtype for out in normed("gated_residual_norm")(**inputs)] == [F32, BF16]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"branch_norm": "layernorm"}, "branch_norm: got 'layernorm', allowed are rmsnorm"),
        ({"branch_norm": None}, "branch_weight: given without branch_norm"),
        ({"branch_bias": torch.zeros(12)}, "branch_bias: given together with branch_norm, allowed is one of them"),
        ({"branch_eps": -1.0}, "branch_eps: got -1.0, allowed is 0 or more"),
        ({"branch_weight": torch.zeros(11)}, r"branch_weight: got shape \(11,\), expected \(12\)"),
        ({"branch": torch.zeros(2, 4, 12)}, r"branch: got shape \(2, 4, 12\), expected \(2, 5, 12\)"),
        ({"gate": torch.zeros(3, 12)}, r"gate: got shape \(3, 12\), expected \(2, 12\)"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_errors_name_the_argument(op: str, change: dict, words: str) -> None:
    """Also after a good call and after the bad call itself, and on the whole way."""
    given = {"branch_norm": "rmsnorm", **make_inputs(op, 2, 5, 12, F32, F32)}
    getattr(norm, op)(**given)
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            getattr(norm, op)(**{**given, **change})
    with WholeWay(), pytest.raises(ValueError, match=words):
        getattr(norm, op)(**{**given, **change})


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused(op: str) -> None:
    inputs = make_inputs(op, 2, 5, 12, F32, F32)
    call = lambda x: normed(op)(**{**inputs, "x": x})  # noqa: E731
    with pytest.raises(NotImplementedError, match=f"{op}_branch_norm: forward-mode"):
        torch.func.jvp(call, (inputs["x"],), (inputs["x"],))


@pytest.mark.parametrize("op", OPS)
def test_transforms_of_torch_func_run_the_reference(op: str) -> None:
    inputs = make_inputs(op, 2, 6, 12, F64, F64)

    def loss(of: object) -> Callable[[Tensor], Tensor]:
        def of_branch(branch: Tensor) -> Tensor:
            outputs = normed(op, of)(**{**inputs, "branch": branch})
            return sum(out.square().sum() for out in (outputs if isinstance(outputs, tuple) else (outputs,)))

        return of_branch

    got, want = (torch.func.grad(loss(of))(inputs["branch"]) for of in (norm, reference))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_are_refused(op: str, on_both_backends: str) -> None:  # noqa: F811
    inputs = {n: v.detach().requires_grad_() for n, v in make_inputs(op, 2, 5, 12, F32, F32).items()}
    with as_ops(on_both_backends):
        out = normed(op)(**inputs)
        out = out[-1] if isinstance(out, tuple) else out
        first = torch.autograd.grad(out.square().sum(), inputs["gate"], create_graph=True)[0].sum()
    with pytest.raises(NotImplementedError, match="not differentiable"):
        first.backward()
