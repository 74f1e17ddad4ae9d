"""Which setting is kept, which run becomes the teacher, and what the table makes of it; and one real small run."""

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import BertConfig, BertModel

from pretraining_data.tokenizers import train_wordpiece
from tests.corpus import write_corpus
from tests.glue_tasks.conftest import write_tasks

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import conversion
from conversion import Arguments, Setting, best_column, best_setting, build_table, choose_teachers
from trainings import FINISHED, Job


def finished(folder: Path, scores: dict[str, list[float]], energy_ratio: float = 5.0) -> Job:
    """A job whose folder holds these scores of every task, by seed."""
    columns = {}
    for task, values in scores.items():
        spread = {"median": sorted(values)[len(values) // 2], "lowest": min(values), "highest": max(values)}
        columns[task.upper()] = {
            "task": task,
            "metric": "accuracy",
            "score": spread["median"],
            "seeds": list(range(len(values))),
            "metrics": {"accuracy": spread | {"values": values}},
            "spikes": {"firing_rate": {"median": 0.4}, "encoder_energy_ratio": {"median": energy_ratio}},
        }
    (folder / "glue").mkdir(parents=True)
    (folder / "glue/glue_results.json").write_text(json.dumps({"columns": columns}))
    job = Job("a job", folder, (("a", "command"),))
    (folder / FINISHED).write_text(job.identity)
    return job


@pytest.fixture
def teachers(tmp_path) -> dict[Setting, Job]:
    """Two settings, each better at one task; of the first RTE has the middle seed last."""
    return {
        Setting(1e-4, 3): finished(tmp_path / "one", {"rte": [60.0, 80.0, 70.0], "cola": [1.0, 2.0, 3.0]}),
        Setting(5e-5, 8): finished(tmp_path / "other", {"rte": [90.0, 10.0, 65.0], "cola": [30.0, 20.0, 40.0]}),
    }


def test_of_every_task_the_setting_with_the_best_median_is_kept(teachers):
    assert best_setting(teachers, "rte") == Setting(1e-4, 3)
    assert best_setting(teachers, "cola") == Setting(5e-5, 8)
    assert best_setting({}, "rte") is None
    # A job that was cut off has no say.
    (teachers[Setting(5e-5, 8)].folder / FINISHED).unlink()
    assert best_setting(teachers, "cola") == Setting(1e-4, 3)


def test_the_run_with_the_median_score_becomes_the_teacher_and_stays_it(teachers, tmp_path):
    chosen = tmp_path / "chosen"
    choose_teachers({"rte": Setting(1e-4, 3), "cola": Setting(5e-5, 8)}, teachers, chosen)
    assert (chosen / "rte").resolve() == (tmp_path / "one/glue/rte/seed_2").resolve()
    assert (chosen / "cola").resolve() == (tmp_path / "other/glue/cola/seed_0").resolve()
    choose_teachers({"rte": Setting(5e-5, 8)}, teachers, chosen)
    assert (chosen / "rte").resolve() == (tmp_path / "one/glue/rte/seed_2").resolve()


def arguments(tmp_path, **more) -> Arguments:
    (tmp_path / "text.txt").write_text("text")
    paths = {name: str(tmp_path / "text.txt") for name in ("train_file", "data_dir", "distill_recipe")}
    return Arguments("bert", output_dir=str(tmp_path / "out"), task_name=["rte", "cola"], **(paths | more))


def test_the_gap_is_the_mean_over_tasks_of_teacher_less_student(teachers, tmp_path):
    students = {"num_time_steps=1": {Setting(3e-4, 3): finished(tmp_path / "student", {"rte": [66.0], "cola": [21.0]})}}
    dense, student = build_table(arguments(tmp_path), teachers, students)
    assert (dense["rte"], dense["cola"], dense["gap"]) == ("70.0 (60.0 .. 80.0)", "30.0 (20.0 .. 40.0)", "0.0")
    assert (student["rte"], student["mean"], student["gap"]) == ("66.0", "43.5", "6.5")
    assert (student["firing rate"], student["dense / this, energy"]) == ("40.0%", "5.00")
    assert student["settings"] == "lr=0.0003,epochs=3"
    assert best_column(students["num_time_steps=1"], "rte")["setting"] == "lr=0.0003,epochs=3"


def test_a_larger_grid_for_one_side_is_refused(tmp_path):
    with pytest.raises(ValueError, match="equally many"):
        arguments(tmp_path, student_learning_rates=[1e-4, 2e-4, 3e-4])
    with pytest.raises(ValueError, match="--train_file nowhere does not exist"):
        arguments(tmp_path, train_file="nowhere")


@pytest.mark.long
def test_a_bert_is_converted_and_measured_and_the_command_goes_on(tmp_path, capsys):
    text = write_corpus(tmp_path / "text.txt", 6)
    texts = load_dataset("text", data_files=str(text), split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer = train_wordpiece(texts, 300, True, model_max_length=64)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    (tmp_path / "distill.yaml").write_text("max_steps: 4\nmax_seq_length: 32\nmax_eval_samples: 8\n")
    given = Arguments(
        str(tmp_path / "bert"),
        str(text),
        str(write_tasks(tmp_path / "glue", "RTE", "CoLA")),
        str(tmp_path / "out"),
        task_name=["rte", "cola"],
        variants=["neuron=thrifty,num_time_steps=1"],
        teacher_learning_rates=[1e-3],
        student_learning_rates=[1e-3],
        num_train_epochs=[1],
        num_seeds=2,
        distill_recipe=str(tmp_path / "distill.yaml"),
        output=str(tmp_path / "results"),
    )
    conversion.measure(given)
    dense, student = json.loads((tmp_path / "results/conversion.json").read_text())[0]["rows"]
    assert dense["gap"] == "0.0" and student["model"] == "neuron=thrifty,num_time_steps=1"
    assert student["gap"] is not None and student["firing rate"].endswith("%")
    weights = next((tmp_path / "out").rglob("text/student/model.safetensors"))
    before = weights.stat().st_mtime_ns
    conversion.measure(given)
    assert weights.stat().st_mtime_ns == before
