"""Compiles launches ahead of time for a GPU that is not there, and reads registers, spills and access widths from what comes out.

``Compiler`` takes the place of Triton's driver, so that Triton specialises arguments exactly as it would on that GPU; ``recorded``
takes the place of ``_triton.launch``. Nothing is run: tensors only need the right shapes, dtypes and strides.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from ditkernels.ops import _triton

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
OPCODE = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\b")
REGISTER = re.compile(r"%\w+")
PARAMETER = re.compile(r"\[\w+_param_(\d+)")
PTX = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(\{[^}]*\}|[^,{]*),\s*(.*?);?\s*$")
GLOBAL = re.compile(r"^\s*(?:@!?%\w+\s+)?(ld|st)\.global([\w.:]*)\s+(.*)")


@dataclass(frozen=True)
class Access:
    """One load or store of global memory: the arguments its address is made from, and the bytes a thread moves."""

    arguments: frozenset[str]
    store: bool
    bytes: int


@dataclass
class Compiled:
    """One kernel's machine code."""

    name: str
    cubin: bytes
    ptx: str
    parameters: list[str]

    @functools.cached_property
    def resources(self) -> dict[str, int]:
        """REG, STACK, LOCAL, SHARED ... as cuobjdump reports them."""
        line = next(line for line in disassembled(self.cubin).splitlines() if "REG:" in line)
        return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}

    @property
    def opcodes(self) -> list[str]:
        return [m.group(1) for m in map(OPCODE.match, disassembled(self.cubin).splitlines()) if m]

    @property
    def spills(self) -> int:
        """Accesses of local memory, and bytes of stack."""
        local = sum(o.startswith(("LDL", "STL")) for o in self.opcodes)
        return local + self.resources["STACK"] + self.resources["LOCAL"]

    @property
    def wide_instructions(self) -> int:
        """Loads and stores of 128 bits and more in the machine code."""
        return sum(o.startswith(("LDG", "STG")) and (".128" in o or ".256" in o) for o in self.opcodes)

    def accesses(self) -> list[Access]:
        """Every access of global memory, traced in the PTX from its address to the arguments of the kernel."""
        origins = self._origins()
        found = []
        for line in self.ptx.splitlines():
            match = GLOBAL.match(line)
            if match is None:
                continue
            kind, suffix, operands = match.groups()
            address = operands[operands.index("[") : operands.index("]")]
            arguments = set().union(*(origins.get(r, set()) for r in REGISTER.findall(address)))
            found.append(Access(frozenset(arguments), kind == "st", width_of(suffix)))
        return found

    def _origins(self) -> dict[str, set[str]]:
        """For every register that addresses are made from: the kernel's arguments it depends on."""
        sources: dict[str, set[str]] = {}
        origins: dict[str, set[str]] = {}
        for line in self.ptx.splitlines():
            match = PTX.match(line)
            if match is None or match.group(1).startswith(("ld.global", "st.", "ld.shared")):
                continue
            for target in REGISTER.findall(match.group(2)):
                parameter = PARAMETER.search(match.group(3))
                if parameter:
                    origins.setdefault(target, set()).add(self.parameters[int(parameter.group(1))])
                sources.setdefault(target, set()).update(REGISTER.findall(match.group(3)))
        changed = True
        while changed:
            changed = False
            for target, registers in sources.items():
                reached = origins.setdefault(target, set())
                before = len(reached)
                reached.update(*(origins.get(r, set()) for r in registers))
                changed |= len(reached) > before
        return origins


@functools.cache  # launches of several ops share kernels, and disassembling is what takes the time
def disassembled(cubin: bytes) -> str:
    """The machine code, headed by the resources it uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [BIN / "cuobjdump", "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def width_of(suffix: str) -> int:
    """Bytes a thread moves with a PTX load or store of this suffix, as in ``.v4.b32``."""
    lanes = re.search(r"\.v(\d)", suffix)
    bits = re.findall(r"\.[bufs](\d+)", suffix)[-1]
    return int(lanes.group(1) if lanes else 1) * int(bits) // 8


class Compiler:
    """A driver of a GPU that exists only as a target of the compiler."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def recorded(capability: int) -> Iterator[list[Compiled]]:
    """Compiles every launch inside for the capability (80, 90, 100) in place of running it, and lists the kernels."""
    assert not _triton.INTERPRETED, "ahead-of-time compilation needs a process without TRITON_INTERPRET"
    kernels: list[Compiled] = []

    def launch(
        kernel: Any, programs: int, tile: Any, device: torch.device, *args: Any, **constants: Any
    ) -> None:
        assert programs > 0
        compiled = kernel.run(
            *args,
            grid=(programs,),
            warmup=True,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **constants,
        )
        parameters = [
            name
            for name, kind in compiled.src.signature.items()
            for part in (kind if isinstance(kind, tuple) else (kind,))
            if part != "constexpr"
        ]
        code = compiled.asm
        kernels.append(Compiled(kernel.fn.__name__, code["cubin"], code["ptx"], parameters))

    before = _triton.launch
    triton.runtime.driver.set_active(Compiler(capability))
    _triton.launch = launch
    try:
        yield kernels
    finally:
        _triton.launch = before
