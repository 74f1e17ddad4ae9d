"""A user's file as rows, from csv, tsv, json lines or parquet: cells as they stand, and a name for each row's place."""

import csv
import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, List, load_dataset
from datasets.exceptions import DatasetGenerationError

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# The longest cell of a csv file that is read; the csv module's own limit is a few pages of text.
LONGEST_CELL = 2**27


@dataclass(frozen=True)
class Table:
    """The rows of one file.

    Attributes:
        path: the file.
        columns: the cells of every column, in the order of the rows; `None` where a row has nothing.
        places: of every row, what a message calls it, e.g. "a.csv:17".
        is_typed: whether cells have types; in csv and tsv files all are text.
    """

    path: Path
    columns: dict[str, list[Any]]
    places: list[str]
    is_typed: bool

    def __len__(self) -> int:
        return len(self.places)

    def select(self, rows: list[int]) -> "Table":
        """The table of some of the rows, by their numbers from 0."""
        columns = {name: [cells[row] for row in rows] for name, cells in self.columns.items()}
        return replace(self, columns=columns, places=[self.places[row] for row in rows])


def read_table(path: str | Path) -> Table:
    """Read a file whole.

    A csv or tsv file begins with a line of column names; in a tsv file quotes are ordinary characters. An empty line is
    no row, unless the file has one column: there it is an empty cell, but not at the file's end. A json file has an
    object a line, or is one array of objects. Classes that a parquet file of `datasets` numbers are read by their
    names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its extension is unknown, it is empty or damaged, or a column is there twice.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path} has the unknown extension {path.suffix!r}; known are {', '.join(READERS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    kind = READERS[path.suffix.lower()]
    try:
        if kind == "csv":
            table = _read_delimited(path)
        elif kind == "json":
            table = _read_json(path)
        else:
            table = _read_parquet(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}).") from error
    if not table.places:
        raise ValueError(f"{path} is empty: it holds no row.")
    return table


def _read_delimited(path: Path) -> Table:
    is_tsv = path.suffix.lower() == ".tsv"
    quoting = csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL
    rows: list[list[str]] = []
    places: list[str] = []
    # Empty lines of a file with one column, until it is known that they are not its end.
    blanks: list[str] = []
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if is_tsv else ",", quoting=quoting, strict=True)
        try:
            header = next(reader, [])
            for row in reader:
                if row and len(row) != len(header):
                    raise ValueError(
                        f"{path}:{reader.line_num}: {len(row)} cells, but the first line names {len(header)} columns"
                        f"{'' if is_tsv else '; a text with a comma in it has to stand in double quotes'}."
                    )
                place = f"{path}:{reader.line_num}"
                if row:
                    rows += [[""]] * len(blanks) + [row]
                    places += [*blanks, place]
                    blanks = []
                elif len(header) == 1:
                    blanks.append(place)
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num} cannot be read: {error}.") from error
    repeated = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    if repeated:
        raise ValueError(f"{path} has several columns {repeated[0]!r}; its columns are {', '.join(header)}.")
    columns = {name: [row[number] for row in rows] for number, name in enumerate(header)}
    return Table(path, columns, places, is_typed=False)


def _read_json(path: Path) -> Table:
    columns: dict[str, list[Any]] = {}
    places: list[str] = []
    for place, row in _json_rows(path):
        if not isinstance(row, dict):
            raise ValueError(f"{place} is no JSON object with the row's columns, but {json.dumps(row)[:50]}.")
        for name in (name for name in row if name not in columns):
            columns[name] = [None] * len(places)
        for name, cells in columns.items():
            cells.append(row.get(name))
        places.append(place)
    return Table(path, columns, places, is_typed=True)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    is_array = text.lstrip().startswith("[")
    place = str(path)
    try:
        if is_array:
            for number, row in enumerate(json.loads(text, object_pairs_hook=_object), start=1):
                yield f"{path}, row {number}", row
            return
        # Only a line feed ends a line: texts hold stranger characters.
        for number, line in enumerate(text.split("\n"), start=1):
            place = f"{path}:{number}"
            if line.strip():
                yield place, json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} cannot be read: {error}.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a column is there twice")
    return row


def _read_parquet(path: Path) -> Table:
    try:
        # The loader takes patterns: brackets in a file's name must not act as one.
        dataset = load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error
    columns = {}
    for name, feature in dataset.features.items():
        cells = dataset[name][:]
        if isinstance(feature, ClassLabel):
            cells = [_class_name(feature, cell) for cell in cells]
        elif isinstance(feature, List) and isinstance(feature.feature, ClassLabel):
            cells = [cell and [_class_name(feature.feature, number) for number in cell] for cell in cells]
        columns[name] = cells
    return Table(path, columns, [f"{path}, row {number}" for number in range(1, len(dataset) + 1)], is_typed=True)


def _class_name(feature: ClassLabel, number: int | None) -> str | None:
    # -1 is how `datasets` writes that there is no label.
    return None if number is None or number < 0 else feature.int2str(number)
