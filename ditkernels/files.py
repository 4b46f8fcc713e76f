"""Files that are there whole or not at all, whatever instant a process or a machine dies at, and what proves that they are whole.

A file is written under a name of its own beside its target, goes to the disk, and takes the target's name last. What a process
that was killed had begun keeps its own name, ``.NAME.xxxxxxxx.tmp``, until :func:`remove_leftovers`.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import secrets
import socket
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = ".lock"
# What file systems answer that know no fsync of folders, or no flock.
WITHOUT_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP)
WITHOUT_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

logger = logging.getLogger(__name__)


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that no other process takes."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the name to write to; what was written takes the place of ``path`` at the end of the block.

    If the block raises, ``path`` is as it was and nothing is left beside it.

    Raises:
        OSError: the disk refused.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a whole file; errors as of :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Writes a whole file in UTF-8; errors as of :func:`replacing`."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON; errors as of :func:`replacing`, and TypeError for what is no JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; ValueError, naming the file, where it holds none."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__} in place of an object")
    return content


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that were killed had begun to write into ``folder``."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def make_directory(path: Path) -> None:
    """Makes a folder and those above it; their names are on the disk on return."""
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    path.mkdir(parents=True, exist_ok=True)
    # The name of a new folder is on the disk once its parent is.
    for made in missing:
        sync_directory(made.parent)


# ---- A folder that one process works in ------------------------------------------------------------------------------


class FolderInUseError(OSError):
    """Another process works in the folder; the message names its host and its number."""


class FolderLock:
    """The right to work in a folder, which one process at a time has; it ends with the process, however that ends.

    A lock belongs to whatever descriptor of its file is open, in children too. So a forked child closes its copy at once.

    Args:
        folder: made if it is not there.

    Attributes:
        made: the folders that were made for it, the innermost first.

    Raises:
        FolderInUseError: another process has it.
        OSError: the folder or the file in it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        self._descriptor: int | None = None
        while not self._take():
            pass

    def release(self) -> None:
        """Lets others in: removes the file, and the folders that were made for it, if nothing has come into them."""
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            self.forget()
        for folder in self.made:
            if not folder.exists() or any(folder.iterdir()):
                return
            folder.rmdir()

    def forget(self) -> None:
        """Closes this process's copy of the descriptor; whoever shares it still has the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _take(self) -> bool:
        """Whether the lock is had, or done without; not where the file had been removed before it was locked."""
        # Windows has no such module, and needs none of this to use a model.
        import fcntl

        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            # Who had the lock has just removed the folder that it had made.
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise FolderInUseError(f"{self.path.parent} is in use by {holder}; a folder has one owner at a time") from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in WITHOUT_FLOCK:
                raise
            self.path.unlink(missing_ok=True)
            logger.warning("%s: its file system knows no locks (%s); nothing keeps a second process out", self.path.parent, error)
            return True
        if not _is_at(descriptor, self.path):
            os.close(descriptor)
            return False
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._descriptor = descriptor
        _locks.add(self)
        return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _forget_locks() -> None:
    for lock in list(_locks):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


# ---- On the disk -----------------------------------------------------------------------------------------------------


def sync_file(path: Path) -> None:
    """Returns once the content of a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Returns once the names in a folder are on the disk, where its file system can tell; where it cannot, that is said once."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in WITHOUT_DIRECTORY_SYNC:
            raise
        _say_unsynced(str(path), str(error))
    finally:
        os.close(descriptor)


@functools.cache
def _say_unsynced(path: str, reason: str) -> None:
    logger.warning("%s: its file system syncs no folders (%s); after a crash of the machine a file may be missing", path, reason)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def json_sha256(content: Mapping[str, Any]) -> str:
    """The SHA-256 of JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def signed(body: Mapping[str, Any]) -> dict[str, Any]:
    """JSON that carries its own checksum, which :func:`read_signed` verifies."""
    return {**body, "sha256": json_sha256(body)}


def read_signed(path: Path, what: str, known: Mapping[str, Any], versions: Sequence[int]) -> dict[str, Any]:
    """What :func:`signed` made of a mapping, without its checksum.

    Args:
        what: the file is, for the errors: "the manifest of a checkpoint".
        known: entries that tell such a file from others.
        versions: that ``format_version`` may have.

    Raises:
        ValueError: the file is no such JSON, of another version, or damaged; it is named.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or not known.items() <= content.items():
        raise ValueError(f"{path} is not {what}")
    if content.get("format_version") not in versions:
        allowed = ("are " if len(versions) > 1 else "is ") + " and ".join(map(str, versions))
        raise ValueError(f"{path}: format version {content.get('format_version')}, allowed {allowed}")
    if content.pop("sha256", None) != json_sha256(content):
        raise ValueError(f"{path} is damaged: it does not match its own SHA-256")
    return content


def first_line(error: BaseException) -> str:
    """The first line of what a library says of a file it cannot use; its type's name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """The text, with escapes for the bytes of a file's name that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
