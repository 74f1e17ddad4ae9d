"""Real processes (gloo): every process ends with the amplitudes of one process on the joined batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import SpikeLMForMaskedLM, SpikingNeurons

ROOT = Path(__file__).parent.parent.parent
SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# Rank 0 has three rows, rank 1 one: the mean has to be over positions, not over ranks.
WORKER = """
import json, os, sys
import torch, torch.distributed as dist
from modeling_spikelm import SpikeLMConfig, SpikeLMForMaskedLM, SpikingNeurons
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = SpikeLMForMaskedLM(SpikeLMConfig(**json.loads(sys.argv[1])))
rows = torch.arange(24).view(4, 6)[: 3] if rank == 0 else torch.arange(24).view(4, 6)[3 :]
if sys.argv[2] == "train":
    model = torch.nn.parallel.DistributedDataParallel(model.train(), broadcast_buffers=False)
    model(input_ids=rows)
    model = model.module
else:
    model.calibrate([{"input_ids": rows}])
amplitudes = [m.amplitude.tolist() for m in model.modules() if isinstance(m, SpikingNeurons)]
open(os.path.join(sys.argv[3], f"rank{rank}.json"), "w").write(json.dumps(amplitudes))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["train", "calibrate"])
def test_two_processes_with_unequal_batches_agree(how, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    done = subprocess.run(
        [*command, json.dumps(SIZES), how, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [torch.tensor(json.loads((tmp_path / f"rank{rank}.json").read_text())) for rank in (0, 1)]
    assert torch.equal(ranks[0], ranks[1])
    torch.manual_seed(0)
    model = SpikeLMForMaskedLM(SpikeLMConfig(**SIZES))
    rows = torch.arange(24).view(4, 6)
    if how == "train":
        model.train()(input_ids=rows)
    else:
        model.calibrate([{"input_ids": rows[:3]}, {"input_ids": rows[3:]}])
    alone = torch.stack([m.amplitude for m in model.modules() if isinstance(m, SpikingNeurons)])
    torch.testing.assert_close(ranks[0], alone, rtol=1e-6, atol=1e-6)
