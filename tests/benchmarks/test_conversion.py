"""Which setting is kept, which run becomes the teacher, and what the table makes of it; and one real small run."""

import json
import os
import sys
from dataclasses import replace
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
from conversion import (
    LABELS_RECIPE,
    STATES_RECIPE,
    TIME_STEPS_RECIPE,
    Arguments,
    Contestant,
    InFloat32,
    Setting,
    WithTimeSteps,
    build_table,
    build_task_table,
    choose_teachers,
    chosen_teachers,
    dense_model,
    longer_of,
    neuron_of,
    notes,
    precisions,
    refuse_other_teachers,
    student,
)
from trainings import FINISHED, Job


def finish(contestant: Contestant, task: str, setting: Setting, seed: int, score: float, given: Arguments) -> Path:
    """Makes a training one that has ended well, with this score, and returns its folder."""
    job = contestant.job(task, setting, seed, given)
    write_result(job, task, score)
    return job.folder


def write_result(job: Job, task: str, score: float, ratio: float = 5.0) -> None:
    column = {
        "task": task,
        "score": score,
        "spikes": {"firing_rate": {"median": 0.4}, "encoder_energy_ratio": {"median": ratio}},
    }
    (job.folder / "glue").mkdir(parents=True)
    (job.folder / "glue/glue_results.json").write_text(json.dumps({"columns": {task.upper(): column}}))
    (job.folder / FINISHED).write_text(job.identity)


ONE, OTHER = Setting(1e-4, 3), Setting(5e-5, 3)


@pytest.fixture
def given(tmp_path) -> Arguments:
    (tmp_path / "text.txt").write_text("text")
    file = str(tmp_path / "text.txt")
    return Arguments(
        "bert",
        train_file=file,
        data_dir=file,
        output_dir=str(tmp_path / "out"),
        task_name=["rte", "cola"],
        variants=["num_time_steps=1"],
        teacher_learning_rates=[1e-4, 5e-5],
        teacher_epochs=[3],
        student_epochs=[3],
    )


@pytest.fixture
def teacher(given) -> Contestant:
    """RTE has ended, best with a setting whose first seed is the best; of CoLA the grid alone has."""
    teacher = dense_model(given)
    for setting, task, scores in (
        (ONE, "rte", [80.0, 60.0, 70.0]),
        (OTHER, "rte", [79.0]),
        (ONE, "cola", [20.0]),
        (OTHER, "cola", [30.0]),
    ):
        for seed, score in enumerate(scores):
            finish(teacher, task, setting, seed, score, given)
    return teacher


def test_the_setting_that_is_best_with_the_first_seed_is_kept_once_the_grid_has_ended(teacher, given):
    assert teacher.best_setting("rte", given) == ONE
    assert teacher.best_setting("cola", given) == OTHER
    others = [(job.folder.parts[-3], job.folder.name) for job in teacher.other_jobs(given)]
    assert others == [("rte", "seed_1"), ("rte", "seed_2"), ("cola", "seed_1"), ("cola", "seed_2")]
    # A job that was cut off has no say, and nothing is chosen without it.
    (teacher.job("cola", ONE, 0, given).folder / FINISHED).unlink()
    assert teacher.best_setting("cola", given) is None and not teacher.results("cola", given)


def test_the_run_with_the_median_score_becomes_the_teacher_and_stays_it(teacher, given):
    choose_teachers(teacher, given)
    chosen = chosen_teachers(given)
    median = teacher.job("rte", ONE, 2, given).folder / "glue/rte"
    assert (chosen / "rte").resolve() == median.resolve()
    # Not all seeds have ended.
    assert not (chosen / "cola").is_symlink()
    finish(teacher, "rte", replace(ONE, epochs=9), 0, 99.0, given)
    choose_teachers(teacher, replace(given, teacher_epochs=[3, 9], student_epochs=[3, 9]))
    assert (chosen / "rte").resolve() == median.resolve()


def test_teachers_can_have_another_number_of_seeds(teacher, given):
    one = replace(given, num_teacher_seeds=1)
    alone = dense_model(one)
    assert alone.other_jobs(one) == []
    choose_teachers(alone, one)
    chosen = chosen_teachers(one)
    assert (chosen / "rte").resolve() == (alone.job("rte", ONE, 0, one).folder / "glue/rte").resolve()
    assert (chosen / "cola").is_symlink()
    pupil = student(one, "num_time_steps=1")
    for setting in pupil.settings("rte", one):
        finish(pupil, "rte", setting, 0, 50.0, one)
    assert [job.folder.name for job in pupil.other_jobs(one)] == ["seed_1", "seed_2"]
    with pytest.raises(ValueError, match="--num_teacher_seeds 0 is not possible"):
        replace(given, num_teacher_seeds=0)


def test_the_gap_is_the_mean_over_tasks_of_teacher_less_student(teacher, given):
    for seed in (1, 2):
        finish(teacher, "cola", OTHER, seed, 30.0, given)
    pupil = student(given, "num_time_steps=1")
    for task, scores in (("rte", [66.0, 65.0, 67.0]), ("cola", [21.0, 20.0, 28.0])):
        for setting in pupil.settings(task, given):
            for seed, score in enumerate(scores if setting.learning_rate == 3e-4 else [0.0]):
                finish(pupil, task, setting, seed, score, given)
    dense, row = build_table(given, teacher, [pupil])
    assert (dense["rte"], dense["cola"], dense["gap"]) == ("70.0 (60.0 .. 80.0)", "30.0 (30.0 .. 30.0)", "0.0")
    assert (row["rte"], row["mean"], row["gap"]) == ("66.0 (65.0 .. 67.0)", "43.5", "6.5")
    assert (row["firing rate"], row["dense / this, energy"]) == ("40.0%", "5.00")
    assert row["settings"] == "rte: lr=0.0003,epochs=3; cola: lr=0.0003,epochs=3"


def test_a_trained_student_has_a_row_of_its_own_with_more_time_steps(teacher, given):
    pupil = student(given, "num_time_steps=1")
    for setting in pupil.settings("rte", given):
        finish(pupil, "rte", setting, 0, 100 * setting.learning_rate, given)
    longer = WithTimeSteps(pupil, 4)
    (job,) = longer.jobs(given)
    (command,) = job.commands
    # That of the better setting.
    assert str(pupil.job("rte", Setting(3e-4, 3), 0, given).folder / "glue" / "rte") in command
    assert "num_time_steps=4,membrane_reset=symmetric" in command and "--do_eval" in command
    assert longer.results("rte", given) == []
    # Another setting that turns out to be the best is another evaluation.
    (other,) = WithTimeSteps(replace(pupil, learning_rates=(1e-4,)), 4).jobs(given)
    assert other.folder != job.folder
    write_result(job, "rte", 0.5)
    *_, row = build_table(given, teacher, [pupil, longer])
    assert (row["model"], row["rte"], row["cola"]) == ("num_time_steps=1, as it is with T = 4", "0.5", None)


def test_a_student_that_is_trained_on_with_more_time_steps_has_another_row_beside_it(teacher, given):
    pupil = student(given, "num_time_steps=1")
    for setting in pupil.settings("rte", given):
        finish(pupil, "rte", setting, 0, 1.0, given)
    as_it_is, trained_on = WithTimeSteps(pupil, 4), WithTimeSteps(pupil, 4, is_trained_on=True)
    (evaluation,), (job,) = as_it_is.jobs(given), trained_on.jobs(given)
    (command,) = job.commands
    assert TIME_STEPS_RECIPE in command and "--do_eval" not in command
    assert command[command.index("--teacher_name_or_path") + 1] == str(chosen_teachers(given))
    assert command[command.index("--seed") + 1] == "0" and "num_time_steps=4,membrane_reset=symmetric" in command
    assert evaluation.folder != job.folder
    write_result(evaluation, "rte", 2.0)
    write_result(job, "rte", 3.0)
    *_, first, second = build_table(given, teacher, [pupil, as_it_is, trained_on])
    assert (first["rte"], second["rte"]) == ("2.0", "3.0") and second["model"].endswith("trained on with T = 4")
    for wrong in ({}, {"more_time_steps": [4], "skip_teachers": True}):
        with pytest.raises(ValueError, match="--train_more_time_steps needs --more_time_steps"):
            replace(given, train_more_time_steps=True, **wrong)


def test_what_was_trained_is_evaluated_in_float32_for_a_gap_of_its_own(teacher, given):
    given = replace(given, task_name=["rte"])
    pupil = student(given, "num_time_steps=1")
    for setting in pupil.settings("rte", given):
        finish(pupil, "rte", setting, 0, 100 * setting.learning_rate, given)
    longer = WithTimeSteps(pupil, 4, is_trained_on=True)
    write_result(*longer.jobs(given), "rte", 50.0)
    dense, *others = (InFloat32(each) for each in (teacher, pupil, longer))
    for each, its_scores in ((dense, [71.0, 73.0, 75.0]), (others[0], [66.0]), (others[1], [69.0])):
        for job, score in zip(each.jobs(given), its_scores, strict=True):
            (command,) = job.commands
            assert "--do_eval" in command and command[command.index("--bf16") + 1] == "False"
            write_result(job, "rte", score)
    # Of the better setting, and of the model with its own number of steps.
    assert str(pupil.job("rte", Setting(3e-4, 3), 0, given).folder / "glue/rte") in others[0].jobs(given)[0].commands[0]
    assert str(longer.jobs(given)[0].folder / "glue/rte") in others[1].jobs(given)[0].commands[0]
    rows = build_table(given, dense, others)
    assert [(row["model"].endswith(", in float32"), row["gap"], row["gap of each seed"]) for row in rows] == [
        (True, "0.0", "2.0, 0.0, -2.0"),
        (True, "7.0", "7.0"),
        (True, "4.0", "4.0"),
    ]


def test_the_table_names_cells_with_fewer_seeds_and_says_whether_settings_were_given(teacher, given):
    pupil = student(given, "num_time_steps=1")
    for setting in pupil.settings("rte", given):
        for seed in range(2 if setting.learning_rate == 3e-4 else 1):
            finish(pupil, "rte", setting, seed, setting.learning_rate, given)
    scores, fewer, _ = notes(given, [teacher, pupil])
    assert "over 3 seeds, of the setting that is best with the first seed." in scores
    assert fewer == "Fewer seeds have ended of teacher: cola 1; num_time_steps=1: rte 2."
    in_float32, (first, *_) = InFloat32(teacher), teacher.results("rte", given)
    write_result(in_float32.job("rte", first, given), "rte", 50.0)
    assert notes(given, [in_float32])[1] == "Fewer seeds have ended of teacher, in float32: rte 1."
    found = replace(given, num_seeds=1, teacher_settings=["rte=1e-4:3", "cola=1e-4:3"])
    assert "best with the first seed" in notes(found, [])[0]
    found = replace(found, student_settings=["rte=3e-4:3", "cola=3e-4:3"])
    assert "over 1 seeds, of the setting given." in notes(found, [dense_model(found)])[0]


def test_students_of_another_teacher_than_the_tables_are_no_students_of_it(teacher, given):
    one = replace(given, num_teacher_seeds=1, task_name=["rte"], teacher_settings=["rte=1e-4:3"])
    choose_teachers(dense_model(one), one)
    refuse_other_teachers(dense_model(one), one)
    # Chosen among three, and asked for one by now.
    three = replace(one, num_teacher_seeds=3, output_dir=given.output_dir)
    (chosen_teachers(one) / "rte").unlink()
    choose_teachers(dense_model(three), three)
    assert (chosen_teachers(one) / "rte").resolve().parts[-3] == "seed_2"
    refuse_other_teachers(dense_model(one), one)
    other = replace(one, teacher_settings=["rte=5e-5:3"])
    with pytest.raises(ValueError, match=r"learn rte from, and is .*lr=0.0001.*, not a teacher of lr=5e-05,epochs=3"):
        refuse_other_teachers(dense_model(other), other)
    # Labels alone have no teacher to be another.
    refuse_other_teachers(dense_model(other), replace(other, skip_teachers=True))


def test_other_weights_under_the_same_path_are_another_job(given, tmp_path):
    folder = tmp_path / "converted"
    folder.mkdir()
    (folder / "config.json").write_text('{"neuron": "thrifty"}')
    (folder / "model.safetensors").write_bytes(b"first")
    pupil = student(given, str(folder))
    finish(pupil, "rte", ONE, 0, 50.0, given)
    job = pupil.job("rte", ONE, 0, given)
    assert job.is_finished
    (folder / "model.safetensors").write_bytes(b"second")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert not job.is_finished
    (folder / "model.safetensors").write_bytes(b"first")
    assert job.is_finished
    # So it is with its data,
    Path(given.data_dir).write_text("other text")
    assert not job.is_finished
    Path(given.data_dir).write_text("text")
    assert job.is_finished
    # with what it learns from, and with no weights that the job writes itself.
    teacher = chosen_teachers(given) / "rte"
    teacher.mkdir(parents=True)
    assert job.is_finished
    (teacher / "model.safetensors").write_bytes(b"teacher")
    assert not job.is_finished
    (tmp_path / "one/pretrained").mkdir(parents=True)
    two_steps = Job(
        "one", tmp_path / "one", (("python", "b.py", "--model_name_or_path", f"{tmp_path}/one/pretrained"),)
    )
    before = two_steps.identity
    (tmp_path / "one/pretrained/model.safetensors").write_bytes(b"own")
    assert two_steps.identity == before


def test_only_levels_that_every_step_can_have_are_measured_with_more_steps_as_they_are(given, tmp_path):
    (tmp_path / "config.json").write_text('{"neuron": "thrifty"}')
    assert neuron_of("num_time_steps=1") == "elastic"
    assert neuron_of("neuron=learned,num_time_steps=1") == "learned" and neuron_of(str(tmp_path)) == "thrifty"
    with_more = replace(given, variants=["num_time_steps=1", "neuron=learned,num_time_steps=1"], more_time_steps=[4])
    names = [each.name for each in longer_of(with_more, [student(with_more, each) for each in with_more.variants])]
    assert names == ["neuron=learned,num_time_steps=1, as it is with T = 4"]
    trained = replace(with_more, train_more_time_steps=True)
    names = [each.name for each in longer_of(trained, [student(trained, each) for each in trained.variants])]
    assert names[1:] == [f"{each}, trained on with T = 4" for each in with_more.variants]


def test_a_student_that_is_converted_already_can_have_other_fields(given, tmp_path):
    (tmp_path / "config.json").write_text('{"neuron": "thrifty"}')
    whole, changed = str(tmp_path), f"{tmp_path},spike_cost=0,neuron=learned"
    assert neuron_of(changed) == "learned"
    given = replace(given, variants=[whole, changed], train_file=None)
    as_it_is, pupil = (student(given, each) for each in given.variants)
    assert as_it_is.start == () and pupil.start == ("--config_overrides", "spike_cost=0,neuron=learned")
    assert as_it_is.model == pupil.model == whole
    assert pupil.name == f"{tmp_path.name},spike_cost=0,neuron=learned" and pupil.folder != as_it_is.folder


@pytest.fixture
def bert(tmp_path) -> Path:
    """Only its tokenizer."""
    text = write_corpus(tmp_path / "words.txt", 6)
    texts = load_dataset("text", data_files=str(text), split="train", cache_dir=str(tmp_path / "cache"))
    train_wordpiece(texts, 300, True, model_max_length=64).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_task_by_task_a_row_says_what_it_lost_spent_and_saw(given, bert, tmp_path):
    glue = tmp_path / "glue/RTE"
    glue.mkdir(parents=True)
    for split in ("train", "dev"):
        rows = [f"{number}\t. . .\t{'. ' * number}\tentailment" for number in range(1, 9)]
        glue.joinpath(f"{split}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    settings = {f"{who}_settings": ["rte=1e-4:3"] for who in ("teacher", "student")}
    given = replace(given, data_dir=str(glue.parent), teacher_name_or_path=str(bert), task_name=["rte"], **settings)
    teacher = dense_model(given)
    for seed, score in enumerate((80.0, 60.0, 70.0)):
        finish(teacher, "rte", ONE, seed, score, given)
    pupil = student(given, "num_time_steps=1")
    for seed, score in enumerate((60.0, 64.0, 62.0)):
        folder = finish(pupil, "rte", ONE, seed, score, given) / "glue/rte"
        folder.mkdir()
        (folder / "config.json").write_text('{"num_time_steps": 1}')
        figures = {"epoch": 3.0, "train_samples": 9 if seed == 2 else 8, "train_runtime": 60.0 * (seed + 1)}
        (folder / "train_results.json").write_text(json.dumps(figures))
        arguments = {"mixed_precision": "bf16" if seed else "no", "max_seq_length": 12}
        (folder / "run.json").write_text(json.dumps({"arguments": arguments}))
    longer = WithTimeSteps(pupil, 4)
    for job in longer.jobs(given):
        write_result(job, "rte", 66.0, ratio=2.0)
    dense, row, steps = build_task_table(given, teacher, [pupil, longer])
    assert (dense["score"], dense["gap"], dense["minutes"]) == ("70.0 (60.0 .. 80.0)", "0.0", None)
    assert (row["score"], row["gap"], row["firing rate"]) == ("62.0 (60.0 .. 64.0)", "8.0", "40.0%")
    assert (row["dense / this, energy"], row["ternary / this, energy"]) == ("5.00", "1.00")
    # 7 to 14 tokens, cut at 12. The third run learned from other texts too, whose tokens are not known.
    assert (row["examples seen"], row["tokens seen"], row["minutes"]) == ("24", "243", "2")
    assert dense["tokens seen"] is None
    assert (steps["gap"], steps["dense / this, energy"], steps["ternary / this, energy"]) == ("4.0", "2.00", "0.40")
    assert precisions(given, [pupil]) == [
        "Trained and evaluated in bfloat16, but num_time_steps=1, rte, seed 0 in float32."
    ]


def test_there_is_no_mean_as_long_as_a_task_is_missing(teacher, given):
    pupil = student(given, "num_time_steps=1")
    for setting in pupil.settings("rte", given):
        finish(pupil, "rte", setting, 0, 50.0, given)
    _, row = build_table(given, teacher, [pupil])
    assert (row["rte"], row["cola"], row["mean"], row["gap"]) == ("50.0", None, None, None)


def test_a_large_task_has_epochs_and_batches_of_its_own(given):
    pupil = student(given, "num_time_steps=1")
    assert [setting.epochs for setting in pupil.settings("sst2", given)] == [1, 2, 1, 2]
    assert [setting.epochs for setting in pupil.settings("rte", given)] == [3, 3]
    (large,), (small,) = (pupil.job(task, ONE, 0, given).commands for task in ("sst2", "rte"))
    assert large[large.index("--per_device_train_batch_size") + 1] == "128"
    assert "--per_device_train_batch_size" not in small


def test_a_student_learns_its_teachers_states_or_labels_alone(given):
    (taught,) = student(given, "num_time_steps=1").job("rte", ONE, 0, given).commands
    assert STATES_RECIPE in taught and "--model_type" not in taught
    assert taught[taught.index("--teacher_name_or_path") + 1] == str(chosen_teachers(given))
    assert taught[taught.index("--learning_rate") + 1] == "0.0001"
    # What is not converted becomes a SpikeLM in the training.
    alone = replace(given, skip_text=True, skip_teachers=True)
    assert (given.without, alone.without) == ("", ", without text, without teachers")
    (command,) = student(alone, "num_time_steps=1").job("rte", ONE, 0, alone).commands
    assert LABELS_RECIPE in command and command[command.index("--num_train_epochs") + 1] == "3"
    assert "--model_type" in command and "--teacher_name_or_path" not in command


def test_without_text_a_student_has_no_dropout_and_is_none_that_text_has_trained(given, tmp_path):
    alone = replace(given, skip_text=True)
    (command,) = student(alone, "num_time_steps=1").job("rte", ONE, 0, alone).commands
    fields = command[command.index("--config_overrides") + 1].split(",")
    assert fields[0] == "num_time_steps=1"
    assert {"hidden_dropout_prob=0.0", "attention_probs_dropout_prob=0.0"} <= set(fields)
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="--skip_text.*no text has trained.*name the fields of a configuration"):
        replace(alone, variants=[str(tmp_path)])


def test_students_of_one_name_would_share_a_folder_and_are_refused(given, tmp_path):
    folders = [tmp_path / place / "student" for place in ("one", "other")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    with pytest.raises(ValueError, match="--variants: two of them are called student.*give it another, by a link"):
        replace(given, variants=list(map(str, folders)))
    (tmp_path / "another").symlink_to(folders[1])
    both = replace(given, variants=[str(folders[0]), str(tmp_path / "another")])
    assert [student(both, variant).name for variant in both.variants] == ["student", "another"]


def test_a_larger_grid_for_one_side_is_refused(given):
    with pytest.raises(ValueError, match="--jobs 0 is not possible"):
        replace(given, jobs=0)
    with pytest.raises(ValueError, match="--teacher_learning_rates and --student_learning_rates have to be equally"):
        replace(given, student_learning_rates=[1e-4, 2e-4, 3e-4])
    with pytest.raises(ValueError, match="--teacher_epochs and --student_epochs have to be equally"):
        replace(given, student_epochs=[1, 2])
    with pytest.raises(ValueError, match="--train_file nowhere does not exist"):
        replace(given, train_file="nowhere")
    with pytest.raises(ValueError, match="--train_file is missing"):
        replace(given, train_file=None)


def test_a_setting_found_before_takes_the_place_of_its_own_grid_alone(given):
    settled = replace(given, student_settings=["rte=2e-5:6"])
    assert student(settled, "num_time_steps=1").settings("rte", settled) == [Setting(2e-5, 6)]
    assert dense_model(settled).settings("rte", settled) == [ONE, OTHER]
    given = replace(given, teacher_settings=["cola=2e-5:6"])
    teacher, pupil = dense_model(given), student(given, "num_time_steps=1")
    assert teacher.settings("cola", given) == [Setting(2e-5, 6)]
    assert teacher.settings("rte", given) == [ONE, OTHER]
    assert [setting.learning_rate for setting in pupil.settings("cola", given)] == [1e-4, 3e-4]
    for wrong in ("cola", "cola=6", "cola=x:6", "cola=1e-4:1.5"):
        with pytest.raises(ValueError, match="is not a task, a learning rate and epochs"):
            replace(given, teacher_settings=[wrong])
    with pytest.raises(ValueError, match="--student_settings mrpc=1e-4:6 is of a task that --task_name lacks"):
        replace(given, student_settings=["mrpc=1e-4:6"])


def test_other_texts_go_to_the_tasks_they_are_like_and_make_a_row_of_their_own(given, tmp_path):
    pairs, texts = tmp_path / "pairs.tsv", tmp_path / "texts.tsv"
    for file in (pairs, texts):
        file.write_text("there")
    more = replace(given, unlabelled_pairs=str(pairs), unlabelled_texts=str(texts), large_tasks=["sst2"])

    def commands(task, given, variant="num_time_steps=1"):
        return student(given, variant).job(task, ONE, 0, given).commands

    for task, file in (("rte", pairs), ("cola", texts)):
        (command,) = commands(task, more)
        assert command[command.index("--unlabelled_file") + 1] == str(file)
    for task, others in (("sst2", more), ("rte", given), ("rte", replace(more, skip_teachers=True))):
        assert "--unlabelled_file" not in commands(task, others)[0]
    name = student(given, "num_time_steps=1").name
    assert student(more, "num_time_steps=1").name == f"{name}, with other texts"
    with pytest.raises(ValueError, match="--unlabelled_pairs .* does not exist"):
        replace(given, unlabelled_pairs=str(tmp_path / "nowhere.tsv"))


@pytest.mark.long
def test_a_bert_is_converted_and_measured_and_the_command_goes_on(tmp_path, capsys):
    text = write_corpus(tmp_path / "text.txt", 6)
    texts = load_dataset("text", data_files=str(text), split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer = train_wordpiece(texts, 300, True, model_max_length=64)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    (tmp_path / "pairs.tsv").write_text("sentence1\tsentence2\none text\tanother\n")
    (tmp_path / "distill.yaml").write_text("max_steps: 4\nmax_seq_length: 32\nmax_eval_samples: 8\n")
    given = Arguments(
        str(tmp_path / "bert"),
        str(write_tasks(tmp_path / "glue", "RTE", "CoLA")),
        str(tmp_path / "out"),
        train_file=str(text),
        task_name=["rte", "cola"],
        variants=["neuron=thrifty,num_time_steps=1"],
        teacher_learning_rates=[1e-3],
        student_learning_rates=[1e-3],
        teacher_epochs=[1],
        student_epochs=[1],
        num_seeds=2,
        more_time_steps=[2],
        train_more_time_steps=True,
        evaluate_in_float32=True,
        distill_recipe=str(tmp_path / "distill.yaml"),
        output=str(tmp_path / "results"),
    )
    conversion.measure(given)
    first, by_task = json.loads((tmp_path / "results/conversion.json").read_text())
    rows = first["rows"]
    assert by_task["title"] == conversion.TASKS_TITLE and len(by_task["rows"]) == 8
    assert all(row["examples seen"] for row in by_task["rows"] if "as it is" not in row["model"])
    assert "Trained and evaluated in " in " ".join(first["notes"])
    dense, row, longer, trained_on, *in_float32 = rows
    assert longer["model"].endswith("as it is with T = 2") and longer["gap"] is not None
    assert trained_on["model"].endswith("trained on with T = 2") and trained_on["gap"] is not None
    assert dense["gap"] == "0.0" and row["model"] == "neuron=thrifty,num_time_steps=1"
    assert row["gap"] is not None and row["firing rate"].endswith("%")
    # Of the teacher, the student and the one that was trained on, and not of the one that is as it is.
    trained = [each["model"] for each in (dense, row, trained_on)]
    assert [each["model"] for each in in_float32] == [f"{name}, in float32" for name in trained]
    assert all(each["gap"] is not None for each in in_float32)
    weights = next((tmp_path / "out").rglob("text/student/model.safetensors"))
    before = weights.stat().st_mtime_ns
    # What is converted already is a variant by its folder.
    again = replace(
        given,
        variants=[str(weights.parent)],
        train_file=None,
        unlabelled_pairs=str(tmp_path / "pairs.tsv"),
        more_time_steps=[],
        train_more_time_steps=False,
        evaluate_in_float32=False,
    )
    conversion.measure(again)
    assert weights.stat().st_mtime_ns == before
    rows = json.loads((tmp_path / "results/conversion.json").read_text())[-2]["rows"]
    assert rows[1]["model"] == "student, with other texts" and rows[1]["gap"] is not None
