"""modulate_norm, gated_residual, gated_residual_norm: parity, gradients and torch citizenship."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditkernels import reference
from ditkernels.ops import dispatch, norm
from ditkernels.ops.norm import formulas
from ditkernels.ops.spec import Declaration, encoded
from tests import numerics
from tests.helpers.native_cpu import as_ops, needs_compiler, on_both_backends, run_formulas  # noqa: F401

OPS = ("modulate_norm", "gated_residual", "gated_residual_norm")
VECTORS = ("gate", "shift", "scale", "branch_bias", "weight", "bias")
TAKES = {
    "modulate_norm": ("x", "shift", "scale", "weight", "bias"),
    "gated_residual": ("x", "branch", "gate", "branch_bias"),
    "gated_residual_norm": ("x", "branch", *VECTORS),
}
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def make_inputs(
    op: str,
    batch: int,
    length: int,
    width: int,
    stream: torch.dtype,
    branch: torch.dtype,
    present: str = "all",
) -> dict[str, Tensor]:
    """Random leaves; the vectors of a sample are strided chunks of one tensor, as a model makes them."""
    generator = torch.Generator().manual_seed(batch * 1000 + length * 10 + width)
    chunks = torch.randn(batch, 3 * width, generator=generator).chunk(3, dim=1)
    made = {
        "x": torch.randn(batch, length, 2 * width, generator=generator)[..., ::2],
        "branch": torch.randn(length, batch, width, generator=generator).transpose(0, 1),
        **dict(zip(("gate", "shift", "scale"), chunks)),
        **{name: torch.randn(width, generator=generator) for name in ("branch_bias", "weight", "bias")},
    }
    kept = [n for n in TAKES[op] if present == "all" or n in ("x", "branch") or n in present.split()]
    return {n: made[n].to(stream if n == "x" else branch) for n in kept}


def run(function: object, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs, then the gradient of every input, for a fixed random cotangent."""
    leaves = {n: v.detach().requires_grad_() for n, v in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), cotangents)]


def results(
    op: str, inputs: dict[str, Tensor], needs: str = "", **options: object
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[str]]:
    """Of the op, of plain PyTorch at the same dtypes, and of plain PyTorch in fp64, for equal inputs and cotangents.

    Outputs, then gradients: of all inputs, or of those that ``needs`` names.
    """
    needed = needs.split() or list(inputs)
    generator = torch.Generator().manual_seed(1)
    cotangents: list[Tensor] = []
    collected = []
    for function, wide in (
        (getattr(norm, op), False),
        (getattr(reference, op), False),
        (getattr(reference, op), True),
    ):
        leaves = {n: (v.double() if wide else v).detach().requires_grad_(n in needed) for n, v in inputs.items()}
        chosen = {**options, "out_dtype": F64} if wide and "out_dtype" in options else options
        outputs = function(**leaves, **chosen)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not cotangents:
            cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
        reached = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents) if o.requires_grad]
        grads = torch.autograd.grad([o for o, _ in reached], [leaves[n] for n in needed], [c for _, c in reached])
        collected.append([*outputs, *grads])
    names = [f"output {i}" for i in range(len(cotangents))] + [f"d{n}" for n in needed]
    return (*collected, names)


def assert_parity(op: str, inputs: dict[str, Tensor], needs: str = "", **options: object) -> None:
    for actual, low, exact, name in zip(*results(op, inputs, needs, **options)):
        numerics.assert_contract(actual, low, exact, f"{op} {name}")


# Each pair of (batch, length, width, stream dtype, branch dtype, norm) values that matters occurs in some row.
COVERING = [
    (1, 1, 384, F32, F32, "layernorm"),
    (2, 17, 96, F32, BF16, "rmsnorm"),
    (3, 49, 768, BF16, BF16, "layernorm"),
    (8, 1, 1152, BF16, F32, "rmsnorm"),
    (2, 256, 1024, F16, F16, "layernorm"),
    (3, 17, 1152, F32, BF16, "layernorm"),
    (8, 49, 100, F16, F32, "rmsnorm"),
    (1, 256, 96, BF16, BF16, "rmsnorm"),
    (2, 49, 1152, F32, F32, "rmsnorm"),
    (3, 256, 100, F32, F16, "layernorm"),
    (8, 17, 384, BF16, BF16, "layernorm"),
    (1, 49, 1024, F32, BF16, "rmsnorm"),
    (3, 1, 768, F16, F16, "rmsnorm"),
    (2, 17, 7, F32, F32, "layernorm"),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", COVERING, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c))
def test_parity(op: str, case: tuple) -> None:
    *shape, stream, branch, kind = case
    options = {} if op == "gated_residual" else {"norm": kind, "out_dtype": branch}
    assert_parity(op, make_inputs(op, *shape, stream, branch), **options)


@pytest.mark.parametrize("op", OPS)
def test_every_combination_of_optional_arguments(op: str) -> None:
    optional = [n for n in TAKES[op] if n in VECTORS]
    for count in range(len(optional) + 1):
        for names in itertools.combinations(optional, count):
            for kind in reference.NORMS if op != "gated_residual" else (None,):
                inputs = make_inputs(op, 2, 5, 12, F32, F32, " ".join(names) or "none")
                assert_parity(op, inputs, **({"norm": kind} if kind else {}))


LARGE = (1, 10, 100)


def assert_parity_at_a_large_shift(op: str, times: float, dtype: torch.dtype, length: int = 17) -> None:
    """With shift and bias so many times as large as the normed rows."""
    inputs = make_inputs(op, 2, length, 96, dtype, dtype)
    inputs |= {name: inputs[name] * times for name in ("shift", "bias")}
    for kind in reference.NORMS:
        assert_parity(op, inputs, norm=kind, out_dtype=dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("times", LARGE)
@pytest.mark.parametrize("op", ["modulate_norm", "gated_residual_norm"])
def test_parity_at_large_shifts(op: str, times: float, dtype: torch.dtype) -> None:
    assert_parity_at_a_large_shift(op, times, dtype)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(0, 20), st.integers(1, 70)),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
)
def test_agreement_in_fp64_at_any_shape(op: str, shape: tuple[int, int, int], eps: float) -> None:
    """In fp64, because a narrow layer norm's gradient nearly cancels, and fp32 would test the luck of its rounding."""
    options = {} if op == "gated_residual" else {"eps": eps}
    got, want, _, names = results(op, make_inputs(op, *shape, F64, F64), **options)
    for actual, expected, name in zip(got, want, names):
        numerics.assert_fp64_agreement(actual, expected, name)


@pytest.mark.parametrize("kind", reference.NORMS)
@pytest.mark.parametrize("op", OPS)
def test_formulas_by_gradcheck(op: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = {
        "modulate_norm": (formulas.norm_formula, formulas.norm_gradients_formula),
        "gated_residual": (formulas.residual_formula, formulas.residual_gradients_formula),
        "gated_residual_norm": (formulas.residual_norm_formula, formulas.residual_norm_gradients_formula),
    }
    run_formulas(monkeypatch, op, *pairs[op])
    inputs = {n: v.detach().requires_grad_() for n, v in make_inputs(op, 2, 3, 5, F64, F64).items()}
    options = {} if op == "gated_residual" else {"norm": kind}
    call = lambda *values: getattr(norm, op)(**dict(zip(inputs, values)), **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, list(inputs.values()))


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_through_one_output_alone(which: int) -> None:
    inputs = make_inputs("gated_residual_norm", 2, 5, 12, F32, F32)

    def gradients(function: object, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = {n: v.to(dtype).detach().requires_grad_() for n, v in inputs.items()}
        loss = function(**leaves)[which].square().sum()
        return torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)

    plain = reference.gated_residual_norm
    fused, low, exact = (
        gradients(norm.gated_residual_norm, F32),
        gradients(plain, F32),
        gradients(plain, F64),
    )
    for actual, rounded, ideal, name in zip(fused, low, exact, inputs):
        numerics.assert_contract(actual, rounded, ideal, f"d{name} through output {which}")


def raw_arguments(declaration: Declaration, absent: str = "", unwanted: str = "", norm: str = "layernorm") -> tuple[object, ...]:
    """Arguments of an op of torch: leaves for the inputs of a forward but those that are absent."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"B": 2, "N": 5, "D": 12, "S": 1 if norm == "rmsnorm" else 2}
    options = {"norm": norm, "eps": 1e-6, "out_dtype": BF16, "keep": True}
    shapes = declaration.shapes(sizes)
    made = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    if not declaration.is_backward:
        made = {name: tensor.requires_grad_() for name, tensor in made.items()}
    given = {**options, **made, **dict.fromkeys(absent.split())}
    wanted = [None if output.name.removeprefix("d") in unwanted.split() else F32 for output in declaration.outputs]
    given["wanted"] = encoded(tuple(wanted))
    return tuple(given[name] for name in declaration.arguments)


@pytest.mark.parametrize("absent", ["", "gate shift weight", "scale branch_bias bias"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, absent: str) -> None:
    declared = dispatch.OPS[op]
    torch.library.opcheck(declared.call, raw_arguments(declared.declaration, absent, norm="rmsnorm"))


@pytest.mark.parametrize(
    "absent, unwanted",
    [
        ("", ""),
        ("gate weight", "gate shift weight x"),
        ("branch scale branch_bias bias", "gate scale branch_bias bias"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_opcheck_of_the_backward(op: str, absent: str, unwanted: str) -> None:
    """Gradients that are not wanted come back empty, and none is another's memory."""
    declared = dispatch.OPS[op].gradients
    torch.library.opcheck(declared.call, raw_arguments(declared.declaration, absent, unwanted))


# ---- Which inputs need gradients -------------------------------------------------------------------------------------


def gradients_of(op: str, leaves: dict[str, Tensor], backend: str) -> tuple[dict[str, Tensor], list[tuple[int, ...]], int]:
    """Gradients by name; the shapes of the tensors that were saved; how often one was unpacked."""
    saved: list[tuple[int, ...]] = []
    unpacked = 0

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        nonlocal unpacked
        unpacked += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), as_ops(backend):
        outputs = getattr(norm, op)(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    needed = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(outputs, list(needed.values()), cotangents)
    return dict(zip(needed, grads)), saved, unpacked


@pytest.mark.parametrize("present", ["all", "gate scale", "none"])
@pytest.mark.parametrize("op", OPS)
def test_each_subset_of_inputs_gets_its_gradients_and_saves_what_they_need(op: str, present: str, on_both_backends: str) -> None:  # noqa: F811
    declaration = dispatch.OPS[op].declaration
    inputs = make_inputs(op, 2, 5, 12, F32, F32, present)
    everything, _, _ = gradients_of(op, {n: v.detach().requires_grad_() for n, v in inputs.items()}, on_both_backends)
    shapes = {"x1": (2, 5, 12), "stats": (2, 5, 2), **{n: tuple(v.shape) for n, v in inputs.items()}}
    for needs in itertools.product((False, True), repeat=len(inputs)):
        needed = dict(zip(inputs, needs))
        if not any(needs):
            continue
        leaves = {n: v.detach().requires_grad_(needed[n]) for n, v in inputs.items()}
        grads, saved, unpacked = gradients_of(op, leaves, on_both_backends)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, everything[name], msg=f"d{name} where {needed}")
        names = declaration.saved([needed.get(i.name, False) for i in declaration.inputs])
        expected = [shapes[name] for name in names if name in shapes]
        assert (saved, unpacked) == (expected, len(expected)), f"{needed}: saved {saved}"


@pytest.mark.parametrize("op", ["modulate_norm", "gated_residual_norm"])
def test_statistics_are_kept_for_a_backward_only(
    op: str,
    on_both_backends: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = make_inputs(op, 2, 5, 12, F32, F32)
    kept: list[tuple[int, ...] | None] = []

    def watching(kernel: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
        def watched(*args: object) -> tuple[Tensor | None, ...]:
            outputs = kernel(*args)
            kept.append(None if outputs[-1] is None else tuple(outputs[-1].shape))
            return outputs

        return watched

    for implementation in dispatch.OPS[op].implementations.values():
        monkeypatch.setattr(implementation, "kernel", watching(implementation.kernel))
    getattr(norm, op)(**inputs)
    leaves = {n: v.requires_grad_() for n, v in inputs.items()}
    with torch.no_grad():
        getattr(norm, op)(**leaves)
    getattr(norm, op)(**leaves)
    getattr(norm, op)(**leaves, norm="rmsnorm")
    # Where gradients are wanted the torch backend leaves them to plain PyTorch.
    assert kept == [None, None, *([] if on_both_backends == "torch" else [(2, 5, 2), (2, 5, 1)])]


@pytest.mark.parametrize("op", OPS)
def test_compiles_as_one_graph(op: str, on_both_backends: str) -> None:  # noqa: F811
    inputs = make_inputs(op, 2, 17, 12, F32, F32)
    compiled = torch.compile(getattr(norm, op), fullgraph=True, backend="aot_eager")
    found = run(compiled, inputs)
    with as_ops(on_both_backends):
        wanted = run(getattr(norm, op), inputs)
    assert all(map(torch.equal, found, wanted))


@needs_compiler
def test_inductor_compiles_forward_and_backward() -> None:
    inputs = make_inputs("gated_residual_norm", 2, 5, 12, F32, F32)
    compiled = torch.compile(norm.gated_residual_norm, fullgraph=True)
    for got, want in zip(run(compiled, inputs), run(norm.gated_residual_norm, inputs)):
        torch.testing.assert_close(got, want)  # it fuses the opened formula, and rounds in other places


@pytest.mark.parametrize("op", OPS)
def test_repeats_bit_for_bit_and_writes_every_output(op: str) -> None:
    inputs = make_inputs(op, 3, 17, 100, BF16, BF16)
    first = run(getattr(norm, op), inputs)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        second = run(getattr(norm, op), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_autocast_keeps_the_stream_and_lowers_the_normed_output() -> None:
    inputs = make_inputs("gated_residual_norm", 2, 5, 12, F32, BF16)
    with torch.autocast("cpu", dtype=BF16):
        stream, normed = norm.gated_residual_norm(**inputs)
        alone = norm.modulate_norm(inputs["x"])
        residual = norm.gated_residual(inputs["x"], inputs["branch"], inputs["gate"])
        wide = norm.modulate_norm(inputs["x"].double())
    assert wide.dtype == F64
    assert (stream.dtype, normed.dtype, alone.dtype, residual.dtype) == (F32, BF16, BF16, F32)


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused(op: str) -> None:
    inputs = make_inputs(op, 2, 5, 12, F32, F32)
    call = lambda x: getattr(norm, op)(**{**inputs, "x": x})  # noqa: E731
    with pytest.raises(NotImplementedError, match=f"{op}: forward-mode"):
        torch.func.jvp(call, (inputs["x"],), (inputs["x"],))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        call(torch.autograd.forward_ad.make_dual(inputs["x"], inputs["x"]))


@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_are_refused_unless_plain_pytorch_gives_them(op: str, on_both_backends: str) -> None:  # noqa: F811
    inputs = {n: v.detach().requires_grad_() for n, v in make_inputs(op, 2, 5, 12, F32, F32).items()}
    leaf = inputs["gate" if "gate" in inputs else "x"]

    def first(function: Callable[..., Tensor | tuple[Tensor, Tensor]]) -> Tensor:
        out = function(**inputs)
        out = out[-1] if isinstance(out, tuple) else out
        return torch.autograd.grad(out.square().sum(), leaf, create_graph=True)[0].sum()

    with as_ops(on_both_backends):
        of_kernels = first(getattr(norm, op))
    with pytest.raises(NotImplementedError, match="not differentiable"):
        of_kernels.backward()
    if on_both_backends == "torch":
        second, expected = (torch.autograd.grad(first(getattr(f, op)), leaf)[0] for f in (norm, reference))
        assert torch.equal(second, expected)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.zeros(2, 12)}, ValueError, r"x: got shape \(2, 12\)"),
        (
            {"branch": torch.zeros(2, 5, 11)},
            ValueError,
            r"branch: got shape \(2, 5, 11\), expected \(2, 5, 12\)",
        ),
        ({"gate": torch.zeros(1, 12)}, ValueError, r"gate: got shape \(1, 12\), expected \(2, 12\)"),
        ({"shift": torch.zeros(11)}, ValueError, r"shift: got shape \(11,\)"),
        (
            {"scale": torch.zeros(2, 12, dtype=torch.int64)},
            TypeError,
            r"scale: got dtype torch.int64, allowed are",
        ),
        ({"weight": torch.zeros(11)}, ValueError, r"weight: got shape"),
        ({"branch_bias": torch.zeros(12, device="meta")}, ValueError, r"branch_bias: got device meta"),
        ({"norm": "batchnorm"}, ValueError, r"norm: got 'batchnorm', allowed are layernorm, rmsnorm"),
        ({"eps": -1.0}, ValueError, r"eps: got -1.0"),
        ({"out_dtype": torch.int8}, TypeError, r"out_dtype: got dtype torch.int8"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type, words: str) -> None:
    """Also after a good call, whose checks are remembered, and after the bad call itself; through torch.ops too."""
    inputs = make_inputs("gated_residual_norm", 2, 5, 12, F32, F32)
    norm.gated_residual_norm(**inputs)
    for _ in range(2):
        with pytest.raises(error, match=words):
            norm.gated_residual_norm(**{**inputs, **change})
    declared = dispatch.OPS["gated_residual_norm"]
    given = {"norm": "layernorm", "eps": 1e-6, "out_dtype": F32, "keep": False, **inputs, **change}
    with pytest.raises(error, match=words):
        declared.call(*[given[name] for name in declared.declaration.arguments])


def test_a_forced_backend_that_is_missing_says_why() -> None:
    """Also after a good call, whose choice is remembered."""
    x = torch.zeros(1, 2, 3)
    norm.modulate_norm(x)
    with (
        dispatch.use_backend("cuda"),
        pytest.raises(dispatch.BackendError, match=r"cuda: the.*torch: can serve"),
    ):
        norm.modulate_norm(x)
    norm.modulate_norm(x)
