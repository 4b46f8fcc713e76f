"""What surrounds a run: its device and precision, the process-wide settings, and the signals that end it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from ditkernels.config import TrainConfig
from ditkernels.ops.dispatch import use_backend


def resolve_device(name: str) -> torch.device:
    """As ``ditkernels.check.resolve_device``, imported only here."""
    from ditkernels import check

    return check.resolve_device(name)


def resolve_precision(name: str, device: torch.device) -> str:
    """bf16, fp16, tf32 or fp32; "auto" is bf16 on GPUs that have it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


@contextmanager
def numerics(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """The process-wide settings of a run: TF32, determinism, backends; put back afterwards."""
    before = torch.get_float32_matmul_precision()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    tf32 = resolve_precision(config.precision, device) == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    forced = None if config.backend == "auto" else config.backend
    try:
        with use_backend(forced):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.use_deterministic_algorithms(was_deterministic)


class StopSignal:
    """SIGTERM and SIGINT end the run after the step in progress and a checkpoint; a second one ends the process at once.

    Args:
        once: later ones change nothing. Where torchrun and a scheduler both pass a signal on, a process gets it twice; torchrun
            itself ends at once those that take too long.

    Attributes:
        number: the signal that came, or None.
    """

    def __init__(self, *, once: bool = False) -> None:
        self.once = once
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # Python delivers signals to the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.number is not None:
            if self.once:
                return
            os._exit(128 + number)
        self.number = number
