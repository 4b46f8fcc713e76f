"""What people look at while a run trains: one line an interval, metrics.jsonl, and TensorBoard or Weights & Biases if asked for."""

from __future__ import annotations

import json
import logging
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ditkernels.files import first_line, write_text
from ditkernels.training.config import TrainConfig

METRICS = "metrics.jsonl"
MEASURED_WITH = "measured_with"  # of an evaluation's row, its record
WANDB_ID = "wandb-id"
# What a run does but to train.
APART = ("evaluation", "sampling", "saving")
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
        seconds: of training, when the host had enqueued it.
    """

    step: int
    learning_rate: float
    loss: float
    norm: float
    skipped: bool
    flags: tuple[float, ...] = ()
    seconds: float = 0.0


class OneStepLate:
    """Scalars on their way from the device to the host, read a step later, when they have long arrived.

    Reading a step's loss at once would make the host wait for the device, and then the device for the host.
    """

    def __init__(self) -> None:
        self._waiting: tuple[int, float, Tensor, Any, float] | None = None

    def push(self, step: int, learning_rate: float, scalars: list[Tensor], seconds: float = 0.0) -> StepMetrics | None:
        """Starts to copy loss, norm, skipped and step flags; returns what was pushed before."""
        packed = torch.stack(scalars)
        arrived = None
        if packed.device.type == "cuda":
            host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            packed = host.copy_(packed, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        before = self.pop()
        self._waiting = (step, learning_rate, packed, arrived, seconds)
        return before

    def pop(self) -> StepMetrics | None:
        """What was pushed last, waiting for it if need be; None if it has been read."""
        if self._waiting is None:
            return None
        step, rate, packed, arrived, seconds = self._waiting
        self._waiting = None
        if arrived is not None:
            arrived.synchronize()
        loss, norm, skipped, *flags = packed.tolist()
        return StepMetrics(step, rate, loss, norm, bool(skipped), tuple(flags), seconds)


class Sink(Protocol):
    """Something that keeps rows of numbers.

    Attributes:
        name: of what it keeps them in.
        errors: what it may raise for reasons of its own.
    """

    name: str
    errors: tuple[type[Exception], ...]

    def write(self, row: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one JSON object a line, on its way to the disk once written."""

    name = METRICS
    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a line."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Nothing: every row is."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard, in ``run/tensorboard``.

    Args:
        run: its folder.
        start: steps taken before; what TensorBoard has of later ones is void.
    """

    name = "TensorBoard"
    # Its thread hands on what it meets, and its files are a serialiser's.
    errors: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError)

    def __init__(self, run: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run / "tensorboard", purge_step=start + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds every number but the step."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        """Waits for what is written."""
        self._writer.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class WandB:
    """A Weights & Biases run, which has an id in the run's folder: a resumed run goes on in the same one.

    Rows that it already has are not sent again: Weights & Biases takes no step twice.
    """

    name = "Weights & Biases"

    def __init__(self, run: Path, config: TrainConfig) -> None:
        import wandb

        self.errors = _wandb_errors()
        self._run = wandb.init(
            project=config.wandb_project,
            entity=config.wandb_entity,
            name=config.wandb_name or run.resolve().name,
            id=_wandb_id(run),
            dir=str(run),
            config=asdict(config),
            resume="allow",
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Logs every number but the step."""
        self._run.log(_numbers(row), step=row["step"])

    def flush(self) -> None:
        """Nothing: a process of its own sends rows."""

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def _wandb_errors() -> tuple[type[Exception], ...]:
    # Its errors have no base but this; those of the network and of the disk are OSErrors.
    import wandb

    return (wandb.errors.Error, OSError, ValueError, RuntimeError)


def _wandb_id(run: Path) -> str:
    """The id in the run's folder; there is a new one if there was none."""
    path = run / WANDB_ID
    if not path.exists():
        write_text(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()


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
        self._lost: Counter[str] = Counter()
        self._sinks = self._open_sinks(start)
        self._began = time.perf_counter()
        self._apart = dict.fromkeys(APART, 0.0)
        self._clock = (start, 0.0)
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

    # ---- Time --------------------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Of training so far: what was taken :meth:`apart` is not."""
        return time.perf_counter() - self._began - sum(self._apart.values())

    @contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """Around what is no training, one of APART."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._apart[what] += time.perf_counter() - begin

    # ---- What must not stop a run ------------------------------------------------------------------------------------

    @contextmanager
    def aside(self, name: str, errors: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
        """Around the writing of what a run can do without: such an error is said once and counted."""
        try:
            yield
        except errors as error:
            if not self._lost[name]:
                logger.warning("%s: %s; training goes on without it", name, first_line(error))
            self._lost[name] += 1

    def write(self, row: Mapping[str, Any]) -> None:
        """Hands a row, which has a ``step``, to metrics.jsonl and the others."""
        for sink in self._working():
            with self.aside(sink.name, sink.errors):
                sink.write(row)

    def flush(self) -> None:
        """Rows are where they should be, as far as a sink can say."""
        for sink in self._working():
            with self.aside(sink.name, sink.errors):
                sink.flush()

    def close(self) -> None:
        """Closes bar and files, and says what is missing in them."""
        self._bar.close()
        for sink in self._sinks:
            with self.aside(sink.name, sink.errors):
                sink.close()
        for name, count in self._lost.items():
            logger.warning("%s: it is incomplete, %s", name, "one write failed" if count == 1 else f"{count} writes failed")

    def _working(self) -> list[Sink]:
        """What has failed once is left alone."""
        return [sink for sink in self._sinks if not self._lost[sink.name]]

    def _open_sinks(self, start: int) -> list[Sink]:
        run = Path(self.config.results_dir)
        sinks: list[Sink] = []
        with self.aside(JsonLines.name):
            sinks.append(JsonLines(run / METRICS))
        if self.config.tensorboard:
            with self.aside(TensorBoard.name, TensorBoard.errors):
                sinks.append(TensorBoard(run, start))
        if self.config.wandb:
            with self.aside(WandB.name, _wandb_errors()):
                sinks.append(WandB(run, self.config))
        return sinks

    def _hides_bar(self) -> bool:
        return not sys.stderr.isatty()

    def _report(self, metrics: StepMetrics, skipped: int) -> None:
        taken = self._sums["steps"] or float("nan")
        images = self._images_per_second(metrics)
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
            "seconds": metrics.seconds,
            **{f"seconds_{what}": seconds for what, seconds in self._apart.items()},
        }
        self._sums = _no_sums()
        self.write(row)
        left = (self.total - metrics.step) * self.config.global_batch_size / images
        logger.info(line(row, self.total, left))

    def _images_per_second(self, metrics: StepMetrics) -> float:
        """Of training alone. A step counts from when it was enqueued, since it is reported one step late."""
        since, start = self._clock
        self._clock = (metrics.step, metrics.seconds)
        return max(1, metrics.step - since) * self.config.global_batch_size / max(metrics.seconds - start, 1e-9)


class QuietLog(RunLog):
    """The log of a rank that is not the first: it keeps the same sums and writes nothing."""

    def _open_sinks(self, start: int) -> list[Sink]:
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
    """Drops the rows of metrics.jsonl after ``step``, and what is no row; the file is replaced as a whole."""
    if not path.exists():
        return
    kept = [json.dumps(row) for row in _rows_of(path) if row["step"] <= step]
    write_text(path, "".join(text + "\n" for text in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; what is no row is passed over, and its number is said, but for a last one cut short.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return _rows_of(path)


def _rows_of(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    found = [(number, _row_of(line)) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, row in found:
        if row is None and number < len(lines):
            logger.warning("%s: line %d is no row, and is passed over", path, number)
    return [row for _, row in found if row is not None]


def _row_of(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


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
