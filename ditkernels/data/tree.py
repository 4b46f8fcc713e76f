"""What lies in a folder of images: its classes, their files, and what is passed over."""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ditkernels.data.formats import FORMAT_OF, lacking
from ditkernels.files import printable

# What systems and programs leave in folders, beside all whose names begin with a dot.
SYSTEM_NAMES = {
    "__MACOSX",
    "Thumbs.db",
    "desktop.ini",
    "@eaDir",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
}
SYSTEM, NO_FILE, LINK, LOOSE = (
    "hidden or of the system",
    "no regular file",
    "a link to a folder that is read already",
    "an image outside of the folders of classes",
)


@dataclass
class Found:
    """What lies below a folder.

    Attributes:
        files: paths of images under the root, sorted.
        passed_over: how many entries for each reason; the suffix where it is a file's.
    """

    files: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)


def is_system(name: str) -> bool:
    """Whether a file or folder of that name is no class and no image."""
    return name.startswith(".") or name in SYSTEM_NAMES


def class_folders(root: Path, passed_over: Counter[str]) -> list[str]:
    """The names of the folders in ``root`` that are classes, sorted; what else lies there is counted."""
    names = []
    with os.scandir(root) as entries:
        for entry in entries:
            if is_system(entry.name):
                passed_over[SYSTEM] += 1
            elif not entry.is_dir():
                passed_over[LOOSE if _suffix(entry.name) in FORMAT_OF else _suffix(entry.name) or NO_FILE] += 1
            elif entry.is_symlink() and _contains(entry.path, os.fspath(root)):
                passed_over[LINK] += 1
            else:
                names.append(entry.name)
    return sorted(names)


def images_under(root: Path, folder: str) -> Found:
    """The images below a folder of ``root``; links to folders are followed, and no folder is read twice."""
    found = Found()
    seen: set[tuple[int, int]] = set()
    links: list[str] = []
    waiting = [folder]
    while waiting or links:
        # Folders come before links to them, so that a file keeps the path it lies at.
        inside = waiting.pop() if waiting else links.pop()
        status = os.stat(root / inside)
        if (status.st_dev, status.st_ino) in seen:
            found.passed_over[LINK] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(root / inside) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
                _sort_in(entry, os.path.join(inside, entry.name), found, waiting, links)
    found.files.sort()
    return found


def _sort_in(entry: os.DirEntry[str], path: str, found: Found, waiting: list[str], links: list[str]) -> None:
    if is_system(entry.name):
        found.passed_over[SYSTEM] += 1
    elif _is_folder(entry):
        if not entry.is_symlink():
            waiting.append(path)
        elif _contains(entry.path, os.path.dirname(entry.path)):
            found.passed_over[LINK] += 1
        else:
            links.append(path)
    elif _suffix(entry.name) not in FORMAT_OF:
        found.passed_over[_suffix(entry.name) or "without a suffix"] += 1
    elif _is_file(entry):
        found.files.append(path)
    else:
        found.passed_over[NO_FILE] += 1


def _contains(link: str, folder: str) -> bool:
    """Whether what a link leads to holds the folder that the link lies in."""
    target, inside = os.path.realpath(link), os.path.realpath(folder)
    return inside == target or inside.startswith(os.path.join(target, ""))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        return _unless_a_circle(error)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError as error:
        return _unless_a_circle(error)


def _unless_a_circle(error: OSError) -> bool:
    """False for a link that leads to itself; another error is the disk's."""
    if error.errno == errno.ELOOP:
        return False
    raise error


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def notes_of(path: str | os.PathLike[str], passed_over: Counter[str], files: list[str]) -> list[str]:
    """What is to be said of a folder: what was passed over in it, and the images whose format this Pillow lacks."""
    name = printable(os.fspath(path))
    notes = []
    if passed_over:
        counted = ", ".join(f"{count} {printable(reason)}" for reason, count in sorted(passed_over.items()))
        notes.append(f"{name}: passed over {counted}")
    lost = Counter(FORMAT_OF[_suffix(file)] for file in files) if lacking() else Counter()
    notes += [
        f"{name}: {count} files of {kind} are unreadable, this Pillow was built without it"
        for kind, count in sorted(lost.items())
        if kind in lacking()
    ]
    return notes
