"""A script in processes that accelerate takes for GPU processes, though they compute on the CPU and talk over gloo.

For CPU processes accelerate ignores FSDP and DeepSpeed and trains with DDP, without a word. So the questions for a GPU
are answered here; everything after them is what runs on GPUs.

    ACCELERATE_TORCH_DEVICE=cpu accelerate launch --config_file CONFIG THIS_FILE [run_clm.py, default run_mlm.py] ...
"""

import importlib
import os
import sys

from accelerate import DistributedType, PartialState
from transformers import training_args

PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
training_args.is_torch_bf16_gpu_available = lambda: True
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    # Compiling what DeepSpeed has for processes that share the memory of a CPU takes a minute. On GPUs there is no such
    # thing. (The package's attribute of that name is torch itself.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None

if __name__ == "__main__":
    script, *arguments = sys.argv[1:] if sys.argv[1].endswith(".py") else ["run_mlm.py", *sys.argv[1:]]
    importlib.import_module(script.removesuffix(".py")).main(arguments)
