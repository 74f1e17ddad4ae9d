import json

import pytest
from transformers import TrainingArguments

from experiment.checkpoints import MANIFEST_NAME, seal
from experiment.recorded_arguments import recorded_arguments
from experiment.run_record import RECORD_NAME, RunRecord


def record(folder, fingerprint="f", **arguments):
    return RunRecord(folder, {"learning_rate": 1e-3, **arguments}, fingerprint)


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
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


def test_overwrite_deletes_checkpoints_and_nothing_else(tmp_path):
    record(tmp_path).open()
    checkpoint(tmp_path, 5)
    (tmp_path / "notes.txt").write_text("mine")
    assert record(tmp_path, seed=1).open(overwrite=True) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", RECORD_NAME]


def test_a_folder_that_a_kill_left_without_its_record_is_a_new_one(tmp_path):
    (tmp_path / f"{RECORD_NAME}.unfinished").write_text('{"arg')
    assert record(tmp_path).open() is None
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_NAME]


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
