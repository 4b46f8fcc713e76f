"""The CPU library as a whole: its objects, instruction sets, functions, threads, planted faults, and what is said without it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditkernels import ops, reference
from ditkernels.ops import _native, dispatch
from ditkernels.ops.spec import _CODES as CODES
from tests import numerics
from tests.helpers.native_cpu import needs_library
from tools import build_native
from tools.tree import ROOT

TORCH = Path(torch.__file__).parent
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 machine code")
needs_binutils = pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump and nm")

# ---- Objects ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The objects of the library, all instruction sets: those that `make test` has just built, or new ones."""
    if build_native.find_cxx() is None:
        pytest.skip("needs a C++ compiler")
    made = [ROOT / "build/cpu" / name for name, _, _ in build_native.cpu_objects(platform.machine())]
    newest = max(path.stat().st_mtime for path in (*build_native.CPU_CSRC.iterdir(), Path(build_native.__file__)))
    if all(path.exists() and path.stat().st_mtime > newest for path in made):
        return ROOT / "build/cpu"
    out = tmp_path_factory.mktemp("objects")
    build_native.build_cpu_library(out, build_native.find_cxx(), TORCH)
    return out


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_binutils
def test_objects_of_an_instruction_set_define_no_name_that_a_linker_may_merge(objects: Path) -> None:
    """Of two weak definitions the linker keeps either, so a lesser processor could run code of a better one and crash."""
    made = sorted(objects.glob("*.*.o"))
    assert {path.name.split(".")[1] for path in made} == set(build_native.INSTRUCTION_SETS[platform.machine()][1])
    for path in made:
        names = [line.split()[-2:] for line in output_of("nm", "--defined-only", str(path)).splitlines()]
        assert [name for kind, name in names if kind in "WVuw"] == [], path.name
        assert [name for kind, name in names if kind in "TDRB"] != [], path.name


@on_x86
@needs_binutils
def test_what_chooses_among_instruction_sets_needs_none(objects: Path) -> None:
    for path in objects.glob("*.o"):
        if path.name.count(".") == 1:
            code = output_of("objdump", "-d", "--no-show-raw-insn", str(path))
            assert re.search(r"\bv[a-z]+[ps][sd]?\b|%[yz]mm\d", code) is None, path.name


# ---- Instruction sets ------------------------------------------------------------------------------------------------


@needs_library
@on_x86
def test_an_older_processor_is_refused_with_a_reason_and_a_forced_set_is_checked() -> None:
    of = torch.ops.ditkernels.cpu_isa_of
    assert [of(count, "") for count in (1, 2, 3)] == ["avx2", "avx512", "avx512_bf16"]
    assert of(3, "avx2") == "avx2"
    with pytest.raises(RuntimeError, match=r"this processor is older than x86-64-v3 .* the torch backend serves"):
        of(0, "")
    with pytest.raises(RuntimeError, match=r"DITKERNELS_CPU_ISA: got 'avx512', this processor and this library have avx2"):
        of(1, "avx512")


def in_a_process(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_library
def test_a_set_that_this_processor_has_not_makes_auto_choose_torch_and_says_why() -> None:
    program = (
        "import torch\n"
        "from ditkernels import ops, use_backend, BackendError\n"
        "assert ops.bias_gelu(torch.zeros(1, 2, 3)).shape == (1, 2, 3)\n"
        "with use_backend('cpu'):\n"
        "    try: ops.bias_gelu(torch.zeros(1, 2, 3))\n"
        "    except BackendError as error: print(error)\n"
    )
    assert "DITKERNELS_CPU_ISA: got 'neon9'" in in_a_process(program, DITKERNELS_CPU_ISA="neon9")


@needs_library
@pytest.mark.parametrize("isa", build_native.INSTRUCTION_SETS.get(platform.machine(), ((), {}))[1])
def test_every_op_is_right_on_every_instruction_set_of_this_processor(isa: str) -> None:
    if f"got '{isa}'" in in_a_process("from ditkernels.ops import _native; print(_native.cpu_library())", DITKERNELS_CPU_ISA=isa):
        pytest.skip(f"this processor has no {isa}")
    command = [sys.executable, "-m", "ditkernels", "check", "--backend", "cpu", "--device", "cpu"]
    done = subprocess.run(command, env={**os.environ, "DITKERNELS_CPU_ISA": isa}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checks passed" in done.stdout


# ---- exp and the logistic function -----------------------------------------------------------------------------------


def every_exponent(negative_alone: bool) -> torch.Tensor:
    """fp32 numbers of every exponent, 64 mantissas each, and the special ones."""
    generator = torch.Generator().manual_seed(0)
    mantissas = torch.randint(0, 1 << 23, (255, 64), generator=generator, dtype=torch.int32)
    bits = (torch.arange(255, dtype=torch.int32)[:, None] << 23) | mantissas
    positive = torch.cat([bits.flatten().view(torch.float32), torch.tensor([0.0, float("inf")])])
    return -positive if negative_alone else torch.cat([positive, -positive])


def ulps(actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Error in units in the last place of the exact value; those of the smallest normal number below it."""
    _, exponent = torch.frexp(exact.abs().clamp_min(2.0**-126))
    return (actual.double() - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent - 24)


@needs_library
def test_the_stated_errors_of_exp_and_of_the_logistic_function() -> None:
    x = every_exponent(negative_alone=True)
    got, exact = torch.ops.ditkernels.cpu_exp_of_negative(x), torch.exp(x.double())
    above = x >= -87.33
    assert ulps(got[above], exact[above]).max() <= 1.1
    assert torch.equal(got[~above], torch.zeros_like(got[~above]))
    x = every_exponent(negative_alone=False)
    got, exact = torch.ops.ditkernels.cpu_sigmoid(x), torch.sigmoid(x.double())
    normal = exact >= 2.0**-125
    assert ulps(got[normal], exact[normal]).max() <= 3
    assert (got[~normal].double() - exact[~normal]).abs().max() <= 2.0**-125
    nan = torch.tensor([float("nan")])
    assert torch.ops.ditkernels.cpu_exp_of_negative(nan).isnan().all()
    assert torch.ops.ditkernels.cpu_sigmoid(nan).isnan().all()


# ---- Threads ---------------------------------------------------------------------------------------------------------

BITS = """
import hashlib, sys, torch
from ditkernels import ops, reference
from tests.ops import test_adaln, test_adamw_ema, test_bias_gelu, test_modulations, test_qkv
torch.set_num_threads(int(sys.argv[1]))
F32, BF16 = torch.float32, torch.bfloat16
made = []
for op in test_adaln.OPS:
    for batch, length, width, stream, branch in ((3, 157, 384, F32, F32), (1, 300, 200, BF16, BF16), (2, 90, 1152, F32, BF16)):
        made += test_adaln.run(getattr(ops, op), test_adaln.make_inputs(op, batch, length, width, stream, branch))
        for kind in ("tokens", "index", "index of a sample"):
            made += test_modulations.run(op, test_modulations.make_inputs(op, kind, batch, length, width, stream, branch))
for dtype in (F32, BF16):
    made += test_bias_gelu.run(ops.bias_gelu, test_bias_gelu.make_inputs((3, 157, 700), dtype, F32))
    made += test_qkv.backward(test_qkv.gradients((3, 157, 3, 4, 24), dtype, "heads first"))
made += [t for tensors in test_adamw_ema.updated(ops.adamw_ema, test_adamw_ema.make_state()).values() for t in tensors]
made += [ops.unpatchify(torch.randn(8, 256, 64, generator=torch.Generator().manual_seed(0)), grid=(16, 16), patch_size=4)]
digest = hashlib.sha256()
for tensor in made:
    digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@needs_library
def test_bits_depend_on_neither_the_run_nor_the_number_of_threads() -> None:
    def of(threads: int) -> str:
        command = [sys.executable, "-c", BITS, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert len({of(threads) for threads in (1, 1, 2, 4)}) == 1


# ---- Layouts and sizes -----------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("op", ["modulate_norm", "gated_residual_norm"])
def test_constant_rows_have_their_exact_mean_and_no_variance(op: str) -> None:
    for width in (5, 8, 384, 1153):
        x = torch.full((1, 3, width), 0.1) * torch.tensor([1.0, 1e3, -7e6])[:, None]
        h = ops.modulate_norm(x) if op == "modulate_norm" else ops.gated_residual_norm(x, torch.zeros_like(x))[1]
        assert torch.equal(h, torch.zeros_like(h)), width


@needs_library
def test_strides_beyond_2_to_the_31_bytes() -> None:
    far = torch.empty_strided((2, 2, 40), (3 << 28, 1 << 28, 1), dtype=torch.float32)
    near = torch.randn(2, 2, 40)
    far.copy_(near)
    with dispatch.use_backend("cpu"):
        assert torch.equal(ops.modulate_norm(far), ops.modulate_norm(near))
        assert torch.equal(ops.bias_gelu(far), ops.bias_gelu(near))


# ---- Planted faults --------------------------------------------------------------------------------------------------

# family: (what stands in its source, what a careless hand might write)
FAULTS = {
    "norm": [
        ("sums[j] += apart;", "sums[0] = apart;"),
        (" + 0.0f * variance;", ";"),
        ("if (a.width < SHORT || !(variance > apart * apart))", "if (false)"),
        ("(1.0f + load(given + i, reach)) * load(of_norm + i, reach)", "load(given + i, reach) * load(of_norm + i, reach)"),
        ("values_of(row_of(a.gate, row), sample, a.width", "values_of(row_of(a.gate, row), 0, a.width"),
        ("if (a.rms) means.dnormed = 0.0f;", ""),
        ("add(rs + width + i, reach, dx);", ""),
        ("load(bias + i, reach) * s);\n    add(shared", "s);\n    add(shared"),
        ("if (stream == HALF) stream = FLOAT;", "if (stream == HALF) stream = BFLOAT16;"),
        ("first, last < end ? last : end}", "first, last < end ? last - 1 : end}"),
        ("store(dbranch + i, reach, load(gate + i, reach) * dx)", "store(dbranch + i, reach, dx)"),
        # by token and by index
        ("return a.index != nullptr ? a.index[at] : at % a.tokens;", "return at % a.tokens;"),
        ("const Vector scale = row_of(a.scale, row);", "const Vector scale = a.scale;"),
        ("values_of(row_of(a.shift, row), sample, a.width", "values_of(a.shift, sample, a.width"),
        (
            "sample = group / a.rows, row = group % a.rows;\n  int64_t begin",
            "sample = group % a.rows, row = group / a.rows;\n  int64_t begin",
        ),
        ("begin = starts[0], end = starts[1]", "begin = starts[0] + 1, end = starts[1]"),
        ("share = (end - begin + a.chunks - 1) / a.chunks", "share = (end - begin) / a.chunks"),
        ("a.order == nullptr ? place : a.order[span.sample * a.tokens + place]", "place"),
        ("values_of(row_of(a.gate, span.row), span.sample", "values_of(a.gate, span.sample"),
        (
            "const Of of = {a, group / a.rows, group % a.rows, from, size};\n  add_chunks(a.pq",
            "const Of of = {a, group / a.rows, 0, from, size};\n  add_chunks(a.pq",
        ),
        ("dx * (load(row.branch + i, reach) + load(branch_bias + i, reach))", "dx * load(row.branch + i, reach)"),
        ("if (rs != nullptr) add(rs + width + i, reach, dbranch);", "if (rs != nullptr) add(rs + width + i, reach, dx);"),
        ("gradient * (normed * load(weight + i, reach) + load(bias + i, reach))", "gradient * normed * load(weight + i, reach)"),
        ("add(pq + width + i, reach, modulated * normed);", "add(pq + width + i, reach, gradient * normed);"),
        ("const float mean = a.rms ? 0.0f : total(sums) / width", "const float mean = total(sums) / width"),
    ],
    "gelu": [
        ("return z * chosen(steep, logistic(steep));", "return z * logistic(steep).above;"),
        ("(STEEP + 3.0f * CUBIC * square)", "(STEEP + CUBIC * square)"),
        ("if constexpr (SUM) add(sums + i, reach, gradient);", ""),
    ],
    "qkv": [
        ("sums += part.head_dim;", ""),
        ("made.head == made.head_dim * made.channel", "made.head >= made.head_dim"),
    ],
    "optimizer": [
        ("if (!step.skipped) *taken += 1.0f;", "*taken += 1.0f;"),
        ("average + s.towards * (value - average)", "average + s.towards * value"),
        ("while (owner + 1 < first.size() && first[owner + 1] <= piece) ++owner;", ""),
    ],
    "image": [
        ("gathered.rounding = dtype_of(weight);", ""),
    ],
}
PARITY = {
    "norm": (
        "tests/ops/test_adaln.py tests/ops/test_constant_rows.py tests/ops/test_modulations.py"
        " -k chosen-and-(parity-or-combination)-or-cpu-and-(huge-or-overflows)"
    ),
    "gelu": "tests/ops/test_bias_gelu.py -k chosen-and-(parity-or-tails-or-subset)",
    "qkv": "tests/ops/test_qkv.py -k chosen-and-(parity-or-subset)",
    "optimizer": "tests/ops/test_adamw_ema.py -k chosen-and-(parity-or-skipped-or-formula)",
    "image": "tests/ops/test_patch_embed.py -k chosen-and-rounded",
}


def with_fault(objects: Path, out: Path, family: str, genuine: str, fault: str) -> Path:
    """A library with a fault in the kernels of one family for the least instruction set; all other objects are as they are."""
    source = ROOT / f"csrc/cpu/{family}.cpp"
    text = source.read_text(encoding="utf-8")
    assert text.count(genuine) == 1, f"{family}: {genuine!r} stands there {text.count(genuine)} times"
    (out / source.name).write_text(text.replace(genuine, fault), encoding="utf-8")
    sets = build_native.INSTRUCTION_SETS[platform.machine()][1]
    least, flags = next(iter(sets.items()))
    host = build_native.INSTRUCTION_SETS[platform.machine()][0]
    start = [build_native.find_cxx(), *build_native.CPU_FLAGS, "-isystem", str(TORCH / "include"), f"-I{source.parent}"]
    made = {f"{family}.o": host, f"{family}.{least}.o": (*flags, f"-DDITKERNELS_ISA={least}")}
    for name, chosen in made.items():
        subprocess.run([*start, *chosen, "-c", str(out / source.name), "-o", str(out / name)], check=True)
    rest = [str(path) for path in objects.glob("*.o") if path.name not in made]
    library = out / "_cpu.so"
    linked = [start[0], "-shared", *rest, *(str(out / name) for name in made), f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    subprocess.run([*linked, "-o", str(library)], check=True)
    return library


def parity(family: str, library: Path) -> subprocess.CompletedProcess[str]:
    """A family's tests of parity on a library, with the least instruction set."""
    least = next(iter(build_native.INSTRUCTION_SETS[platform.machine()][1]))
    files, _, chosen = PARITY[family].partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", *files.split(), "-k", chosen.replace("-", " ")]
    environment = {**os.environ, "DITKERNELS_CPU_LIBRARY": str(library), "DITKERNELS_CPU_ISA": least}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("family", FAULTS)
def test_the_kernels_as_they_are_pass(family: str, objects: Path, tmp_path: Path) -> None:
    genuine = FAULTS[family][0][0]
    done = parity(family, with_fault(objects, tmp_path, family, genuine, genuine))
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("family, genuine, fault", [(family, *pair) for family, pairs in FAULTS.items() for pair in pairs])
def test_planted_faults_are_found(family: str, genuine: str, fault: str, objects: Path, tmp_path: Path) -> None:
    done = parity(family, with_fault(objects, tmp_path, family, genuine, fault))
    assert done.returncode == 1, f"not found:\n{done.stdout[-2000:]}"


# ---- Loops on another machine ----------------------------------------------------------------------------------------

# By machine: its compiler, the flags of an instruction set, and what runs the program.
MACHINES = {
    "x86_64": ("c++", ("-march=x86-64-v3",), ()),
    "aarch64": ("aarch64-linux-gnu-g++", (), ("qemu-aarch64",)),
}


@pytest.fixture(scope="module")
def loops(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs the kernels' loops, built for a machine without torch."""
    compiler, flags, runner = MACHINES[request.param]
    for needed in (compiler, *runner):
        if shutil.which(needed) is None:
            pytest.skip(f"needs {needed}")
    program = tmp_path_factory.mktemp("loops") / request.param
    source = ROOT / "tests/ops/cpu_proof/loops.cpp"
    subprocess.run([compiler, *build_native.CPU_FLAGS, *flags, "-static", str(source), "-o", str(program)], check=True)
    return [*runner, str(program)]


def through(loops: list[str], case: list[int], given: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """What the program makes of a case: outputs of these shapes, fp32."""
    sent = torch.tensor(case).numpy().tobytes() + b"".join(t.float().contiguous().numpy().tobytes() for t in given)
    out = subprocess.run(loops, input=sent, capture_output=True, check=True).stdout
    flat = torch.frombuffer(bytearray(out), dtype=torch.float32)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    assert flat.numel() == sum(sizes)
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes)]


def differentiated(function: Callable[..., Any], inputs: list[Tensor], cotangents: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    made = function(*leaves, **options)
    made = made if isinstance(made, tuple) else (made,)
    grads = torch.autograd.grad(made, leaves, [c.to(m.dtype) for c, m in zip(cotangents, made)])
    return [*made, *grads]


on_each_machine = pytest.mark.parametrize(
    "loops", ["x86_64", pytest.param("aarch64", marks=pytest.mark.slow)], indirect=True, scope="module"
)
on_each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@on_each_machine
@on_each_dtype
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("width", [7, 33, 96, 384])
def test_loops_of_the_norm_family_are_right_on_a_machine(width: int, norm: str, dtype: torch.dtype, loops: list[str]) -> None:
    generator = torch.Generator().manual_seed(width)
    rows, vectors = (2, 9, width), (2, width)
    x, branch, dx1, dh = (torch.randn(rows, generator=generator).to(dtype) for _ in range(4))
    gate, shift, scale = (torch.randn(vectors, generator=generator) for _ in range(3))
    case = [0, CODES[dtype], *rows, norm == "rmsnorm"]
    got = through(loops, case, [x, branch, gate, shift, scale, dx1, dh], [rows] * 4 + [vectors] * 3)
    inputs = [x, branch, gate, shift, scale]
    low, exact = (
        differentiated(reference.gated_residual_norm, [wide(t) for t in inputs], [dx1, dh], norm=norm, **options)
        for wide, options in ((lambda t: t, {"out_dtype": dtype}), (Tensor.double, {}))
    )
    names = ("x1", "h", "dx", "dbranch", "dgate", "dshift", "dscale")
    for actual, near, true, name in zip(got, low, exact, names, strict=True):
        numerics.assert_contract(actual.to(near.dtype), near, true, f"{name} at width {width}")


@on_each_machine
@on_each_dtype
def test_loops_of_gelu_are_right_on_a_machine(dtype: torch.dtype, loops: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = (2, 9, 133)
    x, dy = (3 * torch.randn(rows, generator=generator).to(dtype) for _ in range(2))
    bias = torch.randn(133, generator=generator)
    got = through(loops, [1, CODES[dtype], *rows, 0], [x, bias, dy], [rows, rows, (133,)])
    low, exact = (differentiated(reference.bias_gelu, [wide(x), wide(bias)], [dy]) for wide in (lambda t: t, Tensor.double))
    for actual, near, true, name in zip(got, low, exact, ("y", "dx", "dbias")):
        numerics.assert_contract(actual.to(near.dtype), near, true, name)


# ---- Without the library ---------------------------------------------------------------------------------------------


def absent(monkeypatch: pytest.MonkeyPatch, **environment: str) -> _native.Library:
    """A CPU library that is looked for where there is none."""
    monkeypatch.setattr(_native, "PACKAGE", Path("/nowhere"))
    monkeypatch.delenv("DITKERNELS_CPU_LIBRARY", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    library = _native.Library("CPU", "_cpu.so", "HOW")
    library.load_if_present()
    monkeypatch.setattr(_native, "CPU", library)
    dispatch.forget()
    return library


def test_the_first_call_without_the_library_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch)
    with pytest.warns(UserWarning, match="ditkernels runs on plain PyTorch here, since the CPU library has not been built"):
        ops.bias_gelu(torch.zeros(1, 2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.modulate_norm(torch.zeros(1, 2, 3))


def test_who_wants_no_library_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    library = absent(monkeypatch, DITKERNELS_CPU_LIBRARY="none")
    assert library.absence == "DITKERNELS_CPU_LIBRARY=none"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.bias_gelu(torch.zeros(1, 2, 3))


def test_a_forced_cpu_backend_that_cannot_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    if _native.CPU.absence is None:
        words = r"torch\.float64 is not among the kernels' dtypes"
        with dispatch.use_backend("cpu"), pytest.raises(dispatch.BackendError, match=words):
            ops.bias_gelu(torch.zeros(1, 2, 3, dtype=torch.float64))
    absent(monkeypatch, DITKERNELS_CPU_LIBRARY="/nowhere/_cpu.so")
    with (
        dispatch.use_backend("cpu"),
        pytest.raises(dispatch.BackendError, match=r"/nowhere/_cpu\.so is not loaded: .*No such file"),
    ):
        ops.bias_gelu(torch.zeros(1, 2, 3))


def test_the_record_of_the_installation_is_read(tmp_path: Path) -> None:
    (tmp_path / "_cpu_build.json").write_text(json.dumps({"absent": "no C++ compiler was found"}), encoding="utf-8")
    assert _native.CPU.why_not_built(tmp_path) == "the CPU library was not built: no C++ compiler was found"


def test_the_compiler_is_the_one_that_CXX_names_else_one_of_the_path(tmp_path: Path) -> None:
    compiler = tmp_path / "clang++"
    compiler.write_text("#!/bin/sh\n", encoding="utf-8")
    compiler.chmod(0o755)
    assert build_native.find_cxx({"PATH": str(tmp_path)}) == str(compiler)
    assert build_native.find_cxx({"PATH": str(tmp_path), "CXX": "clang++ -v"}) == str(compiler)
    assert build_native.find_cxx({"PATH": str(tmp_path), "CXX": "icpx"}) is None
    assert build_native.find_cxx({"PATH": "/nowhere"}) is None


def test_a_machine_without_rules_is_named(tmp_path: Path) -> None:
    with pytest.raises(build_native.BuildError, match=r"there is no rule for riscv64 .* x86_64 or aarch64"):
        build_native.build_cpu_library(tmp_path, "c++", TORCH, "riscv64")
