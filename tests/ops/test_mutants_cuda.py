"""Runs the proofs of tests/ops/cuda_proof, each in a process of its own: a process holds one build of the kernels."""

from __future__ import annotations

import pytest

from tests.ops.test_triton import in_a_process
from tools.kernel_proof import emulated_cuda
from tools.tree import ROOT

PROOFS = ROOT / "tests/ops/cuda_proof"


@pytest.mark.parametrize("file", sorted(p.name for p in PROOFS.glob("*.py")))
def test_proof(file: str) -> None:
    reason = emulated_cuda.why_not()
    if reason:
        pytest.skip(reason)
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short")
    done = in_a_process("-m", "pytest", *options, str(PROOFS / file), interpret=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
