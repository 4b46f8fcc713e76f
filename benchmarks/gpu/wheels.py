"""Unpacks a folder of wheels into a folder of its own, to be put on PYTHONPATH: nothing of the user's Python is touched.

    python -m benchmarks.gpu.wheels WHEELS TARGET

No index is asked and no dependency is looked for. A wheel too large to be carried in one file may lie there in pieces, NAME.whl.00,
NAME.whl.01 and so on. torch, triton and numpy are refused: they would stand before those that are installed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

OWN = {"torch", "triton", "numpy"}


def joined(folder: Path, into: Path) -> list[Path]:
    """The wheels of a folder; those in pieces put together in another.

    Raises:
        ValueError: there are none, pieces are missing, or one that must not stand before the user's own.
    """
    wheels = sorted(folder.glob("*.whl"))
    for first in sorted(folder.glob("*.whl.00")):
        pieces = sorted(folder.glob(f"{first.stem}.[0-9][0-9]"))
        if pieces[-1].name != f"{first.stem}.{len(pieces) - 1:02}":
            raise ValueError(f"{first.stem}: got {len(pieces)} pieces up to {pieces[-1].name}, allowed are all of them")
        with open(into / first.stem, "wb") as whole:
            for piece in pieces:
                whole.write(piece.read_bytes())
        wheels.append(into / first.stem)
    if not wheels:
        raise ValueError(f"{folder}: got no wheel, allowed are files named *.whl, or their pieces *.whl.00 and so on")
    names = {wheel.name.partition("-")[0].lower() for wheel in wheels}
    if names & OWN:
        raise ValueError(f"{folder}: got a wheel of {', '.join(sorted(names & OWN))}, allowed are others")
    return wheels


def main(argv: list[str] | None = None) -> int:
    """Returns pip's status, or 2 where the folder cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args(argv)
    shutil.rmtree(args.target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            wheels = joined(args.wheels, Path(folder))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        alone = ["--no-deps", "--no-index", "--target", str(args.target)]
        status = subprocess.run([*pip, *alone, *map(str, wheels)]).returncode
    if status == 0:
        print(f"{', '.join(wheel.name for wheel in wheels)} in {args.target}")
    return status


if __name__ == "__main__":
    sys.exit(main())
