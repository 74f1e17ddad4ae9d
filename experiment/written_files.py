"""Which files in a folder runs of ours wrote: nothing else is ever replaced, moved away or deleted.

`written_files.json` in the folder lists them. A name goes on the list before anything is written under it, so that a
kill leaves nothing that is nobody's. A file gets its SHA-256 when it is whole; edited since, it is the editor's.
A name with a slash at its end is the folder of another run, which has a list of its own.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

from .durable_files import UNFINISHED_SUFFIX, file_digest, sync, write_durably
from .folder_lock import LOCK_NAME

logger = logging.getLogger(__name__)

LIST_NAME = "written_files.json"
RECORD_NAME = "run.json"
KEPT_PREFIX = "kept-"
# What a new run replaces, until it has something to resume from.
REPLACED_PREFIX = "replaced-"
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_NAMES_SHOWN = 5


class WrittenFiles:
    """The list of one folder. Only the main process may change it.

    Args:
        folder: need not exist.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @property
    def is_there(self) -> bool:
        """Whether the folder has a list, empty or not."""
        return (self.folder / LIST_NAME).is_file()

    def __contains__(self, name: str) -> bool:
        """Whether there is a file or folder of this name that a run wrote and nobody has changed since."""
        return self._is_own(name, self._read())

    def claim(self, *names: str) -> None:
        """Makes names free to be written under and lists them; what is somebody else's there is renamed, and said.

        Args:
            names: paths from the folder, with slashes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        listed = self._read()
        for name in names:
            path = self.folder / name
            if not _is_run(name) and os.path.lexists(path) and not self._is_own(name, listed):
                kept = f"{KEPT_PREFIX}{path.name}"
                aside = path.with_name(_free(path.parent, chain([kept], (f"{kept}-{n}" for n in count(2)))))
                os.replace(path, aside)
                logger.warning("%s was not written by a run, or was changed since: it is now %s.", path, aside)
        self._write(listed | dict.fromkeys(names))

    def refuse_others(self, *names: str) -> None:
        """For commands that can be repeated with another folder and lose nothing by it.

        Raises:
            ValueError: something under these names was not written by a command of ours, or was changed since.
        """
        listed = self._read()
        others = [name for name in names if os.path.lexists(self.folder / name) and not self._is_own(name, listed)]
        if others:
            raise ValueError(
                f"{self.folder} holds {', '.join(others)}, which this command did not write and would replace; choose "
                "another --output_dir."
            )

    @contextmanager
    def writing(self, *names: str) -> Iterator[None]:
        """Around the writing of files: claims their names before, and notes their content after."""
        self.claim(*names)
        yield
        paths = {name: self.folder / name for name in names}
        self._write(self._read() | {name: file_digest(path) for name, path in paths.items() if path.is_file()})

    def forget(self, *names: str) -> None:
        """Takes names from the list: what is there under them from now on is not a run's."""
        self._write({name: digest for name, digest in self._read().items() if name not in names})

    def paths(self, with_runs: bool = True) -> list[str]:
        """What is there of the list, as paths from the folder, but not what a new run has moved aside.

        Args:
            with_runs: also what the runs in it have written, as their own lists have it.
        """
        listed, found = self._read(), []
        for name in listed:
            if _is_run(name):
                found += [name + path for path in WrittenFiles(self.folder / name).paths()] if with_runs else []
            elif not name.startswith(REPLACED_PREFIX) and self._is_own(name, listed):
                found.append(name)
        return found

    def with_prefix(self, prefix: str) -> list[str]:
        """The names that are listed, and there, with this beginning."""
        listed = self._read()
        return [name for name in listed if name.startswith(prefix) and self._is_own(name, listed)]

    def move_aside(self, paths: Sequence[str], prefix: str) -> Path:
        """Moves what runs wrote into a folder beside it, with lists of its own, so that it can be moved back as it was.

        A kill leaves every file in one of the two places, and the same call then moves the rest.

        Args:
            paths: from `paths`.
            prefix: beginning of the new folder's name, a number follows; with `REPLACED_PREFIX` it is listed.
        """
        # One that has its record while there is another here is of an earlier time.
        is_whole = RECORD_NAME in self
        begun = [
            name for name in self.with_prefix(prefix) if not (is_whole and (self.folder / name / RECORD_NAME).exists())
        ]
        target = self.folder / (begun[-1] if begun else _free(self.folder, (f"{prefix}{n}" for n in count(1))))
        if prefix == REPLACED_PREFIX and not begun:
            self.claim(target.name)
        self._move(paths, target)
        sync(self.folder)
        return target

    def _move(self, paths: Sequence[str], target: Path) -> None:
        listed = self._read()
        runs = {
            run: [path.removeprefix(run) for path in paths if path.startswith(run)] for run in listed if _is_run(run)
        }
        own = [path for path in paths if not path.startswith(tuple(runs))]
        target.mkdir(parents=True, exist_ok=True)
        copy = WrittenFiles(target)
        copy._write(copy._read() | {name: listed[name] for name in [*own, *runs]})
        # Without its record nobody takes what is left here for a whole run.
        for name in sorted(own, key=lambda name: name != RECORD_NAME):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.folder / name, target / name)
            self._remove_if_empty((self.folder / name).parent)
        sync(target)
        for run, inner in runs.items():
            if inner:
                WrittenFiles(self.folder / run)._move(inner, target / run)
                if all(path.name in (LIST_NAME, LOCK_NAME) for path in (self.folder / run).iterdir()):
                    for name in (LIST_NAME, LOCK_NAME):
                        (self.folder / run / name).unlink(missing_ok=True)
                    self._remove_if_empty(self.folder / run)
        self.forget(*own, *(run for run in runs if not (self.folder / run).exists()))

    def _remove_if_empty(self, folder: Path) -> None:
        while folder != self.folder and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent

    def _is_own(self, name: str, listed: dict[str, str | None]) -> bool:
        path = self.folder / name
        if name not in listed or not os.path.lexists(path):
            return False
        digest = listed[name]
        return digest is None or (path.is_file() and file_digest(path) == digest)

    def _read(self) -> dict[str, str | None]:
        """Of each name the SHA-256 of the file; None of a folder, and of a file that may be half written."""
        path = self.folder / LIST_NAME
        listed = read_json(path) if self.is_there else {}
        outside = [name for name in listed if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside:
            raise ValueError(f"{path} lists {outside[0]}, which is not in its folder, so no run wrote that list.")
        return listed

    def _write(self, listed: dict[str, str | None]) -> None:
        write_durably(self.folder / LIST_NAME, json.dumps(listed, indent=2, sort_keys=True) + "\n")


def is_output_folder(folder: str | Path) -> bool:
    """Whether runs wrote into a folder, so that it holds results and no data."""
    return WrittenFiles(folder).is_there


def is_new(folder: str | Path) -> bool:
    """Whether there is nothing in a folder, or no folder; what a kill has left of a run's first file is nothing."""
    folder = Path(folder)
    leftovers = {LOCK_NAME, *(name + UNFINISHED_SUFFIX for name in (LIST_NAME, RECORD_NAME))}
    return not folder.exists() or folder.is_dir() and all(path.name in leftovers for path in folder.iterdir())


def refuse_foreign(folder: str | Path) -> None:
    """
    Raises:
        ValueError: a run cannot have the folder: it is a file, or holds files and no list of ours.
    """
    folder = Path(folder)
    if is_new(folder) or is_output_folder(folder):
        return
    found = "is a file"
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        rest = [f"{len(names) - _NAMES_SHOWN} more"] if len(names) > _NAMES_SHOWN else []
        found = f"is not empty: it holds {' and '.join([', '.join(names[:_NAMES_SHOWN]), *rest])}"
    raise ValueError(
        f"The output folder {folder} {found}, and it holds no run of this script. Choose another --output_dir."
    )


def read_json(path: Path, needed: Iterable[str] = ()) -> dict[str, Any]:
    """
    Raises:
        ValueError: the file does not hold a mapping with these names: a run did not write it so.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Choose another --output_dir.") from error
    if not isinstance(content, dict) or not content.keys() >= set(needed):
        raise ValueError(f"{path} is damaged: it is not what a run writes. Choose another --output_dir.")
    return content


def described(folder: str | Path, names: Iterable[str]) -> str:
    """Names with their sizes, the largest first: "checkpoint-4 (1.2 GB), config.json (1.1 kB)"."""
    sizes = sorted(((_size(Path(folder, name)), name) for name in names), key=lambda entry: (-entry[0], entry[1]))
    shown = [f"{name} ({_readable(size)})" for size, name in sizes[:_NAMES_SHOWN]]
    rest = sizes[_NAMES_SHOWN:]
    more = [f"{len(rest)} more ({_readable(sum(size for size, _ in rest))})"] if rest else []
    return ", ".join([*shown, *more])


def _size(path: Path) -> int:
    paths = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(entry.lstat().st_size for entry in paths)


def _readable(size: int) -> str:
    factor, unit = next(((factor, unit) for factor, unit in _UNITS if size >= factor), (1, "bytes"))
    return f"{size / factor:.1f} {unit}" if factor > 1 else f"{size} {unit}"


def _is_run(name: str) -> bool:
    return name.endswith("/")


def _free(folder: Path, names: Iterable[str]) -> str:
    """The first of some names that nothing in a folder has."""
    return next(name for name in names if not os.path.lexists(folder / name))
