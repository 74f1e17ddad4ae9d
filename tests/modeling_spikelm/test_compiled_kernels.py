"""The interpreter runs what a compiler might refuse; here every kernel is compiled, for a card that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"_emit", "_pass_back", "_pass_back_levels", "_unpack", "_drop", "_emit_from", "_floats_of", "_trial"}


def test_every_kernel_compiles_divides_exactly_and_reaches_all_of_memory_in_wide_pieces(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("compile_kernels.py")
    finished = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stderr
    compiled = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    assert {each["kernel"] for each in compiled} == KERNELS
    for each in compiled:
        # A byte or two at a time, a card moves a fraction of what it can.
        narrow = {access for access in each["accesses"] if access.endswith(("8", "16"))}
        assert not narrow, each
        assert set(each["quotients"]) <= {"div.rn", "div.s32", "div.u32", "div.s64", "div.u64"}, each
        assert each["kernel"] == "_trial" or set(each["offsets"]) == {"i64"}, each
        assert each["kernel"] == "_trial" or any(".v4." in access for access in each["accesses"]), each
