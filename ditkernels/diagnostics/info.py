"""The machine, the versions, and for every op the backend chosen here and why not the others.

It answers "why is it slow" and "why does it not use X" before anybody has to ask, and belongs into every bug report.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch

from ditkernels._version import __version__
from ditkernels.diagnostics.check import CASES, PRECISIONS, Call, recorded_calls
from ditkernels.ops import _native, _triton, dispatch
from ditkernels.ops.attention import BACKENDS as ATTENTION
from ditkernels.ops.attention import Problem, choose, explain_problem

# By CUDA's major version: "CUDA Compatibility, Minor Version Compatibility" (docs.nvidia.com/deploy/cuda-compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}

PACKAGES = (
    "triton",
    "numpy",
    "safetensors",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "xformers",
    "scikit-learn",
    "matplotlib",
)
VARIABLES = (
    "DITKERNELS_BACKEND",
    "DITKERNELS_ATTENTION_BACKEND",
    "DITKERNELS_CUDA_LIBRARY",
    "DITKERNELS_CPU_LIBRARY",
    "DITKERNELS_CPU_ISA",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
)


def everything(device: torch.device, failures: list[Exception]) -> Iterator[str]:
    """The lines of all sections, as they are found out; what broke a section off is added to ``failures``."""
    sections = {
        "Machine": _machine(),
        "Packages": _packages(),
        "Environment": _environment(),
        f"Ops, bf16 on {device}: backend chosen, and why not the others": _ops(device),
        "C++ kernels": _kernels(device),
        f"Attention, bf16 on {device}, as DiT-XL/2 trains at 256 px: 16 heads of 72 channels, 256 tokens": _attention(device),
    }
    for title, section in sections.items():
        yield title
        yield from (f"  {line}" for line in _lines(section, failures))


def _lines(section: Iterable[str], failures: list[Exception]) -> Iterator[str]:
    """The lines of a section. What breaks it off becomes its last line, and is noted."""
    try:
        yield from section
    except Exception as error:  # noqa: BLE001 (whatever is wrong with this machine, the other sections are wanted the more)
        failures.append(error)
        yield " ".join(f"this section ends here: {type(error).__name__}: {error}".split())


# ---- Machine and versions --------------------------------------------------------------------------------------------


def _machine() -> Iterator[str]:
    yield f"ditkernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    yield f"{platform.platform()}, {os.cpu_count()} CPU cores"
    yield _cuda_line(torch.version.cuda, driver_version())
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        )
    if not torch.cuda.is_available():
        yield "no usable GPU"
    yield from _copies()


def _copies() -> Iterator[str]:
    """Where this copy of the package lies, and installed ones that it hides."""
    here = os.path.realpath(Path(__file__).parents[1])  # the package, of which this room is a part
    yield f"loaded from {here}"
    for installed in sorted({os.path.realpath(folder) for folder in _installed()} - {here}):
        yield f"THIS HIDES THE COPY INSTALLED IN {installed}: Python finds the other first, by the working directory or PYTHONPATH"


def _installed() -> Iterator[Path]:
    """The folders of the installed copies; that of an editable one is the tree it was installed from."""
    for found in metadata.distributions(name="ditkernels"):
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        editable = origin.get("dir_info", {}).get("editable", False)
        root = Path(url2pathname(urlsplit(origin["url"]).path)) if editable else Path(str(found.locate_file("")))
        if (root / "ditkernels").is_dir():
            yield root / "ditkernels"


def _cuda_line(cuda: str | None, driver: str | None) -> str:
    """What torch was built for, the driver that needs, and the driver that is here."""
    if cuda is None:
        return "torch is built without CUDA"
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]))
    floor = "" if oldest is None else f", which needs NVIDIA driver {oldest} or newer"
    here = "there is none" if driver is None else f"here is {driver}"
    verdict = ""
    if driver is not None and oldest is not None and int(driver.split(".")[0]) < oldest:
        verdict = ": TOO OLD"
    return f"torch is built for CUDA {cuda}{floor}; {here}{verdict}"


def driver_version() -> str | None:
    """Version of the NVIDIA driver according to nvidia-smi, such as "580.65.06"; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    first = answer.stdout.split("\n")[0].strip()
    return first if answer.returncode == 0 and first[:1].isdigit() else None


def _packages() -> Iterator[str]:
    for name in PACKAGES:
        yield f"{name:<14} {_version(name)}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _environment() -> Iterator[str]:
    for name in VARIABLES:
        yield f"{name}={os.environ[name]}" if name in os.environ else f"{name} is not set"
    if _triton.MISSING is None:
        yield _triton.cache_reason() or "Triton's cache can be written to"


# ---- Backends --------------------------------------------------------------------------------------------------------


def _ops(device: torch.device) -> Iterator[str]:
    """Ops of which the same is to be said stand together."""
    precision = next(precision for precision in PRECISIONS if precision.name == "bf16")
    calls: dict[str, Call] = {}
    for case in CASES:
        for call in recorded_calls(case, case.inputs(precision, device)):
            calls.setdefault(call.op.name, call)
    names: dict[tuple[str, ...], list[str]] = {}
    for name, call in calls.items():
        names.setdefault(tuple(_choice(call)), []).append(name)
    for lines, alike in names.items():
        yield ", ".join(alike)
        yield from (f"    {line}" for line in lines)


def _choice(call: Call) -> Iterator[str]:
    try:
        chosen = call.op.choose(*call.args, forced=dispatch.backend_setting())
    except dispatch.BackendError:
        chosen = None
    yield f"-> {chosen or _FORCED}"
    for name, reason in call.op.reasons(*call.args).items():
        if name != chosen:
            yield f"{name}: {reason or call.op.not_automatic(name, *call.args) or 'can serve'}"


_FORCED = "NONE: the backend that the environment asks for cannot serve"


def _kernels(device: torch.device) -> Iterator[str]:
    yield f"CUDA library: {_native.cuda_library()}"
    yield f"CPU library: {_native.cpu_library()}"
    yield from _native.changed_libraries()
    if device.type != "cuda":
        yield f"registers, spills and occupancy: only a GPU tells them, and {device} is none"
        return
    if not _native.architectures():
        return
    yield "threads and shared memory: the most of a block; occupancy: the share of a multiprocessor's threads that it can hold"
    most = torch.cuda.get_device_properties(device).max_threads_per_multi_processor
    for kernel in _native.kernel_attributes(device):
        yield (
            f"{kernel.name}: {kernel.registers} registers, {kernel.local_bytes} B spilled, {kernel.shared_bytes} B shared, "
            f"{kernel.threads} threads, occupancy {kernel.blocks * kernel.threads / most:.0%}, sm_{kernel.code}"
        )


def _attention(device: torch.device) -> Iterator[str]:
    problem = Problem(device, torch.bfloat16, batch=8, q_len=256, kv_len=256, heads=16, head_dim=72)
    uses = {"training": problem._replace(needs_grad=True), "sampling": problem}
    for use, case in uses.items():
        try:
            chosen = choose(case)
        except dispatch.BackendError:
            chosen = _FORCED
        yield f"{use} -> {chosen}"
    for name, reason in explain_problem(uses["training"]):
        yield f"    {name}: {reason or 'can serve'}"
    yield "What has been tried, and whether the backward is deterministic"
    for backend in ATTENTION.values():
        yes = "deterministic" if backend.deterministic_backward else "not deterministic"
        yield f"    {backend.name}: {backend.status}; {yes}"
