import subprocess
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerControl, TrainerState, TrainingArguments

from experiment.checkpoints import (
    MANIFEST_NAME,
    CheckpointKeeper,
    clear_incomplete_checkpoints,
    latest_complete_checkpoint,
    seal,
)
from experiment.written_files import LIST_NAME, WrittenFiles

FILES = {"model.safetensors": b"weights" * 100, "rng_state_0.pth": b"0", "global_step/shard.pt": b"shard"}


def write(folder, step, sealed=True):
    path = folder / f"checkpoint-{step}"
    if not path.exists():
        WrittenFiles(folder).claim(path.name)
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    (path / "trainer_state.json").write_text("{}")
    if sealed:
        seal(path)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != LIST_NAME)


def test_the_manifest_is_what_sha256sum_reads(tmp_path):
    path = write(tmp_path, 5)
    done = subprocess.run(["sha256sum", "--strict", "--check", MANIFEST_NAME], cwd=path, capture_output=True, text=True)
    assert done.returncode == 0
    assert sorted(line.split(":")[0] for line in done.stdout.splitlines()) == sorted([*FILES, "trainer_state.json"])


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from([*FILES, "trainer_state.json"]), data=st.data())
def test_whatever_one_file_has_lost_the_checkpoint_before_is_the_latest(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("run")
    before, path = write(folder, 90), write(folder, 100)
    assert latest_complete_checkpoint(folder) == path
    content = (path / name).read_bytes()
    if data.draw(st.booleans()):
        (path / name).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:
        position = data.draw(st.integers(0, len(content) - 1))
        (path / name).write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    assert latest_complete_checkpoint(folder) == before
    (path / name).unlink()
    assert latest_complete_checkpoint(folder) == before


def test_files_without_a_manifest_and_half_a_manifest_do_not_count(tmp_path):
    before, path = write(tmp_path, 5), write(tmp_path, 10, sealed=False)
    assert latest_complete_checkpoint(tmp_path) == before
    (path / f"{MANIFEST_NAME}.unfinished").write_text("")
    assert latest_complete_checkpoint(tmp_path) == before
    seal(path)
    assert latest_complete_checkpoint(tmp_path) == path


def test_a_manifest_that_is_no_text_is_damage(tmp_path):
    before, newest = write(tmp_path, 5), write(tmp_path, 20)
    (newest / MANIFEST_NAME).write_bytes(b"\xff\xfe")
    assert latest_complete_checkpoint(tmp_path) == before


def test_wherever_a_manifest_was_cut_short_together_with_the_files_it_named_it_is_damage(tmp_path):
    before, newest = write(tmp_path, 5), write(tmp_path, 20)
    manifest = (newest / MANIFEST_NAME).read_bytes()
    for length in range(len(manifest) - 1):  # all but the last line's end
        (newest / MANIFEST_NAME).write_bytes(manifest[:length])
        named = {line.rpartition("  ")[2] for line in manifest[:length].decode().splitlines()}
        for path in newest.rglob("*"):
            if path.is_file() and path.relative_to(newest).as_posix() not in {MANIFEST_NAME, *named}:
                path.unlink()
        assert latest_complete_checkpoint(tmp_path) == before
        write(tmp_path, 20, sealed=False)


def test_half_written_ones_are_deleted_and_damaged_ones_kept_aside_and_both_are_reported(tmp_path, caplog):
    complete = write(tmp_path, 5)
    write(tmp_path, 10, sealed=False)
    damaged = write(tmp_path, 20)
    (damaged / "model.safetensors").write_bytes(b"")
    clear_incomplete_checkpoints(tmp_path)
    assert names(tmp_path) == ["checkpoint-5", "damaged-checkpoint-20"]
    newest, middle = (record.getMessage() for record in caplog.records)
    assert "checkpoint-20 is damaged: model.safetensors is not what was written" in newest
    assert f"delete its {MANIFEST_NAME} and name it with --resume_from_checkpoint" in newest
    assert "checkpoint-10 is not complete" in middle and "It was deleted" in middle
    assert f"goes on from {complete}" in newest and f"goes on from {complete}" in middle
    clear_incomplete_checkpoints(tmp_path)
    assert len(caplog.records) == 2


def test_nothing_a_plain_trainer_may_have_finished_is_deleted_while_no_checkpoint_is_complete(tmp_path, caplog):
    write(tmp_path, 10, sealed=False)
    (write(tmp_path, 20, sealed=False) / "trainer_state.json").unlink()  # the Trainer writes it last
    clear_incomplete_checkpoints(tmp_path)
    assert names(tmp_path) == ["damaged-checkpoint-10"]
    assert (
        "to go on from it anyway, name it with --resume_from_checkpoint" in caplog.text
        and "starts at the beginning" in caplog.text
    )


class Card:
    """Where the run's card would be written."""

    def write(self, folder, results, state):
        (folder / "README.md").write_text(f"{results}")


def keeper(folder, limit):
    return CheckpointKeeper(Card(), TrainingArguments(output_dir=str(folder), use_cpu=True, save_total_limit=limit))


def save(keeper, folder, step, best=None):
    write(folder, step, sealed=False)
    state = TrainerState(global_step=step, best_model_checkpoint=best and str(folder / f"checkpoint-{best}"))
    keeper.on_save(TrainingArguments(output_dir=str(folder), use_cpu=True), state, TrainerControl())


def test_the_trainer_deletes_nothing_itself(tmp_path):
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, save_total_limit=2)
    assert CheckpointKeeper(Card(), training).limit == 2
    assert training.save_total_limit is None


def test_the_best_checkpoint_of_a_run_whose_folder_was_moved_is_found(tmp_path):
    best = write(tmp_path, 5)
    for step, found in ((5, str(best)), (10, None), (None, None)):
        state = TrainerState(max_steps=20, best_global_step=step, best_model_checkpoint=None)
        training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        keeper(tmp_path, 1).on_train_begin(training, state, TrainerControl())
        assert state.best_model_checkpoint == found


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(None, None, [5, 10, 15, 20]), (2, None, [15, 20]), (1, None, [20]), (1, 10, [10, 20]), (3, 5, [5, 15, 20])],
)
def test_the_newest_and_the_best_are_kept_within_the_limit(tmp_path, limit, best, left):
    kept = keeper(tmp_path, limit)
    for step in (5, 10, 15, 20):
        save(kept, tmp_path, step, best)
    assert names(tmp_path) == sorted(f"checkpoint-{step}" for step in left)
    assert "README.md" in (tmp_path / "checkpoint-20" / MANIFEST_NAME).read_text()


def test_incomplete_checkpoints_take_no_complete_ones_place(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 10, sealed=False)  # half deleted, when a kill came
    WrittenFiles(tmp_path).claim("damaged-checkpoint-15")
    write(tmp_path, 15).rename(tmp_path / "damaged-checkpoint-15")
    save(keeper(tmp_path, 2), tmp_path, 20)
    assert names(tmp_path) == ["checkpoint-20", "checkpoint-5"]


def test_older_checkpoints_stay_when_the_new_one_cannot_be_sealed(tmp_path):
    before = write(tmp_path, 5)
    WrittenFiles(tmp_path).claim("checkpoint-10")
    (tmp_path / "checkpoint-10" / f"{MANIFEST_NAME}.unfinished").mkdir(parents=True)
    with pytest.raises(OSError):
        save(keeper(tmp_path, 1), tmp_path, 10)
    assert latest_complete_checkpoint(tmp_path) == before


def test_what_a_user_has_put_among_the_checkpoints_is_neither_rotated_nor_cleared(tmp_path):
    kept = keeper(tmp_path, 1)
    save(kept, tmp_path, 5)
    (tmp_path / "checkpoint-5" / "my_scores.json").write_text("mine")
    for name in ("checkpoint-mine", "checkpoint-3", "damaged-checkpoint-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("mine")
    save(kept, tmp_path, 10)
    clear_incomplete_checkpoints(tmp_path)
    assert names(tmp_path) == [
        "checkpoint-10",
        "checkpoint-3",
        "checkpoint-5",
        "checkpoint-mine",
        "damaged-checkpoint-3",
    ]
    assert names(tmp_path / "checkpoint-5") == ["my_scores.json"]


def test_a_deletion_that_was_killed_spares_a_users_file_when_it_goes_on(tmp_path, monkeypatch):
    kept = keeper(tmp_path, 1)
    save(kept, tmp_path, 5)
    (tmp_path / "checkpoint-5" / "my_scores.json").write_text("mine")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", mock.Mock(side_effect=KeyboardInterrupt))
        save(kept, tmp_path, 10)
    assert latest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    save(kept, tmp_path, 15)
    assert names(tmp_path / "checkpoint-5") == ["my_scores.json"]


def test_a_manifest_names_nothing_outside_of_its_checkpoint_for_deletion(tmp_path):
    kept = keeper(tmp_path, 1)
    save(kept, tmp_path, 5)
    (tmp_path / "notes.txt").write_text("mine")
    manifest = tmp_path / "checkpoint-5" / MANIFEST_NAME
    *lines, last = manifest.read_text().splitlines()
    manifest.write_text("\n".join([*lines, "0  ../notes.txt", f"# {len(lines) + 1} files", ""]))
    save(kept, tmp_path, 10)
    assert names(tmp_path) == ["checkpoint-10", "notes.txt"]


def test_the_checkpoint_that_the_command_names_is_not_rotated_away(tmp_path):
    named = write(tmp_path, 5)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, save_total_limit=1, resume_from_checkpoint=str(named)
    )
    kept = CheckpointKeeper(Card(), arguments)
    for step in (10, 15):
        save(kept, tmp_path, step)
    assert names(tmp_path) == ["checkpoint-15", "checkpoint-5"]


@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
def test_a_folder_where_the_trainer_is_about_to_write_is_renamed_if_a_user_put_it_there(tmp_path, strategy):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "model.safetensors").write_text("mine")
    training = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, save_strategy=strategy, eval_strategy="steps")
    kept, state, control = keeper(tmp_path, None), TrainerState(global_step=5), TrainerControl(should_save=True)
    event = {"steps": kept.on_step_end, "epoch": kept.on_epoch_end, "best": kept.on_evaluate}[strategy]
    event(training, state, control)
    assert names(tmp_path) == ["kept-checkpoint-5"]
    assert (tmp_path / "kept-checkpoint-5" / "model.safetensors").read_text() == "mine"
