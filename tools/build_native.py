"""How csrc/cuda and csrc/cpu each become a library, or PTX and machine code to read: flags, architectures, ninja's rules.

setup.py, the Makefile, the tests and `make gpu` build through here. Nothing but the standard library is imported, so that it also
runs where torch cannot. ninja's dependency files say what a changed header of csrc/cuda rebuilds.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).parent.parent / "csrc/cuda"
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a;10.0+PTX"
OLDEST = (8, 0)  # bf16 on the tensor cores
OLDEST_NVCC = (12, 0)  # the first that knows C++20 and sm_90a
# Oldest torch whose stable ABI the library asks for; the library then runs beside every newer one.
OLDEST_TORCH = (2, 10)
BYTES_A_JOB = 2 * 2**30
LIBRARY = "_C.so"
FLAGS = (
    *("-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
)
# What torch's own TORCH_CUDA_ARCH_LIST calls by name.
NAMED_ARCHITECTURES = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
    "Rubin": "10.7+PTX",
}


class BuildError(RuntimeError):
    """The library cannot be built; the message names what to set."""


# ---- What to build for -----------------------------------------------------------------------------------------------


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

    @property
    def version(self) -> tuple[int, int]:
        """As numbers: (9, 0)."""
        major, minor = self.number.rstrip("af").split(".")
        return int(major), int(minor)

    def __str__(self) -> str:
        return self.number + ("+PTX" if self.ptx else "")


def architectures(text: str | None) -> list[Architecture]:
    """The architectures of a TORCH_CUDA_ARCH_LIST such as "8.0;9.0a;10.0+PTX", "Hopper" or "native", the default for none.

    Those older than the kernels can run on are left out, with a note on stderr.

    Raises:
        BuildError: a word that is no architecture, "native" where no GPU is visible, or none is left.
    """
    named = (NAMED_ARCHITECTURES.get(word, word) for word in _words(text or DEFAULT_ARCHITECTURES))
    found = [architecture for words in named for word in _words(words) for architecture in _parsed(word)]
    taken = [one for one in found if one.version >= OLDEST]
    if not taken:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST: got {text!r}, the kernels need 8.0 or newer")
    if len(taken) < len(found):
        left = ", ".join(str(one) for one in found if one not in taken)
        print(f"TORCH_CUDA_ARCH_LIST: {left} is left out, the kernels need 8.0 or newer", file=sys.stderr)
    return list(dict.fromkeys(taken))


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[;,\s]+", text) if word]


def _parsed(word: str) -> list[Architecture]:
    if word == "native":
        return _visible_gpus()
    match = re.fullmatch(r"(\d+\.\d[af]?)(\+PTX)?", word)
    if match is None:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST: got {word!r}, allowed are numbers such as 8.0, 9.0a, 10.0+PTX, "
            f"the names {', '.join(NAMED_ARCHITECTURES)}, and native, separated by ';'"
        )
    return [Architecture(match[1], match[2] is not None)]


def _visible_gpus() -> list[Architecture]:
    """The GPUs that torch sees."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = {torch.cuda.get_device_capability(index) for index in range(count)}
    if not found:
        raise BuildError("TORCH_CUDA_ARCH_LIST: got 'native', but torch sees no GPU here; name the architectures, as in 9.0a")
    return [Architecture(f"{major}.{minor}") for major, minor in sorted(found)]


def known_to(nvcc: str, targets: Sequence[Architecture], named: bool) -> list[Architecture]:
    """The architectures that this nvcc compiles for.

    Args:
        named: whether the user has named the targets; of the default ones only those are taken that nvcc knows, the newest with
            PTX.

    Raises:
        BuildError: nvcc does not know one that the user has named, or it knows none.
    """
    listed = _answer([nvcc, "--list-gpu-code"])
    known = {word.removeprefix("sm_").rstrip("af") for word in listed.split()}
    unknown = [target for target in targets if target.name.rstrip("af") not in known]
    taken = [target for target in targets if target not in unknown]
    if unknown and (named or not taken):
        names = ", ".join(sorted(known, key=lambda name: (len(name), name)))
        raise BuildError(f"TORCH_CUDA_ARCH_LIST: got {unknown[0]}, {nvcc} knows {names}")
    if unknown:
        newest = max(taken, key=lambda target: target.version)
        # PTX of an architecture with a suffix serves no other one.
        with_ptx = Architecture(newest.number.rstrip("af"), ptx=True)
        taken = [with_ptx if target is newest else target for target in taken]
        print(f"{', '.join(map(str, unknown))} is left out, which {nvcc} does not know", file=sys.stderr)
    return taken


# ---- How a library is known ------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent


def mark(kind: str) -> str:
    """What a library of a kind, "CUDA" or "CPU", carries as a string: the package's version and a hash of its ops' schemas.

    ``ditkernels.ops._native`` looks for it in the file before the library is loaded.
    """
    found = re.search(r'__version__ = "(.+)"', (ROOT / "ditkernels/_version.py").read_text(encoding="utf-8"))
    assert found is not None
    schemas = (ROOT / "ditkernels/ops/schemas.txt").read_bytes()
    return f"ditkernels:{kind}:{found[1]}:{hashlib.sha256(schemas).hexdigest()[:16]}:"


def record_of(library: Path, kind: str) -> Path:
    """Where it is noted down what a library must be, or why there is none: beside it."""
    return library.parent / f"_{kind.lower()}_build.json"


def record(library: Path, kind: str) -> None:
    """Notes down size and checksum of a finished library."""
    content = library.read_bytes()
    facts = {"absent": None, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    record_of(library, kind).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def install(built: Path, target: Path, kind: str) -> None:
    """Puts a library in its place whole, and its record after it: a crash leaves the old one, or one that is refused."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.tmp")
    shutil.copyfile(built, unfinished)
    os.replace(unfinished, target)
    record(target, kind)


# ---- What to build with ----------------------------------------------------------------------------------------------


def find_nvcc(environ: Mapping[str, str] = os.environ) -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH if they are set, else of the PATH, else of /usr/local/cuda*; None if there is none."""
    found = (shutil.which("nvcc", path=place) for place in _places_of_nvcc(environ))
    return next(filter(None, found), None)


def nvcc_lacking(environ: Mapping[str, str] = os.environ) -> str:
    """The sentence that says where nvcc was looked for in vain."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            return f"{name}={environ[name]} holds no bin/nvcc"
    return "no nvcc was found (looked in CUDA_HOME, CUDA_PATH, the PATH, /usr/local/cuda and /usr/local/cuda-*)"


def _places_of_nvcc(environ: Mapping[str, str]) -> Iterable[str | None]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            return [str(Path(environ[name]) / "bin")]

    def version(folder: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", folder)]

    several = sorted(glob.glob("/usr/local/cuda-*/bin"), key=version, reverse=True)
    return [environ.get("PATH"), "/usr/local/cuda/bin", *several]


def _answer(command: Sequence[str], folder: Path | None = None) -> str:
    """What a program prints that runs in a folder.

    Raises:
        BuildError: it does not run.
    """
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} ended with status {done.returncode}: {_first_line(done.stderr or done.stdout)}")
    return done.stdout


def _first_line(text: str) -> str:
    """The first line that speaks of an error, or the first."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"]
    return next((line for line in lines if "error" in line.lower()), lines[0])


def refuse_nvcc(nvcc: str, environ: Mapping[str, str] = os.environ) -> None:
    """Finds what would stop a build before anything is compiled.

    Raises:
        BuildError: nvcc does not run, is too old, or has no host compiler that it can use; ninja is missing.
    """
    release = re.search(r"release (\d+)\.(\d+)", _answer([nvcc, "--version"]))
    if release is None:
        raise BuildError(f"{nvcc} --version names no release")
    if tuple(map(int, release.groups())) < OLDEST_NVCC:
        raise BuildError(f"{nvcc} is of CUDA {release[1]}.{release[2]}, 12.0 is needed; CUDA_HOME names another toolkit")
    _ninja()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "probe.cu").write_text("#include <optional>\nint main() { return 0; }\n", encoding="utf-8")
        called = _link_compiler(Path(folder), nvcc)
        try:
            _answer([called, *host_compiler(environ), "-std=c++20", "-c", "probe.cu", "-o", "probe.o"], Path(folder))
        except BuildError as error:
            advice = "CXX names another one that nvcc of this version takes"
            raise BuildError(f"nvcc cannot use its host compiler: {error}; {advice}") from error


def host_compiler(environ: Mapping[str, str] = os.environ) -> list[str]:
    """How nvcc is told of the compiler that CXX names; without it nvcc takes NVCC_CCBIN or g++."""
    return ["-ccbin", shlex.split(environ["CXX"])[0]] if environ.get("CXX") else []


def _ninja() -> list[str]:
    found = shutil.which("ninja")
    if found:
        return [found]
    if subprocess.run([sys.executable, "-m", "ninja", "--version"], capture_output=True).returncode:
        raise BuildError("ninja is missing: pip install ninja")
    return [sys.executable, "-m", "ninja"]


def jobs(environ: Mapping[str, str] = os.environ) -> int:
    """MAX_JOBS, else one for each core that this process may use, as far as memory goes.

    Raises:
        BuildError: MAX_JOBS is no whole number of 1 or more.
    """
    asked = environ.get("MAX_JOBS")
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            raise BuildError(f"MAX_JOBS: got {asked!r}, allowed is 1 or more")
        return int(asked)
    cores = min(_affinity(), *_limits("cpu"))
    memory = min(_available_memory(), *_limits("memory"))
    return max(1, min(int(cores), int(memory // BYTES_A_JOB)))


def _affinity() -> int:
    # macOS has none.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _available_memory() -> int:
    try:
        pages = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    except OSError:
        pages = None
    return int(pages.group(1)) * 1024 if pages else 4 * BYTES_A_JOB


CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def _limits(what: str) -> list[float]:
    """What the control groups around this process leave it of "cpu" (cores) or "memory" (bytes); infinite for no limit."""
    found = [float("inf")]
    for controllers, path in _memberships():
        if controllers == [""]:
            root, read = CGROUPS, {"cpu": _cores_v2, "memory": _bytes_v2}[what]
        elif what in controllers:
            root, read = CGROUPS / what, {"cpu": _cores_v1, "memory": _bytes_v1}[what]
        else:
            continue
        # Inside a container the group of this process is often mounted as the root itself.
        folders = [root / path, *(root / parent for parent in Path(path).parents), root]
        found += [limit for folder in folders if (limit := read(folder)) is not None]
    return found


def _memberships() -> list[tuple[list[str], str]]:
    """(controllers, path below the root) of each control group of this process; the only controller of version 2 is ""."""
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    parts = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    return [(controllers.split(","), path.lstrip("/")) for _, controllers, path in parts]


def _number(file: Path, at: int = 0) -> float | None:
    """A number in a file of a control group; None where there is no file or no limit."""
    try:
        word = file.read_text(encoding="utf-8").split()[at]
    except (OSError, IndexError):
        return None
    return float(word) if word.isdigit() else None


def _ratio(quota: float | None, period: float | None) -> float | None:
    return None if quota is None or not period else quota / period


def _left(limit: float | None, used: float | None) -> float | None:
    return None if limit is None else limit - (used or 0)


def _cores_v2(folder: Path) -> float | None:
    return _ratio(_number(folder / "cpu.max"), _number(folder / "cpu.max", 1))


def _bytes_v2(folder: Path) -> float | None:
    return _left(_number(folder / "memory.max"), _number(folder / "memory.current"))


def _cores_v1(folder: Path) -> float | None:
    return _ratio(_number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us"))


def _bytes_v1(folder: Path) -> float | None:
    return _left(_number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes"))


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


def build_library(
    out: Path, tools: Toolchain, targets: Sequence[Architecture], files: Sequence[Path] | None = None, named: bool = True
) -> Path:
    """Compiles and links the library into the folder ``out``; what is up to date stays.

    Args:
        named: whether the user has named the targets, so that one which nvcc does not know is an error.

    Returns:
        the path of the library.

    Raises:
        BuildError: it does not compile, or the compiler does not know an architecture.
    """
    files = sources() if files is None else files
    refuse_nvcc(tools.nvcc)
    targets = known_to(tools.nvcc, targets, named)
    workers = jobs()
    threads = max(1, min(workers // max(1, len(files)), 2 * len(targets)))
    codes = " ".join(f"-gencode=arch=compute_{a.name},code={_codes(a)}" for a in targets)
    linked, nvcc = _linked(out, tools, files)
    defined = f"{_defined('DITKERNELS_ARCHITECTURES', ';'.join(map(str, targets)))} {_defined('DITKERNELS_MARK', mark('CUDA'))}"
    compiling = f"{nvcc} {' '.join(FLAGS)} -I{SOURCES} {linked} {codes} --threads={threads} {defined}"
    objects = [f"{file.stem}.o" for file in files]
    glibc = os.environ.get("DITKERNELS_GLIBC")
    link = [
        "rule link",
        f"  command = {nvcc} -shared -cudart static $in -L{PACKAGES}/torch/lib -ltorch_cpu -ldl"
        " -Xlinker --exclude-libs=ALL -Xlinker --strip-debug -o $out.tmp && mv $out.tmp $out",
        f"build {LIBRARY}: link {' '.join(objects)}",
    ]
    _run_ninja(
        out,
        [
            "rule compile",
            "  depfile = $out.d",
            "  deps = gcc",
            f"  command = {compiling} -MD -MF $out.d -c $in -o $out",
            *(f"build {name}: compile {SOURCES}/{file.name}" for name, file in zip(objects, files)),
            *([] if glibc else link),
        ],
        workers,
    )
    if glibc:
        cudart = [found for folder in ("lib", "lib64") for found in (out / TOOLKIT / folder).glob("libcudart_static.a")]
        if not cudart:
            raise BuildError(f"DITKERNELS_GLIBC={glibc}: there is no libcudart_static.a beside {tools.nvcc}")
        link_portably(out / LIBRARY, glibc, str(find_cxx()), [out / name for name in objects], [cudart[0]], tools.torch)
    record(out / LIBRARY, "CUDA")
    return out / LIBRARY


# Below the folder of a build stand links to all that a command names, so that no command holds a path of the user's, which may
# have spaces, quotes or dollars in it: ninja, the shell and nvcc, which asks a shell itself, would each read those in its own way.
SOURCES, PACKAGES, TOOLKIT, WRAPPER = "links/sources", "links/packages", "links/toolkit", "links/wrapper"


def _linked(out: Path, tools: Toolchain, files: Sequence[Path]) -> tuple[str, str]:
    """Makes the links; returns the flags of the headers that are not ours, and how nvcc is called."""
    (folder,) = {file.resolve().parent for file in files}
    _link(out / SOURCES, folder)
    _link(out / PACKAGES, tools.torch.parent)
    # The toolkit's own headers go first; a toolkit without cublasLt.h takes it from the packages that torch came with.
    system = [tools.torch / "include", *_blas_includes(tools.torch.parent)]
    headers = [f"-isystem {PACKAGES}/{path.relative_to(tools.torch.parent).as_posix()}" for path in system]
    host = [shlex.quote(word).replace("$", "$$") for word in host_compiler()]
    return " ".join([*host, *headers]), _link_compiler(out, tools.nvcc)


def _link_compiler(out: Path, nvcc: str) -> str:
    """How nvcc is called from the folder ``out``."""
    path = Path(nvcc)
    if path.parent.name != "bin":  # a wrapper
        _link(out / WRAPPER, path.parent)
        return f"{WRAPPER}/{path.name}"
    # The toolkit and not its bin: nvcc writes bin/../include as include into the list of what a file depends on.
    _link(out / TOOLKIT, path.parent.parent)
    return f"{TOOLKIT}/bin/{path.name}"


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target.resolve(), target_is_directory=True)


def _defined(name: str, text: str) -> str:
    """The flag that defines a macro as a string."""
    return shlex.quote(f'-D{name}="{text}"').replace("$", "$$")


def compile_ptx(tools: Toolchain, file: Path, name: str, out: Path) -> None:
    """Compiles one file to PTX for one architecture ("80", "90a").

    Raises:
        BuildError: it does not compile.
    """
    unused = ('-DDITKERNELS_ARCHITECTURES=""', '-DDITKERNELS_MARK=""')
    system = (tools.torch / "include", *_blas_includes(tools.torch.parent))
    headers = [word for path in system for word in ("-isystem", str(path))]
    _run([tools.nvcc, *FLAGS, f"-I{CSRC}", *headers, f"-arch=compute_{name}", *unused, "-ptx", str(file), "-o", str(out)])


def assemble(tools: Toolchain, ptx: Path, name: str, out: Path, entries: Sequence[str] = ()) -> None:
    """Assembles PTX to machine code for one architecture, of all kernels or of these alone.

    Raises:
        BuildError: the assembler refuses.
    """
    chosen = [word for entry in entries for word in ("-Xptxas", f"--entry={entry}")]
    _run([tools.nvcc, f"-arch=sm_{name}", "-cubin", *chosen, str(ptx), "-o", str(out)])


def _run(command: Sequence[str]) -> str:
    """What a command prints; BuildError with all of that if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def _blas_includes(packages: Path) -> list[Path]:
    return sorted(path.parent for path in packages.glob("nvidia/*/include/cublasLt.h"))


def _codes(architecture: Architecture) -> str:
    codes = [f"sm_{architecture.name}"] + [f"compute_{architecture.name}"] * architecture.ptx
    return codes[0] if len(codes) == 1 else f"[{','.join(codes)}]"


def _run_ninja(out: Path, lines: Sequence[str], workers: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "build.ninja").write_text("\n".join([*lines, ""]), encoding="utf-8")
    command = [*_ninja(), "-C", str(out), "-j", str(workers)]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise BuildError(
            "csrc/cuda does not compile, see above. MAX_JOBS=1 needs less memory, CUDA_HOME names another toolkit, CXX another "
            "host compiler, TORCH_CUDA_ARCH_LIST other architectures"
        )


# ---- The CPU library -------------------------------------------------------------------------------------------------

CPU_CSRC = CSRC.parent / "cpu"
CPU_LIBRARY = "_cpu.so"
# Multiplications and additions may become one instruction; nothing else of the arithmetic is loosened.
CPU_FLAGS = (
    *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
# But in these files, whose results have the bits of two operations.
UNCONTRACTED = ("sum.cpp",)
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


def cxx_lacking(environ: Mapping[str, str] = os.environ) -> str:
    """The sentence that says where a C++ compiler was looked for in vain."""
    if environ.get("CXX"):
        return f"CXX={environ['CXX']} is not a program that can be run"
    return "no C++ compiler was found (looked for c++, g++ and clang++ on the PATH)"


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
        whole = ("-ffp-contract=off",) if file.name in UNCONTRACTED else ()
        if "#ifdef DITKERNELS_ISA" in file.read_text(encoding="utf-8"):
            for isa, flags in sets.items():
                yield f"{file.stem}.{isa}.o", file, (*flags, *whole, f"-DDITKERNELS_ISA={isa}")


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
    start = [compiler, *CPU_FLAGS, *extra, f'-DDITKERNELS_MARK="{mark("CPU")}"', "-isystem", str(torch / "include")]
    commands = [[*start, *flags, "-c", str(file), "-o", str(out / name)] for name, file, flags in made]
    with ThreadPoolExecutor(jobs()) as pool:
        list(pool.map(_run, commands))
    library, unfinished = out / CPU_LIBRARY, out / f"{CPU_LIBRARY}.tmp"
    objects = [out / name for name, _, _ in made]
    glibc = os.environ.get("DITKERNELS_GLIBC")
    if glibc:
        link_portably(library, glibc, compiler, objects, [], torch)
    else:
        _run([compiler, "-shared", *extra, *map(str, objects), f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(unfinished)])
        os.replace(unfinished, library)
    record(library, "CPU")
    return library


def link_portably(library: Path, glibc: str, compiler: str, objects: Sequence[Path], archives: Sequence[Path], torch: Path) -> None:
    """Links objects so that every system with this glibc, or a newer one, loads the library.

    A linker takes the newest version of a symbol that its own libc has, and so asks for this machine's. Zig's linker knows those of
    every glibc. The C++ runtime of the compiler goes into the library, and nothing of it is seen from outside.

    Args:
        glibc: as "2.28", that of manylinux_2_28.
        compiler: a GCC, or a clang beside one; where its C++ runtime lies is asked of it.
        archives: static libraries that the objects need.

    Raises:
        BuildError: there is no Zig (package ziglang), or it does not link.
    """
    if importlib.util.find_spec("ziglang") is None:
        raise BuildError(
            f"DITKERNELS_GLIBC={glibc} links by Zig: pip install ziglang; without it the library needs this system's glibc"
        )
    parts = library.parent / "portable"
    parts.mkdir(exist_ok=True)
    # glibc 2.32 tells so whether there are threads; an older one does not, and then atomics count references.
    (parts / "threads.cpp").write_text(
        'extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n', encoding="utf-8"
    )
    _run([compiler, "-fPIC", "-c", str(parts / "threads.cpp"), "-o", str(parts / "threads.o")])
    (parts / "none.map").write_text("{ local: *; };\n", encoding="utf-8")
    runtime = [_run([compiler, f"-print-file-name={name}"]).strip() for name in ("libstdc++.a", "libgcc.a", "libgcc_s.so.1")]
    unfinished = library.with_name(f"{library.name}.tmp")
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", f"{platform.machine()}-linux-gnu.{glibc}"]
    given = map(str, [*objects, parts / "threads.o", *archives])
    found = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ldl", "-lrt", "-lpthread"]
    hidden = [f"-Wl,--version-script={parts / 'none.map'}", "-s"]
    _run([*zig, "-shared", "-nostdlib++", *given, *runtime, *found, *hidden, "-o", str(unfinished)])
    os.replace(unfinished, library)


def build(kind: str, out: Path, torch: Path) -> Path:
    """Builds a library as the environment asks.

    Args:
        kind: "CUDA" or "CPU".
        torch: the folder of the package torch.

    Raises:
        BuildError: there is no compiler, or the library cannot be built.
    """
    compiler = find_nvcc() if kind == "CUDA" else find_cxx()
    if compiler is None:
        raise BuildError(nvcc_lacking() if kind == "CUDA" else cxx_lacking())
    if kind == "CPU":
        return build_cpu_library(out, compiler, torch)
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    return build_library(out, Toolchain(compiler, torch), architectures(asked), named=bool(asked))


def main() -> None:
    """Builds a library into a folder: ``python tools/build_native.py cuda FOLDER``, or ``cpu FOLDER``.

    With a third argument the library is also put there: ``python tools/build_native.py cpu FOLDER ditkernels/_cpu.so``.
    DITKERNELS_CUDA_LIBRARY, or DITKERNELS_CPU_LIBRARY, names one that lies elsewhere.
    """
    spec = importlib.util.find_spec("torch")
    kind = sys.argv[1].upper() if len(sys.argv) in (3, 4) else ""
    if kind not in ("CUDA", "CPU"):
        raise SystemExit("usage: python tools/build_native.py cuda|cpu FOLDER [LIBRARY]")
    if spec is None or spec.origin is None:
        raise SystemExit(f"torch is not installed for {sys.executable}, and the library is built against its headers")
    try:
        built = build(kind, Path(sys.argv[2]), Path(spec.origin).parent)
    except BuildError as error:
        raise SystemExit(f"the {kind} library cannot be built: {error}") from None
    for place in sys.argv[3:]:
        install(built, Path(place), kind)
    print(built)


if __name__ == "__main__":
    main()
