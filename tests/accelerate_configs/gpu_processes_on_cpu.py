"""run_mlm.py in processes that accelerate takes for GPU processes, though they compute on the CPU and talk over gloo.

For CPU processes accelerate ignores FSDP and DeepSpeed and trains with DDP, without a word. So the questions for a GPU
are answered here; everything after them is what runs on GPUs.

    ACCELERATE_TORCH_DEVICE=cpu accelerate launch --config_file CONFIG THIS_FILE ...
"""

import sys

from accelerate import DistributedType, PartialState
from transformers import training_args

PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
training_args.is_torch_bf16_gpu_available = lambda: True

if __name__ == "__main__":
    import run_mlm

    run_mlm.main(sys.argv[1:])
