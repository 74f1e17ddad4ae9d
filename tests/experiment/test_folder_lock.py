"""Two commands in one output folder, in processes of their own, one of which is killed."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiment.folder_lock import LOCK_NAME, lock_folder, unlocking_folders
from experiment.run_record import RunRecord
from experiment.written_files import is_new

ROOT = Path(__file__).resolve().parents[2]
OTHER = """
import sys
from pathlib import Path
from experiment.folder_lock import lock_folder
print(lock_folder(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, tmp_path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "None\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_which_another_command_runs_is_refused_and_its_kill_frees_it(tmp_path, other):
    record = RunRecord(tmp_path, {"seed": 1}, "data")
    with pytest.raises(ValueError, match=f"Another command is running in the output folder .*process {other.pid} on"):
        record.open()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert is_new(tmp_path)
    with unlocking_folders():
        assert record.open() is None
    assert record.check() is None and not (tmp_path / LOCK_NAME).exists()


def test_a_folder_is_locked_until_the_script_ends_and_by_its_process_as_often_as_it_likes(tmp_path):
    asks = [sys.executable, "-c", OTHER, str(tmp_path)]

    def another() -> str:
        return subprocess.run(asks, cwd=ROOT, input="", capture_output=True, text=True, check=True).stdout

    with pytest.raises(KeyError), unlocking_folders():
        assert lock_folder(tmp_path) is None and lock_folder(tmp_path) is None
        assert another().startswith("process ")
        raise KeyError
    assert another() == "None\n"
