"""Writes the tables of README and docs from the JSON files in benchmarks/results, so that no figure is typed by hand.

    make tables        (python benchmarks/tables.py, from the project's root)

A page says what it wants in a comment, and has it between this comment and the next:

    <!-- table: FILE.json | COMMIT, ... | how the TITLE begins | COLUMN, ... -->
    <!-- end of table -->

The rows are those of all runs of these commits whose titles begin so; the lines below the table say command, date and
machine of each. A column may be renamed: `masked-LM loss = loss`. A run that is not there ends in one line.
"""

import json
import re
import sys
from pathlib import Path

from report import markdown_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_TABLE = re.compile(
    r"(<!-- table: ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+?) -->\n).*?(<!-- end of table -->)", re.DOTALL
)


def main() -> None:
    try:
        texts = {page: with_tables(page.read_text(encoding="utf-8")) for page in PAGES}
    except ValueError as error:
        sys.exit(str(error))
    for page, text in texts.items():
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: tables renewed")


def with_tables(text: str) -> str:
    """The page's text with every table as the results have it.

    Raises:
        ValueError: a table wants a file, run or column that is not there.
    """

    def renewed(match: re.Match[str]) -> str:
        begin, file, commits, title, columns, end = match.groups()
        return f"{begin}\n{table(file, _listed(commits), title, _listed(columns))}\n\n{end}"

    return _TABLE.sub(renewed, text)


def table(file: str, commits: list[str], title: str, columns: list[str]) -> str:
    """Rows of the runs of these commits, in their order, as Markdown, and below them where they come from."""
    path = RESULTS / file
    if not path.is_file():
        raise ValueError(f"There is no benchmarks/results/{file}, of which a table is wanted.")
    kept = json.loads(path.read_text(encoding="utf-8"))
    runs = [run for commit in commits for run in kept if run["commit"] == commit and run["title"].startswith(title)]
    if missing := set(commits) - {run["commit"] for run in runs}:
        raise ValueError(f"{file} has no run of commit {', '.join(sorted(missing))} whose title begins {title!r}.")
    shown = {name.strip(): (renamed or name).strip() for name, _, renamed in (c.partition("=") for c in columns)}
    for run in runs:
        if unknown := shown.keys() - run["rows"][0].keys():
            raise ValueError(f"{file}, commit {run['commit']}, has no column {', '.join(sorted(unknown))}.")
    rows = [{title: row[name] for name, title in shown.items()} for run in runs for row in run["rows"]]
    return "\n".join([*markdown_table(rows), *(line for run in runs for line in ("", source(run)))])


def source(run: dict) -> str:
    machine = run["machine"]
    return (
        f"`{run['command']}`  \n{run['date']}, commit {run['commit']}; {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['vector_instructions']}, torch {machine['torch']}"
    )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


if __name__ == "__main__":
    main()
