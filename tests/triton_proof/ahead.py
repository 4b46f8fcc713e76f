"""Compiles launches ahead of time for a GPU that is not there, and reads registers, spills and access widths from the machine code.

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
LINE = re.compile(r'//## File "([^"]*)", line (\d+)')


@dataclass(frozen=True)
class Access:
    """One load or store of global memory in the machine code: its width and the source lines it came from, innermost first."""

    store: bool
    bytes: int
    lines: tuple[str, ...]


@dataclass
class Compiled:
    """One kernel's machine code."""

    name: str
    cubin: bytes

    @functools.cached_property
    def resources(self) -> dict[str, int]:
        """REG, STACK, LOCAL, SHARED ... as cuobjdump reports them."""
        text = self._tool("cuobjdump", "-res-usage")
        return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text.split("Function")[-1])}

    @functools.cached_property
    def sass(self) -> str:
        return self._tool("nvdisasm", "-gi", "-c")

    @property
    def opcodes(self) -> list[str]:
        return [m.group(1) for m in map(OPCODE.match, self.sass.splitlines()) if m]

    @property
    def spills(self) -> int:
        """Accesses of local memory, and bytes of stack."""
        local = sum(o.startswith(("LDL", "STL")) for o in self.opcodes)
        return local + self.resources["STACK"] + self.resources["LOCAL"]

    def accesses(self) -> list[Access]:
        found, chain = [], []
        fresh = True
        for line in self.sass.splitlines():
            place = LINE.search(line)
            if place:
                if fresh:
                    chain = []
                fresh = False
                chain.append(source_line(*place.groups()))
                continue
            opcode = OPCODE.match(line)
            if opcode is None:
                continue
            fresh = True
            name = opcode.group(1)
            if name.startswith(("LDG", "STG")):
                found.append(Access(name.startswith("STG"), width_of(name), tuple(chain)))
        return found

    def _tool(self, tool: str, *options: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            done = subprocess.run(
                [BIN / tool, *options, file.name], capture_output=True, text=True, check=True
            )
        return done.stdout


@functools.cache
def _source(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def source_line(path: str, number: str) -> str:
    lines = _source(path)
    return lines[int(number) - 1].strip() if int(number) <= len(lines) else ""


def width_of(opcode: str) -> int:
    """Bytes a thread moves with a load or store."""
    for part, size in (
        (".256", 32),
        (".128", 16),
        (".64", 8),
        (".U16", 2),
        (".S16", 2),
        (".U8", 1),
        (".S8", 1),
    ):
        if part in opcode:
            return size
    return 4


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
        kernels.append(Compiled(kernel.fn.__name__, compiled.asm["cubin"]))

    before = _triton.launch
    triton.runtime.driver.set_active(Compiler(capability))
    _triton.launch = launch
    try:
        yield kernels
    finally:
        _triton.launch = before
