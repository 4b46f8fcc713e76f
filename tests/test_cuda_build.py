"""Building the CUDA library: what is asked of it, what it refuses, and what an install without it says."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import nvcc
import pytest
import torch

from ditkernels.ops import _cuda, _measured, adaln
from ditkernels.ops import _registry as registry

ROOT = Path(__file__).parent.parent
DEFAULT = nvcc.DEFAULT_ARCHITECTURES
needs_nvcc = pytest.mark.skipif(nvcc.find_nvcc() is None, reason="needs nvcc")


def tools() -> nvcc.Toolchain:
    found = nvcc.find_nvcc()
    assert found is not None
    return nvcc.Toolchain(found, Path(torch.__file__).parent)


# ------------------------------------------------------------------------------------------------------------------
# What is asked for
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, ["8.0+PTX", "9.0a", "10.0+PTX"]),
        ("8.0;9.0a;10.0+PTX", ["8.0", "9.0a", "10.0+PTX"]),
        ("9.0 12.0f", ["9.0", "12.0f"]),
        ("5.2 7.5;8.6", ["8.6"]),
    ],
)
def test_architectures_in_torchs_own_words(text: str | None, expected: list[str]) -> None:
    assert list(map(str, nvcc.architectures(text))) == expected


@pytest.mark.parametrize(
    "text, said",
    [("Hopper", "got 'Hopper', allowed are"), ("8.0;90", "got '90'"), ("7.5", "need 8.0 or newer")],
)
def test_bad_architectures_are_named(text: str, said: str) -> None:
    with pytest.raises(nvcc.BuildError, match=said):
        nvcc.architectures(text)


def test_jobs_respect_memory_and_max_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc.os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(nvcc, "_available_memory", lambda: 7 * 2**30)
    assert nvcc.jobs({}) == 3
    monkeypatch.setattr(nvcc, "_available_memory", lambda: 2**20)
    assert nvcc.jobs({}) == 1
    assert nvcc.jobs({"MAX_JOBS": "5"}) == 5
    for bad in ("0", "many"):
        with pytest.raises(nvcc.BuildError, match=f"MAX_JOBS: got '{bad}'"):
            nvcc.jobs({"MAX_JOBS": bad})


def test_nvcc_may_be_a_wrapper_and_cuda_home_goes_first(tmp_path: Path) -> None:
    wrapper = tmp_path / "bin/nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(0o755)
    assert nvcc.find_nvcc({"PATH": str(wrapper.parent)}) == str(wrapper)
    assert nvcc.find_nvcc({"PATH": "/usr/bin", "CUDA_HOME": str(tmp_path)}) == str(wrapper)
    assert nvcc.find_nvcc({"PATH": str(wrapper.parent), "CUDA_HOME": "/nowhere"}) is None


def setup_options(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, Any]:
    """What setup.py would build, and why not the library, in this environment."""
    monkeypatch.delenv("DITKERNELS_BUILD_CUDA", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with mock.patch("setuptools.setup") as setup:
        reason = runpy.run_path(str(ROOT / "setup.py"))["REASON"]
    return {"reason": reason, **setup.call_args.kwargs}


def test_without_nvcc_the_install_is_pure_python_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    options = setup_options(monkeypatch, CUDA_HOME="/nowhere")
    assert "no nvcc was found" in options["reason"]
    assert "ext_modules" not in options


@needs_nvcc
def test_without_torch_the_install_is_pure_python_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    options = setup_options(monkeypatch)
    assert "torch could not be imported" in options["reason"]
    assert "--no-build-isolation" in options["reason"]
    assert "ext_modules" not in options


@needs_nvcc
def test_with_both_the_library_is_built_and_the_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    options = setup_options(monkeypatch)
    assert options["reason"] is None
    assert set(options["ext_modules"][0].sources) == {str(p.relative_to(ROOT)) for p in nvcc.sources()}
    assert setup_options(monkeypatch, DITKERNELS_BUILD_CUDA="0")["reason"] == (
        "DITKERNELS_BUILD_CUDA=0 was set at installation"
    )


@pytest.mark.parametrize(
    "value, said",
    [("1", "=1, but no nvcc was found .*DITKERNELS_BUILD_CUDA=0"), ("yes", "got 'yes', allowed are 0 and 1")],
)
def test_the_switch_is_an_order(value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=said):
        setup_options(monkeypatch, CUDA_HOME="/nowhere", DITKERNELS_BUILD_CUDA=value)


def test_the_build_requires_no_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    required = text[text.index("[build-system]") : text.index("[project]")]
    assert "torch" not in required


# ------------------------------------------------------------------------------------------------------------------
# Building
# ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A library of one function, whose value stands in a header."""
    (tmp_path / "value.h").write_text("#define VALUE 1\n")
    (tmp_path / "tiny.cu").write_text(
        '#include "value.h"\n'
        "__global__ void kernel(int* out) { *out = VALUE; }\n"
        'extern "C" __attribute__((visibility("default"))) int value() { return VALUE; }\n'
        'extern "C" __attribute__((visibility("default"))) const char* built() { return DITKERNELS_ARCHITECTURES; }\n'
    )
    return tmp_path / "tiny.cu"


def call(library: Path) -> tuple[int, str]:
    """Asked in a process of its own: a library is loaded once for all."""
    program = (
        "import ctypes, sys, torch\n"
        "made = ctypes.CDLL(sys.argv[1])\n"
        "made.built.restype = ctypes.c_char_p\n"
        "print(made.value(), made.built().decode())\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    value, built = done.stdout.split()
    return int(value), built


@needs_nvcc
def test_a_changed_header_rebuilds_and_nothing_else_does(tiny: Path, tmp_path: Path) -> None:
    def build() -> Path:
        return nvcc.build_library(tmp_path / "out", tools(), nvcc.architectures("8.0;9.0a+PTX"), [tiny])

    library = build()
    assert call(library) == (1, "8.0;9.0a+PTX")
    made = library.stat().st_mtime_ns
    assert build().stat().st_mtime_ns == made
    time.sleep(0.01)
    (tmp_path / "value.h").write_text("#define VALUE 2\n")
    assert call(build()) == (2, "8.0;9.0a+PTX")


@needs_nvcc
def test_a_failing_build_says_what_to_set(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text("no C++\n")
    with pytest.raises(nvcc.BuildError, match=r"MAX_JOBS=1 .* CUDA_HOME .* TORCH_CUDA_ARCH_LIST"):
        nvcc.build_library(tmp_path / "out", tools(), nvcc.architectures("9.0a"), [tiny])
    assert not (tmp_path / "out" / nvcc.LIBRARY).exists()


@needs_nvcc
def test_an_architecture_unknown_to_the_compiler_is_named(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(nvcc.BuildError, match=r"got 19\.0, this nvcc knows .*80.*90"):
        nvcc.build_library(tmp_path / "out", tools(), nvcc.architectures("19.0"), [tiny])


# ------------------------------------------------------------------------------------------------------------------
# Devices
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capability, built, path",
    [
        ((8, 0), DEFAULT, "machine code"),
        ((8, 9), DEFAULT, "machine code"),
        ((9, 0), DEFAULT, "machine code"),
        ((10, 0), DEFAULT, "machine code"),
        ((10, 3), DEFAULT, "machine code"),
        ((12, 0), DEFAULT, "PTX"),
        ((12, 0), "8.0;9.0a;10.0", None),
        ((10, 0), "9.0a+PTX", None),
        ((9, 0), "8.6", None),
        ((9, 0), "8.6+PTX", "PTX"),
        ((8, 0), "8.6+PTX", None),
        ((10, 3), "10.0a", None),
        ((10, 3), "10.0f", "machine code"),
    ],
)
def test_how_a_library_runs_on_a_device(capability: tuple[int, int], built: str, path: str | None) -> None:
    assert _cuda.path_on(capability, built) == path


@pytest.mark.parametrize(
    "capability, said",
    [
        ((12, 0), 'compute capability 12.0, the library was built for 9.0a;8.0; TORCH_CUDA_ARCH_LIST="12.0"'),
        ((7, 5), "compute capability 7.5, the kernels need 8.0"),
        ((9, 0), None),
    ],
)
def test_a_device_that_the_library_was_not_built_for_is_refused(
    capability: tuple[int, int], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cuda, "architectures", lambda: "9.0a;8.0")
    monkeypatch.setattr(_cuda, "_absence", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: True)
    reason = _cuda.refuse(
        "modulate_norm", 384, mock.Mock(spec=torch.Tensor, device=torch.device("cuda:0"), dtype=torch.float32)
    )
    assert reason is None if said is None else said in str(reason)


# ------------------------------------------------------------------------------------------------------------------
# The choice between cuda and triton
# ------------------------------------------------------------------------------------------------------------------


def test_nothing_is_measured_so_nothing_is_claimed() -> None:
    assert json.loads(_measured.TABLE.read_text()) == {"fastest": {}}
    assert "not measured, Triton is chosen" in str(adaln.MODULATE_NORM.not_automatic("cuda"))


def test_a_measured_winner_is_chosen_on_its_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"9.0": {"modulate_norm": "cuda", "gated_residual": "triton", "adamw_ema": "cuda"}}
    monkeypatch.setattr(_measured, "_table", lambda: table)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (int(str(device)[-1]) + 9, 0))
    here, elsewhere = (mock.Mock(spec=torch.Tensor, device=torch.device(d)) for d in ("cuda:0", "cuda:1"))
    assert adaln.MODULATE_NORM.not_automatic("cuda", here) is None
    assert "triton was measured to be faster" in str(adaln.GATED_RESIDUAL.not_automatic("cuda", here))
    for op in (adaln.MODULATE_NORM, adaln.GATED_RESIDUAL, adaln.GATED_RESIDUAL_NORM):
        assert "not measured" in str(op.not_automatic("cuda", elsewhere))
    assert registry.OPS["modulate_norm"].not_automatic("triton", here) is None
    update = registry.OPS["adamw_ema"]
    assert update.not_automatic("cuda", [here], [here], None) is None
    assert "not measured" in str(update.not_automatic("cuda", [elsewhere], [elsewhere], None))


# ------------------------------------------------------------------------------------------------------------------
# Installs
# ------------------------------------------------------------------------------------------------------------------


def wheel(tmp_path: Path, **environment: str) -> Path:
    """A wheel of the tree as it stands, built from a copy."""
    tree, out = tmp_path / "tree", tmp_path / "wheels"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "ditkernels", "csrc", *BUILD_FILES],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in filter(lambda name: (ROOT / name).exists(), listed):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(out),
        str(tree),
    ]
    subprocess.run(command, env={**os.environ, **environment}, check=True)
    (made,) = out.iterdir()
    return made


BUILD_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def test_an_install_without_the_library_notes_down_why(tmp_path: Path) -> None:
    made = wheel(tmp_path, DITKERNELS_BUILD_CUDA="0")
    assert made.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert {"ditkernels/ops/measured.json", "ditkernels/_cuda_build.json"} <= set(names)
    assert not [name for name in names if name.endswith((".so", ".cu", ".cuh"))]
    said = _cuda._why_not_built(tmp_path / "ditkernels")
    assert said == "the CUDA library was not built: DITKERNELS_BUILD_CUDA=0 was set at installation"


# The rest of what was installed together with this tree, seen from a fresh environment that has this package from a wheel.
STACK = """
import pathlib, site, sys
here, there = pathlib.Path(site.getsitepackages()[0]), pathlib.Path(sys.argv[1])
stack = here.parent / "stack"
stack.mkdir()
for entry in there.iterdir():
    if "ditkernels" not in entry.name and entry.suffix != ".pth":
        (stack / entry.name).symlink_to(entry)
(here / "stack.pth").write_text(str(stack))
"""
CPU_SIDE = ("test_adaln.py", "test_registry.py", "test_info.py", "test_patch_embed.py", "test_final_layer.py")


@needs_nvcc
@pytest.mark.slow
def test_the_wheel_works_where_there_is_no_compiler(tmp_path: Path) -> None:
    made = wheel(tmp_path, DITKERNELS_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0a")
    assert made.name.endswith("-py3-none-linux_x86_64.whl")
    python = str(tmp_path / "fresh/bin/python")
    environment = {"PATH": f"{tmp_path}/fresh/bin:/bin", "HOME": str(tmp_path)}

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    run(sys.executable, "-m", "venv", str(tmp_path / "fresh"))
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(made))
    run(python, "-c", STACK, str(Path(torch.__file__).parent.parent))
    assert "_C.so, built for 9.0a" in run(python, "-m", "ditkernels", "info", "--device", "cpu")
    tests = [str(ROOT / "tests" / name) for name in CPU_SIDE]
    asked = "import ditkernels; assert 'fresh' in ditkernels.__file__; import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    out = run(
        python,
        "-c",
        asked,
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={ROOT}",
        "-c",
        str(ROOT / "pyproject.toml"),
        *tests,
    )
    assert " passed" in out
