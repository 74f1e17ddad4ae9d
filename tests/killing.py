"""Starts a training command, ends it at chosen moments and finds out where the kill fell.

Nothing in the product helps: the output folder is watched, and Python's faulthandler tells what was being done. The
script is run by this file, which registers that first.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.forked_processes import ROOT, ForkedProcess

# Functions on the main thread's stack, the first that is there names what the process was doing.
_PHASES = {
    "seal": "sealing a checkpoint",
    "_rotate": "deleting old checkpoints",
    "push_while_training": "starting a push",
    "_save_checkpoint": "writing a checkpoint",
    "on_save": "after a checkpoint",
    "save_finished_model": "saving the model",
    "publish": "publishing the model",
    "evaluate": "evaluation",
    "evaluate_spikes": "evaluation",
    "training_step": "a step",
    "_run_epoch": "between steps",
    "_inner_training_loop": "beginning or end of the training",
    "record_training": "recording",
    "record_end": "recording",
    "save_metrics": "recording",
    "main": "preparing",
}
PATIENCE = 300


@dataclass
class Life:
    """One start of the command, until it ended or was ended.

    Attributes:
        code: its exit code, negative for a signal.
        steps: the optimizer steps that it logged, in order.
        phase: what its main thread did when it was killed.
        is_pushing: whether an upload was running then.
        output: what it printed.
    """

    code: int
    steps: list[int]
    phase: str
    is_pushing: bool
    output: str


@dataclass
class Command:
    """A command that trains into a folder and logs every step.

    Args:
        argv: the script and its arguments.
        folder: its --output_dir.
        scratch: a folder for what this class writes.
        steps_per_epoch: optimizer steps in one of the Trainer's epochs.
        environment: variables for it.
        launch: flags of `accelerate launch`, if that starts it.
    """

    argv: list[str]
    folder: Path
    scratch: Path
    steps_per_epoch: int
    environment: dict[str, str] = field(default_factory=dict)
    launch: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.stacks = self.scratch / "stacks"
        self.log = self.scratch / "log.txt"

    def run(
        self,
        until: Callable[[], bool] | None = None,
        delay: float = 0.0,
        end: Callable[[], None] | None = None,
        from_shell: bool = False,
    ) -> Life:
        """Starts the command and ends it so many seconds after something is so, unless it ends before.

        Args:
            until: is asked all the time; without it the command is left alone.
            delay: seconds.
            end: ends it; by default by `kill`.
            from_shell: start it as a shell does, and not as a forked process.

        Raises:
            TimeoutError: it did neither end nor do what it was waited for; it is killed then.
        """
        shutil.rmtree(self.stacks, ignore_errors=True)
        self.stacks.mkdir()
        self.log.write_text("")
        self._process = process = self._start(from_shell)
        try:
            if until is not None:
                _wait(lambda: process.poll() is not None or until())
                if process.poll() is None:
                    time.sleep(delay)
                    self._ask_for_stacks()
                    (end or self.kill)()
            _wait(lambda: process.poll() is not None, interval=0.05)
        finally:
            self.kill()
            process.wait()
        stacks = [stack.read_text() for stack in self.stacks.iterdir()]
        phases = [phase for phase in map(_phase, stacks) if phase]
        return Life(
            code=process.returncode,
            steps=self.logged_steps(),
            phase=min(phases, key=list(_PHASES.values()).index) if phases else "starting",
            is_pushing=any("create_commit" in stack or "upload_folder" in stack for stack in stacks),
            output=self.log.read_text(),
        )

    def _start(self, from_shell: bool) -> ForkedProcess | subprocess.Popen:
        own = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        environment = os.environ | self.environment | own | {"STACK_FOLDER": str(self.stacks)}
        watched = ["tests/watched.py", *self.argv]
        if not from_shell:
            return ForkedProcess(watched, environment, self.log, self.log, self.launch)
        launcher = ["-m", "accelerate.commands.launch", *self.launch] if self.launch else []
        with self.log.open("w") as log:
            command = [sys.executable, *launcher, *watched]
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def logged_steps(self) -> list[int]:
        epochs = re.findall(r"'loss': .*'epoch': '([^']+)'", self.log.read_text())
        return [round(float(epoch) * self.steps_per_epoch) for epoch in epochs]

    def processes(self) -> dict[int, str]:
        """The running processes of the script, each with its RANK, which is "" without a launcher."""
        found = {}
        for stack in self.stacks.iterdir():
            process, _, rank = stack.name.partition("-")
            # Another process may have got the number since.
            if _has_open(process, stack):
                found[int(process)] = rank
        return found

    def signal(self, number: int, rank: str | None = None) -> None:
        """Sends a signal to the process of that rank, "" for the launcher, or to all of them."""
        processes = self.processes() | ({self._process.pid: ""} if self.launch else {})
        for process, its_rank in processes.items():
            if rank in (None, its_rank):
                with suppress(ProcessLookupError):
                    os.kill(process, number)

    def kill(self) -> None:
        """Ends all processes at once."""
        self.signal(signal.SIGKILL)
        self._process.kill()

    def has_new(self, pattern: str) -> Callable[[], bool]:
        """A question: has the output folder got, or written anew, something of that name since this was called?"""
        before = {(path, path.stat().st_mtime_ns) for path in self.folder.glob(pattern)}
        return lambda: any((path, _changed(path)) not in before for path in self.folder.glob(pattern))

    def has_logged(self, count: int) -> Callable[[], bool]:
        """A question: has this life logged so many steps?"""
        return lambda: len(self.logged_steps()) >= count

    def _ask_for_stacks(self) -> None:
        asked = [self.stacks / f"{process}-{rank}" for process, rank in self.processes().items()]
        for stack in asked:
            with suppress(ProcessLookupError):
                os.kill(int(stack.name.partition("-")[0]), signal.SIGUSR1)
        deadline = time.monotonic() + 0.2
        while not all(stack.stat().st_size for stack in asked) and time.monotonic() < deadline:
            time.sleep(0.0005)


def _has_open(process: str, path: Path) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        for descriptor in Path("/proc", process, "fd").iterdir():
            with suppress(FileNotFoundError):  # closed in between
                if descriptor.readlink() == path:
                    return True
    return False


def _changed(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _phase(stack: str) -> str | None:
    """What a process was doing, from what faulthandler wrote: the main thread comes last, its innermost call first."""
    functions = set(re.findall(r" in (\S+)$", stack.strip().rpartition("\n\n")[2], re.MULTILINE))
    return next((phase for name, phase in _PHASES.items() if name in functions), None)


def _wait(condition: Callable[[], bool], interval: float = 0.001) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Waited for {PATIENCE} s.")
        time.sleep(interval)
