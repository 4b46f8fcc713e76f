"""What the benchmarks share: the clock, the ceilings, the machine they ran on, the table and the JSON.

How time is taken. Contenders take turns within a round, so that a drifting clock hits all of them; the result is the median
over rounds, with the 10th and 90th percentile beside it. Every round uses the next of several input sets, together larger than
the last-level cache. On a GPU time lies between two events, and a device-side pause before the first one lets the launches
queue up, so that the gaps between launches are kept out for everybody alike.

Two contenders are compared by the median of the rounds' ratios. What differs from process to process, such as where memory lies,
no round evens out: ``--processes`` measures anew in fresh processes, and reports medians over them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditkernels._version import __version__
from ditkernels.diagnostics.info import driver_version
from ditkernels.ops import _native
from ditkernels.runtime import resolve_device
from tools.tree import found_from

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
    found = paired(contenders, device, rounds=rounds, warmup=warmup)
    return {name: timing(samples) for name, samples in found.items()}


def paired(contenders: Sequence[Contender], device: torch.device, *, rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """As ``interleaved``, in milliseconds of every round."""
    return _in_turns(contenders, _gpu_clock if device.type == "cuda" else _cpu_clock, rounds, warmup)


def gains(samples: Mapping[str, list[float]], name: str, baselines: Mapping[str, str]) -> Row:
    """How many times as fast a contender is as each baseline that took turns with it, as the median of the rounds' ratios.

    Args:
        samples: milliseconds of every round, by contender.
        name: of the contender.
        baselines: names of contenders, by the word that follows ``over_`` in the row.
    """
    return {
        f"over_{word}": statistics.median(other / own for other, own in zip(samples[baseline], samples[name], strict=True))
        for word, baseline in baselines.items()
        if baseline in samples
    }


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
        "instruction_set": _instruction_set(device),
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
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def _instruction_set(device: torch.device) -> str | None:
    """What our kernels for a CPU run on; None on a GPU, and where there are no such kernels."""
    return _native.cpu_isa() if device.type == "cpu" and _native.cpu_reason(device) is None else None


def _capability(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---- Command line, JSON ----------------------------------------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto is cuda if there is one")
    made.add_argument("--rounds", type=positive, default=20, help="measurements of each contender")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    return made


def arguments(made: argparse.ArgumentParser, argv: Sequence[str] | None, **on_cpu: Any) -> argparse.Namespace:
    """The arguments; where the device is a CPU, ``on_cpu`` are the defaults, of a size that it can bear."""
    if device_of(made.parse_known_args(argv)[0]).type == "cpu":
        made.set_defaults(**on_cpu)
    return made.parse_args(argv)


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
            "environment": environment(device_of(args)) | ({"threads": args.threads} if settings.get("threads") else {}),
            "settings": settings,
            "complete": False,
            "rows": [],
        }
        if settings.get("resume") and self._path is not None and self._path.exists():
            before = json.loads(self._path.read_text(encoding="utf-8"))
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
        unfinished.write_text(json.dumps(self._result, indent=2) + "\n", encoding="utf-8")
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


# ---- Several processes -----------------------------------------------------------------------------------------------


def repeatable(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Gives a parser the flags of benchmarks that are measured in several processes."""
    made.add_argument("--processes", type=positive, default=1, help="fresh ones, one after another; reported are medians over them")
    made.add_argument(
        "--threads", type=numbers, help="of torch, each number in processes of its own; default: as many as torch takes"
    )
    return made


def carry_out(
    benchmark: str,
    args: argparse.Namespace,
    argv: Sequence[str] | None,
    measured: Callable[[argparse.Namespace, Journal], None],
    columns: Iterable[str],
) -> None:
    """Has ``measured`` fill a journal here or, if several processes or numbers of threads are asked for, in fresh processes."""
    threads = args.threads or [torch.get_num_threads()]
    journal = Journal(benchmark, args)
    if args.processes == len(threads) == 1:
        torch.set_num_threads(threads[0])
        # A function that is compiled too often would run eagerly from then on, and be called compiled.
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            measured(args, journal)
        journal.close(columns)
        return
    if not journal.rows:
        words = sys.argv[1:] if argv is None else list(argv)
        command = ["-m", f"benchmarks.speed.{benchmark}", *words]
        with folder_beside(args.json) as folder:
            journal.add(*over_processes(_rows_of_processes(command, args.processes, threads, folder)))
    journal.close(["threads", *columns])


@contextmanager
def folder_beside(path: Path | None) -> Iterator[Path]:
    """A folder for what processes write. It lies beside ``path`` and stays if one of them fails, so that --resume finds it."""
    if path is None:
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)
        return
    folder = path.with_name(f"{path.name}.processes")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def _rows_of_processes(command: list[str], processes: int, threads: list[int], folder: Path) -> Iterator[Row]:
    """The rows of every process. Numbers of threads take turns, so that a drifting clock hits all of them."""
    for process in range(processes):
        for number in threads:
            out = folder / f"{process}-{number}.json"
            flags = ["--processes", "1", "--threads", str(number), "--json", str(out)]
            start = time.perf_counter()
            words = [sys.executable, *command, *flags]
            subprocess.run(words, check=True, env=found_from(os.environ), stdout=subprocess.DEVNULL)
            print(f"process {process + 1} of {processes}, threads {number}: {time.perf_counter() - start:.0f} s", flush=True)
            yield from ({**row, "threads": number} for row in json.loads(out.read_text(encoding="utf-8"))["rows"])


def over_processes(rows: Iterable[Row]) -> list[Row]:
    """One row for all that differ in measured numbers alone, which floats are: their medians, beside the least and the most."""
    alike: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        alike[json.dumps({name: value for name, value in row.items() if not isinstance(value, float)})].append(row)
    made = []
    for group in alike.values():
        measured = {name: [row[name] for row in group] for name, value in group[0].items() if isinstance(value, float)}
        row = group[0] | {name: statistics.median(values) for name, values in measured.items()}
        least, most = ({name: of(values) for name, values in measured.items()} for of in (min, max))
        made.append({**row, "processes": len(group), "least": least, "most": most})
    return made


# ---- Tables ----------------------------------------------------------------------------------------------------------


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


def filled(text: str, name: str, lines: list[str]) -> str:
    """A page with what stands between its marks ``<!-- name -->`` and ``<!-- end of name -->`` replaced.

    Raises:
        ValueError: the page has no such marks.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if not 0 <= text.find(begin) < text.find(end):
        raise ValueError(f"no marks {begin.strip()} and {end}")
    before, after = text[: text.index(begin)], text[text.index(end) :]
    return before + begin + "\n".join(["", *lines, "", ""]) + after


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
