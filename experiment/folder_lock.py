"""One command at a time in an output folder: two would delete each other's checkpoints."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_NAME = ".lock"
# File descriptors of the folders that this process holds.
_held: dict[Path, int] = {}


def lock_folder(folder: Path) -> str | None:
    """Makes a folder this process's alone until `unlocking_folders` ends, or the process, however it ends.

    Where the file system has no locks, nothing is locked. POSIX lets go of a lock as soon as its process closes the
    file once, so nobody else opens it.

    Returns:
        Who has it, if another process does; None otherwise.

    Raises:
        OSError: the folder is not there, or nothing can be written in it.
    """
    path = folder.resolve() / LOCK_NAME
    while True:
        if path in _held and _is_file(_held[path], path):
            return None
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.pread(descriptor, 200, 0).decode(errors="replace")
                os.close(descriptor)
                return holder or "another process"
        # The one before may have ended, and deleted its file, between the two.
        if _is_file(descriptor, path):
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            _held[path] = descriptor
            return None
        os.close(descriptor)


@contextmanager
def unlocking_folders() -> Iterator[None]:
    """Around a whole script: the folders that it has locked are free again at its end, in a notebook too."""
    try:
        yield
    finally:
        while _held:
            path, descriptor = _held.popitem()
            if _is_file(descriptor, path):
                path.unlink()
            os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
