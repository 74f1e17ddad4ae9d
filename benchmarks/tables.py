"""Writes the tables of README and docs, and the pages of results, from benchmarks/results/*.json: no figure is typed.

    make tables        (python benchmarks/tables.py, from the project's root)

A page says what it wants in a comment, and has it between this comment and the next:

    <!-- table: FILE.json | COMMIT, ... | how the TITLE begins | COLUMN, ... -->
    <!-- end of table -->

The rows are those of all runs of these commits whose titles begin so; the lines below the table say command, date and
machine of each. A column may be renamed: `masked-LM loss = loss`. Without columns all are shown.

A table whose cells come from several rows or files has a template, `benchmarks/tables/NAME.md`, and the page says
`<!-- table: NAME.md -->`. A template begins with its runs, a line each, `run = FILE.json | COMMIT | how the TITLE
begins`. After an empty line is what the page gets: `{run; ROW; COLUMN}` is a cell, `{run; ROW; COLUMN; .1f}` a number
formatted anew, `{sources}` the commands, dates and machines. ROW is what a cell of the row says, or `COLUMN=TEXT`, or
several of them with `&` between.

Figures in sentences are in `benchmarks/tables/sentences.md`, which begins with runs, too. Each line of the rest names a
page and what stands in it. A page that says something else is named, and so is a run, row or column that is not there.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import cell_text, markdown_table, page_of

Run = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
TEMPLATES = ROOT / "benchmarks/tables"
SENTENCES = "sentences.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_TABLE = re.compile(r"(<!-- table: ([^>]+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_CELL = re.compile(r"\{(\w+); ([^{}]+)\}")
_NUMBER = re.compile(r"-?[\d,]+(\.\d+)?(e[-+]?\d+)?")


def main() -> None:
    try:
        texts = {page: with_tables(page.read_text(encoding="utf-8")) for page in PAGES} | result_pages()
        wrong = [f"{name} should say: {text}" for name, text in sentences() if not says(texts[ROOT / name], text)]
        if wrong:
            raise ValueError("\n".join(wrong))
    except ValueError as error:
        sys.exit(str(error))
    for page, text in texts.items():
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: tables renewed")


def result_pages() -> dict[Path, str]:
    """The pages beside the JSON files, of which notes may have been added to by hand."""
    stores = {store.with_suffix(".md"): store for store in RESULTS.glob("*.json")}
    return {
        page: page_of(page.stem, json.loads(store.read_text(encoding="utf-8")))
        for page, store in stores.items()
        if page.exists()
    }


def with_tables(text: str) -> str:
    """The page's text with every table as the results have it.

    Raises:
        ValueError: a table wants a file, run or column that is not there.
    """

    def renewed(match: re.Match[str]) -> str:
        begin, wanted, end = match.groups()
        if wanted.endswith(".md"):
            return f"{begin}\n{from_template(wanted)}\n\n{end}"
        file, commits, title, *columns = (part.strip() for part in wanted.split("|"))
        return f"{begin}\n{table(file, _listed(commits), title, *map(_listed, columns))}\n\n{end}"

    return _TABLE.sub(renewed, text)


def table(file: str, commits: list[str], title: str, columns: list[str] | None = None) -> str:
    """Rows of the runs of these commits, in their order, as Markdown, and below them where they come from.

    Args:
        columns: those that are shown, in their order, each `name` or `name = another name`; by default all.
    """
    kept = _runs(file)
    runs = [run for commit in commits for run in kept if run["commit"] == commit and run["title"].startswith(title)]
    if missing := set(commits) - {run["commit"] for run in runs}:
        raise ValueError(f"{file} has no run of commit {', '.join(sorted(missing))} whose title begins {title!r}.")
    if columns is None:
        shown = {name: name for name in runs[0]["rows"][0]}
    else:
        shown = {name.strip(): (renamed or name).strip() for name, _, renamed in (c.partition("=") for c in columns)}
    for run in runs:
        if unknown := shown.keys() - run["rows"][0].keys():
            raise ValueError(f"{file}, commit {run['commit']}, has no column {', '.join(sorted(unknown))}.")
    rows = [{title: row[name] for name, title in shown.items()} for run in runs for row in run["rows"]]
    return "\n".join([*markdown_table(rows), *(line for run in runs for line in ("", source(run)))])


def from_template(name: str) -> str:
    """What a template says, with the cells that it names.

    Raises:
        ValueError: it wants a run, row or column that is not there.
    """
    runs, text = _template(name)
    sources = dict.fromkeys(source(run) for found in runs.values() for run in found)
    text = text.replace("{sources}", "\n\n".join(sources))
    return _filled(text, runs).strip()


def sentences() -> Iterator[tuple[str, str]]:
    """A page's name and what it says, for every figure that stands in a sentence."""
    runs, text = _template(SENTENCES)
    for line in filter(None, text.splitlines()):
        page, _, sentence = line.partition(": ")
        yield page, _filled(sentence, runs)


def says(text: str, sentence: str) -> bool:
    """Whether a text has a sentence, however its lines are broken."""
    return " ".join(sentence.split()) in " ".join(text.split())


def source(run: Run) -> str:
    machine = run["machine"]
    if isinstance(machine, str):
        # What was written down by hand.
        return f"{run['command']}  \n{run['date']}, commit {run['commit']}; {machine}"
    card = f"one {machine['gpu']}, " if machine.get("gpu") else ""
    load = f", load before {machine['load_before']}" if machine.get("load_before") is not None else ""
    return (
        f"`{run['command']}`  \n{run['date']}, commit {run['commit']}; {card}{machine['cores']} cores of "
        f"{machine['cpu']}, {machine['vector_instructions']}, torch {machine['torch']}{load}"
    )


def _runs(file: str) -> list[Run]:
    path = RESULTS / file
    if not path.is_file():
        raise ValueError(f"There is no benchmarks/results/{file}, of which a table is wanted.")
    return json.loads(path.read_text(encoding="utf-8"))


def _template(name: str) -> tuple[dict[str, list[Run]], str]:
    """The runs of a template, one or more of a title, by the names that it gives them, and the rest of it."""
    path = TEMPLATES / name
    if not path.is_file():
        raise ValueError(f"There is no template benchmarks/tables/{name}, of which a table is wanted.")
    head, _, text = path.read_text(encoding="utf-8").partition("\n\n")
    runs = {}
    for line in head.splitlines():
        key, _, wanted = line.partition(" = ")
        file, commit, title = (part.strip() for part in wanted.split("|"))
        found = [run for run in _runs(file) if run["commit"] == commit and run["title"].startswith(title)]
        if not found:
            raise ValueError(f"{file} has no run of commit {commit} whose title begins {title!r}.")
        runs[key] = found
    return runs, text


def _filled(text: str, runs: dict[str, list[Run]]) -> str:
    def cell(match: re.Match[str]) -> str:
        key, wanted = match.groups()
        row, column, *form = (part.strip() for part in wanted.split(";"))
        if key not in runs:
            raise ValueError(f"A template names no run {key}.")
        value = _value(runs[key], row, column)
        return format(_number(value), *form) if form else value

    return _CELL.sub(cell, text)


def _value(runs: list[Run], row: str, column: str) -> str:
    """A cell as text, without the spread that may stand behind a number in brackets."""
    wanted = [part.strip() for part in row.split("&")]
    rows = [{name: cell_text(value) for name, value in one.items()} for run in runs for one in run["rows"]]
    found = [one for one in rows if all(_has(one, part) for part in wanted)]
    if len(found) != 1 or column not in found[0]:
        raise ValueError(f"{runs[0]['title']!r} has {len(found)} rows {row!r}, or none of them a column {column!r}.")
    return found[0][column].partition(" (")[0]


def _has(row: dict[str, str], wanted: str) -> bool:
    """Whether a row has a cell that says what is wanted, or, of `COLUMN=TEXT`, has it in this column."""
    name, _, text = wanted.partition("=")
    return row[name] == text if name in row else wanted in row.values()


def _number(text: str) -> float:
    match = _NUMBER.match(text)
    if match is None:
        raise ValueError(f"{text!r} is no number.")
    return float(match[0].replace(",", ""))


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


if __name__ == "__main__":
    main()
