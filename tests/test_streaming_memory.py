"""A stream is never held in memory. It takes minutes: python -m pytest -m long tests/test_streaming_memory.py -s"""

import random
import re
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import pytest

import run_mlm
from tests.corpus import write_corpus

ROOT = Path(__file__).parent.parent
# Next to no training, for reading is what takes the time here.
MODEL = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,num_time_steps=1"
LINES = 2_000_000
LINES_OF_A_DOCUMENT = 20
# The growth allowed between a tenth of the lines and all of them. Kept, their text alone would be four times that.
GROWTH_BYTES = 16 << 20


def write_lines(path: Path) -> None:
    """Lines of four real words, no document like another."""
    chance = random.Random(0)
    words = sorted(set(re.findall("[a-z]{3,}", " ".join(topics.values()))))
    with path.open("w", encoding="utf-8") as file:
        for number in range(1, LINES + 1):
            ends_document = number % LINES_OF_A_DOCUMENT == 0
            file.write(" ".join(chance.choices(words, k=4)) + ("\n\n" if ends_document else "\n"))


def position(process: subprocess.Popen, path: Path) -> int | None:
    """How far a process has read a file; None while it has not opened it."""
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            if descriptor.readlink() == path:
                information = Path(f"/proc/{process.pid}/fdinfo/{descriptor.name}").read_text()
                return int(information.split()[1])
        except FileNotFoundError:
            pass  # closed in between
    return None


def peak_bytes(process: subprocess.Popen) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/fdinfo").exists(), reason="asks Linux how far a file was read")
def test_memory_stays_flat_over_two_million_lines(tmp_path):
    """Real training, until the stream was read to its end; both peaks are printed."""
    lines, small = tmp_path / "lines.txt", write_corpus(tmp_path / "small.txt")
    write_lines(lines)
    size = lines.stat().st_size
    shared = [
        *("--config_overrides", MODEL, "--max_seq_length", "128", "--max_eval_samples", "8", "--spike_batches", "0"),
        *("--validation_file", str(small), "--per_device_train_batch_size", "64", "--save_strategy", "no"),
        *("--use_cpu", "--report_to", "none", "--disable_tqdm", "True"),
    ]
    # Its tokenizer, so that training one is not among what is measured.
    tokenizer = tmp_path / "tokenizer"
    once = ["--train_file", str(small), "--vocab_size", "1000", "--max_steps", "1", "--output_dir", str(tokenizer)]
    run_mlm.main([*shared, *once])
    command = [
        *(sys.executable, "run_mlm.py", *shared, "--streaming", "--train_file", str(lines), "--max_steps", "1000000"),
        *("--tokenizer_name", str(tokenizer), "--output_dir", str(tmp_path / "run")),
    ]
    peaks, furthest = {}, 0
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        while True:
            assert process.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
            read = position(process, lines) or 0
            # Looking for the first document reads its beginning as well.
            if read < furthest and furthest == size:
                break
            furthest = max(furthest, read)
            peaks[min(furthest * 10 // size, 9)] = peak_bytes(process)
            time.sleep(0.1)
        peaks[10] = peak_bytes(process)
    finally:
        process.kill()
        process.wait()
    print({f"{10 * tenth} %": f"{peak / 2**20:.0f} MiB" for tenth, peak in peaks.items()})
    assert peaks[10] - peaks[1] <= GROWTH_BYTES
