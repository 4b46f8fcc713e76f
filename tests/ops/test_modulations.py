"""The norm family with vectors that are not per sample, but shared, per segment, per token or by index."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ditkernels import reference
from ditkernels.ops import dispatch, norm
from ditkernels.ops.norm import by_token, vectors
from ditkernels.ops.spec import Declaration, encoded
from tests import numerics
from tests.helpers.native_cpu import as_ops, on_both_backends, run_formulas  # noqa: F401
from tests.helpers.subsets import WholeWay
from tests.ops.test_adaln import BF16, F16, F32, F64, OPS, TAKES

MODULATION = ("gate", "shift", "scale")
ROWS = 3
# The shape of gate, shift and scale where there are B samples of N tokens, K rows and D channels.
KINDS = {
    "shared": ("D", "D", "D"),
    "segments": ("BSD", "BSD", "BSD"),
    "tokens": ("BND", "BND", "BND"),
    "mixed": ("BD", "BND", "D"),
    "segments of two sizes": ("BSD", "BND", "B1D"),
    "index": ("KD", "KD", "KD"),
    "index of a sample": ("BKD", "BKD", "BKD"),
    "index mixed": ("KD", "BKD", "D"),
}


def make_inputs(
    op: str, kind: str, batch: int, length: int, width: int, stream: torch.dtype, others: torch.dtype, present: str = "all"
) -> dict[str, Tensor]:
    """Random tensors: x and the branch strided, vectors per token chunks of one tensor; the index has a row that no token takes."""
    generator = torch.Generator().manual_seed(batch * 1000 + length * 10 + width)
    segments = next(s for s in (2, 3, 1) if length % s == 0)
    sizes = {"B": batch, "N": length, "S": segments, "1": 1, "K": ROWS, "D": width}

    def vector(axes: str) -> Tensor:
        return torch.randn(*[sizes[a] for a in axes[:-1]], 2 * width, generator=generator).chunk(2, dim=-1)[1]

    made = {
        "x": torch.randn(batch, length, 2 * width, generator=generator)[..., ::2],
        "branch": torch.randn(length, batch, width, generator=generator).transpose(0, 1),
        **{name: vector(axes) for name, axes in zip(MODULATION, KINDS[kind])},
        **{name: torch.randn(width, generator=generator) for name in ("branch_bias", "weight", "bias")},
    }
    kept = [n for n in TAKES[op] if present == "all" or n in ("x", "branch") or n in present.split()]
    inputs = {n: made[n].to(stream if n == "x" else others) for n in kept}
    if "index" in kind:
        index = torch.randint(0, ROWS, (length, batch), generator=generator).t()
        index[:1][index[:1] == 1] = 2
        inputs["index"] = index
    return inputs


def results(op: str, inputs: dict[str, Tensor], needs: str = "", **options: object) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Of the op, of plain PyTorch at the same dtypes and in fp64: outputs, then gradients of all inputs, or of ``needs`` alone."""
    needed = needs.split() or [n for n in inputs if n != "index"]
    generator = torch.Generator().manual_seed(1)
    cotangents: list[Tensor] = []
    collected = []
    for function, wide in ((getattr(norm, op), False), (getattr(reference, op), False), (getattr(reference, op), True)):
        leaves = {
            n: v if n == "index" else (v.double() if wide else v).detach().requires_grad_(n in needed) for n, v in inputs.items()
        }
        chosen = {**options, "out_dtype": F64} if wide and "out_dtype" in options else options
        outputs = function(**leaves, **chosen)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not cotangents:
            cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
        reached = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents) if o.requires_grad]
        grads = torch.autograd.grad([o for o, _ in reached], [leaves[n] for n in needed], [c for _, c in reached])
        collected.append([*outputs, *grads])
    names = [f"output {i}" for i in range(len(cotangents))] + [f"d{n}" for n in needed]
    return list(zip(names, *collected, strict=True))


def assert_parity(op: str, inputs: dict[str, Tensor], needs: str = "", **options: object) -> None:
    for name, actual, low, exact in results(op, inputs, needs, **options):
        assert (actual.shape, actual.dtype) == (low.shape, low.dtype), f"{op} {name}"
        numerics.assert_contract(actual, low, exact, f"{op} {name}")


def run(op: str, inputs: dict[str, Tensor], function: Callable[..., object] | None = None) -> list[Tensor]:
    """Outputs and all gradients of the op, for a fixed random cotangent."""
    leaves = {n: v if n == "index" else v.detach().requires_grad_() for n, v in inputs.items()}
    outputs = (function or getattr(norm, op))(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [v for v in leaves.values() if v.requires_grad], cotangents)]


# Each pair of (batch, length, width, stream dtype, others' dtype, norm) values that matters occurs in some row.
COVERING = [
    (3, 6, 384, F32, F32, "layernorm"),
    (2, 18, 96, F32, BF16, "rmsnorm"),
    (3, 12, 100, BF16, BF16, "layernorm"),
    (1, 17, 1152, F16, F16, "rmsnorm"),
    (4, 1, 45, BF16, F32, "layernorm"),
    (2, 120, 7, F32, F16, "rmsnorm"),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", COVERING, ids=lambda c: "-".join(str(v).replace("torch.", "") for v in c))
def test_parity(op: str, kind: str, case: tuple, on_both_backends: str) -> None:  # noqa: F811
    *shape, stream, others, which = case
    options = {} if op == "gated_residual" else {"norm": which, "out_dtype": others}
    with as_ops(on_both_backends):
        assert_parity(op, make_inputs(op, kind, *shape, stream, others), **options)


@pytest.mark.parametrize("kind", ["tokens", "index"])
@pytest.mark.parametrize("op", OPS)
def test_every_combination_of_optional_arguments(op: str, kind: str) -> None:
    optional = [n for n in TAKES[op] if n not in ("x", "branch")]
    norms = itertools.cycle(reference.NORMS)
    for count in range(1, len(optional) + 1):
        for names in itertools.combinations(optional, count):
            if set(names) & set(MODULATION):
                inputs = make_inputs(op, kind, 2, 4, 11, F32, F32, " ".join(names))
                assert_parity(op, inputs, **({} if op == "gated_residual" else {"norm": next(norms)}))


@pytest.mark.parametrize("kind", ["tokens", "index of a sample"])
@pytest.mark.parametrize("op", OPS)
def test_formulas_by_gradcheck(op: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    formulas = {
        "modulate_norm": (by_token.norm_forward, by_token.norm_backward),
        "gated_residual": (by_token.residual_forward, by_token.residual_backward),
        "gated_residual_norm": (by_token.residual_norm_forward, by_token.residual_norm_backward),
    }
    run_formulas(monkeypatch, f"{op}_by_token", *formulas[op])
    for which in reference.NORMS:
        inputs = make_inputs(op, kind, 2, 4, 5, F64, F64)
        index = inputs.pop("index", None)
        leaves = {n: v.detach().requires_grad_() for n, v in inputs.items()}
        options = {} if op == "gated_residual" else {"norm": which}
        call = lambda *values: getattr(norm, op)(**dict(zip(leaves, values)), index=index, **options)  # noqa: B023, E731
        assert torch.autograd.gradcheck(call, list(leaves.values()))


@pytest.mark.parametrize("kind", ["tokens", "index of a sample"])
@pytest.mark.parametrize("op", OPS)
def test_each_subset_of_inputs_gets_the_gradients_it_gets_among_all(op: str, kind: str, on_both_backends: str) -> None:  # noqa: F811
    """And what is saved is what the wanted gradients need, once."""
    inputs = make_inputs(op, kind, 2, 6, 12, F32, F32)
    declaration = dispatch.OPS[f"{op}_by_token"].declaration
    tensors = [n for n in inputs if n != "index"]

    def gradients(needed: tuple[str, ...]) -> tuple[dict[str, Tensor], int]:
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.is_floating_point()
            return tensor

        leaves = {n: v if n == "index" else v.detach().requires_grad_(n in needed) for n, v in inputs.items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), as_ops(on_both_backends):
            outputs = getattr(norm, op)(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(o.shape, generator=generator) for o in outputs]
        return dict(zip(needed, torch.autograd.grad(outputs, [leaves[n] for n in needed], cotangents))), saved

    everything, _ = gradients(tuple(tensors))
    made = {*tensors, "x1", "stats"}
    for count in (1, 2, len(tensors) - 1):
        for needed in itertools.combinations(tensors, count):
            got, saved = gradients(needed)
            for name, gradient in got.items():
                torch.testing.assert_close(gradient, everything[name], msg=f"d{name} where {needed}")
            names = declaration.saved([given.name in needed for given in declaration.inputs])
            assert saved == len(made & set(names)), (needed, names)


def check_dshift_of_the_op() -> None:
    """The op itself gives dshift per token too; the public function hands dh on."""
    op = dispatch.OPS["modulate_norm_by_token"].gradients
    args = raw_arguments(op.declaration, "tokens")
    _, dshift, *_ = op.call(*args, dispatch.backend_setting() or "auto")
    torch.testing.assert_close(dshift, args[0], rtol=0, atol=0)


def test_dshift_of_the_op(on_both_backends: str) -> None:  # noqa: F811
    check_dshift_of_the_op()


def raw_arguments(declaration: Declaration, kind: str, unwanted: str = "") -> tuple[object, ...]:
    """Arguments of an op by token of torch: leaves for the inputs of a forward."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, ROWS, (2, 6), generator=generator)
    sizes = {"B": 2, "N": 6, "D": 12, "S": 2, "K": ROWS if kind == "index" else 6, "L": ROWS + 1}
    made = {name: torch.rand(shape, generator=generator) for name, shape in declaration.shapes(sizes).items()}
    if not declaration.is_backward:
        made = {name: tensor.requires_grad_() for name, tensor in made.items()}
    groups = dict(zip(("index", "order", "starts"), (index, *vectors.grouped(index, ROWS)) if kind == "index" else [None] * 3))
    wanted = [None if output.name.removeprefix("d") in unwanted.split() else F32 for output in declaration.outputs]
    options = {"norm": "layernorm", "eps": 1e-6, "out_dtype": BF16, "keep": True, "wanted": encoded(tuple(wanted))}
    given = {**options, **made, **groups}
    return tuple(given[name] for name in declaration.arguments)


@pytest.mark.parametrize("kind", ["tokens", "index"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, kind: str) -> None:
    declared = dispatch.OPS[f"{op}_by_token"]
    torch.library.opcheck(declared.call, raw_arguments(declared.declaration, kind))
    for unwanted in ("", "x gate shift", "branch scale branch_bias bias"):
        torch.library.opcheck(declared.gradients.call, raw_arguments(declared.gradients.declaration, kind, unwanted))


@pytest.mark.parametrize(
    "op, kind",
    [
        pytest.param(op, kind, marks=[] if op == "gated_residual_norm" or kind == "tokens" else pytest.mark.slow)
        for op, kind in itertools.product(OPS, KINDS)
    ],
)
def test_compiles_as_one_graph(op: str, kind: str, on_both_backends: str) -> None:  # noqa: F811
    inputs = make_inputs(op, kind, 2, 6, 12, F32, F32)
    compiled = torch.compile(getattr(norm, op), fullgraph=True, backend="aot_eager")
    found = run(op, inputs, compiled)
    with as_ops(on_both_backends):
        wanted = run(op, inputs)
    assert all(map(torch.equal, found, wanted))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", OPS)
def test_repeats_bit_for_bit_and_writes_every_output(op: str, kind: str) -> None:
    inputs = make_inputs(op, kind, 3, 18, 100, BF16, BF16)
    first = run(op, inputs)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        second = run(op, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("shape", [(0, 6, 12), (2, 0, 12)])
@pytest.mark.parametrize("kind", ["shared", "tokens", "index"])
@pytest.mark.parametrize("op", OPS)
def test_nothing_in_gives_nothing_out_and_zero_gradients(op: str, kind: str, shape: tuple[int, int, int]) -> None:
    inputs = make_inputs(op, kind, *shape, F32, F32)
    assert all((gradient == 0).all() for gradient in run(op, inputs))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kind", ["tokens", "index"])
def test_gradient_through_one_output_alone(kind: str, which: int) -> None:
    inputs = make_inputs("gated_residual_norm", kind, 2, 6, 12, F32, F32)

    def gradients(function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = {n: v if n == "index" else v.to(dtype).detach().requires_grad_() for n, v in inputs.items()}
        needed = [v for n, v in leaves.items() if n != "index"]
        loss = function(**leaves)[which].square().sum()
        return torch.autograd.grad(loss, needed, allow_unused=True, materialize_grads=True)

    plain = reference.gated_residual_norm
    found = gradients(norm.gated_residual_norm, F32), gradients(plain, F32), gradients(plain, F64)
    for actual, rounded, ideal, name in zip(*found, inputs):
        numerics.assert_contract(actual, rounded, ideal, f"d{name} through output {which}")


def test_int32_index_and_autocast() -> None:
    inputs = make_inputs("gated_residual_norm", "index", 2, 6, 12, F32, BF16)
    with torch.autocast("cpu", dtype=BF16):
        stream, normed = norm.gated_residual_norm(**inputs)
        narrow = norm.gated_residual_norm(**{**inputs, "index": inputs["index"].int()})
    assert (stream.dtype, normed.dtype) == (F32, BF16)
    assert torch.equal(stream, narrow[0])
    assert torch.equal(normed, narrow[1])


class Addresses(TorchDispatchMode):
    """Where an op of ours found x, and where it put its result."""

    def __torch_dispatch__(
        self, func: Callable[..., Tensor], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if func is dispatch.OPS["gated_residual"].call:
            self.found, self.put = args[0].data_ptr(), made.data_ptr()
        return made


def test_a_segment_of_a_contiguous_tensor_is_a_view() -> None:
    """So the op that runs is the one of vectors per sample, on the memory of x and of the result."""
    x, gate = torch.randn(2, 6, 12), torch.randn(2, 3, 12)
    with Addresses() as addresses:
        x1 = norm.gated_residual(x, x, gate)
    assert (addresses.found, addresses.put) == (x.data_ptr(), x1.data_ptr())


BAD = [
    ({"gate": torch.zeros(1, 12)}, r"gate: got shape \(1, 12\), expected"),
    (
        {"gate": torch.zeros(2, 4, 12)},
        r"gate: got shape \(2, 4, 12\), expected \(12,\), \(2, 12\) or \(2, S, 12\) where S divides 6",
    ),
    ({"scale": torch.zeros(2, 3, 11)}, r"scale: got shape \(2, 3, 11\)"),
    ({"shift": torch.zeros(3, 2, 12)}, r"shift: got shape \(3, 2, 12\)"),
    ({"gate": torch.zeros(1, 2, 6, 12)}, r"gate: got shape \(1, 2, 6, 12\)"),
    ({"gate": torch.zeros(())}, r"gate: got shape \(\)"),
    ({"gate": torch.zeros(12), "branch": torch.zeros(2, 5, 12)}, r"branch: got shape \(2, 5, 12\), expected \(2, 6, 12\)"),
    ({"gate": torch.zeros(12), "x": torch.zeros(6, 12)}, r"x: got shape \(6, 12\)"),
    ({"index": torch.zeros(2, 5, dtype=torch.int64)}, r"index: got shape \(2, 5\), expected \(2, 6\)"),
    ({"index": torch.zeros(2, 6)}, r"index: got dtype torch.float32, allowed are torch.int64, torch.int32"),
    ({"index": torch.full((2, 6), 2)}, r"index: got row 2, allowed are 0\.\.1"),
    ({"index": torch.full((2, 6), -1)}, r"index: got row -1, allowed are 0\.\.1"),
    (
        {"index": torch.zeros(2, 6, dtype=torch.int64), "scale": torch.zeros(3, 12)},
        "scale: got 3 rows, but an earlier vector has 2",
    ),
    ({"index": torch.zeros(2, 6, dtype=torch.int64), "scale": torch.zeros(3, 2, 12)}, r"scale: got shape \(3, 2, 12\)"),
    (
        {"index": torch.zeros(2, 6, dtype=torch.int64), "gate": None, "shift": None, "scale": None},
        r"index: given without a vector of several rows, \(K, 12\) or \(2, K, 12\)",
    ),
]


@pytest.mark.parametrize("change, words", BAD)
def test_errors_name_the_argument(change: dict, words: str) -> None:
    """Also after the bad call itself, and on the whole way."""
    generator = torch.Generator().manual_seed(0)
    inputs = {n: torch.randn(2, 6, 12, generator=generator) for n in ("x", "branch")}
    inputs |= {n: torch.randn(2, 12, generator=generator) for n in MODULATION}
    norm.gated_residual_norm(**inputs)
    for _ in range(2):
        with pytest.raises((ValueError, TypeError), match=words):
            norm.gated_residual_norm(**{**inputs, **change})
    with WholeWay(), pytest.raises((ValueError, TypeError), match=words):
        norm.gated_residual_norm(**{**inputs, **change})


def test_a_compiled_graph_refuses_an_index_out_of_range() -> None:
    inputs = make_inputs("modulate_norm", "index", 2, 6, 12, F32, F32)
    compiled = torch.compile(norm.modulate_norm, fullgraph=True, backend="aot_eager")
    compiled(**inputs)
    with pytest.raises(RuntimeError, match=r"index: a row is outside 0\.\.2"):
        compiled(**{**inputs, "index": inputs["index"] + 1})


def test_the_ops_themselves_say_what_does_not_fit() -> None:
    declared = dispatch.OPS["gated_residual_by_token"]
    x, gate = torch.randn(2, 6, 12), torch.randn(2, 4, 12)
    with pytest.raises(ValueError, match="gate: got 4 rows for 6 tokens, and no index"):
        declared.call(x, x, gate, None, None, None, None)
    with pytest.raises(TypeError, match=r"index: got dtype torch\.float32"):
        declared.call(x, x, gate, None, torch.zeros(2, 6), None, None)


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused(op: str) -> None:
    inputs = make_inputs(op, "tokens", 2, 6, 12, F32, F32)
    call = lambda x: getattr(norm, op)(**{**inputs, "x": x})  # noqa: E731
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        call(torch.autograd.forward_ad.make_dual(inputs["x"], inputs["x"]))


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_torch_func_run_the_reference(kind: str) -> None:
    inputs = make_inputs("gated_residual_norm", kind, 2, 6, 12, F64, F64)

    def loss(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        return lambda x: sum(out.square().sum() for out in function(**{**inputs, "x": x}))

    got, want = (torch.func.grad(loss(f))(inputs["x"]) for f in (norm.gated_residual_norm, reference.gated_residual_norm))
    torch.testing.assert_close(got, want)
