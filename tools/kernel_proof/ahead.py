"""Compiles launches ahead of time for a GPU that is not there; machine_code.py reads what comes out.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from ditkernels.ops import _triton
from tools.kernel_proof.machine_code import Code

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
PARAMETER = re.compile(r"\[\w+_param_(\d+)")


@dataclass
class Compiled(Code):
    """One launch's machine code, and what it was launched with.

    Attributes:
        parameters: names of the arguments in the order of the PTX.
        shapes: of the tensors among the arguments.
        programs, threads: of the launch; threads of one program.
        shared: bytes of shared memory of one program.
    """

    cubin: bytes = b""
    parameters: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    programs: int = 0
    threads: int = 0
    shared: int = 0


def read(name: str, cubin: bytes, ptx: str, parameters: list[str]) -> Compiled:
    """What one launch was compiled to."""

    def argument(operands: str) -> str | None:
        match = PARAMETER.search(operands)
        return None if match is None else parameters[int(match.group(1))]

    text = disassembled(cubin)
    usage = next(line for line in text.splitlines() if "REG:" in line)
    resources = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    return Compiled(name, ptx, text, resources, argument, cubin, parameters)


@functools.cache  # launches of several ops share kernels, and disassembling is what takes the time
def disassembled(cubin: bytes) -> str:
    """The machine code, headed by the resources it uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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

    def launch(kernel: Any, programs: int, tile: Any, device: torch.device, *args: Any, **constants: Any) -> None:
        assert programs > 0
        compiled = kernel.run(
            *args,
            grid=(programs,),
            warmup=True,
            **tile.options,
            **constants,
        )
        parameters = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
        made = read(kernel.fn.__name__, compiled.asm["cubin"], compiled.asm["ptx"], parameters)
        given = {**dict(zip(kernel.arg_names, args)), **constants}
        tensors = {n: v for n, v in given.items() if isinstance(v, torch.Tensor) and v.numel()}
        made.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        made.programs, made.threads, made.shared = programs, 32 * tile.warps, compiled.metadata.shared
        kernels.append(made)

    before = _triton.launch
    triton.runtime.driver.set_active(Compiler(capability))
    _triton.launch = launch
    try:
        yield kernels
    finally:
        _triton.launch = before
