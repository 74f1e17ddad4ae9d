"""transformers' own tests of a model, on every class of ours: `python -m pytest -m transformers -s`, some minutes.

They belong to transformers and are not copied here: its source distribution has them, which takes a package index. The
tests of `generate()` are in a part that it leaves out.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parents[2]
TESTERS = Path(__file__).with_name("transformers_testers.py")
# What the fetched modules import, and the distribution leaves out.
MISSING = {
    "generation/test_utils.py": "class GenerationTesterMixin: ...",
    "exporters/test_export.py": "class ExportTesterMixin: ...",
    "utils/test_configuration_utils.py": "config_common_kwargs = {'output_attentions': True}",
}


@pytest.fixture(scope="module")
def own_tests(tmp_path_factory):
    """A folder to import `transformers_tests` from, with what they need."""
    folder = tmp_path_factory.mktemp("own")
    pip, release = [sys.executable, "-m", "pip", "--quiet"], f"transformers=={transformers.__version__}"
    source = ["--no-deps", "--no-binary", "transformers", release, "--dest", folder]
    subprocess.run([*pip, "download", *source], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", folder, "parameterized==0.9.0"], check=True)
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as opened:
        tests = [member for member in opened.getmembers() if member.name.split("/")[1:2] == ["tests"]]
        opened.extractall(folder, tests, filter="data")
    package = folder / "transformers_tests"
    (folder / archive.name.removesuffix(".tar.gz") / "tests").rename(package)
    for name, text in MISSING.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(text, encoding="utf-8")
    # It looks for a clone around itself.
    common = package / "test_configuration_common.py"
    text = common.read_text(encoding="utf-8")
    text = text.replace("direct_transformers_import(Path(__file__).parent)", "__import__('transformers')")
    common.write_text(text, encoding="utf-8")
    return folder


@pytest.mark.transformers
@pytest.mark.parametrize("num_time_steps", [1, 4], ids="T{}".format)
def test_every_class_passes_the_tests_of_a_model(own_tests, num_time_steps):
    environment = {**os.environ, "PYTHONPATH": f"{own_tests}{os.pathsep}{ROOT}", "NUM_TIME_STEPS": str(num_time_steps)}
    alone = ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", own_tests, "-q"]
    # One of them is whether those of generate(), which are not there, are among the tests.
    there = ["-k", "not test_generation_tester_mixin_inheritance"]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *alone, *there, TESTERS], env=environment, capture_output=True, text=True
    )
    print(finished.stdout.splitlines()[-1])
    assert finished.returncode == 0, finished.stdout[-10_000:]
