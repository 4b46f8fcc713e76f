"""The tests that need a GPU, resumable: those that passed in an earlier try are not run again.

    python -m benchmarks.gpu.gpu_tests tests/gpu/test_adaln_gpu.py --json parity.json --resume

A row is a test that passed, and the seconds it took. What is skipped, because a device or memory is missing, is tried every time.
Ends with pytest's exit status.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from benchmarks.speed import measure

OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu")


class Passed:
    """A plugin of pytest: notes what passes, and leaves out what has."""

    def __init__(self, journal: measure.Journal) -> None:
        self._journal = journal
        self._before = {row["unit"] for row in journal.rows}
        self._called: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if item.nodeid in self._before:
                item.add_marker(pytest.mark.skip(reason="passed before"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self._called.pop(report.nodeid, None)
        elif report.when == "call":
            self._called[report.nodeid] = report.duration
        elif report.when == "teardown" and report.nodeid in self._called:
            seconds = self._called.pop(report.nodeid)
            self._journal.add({"unit": report.nodeid, "seconds": round(seconds, 2)})


def main(argv: list[str] | None = None) -> int:
    """Returns pytest's exit status."""
    parser = measure.resumable(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file of tests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.set_defaults(device="auto")
    args = parser.parse_args(argv)
    journal = measure.Journal("gpu_tests", args)
    status = pytest.main([*OPTIONS, *args.files], plugins=[Passed(journal)])
    if status == pytest.ExitCode.OK:
        journal.close(("unit", "seconds"))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
