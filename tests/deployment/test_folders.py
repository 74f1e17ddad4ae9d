"""Where exports go: a folder that is there as a whole or not at all."""

import pytest

from deployment.folders import filled, refuse_used


def test_a_folder_is_there_when_it_is_complete(tmp_path):
    output = tmp_path / "new/mine"
    with filled(output) as folder:
        (folder / "one.txt").write_text("1")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["one.txt"] and list(output.parent.iterdir()) == [output]


def test_what_fails_leaves_nothing_behind_and_an_empty_folder_empty(tmp_path):
    output = tmp_path / "mine"
    output.mkdir()
    with pytest.raises(RuntimeError), filled(output) as folder:
        (folder / "one.txt").write_text("1")
        raise RuntimeError
    assert list(tmp_path.rglob("*")) == [output]


def test_a_used_folder_and_a_file_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for used in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="is not empty; name another folder"):
            refuse_used(used)
    refuse_used(tmp_path / "new")
