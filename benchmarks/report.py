"""Prints a table of results and keeps it, with its command and machine, as JSON and Markdown."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
# Of the last minute, before the command does anything: what else has had the machine's cores.
LOAD_BEFORE = os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def machine(device: str) -> dict[str, Any]:
    """What a figure depends on besides the command."""
    facts = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": None if LOAD_BEFORE is None else round(LOAD_BEFORE, 1),
        # Whether a thread that has nothing to do spins (and costs its core) or sleeps (and has to be woken).
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "system": platform.system(),
    }
    return {**facts, "gpu": torch.cuda.get_device_name()} if device == "cuda" else facts


def report(
    benchmark: str, title: str, rows: list[Row], device: str, output: str | None, notes: Sequence[str] = ()
) -> None:
    """Prints `rows` as a table and, with an `output` folder, keeps it there."""
    print_table(title, rows, notes)
    if output is not None:
        keep(benchmark, title, rows, device, output, notes)


def print_table(title: str, rows: list[Row], notes: Sequence[str] = ()) -> None:
    """Prints `rows` as a Markdown table, with the notes below it."""
    table = "\n".join([*markdown_table(rows), *(line for note in notes for line in ("", note))])
    print(f"\n{title}\n\n{table}", flush=True)


def keep(
    benchmark: str,
    title: str,
    rows: list[Row],
    device: str,
    output: str,
    notes: Sequence[str] = (),
    path_names: Mapping[str, str] | None = None,
) -> None:
    """Writes `<benchmark>.json` and `.md` in the folder `output`.

    A run of the same command on the same machine takes the place of the earlier one; others are kept. Of the flags in
    `path_names`, the command shows these names in place of the paths.
    """
    run = {
        "title": title,
        "command": command(path_names or {}),
        "machine": machine(device),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": project_commit(),
        "notes": list(notes),
        "rows": rows,
    }
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    store, page = folder / f"{benchmark}.json", folder / f"{benchmark}.md"
    runs = _kept_runs(store, page)
    runs = [other for other in runs if _identity(other) != _identity(run)] + [run]
    _replace(store, json.dumps(runs, indent=1) + "\n")
    _replace(page, page_of(benchmark, runs))


def page_of(benchmark: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """What `<benchmark>.md` shows of the runs in `<benchmark>.json`."""
    return f"# {benchmark}\n\n" + "\n".join(map(_section, runs))


def _kept_runs(store: Path, page: Path) -> list[dict[str, Any]]:
    """The runs in a result file, which is there with its page or neither is."""
    try:
        runs = json.loads(store.read_text()) if store.exists() else []
        are_own = store.exists() == page.exists() and all({"title", "command", "rows"} <= run.keys() for run in runs)
    except (ValueError, AttributeError):
        are_own = False
    if not are_own:
        sys.exit(
            f"{store} or {page.name} beside it is no result of this command and is left as it is: --output another."
        )
    return runs


def command(path_names: Mapping[str, str]) -> str:
    """The command line to type in the project's root, without flags that change no figure."""
    arguments: list[str] = []
    for argument in sys.argv[1:]:
        arguments += argument.split("=", 1) if argument.startswith("--") else [argument]
    if "--table_only" in arguments:
        # It shows what was trained by the command without it.
        position = arguments.index("--table_only")
        has_value = not (arguments[position + 1 :] or ["--"])[0].startswith("--")
        del arguments[position : position + 1 + has_value]
    if "--output" in arguments:
        position = arguments.index("--output")
        del arguments[position : position + 2]
    for flag, name in path_names.items():
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = name
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def markdown_table(rows: list[Row]) -> list[str]:
    """Lines of a table whose columns are the keys of the first row."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([cell_text(row[column]) for column in columns] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def ratio_text(ratio: tuple[float, float, float] | None) -> str | None:
    """`median (smallest .. largest round)`."""
    return None if ratio is None else "{:.2f} ({:.2f} .. {:.2f})".format(*ratio)


def _section(run: Mapping[str, Any]) -> str:
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in run["machine"].items())
    lines = [
        f"## {run['title']}",
        "",
        f"`{run['command']}`",
        "",
        f"{run['date']}, commit {run['commit']}; {facts}",
        "",
        *markdown_table(run["rows"]),
        "",
    ]
    return "\n".join([*lines, *(line for note in run["notes"] for line in (note, ""))])


def cell_text(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)


def _identity(run: dict[str, Any]) -> tuple:
    # Two machines may have processors of one name.
    facts = ("cpu", "cores", "threads", "wait_policy", "vector_instructions", "torch", "gpu")
    return run["title"], run["command"], *(run["machine"].get(fact) for fact in facts)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def project_commit() -> str:
    """The commit that is checked out, with "-dirty" where files differ from it when a command first asks: the tables
    that it writes itself are no part of what made them."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _replace(path: Path, text: str) -> None:
    new = path.with_suffix(path.suffix + ".new")
    new.write_text(text)
    new.replace(path)
