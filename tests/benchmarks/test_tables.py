"""make tables: the tables of the documents are those of the results."""

import importlib
import sys
from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    tables = importlib.import_module("tables")


def page(file="memory.json", commit="0d573e0", title="Memory", columns="side, peak MiB = MiB") -> str:
    return f"before\n<!-- table: {file} | {commit} | {title} | {columns} -->\n| stale |\n<!-- end of table -->\nafter\n"


def test_the_tables_of_every_page_are_those_of_the_results():
    texts = {path: path.read_text() for path in tables.PAGES}
    assert sum(text.count("<!-- table: ") for text in texts.values()) >= 7
    for path, text in texts.items():
        assert tables.with_tables(text) == text, f"{path.name}: run `make tables`"


def test_a_table_has_the_columns_asked_for_and_says_where_it_is_from():
    text = tables.with_tables(page())
    assert "| side | MiB |\n| --- | --- |\n| bert | 631 |\n" in text and "stale" not in text
    assert "`python benchmarks/memory.py --shape base" in text and "2026-11-26, commit 0d573e0; 2 cores" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"file": "none.json"}, "no benchmarks/results/none.json"),
        ({"commit": "0d573e0, abcdef"}, "no run of commit abcdef"),
        ({"title": "Speed"}, "whose title begins 'Speed'"),
        ({"columns": "side, taste"}, "no column taste"),
    ],
)
def test_what_is_not_there_is_named(wanted, message):
    with pytest.raises(ValueError, match=message):
        tables.with_tables(page(**wanted))
