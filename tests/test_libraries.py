"""Which files are loaded as compiled libraries: what is read from them before, and how a refusal words it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ditkernels._version import __version__
from ditkernels.ops import _native
from tests.helpers.native_cpu import needs_library
from tools import build_native, finish_wheel

HEADER = 64  # bytes of an ELF header


def fresh(kind: str = "CPU") -> _native.Library:
    return _native.Library(kind, "_cpu.so", "HOW TO BUILD")


def copied(tmp_path: Path, change: Callable[[bytes], bytes] = bytes, recorded: bool = False) -> Path:
    """The CPU library in another place, changed, with or without the record of what it was."""
    assert _native.CPU.path is not None
    path = tmp_path / "_cpu.so"
    path.write_bytes(_native.CPU.path.read_bytes())
    if recorded:
        build_native.record(path, "CPU")
    path.write_bytes(change(path.read_bytes()))
    return path


def test_the_mark_is_what_the_build_puts_there() -> None:
    for kind in ("CPU", "CUDA"):
        assert build_native.mark(kind) == f"ditkernels:{kind}:{__version__}:{_native.schemas_hash()}:"


@needs_library
def test_a_whole_library_has_no_fault(tmp_path: Path) -> None:
    for recorded in (False, True):
        assert fresh().fault(copied(tmp_path, recorded=recorded)) is None


def other_schemas(content: bytes) -> bytes:
    return content.replace(_native.schemas_hash().encode(), b"0123456789abcdef")


@needs_library
@pytest.mark.parametrize(
    "change, said",
    [
        (lambda content: b"", "it is empty; HOW TO BUILD"),
        (lambda content: content[:40], "it is cut short, or for another kind of machine"),
        (lambda content: content[: HEADER + 60], "it is cut short"),
        (lambda content: content[: len(content) // 2], "it is cut short: it has"),
        (lambda content: b"#!/bin/sh\n" + content, None),
        (lambda content: b"\x7fELF" + bytes(1000), "it is cut short, or for another kind of machine"),
        (lambda content: b"no library at all", "it is no library of ditkernels, or an older one; HOW TO BUILD"),
        (lambda content: content.replace(b"ditkernels:CPU", b"ditkernels;CPU"), "it is no library of ditkernels, or an older"),
        (lambda content: content.replace(b"ditkernels:CPU:", b"ditkernels:CUDA:"), "it is the CUDA library"),
        (other_schemas, f"ditkernels {__version__} (0123456789abcdef), this is {__version__} ({_native.schemas_hash()}); HOW"),
    ],
)
def test_a_file_that_is_no_library_of_these_ops_is_refused_before_it_is_loaded(
    change: Callable[[bytes], bytes], said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(tmp_path, change)
    monkeypatch.setenv("DITKERNELS_CPU_LIBRARY", str(path))
    library = fresh()
    library.load_if_present()
    assert library.path is None
    assert str(library.absence).startswith(f"the CPU library {path} is not loaded: ")
    # A loader's own words are the system's.
    assert (said or "invalid ELF header") in str(library.absence)


@needs_library
def test_another_size_or_content_than_was_built_is_told(tmp_path: Path) -> None:
    longer = copied(tmp_path, lambda content: content + b"0", recorded=True)
    size = longer.stat().st_size
    assert fresh().fault(longer) == f"it has {size} bytes, {size - 1} were built; HOW TO BUILD"
    library = fresh()
    library.path = copied(tmp_path, recorded=True)
    assert library.changed() is None
    library.path = copied(tmp_path, lambda content: content[:-1] + bytes([content[-1] ^ 1]), recorded=True)
    assert library.fault(library.path) is None  # the size is the same, and a checksum at each start would take too long
    assert str(library.changed()).startswith(f"{library.path} is not the file that was built (sha256 ")


@needs_library
@pytest.mark.parametrize("record", ["", "{", "[]", '{"bytes": null}', "\udcff"])
def test_a_record_that_cannot_be_read_is_no_record(record: str, tmp_path: Path) -> None:
    path = copied(tmp_path)
    (tmp_path / "_cpu_build.json").write_bytes(record.encode("utf-8", "surrogateescape"))
    assert fresh().fault(path) is None
    path.unlink()
    assert "cannot be read" in fresh().why_not_built(tmp_path)


@needs_library
def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied(tmp_path, lambda content: b"")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DITKERNELS_CPU_LIBRARY", f"~/{path.name}")
    library = fresh()
    library.load_if_present()
    assert f"the CPU library {path} is not loaded: it is empty" in str(library.absence)


def test_a_library_is_put_in_its_place_whole_and_its_record_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, target = tmp_path / "built.so", tmp_path / "package/_cpu.so"
    built.write_bytes(b"first")
    build_native.install(built, target, "CPU")
    assert json.loads((target.parent / "_cpu_build.json").read_text(encoding="utf-8")) == {
        "absent": None,
        "bytes": 5,
        "sha256": hashlib.sha256(b"first").hexdigest(),
    }
    built.write_bytes(b"the second")

    def died(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_native, "record", died)
    with pytest.raises(KeyboardInterrupt):
        build_native.install(built, target, "CPU")
    assert target.read_bytes() == b"the second"
    assert fresh().fault(target) == "it has 10 bytes, 5 were built; HOW TO BUILD"
    monkeypatch.setattr(build_native.shutil, "copyfile", died)
    with pytest.raises(KeyboardInterrupt):
        build_native.install(built, target, "CPU")
    assert target.read_bytes() == b"the second"


@needs_library
def test_a_process_names_the_fault_and_goes_on(tmp_path: Path) -> None:
    """What a truncated file did before: SIGBUS, without a word."""
    path = copied(tmp_path, lambda content: content[: len(content) // 3])
    program = "import sys, ditkernels; from ditkernels.ops import _native; print(_native.cpu_library())"
    environment = {"DITKERNELS_CPU_LIBRARY": str(path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (done.returncode, "is not loaded: it is cut short" in done.stdout) == (0, True), done.stderr


def test_the_record_in_a_wheel_is_renewed(tmp_path: Path) -> None:
    wheel, listing = tmp_path / "x-1-py3-none-any.whl", "x-1.dist-info/RECORD"
    repaired, record = b"what auditwheel left", "ditkernels/_cpu_build.json"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("ditkernels/_cpu.so", repaired)
        archive.writestr(record, '{"absent": null, "bytes": 3, "sha256": "old"}')
        archive.writestr(listing, f"ditkernels/_cpu.so,sha256=a,1\n{record},sha256=b,2\n{listing},,\n")
    finish_wheel.finish(wheel)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("ditkernels/_cpu.so") == repaired
        facts, lines = json.loads(archive.read(record)), archive.read(listing).decode().splitlines()
        size = len(archive.read(record))
    assert (facts["bytes"], facts["sha256"]) == (len(repaired), hashlib.sha256(repaired).hexdigest())
    assert lines[0] == "ditkernels/_cpu.so,sha256=a,1"
    assert lines[1].startswith(f"{record},sha256=")
    assert lines[1].endswith(f",{size}")
    assert lines[2] == f"{listing},,"
