"""Two processes (gloo) calibrate and train an encoder and a decoder as one does, on whole and on sharded weights."""

import torch

from tests.forked_processes import launch_forked
from tests.modeling_spikelm.test_bart import make_model

# Of every process two rows; all that is written has the same length, so that the mean of two losses is that of one.
ROWS = torch.arange(4 * 6).view(4, 6) + 3
TARGETS = ROWS.flip(1)[:, :4].contiguous()
WORKER = """
import sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tests.modeling_spikelm.test_bart import make_model
from tests.modeling_spikelm.test_bart_distributed import ROWS, TARGETS, state_after_a_step
dist.init_process_group("gloo")
rank = dist.get_rank()
mine = slice(2 * rank, 2 * rank + 2)
for how in ("ddp", "fsdp2"):
    model = make_model(calibrated=False).train()
    if how == "ddp":
        # Without broadcast_buffers nothing but the calibration itself makes the amplitudes equal.
        trained = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    else:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for module in model.modules():
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=mesh)
        trained = fully_shard(model, mesh=mesh)
    state = state_after_a_step(trained, model, ROWS[mine], TARGETS[mine])
    torch.save(state, f"{sys.argv[1]}/{how}{rank}.pt")
dist.destroy_process_group()
"""


def state_after_a_step(trained, model, rows, targets) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trained(input_ids=rows, labels=targets).loss.backward()
    optimizer.step()
    state = model.state_dict()
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def test_two_processes_take_the_step_of_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    argv = [str(tmp_path / "worker.py"), str(tmp_path)]
    done = launch_forked("two_cpu_processes", argv, "--num_processes", "2", PYTHONPATH=".")
    assert done.returncode == 0, done.stderr[-2000:]
    model = make_model(calibrated=False).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alone = state_after_a_step(model, model, ROWS, TARGETS)
    for name in ("ddp0", "ddp1", "fsdp20", "fsdp21"):
        found = torch.load(tmp_path / f"{name}.pt")
        assert found.keys() == alone.keys()
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    assert all(not torch.equal(value, before[name]) for name, value in alone.items() if name != "final_logits_bias")
