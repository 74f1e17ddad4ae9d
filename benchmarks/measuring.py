"""Clocks and memory gauges, used inside a worker process."""

import ctypes
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def now(device: str) -> float:
    """Seconds, after everything queued on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products (attention included) that `work` does."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def matrix_product_rate(device: str, dtype: torch.dtype, shape: str) -> float:
    """FLOP/s of a large square matrix product: the median of several. A toy shape's is small: it is for trying."""
    size = 128 if shape == "tiny" else 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        start = now(device)
        a @ b
        seconds.append(now(device) - start)
    return 2 * size**3 / sorted(seconds[2:])[3]


def free_unused_memory() -> None:
    """Gives what the allocator of the C library has kept back to the system."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


class ResidentPeak:
    """Growth of the resident set: `above_start()` is the highest it has been since construction, minus then.

    On a GPU it is the memory of the caching allocator that was in use. On Linux the kernel's own high-water mark is
    read, so that nothing is missed; resetting it takes a kernel that has /proc/self/clear_refs.
    """

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            free_unused_memory()
            Path("/proc/self/clear_refs").write_text("5")
            self.start = _process_status("VmRSS")

    def above_start(self) -> int:
        """Bytes."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.start
        return _process_status("VmHWM") - self.start


def _process_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory on the CPU is measured on Linux only.")


def allocated_peak(work: Callable[[], object]) -> int:
    """Bytes: peak of what PyTorch's CPU allocator holds while `work` runs, above what it held before.

    Exact and repeatable, but blind to memory that PyTorch does not allocate itself (oneDNN's and BLAS' buffers).
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak
