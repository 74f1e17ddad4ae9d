"""Real processes (gloo): every process ends with the amplitudes of one process on the joined batch."""

import json

import pytest
import torch

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import SpikeLMForMaskedLM, SpikingNeurons
from tests.forked_processes import launch_forked

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# Rows of each process: the mean has to be over positions, not over processes.
SHARES = [(3, 1), (2, 4, 1)]
WORKER = """
import json, os, sys
import torch, torch.distributed as dist
from modeling_spikelm import SpikeLMConfig, SpikeLMForMaskedLM, SpikingNeurons
sizes, how, shares, folder = json.loads(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = SpikeLMForMaskedLM(SpikeLMConfig(**sizes))
rows = torch.arange(sum(shares) * 6).view(-1, 6).split(shares)[rank]
if how == "train":
    # Without broadcast_buffers nothing but the calibration itself makes the amplitudes equal.
    model = torch.nn.parallel.DistributedDataParallel(model.train(), broadcast_buffers=False)
    model(input_ids=rows)
    model = model.module
else:
    model.calibrate([{"input_ids": rows}])
amplitudes = [m.amplitude.tolist() for m in model.modules() if isinstance(m, SpikingNeurons)]
open(os.path.join(folder, f"rank{rank}.json"), "w").write(json.dumps(amplitudes))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["train", "calibrate"])
@pytest.mark.parametrize("shares", SHARES, ids=["two-processes", "three-processes"])
def test_processes_with_unequal_batches_agree_with_one_on_the_joined_batch(how, shares, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    argv = [str(worker), json.dumps([SIZES, how, shares, str(tmp_path)])]
    done = launch_forked("two_cpu_processes", argv, "--num_processes", str(len(shares)))
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [torch.tensor(json.loads((tmp_path / f"rank{rank}.json").read_text())) for rank in range(len(shares))]
    for other in ranks[1:]:
        assert torch.equal(ranks[0], other)
    torch.manual_seed(0)
    model = SpikeLMForMaskedLM(SpikeLMConfig(**SIZES))
    rows = torch.arange(sum(shares) * 6).view(-1, 6)
    if how == "train":
        model.train()(input_ids=rows)
    else:
        model.calibrate([{"input_ids": share} for share in rows.split(shares)])
    alone = torch.stack([m.amplitude for m in model.modules() if isinstance(m, SpikingNeurons)])
    torch.testing.assert_close(ranks[0], alone, rtol=1e-6, atol=1e-6)
