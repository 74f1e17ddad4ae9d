import json
import os
import shutil
from contextlib import suppress

import pytest
from transformers import TrainingArguments

from experiment.checkpoints import MANIFEST_NAME, seal
from experiment.folder_lock import LOCK_NAME
from experiment.recorded_arguments import recorded_arguments
from experiment.run_record import RunRecord
from experiment.written_files import LIST_NAME, RECORD_NAME, WrittenFiles


def record(folder, fingerprint="f", **arguments):
    return RunRecord(folder, {"learning_rate": 1e-3, **arguments}, fingerprint)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in (LIST_NAME, LOCK_NAME))


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    WrittenFiles(folder).claim(path.name)
    path.mkdir()
    for name in ("optimizer.pt", "scheduler.pt"):
        (path / name).touch()
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    seal(path)
    return path


def test_new_and_empty_folders_start_at_the_beginning(tmp_path):
    assert record(tmp_path / "new").open() is None
    (tmp_path / "empty").mkdir()
    assert record(tmp_path / "empty").open() is None
    assert json.loads((tmp_path / "new" / RECORD_NAME).read_text())["data_fingerprint"] == "f"


def test_the_same_run_goes_on_from_its_last_checkpoint(tmp_path):
    record(tmp_path).open()
    assert record(tmp_path).open() is None
    for step in (5, 10):
        latest = checkpoint(tmp_path, step)
    assert record(tmp_path).open() == str(latest)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"learning_rate": 2e-3}, "learning_rate was 0.001 and is 0.002"),
        ({"seed": 3}, "seed was None and is 3"),
        ({"fingerprint": "g"}, "the data has changed"),
        (
            {"sequences_per_step": 16},
            r"sequences per step was None and is 16 \(--per_device_train_batch_size x --gradient_accumulation_steps x "
            r"processes\)",
        ),
    ],
)
def test_another_run_is_refused_and_nothing_is_written(tmp_path, other, named):
    begun = record(tmp_path)
    begun.open()
    begun.record_beginning()
    before = (tmp_path / RECORD_NAME).read_bytes()
    with pytest.raises(ValueError, match=named):
        record(tmp_path, **other).open()
    assert (tmp_path / RECORD_NAME).read_bytes() == before


@pytest.mark.parametrize("off", [0, 0.0, None, False, "", []])
def test_a_run_goes_on_with_another_version_whose_new_or_gone_flags_are_off(tmp_path, off):
    begun = record(tmp_path)
    begun.open()
    begun.record_beginning()
    latest = checkpoint(tmp_path, 5)
    assert record(tmp_path, new_flag=off).open() == str(latest)
    # From here on the record knows it.
    with pytest.raises(ValueError, match="new_flag was .* and is 2"):
        record(tmp_path, new_flag=2).open()
    assert record(tmp_path).open() == str(latest)
    with pytest.raises(ValueError, match="other_flag was None and is 2"):
        record(tmp_path, other_flag=2).open()


def test_the_precision_is_recorded_whether_an_option_or_a_launch_file_sets_it(tmp_path, monkeypatch):
    plain = recorded_arguments(TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    option = recorded_arguments(TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=True))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launched = recorded_arguments(TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    assert launched == option == plain | {"mixed_precision": "bf16"} != plain


def test_other_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no run of this script"):
        record(tmp_path).open()


def test_overwrite_moves_what_the_run_wrote_and_nothing_else_until_the_new_model_is_there(tmp_path):
    record(tmp_path).open()
    checkpoint(tmp_path, 5)
    (tmp_path / "notes.txt").write_text("mine")
    new = record(tmp_path, seed=1)
    assert new.open(overwrite=True) is None
    assert names(tmp_path) == ["notes.txt", "replaced-1", RECORD_NAME]
    assert names(tmp_path / "replaced-1") == ["checkpoint-5", RECORD_NAME]
    new.record_training()
    assert names(tmp_path) == ["notes.txt", RECORD_NAME]


def test_a_folder_that_a_kill_left_without_its_record_is_a_new_one(tmp_path):
    (tmp_path / f"{RECORD_NAME}.unfinished").write_text('{"arg')
    assert record(tmp_path).open() is None
    assert names(tmp_path) == [RECORD_NAME]


def test_named_checkpoint_overrides_the_record(tmp_path):
    record(tmp_path).open()
    path = checkpoint(tmp_path, 5)
    assert record(tmp_path, seed=1).open(resume_from_checkpoint=str(path)) == str(path)
    with pytest.raises(ValueError, match="no checkpoint of the Trainer"):
        record(tmp_path).open(resume_from_checkpoint=str(tmp_path / "absent"))
    (path / "trainer_state.json").write_text("damaged")
    with pytest.raises(ValueError, match="is damaged: trainer_state.json is not what was written"):
        record(tmp_path).open(resume_from_checkpoint=str(path))
    (path / MANIFEST_NAME).unlink()  # another program's
    assert record(tmp_path, seed=1).open(resume_from_checkpoint=str(path)) == str(path)


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_optimizer_or_schedule_is_not_gone_on_from(tmp_path, missing):
    record(tmp_path).open()
    path = checkpoint(tmp_path, 5)
    (path / missing).unlink()
    (path / MANIFEST_NAME).unlink()  # another program's
    with pytest.raises(ValueError, match=f"holds no optimizer and schedule.*give --model_name_or_path {path}"):
        record(tmp_path).open(resume_from_checkpoint=str(path))


@pytest.mark.parametrize(
    "names", [["optimizer.bin", "scheduler.pt"], ["optimizer_0", "scheduler.pt"], ["global_step5"]]
)
def test_the_optimizer_of_fsdp_and_deepspeed_is_found(tmp_path, names):
    (tmp_path / "trainer_state.json").touch()
    for name in names:
        (tmp_path / name).touch()
    assert record(tmp_path / "run").open(resume_from_checkpoint=str(tmp_path)) == str(tmp_path)


def test_a_half_written_checkpoint_is_passed_over_and_only_a_run_that_is_opened_removes_it(tmp_path):
    record(tmp_path).open()
    whole = checkpoint(tmp_path, 5)
    (checkpoint(tmp_path, 10) / MANIFEST_NAME).unlink()
    assert record(tmp_path).check() == str(whole)
    assert (tmp_path / "checkpoint-10").is_dir()
    assert record(tmp_path).open() == str(whole)
    assert not (tmp_path / "checkpoint-10").exists()


def test_check_writes_nothing(tmp_path):
    record(tmp_path / "new").check()
    assert not (tmp_path / "new").exists()


def test_a_run_has_nothing_left_until_it_is_opened_again(tmp_path):
    first = record(tmp_path)
    first.open()
    assert not record(tmp_path).has_nothing_left(None)
    first.record_end(pushed_to="me/model@main")
    again = record(tmp_path)
    again.check()
    assert again.has_nothing_left(None) and again.has_nothing_left("me/model@main")
    assert not again.has_nothing_left("me/other@main")
    again.check(overwrite=True)
    assert not again.has_nothing_left(None)
    again.open()
    later = record(tmp_path)
    later.check()
    assert not later.has_nothing_left(None)


def test_nothing_is_left_to_train_once_the_model_is_there_or_a_checkpoint_has_all_steps(tmp_path):
    run, folder = record(tmp_path / "run"), tmp_path / "run"
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, max_steps=10)
    run.open()
    for step, expected in ((5, None), (10, str(checkpoint(folder, 10)))):
        path = folder / "checkpoint-10" if step == 10 else checkpoint(folder, step)
        assert run.trained_model(str(path), arguments) == expected
    run.record_training()
    again = record(folder)
    assert again.trained_model(again.open(), arguments) == str(folder)
    again.open(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert again.trained_model(str(folder / "checkpoint-5"), arguments) is None


def write(folder, **files):
    """Files as a run writes them."""
    with WrittenFiles(folder).writing(*files):
        for name, text in files.items():
            (folder / name).write_text(text)


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def a_finished_run(folder):
    earlier = record(folder)
    earlier.open()
    earlier.record_beginning()
    checkpoint(folder, 5)
    write(folder, **{"model.safetensors": "weights", "README.md": "card"})
    earlier.record_training()
    earlier.record_end()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_no_run_wrote_into_is_refused_whatever_is_asked_for(tmp_path, overwrite, resume):
    a_finished_run(tmp_path / "other")
    project = tmp_path / "project"
    for name in (
        "README.md",
        "survey_results.json",
        "model_v1.safetensors",
        "checkpoint-7/weights",
        "submission/a.pdf",
    ):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("mine")
    before = snapshot(project)
    named = str(tmp_path / "other" / "checkpoint-5") if resume else None
    with pytest.raises(ValueError) as refused:
        record(project).open(overwrite, named)
    assert "README.md, checkpoint-7, model_v1.safetensors, submission, survey_results.json" in str(refused.value)
    assert "--overwrite" not in str(refused.value)
    assert snapshot(project) == before


def test_a_message_that_names_the_overwriting_flag_says_what_it_deletes(tmp_path):
    a_finished_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError) as refused:
        record(tmp_path, seed=1).check()
    said = str(refused.value).partition("--overwrite_output_dir starts anew and deletes ")[2]
    assert "checkpoint-5 (" in said and "model.safetensors (7 bytes)" in said and "README.md (4 bytes)" in said
    assert "notes.txt" not in said


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint-5", "checkpoint-5/trainer_state.json"])
def test_a_run_does_not_begin_where_it_would_delete_what_it_reads(tmp_path, name):
    a_finished_run(tmp_path)
    before = snapshot(tmp_path)
    new = RunRecord(tmp_path, {"seed": 1}, "f", inputs=[tmp_path / "absent", tmp_path / name])
    with pytest.raises(ValueError, match=f"reads .*{name}, but would delete or move it"):
        new.open(overwrite=True)
    with pytest.raises(ValueError, match=f"this command reads .*{name}, so it cannot start anew here"):
        new.open()
    assert snapshot(tmp_path) == before


def test_an_input_that_waits_to_be_deleted_is_refused_as_well(tmp_path):
    a_finished_run(tmp_path)
    new = record(tmp_path, seed=1)
    new.open(overwrite=True)
    new.inputs = [tmp_path / "replaced-1" / "model.safetensors"]
    with pytest.raises(ValueError, match="reads .*replaced-1"):
        new.open()


def test_a_killed_overwriting_loses_nothing_and_resumes_nothing_of_the_earlier_run(tmp_path, monkeypatch):
    """Killed at each of its renames; the same command then starts at the beginning, and ends."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # of no use against a kill, and slow
    replace = os.replace
    for killed_at in range(1, 100):
        folder = tmp_path / str(killed_at)
        a_finished_run(folder)
        before, calls = snapshot(folder / "checkpoint-5"), iter(range(1, 100))

        def until_killed(source, target, killed_at=killed_at, calls=calls):
            if next(calls) == killed_at:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", until_killed)
            try:
                assert record(folder, seed=1).open(overwrite=True) is None
                break
            except KeyboardInterrupt:
                pass
        kept = [path for path in (folder, folder / "replaced-1") if (path / "model.safetensors").exists()]
        assert [(path / "model.safetensors").read_text() for path in kept] == ["weights"]
        # The earlier command does not take what is left for its finished run.
        earlier = record(folder)
        with suppress(ValueError):
            earlier.check()
        assert not earlier.is_finished or {"checkpoint-5", "model.safetensors", "README.md"} <= set(names(folder))
        # Nor does the plain command for its own.
        try:
            assert record(folder, seed=1).check() is None
        except ValueError as error:
            assert "another run" in str(error) or "what is left of a run that was being replaced" in str(error)
        again = record(folder, seed=1)
        assert again.open(overwrite=True) is None
        moved = next(folder.glob("replaced-*/checkpoint-5"))
        assert snapshot(moved) == before
        checkpoint(folder, 3)
        assert record(folder, seed=1).open() == str(folder / "checkpoint-3")
        assert names(folder) == ["checkpoint-3", RECORD_NAME]
    assert killed_at > 5


def test_going_on_from_a_checkpoint_of_another_run_keeps_what_came_after_it_aside(tmp_path):
    a_finished_run(tmp_path)
    for step in (10, 15):
        checkpoint(tmp_path, step)
    named = str(tmp_path / "checkpoint-10")
    other = record(tmp_path, learning_rate=2.0)
    assert other.open(resume_from_checkpoint=named) == named
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-5", "earlier-1", RECORD_NAME]
    assert names(tmp_path / "earlier-1") == ["README.md", "checkpoint-15", "model.safetensors", RECORD_NAME]
    # The plain command goes on there too, and not from the other run's last checkpoint.
    assert record(tmp_path, learning_rate=2.0).open() == named
    other.record_training()
    assert (tmp_path / "earlier-1" / "model.safetensors").read_text() == "weights"


def test_a_run_without_a_step_gives_its_folder_to_another_unless_it_has_moved_something_aside(tmp_path):
    record(tmp_path).open()
    record(tmp_path, seed=1).open()
    a_finished_run(tmp_path / "run")
    record(tmp_path / "run", seed=1).open(overwrite=True)
    with pytest.raises(ValueError, match="holds another run: seed was 1 and is 2"):
        record(tmp_path / "run", seed=2).open()


def test_a_checkpoint_that_a_user_put_there_is_not_gone_on_from(tmp_path):
    record(tmp_path).open()
    ours = checkpoint(tmp_path, 5)
    shutil.copytree(ours, tmp_path / "checkpoint-90")
    assert record(tmp_path).open() == str(ours)
    assert (tmp_path / "checkpoint-90").is_dir()


@pytest.mark.parametrize(
    ("name", "content"), [(name, text) for name in (RECORD_NAME, LIST_NAME) for text in ("", "[]", '{"arguments"')]
)
def test_a_record_that_is_damaged_is_named(name, content, tmp_path):
    a_finished_run(tmp_path)
    (tmp_path / name).write_text(content)
    if name == RECORD_NAME:
        with WrittenFiles(tmp_path).writing(name):
            pass
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        record(tmp_path).open()


def test_a_path_is_the_same_with_a_dot_before_it_and_a_slash_behind(tmp_path):
    run = record(tmp_path, model_name_or_path="models/spike")
    run.open()
    run.record_beginning()
    record(tmp_path, model_name_or_path="./models/spike/").check()
    with pytest.raises(ValueError, match="model_name_or_path was 'models/spike' and is 'models/other'"):
        record(tmp_path, model_name_or_path="models/other").check()
