"""Reads registers, spills, tensor-core use and access widths from PTX and disassembled machine code; no GPU needed.

Shared by the proofs of the Triton kernels, the tests of the CUDA kernels and the reports. Which tensor an access belongs to is
found in the PTX, by following the registers of its address back to the kernel's parameters.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import util
from pathlib import Path

OPCODE = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\b")
REGISTER = re.compile(r"%(?!p\d)\w+")  # predicates lead to no address
PTX = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(\{[^}]*\}|[^,{]*),\s*(.*?);?\s*$")
GLOBAL = re.compile(r"^\s*(?:@!?%\w+\s+)?(ld|st)\.global([\w.:]*)\s+(.*)")
WIDE_BYTES = 16
WIDE_SHARE = 0.88  # of the bytes of a (B, N, D) tensor: 1024 of the 1152 channels of XL


def tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: of the PATH, of CUDA's usual folder, or of Triton's package; None where there is none."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    triton = util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which(name, path=str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return found


@dataclass(frozen=True)
class Access:
    """One load or store of global memory: the arguments its address is made from, and the bytes a thread moves."""

    arguments: frozenset[str]
    store: bool
    bytes: int


@dataclass
class Code:
    """One kernel's code.

    Attributes:
        name: of the kernel.
        ptx: of this kernel alone.
        sass: its machine code, disassembled.
        resources: REG, STACK, LOCAL, SHARED ... as cuobjdump reports them.
        argument: of the operand of a PTX instruction, which argument of the kernel it reads; None if none.
    """

    name: str
    ptx: str
    sass: str
    resources: dict[str, int]
    argument: Callable[[str], str | None]

    @functools.cached_property
    def opcodes(self) -> list[str]:
        return [m.group(1) for m in map(OPCODE.match, self.sass.splitlines()) if m]

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
        sources, arguments = self._flow()
        found = []
        for line in self.ptx.splitlines():
            match = GLOBAL.match(line)
            if match is None:
                continue
            kind, suffix, operands = match.groups()
            address = operands[operands.index("[") : operands.index("]")]
            reached = _reachable(REGISTER.findall(address), sources)
            names = frozenset().union(*(arguments.get(register, set()) for register in reached))
            found.append(Access(names, kind == "st", width_of(suffix)))
        return found

    def _flow(self) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
        """For every register that addresses are made from: the registers, and the arguments, it is computed from."""
        sources: dict[str, set[str]] = {}
        arguments: dict[str, set[str]] = {}
        for line in self.ptx.splitlines():
            match = PTX.match(line)
            if match is None or match.group(1).startswith(("ld.global", "st.", "ld.shared")):
                continue
            _, targets, operands = match.groups()
            name = self.argument(operands)
            for target in REGISTER.findall(targets):
                if name is not None:
                    arguments.setdefault(target, set()).add(name)
                sources.setdefault(target, set()).update(REGISTER.findall(operands))
        return sources, arguments


def _reachable(start: Iterable[str], sources: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = list(start)
    while waiting:
        register = waiting.pop()
        if register not in seen:
            seen.add(register)
            waiting.extend(sources.get(register, ()))
    return seen


def width_of(suffix: str) -> int:
    """Bytes a thread moves with a PTX load or store of this suffix, as in ``.v4.b32``."""
    lanes = re.search(r"\.v(\d)", suffix)
    bits = re.findall(r"\.[bufs](\d+)", suffix)[-1]
    return int(lanes.group(1) if lanes else 1) * int(bits) // 8


def wide_shares(code: Code, tensors: Iterable[str]) -> dict[str, float]:
    """Of the bytes of each of these arguments: the share moved by 128-bit accesses; without those that are never accessed.

    Raises:
        ValueError: the machine code has fewer wide accesses than the PTX, so that these shares would not be true of it.
    """
    accesses = code.accesses()
    tensors = set(tensors)
    wide = sum(a.bytes >= WIDE_BYTES for a in accesses if a.arguments & tensors)
    if code.wide_instructions < wide:
        raise ValueError(f"{code.name}: the assembler split {wide - code.wide_instructions} of {wide} accesses")
    shares = {}
    for name in sorted(tensors):
        mine = [a for a in accesses if name in a.arguments]
        if mine:
            shares[name] = sum(a.bytes for a in mine if a.bytes >= WIDE_BYTES) / sum(a.bytes for a in mine)
    return shares


# ---- Occupancy -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Multiprocessor:
    """What one of them holds ("CUDA C++ Programming Guide", technical specifications per compute capability)."""

    threads: int = 2048
    blocks: int = 32
    registers: int = 65536
    shared: int = 228 * 1024


MULTIPROCESSORS = {80: Multiprocessor(shared=164 * 1024), 90: Multiprocessor(), 100: Multiprocessor()}
REGISTERS_AT_ONCE = 256  # a warp's registers are handed out in such pieces
SHARED_RESERVED = 1024  # of every block, by the driver


def occupancy(capability: int, registers: int, threads: int, shared: int) -> float:
    """The share of a multiprocessor's threads that blocks of this kind keep resident."""
    held = MULTIPROCESSORS[capability]
    warps = -(-threads // 32)
    a_warp = -(-registers * 32 // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    blocks = min(
        held.blocks,
        held.threads // (32 * warps),
        held.registers // (a_warp * warps),
        held.shared // (shared + SHARED_RESERVED),
    )
    return blocks * 32 * warps / held.threads
