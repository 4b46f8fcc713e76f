"""Drives the proofs of the Triton kernels (tests/ops/triton_proof) and the command-line check, each in a process of its own.

TRITON_INTERPRET is read when the kernels are imported, so interpreting and compiling exclude each other within one process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROOFS = Path(__file__).parent / "triton_proof"
SUPPORT = {"conftest.py"}
FILES = sorted(p.name for p in PROOFS.glob("*.py") if p.name not in SUPPORT)


def in_a_process(*command: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "DITKERNELS", "TRITON"))}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=PROOFS.parent.parent)


@pytest.mark.parametrize("file", FILES)
def test_proof(file: str) -> None:
    """A proof compiles ahead of time if its name says so, else it is interpreted."""
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short")
    done = in_a_process("-m", "pytest", *options, str(PROOFS / file), interpret=not file.endswith("_ahead.py"))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_importing_neither_compiles_nor_initialises_cuda() -> None:
    program = (
        "import torch, ditkernels, triton.runtime.jit as jit\n"
        "from ditkernels.ops.norm.triton import forward_rows\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not forward_rows.device_caches\n"
    )
    done = in_a_process("-c", program, interpret=False)
    assert done.returncode == 0, done.stderr


def test_without_triton_the_package_imports_and_says_why_the_backend_cannot_serve() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, ditkernels\n"
        "print(ditkernels.ops.modulate_norm(torch.ones(1, 1, 4)).tolist())\n"
        "with ditkernels.use_backend('triton'):\n"
        "    ditkernels.ops.modulate_norm(torch.ones(1, 1, 4))\n"
    )
    done = in_a_process("-c", program, interpret=False)
    assert "[[[0.0, 0.0, 0.0, 0.0]]]" in done.stdout
    assert "BackendError" in done.stderr
    assert "triton cannot be imported" in done.stderr


def test_on_the_cpu_the_backend_refuses_with_a_hint() -> None:
    program = (
        "import torch, ditkernels\nwith ditkernels.use_backend('triton'):\n    ditkernels.ops.modulate_norm(torch.ones(1, 1, 4))\n"
    )
    done = in_a_process("-c", program, interpret=False)
    assert "the tensors are on cpu, the kernels need CUDA; TRITON_INTERPRET=1" in done.stderr
