"""Texts from files with a JSON object per line, read here because the json loader of datasets can change them.

datasets 5.2 looks for a mixture of types in the first 10 MB of a file; where a column of texts holds its first number
or list after that, the texts from there on come with quotes around them. Here other columns may hold anything.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


def check_beginning(path: Path) -> None:
    """Refuses a file that begins with neither an object nor an array; at a `null`, pyarrow ends the process.

    Raises:
        ValueError: says with what it begins.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        begin = _first_character(file)
        if begin and begin not in "{[":
            raise ValueError(f"{path} begins with {begin + file.read(10)!r}, not with a JSON object or array.")


def holds_texts(path: Path, text_column: str) -> bool:
    """Whether the first line of a file is a whole object with that column; one with token ids is left to datasets."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        begin = _first_character(file)
        # An array may be a single line of gigabytes.
        if begin != "{":
            return False
        try:
            first = json.loads(begin + file.readline())
        except ValueError:
            return False
        except RecursionError:
            return True  # `read_texts` refuses it.
    return text_column in first and "input_ids" not in first


def _first_character(file: TextIO) -> str:
    """The first one that is no white space, or "" at the end of a file."""
    while (character := file.read(1)).isspace():
        pass
    return character


def read_texts(files: list[tuple[str, int, int]], text_column: str) -> Iterator[dict[str, str | None]]:
    """Rows with the text column alone; None where a line lacks it or holds null.

    Args:
        files: path, size and time of change of each, the latter two for caches that know a reading by its arguments.

    Raises:
        ValueError: a line is no object, or its text no valid text; names file and line.
    """

    is_twice = False

    def note_columns(pairs: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal is_twice
        # Objects inside come first, so the last word is the row's.
        is_twice = [name for name, _ in pairs].count(text_column) > 1
        return dict(pairs)

    for path, *_ in files:
        lines_read = 0
        try:
            with open(path, encoding="utf-8-sig") as file:
                for line in file:
                    lines_read += 1
                    if line := line.strip():
                        row = json.loads(line, object_pairs_hook=note_columns)
                        if is_twice:
                            raise ValueError(f"column {text_column!r} is specified twice")
                        yield {text_column: _text(row, text_column)}
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not valid UTF-8 (after line {lines_read}: {error.reason}).") from error
        except json.JSONDecodeError as error:
            where = f"line {lines_read}, character {error.pos + 1}"
            raise ValueError(f"{path} cannot be read: {where}: {error.msg}.") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read: line {lines_read}: {error}.") from error


def _text(row: object, text_column: str) -> str | None:
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    text = row.get(text_column)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"column {text_column!r} holds {json.dumps(text)[:50]}, not text")
    # Half of a surrogate pair can be written in JSON, but is no character.
    if text is not None and not text.isascii():
        text.encode()
    return text
