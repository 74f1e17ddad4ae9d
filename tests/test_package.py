"""The installed project: commands outside of a checkout, types for whoever builds on it, one version."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from tests.clean_machine import PROJECT_ROOT, neutral_environment
from tests.corpus import TINY, write_corpus

PROJECT = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())
COMMANDS = PROJECT["project"]["scripts"]
NOT_INSTALLED = {"benchmarks", "demo", "space", "tests"}
# Every command says what it takes; then one trains with a recipe of the project, and others read what it leaves.
SMOKE = """
import json, sys
from importlib.metadata import distribution
installed, corpus, sizes = sys.argv[1:]
sys.path.insert(0, installed)
entries = {entry.name: entry for entry in distribution("spikelm").entry_points}

def call(name, *words):
    sys.argv = [name, *words]
    entries[name].load()()

for name in entries:
    try:
        call(name, "--help")
    except SystemExit as ended:
        assert not ended.code, (name, ended.code)
small = "--max_steps 1 --vocab_size 600 --per_device_train_batch_size 4 --max_eval_samples 8 --use_cpu".split()
small += ["--report_to", "none", "--disable_tqdm", "True", "--train_file", corpus, "--config_overrides", sizes]
call("spikelm-mlm", "recipes/demo_pretrain.yaml", *small, "--output_dir", "run")
for name in ("train", "dev"):
    rows = [f"this is {name} row {number},{number % 2}" for number in range(8)]
    open(f"{name}.csv", "w").write("\\n".join(["text,label", *rows]))
few = ["--max_steps", "1", "--use_cpu", "--report_to", "none", "--disable_tqdm", "True", "--report_epoch", "last"]
few += ["--train_file", "train.csv", "--validation_file", "dev.csv", "--model_name_or_path", "run"]
call("spikelm-glue", *few, "--output_dir", "mine")
call("spikelm-measure", "--model_name_or_path", "run", "--text", "This is a sentence.")
names = ("experiment", "modeling_spikelm", "glue_tasks", "spike_metrics")
print(json.dumps({name: sys.modules[name].__file__ for name in names}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with nothing but the project, as pip puts it there."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "installed"))
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", ":!checkpoints", ":!tests"]
    files = subprocess.run(listed, cwd=PROJECT_ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        if (PROJECT_ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PROJECT_ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", target, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def test_the_commands_of_a_wheel_work_in_an_empty_folder(installed, tmp_path):
    corpus = write_corpus(tmp_path / "topics.txt")
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", SMOKE, installed, corpus, TINY],
        cwd=empty,
        env=neutral_environment() | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for path in json.loads(done.stdout.splitlines()[-1]).values():
        assert Path(path).is_relative_to(installed)
    # The card's template and the metrics are found, too.
    assert "## How to load it" in (empty / "run/README.md").read_text()
    assert "eval_accuracy" in json.loads((empty / "mine/own_data/all_results.json").read_text())
    assert "firing rate" in done.stdout


def test_a_command_without_its_packages_says_what_to_install(installed, tmp_path):
    code = f"import sys; sys.modules['datasets'] = None; sys.path.insert(0, {str(installed)!r})"
    code += "; from spikelm.commands import run_glue; run_glue()"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ") and "pip install '.[scripts]'" in done.stderr


def test_every_script_is_a_command_and_every_room_is_installed():
    scripts = {path.stem for path in PROJECT_ROOT.glob("*.py") if "\ndef main(" in path.read_text()}
    assert {entry.partition(":")[2] for entry in COMMANDS.values()} == scripts
    rooms = {path.parent.name for path in PROJECT_ROOT.glob("*/__init__.py")} - NOT_INSTALLED
    packages = {name.removeprefix("spikelm.") for name in PROJECT["tool"]["setuptools"]["packages"]}
    assert packages - {"spikelm"} == rooms


USER = """
from typing import assert_type

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import SpikeLMForMaskedLM, SpikeLMModel
from spike_metrics import SpikeCount, count

config = SpikeLMConfig(num_time_steps=4)
assert_type(config.num_time_steps, int)
model = SpikeLMForMaskedLM.from_pretrained("somewhere")
assert_type(model, SpikeLMForMaskedLM)
assert_type(model.quantize_weights().dequantize_weights(), SpikeLMForMaskedLM)
loaded, info = SpikeLMModel.from_pretrained("somewhere", output_loading_info=True)
assert_type(loaded, SpikeLMModel)
assert_type(count(model, []), SpikeCount)
steps: str = config.num_time_steps  # wrong
model.quantize_weights(embedding=True)  # wrong
count(model, [], padding=True)  # wrong
"""


def test_a_users_checker_knows_our_classes_and_finds_mistakes(installed, tmp_path):
    """Without torch and transformers, which have types of their own and take mypy more than a minute."""
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(
        textwrap.dedent(f"""
            [mypy]
            mypy_path = {installed}
            cache_dir = {tmp_path / "cache"}
            ignore_missing_imports = True
            [mypy-torch.*,transformers.*,huggingface_hub.*,triton.*,numpy.*]
            follow_imports = skip
        """)
    )
    checked = subprocess.run([sys.executable, "-m", "mypy", "user.py"], cwd=tmp_path, capture_output=True, text=True)
    found = {int(line.split(":")[1]) for line in re.findall(r"^user\.py:\d+: error", checked.stdout, re.MULTILINE)}
    wrong = {number for number, line in enumerate(USER.splitlines(), 1) if line.endswith("# wrong")}
    assert found == wrong, checked.stdout


def test_the_version_stands_in_one_place_and_the_change_log_is_of_it():
    version = PROJECT["project"]["version"]
    headings = re.findall(r"^## (\S+)", (PROJECT_ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == version
    places = {
        path.name
        for pattern in ("*.py", "*.toml", "*.cff", "*.md", "*/*.py")
        for path in PROJECT_ROOT.glob(pattern)
        if re.search(rf"version\W+{re.escape(version)}", path.read_text())
    }
    assert places == {"pyproject.toml"}
