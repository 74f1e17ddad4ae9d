"""Two processes (gloo) that share out the levels of learned neurons (FSDP2) do with them what one process does."""

import pytest
import torch

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import SpikeLMForMaskedLM
from tests.forked_processes import launch_forked

# Of every process two rows.
ROWS = torch.arange(4 * 6).view(4, 6) + 3
WORKER = """
import sys
import torch, torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from tests.modeling_spikelm.test_sharded_levels import ROWS, make_model, state, step
dist.init_process_group("gloo")
rank = dist.get_rank()
rows = ROWS[2 * rank : 2 * rank + 2]
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
for reshards in (True, False):
    found = {}
    model = make_model(sys.argv[2])
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshards)
    model = fully_shard(model, mesh=mesh)
    assert type(model.bert.encoder.layer[0].output.neurons.amplitude).__name__ == "DTensor"
    try:
        model(input_ids=rows, labels=rows)
    except RuntimeError as error:
        found["refused"] = str(error)
    model.calibrate({"input_ids": rows})
    found["calibrated"] = state(model)
    step(model, rows)
    found["trained"] = state(model)
    other = make_model(sys.argv[2])
    other.calibrate({"input_ids": ROWS})
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, other.state_dict(), options=options)
    found["loaded"] = state(model)
    torch.save(found, f"{sys.argv[1]}/{reshards}{rank}.pt")
dist.destroy_process_group()
"""


def make_model(neuron: str) -> SpikeLMForMaskedLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return SpikeLMForMaskedLM(SpikeLMConfig(**sizes, num_time_steps=2, neuron=neuron)).train()


def step(model, rows) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()


def state(model) -> dict[str, torch.Tensor]:
    items = model.state_dict().items()
    return {name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone() for name, value in items}


@pytest.mark.parametrize("neuron", ["learned", "thrifty"])
def test_two_processes_calibrate_train_and_load_levels_as_one_does(neuron, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    argv = [str(tmp_path / "worker.py"), str(tmp_path), neuron]
    done = launch_forked("two_cpu_processes", argv, "--num_processes", "2", PYTHONPATH=".")
    assert done.returncode == 0, done.stderr[-3000:]
    model = make_model(neuron)
    # Each process has batches of its own, of which the mean is taken.
    model.calibrate([{"input_ids": ROWS[:2]}, {"input_ids": ROWS[2:]}])
    calibrated = state(model)
    step(model, ROWS)
    trained = state(model)
    other = make_model(neuron)
    other.calibrate({"input_ids": ROWS})
    loaded = state(other)
    levels = [name for name in trained if name.endswith("neurons.log_scale")]
    assert any(not torch.equal(trained[name], calibrated[name]) for name in levels)
    assert any(not torch.equal(loaded[name], calibrated[name]) for name in levels)
    for name in ("True0", "True1", "False0", "False1"):
        found = torch.load(tmp_path / f"{name}.pt")
        assert "Call model.calibrate(batches) before, on every process" in found["refused"]
        torch.testing.assert_close(found["calibrated"], calibrated, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["trained"], trained, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["loaded"], loaded, rtol=0, atol=0)
