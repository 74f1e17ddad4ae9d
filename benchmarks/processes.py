"""Starts the worker processes and lets them take turns."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from cases import HEADLINE, Case

BENCHMARKS = Path(__file__).resolve().parent

# glibc gives freed memory back and asks for it again in every training step; keeping it is what one does for speed.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
# Every block above 128 KiB has pages of its own and loses them when it is freed (glibc's first setting, pinned, as it
# otherwise drifts): the resident set is then what is in use, not what a heap has kept.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}


class Worker:
    """A running worker process; `first_answer` is what it said after it had set itself up."""

    def __init__(self, case: Case, allocator: dict[str, str]):
        self.case = case
        path = os.pathsep.join(filter(None, (str(BENCHMARKS.parent), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, str(BENCHMARKS / "worker.py"), json.dumps(asdict(case))],
            env={**os.environ, **allocator, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.first_answer = self._answer()
        except BaseException:
            self.stop()
            raise

    def time(self, repeats: int) -> list[dict[str, float]]:
        """Seconds of each part of the work, for each of `repeats` iterations."""
        # One that is gone reads nothing, and how it ended is for `_answer` to say.
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{repeats}\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            why = " (killed: out of memory?)" if code == -9 else ""
            raise RuntimeError(f"The worker of {self.case.label} ended with code {code}{why}: {self.case}")
        return json.loads(line)

    def stop(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def measure_once(case: Case, keep_environment: bool = False) -> dict[str, Any]:
    """Answer of a case that measures memory, in a process of its own."""
    worker = Worker(case, {} if keep_environment else RETURN_FREED_MEMORY)
    worker.stop()
    return worker.first_answer


def time_by_turns(
    cases: list[Case],
    rounds: int,
    repeats: int,
    part: str,
    keep_environment: bool = False,
    against: Callable[[Case], Case] | None = None,
) -> dict[Case, dict[str, Any]]:
    """Times cases against each other: all processes stay alive, and in every round each has its turn alone.

    Args:
        part: which time the ratio is of, for instance "forward_backward".
        against: the one of the cases that a case's ratio is to; by default the stock BERT.

    Returns:
        For each case its median seconds by part, the `ratio` of `part` (the median over the rounds, with the smallest
        and the largest; None without a stock BERT), the work in `flops` and the `share_of_peak`: the rate of its matrix
        products, in units of the rate of a large one of torch's own of this dtype.
    """
    workers: list[Worker] = []
    seconds: dict[Case, list[list[dict[str, float]]]] = {case: [] for case in cases}
    try:
        for case in cases:
            workers.append(Worker(case, {} if keep_environment else KEEP_FREED_MEMORY))
        for _ in range(rounds):
            for worker in workers:
                seconds[worker.case].append(worker.time(repeats))
        facts = {worker.case: worker.first_answer for worker in workers}
    finally:
        for worker in workers:
            worker.stop()

    def medians(case: Case) -> dict[str, float]:
        iterations = [iteration for turn in seconds[case] for iteration in turn]
        return {name: median(iteration[name] for iteration in iterations) for name in iterations[0]}

    def by_round(case: Case) -> list[float]:
        return [median(iteration[part] for iteration in turn) for turn in seconds[case]]

    stock = next((case for case in cases if case.side == HEADLINE), None)
    # The same for every side of a dtype, and a neighbour's load can only lower it.
    rates = {
        case.dtype: max(facts[other]["matrix_product_rate"] for other in cases if other.dtype == case.dtype)
        for case in cases
    }
    results = {}
    for case in cases:
        times, ratio = medians(case), None
        denominator = stock if against is None else against(case)
        if denominator is not None:
            of_rounds = [mine / other for mine, other in zip(by_round(case), by_round(denominator), strict=True)]
            ratio = (median(of_rounds), min(of_rounds), max(of_rounds))
        flops = facts[case]["flops"]
        share = flops / times[part] / rates[case.dtype] if flops else None
        results[case] = {"seconds": times, "ratio": ratio, "flops": flops, "share_of_peak": share}
    return results
