"""What people look at while a run trains: one line an interval, metrics.jsonl, and TensorBoard or Weights & Biases if asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ditkernels.files import write_text
from ditkernels.training.config import TrainConfig

METRICS = "metrics.jsonl"
GIB = 2**30

# What the settings of these names need.
SINK_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}

logger = logging.getLogger(__name__)

# Dense bf16 TFLOP/s on NVIDIA's data sheets, by what the device's name contains; the first match counts.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}


class StepMetrics(NamedTuple):
    """What a step reports, on the host.

    Attributes:
        step: steps taken, this one included.
        learning_rate: that it was taken at.
        loss: mean over the batch.
        norm: of the gradient, before clipping.
        skipped: nothing was changed, since loss or gradient was not finite.
        flags: the step flags of all ranks, as of ``Parallel.reduce``.
    """

    step: int
    learning_rate: float
    loss: float
    norm: float
    skipped: bool
    flags: tuple[float, ...] = ()


class OneStepLate:
    """Scalars on their way from the device to the host, read a step later, when they have long arrived.

    Reading a step's loss at once would make the host wait for the device, and then the device for the host.
    """

    def __init__(self) -> None:
        self._waiting: tuple[int, float, Tensor, Any] | None = None

    def push(self, step: int, learning_rate: float, scalars: list[Tensor]) -> StepMetrics | None:
        """Starts to copy loss, norm, skipped and step flags; returns what was pushed before."""
        packed = torch.stack(scalars)
        arrived = None
        if packed.device.type == "cuda":
            host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            packed = host.copy_(packed, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        before = self.pop()
        self._waiting = (step, learning_rate, packed, arrived)
        return before

    def pop(self) -> StepMetrics | None:
        """What was pushed last, waiting for it if need be; None if it has been read."""
        if self._waiting is None:
            return None
        step, rate, packed, arrived = self._waiting
        self._waiting = None
        if arrived is not None:
            arrived.synchronize()
        loss, norm, skipped, *flags = packed.tolist()
        return StepMetrics(step, rate, loss, norm, bool(skipped), tuple(flags))


class Sink(Protocol):
    """Something that keeps rows of numbers."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one JSON object a line, on its way to the disk once written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a line."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard, in ``run/tensorboard``."""

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run / "tensorboard")

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds every number but the step."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class WandB:
    """A Weights & Biases run named after the run's folder; a resumed run goes on in the same one."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project="ditkernels",
            name=run.name,
            id=run.resolve().name,
            dir=str(run),
            config=dict(config),
            resume="allow",
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Logs every number but the step."""
        self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}


class RunLog:
    """Collects the metrics of steps, and reports them every ``log_every`` steps.

    Args:
        config: the run's.
        total: steps of the run.
        start: steps taken before this process.
        flops_per_image: of forward and backward, a multiply-add counted as two.
        device: that trains.
        pending: :meth:`pending` of the checkpoint resumed from, so that means over an interval stay whole.
        devices: how many train, each with the same peak.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        total: int,
        start: int,
        flops_per_image: float,
        device: torch.device,
        pending: Mapping[str, float] | None,
        devices: int = 1,
    ) -> None:
        self.config = config
        self.total = total
        self.flops_per_image = flops_per_image
        self.device = device
        peak = _peak_flops(config, device)
        self.peak_flops = None if peak is None else peak * devices
        self._sums = dict(pending or _no_sums())
        self._sinks = self._open_sinks()
        self._clock = (start, time.perf_counter())
        self._bar = tqdm(total=total, initial=start, unit="step", disable=self._hides_bar(), dynamic_ncols=True)

    def step(self, metrics: StepMetrics, skipped: int) -> None:
        """Records a step; ``skipped``: how many the run has skipped so far."""
        if not metrics.skipped:
            self._sums["loss"] += metrics.loss
            self._sums["grad_norm"] += metrics.norm
            self._sums["steps"] += 1
        self._bar.update()
        if metrics.step % self.config.log_every == 0 or metrics.step == self.total:
            self._report(metrics, skipped)

    def pending(self) -> dict[str, float]:
        """Sums of the interval that is not over, as JSON values."""
        return dict(self._sums)

    def write(self, row: Mapping[str, Any]) -> None:
        """Hands a row, which has a ``step``, to metrics.jsonl and the others."""
        for sink in self._sinks:
            sink.write(row)

    def close(self) -> None:
        """Closes bar and files."""
        self._bar.close()
        for sink in self._sinks:
            sink.close()

    def _open_sinks(self) -> list[Sink]:
        return _sinks(self.config)

    def _hides_bar(self) -> bool:
        return not sys.stderr.isatty()

    def _report(self, metrics: StepMetrics, skipped: int) -> None:
        taken = self._sums["steps"] or float("nan")
        images = self._images_per_second(metrics.step)
        row = {
            "step": metrics.step,
            "loss": _finite(self._sums["loss"] / taken),
            "grad_norm": _finite(self._sums["grad_norm"] / taken),
            "learning_rate": metrics.learning_rate,
            "images_per_second": images,
            "gflops_per_second": images * self.flops_per_image / 1e9,
            "mfu": None if self.peak_flops is None else images * self.flops_per_image / self.peak_flops,
            "memory_gib": _memory_gib(self.device),
            "skipped": skipped,
        }
        self._sums = _no_sums()
        self.write(row)
        left = (self.total - metrics.step) * self.config.global_batch_size / images
        logger.info(line(row, self.total, left))

    def _images_per_second(self, step: int) -> float:
        since, start = self._clock
        now = time.perf_counter()
        self._clock = (step, now)
        return max(1, step - since) * self.config.global_batch_size / max(now - start, 1e-9)


class QuietLog(RunLog):
    """The log of a rank that is not the first: it keeps the same sums and writes nothing."""

    def _open_sinks(self) -> list[Sink]:
        return []

    def _hides_bar(self) -> bool:
        return True

    def _report(self, metrics: StepMetrics, skipped: int) -> None:
        self._sums = _no_sums()


def line(row: Mapping[str, Any], total: int, seconds_left: float) -> str:
    """A row for people: step, loss, gradient norm, images/s, Gflops and MFU, memory, time left."""
    loss, norm = (float("nan") if row[name] is None else row[name] for name in ("loss", "grad_norm"))
    parts = [
        f"step {row['step']:>{len(str(total))}}/{total}",
        f"loss {loss:.4f}",
        f"grad norm {norm:.3g}",
        f"{row['images_per_second']:,.1f} images/s",
        f"{row['gflops_per_second']:,.0f} GFLOP/s",
    ]
    if row["mfu"] is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    parts.append(f"{row['memory_gib']:.1f} GiB")
    if row["skipped"]:
        parts.append(f"{row['skipped']} skipped")
    parts.append(f"{_duration(seconds_left)} left")
    return " | ".join(parts)


def cut_back(path: Path, step: int) -> None:
    """Drops the rows of metrics.jsonl after ``step``, and a last line cut short; the file is replaced as a whole."""
    if not path.exists():
        return
    kept = [text for text in path.read_text(encoding="utf-8").splitlines() if _step_of(text) <= step]
    write_text(path, "".join(text + "\n" for text in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line cut short is left out.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if _step_of(text) < float("inf")]


def _step_of(text: str) -> float:
    try:
        step: float = json.loads(text)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
    return step


def _sinks(config: TrainConfig) -> list[Sink]:
    run = Path(config.results_dir)
    sinks: list[Sink] = [JsonLines(run / METRICS)]
    if config.tensorboard:
        sinks.append(TensorBoard(run))
    if config.wandb:
        sinks.append(WandB(run, vars(config)))
    return sinks


def _no_sums() -> dict[str, float]:
    return {"loss": 0.0, "grad_norm": 0.0, "steps": 0}


def _finite(value: float) -> float | None:
    # NaN is no JSON.
    return value if abs(value) < float("inf") else None


def _peak_flops(config: TrainConfig, device: torch.device) -> float | None:
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


def _memory_gib(device: torch.device) -> float:
    """The most this process has held: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds:02d}s"
