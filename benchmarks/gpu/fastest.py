"""From what was measured to what `auto` chooses: which of our backends is the fastest at an op, where both may serve.

    python -m benchmarks.gpu.fastest benchmarks/results/DIR            says who wins, and by how much
    python -m benchmarks.gpu.fastest benchmarks/results/DIR --write    into the table in ditkernels/ops/choice.py

Every complete file of ops.py, mlp.py and optimizer.py in the folder is read. A backend wins if it is faster in every setting that
was measured, and the spreads of the two do not overlap in any; else nothing is said and Triton stays. `mlp` is judged by forward
and backward together, since a model takes both or neither. No backend has a speed that broke the numerical contract, so none wins
that way.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.speed import measure
from ditkernels.ops import choice

RIVALS = ("triton", "cuda")
READ = ("ops", "mlp", "optimizer")
TOGETHER = {"mlp": ("mlp", "mlp_backward"), "mlp_backward": ("mlp", "mlp_backward")}
TABLE = Path(choice.__file__)
PREFERRED = re.compile(r"(?<=^PREFERRED: dict\[tuple\[str, str\], str\] = )\{.*?\}$", re.DOTALL | re.MULTILINE)
SETTING = ("unit", "model", "precision", "shape", "copied")


class Time(NamedTuple):
    """Milliseconds of a contender in a setting."""

    median: float
    low: float
    high: float

    def __add__(self, other: object) -> Time:
        assert isinstance(other, Time)
        return Time(*(a + b for a, b in zip(self, other, strict=True)))


# By op, then by setting, then by backend.
Times = dict[str, dict[str, dict[str, Time]]]


def results(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of the files that count.

    Raises:
        ValueError: the folder has none, or one was not measured on a GPU.
    """
    found = False
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict) or result.get("benchmark") not in READ or not result["complete"]:
            continue
        if result["environment"]["compute_capability"] is None:
            raise ValueError(f"{path}: measured on {result['environment']['device']}, allowed is a GPU")
        found = True
        yield path.name, result
    if not found:
        raise ValueError(f"{folder}: no complete result of {', '.join(READ)}")


def times(name: str, result: dict[str, Any]) -> Times:
    """Those of the rivals in one file."""
    made: Times = defaultdict(lambda: defaultdict(dict))
    for row in result["rows"]:
        if row.get("contender") not in RIVALS or "median_ms" not in row:
            continue
        op = row.get("op", result["benchmark"]) + ("_backward" if row.get("pass") == "backward" else "")
        setting = json.dumps([name, *(row.get(key) for key in SETTING)])
        made[op][setting][row["contender"]] = Time(row["median_ms"], row["low_ms"], row["high_ms"])
    return made


def judged_together(found: Times) -> Times:
    """The same, with the ops of ``TOGETHER`` each at the sum of their times."""
    made = dict(found)
    for op, parts in TOGETHER.items():
        if all(part in found for part in parts):
            made[op] = {
                setting: {
                    backend: sum((found[part][setting][backend] for part in parts[1:]), time)
                    for backend, time in found[parts[0]][setting].items()
                }
                for setting in found[parts[0]]
            }
    return made


def winner(settings: dict[str, dict[str, Time]]) -> str | None:
    """The rival that is faster in every setting, beyond the spread; None if there is none."""
    for backend, other in (RIVALS, RIVALS[::-1]):
        if all(len(rivals) == len(RIVALS) and rivals[backend].high < rivals[other].low for rivals in settings.values()):
            return backend
    return None


def row(op: str, settings: dict[str, dict[str, Time]]) -> measure.Row:
    """What is known of an op: the winner, and Triton's time over CUDA's, from the least to the most."""
    ratios = [t["triton"].median / t["cuda"].median for t in settings.values() if len(t) == len(RIVALS)]
    return {
        "op": op,
        "settings": len(ratios),
        "triton_over_cuda": f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else None,
        "fastest": winner(settings) if ratios else None,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of results, as make gpu leaves it")
    parser.add_argument("--write", action="store_true", help="into the package's table")
    args = parser.parse_args(argv)
    merged: dict[str, Times] = defaultdict(lambda: defaultdict(dict))
    for name, result in results(args.folder):
        for op, settings in times(name, result).items():
            merged[result["environment"]["compute_capability"]][op].update(settings)
    preferred = dict(choice.PREFERRED)
    for capability, found in merged.items():
        rows = [row(op, settings) for op, settings in sorted(judged_together(found).items())]
        print(f"compute capability {capability}")
        print(measure.table(rows, ["op", "settings", "triton_over_cuda", "fastest"]))
        kept = {key: backend for key, backend in preferred.items() if key[0] != capability}
        winners = {(capability, made["op"]): made["fastest"] for made in rows if made["fastest"] is not None}
        preferred = kept | winners
    if args.write:
        TABLE.write_text(with_table(TABLE.read_text(encoding="utf-8"), preferred), encoding="utf-8")


def with_table(source: str, preferred: dict[tuple[str, str], str]) -> str:
    """The source of choice.py with another table."""
    lines = "".join(f'    ("{c}", "{op}"): "{backend}",\n' for (c, op), backend in sorted(preferred.items()))
    changed, count = PREFERRED.subn(f"{{\n{lines}}}" if lines else "{}", source)
    assert count == 1, f"{TABLE} has {count} tables PREFERRED"
    return changed


if __name__ == "__main__":
    main()
