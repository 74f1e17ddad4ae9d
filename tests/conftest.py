import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from torch._functorch import config as functorch_config

# A fresh Hugging Face home for every test process: `datasets` caches by arguments, not by our code, so with a cache of
# yesterday a test would look at yesterday's code. It has to be set before the libraries are imported.
_home = tempfile.mkdtemp(prefix="spikelm-tests-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ["HF_HOME"] = _home
# Nothing on a hub can be reached from a test, and nothing should try; tests with a Hub of their own say so.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton's interpreter runs the kernels of a GPU on a CPU, for the tests that ask for it; it, too, looks when imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
# A run waits for the disk a hundred times, so that what it has written outlives a loss of power. No test takes the
# power away, so where there is a file system in memory with room (a container's has 64 MB), pytest's folders are there.
_memory = Path("/dev/shm")
if _memory.is_dir() and shutil.disk_usage(_memory).free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_memory))


TESTS = Path(__file__).resolve().parent
# Begun first, for a long file that is begun last leaves all processes but one without work.
LONG_FILES = """
    test_kill_anywhere.py accelerate_configs/test_accelerate_configs.py test_run_mlm.py glue_tasks/test_run_glue.py
    benchmarks/test_commands.py benchmarks/test_ablation.py test_flags.py test_hub.py test_run_distill.py
    test_run_summarization.py test_safety.py test_hub_server.py test_distributed_training.py test_resuming.py
    test_run_clm.py modeling_spikelm/test_remote_code.py deployment/test_onnx.py spike_metrics/test_commands.py
    space/test_app.py space/test_browser.py modeling_spikelm/test_compiled_kernels.py
""".split()


def pytest_collection_modifyitems(items):
    places = {(TESTS / name).resolve(strict=True): place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish():
    """The Trainer collects garbage several times in a run, and looks through all that was ever imported: half a second
    of a run that takes one. What is there before the first test is there for good, and need not be looked at."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def environment_of_its_own():
    """TrainingArguments write what they were asked for, FSDP for instance, into the environment, where accelerate looks
    for it; the arguments of a later test in the same process would then be others. So would the settings of its
    compiler (experiment/arguments.py)."""
    with mock.patch.dict(os.environ), functorch_config.patch(donated_buffer=functorch_config.donated_buffer):
        yield
