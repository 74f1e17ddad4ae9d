"""Files that are whole or not there, whenever the process or the machine stops."""

import errno
import hashlib
import os
from pathlib import Path

UNFINISHED_SUFFIX = ".unfinished"


def write_durably(path: Path, text: str) -> None:
    """Writes a text file that is there as before or as a whole, and is on the disk when this returns.

    Raises:
        OSError: the file cannot be written; what was there before is still there.
    """
    unfinished = path.with_name(path.name + UNFINISHED_SUFFIX)
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk.

    Of a folder as far as its file system can: those of a network or of a cloud's storage may not.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Waits until a folder with all that is in it is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
