"""Building the CUDA library: what is asked of it, what it refuses, and what an install without it says."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from ditkernels.ops import _native, norm
from tools import build_native
from tools.tree import ROOT

DEFAULT = build_native.DEFAULT_ARCHITECTURES
needs_nvcc = pytest.mark.skipif(
    build_native.find_nvcc() is None or build_native.find_cxx() is None, reason="needs nvcc and a C++ compiler"
)


def tools() -> build_native.Toolchain:
    found = build_native.find_nvcc()
    assert found is not None
    return build_native.Toolchain(found, Path(torch.__file__).parent)


# ---- What is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, ["8.0+PTX", "9.0a", "10.0+PTX"]),
        ("8.0;9.0a;10.0+PTX", ["8.0", "9.0a", "10.0+PTX"]),
        ("9.0 12.0f", ["9.0", "12.0f"]),
        ("5.2 7.5;8.6", ["8.6"]),
        ("Hopper;Ampere", ["9.0+PTX", "8.0", "8.6+PTX"]),
        ("Turing, Ada;;8.9+PTX", ["8.9+PTX"]),
    ],
)
def test_architectures_in_torchs_own_words(text: str | None, expected: list[str]) -> None:
    assert list(map(str, build_native.architectures(text))) == expected


def test_torchs_names_are_ours() -> None:
    source = (Path(torch.__file__).parent / "utils/cpp_extension.py").read_text(encoding="utf-8")
    theirs = dict(re.findall(r"\('([A-Z][\w+]+)', '([\d.;+PTX]+)'\)", source))
    assert {"Ampere", "Hopper"} <= theirs.keys()
    assert {name: theirs[name] for name in theirs.keys() & build_native.NAMED_ARCHITECTURES.keys()}.items() <= (
        build_native.NAMED_ARCHITECTURES.items()
    )


def test_what_is_left_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    build_native.architectures("7.0;7.5+PTX;8.6")
    assert "7.0, 7.5+PTX is left out, the kernels need 8.0 or newer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, said",
    [("hopper", "got 'hopper', allowed are .*Hopper.*native"), ("8.0;90", "got '90'"), ("7.5", "need 8.0 or newer")],
)
def test_bad_architectures_are_named(text: str, said: str) -> None:
    with pytest.raises(build_native.BuildError, match=said):
        build_native.architectures(text)


def test_native_is_what_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(build_native.BuildError, match=r"got 'native', but torch sees no GPU here; name the architectures"):
        build_native.architectures("native")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (8, 0), (9, 0)][index])
    assert list(map(str, build_native.architectures("native"))) == ["8.0", "9.0"]


def program(path: Path, *lines: str) -> str:
    """A shell script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]), encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def imitation(path: Path, release: str = "13.0", *lines: str) -> str:
    """An nvcc that tells its release and knows sm_80 and sm_90; ``lines`` say what it does besides."""
    version = f'[ "$1" = --version ] && {{ echo "Cuda compilation tools, release {release}, V{release}.1"; exit 0; }}'
    codes = '[ "$1" = --list-gpu-code ] && { echo sm_80; echo sm_90; exit 0; }'
    return program(path, version, codes, *lines)


def test_of_the_default_what_nvcc_knows_is_built_and_the_newest_gets_ptx(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nvcc = imitation(tmp_path / "nvcc")
    default = build_native.architectures(None)
    assert list(map(str, build_native.known_to(nvcc, default, named=False))) == ["8.0+PTX", "9.0+PTX"]
    assert "10.0+PTX is left out, which" in capsys.readouterr().err
    with pytest.raises(build_native.BuildError, match=r"got 10\.0\+PTX, .*nvcc knows 80, 90"):
        build_native.known_to(nvcc, default, named=True)


@pytest.mark.parametrize(
    "release, lines, said",
    [
        ("11.8", (), r"nvcc is of CUDA 11\.8, 12\.0 is needed; CUDA_HOME names another toolkit"),
        (
            "12.8",
            ("echo '#error -- unsupported GNU version! gcc versions later than 13' >&2", "exit 1"),
            "nvcc cannot use its host compiler: .*unsupported GNU version! .*CXX names another one",
        ),
    ],
)
def test_what_would_stop_the_build_is_named_before_it(release: str, lines: tuple[str, ...], said: str, tmp_path: Path) -> None:
    nvcc = imitation(tmp_path / "bin/nvcc", release, *lines)
    with pytest.raises(build_native.BuildError, match=said):
        build_native.refuse_nvcc(nvcc)


def test_an_nvcc_that_does_not_run_is_named(tmp_path: Path) -> None:
    broken = program(tmp_path / "nvcc", "echo 'libcudart: cannot open shared object file' >&2; exit 127")
    with pytest.raises(build_native.BuildError, match="nvcc --version ended with status 127: libcudart: cannot open"):
        build_native.refuse_nvcc(broken)
    (tmp_path / "nvcc").write_bytes(b"\x7fELF no program")
    with pytest.raises(build_native.BuildError, match=r"nvcc does not run: .*Exec format error"):
        build_native.refuse_nvcc(broken)


def test_a_missing_ninja_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(sys, "executable", program(tmp_path / "python", "exit 1"))
    with pytest.raises(build_native.BuildError, match="ninja is missing: pip install ninja"):
        build_native.refuse_nvcc(imitation(tmp_path / "nvcc"))


@needs_nvcc
def test_the_host_compiler_is_the_one_that_CXX_names(tmp_path: Path) -> None:
    nvcc = build_native.find_nvcc()
    assert nvcc is not None
    build_native.refuse_nvcc(nvcc)
    missing = {**os.environ, "CXX": "/nowhere/g++"}
    with pytest.raises(build_native.BuildError, match=r"nvcc cannot use its host compiler: .*/nowhere/g\+\+"):
        build_native.refuse_nvcc(nvcc, missing)


def test_jobs_respect_memory_and_max_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build_native, "MEMBERSHIP", tmp_path / "nothing")
    monkeypatch.setattr(build_native.os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(build_native, "_available_memory", lambda: 7 * 2**30)
    assert build_native.jobs({}) == 3
    monkeypatch.setattr(build_native, "_available_memory", lambda: 2**20)
    assert build_native.jobs({}) == 1
    assert build_native.jobs({"MAX_JOBS": "5"}) == 5
    for bad in ("0", "many"):
        with pytest.raises(build_native.BuildError, match=f"MAX_JOBS: got '{bad}'"):
            build_native.jobs({"MAX_JOBS": bad})


GIB = 2**30
V2 = {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000", "a/b/memory.max": "max", "a/memory.max": str(9 * GIB)}
V1 = {"cpu/a/b/cpu.cfs_quota_us": "250000", "cpu/a/b/cpu.cfs_period_us": "100000", "cpu/a/cpu.cfs_quota_us": "-1"}


@pytest.mark.parametrize(
    "membership, files, expected",
    [
        ("0::/a/b", V2, 3),
        ("0::/a/b", {**V2, "a/memory.current": str(5 * GIB)}, 2),
        ("0::/", {"memory.max": str(4 * GIB)}, 2),  # a container sees its own group as the root
        ("3:cpu,cpuacct:/a/b\n4:memory:/a", V1, 2),
        ("4:memory:/out/of/sight", {"memory/memory.limit_in_bytes": str(2 * GIB)}, 1),
        ("4:memory:/", {"memory/memory.limit_in_bytes": str(9223372036854771712)}, 32),
        ("nonsense", {}, 32),
    ],
)
def test_jobs_respect_the_container(
    membership: str, files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in {**files, "membership": membership}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    monkeypatch.setattr(build_native, "CGROUPS", tmp_path)
    monkeypatch.setattr(build_native, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(build_native.os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(build_native, "_available_memory", lambda: 64 * GIB)
    assert build_native.jobs({}) == expected


@pytest.mark.slow
def test_jobs_respect_a_real_container(tmp_path: Path) -> None:
    group = Path("/sys/fs/cgroup/memory/ditkernels-test")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(3 * GIB), encoding="utf-8")
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        asked = "import sys; sys.path.insert(0, sys.argv[1]); import build_native as b; print(b._limits('memory')[1] // 2**30)"
        enter = f"echo $$ > {group}/tasks && exec {sys.executable} -c {shlex.quote(asked)} {ROOT / 'tools'}"
        found = subprocess.run(["sh", "-c", enter], capture_output=True, text=True, check=True).stdout
        assert float(found) == 2  # what Python itself uses is taken off
    finally:
        group.rmdir()


def test_nvcc_may_be_a_wrapper_and_cuda_home_goes_first(tmp_path: Path) -> None:
    wrapper = program(tmp_path / "bin/nvcc")
    folder = str(Path(wrapper).parent)
    assert build_native.find_nvcc({"PATH": folder}) == wrapper
    assert build_native.find_nvcc({"PATH": "/usr/bin", "CUDA_HOME": str(tmp_path)}) == wrapper
    assert build_native.find_nvcc({"PATH": folder, "CUDA_HOME": "/nowhere"}) is None
    assert build_native.find_nvcc({"PATH": folder, "CUDA_PATH": "/nowhere"}) is None
    assert build_native.nvcc_lacking({"CUDA_HOME": "/nowhere"}) == "CUDA_HOME=/nowhere holds no bin/nvcc"
    assert build_native.nvcc_lacking({}).endswith("CUDA_PATH, the PATH, /usr/local/cuda and /usr/local/cuda-*)")


def test_of_several_toolkits_the_newest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    several = ["/usr/local/cuda-9.2/bin", "/usr/local/cuda-12.8/bin", "/usr/local/cuda-12.10/bin"]
    monkeypatch.setattr(build_native.glob, "glob", lambda pattern: several)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"{path}/{name}" if path in several else None)
    assert build_native.find_nvcc({}) == "/usr/local/cuda-12.10/bin/nvcc"


# By kind of library: an environment without its compiler, the words for that, and its sources.
WITHOUT = {
    "CUDA": ({"CUDA_HOME": "/nowhere"}, "at installation CUDA_HOME=/nowhere holds no bin/nvcc", build_native.sources()),
    "CPU": ({"CXX": "/nowhere/c++"}, r"at installation CXX=/nowhere/c\+\+ is not", build_native.cpu_sources()),
}


def setup_options(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, Any]:
    """What setup.py would build in this environment, and for each library why it would not."""
    for kind in WITHOUT:
        monkeypatch.delenv(f"DITKERNELS_BUILD_{kind}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with mock.patch("setuptools.setup") as setup:
        reasons = runpy.run_path(str(ROOT / "setup.py"))["REASONS"]
    return {**{library.kind: reason for library, reason in reasons.items()}, **setup.call_args.kwargs}


def test_without_compilers_the_install_is_pure_python_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    options = setup_options(monkeypatch, **WITHOUT["CUDA"][0], **WITHOUT["CPU"][0])
    for kind, (_, words, _) in WITHOUT.items():
        assert re.match(words, options[kind])
    assert "ext_modules" not in options


class Broken:
    """Finds a module torch whose libraries are broken."""

    def find_spec(self, name: str, *args: Any) -> None:
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")


def test_a_torch_that_cannot_be_loaded_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/bin/{name}")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    options = setup_options(monkeypatch)
    for kind in WITHOUT:
        assert "torch could not be imported (libcudart.so.13: cannot open shared object file)" in options[kind]


@pytest.mark.parametrize("version, refused", [("65.5.1", True), ("75.8.0", True), ("77.0.3", False)])
def test_an_old_setuptools_is_named(version: str, refused: bool, tmp_path: Path) -> None:
    (tmp_path / "setuptools").mkdir()
    (tmp_path / "setuptools/__init__.py").write_text(f"__version__ = {version!r}\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, ROOT / "setup.py"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    said = f"setuptools {version} was found, ditkernels needs 77: pip install 'setuptools>=77', or leave out --no-build-isolation"
    assert (said in done.stderr) == refused


def test_without_torch_the_install_is_pure_python_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/bin/{name}")
    options = setup_options(monkeypatch)
    for kind in WITHOUT:
        assert "torch could not be imported" in options[kind]
        assert "--no-build-isolation" in options[kind]
    assert "ext_modules" not in options


@pytest.mark.parametrize("kind", WITHOUT)
def test_with_a_compiler_and_torch_a_library_is_built_and_its_switch_turns_it_off(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/bin/{name}")
    options = setup_options(monkeypatch)
    assert options[kind] is None
    sources = {str(p.relative_to(ROOT)) for p in WITHOUT[kind][2]}
    assert sources in [set(extension.sources) for extension in options["ext_modules"]]
    switched_off = setup_options(monkeypatch, **{f"DITKERNELS_BUILD_{kind}": "0"})
    assert switched_off[kind] == f"DITKERNELS_BUILD_{kind}=0 was set at installation"
    assert sources not in [set(extension.sources) for extension in switched_off["ext_modules"]]


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_switch_is_an_order(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without, words, _ = WITHOUT[kind]
    for value, said in (
        ("1", f"=1, but {words.removeprefix('at installation ')}.*DITKERNELS_BUILD_{kind}=0"),
        ("yes", "got 'yes', allowed are 0 and 1"),
    ):
        with pytest.raises(RuntimeError, match=said):
            setup_options(monkeypatch, **without, **{f"DITKERNELS_BUILD_{kind}": value})


def test_the_build_requires_no_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = text[text.index("[build-system]") : text.index("[project]")]
    assert "torch" not in required


# ---- Building --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A library of one function, whose value stands in a header."""
    (tmp_path / "value.h").write_text("#define VALUE 1\n", encoding="utf-8")
    (tmp_path / "tiny.cu").write_text(
        '#include "value.h"\n'
        "__global__ void kernel(int* out) { *out = VALUE; }\n"
        'extern "C" __attribute__((visibility("default"))) int value() { return VALUE; }\n'
        'extern "C" __attribute__((visibility("default"))) const char* built() { return DITKERNELS_ARCHITECTURES; }\n',
        encoding="utf-8",
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
        return build_native.build_library(tmp_path / "out", tools(), build_native.architectures("8.0;9.0a+PTX"), [tiny])

    library = build()
    assert call(library) == (1, "8.0;9.0a+PTX")
    made = library.stat().st_mtime_ns
    assert build().stat().st_mtime_ns == made
    time.sleep(0.01)
    (tmp_path / "value.h").write_text("#define VALUE 2\n", encoding="utf-8")
    assert call(build()) == (2, "8.0;9.0a+PTX")


ODD = "a b/d$HOME/q'\"u/br[a]c (x)/am&p;s/ümläut"


@needs_nvcc
@pytest.mark.slow
def test_paths_of_all_kinds_are_taken(tiny: Path, tmp_path: Path) -> None:
    odd = tmp_path / ODD
    odd.mkdir(parents=True)
    files = [shutil.move(tiny.parent / name, odd / name) for name in ("tiny.cu", "value.h")]
    (odd / "packages").symlink_to(Path(torch.__file__).parent.parent)
    nvcc = Path(tools().nvcc).parent
    (odd / "toolkit").symlink_to(nvcc.parent if nvcc.name == "bin" else nvcc)
    found = odd / "toolkit" / ("bin/nvcc" if nvcc.name == "bin" else "nvcc")
    odd_tools = build_native.Toolchain(str(found), odd / "packages/torch")

    def build() -> Path:
        return build_native.build_library(odd / "out", odd_tools, build_native.architectures("8.0"), [Path(files[0])])

    library = build()
    assert call(library) == (1, "8.0")
    made = library.stat().st_mtime_ns
    assert build().stat().st_mtime_ns == made  # headers are found again, too


@needs_nvcc
def test_a_failing_build_says_what_to_set(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text("no C++\n", encoding="utf-8")
    with pytest.raises(build_native.BuildError, match=r"MAX_JOBS=1 .* CUDA_HOME .* CXX .* TORCH_CUDA_ARCH_LIST"):
        build_native.build_library(tmp_path / "out", tools(), build_native.architectures("9.0a"), [tiny])
    assert not (tmp_path / "out" / build_native.LIBRARY).exists()


@needs_nvcc
def test_an_architecture_unknown_to_the_compiler_is_named(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(build_native.BuildError, match=r"got 19\.0, .*nvcc knows .*80.*90"):
        build_native.build_library(tmp_path / "out", tools(), build_native.architectures("19.0"), [tiny])


# ---- Devices ---------------------------------------------------------------------------------------------------------


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
    assert _native.path_on(capability, built) == path


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
    monkeypatch.setattr(_native, "architectures", lambda: "9.0a;8.0")
    monkeypatch.setattr(_native.CUDA, "absence", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: True)
    assert_reason(said)


def assert_reason(said: str | None) -> None:
    """What a device, whose properties are patched, is told about an op."""
    x = mock.Mock(spec=torch.Tensor, device=torch.device("cuda:0"), dtype=torch.float32, shape=(1, 2, 384))
    reason = _native.refuse_cuda(norm.MODULATE_NORM, (x, None, None, None, None, "layernorm", 1e-6, x.dtype, False))
    assert reason is None if said is None else said in str(reason)


@pytest.mark.parametrize(
    "built_with, driver, built, said",
    [
        (13000, 13000, "9.0a", None),
        (13020, 13000, "9.0a", None),
        (12080, 13000, "9.0a", None),
        (13000, 12090, "9.0a", "driver serves CUDA 12.9, the library was built with 13.0 and needs 13.0"),
        (12040, 11080, "9.0a", "driver serves CUDA 11.8, the library was built with 12.4 and needs 12.0"),
        (13020, 13000, "8.0+PTX", "driver serves CUDA 13.0, the library was built with 13.2 and needs 13.2"),
        (13000, 13020, "8.0+PTX", None),
    ],
)
def test_a_driver_that_is_too_old_is_refused(
    built_with: int, driver: int, built: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the same major version serves machine code, as CUDA promises; PTX must be known to the driver's compiler."""
    for name, value in (
        ("architectures", lambda: built),
        ("runtime", lambda: built_with),
    ):
        monkeypatch.setattr(_native, name, value)
    monkeypatch.setattr(_native.CUDA, "absence", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: True)
    assert_reason(said)


# ---- Installs --------------------------------------------------------------------------------------------------------


BUILD_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def copied_tree(tmp_path: Path) -> Path:
    """A copy of what an install needs, as it stands."""
    tree = tmp_path / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "ditkernels", "csrc", "tools", *BUILD_FILES],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in filter(lambda name: (ROOT / name).exists(), listed):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    return tree


def wheel(source: Path, out: Path, **environment: str) -> Path:
    """A wheel of a tree or an sdist."""
    options = ("-q", "--no-build-isolation", "--no-deps", "-w", str(out))
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    subprocess.run(command, env={**os.environ, **environment}, check=True)
    (made,) = out.iterdir()
    return made


def assert_pure(made: Path, tmp_path: Path) -> None:
    """A wheel without the library has every module, and notes down why it has no more."""
    assert made.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(made) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path)
    package = ROOT / "ditkernels"
    modules = {p.relative_to(ROOT).as_posix() for p in package.rglob("*.py")}
    data = {"ditkernels/py.typed", "ditkernels/ops/schemas.txt", "ditkernels/_cuda_build.json", "ditkernels/_cpu_build.json"}
    assert modules | data <= names
    assert not [name for name in names if name.endswith((".so", ".cu", ".cuh", ".cpp", ".h"))]
    for library in (_native.CUDA, _native.CPU):
        kind = library.kind
        said = library.why_not_built(tmp_path / "ditkernels")
        assert said == f"the {kind} library was not built: DITKERNELS_BUILD_{kind}=0 was set at installation"


NO_LIBRARIES = {"DITKERNELS_BUILD_CUDA": "0", "DITKERNELS_BUILD_CPU": "0"}


def test_an_install_without_the_library_notes_down_why(tmp_path: Path) -> None:
    """Whatever lies in the tree or was built there before: libraries, and a module that is no longer there."""
    tree = copied_tree(tmp_path)
    gone = tree / "ditkernels/gone.py"
    gone.touch()
    for library in (build_native.LIBRARY, build_native.CPU_LIBRARY):
        (tree / "ditkernels" / library).write_bytes(b"built here")
    with zipfile.ZipFile(wheel(tree, tmp_path / "first", **NO_LIBRARIES)) as archive:
        assert "ditkernels/gone.py" in archive.namelist()
    gone.unlink()
    made = wheel(tree, tmp_path / "wheels", **NO_LIBRARIES)
    with zipfile.ZipFile(made) as archive:
        assert "ditkernels/gone.py" not in archive.namelist()
    assert_pure(made, tmp_path)


def editable(tree: Path, **environment: str) -> str:
    """Prepares a tree to be used as it lies; what was said."""
    make = "import sys, setuptools.build_meta as backend; backend.build_editable(sys.argv[1])"
    command = [sys.executable, "-c", make, str(tree / "out")]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_an_editable_install_that_builds_no_library_leaves_the_one_that_is_there(tmp_path: Path) -> None:
    tree = copied_tree(tmp_path)
    package = tree / "ditkernels"
    assert "stays as it is" not in editable(tree, **NO_LIBRARIES)
    assert "DITKERNELS_BUILD_CPU=0 was set at installation" in _native.CPU.why_not_built(package)
    for library, kind in ((build_native.LIBRARY, "CUDA"), (build_native.CPU_LIBRARY, "CPU")):
        (tmp_path / "built").write_bytes(kind.encode())
        build_native.install(tmp_path / "built", package / library, kind)
    before = {path.name: path.read_bytes() for path in package.glob("_*") if path.is_file()}
    said = editable(tree, **NO_LIBRARIES)
    assert said.count("stays as it is: no other is built, since DITKERNELS_BUILD_") == 2
    assert {path.name: path.read_bytes() for path in package.glob("_*") if path.is_file()} == before
    compiler = str(failing_compiler(tmp_path))
    editable(tree, DITKERNELS_BUILD_CUDA="0", DITKERNELS_BUILD_CPU="", CXX=compiler)
    assert {path.name: path.read_bytes() for path in package.glob("_*") if path.is_file()} == before


def failing_compiler(tmp_path: Path) -> Path:
    return Path(program(tmp_path / "c++", "echo 'error: too old a compiler' >&2", "exit 1"))


def test_a_cpp_compiler_that_fails_leaves_an_install_without_its_library(tmp_path: Path) -> None:
    compiler, tree = str(failing_compiler(tmp_path)), copied_tree(tmp_path)
    made = wheel(tree, tmp_path / "wheels", DITKERNELS_BUILD_CUDA="0", DITKERNELS_BUILD_CPU="", CXX=compiler)
    with zipfile.ZipFile(made) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path)
    said = _native.CPU.why_not_built(tmp_path / "ditkernels")
    assert said.startswith(f"the CPU library was not built: at installation {compiler} failed; CXX names another compiler")
    with pytest.raises(subprocess.CalledProcessError):
        wheel(tree, tmp_path / "none", DITKERNELS_BUILD_CUDA="0", DITKERNELS_BUILD_CPU="1", CXX=compiler)


@pytest.mark.skipif(build_native.find_cxx() is None, reason="needs a C++ compiler")
@pytest.mark.slow
def test_a_wheel_with_the_cpu_library_alone_names_the_platform(tmp_path: Path) -> None:
    made = wheel(copied_tree(tmp_path), tmp_path / "wheels", DITKERNELS_BUILD_CUDA="0", DITKERNELS_BUILD_CPU="1")
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", made.name)
    with zipfile.ZipFile(made) as archive:
        archive.extractall(tmp_path)
    program = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.ditkernels.cpu_isa())"
    library = str(tmp_path / "ditkernels" / build_native.CPU_LIBRARY)
    done = subprocess.run([sys.executable, "-c", program, library], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() in build_native.INSTRUCTION_SETS[platform.machine()][1], done.stderr


@pytest.mark.skipif(build_native.find_cxx() is None, reason="needs a C++ compiler")
def test_an_editable_install_without_a_library_notes_down_that_the_compiler_failed(tmp_path: Path) -> None:
    tree = copied_tree(tmp_path)
    editable(tree, DITKERNELS_BUILD_CUDA="0", DITKERNELS_BUILD_CPU="", CXX=str(failing_compiler(tmp_path)))
    assert "failed; CXX names another compiler" in _native.CPU.why_not_built(tree / "ditkernels")


@pytest.mark.slow
@pytest.mark.skipif(build_native.find_cxx() is None, reason="needs a C++ compiler")
def test_an_editable_install_builds_into_the_tree(tmp_path: Path) -> None:
    tree = copied_tree(tmp_path)
    editable(tree, DITKERNELS_BUILD_CUDA="0", DITKERNELS_BUILD_CPU="1")
    assert _native.CPU.fault(tree / "ditkernels" / build_native.CPU_LIBRARY) is None
    assert _native.CPU.recorded(tree / "ditkernels")["bytes"] > 0


def test_an_sdist_holds_what_its_install_needs(tmp_path: Path) -> None:
    tree, out = copied_tree(tmp_path), tmp_path / "sdist"
    make = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    environment = {**os.environ, **NO_LIBRARIES}
    subprocess.run([sys.executable, "-c", make, str(out)], cwd=tree, env=environment, check=True)
    (made,) = out.iterdir()
    with tarfile.open(made) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    folders = (build_native.CSRC, build_native.CPU_CSRC)
    needed = {p.relative_to(ROOT).as_posix() for folder in folders for p in folder.iterdir()} | {"tools/build_native.py"}
    assert needed <= held
    assert_pure(wheel(made, tmp_path / "wheels", **NO_LIBRARIES), tmp_path)


# The rest of what was installed together with this tree, seen from a fresh environment that has this package from a wheel. The
# folder's name says that these packages are no modules of ours: hypothesis reads the source of all that are.
STACK = """
import pathlib, site, sys
here, there = pathlib.Path(site.getsitepackages()[0]), pathlib.Path(sys.argv[1])
stack = here.parent / "stack/site-packages"
stack.mkdir(parents=True)
for entry in there.iterdir():
    if "ditkernels" not in entry.name and entry.suffix != ".pth":
        (stack / entry.name).symlink_to(entry)
(here / "stack.pth").write_text(str(stack), encoding="utf-8")
"""
CPU_SIDE = (
    *("ops/test_adaln.py", "ops/test_dispatch.py", "ops/test_patch_embed.py", "ops/test_final_layer.py"),
    "diagnostics/test_info.py",
)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_wheel_works_where_there_is_no_compiler(tmp_path: Path) -> None:
    environment = {"DITKERNELS_BUILD_CUDA": "1", "DITKERNELS_BUILD_CPU": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    made = wheel(copied_tree(tmp_path), tmp_path / "wheels", **environment)
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
