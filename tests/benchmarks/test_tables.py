"""make tables: the tables of the documents are those of the results."""

import importlib
import re
import sys
from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    tables = importlib.import_module("tables")


# Tables of numbers that are no measurements of ours, by how they begin, and what they are.
TYPED = {
    "| flag | term | default |": "defaults, which --help has too",
    "| field | default | meaning |": "defaults of the configuration",
    "| `neuron` | spikes | amplitude | a spike where |": "the values that a spike can have",
    "| | XSUM | CNN/DailyMail |": "figures of a paper, which is named there",
    "| model | nine | five | five, below its dense model |": "the same",
}
_FIGURE = re.compile(r"[\d*~<>+./,:() %-]*\d[\d*~<>+./,:() %-]*(x|mJ|ms|G|M|MB|MAC|nats|steps)?[) *]*")


def typed_tables(text: str):
    """How each table begins that stands outside of the marks and has a cell that is a figure."""
    lines = re.sub(r"<!-- table: .*?<!-- end of table -->", "", text, flags=re.DOTALL).splitlines()
    header = None
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|") and not before.startswith("|"):
            header = line
        elif line.startswith("|") and any(_FIGURE.fullmatch(cell.strip()) for cell in line.strip("|").split("|")):
            yield header


def page(file="memory.json", commit="0d573e0", title="Memory", columns="side, peak MiB = MiB") -> str:
    return f"before\n<!-- table: {file} | {commit} | {title} | {columns} -->\n| stale |\n<!-- end of table -->\nafter\n"


def test_the_tables_of_every_page_are_those_of_the_results():
    texts = {path: path.read_text() for path in tables.PAGES}
    assert sum(text.count("<!-- table: ") for text in texts.values()) >= 20
    for path, text in texts.items():
        assert tables.with_tables(text) == text, f"{path.name}: run `make tables`"


def test_the_pages_beside_the_results_are_theirs():
    pages = tables.result_pages()
    assert len(pages) > 10
    for path, text in pages.items():
        assert path.read_text() == text, f"{path.name}: run `make tables`"


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


def test_no_table_of_figures_is_typed():
    found = {header for path in tables.PAGES for header in typed_tables(path.read_text())}
    assert found <= TYPED.keys()


def test_figures_in_sentences_are_those_of_the_results():
    said = list(tables.sentences())
    assert {name for name, _ in said} >= {"README.md", "docs/energy.md"}
    for name, text in said:
        assert tables.says((tables.ROOT / name).read_text(), text), f"{name} should say: {text}"


def template(folder, monkeypatch, text):
    monkeypatch.setattr(tables, "TEMPLATES", folder)
    (folder / "mine.md").write_text("memory = memory.json | 0d573e0 | Memory of training\n\n" + text)
    return "before\n<!-- table: mine.md -->\nstale\n<!-- end of table -->\n"


def test_a_template_takes_cells_from_anywhere_and_formats_numbers(tmp_path, monkeypatch):
    row = "spikelm T=4 & checkpointing=yes"
    wanted = template(
        tmp_path, monkeypatch, f"| {{memory; {row}; ratio to bert; .1f}} | {{memory; {row}; side}} |\n{{sources}}"
    )
    text = tables.with_tables(wanted)
    assert "\n| 1.0 | spikelm T=4 |\n`python benchmarks/memory.py" in text and "stale" not in text


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("{memory; spikelm T=4; peak MiB}", "has 2 rows 'spikelm T=4'"),
        ("{memory; bert & checkpointing=no; taste}", "or none of them a column 'taste'"),
        ("{other; bert; side}", "names no run other"),
        ("{memory; spikelm T=4 & checkpointing=no; side; .1f}", "is no number"),
    ],
)
def test_a_cell_of_a_template_that_is_not_there_is_named(cell, message, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=message):
        tables.with_tables(template(tmp_path, monkeypatch, cell))
