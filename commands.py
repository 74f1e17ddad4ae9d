"""The console commands of an installed project, `spikelm-mlm` and the others in pyproject.toml.

An installed project has this folder's scripts, rooms and recipes together in one package, `spikelm`, so that names as
plain as `experiment` are nobody else's concern. A command is its script, run as `python run_mlm.py` runs it in a
checkout. A new command is a line in pyproject.toml alone: `spikelm-NAME = "spikelm.commands:SCRIPT"`.
"""

import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def __getattr__(script: str) -> Callable[[], None]:
    if not (FOLDER / f"{script}.py").is_file():
        raise AttributeError(f"There is no script {script}.py.")
    return partial(_run, script)


def _run(script: str) -> None:
    sys.path.insert(0, str(FOLDER))
    try:
        runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: {error}. The commands need more than the model does: pip install '.[scripts]' in a copy of the "
            "project, or '.[scripts,onnx]' for spikelm-export-onnx."
        )
