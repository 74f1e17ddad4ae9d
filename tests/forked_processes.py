"""Real processes that do not each import torch, transformers and datasets anew, which takes six seconds of a core.

They are forked from one process that has imported the scripts and has done nothing else (multiprocessing's forkserver).
To signals, /proc, gloo and the file system they are processes like any other. What they do not show is that a script
starts from a shell: tests/accelerate_configs, tests/test_hub.py and others do that.
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["run_mlm", "run_glue", "accelerate.commands.launch"])


class ForkedProcess:
    """`python script arguments` in the repository's folder, and what of subprocess.Popen's interface is used of it.

    Args:
        argv: the script and its arguments.
        environment: all of its variables. Of those that libraries look up as they are imported it has the tests' own.
        stdout, stderr: files to append to; they may be the same.
        launch: flags of `accelerate launch`, which then starts the script, in processes forked once more.
    """

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        stdout: Path,
        stderr: Path,
        launch: Sequence[str] = (),
    ) -> None:
        self._process = _context.Process(target=_become, args=(argv, dict(environment), stdout, stderr, launch))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.returncode

    def kill(self) -> None:
        self._process.kill()


def run_forked(
    argv: Sequence[str], launch: Sequence[str] = (), timeout: float = 600, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end, with more environment variables.

    Raises:
        subprocess.TimeoutExpired: it did not end in so many seconds, and was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = ForkedProcess(argv, os.environ | variables, stdout, stderr, launch)
        try:
            process.wait(timeout)
        finally:
            process.kill()
            process.wait()
        return subprocess.CompletedProcess(argv, process.returncode, stdout.read_text(), stderr.read_text())


def launch_forked(
    configuration: str, argv: Sequence[str], *flags: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with a file of accelerate_configs/ and more flags, on a port that is free."""
    launch = ["--config_file", f"accelerate_configs/{configuration}.yaml", "--main_process_port", "0", *flags]
    return run_forked(argv, launch, **variables)


def _become(
    argv: Sequence[str], environment: dict[str, str], stdout: Path, stderr: Path, launch: Sequence[str]
) -> None:
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    if launch:
        _accelerate_launch(argv, launch)
    else:
        sys.argv = [*argv]
        # As `python script` does, for what stands beside it.
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        runpy.run_path(argv[0], run_name="__main__")


def _accelerate_launch(argv: Sequence[str], launch: Sequence[str]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    arguments = launch_command_parser().parse_args([*launch, *argv])
    # torchrun's own flags, which accelerate hands on to it.
    arguments.run_path, arguments.start_method = True, "fork"
    launch_command(arguments)
