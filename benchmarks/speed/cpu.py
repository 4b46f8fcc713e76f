"""What the docs say of speed on a CPU: measured, and written into their tables.

    python -m benchmarks.speed.cpu                      measures everything: hours; the same command goes on where it was cut short
    python -m benchmarks.speed.cpu --only ops,large     some of it
    python -m benchmarks.figures --only cpu.png         draws the figure
    python -m benchmarks.speed.cpu --docs README.md docs/measured.md benchmarks/results/README.md    writes the tables alone

Each measurement is a script of this folder at sizes that a CPU can bear, training on 1 and 2 threads, in five processes each, into
benchmarks/results/cpu-NAME.json. A table stands between marks, ``<!-- cpu summary -->`` for one and its end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.speed import measure
from tools.tree import ROOT, found_from

RESULTS = ROOT / "benchmarks/results"
NORMS = ("modulate_norm", "gated_residual", "gated_residual_norm")
SHAPE = [4, 256, 384]  # of the ops in the summary
BF16 = "eager-bf16,ours-bf16,compiled-bf16,ours-compiled-bf16"
# What nobody asks of two threads is measured on one: the second number would take as long again.
ONE_THREAD = ("--threads", "1")
LARGE = ("--ops", "gated_residual_norm", "--shapes", "32x256x1152", "--passes", "inference", "--rounds", "20")
MEASUREMENTS = {
    "ops": ("ops", "--passes", "inference,forward+backward", "--rounds", "15", *ONE_THREAD),
    "large": ("ops", *LARGE, *ONE_THREAD),
    "optimizer": ("optimizer",),
    "training-fp32": ("training",),
    # A processor that multiplies no bf16 takes some 20 s a backward: fewer rounds, and turns of their own.
    "training-bf16": ("training", "--rounds", "2", "--contenders", BF16),
    "sampling": ("sampling", *ONE_THREAD),
}

Results = dict[str, dict[str, Any]]
"""By name of the measurement: the content of its file."""


def path_of(name: str, results: Path) -> Path:
    """Where a measurement lies."""
    return results / f"cpu-{name}.json"


def take(name: str, results: Path, processes: int) -> None:
    """Measures, and goes on with what was cut short."""
    script, *flags = MEASUREMENTS[name]
    common = [
        "--device",
        "cpu",
        "--threads",
        "1,2",
        "--processes",
        str(processes),
        "--resume",
        "--json",
        os.path.relpath(path_of(name, results)),  # it is written into the file
    ]
    command = [sys.executable, "-m", f"benchmarks.speed.{script}", *common, *flags]
    subprocess.run(command, check=True, env=found_from(os.environ))


# ---- Tables ----------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of the summary.

    Attributes:
        what: is fast.
        than: what it is compared with.
        field: of the row that says how many times as fast it is.
        source: name of the measurement; ``{}`` stands for the precision.
        where: what the row must say.
        threads: of torch.
    """

    what: str
    than: str
    field: str
    source: str
    where: dict[str, Any]
    threads: int = 1


def lines() -> list[Line]:
    """All lines of the summary."""
    passes = {"forward": "inference", "forward+backward": "forward+backward"}
    against = {"eager": "plain PyTorch", "compiled": "torch.compile"}
    made = [
        Line(f"`{op}`, {words}", than, f"over_{word}", "ops", {"op": op, "shape": SHAPE, "pass": which, "contender": "cpu"})
        for op in NORMS
        for words, which in passes.items()
        for word, than in against.items()
    ]
    for op, words in (("bias_gelu", "`bias_gelu`, forward"), ("gelu", "`bias_gelu` without bias, forward")):
        where = {"op": op, "shape": SHAPE, "pass": "inference", "contender": "cpu"}
        made.append(Line(words, against["eager"], "over_eager", "ops", where))
    models = (("ours", "eager", "a DiT"), ("ours-compiled", "compiled", "a compiled DiT"))
    for which, threads, (contender, word, whose) in itertools.product(passes, (1, 2), models):
        where = {"contender": contender + "-{}", "pass": which}
        what = f"{whose}, {which}" + (f", {threads} threads" if threads > 1 else "")
        made.append(Line(what, f"the plain one, {word}", f"over_{word}", "training-{}", where, threads))
    for kind in ("fused", "foreach"):
        where = {"contender": "cpu"}
        made.append(Line("`adamw_ema`", f"{kind} AdamW, then foreach EMA", f"over_{kind}", "optimizer", where))
    for batch in (1, 8):
        for steps in (5, 20):
            for word, than in (("eager", "the public loop"), ("ahead", "the plain model, modulation ahead")):
                where = {"contender": "sampler-{}", "batch": batch, "steps": steps}
                made.append(Line(f"guided DDIM, {steps} steps, batch {batch}", than, f"over_{word}", "sampling", where))
    return made


def found(results: Results, source: str, threads: int, where: dict[str, Any]) -> measure.Row | None:
    """The row that says so, or None."""
    rows = results[source]["rows"] if source in results else []
    wanted = {**where, "threads": threads}
    matching = (row for row in rows if "median_ms" in row and all(row.get(name) == value for name, value in wanted.items()))
    return next(matching, None)


def times(row: measure.Row | None, field: str) -> str:
    """How many times as fast, and from the least to the most of the processes."""
    if row is None or field not in row:
        return "–"
    return f"{row[field]:.2f} ({row['least'][field]:.2f} to {row['most'][field]:.2f})"


def gains(results: Results, shown: Sequence[Line]) -> list[str]:
    """A table of some lines of the summary."""
    rows = []
    for line in shown:
        cells = []
        for precision in ("fp32", "bf16"):
            where = {name: value.format(precision) if isinstance(value, str) else value for name, value in line.where.items()}
            row = found(results, line.source.format(precision), line.threads, {**where, "precision": precision})
            cells.append(times(row, line.field))
        if any(cell != "–" for cell in cells):
            rows.append([line.what, line.than, *cells])
    return measure.markdown("on one thread, unless said | times as fast as | fp32 | bf16", rows)


def short(results: Results) -> list[str]:
    """What README says: ops and a model against plain PyTorch."""
    plain = [line for line in lines() if line.field == "over_eager" and line.threads == 1 and line.source != "sampling"]
    return [origin(results), "", *gains(results, plain)]


def summary(results: Results) -> list[str]:
    """What the page of measurements says: of everything something."""
    return [origin(results), "", *gains(results, lines()), *large(results)]


def large(results: Results) -> list[str]:
    """At which share of ``copy_``'s rate the largest call moves its bytes."""
    where = {"contender": "cpu", "pass": "inference"}
    rows = {p: found(results, "large", 1, {**where, "precision": p}) for p in ("fp32", "bf16")}
    shares = [f"{100 * row['over_copy']:.0f}% in {precision}" for precision, row in rows.items() if row is not None]
    words = "`gated_residual_norm` at (32, 256, 1152) moves what it must at {} of the rate at which `copy_` moves as many bytes."
    return ["", words.format(" and ".join(shares))] if shares else []


def every_op(results: Results) -> list[str]:
    """What the list of results says: every op, shape, precision and pass."""
    rows = []
    for row in results["ops"]["rows"] if "ops" in results else []:
        if row.get("contender") == "cpu" and row["threads"] == 1 and "median_ms" in row:
            than = [times(row, f"over_{word}") for word in ("eager", "compiled")]
            share = f"{100 * row['over_copy']:.0f}%"
            rows.append([f"`{row['op']}`", "x".join(map(str, row["shape"])), row["precision"], row["pass"], *than, share])
    header = "op | B x N x D | precision | pass | than eager | than compiled | of `copy_`"
    return [origin(results), "", *measure.markdown(header, rows)]


def origin(results: Results) -> str:
    """Where the numbers are from."""
    environments = [result["environment"] for result in results.values()]
    dates = sorted({of["date"][:10] for of in environments})
    of = environments[0]
    taken = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    words = "Medians over processes, in brackets the least and the most of them"
    return f"{of['device']}, {of['instruction_set']}; Python {of['python']}, torch {of['torch']}; {taken}. {words}."


TABLES = {"cpu short": short, "cpu summary": summary, "cpu ops": every_op}


def write(page: Path, results: Results) -> None:
    """Writes the tables for which a page has marks.

    Raises:
        ValueError: there is no result, or the page has no marks.
    """
    if not results:
        raise ValueError(f"there is no complete cpu-*.json: {', '.join(MEASUREMENTS)}")
    text = page.read_text(encoding="utf-8")
    named = [name for name in TABLES if f"<!-- {name} -->" in text]
    if not named:
        raise ValueError(f"{page}: no marks of {' or '.join(TABLES)}")
    for name in named:
        text = measure.filled(text, name, TABLES[name](results))
    page.write_text(text, encoding="utf-8")


def read(results: Path) -> Results:
    """What has been measured whole."""
    made = {
        name: json.loads(path_of(name, results).read_text(encoding="utf-8"))
        for name in MEASUREMENTS
        if path_of(name, results).exists()
    }
    return {name: result for name, result in made.items() if result["complete"]}


def main(argv: list[str] | None = None) -> None:
    """Measures, or writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=measure.names_among(MEASUREMENTS), default=list(MEASUREMENTS), help=", ".join(MEASUREMENTS))
    parser.add_argument("--processes", type=measure.positive, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--docs", type=Path, nargs="+", metavar="PAGE", help="write the tables into these, and measure nothing")
    args = parser.parse_args(argv)
    for page in args.docs or []:
        write(page, read(args.results))
    if args.docs is None:
        for name in args.only:
            take(name, args.results, args.processes)


if __name__ == "__main__":
    main()
