"""Which backend was measured to be the fastest: what ``auto`` goes by where more than one could serve.

The facts lie in measured.json beside this file, by compute capability and op: ``{"fastest": {"9.0": {"modulate_norm": "cuda"}}}``.
``benchmarks/fastest.py`` writes them, from runs whose parity was green. Where nothing is written, nothing is known, and ``auto``
stays with Triton.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("measured.json")


@functools.cache
def _table() -> dict[str, dict[str, str]]:
    fastest: dict[str, dict[str, str]] = json.loads(TABLE.read_text())["fastest"]
    return fastest


def fastest(op: str, device: torch.device) -> str | None:
    """The backend that was fastest at ``op`` on a device of this kind, or None where that was not measured."""
    table = _table()
    if not table or device.type != "cuda":
        return None
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return table.get(capability, {}).get(op)
