"""How csrc/cuda and csrc/cpu each become a library, or PTX and machine code to read: flags, architectures, ninja's rules.

setup.py, the Makefile, the tests and `make gpu` build through here. Nothing but the standard library is imported, so that it also
runs where torch cannot. ninja's dependency files say what a changed header of csrc/cuda rebuilds.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).parent.parent / "csrc/cuda"
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a;10.0+PTX"
OLDEST = (8, 0)  # bf16 on the tensor cores
# Oldest torch whose stable ABI the library asks for; the library then runs beside every newer one.
OLDEST_TORCH = (2, 10)
BYTES_A_JOB = 2 * 2**30
LIBRARY = "_C.so"
FLAGS = (
    *("-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
)


class BuildError(RuntimeError):
    """The library cannot be built; the message names what to set."""


# ---- What to build for, and with -------------------------------------------------------------------------------------


class Architecture(NamedTuple):
    """A GPU architecture.

    Attributes:
        number: as torch writes it: "8.0", or "9.0a" with what only that GPU has.
        ptx: whether PTX goes along, from which newer GPUs compile.
    """

    number: str
    ptx: bool = False

    @property
    def name(self) -> str:
        """As nvcc writes it: "90a"."""
        return self.number.replace(".", "")

    def __str__(self) -> str:
        return self.number + ("+PTX" if self.ptx else "")


def architectures(text: str | None) -> list[Architecture]:
    """The architectures of a TORCH_CUDA_ARCH_LIST such as "8.0;9.0a;10.0+PTX", the default where there is none.

    Those older than the kernels can run on are left out.

    Raises:
        BuildError: a word that is no architecture, or none is left.
    """
    words = re.split(r"[;,\s]+", (text or DEFAULT_ARCHITECTURES).strip(";, "))
    found = []
    for word in words:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: got {word!r}, allowed are numbers such as 8.0, 9.0a, 10.0+PTX, separated by ';'"
            )
        major, minor, suffix, ptx = match.groups()
        if (int(major), int(minor)) >= OLDEST:
            found.append(Architecture(f"{major}.{minor}{suffix}", ptx is not None))
    if not found:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST: got {text!r}, the kernels need 8.0 or newer")
    return found


def find_nvcc(environ: Mapping[str, str] = os.environ) -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH if they are set, else of the PATH, else of /usr/local/cuda; None if there is none."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            return shutil.which("nvcc", path=str(Path(environ[name]) / "bin"))
    return shutil.which("nvcc", path=environ.get("PATH")) or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _ninja() -> list[str]:
    found = shutil.which("ninja")
    if found:
        return [found]
    if subprocess.run([sys.executable, "-m", "ninja", "--version"], capture_output=True).returncode:
        raise BuildError("ninja is missing: pip install ninja")
    return [sys.executable, "-m", "ninja"]


def jobs(environ: Mapping[str, str] = os.environ) -> int:
    """MAX_JOBS, else one for each core as far as memory goes.

    Raises:
        BuildError: MAX_JOBS is no whole number of 1 or more.
    """
    asked = environ.get("MAX_JOBS")
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            raise BuildError(f"MAX_JOBS: got {asked!r}, allowed is 1 or more")
        return int(asked)
    return max(1, min(len(os.sched_getaffinity(0)), _available_memory() // BYTES_A_JOB))


def _available_memory() -> int:
    pages = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(pages.group(1)) * 1024 if pages else BYTES_A_JOB


# ---- Building --------------------------------------------------------------------------------------------------------


class Toolchain(NamedTuple):
    """Where the compiler and torch are.

    Attributes:
        nvcc: the compiler, or a wrapper of it.
        torch: the folder of the package torch; its ``include`` and ``lib`` are used.
    """

    nvcc: str
    torch: Path


def sources(folder: Path = CSRC) -> list[Path]:
    """The files that are compiled, each on its own."""
    return sorted(folder.glob("*.cu"))


def build_library(out: Path, tools: Toolchain, targets: Sequence[Architecture], files: Sequence[Path] | None = None) -> Path:
    """Compiles and links the library into the folder ``out``; what is up to date stays.

    Returns:
        the path of the library.

    Raises:
        BuildError: it does not compile, or the compiler does not know an architecture.
    """
    files = sources() if files is None else files
    _refuse_unknown(tools.nvcc, targets)
    workers = jobs()
    threads = max(1, min(workers // max(1, len(files)), 2 * len(targets)))
    codes = " ".join(f"-gencode=arch=compute_{a.name},code={_codes(a)}" for a in targets)
    named = shlex.quote('-DDITKERNELS_ARCHITECTURES="' + ";".join(map(str, targets)) + '"')
    objects = [f"{file.stem}.o" for file in files]
    lines = [
        f"command = {tools.nvcc} {_compiling(tools)} {codes} --threads={threads} {named} -MD -MF $out.d -c $in -o $out",
        *(f"build {name}: compile {_escaped(file)}" for name, file in zip(objects, files)),
        "rule link",
        f"  command = {tools.nvcc} -shared -cudart static $in -L{tools.torch}/lib -ltorch_cpu -ldl"
        " -Xlinker --exclude-libs=ALL -Xlinker --strip-debug -o $out.tmp && mv $out.tmp $out",
        f"build {LIBRARY}: link {' '.join(objects)}",
    ]
    _run_ninja(out, ["rule compile", "  depfile = $out.d", "  deps = gcc", "  " + lines[0], *lines[1:]], workers)
    return out / LIBRARY


def compile_ptx(tools: Toolchain, file: Path, name: str, out: Path) -> None:
    """Compiles one file to PTX for one architecture ("80", "90a").

    Raises:
        BuildError: it does not compile.
    """
    unused = '-DDITKERNELS_ARCHITECTURES=""'
    flags = shlex.split(_compiling(tools))
    _run([tools.nvcc, *flags, f"-arch=compute_{name}", unused, "-ptx", str(file), "-o", str(out)])


def assemble(tools: Toolchain, ptx: Path, name: str, out: Path, entries: Sequence[str] = ()) -> None:
    """Assembles PTX to machine code for one architecture, of all kernels or of these alone.

    Raises:
        BuildError: the assembler refuses.
    """
    chosen = [word for entry in entries for word in ("-Xptxas", f"--entry={entry}")]
    _run([tools.nvcc, f"-arch=sm_{name}", "-cubin", *chosen, str(ptx), "-o", str(out)])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def _compiling(tools: Toolchain) -> str:
    # The toolkit's own headers go first; a toolkit without cublasLt.h takes it from the packages that torch came with.
    system = (tools.torch / "include", *_blas_includes(tools.torch.parent))
    return " ".join((*FLAGS, f"-I{CSRC}", *(f"-isystem {shlex.quote(str(path))}" for path in system)))


def _blas_includes(packages: Path) -> list[Path]:
    return sorted(path.parent for path in packages.glob("nvidia/*/include/cublasLt.h"))


def _codes(architecture: Architecture) -> str:
    codes = [f"sm_{architecture.name}"] + [f"compute_{architecture.name}"] * architecture.ptx
    return codes[0] if len(codes) == 1 else f"[{','.join(codes)}]"


def _refuse_unknown(nvcc: str, targets: Sequence[Architecture]) -> None:
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = {word.removeprefix("sm_") for word in listed.split()}
    for target in targets:
        if target.name.rstrip("af") not in known:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: got {target}, this nvcc knows {', '.join(sorted(known, key=int))}")


def _escaped(path: Path) -> str:
    return re.sub(r"([ :$])", r"$\1", str(path.resolve()))


def _run_ninja(out: Path, lines: Sequence[str], workers: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "build.ninja").write_text("\n".join([*lines, ""]))
    command = [*_ninja(), "-C", str(out), "-j", str(workers)]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise BuildError(
            "csrc/cuda does not compile, see above. MAX_JOBS=1 needs less memory, CUDA_HOME names another toolkit, "
            "TORCH_CUDA_ARCH_LIST other architectures"
        )


# ---- The CPU library -------------------------------------------------------------------------------------------------

CPU_CSRC = CSRC.parent / "cpu"
CPU_LIBRARY = "_cpu.so"
# Multiplications and additions may become one instruction; nothing else of the arithmetic is loosened.
CPU_FLAGS = (
    *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
_AVX512 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
# By machine: the flags of what talks to torch, then those of the kernels for each instruction set of csrc/cpu/isa.h.
INSTRUCTION_SETS: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "x86_64": (
        ("-march=x86-64",),
        {"avx2": ("-march=x86-64-v3",), "avx512": _AVX512, "avx512_bf16": (*_AVX512, "-mavx512bf16")},
    ),
    "aarch64": ((), {"native": ()}),
    "arm64": ((), {"native": ()}),
}


def find_cxx(environ: Mapping[str, str] = os.environ) -> str | None:
    """The C++ compiler that CXX names, else c++, g++ or clang++ of the PATH; None if there is none."""
    if environ.get("CXX"):
        return shutil.which(shlex.split(environ["CXX"])[0], path=environ.get("PATH"))
    found = (shutil.which(name, path=environ.get("PATH")) for name in ("c++", "g++", "clang++"))
    return next(filter(None, found), None)


def cpu_sources() -> list[Path]:
    """The files of csrc/cpu that are compiled, each once without an instruction set and, if it has kernels, once for each."""
    return sorted(CPU_CSRC.glob("*.cpp"))


def cpu_objects(machine: str) -> Iterator[tuple[str, Path, tuple[str, ...]]]:
    """(name, source, flags) of each object of the library.

    Raises:
        BuildError: there are no rules for the machine.
    """
    if machine not in INSTRUCTION_SETS or sys.platform == "win32":
        raise BuildError(f"there is no rule for {machine} on {sys.platform}; csrc/cpu needs GCC or clang on x86_64 or aarch64")
    host, sets = INSTRUCTION_SETS[machine]
    for file in cpu_sources():
        yield f"{file.stem}.o", file, host
        if "#ifdef DITKERNELS_ISA" in file.read_text():
            for isa, flags in sets.items():
                yield f"{file.stem}.{isa}.o", file, (*flags, f"-DDITKERNELS_ISA={isa}")


def build_cpu_library(out: Path, compiler: str, torch: Path, machine: str | None = None, extra: Sequence[str] = ()) -> Path:
    """Compiles and links the library of csrc/cpu into the folder ``out``; the torch package's ``include`` and ``lib`` are used.

    Args:
        machine: to build for; this one's by default.
        extra: further flags of compiler and linker, as for a sanitizer.

    Returns:
        the path of the library.

    Raises:
        BuildError: it does not compile, or there are no rules for the machine.
    """
    out.mkdir(parents=True, exist_ok=True)
    made = list(cpu_objects(machine or platform.machine()))
    start = [compiler, *CPU_FLAGS, *extra, "-isystem", str(torch / "include")]
    commands = [[*start, *flags, "-c", str(file), "-o", str(out / name)] for name, file, flags in made]
    with ThreadPoolExecutor(jobs()) as pool:
        list(pool.map(_run, commands))
    library, unfinished = out / CPU_LIBRARY, out / f"{CPU_LIBRARY}.tmp"
    objects = [str(out / name) for name, _, _ in made]
    _run([compiler, "-shared", *extra, *objects, f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(unfinished)])
    os.replace(unfinished, library)
    return library


def main() -> None:
    """Builds a library into a folder: ``python tools/build_native.py cuda FOLDER``, or ``cpu FOLDER``.

    DITKERNELS_CUDA_LIBRARY=FOLDER/_C.so, or DITKERNELS_CPU_LIBRARY=FOLDER/_cpu.so, then names it.
    """
    spec = importlib.util.find_spec("torch")
    kind = sys.argv[1] if len(sys.argv) == 3 else None
    compiler = {"cuda": find_nvcc, "cpu": find_cxx}[kind]() if kind in ("cuda", "cpu") else None
    if kind is None or compiler is None or spec is None or spec.origin is None:
        raise SystemExit(
            "usage: python tools/build_native.py cuda|cpu FOLDER, with nvcc or a C++ compiler on the PATH and torch installed"
        )
    out, torch = Path(sys.argv[2]), Path(spec.origin).parent
    if kind == "cuda":
        print(build_library(out, Toolchain(compiler, torch), architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"))))
    else:
        print(build_cpu_library(out, compiler, torch))


if __name__ == "__main__":
    main()
