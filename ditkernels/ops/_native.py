"""What the C++ kernels of all ops share: where their libraries come from, and when they can serve.

There are two: CUDA's (``csrc/cuda``, looked for as ``ditkernels/_C.so``) and the CPU's (``csrc/cpu``, ``ditkernels/_cpu.so``). A
library registers kernels for the internal ops that the package declares. To load one initialises nothing on a device and works
beside a torch without CUDA. Without them the package is whole, and says why.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import os
import re
import struct
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ditkernels._version import __version__
from ditkernels.ops.choice import Op, forget
from ditkernels.ops.context import constant_when_traced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 4096
OLDEST_CAPABILITY = (8, 0)
PACKAGE = Path(__file__).parent.parent

# ---- The libraries ---------------------------------------------------------------------------------------------------


class Library:
    """A compiled library of kernels, or why there is none.

    Attributes:
        kind: "CUDA" or "CPU". The environment variable ``DITKERNELS_<kind>_LIBRARY`` names a library, or "none".
        path: of the loaded library.
        absence: why none is loaded, or None.
        declined: whether the user, here or at installation, asked for none.
    """

    def __init__(self, kind: str, file: str, how: str) -> None:
        self.kind, self.file, self.how = kind, file, how
        self.path: Path | None = None
        self.absence: str | None = "no library has been loaded"
        self.declined = self.told = False

    def load(self, path: Path) -> None:
        """Loads a library of this kind as it is.

        Raises:
            OSError: the file is not there or does not fit this torch, in the words of the system's loader.
        """
        try:
            torch.ops.load_library(path)
        except OSError as error:
            raise OSError(str(error.__cause__ or error)) from error
        self.absence, self.path = None, path
        for remembered in (architectures, runtime, cpu_isa):
            remembered.cache_clear()
        forget()

    def load_if_present(self) -> None:
        """Loads the library that lies in the package or that the environment names; remembers why if it cannot."""
        variable = f"DITKERNELS_{self.kind}_LIBRARY"
        named = os.environ.get(variable)
        if named == "none":
            self.absence, self.declined = f"{variable}=none", True
            return
        path = Path(named).expanduser() if named else PACKAGE / self.file
        if not named and not path.exists():
            self.absence = f"{self.why_not_built(PACKAGE)}; {self.how}"
            self.declined = f"DITKERNELS_BUILD_{self.kind}=0" in self.absence
            return
        try:
            fault = self.fault(path)
            if fault is None:
                self.load(path)
        except OSError as error:
            fault = str(error)
        if fault is not None:
            self.absence = f"the {self.kind} library {path} is not loaded: {fault}"

    def fault(self, path: Path) -> str | None:
        """Why a file must not be loaded, as far as that can be read from the file and from the record beside it; or None.

        Raises:
            OSError: it cannot be read.
        """
        size = path.stat().st_size
        built = self.recorded(path.parent).get("bytes")
        if built is not None and size != built:
            return f"it has {size} bytes, {built} were built; {self.how}"
        if size == 0:
            return f"it is empty; {self.how}"
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _truncation(content) or self._foreign(content)

    def _foreign(self, content: mmap.mmap) -> str | None:
        """Why the file is no library of this kind for the ops of this package, or None if it is."""
        found = re.search(rb"ditkernels:(CPU|CUDA):([^:\0]+):([0-9a-f]+):", content)
        if found is None:
            return f"it is no library of ditkernels, or an older one; {self.how}"
        kind, version, schemas = (group.decode("ascii", "replace") for group in found.groups())
        if kind != self.kind:
            return f"it is the {kind} library"
        if schemas != schemas_hash():
            here = f"{__version__} ({schemas_hash()})"
            return f"it was built for the ops of ditkernels {version} ({schemas}), this is {here}; {self.how}"
        return None

    def recorded(self, folder: Path) -> dict[str, Any]:
        """What was noted down beside a library, or in the place of one; nothing where there is no record that can be read."""
        try:
            facts = json.loads((folder / f"_{self.kind.lower()}_build.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def why_not_built(self, package: Path) -> str:
        """What the installation noted down."""
        record = package / f"_{self.kind.lower()}_build.json"
        if not record.exists():
            return f"the {self.kind} library has not been built in this tree"
        facts = self.recorded(package)
        if "absent" not in facts:
            return f"there is no {self.kind} library, and {record} cannot be read"
        reason = facts["absent"]
        return f"the {self.kind} library was not built: {reason}" if reason else f"{package / self.file} is gone"

    def changed(self) -> str | None:
        """That the loaded library is not the file that was built, by its checksum; None if it is, or nothing is recorded."""
        if self.path is None:
            return None
        built = self.recorded(self.path.parent).get("sha256")
        found = hashlib.sha256(self.path.read_bytes()).hexdigest()
        if built is None or found == built:
            return None
        return f"{self.path} is not the file that was built (sha256 {found[:16]}, built was {built[:16]}); {self.how}"

    def tell_of_absence(self) -> None:
        """Warns once that calls run without the library, unless the user asked for none."""
        if self.absence is not None and not (self.declined or self.told):
            self.told = True
            warnings.warn(f"ditkernels runs on plain PyTorch here, since {self.absence}", stacklevel=2)


@functools.cache
def schemas_hash() -> str:
    """Of the ops' schemas; a library carries that of the ops which it was built for."""
    schemas = resources.files(__package__).joinpath("schemas.txt").read_bytes()
    return hashlib.sha256(schemas).hexdigest()[:16]


def _truncation(content: mmap.mmap) -> str | None:
    """Why an ELF file is not whole, or None; to map one whose segments reach beyond its end would kill the process."""
    if content[:4] != b"\x7fELF":
        return None  # whatever it is, the loader says so
    if len(content) < 64 or content[4] != 2:
        return "it is cut short, or for another kind of machine"
    segments, _, _, _, size, count = struct.unpack_from("<QQIHHH", content, 32)
    if segments + size * count > len(content):
        return "it is cut short"
    for at in range(segments, segments + size * count, size):
        offset, _, _, length = struct.unpack_from("<QQQQ", content, at + 8)
        if offset + length > len(content):
            return f"it is cut short: it has {len(content)} bytes, a segment ends at {offset + length}"
    return None


CUDA = Library(
    "CUDA",
    "_C.so",
    "`pip install --no-build-isolation .` with nvcc at hand builds it from csrc/cuda, "
    "or DITKERNELS_CUDA_LIBRARY names one that is built",
)
CPU = Library(
    "CPU",
    "_cpu.so",
    "`pip install --no-build-isolation .` with a C++ compiler at hand builds it from csrc/cpu, "
    "or DITKERNELS_CPU_LIBRARY names one that is built",
)


def cuda_library() -> str:
    """The loaded CUDA library, or why there is none."""
    return CUDA.absence or f"{CUDA.path}, built for {architectures() or 'the host'}"


def cpu_library() -> str:
    """The loaded CPU library and the instruction set in use, or why there is none."""
    return CPU.absence or f"{CPU.path}, {_isa_reason() or f'runs on {cpu_isa()}'}"


def changed_libraries() -> list[str]:
    """Of the loaded libraries those whose file is not the one that was built, each in a sentence."""
    return [said for library in (CUDA, CPU) if (said := library.changed()) is not None]


class Kernel(NamedTuple):
    """What a kernel of the library takes on a device.

    Attributes:
        name: with its template arguments.
        registers: of a thread.
        local_bytes: of local memory of a thread, where spilled registers lie.
        shared_bytes: of a block, the most it is launched with.
        threads: of a block, the most it is launched with.
        blocks: of that kind that a multiprocessor holds.
        code: architecture of the machine code in use, 90 for sm_90.
    """

    name: str
    registers: int
    local_bytes: int
    shared_bytes: int
    threads: int
    blocks: int
    code: int


def kernel_attributes(device: torch.device) -> list[Kernel]:
    """Every kernel of the loaded library as the device's driver sees it; those that two files share stand there once."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    table, names = torch.ops.ditkernels.cuda_kernel_attributes(index)
    return sorted({Kernel(name, *row) for name, row in zip(names.split("\n"), table.tolist())})


# ---- Architectures and drivers ---------------------------------------------------------------------------------------


def told(name: str, *args: Any) -> Any:
    """What an op of a loaded library answers without looking at tensors. Whoever traces does not see that it was asked."""
    with _disable_current_modes():
        return getattr(torch.ops.ditkernels, name)(*args)


@functools.cache
def architectures() -> str:
    """What the loaded library was built for, as in "8.0+PTX;9.0a;10.0"; "" for the tests' emulation."""
    if not hasattr(torch.ops.ditkernels, "cuda_architectures"):
        return ""
    return str(told("cuda_architectures"))


@functools.cache
def runtime() -> int:
    """The CUDA that the loaded library was built with, 13000 for 13.0; 0 for the tests' emulation."""
    if not hasattr(torch.ops.ditkernels, "cuda_runtime"):
        return 0
    return int(told("cuda_runtime"))


@functools.cache
def path_on(capability: tuple[int, int], built: str) -> str | None:
    """How a library built for these architectures runs on a device of this compute capability.

    Machine code serves the same major version from its minor version on; with the suffix "a" that version alone. PTX
    serves every later version, without a suffix only (CUDA C++ Programming Guide, "Application Compatibility").

    Returns:
        "machine code", "PTX" (the driver compiles it at first use), or None: it cannot.
    """
    jit = False
    for word in built.split(";"):
        major, minor, suffix, ptx = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word).groups()  # type: ignore[union-attr]
        number = (int(major), int(minor))
        same_major = number[0] == capability[0] and number <= capability
        if number == capability or (same_major and suffix != "a"):
            return "machine code"
        jit |= ptx is not None and not suffix and number <= capability
    return "PTX" if jit else None


def _architecture_reason(capability: tuple[int, int]) -> str | None:
    got, need = (".".join(map(str, c)) for c in (capability, OLDEST_CAPABILITY))
    if capability < OLDEST_CAPABILITY:
        return f"the device has compute capability {got}, the kernels need {need}"
    built = architectures()
    path = path_on(capability, built)
    if path is None:
        return (
            f"the device has compute capability {got}, the library was built for {built}; "
            f'TORCH_CUDA_ARCH_LIST="{got}" builds it for this device'
        )
    return _driver_reason(runtime(), torch._C._cuda_getDriverVersion(), path)  # type: ignore[attr-defined]


def _driver_reason(built_with: int, driver: int, path: str) -> str | None:
    """Machine code needs a driver of the same major CUDA version; PTX one that is as new as the compiler that wrote it."""
    needed = built_with if path == "PTX" else built_with // 1000 * 1000
    if driver >= needed:
        return None
    got, need, library_is = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, needed, built_with))
    return (
        f"the device's driver serves CUDA {got}, the library was built with {library_is} and needs {need}; "
        f"a newer driver, or a library built with the nvcc of CUDA {got}, is needed"
    )


# ---- Refusals --------------------------------------------------------------------------------------------------------


def cuda_reason(internal: str, device: torch.device) -> str | None:
    """Why the library's kernels of an internal op cannot run on a device, or None if they can."""
    if CUDA.absence is not None:
        return CUDA.absence
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device.type}, the kernels need CUDA"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"ditkernels::{internal}", device.type.upper()):
        return f"the tensors are on {device.type}; the library has no kernels for it"
    if device.type == "cuda":
        return _architecture_reason(torch.cuda.get_device_capability(device))
    return None


def _dtype_reason(op: Op, args: Sequence[Any]) -> str | None:
    for dtype in op.declaration.dtypes(args):
        if dtype not in DTYPES:
            return f"{dtype} is not among the kernels' dtypes ({', '.join(map(str, DTYPES))})"
    return None


def refuse_cuda(op: Op, args: Sequence[Any]) -> str | None:
    """Why the CUDA kernels of ``op`` cannot take these arguments, or None if they can."""
    declaration = op.declaration
    device = next(value for value in args if isinstance(value, Tensor)).device
    reason = cuda_reason(f"{op.name}_cuda", device)
    if reason is not None:
        return reason
    reason = _dtype_reason(op, args)
    if reason is not None:
        return reason
    width = declaration.size_of_row(args)
    if width > MAX_WIDTH:
        return f"a row of {width} channels is wider than a block; the widest taken is {MAX_WIDTH}"
    return None


# ---- The CPU's library -----------------------------------------------------------------------------------------------


@functools.cache
def cpu_isa() -> str:
    """The instruction set that the loaded CPU library runs on.

    Raises:
        RuntimeError: the processor is too old, or DITKERNELS_CPU_ISA names a set that it has not.
    """
    return str(told("cpu_isa"))


def _isa_reason() -> str | None:
    try:
        cpu_isa()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


@constant_when_traced
def cpu_serves() -> bool:
    """Whether the CPU library is there and runs on this processor."""
    return CPU.absence is None and _isa_reason() is None


def cpu_reason(device: torch.device) -> str | None:
    """Why the CPU library's kernels cannot run on tensors of a device, or None if they can."""
    if device.type != "cpu":
        return f"the tensors are on {device.type}, the kernels run on a CPU"
    return CPU.absence or _isa_reason()


def refuse_cpu(op: Op, args: Sequence[Any]) -> str | None:
    """Why the CPU kernels of ``op`` cannot take these arguments, or None if they can."""
    device = next(value for value in args if isinstance(value, Tensor)).device
    return cpu_reason(device) or _dtype_reason(op, args)


CUDA.load_if_present()
CPU.load_if_present()
