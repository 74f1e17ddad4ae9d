"""The command for a lent GPU, on this CPU: without `datasets`, by the clock, and from one time step to four."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

import convert_packed
import pack_text
from modeling_spikelm import SpikeLMModel
from tests.forked_processes import launch_forked

ROOT = Path(__file__).resolve().parent.parent
# A machine that has no such package, as `import` and `find_spec` see it.
WITHOUT_DATASETS = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in ABSENT else find(name, *rest)
ABSENT = {"datasets", "evaluate", "tensorboard", "tensorboardX"}
sys.modules |= dict.fromkeys(ABSENT)
import convert_packed
convert_packed.main(sys.argv[1:])
"""

# The clock of the second process is half through when that of the first has begun.
CLOCK = """
import sys
from types import SimpleNamespace
from accelerate import PartialState
import convert_packed
rank = PartialState(cpu=True).process_index
clock = convert_packed.Clock(100)
clock.on_train_begin()
clock.began -= 50 * rank
training = SimpleNamespace(world_size=2)
for step in (0, 1):
    # Between two looks at the clock nobody is asked; here one alone would wait for the other.
    if step == 0 or rank == 0:
        clock.on_optimizer_step(training, SimpleNamespace(global_step=step), None)
open(f"{sys.argv[1]}/{rank}", "w").write(repr(clock.share_left))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    words = [chr(97 + number) for number in range(26)]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=31, **sizes)).save_pretrained(folder / "bert")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    (folder / "running.txt").write_text("\n".join(" ".join(words) for _ in range(40)))
    (folder / "sentences.txt").write_text("a b c\n\nd e f g\n")
    (folder / "pairs.txt").write_text("a b c\tb c d\n\ne f\te f g\n")
    files = ["--text_files", str(folder / "running.txt"), "--sentence_files", str(folder / "sentences.txt")]
    files += ["--pair_files", str(folder / "pairs.txt")]
    pack_text.main(["--tokenizer_name", str(folder / "bert"), *files, "--output", str(folder / "text.npz")])
    return folder


def command(inputs: Path, output: Path, *flags: str) -> list[str]:
    return [
        *("recipes/convert_packed.yaml", "--teacher_name_or_path", str(inputs / "bert")),
        *("--packed_text", str(inputs / "text.npz"), "--output_dir", str(output), "--tokens_per_batch", "256"),
        *("--bf16", "False", "--dataloader_num_workers", "0", *flags),
    ]


def test_one_step_is_converted_without_datasets_or_tensorboard_and_four_go_on_from_it(inputs, tmp_path):
    terms = ["--pair_share", "0.4", "--attention_weight", "1"]
    flags = command(inputs, tmp_path / "t1", "--minutes", "9", "--max_steps", "3", "--logging_steps", "1", *terms)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DATASETS, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps = json.loads((tmp_path / "t1/trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in steps if "loss" in entry]) == 3
    one = SpikeLMModel.from_pretrained(tmp_path / "t1")
    teacher = BertModel.from_pretrained(inputs / "bert")
    assert one.config.neuron == "thrifty" and one.config.num_time_steps == 1
    assert torch.equal(one.embeddings.word_embeddings.weight, teacher.embeddings.word_embeddings.weight)
    weight = "encoder.layer.0.output.dense.weight"
    assert not torch.equal(one.get_parameter(weight), teacher.get_parameter(weight))

    # From now on its teacher has learned a task, and all that has no spikes is what that teacher has.
    torch.manual_seed(1)
    fine_tuned = BertForSequenceClassification(teacher.config)
    fine_tuned.save_pretrained(tmp_path / "fine_tuned")
    more = ["--student", str(tmp_path / "t1"), "--config_overrides", "num_time_steps=4", "--max_steps", "1"]
    more += ["--teacher_name_or_path", str(tmp_path / "fine_tuned")]
    convert_packed.main(command(inputs, tmp_path / "t4", "--minutes", "9", "--learning_rate", "1e-9", *more))
    four = SpikeLMModel.from_pretrained(tmp_path / "t4")
    assert four.config.num_time_steps == 4
    for (name, values), own in zip(four.named_parameters(), one.parameters(), strict=True):
        expected = own.repeat(4) if name.endswith(".amplitude") else own
        if not name.startswith("encoder."):
            expected = fine_tuned.bert.get_parameter(name)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)


def test_it_ends_when_its_minutes_are_over_with_a_learning_rate_that_has_fallen(inputs, tmp_path, monkeypatch):
    # Each look at the clock is half a second later, whatever the machine has to do besides.
    looks = itertools.count()
    monkeypatch.setattr(convert_packed, "time", SimpleNamespace(monotonic=lambda: next(looks) / 2))
    convert_packed.main(command(inputs, tmp_path / "out", "--minutes", "0.05", "--logging_steps", "1"))
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert 1 < state["global_step"] < state["max_steps"]
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert rates[-1] < max(rates)
    assert (tmp_path / "out/model.safetensors").is_file()


def test_the_rate_rises_first_and_then_falls_to_nothing_by_the_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(convert_packed.time, "monotonic", lambda: now[0])
    clock = convert_packed.Clock(50)
    assert clock.share_left == 1
    clock.on_train_begin()
    shares = []
    for now[0] in (100.0, 125.0, 150.0, 175.0):
        clock.on_optimizer_step(SimpleNamespace(world_size=1), SimpleNamespace(global_step=len(shares)), None)
        shares.append(clock.share_left)
    assert shares == [1.0, 0.5, 0.0, 0.0]


def test_all_processes_go_by_the_clock_of_the_first(tmp_path):
    (tmp_path / "clock.py").write_text(CLOCK)
    done = launch_forked("two_cpu_processes", [str(tmp_path / "clock.py"), str(tmp_path)], "--num_processes", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (float((tmp_path / rank).read_text()) for rank in "01")
    assert one == other > 0.9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--minutes", "0"], "--minutes 0.0 is not possible"),
        (["--minutes", "1", "--per_device_train_batch_size", "4"], "a step takes --tokens_per_batch tokens"),
        (["--minutes", "1", "--warmup_steps", "9"], "--warmup_steps: the rate follows a clock"),
        (["--minutes", "1", "--eval_strategy", "steps", "--eval_steps", "5"], "--eval_strategy: there is no data"),
        (["--minutes", "1", "--packed_text", "nowhere.npz"], "nowhere.npz is not a file of packed text"),
        (["--minutes", "1", "--teacher_name_or_path", "nowhere"], "nowhere"),
        (["--minutes", "1", "--do_eval"], "--do_eval does nothing in this script, which has --do_train"),
        (["--minutes", "1", "--student", "EMPTY"], "EMPTY holds no model: there is no config.json in it"),
        (["--minutes", "1", "--output_dir", "FULL"], "--output_dir FULL holds a model, which would be overwritten"),
        (["--minutes", "1", "--teacher_name_or_path", "SHORT"], "has rows of 200 tokens, and SHORT takes 64"),
    ],
)
def test_a_wrong_command_is_one_line(inputs, tmp_path, flags, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("EMPTY", "FULL"):
        Path(name).mkdir()
    Path("FULL/config.json").touch()
    short = BertConfig.from_pretrained(inputs / "bert", max_position_embeddings=64)
    BertModel(short).save_pretrained("SHORT")
    BertTokenizer(str(inputs / "vocab.txt")).save_pretrained("SHORT")
    monkeypatch.setattr(convert_packed, "TimedTrainer", None)
    with pytest.raises(SystemExit, match=message):
        convert_packed.main([str(ROOT / "recipes/convert_packed.yaml"), *command(inputs, tmp_path / "out", *flags)[1:]])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim", "adamw_8bit"], "The first step was tried on a few rows and fails"),
        (["--learning_rate", "1e30"], "The loss up to step . is nan, and no model was saved"),
        (["--output_dir", "FILE"], "--output_dir FILE is a file"),
        (["--eval_on_start", "True"], "--eval_on_start: there is no data"),
    ],
)
def test_what_only_a_step_shows_is_one_line_too_and_no_model_is_saved(inputs, tmp_path, flags, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    argv = command(inputs, tmp_path / "out", "--minutes", "1", "--max_steps", "9", *flags)
    with pytest.raises(SystemExit, match=message):
        convert_packed.main([str(ROOT / "recipes/convert_packed.yaml"), *argv[1:]])
    assert not list(tmp_path.rglob("out/model.safetensors"))


def test_a_file_of_packed_text_is_there_as_a_whole_or_not_at_all(inputs, tmp_path):
    start = ["--tokenizer_name", str(inputs / "bert"), "--text_files", str(inputs / "running.txt")]
    code = f"""
import resource, pack_text
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
pack_text.main({[*start, "--output", str(tmp_path / "text.npz")]!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "error: the disk is full" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_packing_refuses_what_is_no_text_and_replaces_nothing(inputs, tmp_path):
    (tmp_path / "there.npz").write_text("mine")
    start = ["--tokenizer_name", str(inputs / "bert"), "--text_files"]
    (tmp_path / "one.txt").write_text("a sentence alone\n")
    with pytest.raises(SystemExit, match="a line has two sentences with one tab between them, not 'a sentence alone'"):
        pack_text.main([*start[:2], "--pair_files", str(tmp_path / "one.txt"), "--output", str(tmp_path / "new.npz")])
    for files, output, message in (
        (str(inputs / "running.txt"), "there.npz", "does not exist yet"),
        (str(inputs / "running.txt"), "text.bin", "ends in .npz"),
        (str(inputs / "running.txt"), "nowhere/text.npz", "The folder of --output .*nowhere/text.npz does not exist"),
        ("nowhere.txt", "new.npz", "nowhere.txt cannot be read as text"),
    ):
        with pytest.raises(SystemExit, match=message):
            pack_text.main([*start, files, "--output", str(tmp_path / output)])
    assert (tmp_path / "there.npz").read_text() == "mine" and not (tmp_path / "new.npz").exists()
