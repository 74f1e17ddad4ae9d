import json
import os
from pathlib import Path

import pytest

from experiment.durable_files import write_durably
from experiment.written_files import LIST_NAME, RECORD_NAME, REPLACED_PREFIX, WrittenFiles, described, is_output_folder


def write(folder: Path, *names: str) -> WrittenFiles:
    """Files as a run writes them, each with its name as its content."""
    written = WrittenFiles(folder)
    with written.writing(*names):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_durably(folder / name, name)
    return written


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(LIST_NAME))
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_only_what_a_run_wrote_and_nobody_changed_is_its_own(tmp_path):
    assert not is_output_folder(tmp_path)
    written = write(tmp_path, "config.json", "README.md")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text("my own words")
    assert is_output_folder(tmp_path)
    assert written.paths() == ["config.json"]
    assert "README.md" not in written and "notes.txt" not in written and "gone" not in written


def test_what_somebody_else_has_under_a_name_is_renamed_and_never_replaced(tmp_path, caplog):
    written = write(tmp_path, "README.md")
    for words in ("first words", "second words"):
        (tmp_path / "README.md").write_text(words)
        write(tmp_path, "README.md")
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "mine.txt").write_text("mine")
    written.claim("checkpoint-4")
    assert contents(tmp_path) == {
        "README.md": "README.md",
        "kept-README.md": "first words",
        "kept-README.md-2": "second words",
        "kept-checkpoint-4/mine.txt": "mine",
    }
    assert f"it is now {tmp_path / 'kept-README.md'}" in caplog.text


def test_a_file_that_a_kill_left_half_written_is_the_runs_own(tmp_path):
    with pytest.raises(KeyboardInterrupt), WrittenFiles(tmp_path).writing("model.safetensors"):
        (tmp_path / "model.safetensors").write_text("ha")
        raise KeyboardInterrupt
    assert WrittenFiles(tmp_path).paths() == ["model.safetensors"]


def folder_of_runs(folder: Path) -> dict[str, str]:
    """Two runs and a table in one folder, and what a user has put beside and among them."""
    write(folder, RECORD_NAME, "submission/RTE.tsv", "table.md")
    WrittenFiles(folder).claim("rte/", "mnli/seed_1/")
    write(folder / "rte", RECORD_NAME, "model.safetensors", "checkpoint-4/weights")
    write(folder / "mnli" / "seed_1", RECORD_NAME, "model.safetensors")
    users = {"rte/notes.txt": "mine", "submission/paper.pdf": "mine", "checkpoint-mine/weights": "mine"}
    for name, text in users.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return users


def test_runs_within_a_folder_move_with_it_and_can_be_moved_back_and_a_users_files_stay(tmp_path):
    users = folder_of_runs(tmp_path)
    before = contents(tmp_path)
    paths = WrittenFiles(tmp_path).paths()
    assert set(paths) == before.keys() - users.keys()
    aside = WrittenFiles(tmp_path).move_aside(paths, REPLACED_PREFIX)
    assert aside == tmp_path / "replaced-1"
    assert contents(aside) == {name: before[name] for name in paths}
    assert {name: text for name, text in contents(tmp_path).items() if not name.startswith("replaced-1/")} == users
    assert not (tmp_path / "mnli").exists()
    assert WrittenFiles(tmp_path).paths() == []
    # What was moved knows what it is, so a user who moves it back has the runs again.
    assert sorted(WrittenFiles(aside).paths()) == sorted(paths)


def test_a_move_that_is_killed_anywhere_loses_nothing_and_goes_on_into_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # of no use against a kill, and slow
    replace, moves = os.replace, 0
    for killed_at in range(100):
        folder = tmp_path / str(killed_at)
        folder_of_runs(folder)
        before, moves = contents(folder), 0

        def until_killed(source, target, killed_at=killed_at):
            nonlocal moves
            moves += 1
            if moves > killed_at:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", until_killed)
            try:
                WrittenFiles(folder).move_aside(WrittenFiles(folder).paths(), REPLACED_PREFIX)
                break
            except KeyboardInterrupt:
                pass
        left = contents(folder)
        assert {name.removeprefix("replaced-1/"): text for name, text in left.items()} == before
        assert len(left) == len(before)
        WrittenFiles(folder).move_aside(WrittenFiles(folder).paths(), REPLACED_PREFIX)
        assert not (folder / "replaced-2").exists()
        assert len([name for name in contents(folder) if name.startswith("replaced-1/")]) == 8
    assert killed_at > 8


def test_what_will_be_deleted_is_said_by_name_and_size_the_largest_first(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    sizes = {"checkpoint-4/a": 1_500_000, "checkpoint-4/b": 500_000, "b.txt": 1200, "a.txt": 7} | dict.fromkeys(
        "cdef", 1
    )
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert described(tmp_path, ["a.txt", "b.txt", "checkpoint-4", *"cdef"]) == (
        "checkpoint-4 (2.0 MB), b.txt (1.2 kB), a.txt (7 bytes), c (1 bytes), d (1 bytes), 2 more (2 bytes)"
    )


def test_a_command_that_can_go_elsewhere_refuses_to_replace_somebody_elses_files(tmp_path):
    written = write(tmp_path, "index.html", "energy.png")
    written.refuse_others("index.html", "energy.png", "new.png")
    (tmp_path / "index.html").write_text("my home page")
    with pytest.raises(ValueError, match="holds index.html, which this command did not write"):
        written.refuse_others("index.html", "energy.png", "new.png")


@pytest.mark.parametrize("name", ["../mine.txt", "/mine.txt", "a/../../mine.txt"])
def test_a_list_reaches_no_further_than_its_folder(tmp_path, name):
    (tmp_path / LIST_NAME).write_text(json.dumps({name: None}))
    with pytest.raises(ValueError, match=f"lists {name}, which is not in its folder"):
        WrittenFiles(tmp_path).paths()
