"""What the CUDA C++ kernels of all ops share: where their library comes from, and when they can serve.

The library (``csrc/``, looked for as ``ditkernels/_C.so``) registers kernels for the internal ops that the package declares.
Loading it initialises nothing on a device and works beside a torch without CUDA. Without it the package is whole, and says why.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 4096
OLDEST_CAPABILITY = (8, 0)
NOT_MEASURED = "not measured against triton yet; DITKERNELS_BACKEND=cuda asks for it"

_HOW = "DITKERNELS_CUDA_LIBRARY names one that was built from csrc/"
_absence: str | None = "no library has been loaded"


def load(path: Path) -> None:
    """Loads a library of kernels.

    Raises:
        OSError: the file is not there or does not fit this torch.
    """
    global _absence
    torch.ops.load_library(path)
    _absence = None


def load_if_present() -> None:
    """Loads the library that lies in the package or is named by DITKERNELS_CUDA_LIBRARY; remembers why if it cannot."""
    global _absence
    named = os.environ.get("DITKERNELS_CUDA_LIBRARY")
    path = Path(named) if named else Path(__file__).parent.parent / "_C.so"
    if not named and not path.exists():
        _absence = f"the CUDA library is not part of this install; {_HOW}"
        return
    try:
        load(path)
    except OSError as error:
        _absence = f"the CUDA library {path} does not load: {error}"


def _device_reason(op: str, device: torch.device) -> str | None:
    if _absence is not None:
        return _absence
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device.type}, the kernels need CUDA"
    key = device.type.upper()
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"ditkernels::{op}_cuda", key):
        return f"the tensors are on {device.type}; the library has no kernels for it"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            got, need = (".".join(map(str, c)) for c in (capability, OLDEST_CAPABILITY))
            return f"the device has compute capability {got}, the kernels need {need}"
    return None


def refuse(op: str, width: int, first: Tensor, *others: Tensor | torch.dtype | None) -> str | None:
    """Why the kernels of ``op`` cannot take a row of ``width`` channels of these tensors (or these dtypes), or None if they can."""
    reason = _device_reason(op, first.device)
    if reason is not None:
        return reason
    for value in (first, *others):
        dtype = value.dtype if isinstance(value, Tensor) else value
        if dtype is not None and dtype not in DTYPES:
            return f"{dtype} is not among the kernels' dtypes ({', '.join(map(str, DTYPES))})"
    if width > MAX_WIDTH:
        return f"a row of {width} channels is wider than a block; the widest taken is {MAX_WIDTH}"
    return None


load_if_present()
