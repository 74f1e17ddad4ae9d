"""The floors of modeling_spikelm/: every file builds on those below it alone, and says so in its head."""

import ast
import re
from graphlib import TopologicalSorter

import pytest

from tests.carried_code import ROOT

FILES = sorted((ROOT / "modeling_spikelm").glob("*.py"))
# Which fields there are is below all floors.
CONFIGURATION = re.compile(r"configuration_\w+")


def own_imports(path) -> set[str]:
    """The files of the folder that a file imports, wherever in it the import stands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}


def test_no_file_imports_one_that_imports_it():
    graph = {path.stem: own_imports(path) for path in FILES if path.stem != "__init__"}
    assert {name for names in graph.values() for name in names} <= graph.keys()
    TopologicalSorter(graph).prepare()  # a CycleError names the circle


def floors() -> dict[str, int]:
    """The floor of every file by the table of CONTRIBUTING.md, the highest first there."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("| floor | files |")[2].partition("\n\n")[0].splitlines()[2:]
    return {name: -row for row, line in enumerate(table) for name in re.findall(r"`(\w+)\.py`", line)}


def test_every_file_builds_on_its_floor_or_on_those_below():
    floor = floors()
    graph = {path.stem: own_imports(path) for path in FILES if path.stem != "__init__"}
    graph = {name: used for name, used in graph.items() if not CONFIGURATION.fullmatch(name)}
    assert floor.keys() == graph.keys()
    upward = {(name, each) for name, used in graph.items() for each in used & floor.keys() if floor[each] > floor[name]}
    assert not upward


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_stand_at_the_head_of_a_file(path):
    """That of a library which may be missing in a `try`, where transformers does not take it for a requirement."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    head = [part for node in tree.body for part in (node.body if isinstance(node, ast.Try) else [node])]
    everywhere = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)}
    assert everywhere == {node.lineno for node in head if isinstance(node, ast.Import | ast.ImportFrom)}
