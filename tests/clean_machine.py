"""Runs Python code as on a machine that never heard of this project.

The subprocess uses the same interpreter and site-packages, but the project's own modules cannot be imported there, not
even where they are installed (editable or not) in the environment.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[1]

_PROLOGUE = """
import importlib, importlib.abc, os, runpy, sys

class _NotInstalled(importlib.abc.MetaPathFinder):
    names = frozenset({names!r})

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{fullname!r}} (clean machine)", name=fullname)

sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or ".") != {root!r}]
sys.meta_path.insert(0, _NotInstalled())
for _name in sorted(_NotInstalled.names):
    if _name in sys.modules:
        sys.exit(f"not a clean machine: {{_name}} was imported at start-up")
    try:
        importlib.import_module(_name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"not a clean machine: {{_name}} can be imported")
runpy.run_path({program!r}, run_name="__main__")
"""


def own_module_names() -> list[str]:
    """Names of the top-level modules and packages of this project."""
    names = {"configuration_spikelm", "modeling_spikelm", "spikelm"}
    names |= {path.stem for path in PROJECT_ROOT.glob("*.py")}
    names |= {path.parent.name for path in PROJECT_ROOT.glob("*/__init__.py")}
    return sorted(names)


def neutral_environment() -> dict[str, str]:
    """The environment without Python's, Hugging Face's and accelerate's own settings: caches, tokens, offline modes."""
    prefixes = ("PYTHON", "HF_", "HUGGING", "TRANSFORMERS_", "PYTORCH_TRANSFORMERS_", "ACCELERATE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    # Where DeepSpeed has to look for an accelerator and finds none, it says so on stdout, among what a test prints.
    return kept | {"DS_ACCELERATOR": "cpu"}


def run_on_clean_machine(
    code: str, env: Mapping[str, str] | None = None, cwd: str | os.PathLike | None = None
) -> subprocess.CompletedProcess:
    """Runs `code` in a fresh Python process that cannot import the project's modules; stdout and stderr are captured.

    The process is isolated (`python -I`: no PYTHONPATH, no user site, nothing from the working directory), has an empty
    HF_HOME of its own (so no cached remote code), and is offline. `env` is laid over that, for instance
    `HubServer.environment(...)`; `cwd` is by default an empty temporary folder. Both temporary folders are deleted
    afterwards. Processes that `code` starts itself are not protected.
    """
    with (
        tempfile.TemporaryDirectory() as home,
        tempfile.TemporaryDirectory() as empty,
        tempfile.TemporaryDirectory() as script,
    ):
        environment = neutral_environment() | {"HF_HOME": home, "HF_HUB_OFFLINE": "1"} | dict(env or {})
        program = Path(script, "program.py")
        program.write_text(code, encoding="utf-8")
        prologue = _PROLOGUE.format(names=own_module_names(), root=str(PROJECT_ROOT), program=str(program))
        return subprocess.run(
            [sys.executable, "-I", "-c", prologue], env=environment, cwd=cwd or empty, capture_output=True, text=True
        )
