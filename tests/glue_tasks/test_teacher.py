"""Fine-tuning with a teacher: one for every task, and a table that shows what is lost."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from run_glue import main
from tests.glue_tasks.conftest import write_tasks
from tests.glue_tasks.test_run_glue import command, log_history, results, snapshot
from tests.other_vocabulary import with_other_vocabulary


@pytest.fixture(scope="module")
def taught_run(tiny_bert, tiny_spikelm, tmp_path_factory):
    """Teachers of two tasks, and what their student, trained for an epoch, has left behind."""
    folder = tmp_path_factory.mktemp("taught")
    data = write_tasks(folder / "glue", "CoLA", "STS-B")
    tasks = ("--task_name", "cola", "stsb", "--num_train_epochs", "1", "--report_epoch", "last")
    main(command(tiny_bert, data, folder / "teachers", *tasks))
    student = (*tasks, "--teacher_name_or_path", str(folder / "teachers"), "--logging_steps", "1", "--loss_diagnostics")
    main(command(tiny_spikelm, data, folder / "students", *student))
    return folder


def test_the_table_shows_teacher_student_and_gap(taught_run):
    teachers, students = results(taught_run / "teachers"), results(taught_run / "students")
    for column in ("CoLA", "STS-B"):
        shown = students["columns"][column]
        assert shown["teacher"]["median"] == pytest.approx(teachers["columns"][column]["score"])
        assert shown["gap"] == pytest.approx(shown["teacher"]["median"] - shown["score"])
    gaps = [students["columns"][column]["gap"] for column in ("CoLA", "STS-B")]
    assert students["average"]["gap"] == pytest.approx(sum(gaps) / 2)
    header, _, first = (taught_run / "students" / "glue_results.md").read_text().splitlines()[:3]
    assert "| score | teacher | gap |" in header
    assert f"| {students['columns']['CoLA']['gap']:.1f} |" in first
    assert "gap" not in (taught_run / "teachers" / "glue_results.md").read_text().lower()


def test_classes_are_learned_from_logits_and_scores_by_their_square(taught_run):
    for task in ("cola", "stsb"):
        first = log_history(taught_run / "students" / task)[0]
        assert {"hidden_loss", "logits_loss", "label_loss", "hidden_gradient", "hidden_logits_cosine"} <= first.keys()


def test_the_student_begins_with_the_teachers_real_valued_parts(taught_run, write_glue, tiny_spikelm, tmp_path):
    still = ("--learning_rate", "1e-30", "--num_train_epochs", "1", "--report_epoch", "last")
    teacher = taught_run / "teachers" / "cola"
    more = ("--task_name", "cola", "--teacher_name_or_path", str(teacher), *still)
    main(command(tiny_spikelm, write_glue("CoLA"), tmp_path / "out", *more))
    student, wished = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out" / "cola", teacher))
    taken = [name for name in wished if ".encoder." not in name]
    assert {"classifier.weight", "bert.pooler.dense.bias", "bert.embeddings.LayerNorm.weight"} < set(taken)
    for name in taken:
        torch.testing.assert_close(student[name], wished[name])
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "cola").config.model_type == "spikelm"


@pytest.mark.parametrize("has_classifier", [True, False])
def test_a_student_that_trains_its_embeddings_keeps_them_and_its_classifier(
    taught_run, write_glue, tmp_path, has_classifier
):
    teacher, student = taught_run / "teachers" / "cola", tmp_path / "student"
    shutil.copytree(taught_run / "students" / "cola", student, ignore=shutil.ignore_patterns("run.json"))
    own = {name: value + 0.25 for name, value in load_file(student / "model.safetensors").items()}
    own = {name: value for name, value in own.items() if has_classifier or not name.startswith("classifier.")}
    save_file(own, student / "model.safetensors", {"format": "pt"})
    more = ("--task_name", "cola", "--teacher_name_or_path", str(teacher), "--train_embeddings")
    still = ("--learning_rate", "1e-30", "--num_train_epochs", "1", "--report_epoch", "last")
    main(command(student, write_glue("CoLA"), tmp_path / "out", *more, *still))
    found, teachers = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out" / "cola", teacher))
    embeddings = "bert.embeddings.word_embeddings.weight"
    torch.testing.assert_close(found[embeddings], own[embeddings])
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        torch.testing.assert_close(found[name], own[name] if has_classifier else teachers[name])


def test_a_student_of_a_task_can_begin_with_a_fit(taught_run, write_glue, tiny_spikelm, tmp_path):
    still = ("--learning_rate", "1e-30", "--num_train_epochs", "1", "--report_epoch", "last", "--fit_tokens", "150")
    teacher = taught_run / "teachers" / "cola"
    more = ("--task_name", "cola", "--teacher_name_or_path", str(teacher), *still)
    main(command(tiny_spikelm, write_glue("CoLA"), tmp_path / "out", *more))
    student, wished, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out" / "cola", teacher, Path(tiny_spikelm))
    )
    weight = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.allclose(student[weight], before[weight])
    norm = "bert.encoder.layer.0.output.LayerNorm.weight"
    torch.testing.assert_close(student[norm], wished[norm])


def test_every_task_goes_on_from_its_own_model_of_a_folder(taught_run, tmp_path):
    trained, data = taught_run / "students", taught_run / "glue"
    again = command(trained, data, tmp_path / "again", "--task_name", "cola", "stsb", "--do_eval")
    main(again)
    # A teacher to compare with changes nothing in a student that is only evaluated.
    teacher = ("--teacher_name_or_path", str(taught_run / "teachers"))
    main([*again, *teacher, "--output_dir", str(tmp_path / "compared")])
    for task in ("cola", "stsb"):
        losses = [
            json.loads((folder / task / "all_results.json").read_text())["eval_loss"]
            for folder in (trained, tmp_path / "again", tmp_path / "compared")
        ]
        assert losses[1:] == pytest.approx([losses[0]] * 2)
    assert results(tmp_path / "compared")["columns"]["CoLA"]["gap"] is not None
    # One more epoch, by a command that trains them both, and is known again.
    more = command(trained, data, tmp_path / "more", "--task_name", "cola", "stsb", "--report_epoch", "last")
    main(more)
    first = snapshot(tmp_path / "more")
    main(more)
    assert snapshot(tmp_path / "more") == first
    # A model that changes is another start for its task.
    records = [json.loads((tmp_path / "more" / task / "run.json").read_text()) for task in ("cola", "stsb")]
    assert len({record["arguments"]["checkpoint_digest"] for record in records} - {None}) == 2
    with pytest.raises(
        SystemExit, match="students has no checkpoint for rte, only for cola, stsb; leave that task out"
    ):
        main([*again[:-4], "--task_name", "rte", "--output_dir", str(tmp_path / "rte")])


@pytest.mark.parametrize(
    "more, message",
    [
        (("--task_name", "rte"), "teachers has no checkpoint for rte, only for cola, stsb; leave"),
        (("--task_name", "cola", "--temperature", "0"), "--temperature is 0.0; it has to be"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_and_nothing_is_written(
    taught_run,
    write_glue,
    tiny_spikelm,
    tmp_path,
    more,
    message,
):
    before = snapshot(tmp_path)
    teacher = ("--teacher_name_or_path", str(taught_run / "teachers"))
    with pytest.raises(SystemExit, match=message):
        main(command(tiny_spikelm, write_glue(), tmp_path / "out", *teacher, *more))
    assert {name for name in snapshot(tmp_path) if name.startswith("out")} == {n for n in before if n.startswith("out")}


def test_the_teacher_of_a_task_is_refused_with_another_vocabulary(taught_run, write_glue, tiny_spikelm, tmp_path):
    for task in ("cola", "stsb"):
        shutil.copytree(taught_run / "teachers" / task, tmp_path / "teachers" / task)
    shutil.rmtree(tmp_path / "teachers" / "stsb")
    with_other_vocabulary(taught_run / "teachers" / "stsb", tmp_path / "teachers" / "stsb")
    teachers = ("--task_name", "cola", "stsb", "--teacher_name_or_path", str(tmp_path / "teachers"))
    with pytest.raises(SystemExit, match="teachers/stsb has a tokenizer of another vocabulary"):
        main(command(tiny_spikelm, write_glue("CoLA", "STS-B"), tmp_path / "out", *teachers))
    assert not (tmp_path / "out").exists()


def test_of_teachers_with_several_seeds_one_has_to_be_named(taught_run, write_glue, tiny_spikelm, tmp_path):
    for seed in ("seed_0", "seed_1"):
        shutil.copytree(taught_run / "teachers" / "cola", tmp_path / "teachers" / "cola" / seed)
    flags = command(tiny_spikelm, write_glue("CoLA"), tmp_path / "out", "--task_name", "cola", "--teacher_name_or_path")
    with pytest.raises(SystemExit, match="for each of its seeds, seed_0, seed_1; name one, such as .*/cola/seed_0, in"):
        main([*flags, str(tmp_path / "teachers")])
    main([*flags, str(tmp_path / "teachers" / "cola" / "seed_1"), "--max_steps", "1", "--report_epoch", "last"])
    assert "gap" in results(tmp_path / "out")["columns"]["CoLA"]


def test_flags_about_a_teacher_are_refused_without_one(write_glue, tiny_spikelm, tmp_path):
    with pytest.raises(SystemExit, match="--hidden_weight is about learning from a teacher"):
        main(command(tiny_spikelm, write_glue("CoLA"), tmp_path / "out", "--task_name", "cola", "--hidden_weight", "2"))


def test_a_teacher_that_was_trained_on_makes_another_run(taught_run, tiny_bert, tiny_spikelm, tmp_path):
    data, teacher, output = write_tasks(tmp_path / "glue", "CoLA"), tmp_path / "teacher", tmp_path / "out"
    shutil.copytree(taught_run / "teachers" / "cola", teacher)
    more = ("--task_name", "cola", "--num_train_epochs", "1", "--report_epoch", "last")
    main(command(tiny_spikelm, data, output, *more, "--teacher_name_or_path", str(teacher)))
    weights = load_file(teacher / "model.safetensors")
    moved = {name: weight + 1e-6 for name, weight in weights.items()}
    save_file(moved, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="teacher_digest was"):
        main(command(tiny_spikelm, data, output, *more, "--teacher_name_or_path", str(teacher)))


class Recorder(TrainerCallback):
    """In the place of a tracker: the losses that it was told of evaluations."""

    losses: ClassVar[list[float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [logs["eval_loss"]] if "eval_loss" in logs else []


def test_a_tracker_is_told_of_the_student_alone(taught_run, tiny_spikelm, tmp_path, monkeypatch):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Recorder)
    monkeypatch.setattr(Recorder, "losses", [])
    teacher = taught_run / "teachers/cola"
    more = ("--task_name", "cola", "--teacher_name_or_path", str(teacher), "--report_to", "tensorboard")
    more += ("--num_train_epochs", "1", "--report_epoch", "last")
    main(
        command(
            tiny_spikelm,
            write_tasks(tmp_path / "glue", "CoLA"),
            tmp_path / "out",
            *more,
            "--num_train_epochs",
            "1",
            "--report_epoch",
            "last",
        )
    )
    loss = json.loads((tmp_path / "out/cola/eval_results.json").read_text())["eval_loss"]
    assert Recorder.losses[-1] == pytest.approx(loss)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor: a teacher's logits are smooth"),
        (["--first_token_weight", "1"], "--first_token_weight 1 with --per_device_train_batch_size 4: .* 8 or more"),
    ],
)
def test_what_a_student_cannot_learn_by_is_refused(taught_run, tiny_spikelm, tmp_path, flags, message):
    more = ("--task_name", "cola", "--teacher_name_or_path", str(taught_run / "teachers"), *flags)
    more += ("--per_device_train_batch_size", "4")
    with pytest.raises(SystemExit, match=message):
        main(command(tiny_spikelm, write_tasks(tmp_path / "glue", "CoLA"), tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()
