"""What a start loads and costs: help comes without torch, a name without what it does not need, Triton where it is asked for."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import pytest

from ditkernels import cli

LATE = ["triton", "torch._inductor", "torch._dynamo", "torch.utils.cpp_extension", "torch.utils.flop_counter"]
# The package's own __init__ may import more than the ops, and is not meant here. What torch brings along is its own.
START = f"""
import os, sys, types
for name in [name for name in os.environ if name.startswith(("DITKERNELS", "TRITON"))]:
    del os.environ[name]
import torch
package = sys.modules["ditkernels"] = types.ModuleType("ditkernels")
package.__path__ = [{str(next(iter(find_spec("ditkernels").submodule_search_locations)))!r}]
LATE = [name for name in {LATE} if name not in sys.modules]
DISTRIBUTED = {{name for name in sys.modules if name.startswith("torch.distributed")}}
def loaded():
    more = {{name for name in sys.modules if name.startswith("torch.distributed")}} - DISTRIBUTED
    return [name for name in LATE if name in sys.modules] + sorted(more)
import ditkernels.ops, ditkernels.models, ditkernels.reference
assert loaded() == [], loaded()
"""
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is missing")


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", START + program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_ops_of_a_cpu_load_neither_triton_nor_a_compiler() -> None:
    # The CPU library has no fp64, so auto goes on to the other backends. No dispatch mode here: torch brings its compiler with one.
    run("""
x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
ditkernels.ops.modulate_norm(x).sum().backward()
assert ditkernels.ops.modulate_norm(torch.empty(2, 3, 8, device="meta")).shape == (2, 3, 8)
for name in ditkernels.ops.dispatch.OPS:
    for declared in (name, f"{name}_triton"):
        assert hasattr(torch.ops.ditkernels, declared), declared
assert loaded() == [], loaded()
""")


@needs_triton
@pytest.mark.parametrize("asks", ["op.reasons(*args)", "op.implementations", "ditkernels.ops.dispatch.fingerprint()"])
def test_triton_comes_when_it_is_asked_for(asks: str) -> None:
    run(f"""
op = ditkernels.ops.dispatch.OPS["modulate_norm"]
args = (torch.ones(1, 1, 4), None, None, None, None, "layernorm", 1e-6, torch.float32, False)
{asks}
assert "triton" in sys.modules
""")


@needs_triton
def test_in_triton_s_interpreter_auto_asks_triton_on_a_cpu() -> None:
    run("""
os.environ["TRITON_INTERPRET"] = "1"
op = ditkernels.ops.dispatch.OPS["unpatchify"]
ditkernels.ops.choice.AUTOMATIC.remove("cpu")
assert op.choose(torch.zeros(1, 4, 4), 2, 2, 2, False) == "triton"
""")


def test_a_flop_counter_that_comes_later_counts_the_ops() -> None:
    run("""
from torch.utils.flop_counter import FlopCounterMode
x, fc1, fc2 = torch.ones(2, 3, 8), torch.ones(16, 8), torch.ones(4, 16)
with FlopCounterMode(display=False) as counter:
    ditkernels.ops.mlp(x, fc1, None, fc2)
assert counter.get_flop_counts()["Global"] == {torch.ops.ditkernels.mlp: 2 * 6 * 16 * 12}, counter.get_flop_counts()
""")


# ---- Commands and names ----------------------------------------------------------------------------------------------

HELP_SECONDS = 0.5
DIT_SECONDS = 0.15
WITHOUT_TORCH = """
import sys
from ditkernels import cli
try:
    status = cli.main({argv!r})
except SystemExit as stop:
    status = stop.code
heavy = {{"torch", "triton", "numpy", "safetensors"}} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""
BRIEF = [(["--version"], 0), (["--help"], 0), ([], 2), (["frobnicate"], 2), (["train", "--no-such-flag"], 2)]
BRIEF += [([name, "--help"], 0) for name in cli.COMMANDS]


@pytest.mark.parametrize("argv, status", BRIEF, ids=str)
def test_help_and_usage_errors_come_without_torch(argv: list[str], status: int) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH.format(argv=argv)], capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr


def test_the_package_alone_is_imported_without_torch() -> None:
    program = "import sys, ditkernels; assert 'torch' not in sys.modules; ditkernels.TrainConfig; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def processor_seconds(command: Sequence[str]) -> float:
    """Of a process and those that it starts, user and system."""
    before = os.times()
    subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=300)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["train", "--help"], ["sample", "--help"]], ids=str)
def test_help_takes_little_processor_time(argv: list[str]) -> None:
    command = ["-m", "ditkernels", *argv]
    assert statistics.median(processor_seconds(command) for _ in range(5)) <= HELP_SECONDS


@pytest.mark.slow
def test_the_model_costs_little_beyond_torch() -> None:
    """In one process, so that what torch costs, which varies more than this, is not counted."""
    program = (
        "import os, torch; t = os.times(); import ditkernels; ditkernels.DiT; u = os.times(); print(u[0] + u[1] - t[0] - t[1])"
    )
    command = [sys.executable, "-c", program]
    printed = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(5)]
    assert statistics.median(map(float, printed)) <= DIT_SECONDS
