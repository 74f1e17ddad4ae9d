"""The command for a card runs on a CPU at toy size; what it finds on a card, a card has to say."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from configuration_spikelm.configuration_spiking import NEURONS

ROOT = Path(__file__).resolve().parents[2]
TOY = "--device cpu --shape tiny --batch_size 4 --length 8 --num_time_steps 2 --repeats 1 --no_compiled".split()
BLOCKED = "import sys; sys.modules.update(dict.fromkeys(('datasets', 'evaluate', 'sklearn', 'accelerate')));"


def test_every_path_keeps_parity_and_every_side_is_timed_with_torch_and_transformers_alone(tmp_path):
    code = f"{BLOCKED} import runpy; runpy.run_path('benchmarks/gpu.py', run_name='__main__')"
    finished = subprocess.run(
        [sys.executable, "-c", code, *TOY, "--output", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "benchmarks")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    parity, neurons, timed = (run["rows"] for run in json.loads((tmp_path / "gpu.json").read_text()))
    assert {(row["holds"], row["note"]) for row in parity + neurons} == {("yes", None)}
    assert {"default", "oracle", "checkpointing", "-triton_neurons", "-packed_spikes"} <= {r["path"] for r in parity}
    assert {row["neuron"] for row in neurons} == set(NEURONS)
    assert all(row["ms"] > 0 and row["note"] is None for row in timed), timed
    spiking = {
        "spikelm T=2",
        "spikelm T=2 -triton_neurons",
        "spikelm T=2 -triton_dropout",
        "spikelm-int8 T=2",
        "oracle T=2",
    }
    assert {row["side"] for row in timed} == {"bert"} | spiking
    assert all(row["ratio to bert"] is not None for row in timed)
    # Whoever stops the command before its end has what was printed.
    printed = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    assert len(printed) == len(parity + neurons + timed)
    assert {row["work"] for row in timed} == {"training", "training, checkpointing", "inference"}
    # What no card has measured yet comes first, for the time may end.
    before_parity = [row["side"] for row in printed[: printed.index(parity[0])]]
    assert before_parity[:2] == ["bert", "spikelm T=2"] and before_parity.count("spikelm-int8 T=2") == 2
    assert {"oracle T=2", "spikelm T=2 -triton_neurons"}.isdisjoint(before_parity)


def test_a_side_that_fails_or_does_not_end_stops_no_other_and_says_why(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py"])

    def fails():
        raise RuntimeError("out of memory\nand a trace")

    def never_ends():
        while True:
            time.sleep(0.01)

    work = [({"side": "a"}, fails), ({"side": "b"}, lambda: {"ms": 1.0}), ({"side": "c"}, never_ends)]
    arguments = gpu.Arguments(device="cpu", output=str(tmp_path))
    gpu.table(arguments, time.monotonic() + 5, "Times", [*work, ({"side": "d"}, lambda: {"ms": 2.0})])
    (run,) = json.loads((tmp_path / "gpu.json").read_text())
    no_time = "TimeoutError: no time left"
    assert [(row["side"], row["ms"], row["note"]) for row in run["rows"]] == [
        ("a", None, "RuntimeError: out of memory"),
        ("b", 1.0, None),
        ("c", None, no_time),
        ("d", None, no_time),
    ]
