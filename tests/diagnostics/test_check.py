"""`ditkernels check`: passes on what is right, catches each kind of fault, and checks nothing vacuously."""

import io
import math
import re

import pytest
import torch

from ditkernels import cli, ops
from ditkernels.diagnostics import check
from ditkernels.ops import _native, dispatch, norm
from tests import numerics

CPU = torch.device("cpu")
FP32 = check.PRECISIONS[0]


def kind_of(chosen):
    """What the name of the op that a case reaches ends in, beside the public function's."""
    if "branch_norm" in chosen.options:
        return "_branch_norm"
    return "_by_token" if any(len(chosen.shapes.get(name, ())) == 3 for name in ("gate", "shift", "scale")) else ""


def cases_of(op):
    """Those of an op, vectors per sample of a branch as it is first."""
    return sorted((case for case in check.CASES if case.op == op), key=kind_of)


def case(op, index=0):
    return cases_of(op)[index]


def parity_of(op, index=0, precision=FP32, backend="torch"):
    chosen = case(op, index)
    return check.parity(chosen, chosen.inputs(precision, CPU), backend)


def replace_kernel(monkeypatch, op, wrap):
    """Puts ``wrap(kernel's own result)`` in the place of the torch kernel of ``op``."""
    implementation = dispatch.OPS[op].implementations["torch"]
    kernel = implementation.kernel
    monkeypatch.setattr(implementation, "kernel", lambda *args: wrap(kernel(*args)))


@pytest.fixture
def planted_kernels(monkeypatch):
    """Brings the thin way, on which a test may replace a kernel, to run the torch kernels forward and backward."""
    for op in dispatch.OPS.values():
        monkeypatch.setattr(op.implementations["torch"], "plain", None)


@pytest.fixture(scope="module")
def found():
    return list(check.results(CPU))


def test_everything_holds_here(found):
    assert check.passed(found), [result for result in found if result.failed]


def test_every_public_op_runs_in_fp32_and_bf16(found):
    ran = {(result.op, result.precision) for result in found if result.ratio is not None}
    assert {(op, precision) for op in ops.__all__ for precision in ("fp32", "bf16")} <= ran


def test_every_registered_op_and_its_backward_is_reached():
    reached = {call.op.name for chosen in check.CASES for call in check.recorded_calls(chosen, chosen.inputs(FP32, CPU))}
    assert reached == set(dispatch.OPS)


def test_every_backend_runs_or_says_why_not(found):
    expected = {(op, b) for op in ops.__all__ if op != "attention" for b in dispatch.BACKENDS}
    expected |= {("attention", b) for b in dispatch.ATTENTION_BACKENDS}
    assert {(result.op, result.backend) for result in found} == expected
    assert all(result.note for result in found)


def test_the_contract_is_the_suites():
    assert check.CONTRACT_FACTOR == numerics.CONTRACT_FACTOR
    assert check.CONTRACT_ULPS == numerics.CONTRACT_ULPS


def test_every_case_has_three_samples_and_every_op_an_odd_length():
    names = {
        "gated_residual": "x",
        "unpatchify": "tokens",
        "attention": "qkv_or_q",
        "patch_embed": "pos_embed",
    }
    odd = set()
    for chosen in check.CASES:
        first = next(iter(chosen.shapes.values()))
        assert first[0] == 3
        tokens = chosen.shapes.get(names.get(chosen.op, "x"), first)
        length = tokens[0] if chosen.op == "patch_embed" else tokens[1]
        odd |= {chosen.op} if length % 2 else set()
    assert odd == set(ops.__all__)


def test_an_update_that_is_slightly_off_fails(monkeypatch):
    implementation = dispatch.OPS["adamw_ema"].implementations["torch"]
    kernel = implementation.kernel

    def off(weights, *rest):
        kernel(weights, *rest)
        weights[0].mul_(1 + 1e-4)

    monkeypatch.setattr(implementation, "kernel", off)
    found = parity_of("adamw_ema")
    assert 1 < found.ratio < math.inf
    assert found.where == "weights"


def test_a_library_that_was_changed_fails_the_check(monkeypatch):
    monkeypatch.setattr(check, "CASES", (case("unpatchify"),))
    assert check.report(io.StringIO(), CPU, "torch")
    monkeypatch.setattr(_native.CPU, "changed", lambda: "_cpu.so is not the file that was built")
    shown = io.StringIO()
    assert not check.report(shown, CPU, "torch")
    assert "FAILED: _cpu.so is not the file that was built" in shown.getvalue()


def test_the_torch_kernels_are_checked_and_not_the_specification(monkeypatch):
    def specification(*args, **kwargs):
        raise AssertionError("called")

    monkeypatch.setattr(dispatch.OPS["modulate_norm"].implementations["torch"], "plain", specification)
    assert parity_of("modulate_norm").ratio <= 1


@pytest.mark.usefixtures("planted_kernels")
@pytest.mark.parametrize("name", sorted(dispatch.OPS.keys() - {"adamw_ema"}))
def test_a_kernel_that_is_slightly_off_fails(monkeypatch, name):
    forward = name.removesuffix("_backward")
    kind = next((kind for kind in ("_by_token", "_branch_norm") if forward.endswith(kind)), "")
    op = {"patchify": "unpatchify"}.get(name, forward.removesuffix(kind))

    def off(outputs):
        scale = 1 + 1e-4
        if not isinstance(outputs, tuple):
            return outputs * scale
        return tuple(None if o is None else o * scale for o in outputs)

    replace_kernel(monkeypatch, name, off)
    cases = [i for i, chosen in enumerate(cases_of(op)) if kind_of(chosen) == kind]
    worst = max(parity_of(op, i).ratio for i in cases[:2])
    assert 1 < worst < math.inf


@pytest.mark.usefixtures("planted_kernels")
def test_a_fault_in_one_of_an_ops_cases_is_enough(monkeypatch):
    implementation = dispatch.OPS["gated_residual"].implementations["torch"]
    kernel = implementation.kernel
    monkeypatch.setattr(implementation, "kernel", lambda *args: kernel(*args) + (args[2] is not None))
    monkeypatch.setattr(check, "CASES", (case("gated_residual", 0), case("gated_residual", 1)))
    assert case("gated_residual", 0).shapes.keys() == {"x", "branch"}
    assert [result.failed for result in check.results(CPU) if result.backend == "torch"] == [True] * 3


@pytest.mark.usefixtures("planted_kernels")
def test_a_mixed_up_batch_index_fails_and_names_the_gradient(monkeypatch):
    replace_kernel(monkeypatch, "modulate_norm_backward", lambda out: (*out[:2], out[2].roll(1, 0), *out[3:]))
    found = parity_of("modulate_norm")
    assert found.ratio > 1
    assert found.where == "dscale"


@pytest.mark.usefixtures("planted_kernels")
def test_a_bf16_kernel_is_held_to_bf16(monkeypatch):
    bf16 = check.PRECISIONS[1]
    replace_kernel(monkeypatch, "gated_residual", lambda out: out + 0.25)
    assert parity_of("gated_residual", precision=bf16).ratio > 1


@pytest.mark.parametrize(
    ("wrap", "complaint"),
    [
        (lambda out: out.double(), "torch.float64"),
        (lambda out: out[:, :1], "Mismatch in shape"),
        (lambda out: out.index_fill(0, torch.tensor([1]), math.nan), "output is not finite"),
    ],
)
def test_wrong_dtypes_shapes_and_nans_fail_and_are_named(monkeypatch, wrap, complaint):
    monkeypatch.setattr(ops, "gated_residual", lambda *a, **k: wrap(norm.gated_residual(*a, **k)))
    found = parity_of("gated_residual")
    assert found.ratio == math.inf
    assert complaint in found.where


def test_an_op_that_raises_fails_alone(monkeypatch):
    def broken(*args):
        raise RuntimeError("an illegal\n memory access")

    monkeypatch.setattr(dispatch.OPS["patch_embed"].implementations["torch"], "kernel", broken)
    monkeypatch.setattr(check, "CASES", (case("patch_embed"), case("unpatchify")))
    results = {(result.op, result.precision): result for result in check.results(CPU)}
    assert {key for key, result in results.items() if result.failed} == {
        ("patch_embed", "fp32"),
        ("patch_embed", "bf16"),
    }
    assert results["patch_embed", "fp32"].note == "RuntimeError: an illegal memory access"


def test_a_public_function_that_bypasses_its_op_is_no_pass(monkeypatch):
    monkeypatch.setattr(ops, "unpatchify", check.reference.unpatchify)
    monkeypatch.setattr(check, "CASES", (case("unpatchify"),))
    found = list(check.results(CPU))
    assert [result.ratio for result in found] == [None] * len(found)
    assert not check.passed(found)
    shown = io.StringIO()
    assert not check.report(shown)
    assert "FAILED: some op has no backend that serves here." in shown.getvalue()


def test_a_second_backend_is_found_and_checked(monkeypatch):
    forward, backward = dispatch.OPS["unpatchify"], dispatch.OPS["patchify"]
    for op, factor in ((forward, 1.0), (backward, 1.01)):
        plain = op.implementations["torch"]
        kernel = lambda *a, c=plain.kernel, f=factor: c(*a) * f  # noqa: E731
        made = dispatch.Implementation(kernel, plain.internal, lambda op, args: None)
        monkeypatch.setitem(op.implementations, "cuda", made)
    monkeypatch.setattr(check, "CASES", (case("unpatchify"),))
    failed = {(result.backend, result.note) for result in check.results(CPU) if result.failed}
    assert failed == {("cuda", "dtokens")}


def test_a_backend_without_a_backward_does_not_run(monkeypatch):
    kernel = dispatch.OPS["unpatchify"].implementations["torch"]
    monkeypatch.setitem(dispatch.OPS["unpatchify"].implementations, "cuda", kernel)
    monkeypatch.delitem(dispatch.OPS["patchify"].implementations, "cuda")
    chosen = case("unpatchify")
    reasons = check.refusals(chosen, chosen.inputs(FP32, CPU))
    assert reasons["torch"] is None
    assert reasons["cuda"] == "there is no cuda kernel of this op"


def test_the_inputs_are_the_same_on_every_run():
    chosen = case("final_layer", 1)
    first, second = chosen.inputs(FP32, CPU), chosen.inputs(FP32, CPU)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["x"], first["branch"])
    assert first["gate"].abs().min() > 0


def test_mixed_precision_lowers_all_but_the_stream():
    mixed = check.PRECISIONS[2]
    inputs = case("gated_residual_norm").inputs(mixed, CPU)
    assert inputs.pop("x").dtype == torch.float32
    assert {tensor.dtype for tensor in inputs.values()} == {torch.bfloat16}


@pytest.fixture
def nothing_interpreted(monkeypatch):
    """Leaves out the Triton kernels, which take most of a minute in the interpreter."""
    monkeypatch.setattr(check, "_interpreted", lambda: True)


@pytest.mark.usefixtures("nothing_interpreted")
def test_the_command_prints_a_table_and_the_verdict(capsys):
    assert cli.main(["check", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Checking every op against fp64 on the CPU, forward and every gradient"
    assert any(line.split()[:3] == ["gated_residual_norm", "torch", "fp32+bf16"] for line in lines)
    assert any("not run" in line and "flash_attn_3" in line and "CUDA" in line for line in lines)
    assert lines[-1].startswith("All ")


@pytest.mark.usefixtures("nothing_interpreted")
def test_the_command_fails_when_a_check_does(monkeypatch, capsys):
    replace_kernel(monkeypatch, "unpatchify", lambda out: out + 1)
    monkeypatch.setattr(check, "CASES", (case("unpatchify"), case("gated_residual")))
    assert cli.main(["check", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    backends = 1 if _native.CPU.absence else 2
    assert f"2 of {5 * backends} checks FAILED" in shown
    assert [line for line in shown.splitlines() if line.endswith("output  FAILED")]


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name, capsys):
    assert cli.main(["check", "--device", name]) == 2
    assert repr(name) in capsys.readouterr().err


def test_the_users_choice_of_backend_survives():
    with dispatch.use_backend("triton", attention="plain"):
        assert parity_of("unpatchify").ratio <= 1
        assert dispatch.backend_setting() == "triton"
        assert dispatch.attention_setting() == "plain"


@pytest.mark.usefixtures("other_default")
def test_the_processs_defaults_change_nothing(monkeypatch):
    monkeypatch.setattr(check, "CASES", tuple(case(op) for op in ops.__all__))
    found = list(check.results(CPU))
    assert check.passed(found), [result for result in found if result.failed]


@pytest.mark.slow
def test_the_triton_kernels_are_interpreted_in_a_process_of_their_own(capfd):
    assert cli.main(["check", "--device", "cpu", "--backend", "triton"]) == 0
    printed = capfd.readouterr().out
    assert "in Triton's interpreter" in printed
    assert re.search(r"gated_residual_norm +triton +fp32\+bf16", printed)
    assert not re.search(r"^ +\w+ +torch ", printed, re.MULTILINE)


def test_the_command_fails_when_the_interpreted_kernels_do(monkeypatch, capsys):
    monkeypatch.setattr(check, "CASES", (case("unpatchify"),))
    monkeypatch.setattr(check, "_interpreted", lambda: False)
    assert cli.main(["check", "--device", "cpu"]) == 1


def test_a_backend_that_is_not_here_has_checked_nothing(capsys):
    assert cli.main(["check", "--device", "cpu", "--backend", "cuda"]) == 1
    assert "cuda: " in capsys.readouterr().out
