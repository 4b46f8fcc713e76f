"""Notes down in a wheel what its libraries are now: python -m tools.finish_wheel dist/*.whl

`auditwheel repair` may write a library anew, after setup.py has recorded its size and checksum. This comes last: it records them
once more, and mends the wheel's own list of files (RECORD, https://packaging.python.org/specifications/binary-distribution-format).
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import sys
import tempfile
import zipfile
from pathlib import Path

from tools import build_native

LIBRARIES = {f"ditkernels/{file}": kind for file, kind in ((build_native.LIBRARY, "CUDA"), (build_native.CPU_LIBRARY, "CPU"))}


def finish(wheel: Path) -> None:
    """Writes the wheel anew beside itself, and then puts it in its place."""
    with zipfile.ZipFile(wheel) as archive:
        infos = archive.infolist()
        content = {info.filename: archive.read(info) for info in infos}
    records = dict(_record(library, kind, content[library]) for library, kind in LIBRARIES.items() if library in content)
    content |= records
    (listing,) = (name for name in content if name.endswith(".dist-info/RECORD"))
    content[listing] = _listed(content[listing].decode("utf-8"), records).encode("utf-8")
    unfinished = wheel.with_name(f"{wheel.name}.tmp")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        for info in infos:
            archive.writestr(info, content[info.filename], zipfile.ZIP_DEFLATED)
    os.replace(unfinished, wheel)


def _record(library: str, kind: str, content: bytes) -> tuple[str, bytes]:
    """Name and content of what stands beside a library."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(library).name
        path.write_bytes(content)
        build_native.record(path, kind)
        record = build_native.record_of(path, kind)
        return f"{Path(library).parent.as_posix()}/{record.name}", record.read_bytes()


def _listed(listing: str, records: dict[str, bytes]) -> str:
    """The list of files with the checksums and sizes of some of them renewed."""
    rows = list(csv.reader(io.StringIO(listing)))
    for row in rows:
        if row and row[0] in records:
            digest = base64.urlsafe_b64encode(hashlib.sha256(records[row[0]]).digest()).rstrip(b"=").decode("ascii")
            row[1:] = [f"sha256={digest}", str(len(records[row[0]]))]
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(rows)
    return written.getvalue()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        finish(Path(name))
