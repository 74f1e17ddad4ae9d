"""Starts a training command, ends it at chosen moments and finds out where the kill fell.

Nothing in the product helps: the output folder is watched, and Python's faulthandler tells what was being done.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Python imports this at its start, in launched processes as well: SIGUSR1 then writes where the process is.
_SHOW_STACK = """import faulthandler, os, signal
faulthandler.register(signal.SIGUSR1, open(os.environ["STACK_FOLDER"] + f"/{os.getpid()}", "w"), all_threads=True)
"""
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
        argv: the command.
        folder: its --output_dir.
        scratch: a folder for what this class writes.
        steps_per_epoch: optimizer steps in one of the Trainer's epochs.
        environment: variables for it.
    """

    argv: list[str]
    folder: Path
    scratch: Path
    steps_per_epoch: int
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)
        (self.scratch / "sitecustomize.py").write_text(_SHOW_STACK)
        self.stacks = self.scratch / "stacks"
        self.log = self.scratch / "log.txt"

    def run(
        self,
        until: Callable[[], bool] | None = None,
        delay: float = 0.0,
        end: Callable[[], None] | None = None,
    ) -> Life:
        """Starts the command and ends it so many seconds after something is so, unless it ends before.

        Args:
            until: is asked all the time; without it the command is left alone.
            delay: seconds.
            end: ends it; by default by `kill`.

        Raises:
            TimeoutError: it did neither end nor do what it was waited for; it is killed then.
        """
        shutil.rmtree(self.stacks, ignore_errors=True)
        self.stacks.mkdir()
        own = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(self.scratch)}
        environment = os.environ | self.environment | own | {"STACK_FOLDER": str(self.stacks)}
        with open(self.log, "w") as log:
            self._process = process = subprocess.Popen(self.argv, cwd=ROOT, env=environment, stdout=log, stderr=log)
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

    def logged_steps(self) -> list[int]:
        epochs = re.findall(r"'loss': .*'epoch': '([^']+)'", self.log.read_text())
        return [round(float(epoch) * self.steps_per_epoch) for epoch in epochs]

    def processes(self) -> dict[int, str]:
        """The running Python processes of the command, each with its RANK, which is "" for a launcher."""
        mine = f"STACK_FOLDER={self.stacks}".encode()
        found = {}
        for stack in self.stacks.iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                variables = Path("/proc", stack.name, "environ").read_bytes().split(b"\0")
                if mine in variables:
                    ranks = [entry[5:].decode() for entry in variables if entry.startswith(b"RANK=")]
                    found[int(stack.name)] = ranks[0] if ranks else ""
        return found

    def signal(self, number: int, rank: str | None = None) -> None:
        """Sends a signal to the process of that rank, or to all of them."""
        for pid, its_rank in self.processes().items():
            if rank in (None, its_rank):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

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
        asked = [self.stacks / str(pid) for pid in self.processes()]
        self.signal(signal.SIGUSR1)
        deadline = time.monotonic() + 0.2
        while not all(stack.stat().st_size for stack in asked) and time.monotonic() < deadline:
            time.sleep(0.0005)


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
