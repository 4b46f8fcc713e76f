"""What the benchmarks share: the clock, the ceilings, the machine they ran on, the table and the JSON.

How time is taken. Contenders take turns within a round, so that a drifting clock hits all of them; the result is the median
over rounds, with the 10th and 90th percentile beside it. Every round uses the next of several input sets, together larger than
the last-level cache. On a GPU time lies between two events, and a device-side pause before the first one lets the launches
queue up, so that the gaps between launches are kept out for everybody alike.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditkernels._version import __version__
from ditkernels.check import resolve_device
from ditkernels.info import driver_version

PAUSE_CYCLES = 4_000_000  # about 2 ms on a GPU at 2 GHz: longer than any host needs to enqueue one contender's kernels
CACHE_BYTES = 256 * 2**20  # larger than the last-level cache of any GPU or CPU this is likely to meet

Row = dict[str, Any]


class Contender(NamedTuple):
    """Something to be timed.

    Attributes:
        name: as it stands in the table.
        run: what is timed; receives what ``prepare`` returned.
        prepare: what comes before, untimed; receives the number of the round, to choose inputs by.
    """

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[int], Any] = lambda index: index


class Timing(NamedTuple):
    """Milliseconds: the median over rounds, the 10th and the 90th percentile."""

    median_ms: float
    low_ms: float
    high_ms: float


def interleaved(contenders: Sequence[Contender], device: torch.device, *, rounds: int, warmup: int = 3) -> dict[str, Timing]:
    """Times the contenders in turns; the warm-up rounds, compilation included, are left out."""
    clock = _gpu_clock if device.type == "cuda" else _cpu_clock
    found = _in_turns(contenders, clock, rounds, warmup)
    return {name: timing(samples) for name, samples in found.items()}


def interleaved_walls(
    contenders: Sequence[Contender], device: torch.device, *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """As ``interleaved``, by the clock on the wall, launch gaps included; milliseconds of every round, to be paired.

    For what a user waits for: where the host is slower than the device, the host is what is timed.
    """

    def clock(run: Callable[[Any], Any], prepared: Any) -> Callable[[], float]:
        _finish(device)

        def finished(prepared: Any) -> None:
            run(prepared)
            _finish(device)

        return _cpu_clock(finished, prepared)

    return _in_turns(contenders, clock, rounds, warmup)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _in_turns(
    contenders: Sequence[Contender], clock: Callable[..., Callable[[], float]], rounds: int, warmup: int
) -> dict[str, list[float]]:
    samples: dict[str, list[Callable[[], float]]] = {contender.name: [] for contender in contenders}
    for index in range(warmup + rounds):
        for contender in contenders:
            prepared = contender.prepare(index)
            elapsed = clock(contender.run, prepared)
            if index >= warmup:
                samples[contender.name].append(elapsed)
    return {name: [elapsed() for elapsed in found] for name, found in samples.items()}


def _cpu_clock(run: Callable[[Any], Any], prepared: Any) -> Callable[[], float]:
    start = time.perf_counter()
    run(prepared)
    milliseconds = 1e3 * (time.perf_counter() - start)
    return lambda: milliseconds


def _gpu_clock(run: Callable[[Any], Any], prepared: Any) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(PAUSE_CYCLES)
    start.record()
    run(prepared)
    end.record()

    def elapsed() -> float:
        end.synchronize()
        return start.elapsed_time(end)

    return elapsed


def timing(milliseconds: list[float]) -> Timing:
    """Median and deciles of some milliseconds."""
    if len(milliseconds) == 1:
        return Timing(milliseconds[0], milliseconds[0], milliseconds[0])
    deciles = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return Timing(statistics.median(milliseconds), deciles[0], deciles[-1])


def fits(contender: Contender) -> bool:
    """Whether one run of it finds memory enough; what it took is given back if not."""
    try:
        contender.run(contender.prepare(0))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def input_sets(bytes_of_one: int) -> int:
    """How many input sets it takes to keep the cache from helping; few enough to be made in no time."""
    return min(64, max(2, -(-CACHE_BYTES // max(1, bytes_of_one))))


# ---- Ceilings --------------------------------------------------------------------------------------------------------


def copy_bandwidth(device: torch.device, *, size: int, rounds: int) -> float:
    """GB/s (1e9 bytes) of copying ``size`` bytes from one place of the device's memory to another, both counted."""
    source = torch.randint(-100, 100, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timing = interleaved([Contender("copy", lambda _: target.copy_(source))], device, rounds=rounds)["copy"]
    return 2 * size / timing.median_ms / 1e6


def copy_row(args: argparse.Namespace) -> list[Row]:
    """The copy of ``--copy-mib`` as a row among those of ops."""
    gbps = copy_bandwidth(device_of(args), size=args.copy_mib * 2**20, rounds=args.rounds)
    return [{"op": "copy", "gbps": gbps, "of_copy": 1.0}]


def matmul_rate(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, *, rounds: int) -> float:
    """TFLOP/s of a product (M, K) x (K, N) of random values, 2 operations a multiply-add."""
    m, n, k = shape
    sets = [(torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)) for _ in range(2)]
    product = Contender("matmul", lambda ab: torch.mm(*ab), lambda index: sets[index % 2])
    timing = interleaved([product], device, rounds=rounds)["matmul"]
    return 2 * m * n * k / timing.median_ms / 1e9


# ---- What a result says of itself ------------------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to judge a number: date, commit, device, driver, versions."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": _device_name(device),
        "compute_capability": _capability(device),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "ditkernels": __version__,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _commit() -> str | None:
    """The commit of this tree, marked where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def _capability(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---- Command line, table, JSON ---------------------------------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto is cuda if there is one")
    made.add_argument("--rounds", type=positive, default=20, help="measurements of each contender")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    return made


def positive(text: str) -> int:
    """An argparse type: a whole number of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, allowed is 1 or more")
    return value


def numbers(text: str) -> list[int]:
    """An argparse type: whole numbers of 1 or more, separated by commas."""
    return [positive(number) for number in text.split(",")]


def names_among(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: names separated by commas, each one of ``allowed``."""
    known = list(allowed)

    def parse(text: str) -> list[str]:
        found = text.split(",")
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}, allowed are {', '.join(known)}")
        return found

    return parse


def device_of(args: argparse.Namespace) -> torch.device:
    """The device asked for."""
    return resolve_device(args.device)


class Journal:
    """The rows of a benchmark, written where ``--json`` says as soon as they are there; ``complete`` tells whether all are.

    Rows are measured in units, each whole or not at all, and carry the name of theirs. With ``--resume`` (``resumable``) a file
    that was cut short is gone on with, if machine, versions and flags are the same; that the code is, the caller must know.
    """

    def __init__(self, benchmark: str, args: argparse.Namespace) -> None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        self._path: Path | None = args.json
        self._result: dict[str, Any] = {
            "benchmark": benchmark,
            "environment": environment(device_of(args)),
            "settings": settings,
            "complete": False,
            "rows": [],
        }
        if settings.get("resume") and self._path is not None and self._path.exists():
            before = json.loads(self._path.read_text())
            if _conditions(before) == _conditions(self._result):
                self._result = before

    @property
    def rows(self) -> list[Row]:
        """All that there are."""
        rows: list[Row] = self._result["rows"]
        return rows

    def unit(self, name: str, measured: Callable[..., Iterable[Row]], *arguments: Any) -> list[Row]:
        """The rows of a unit: those of an earlier try, or else what ``measured`` gives of the arguments."""
        known = [row for row in self.rows if row.get("unit") == name]
        return known or self.add(*({**row, "unit": name} for row in measured(*arguments)))

    def add(self, *rows: Row) -> list[Row]:
        """Writes rows down."""
        self.rows.extend(rows)
        self._write()
        return list(rows)

    def close(self, columns: Iterable[str]) -> None:
        """Says that no row is left, and prints ``columns`` of them as a table."""
        self._result["complete"] = True
        self._write()
        print(table(self.rows, list(columns)))

    def _write(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_name(self._path.name + ".tmp")
        unfinished.write_text(json.dumps(self._result, indent=2) + "\n")
        unfinished.replace(self._path)


def _conditions(result: dict[str, Any]) -> Any:
    """What must be alike in two tries, in the types that JSON has."""
    where = {name: value for name, value in result["environment"].items() if name not in ("date", "commit")}
    how = {name: value for name, value in result["settings"].items() if name not in ("json", "resume")}
    return json.loads(json.dumps([result["benchmark"], where, how]))


def resumable(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Gives a parser the flag of benchmarks that measure in units."""
    made.add_argument("--resume", action="store_true", help="go on with --json FILE where it was cut short")
    return made


def report(benchmark: str, args: argparse.Namespace, rows: Iterable[Row], columns: Iterable[str]) -> None:
    """Writes down rows one by one, then prints ``columns`` of them as a table."""
    journal = Journal(benchmark, args)
    for row in rows:
        journal.add(row)
    journal.close(columns)


def markdown(header: str, rows: list[list[str]]) -> list[str]:
    """The lines of a table for a page: header ("a | b"), rule, rows."""
    rule = "|" + "---|" * len(header.split("|"))
    return [f"| {header} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def written_into(text: str, table: list[str]) -> str:
    """A page with its table of this header replaced.

    Raises:
        ValueError: the page has none.
    """
    lines = text.split("\n")
    if table[0] not in lines:
        raise ValueError(f"no table begins with {table[0]!r}")
    start = lines.index(table[0])
    end = next(at for at in range(start, len(lines)) if not lines[at].startswith("|"))
    return "\n".join([*lines[:start], *table, *lines[end:]])


def table(rows: list[Row], columns: list[str]) -> str:
    """The rows in aligned columns, numbers to three significant digits."""
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, (list, tuple)):
        return "x".join(map(str, value))
    return str(value)


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
