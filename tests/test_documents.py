"""README and the pages of docs/: nothing that they name is missing, and they stay short enough to be read."""

import argparse
import ast
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
# A table and what it was made by.
_TABLE = re.compile(r"<!-- table: .*?<!-- end of table -->", re.DOTALL)
# A path of this project in running text: it has a folder or an ending that only our files have.
_FILE = re.compile(r"(?:[\w.-]+/)*[\w-]+\.(?:py|md|yaml|toml|txt|cff)|(?:[\w-]+/)+[\w*-]*")
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
# What commands of the documents write or are given: files of the user, not of the project.
USERS = {"zero_to_fp32.py", "results.md"}


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in _FENCE.findall(page.read_text()) if language in languages]


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def paragraphs(page: Path) -> Iterator[list[str]]:
    """Runs of lines of text; a list's entries are paragraphs of their own, tables, headings and code are none."""
    current: list[str] = []
    for line in [*prose(page).splitlines(), ""]:
        is_entry = re.match(r"\s*([*-]|\d+\.) ", line)
        is_text = line.strip() and not line.startswith(("|", "#", "!", "    "))
        if current and (is_entry or not is_text):
            yield current
            current = []
        if is_text:
            current.append(line)


def commands(page: Path, with_tables: bool = True) -> list[list[str]]:
    """Words of every command of ours: the script, then what it is given; launchers and variables are left out.

    Args:
        with_tables: those that tables name as their origin as well, with names in place of paths.
    """
    text = prose(page) if with_tables else _TABLE.sub("", prose(page))
    code = "\n".join([*blocks(page, "bash"), *(text for text in _CODE.findall(text) if " --" in text)])
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("'", " "), comments=True) if line.count('"') % 2 == 0 else []
        places = [place for place, word in enumerate(words) if re.fullmatch(r"[\w/]+\.py", word)]
        if places and (ROOT / words[places[0]]).is_file():
            found.append(words[places[0] :])
    return found


class _Parser(BaseException):
    """Raised where a script would parse its arguments, in place of all else that it does; scripts catch SystemExit."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.flags = set(parser._option_string_actions)


@cache
def flags_of(script: str) -> set[str]:
    """The flags that a script's own parser takes."""

    def stop(parser: argparse.ArgumentParser, *_args: object, **_kwargs: object) -> None:
        raise _Parser(parser)

    path = ROOT / script
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        patch.setattr(sys, "argv", [script])
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(_Parser) as found:
            importlib.import_module(path.stem).main()
    return found.value.flags


@every_page
def test_every_link_leads_somewhere(page):
    for target in _LINK.findall(prose(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@every_page
def test_every_file_of_the_project_that_is_named_exists(page):
    named = {found for text in _CODE.findall(prose(page)) for found in _FILE.findall(text)}
    named |= {
        word for words in commands(page) for word in words if word.startswith(("recipes/", "accelerate_configs/"))
    }
    missing = {
        name
        for name in named - USERS
        if not name.startswith("runs/")
        and (name.partition("/")[0] in FOLDERS or name.endswith((".py", ".md")))
        and not any(any(folder.glob(name)) for folder in (ROOT, page.parent, *map(ROOT.joinpath, FOLDERS)))
    }
    assert not missing


def test_the_readme_is_a_page_or_two():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@every_page
def test_no_paragraph_is_longer_than_five_lines(page):
    assert not [lines for lines in paragraphs(page) if len(lines) > 5]


@every_page
def test_every_flag_of_a_command_exists(page):
    for script, *words in commands(page):
        for word in words:
            flag = word.partition("=")[0].rstrip(",.;:)")
            assert not flag.startswith("--") or flag in flags_of(script), f"{script} has no {flag}"


@every_page
def test_every_python_block_can_be_read(page):
    for code in blocks(page, "python"):
        ast.parse(code)


def test_every_page_of_docs_is_named_in_the_readme():
    linked = {target.partition("#")[0] for target in _LINK.findall((ROOT / "README.md").read_text())}
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """On the checkpoint that is here, and on tiny models in place of those on the Hub."""
    words = "a man plays the guitar . someone is playing an instrument it rains in rome capital of france".split()
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    torch.manual_seed(0)
    on_the_hub = {
        "sentence-transformers/all-MiniLM-L6-v2": BertModel(BertConfig(**sizes, num_attention_heads=2)),
        "HuggingFaceTB/SmolLM2-135M": LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=None)),
    }
    code = "\n".join(blocks(ROOT / "README.md", "python"))
    for name, model in on_the_hub.items():
        assert f'"{name}"' in code
        model.save_pretrained(tmp_path / name)
        BertTokenizer(vocab=vocabulary, model_input_names=["input_ids", "attention_mask"]).save_pretrained(
            tmp_path / name
        )
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs/spiking-minilm/config.json").is_file()
    assert len(capsys.readouterr().out.split()) > 20
