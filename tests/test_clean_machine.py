from pathlib import Path

import pytest

from tests.clean_machine import own_module_names, run_on_clean_machine


def test_own_modules_cannot_be_imported_even_from_the_path_but_others_can(tmp_path):
    (tmp_path / "someone_else.py").write_text("answer = 42\n")
    for name in own_module_names():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    result = run_on_clean_machine(
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport someone_else\nprint(someone_else.answer)\n"
        "import modeling_spikelm"
    )
    assert result.stdout == "42\n"
    assert result.returncode == 1
    assert "ModuleNotFoundError: No module named 'modeling_spikelm'" in result.stderr


@pytest.mark.parametrize("name", ["configuration_spikelm", "modeling_spikelm", "spikelm"])
def test_the_required_names_are_blocked(name):
    assert name in own_module_names()


def test_process_is_offline_with_an_empty_home_of_its_own_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = run_on_clean_machine(
        "import os, sys, huggingface_hub.constants as c\n"
        "print(c.HF_HUB_OFFLINE, os.listdir(os.environ['HF_HOME']), os.listdir(), 'HF_MODULES_CACHE' in os.environ)\n"
        f"print({str(tmp_path)!r} in sys.path)\nprint(os.environ['HF_HOME'])\n"
        "open('left', 'w').close()",
        cwd=tmp_path,
    )
    state, on_path, home = result.stdout.splitlines()
    assert (state, on_path) == ("True [] [] False", "False")
    assert [path.name for path in tmp_path.iterdir()] == ["left"]
    assert not Path(home).exists()


def test_failure_of_the_code_is_the_failure_of_the_process():
    result = run_on_clean_machine("raise SystemExit('no')")
    assert (result.returncode, result.stderr) == (1, "no\n")
