"""Against numbers of the reference implementation (tests/fixtures, float32, dropout 0)."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configuration_spikelm import SpikeLMConfig
from modeling_spikelm import SpikeLMForPreTraining, convert_reference_state_dict, launching
from modeling_spikelm.fast_paths import FAST_PATHS

FIXTURES = Path(__file__).parent.parent / "fixtures"
FORWARD, GRADIENT = 1e-5, 1e-4


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def golden(steps: int, attention: str = "eager"):
    fields = json.loads((FIXTURES / f"official_T{steps}.json").read_text())
    del fields["encoder_hidden_act"]
    config = SpikeLMConfig(**fields, attn_implementation=attention)
    return config, load_file(FIXTURES / f"official_T{steps}.safetensors")


@pytest.mark.parametrize(
    ("steps", "attention", "path"),
    [*product((4, 1), ("eager", "sdpa"), ("default", "oracle")), (4, "sdpa", "triton")],
    ids=lambda value: f"T{value}" if isinstance(value, int) else value,
)
def test_two_training_steps_equal_the_reference(steps, attention, path, monkeypatch):
    if path == "oracle":
        monkeypatch.setattr(FAST_PATHS, "fused_neurons", False)
    if path == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(launching, "is_eager_on_gpu", lambda tensor: True)
    config, tensors = golden(steps, attention)
    reference = convert_reference_state_dict(part(tensors, "state."), config)
    model = SpikeLMForPreTraining(config)
    model.load_state_dict(reference)
    model.reset_calibration()
    model.train()
    last_hidden_states = []
    model.bert.encoder.register_forward_hook(lambda *args: last_hidden_states.append(args[-1]))
    for number in (0, 1):
        expected = part(tensors, f"step{number}.")
        model.zero_grad()
        output = model(**part(expected, "in."))
        output.loss.backward()
        assert error(output.loss, expected["loss"]) <= FORWARD
        assert error(output.prediction_logits, expected["prediction_logits"]) <= FORWARD
        assert error(output.seq_relationship_logits, expected["seq_relationship_logits"]) <= FORWARD
        assert error(last_hidden_states[number], expected["last_hidden_state"]) <= FORWARD
        amplitudes = {name: value for name, value in model.state_dict().items() if name.endswith("amplitude")}
        assert len(amplitudes) == 6 * config.num_hidden_layers
        for name, value in amplitudes.items():
            assert error(value, reference[name]) <= FORWARD, name
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert gradients.keys() == part(expected, "grad.").keys()
        for name, value in part(expected, "grad.").items():
            assert error(gradients[name], value) <= GRADIENT, name


def test_conversion_refuses_another_number_of_time_steps():
    config, tensors = golden(4)
    config.num_time_steps = 2
    with pytest.raises(ValueError, match="num_time_steps=4"):
        convert_reference_state_dict(part(tensors, "state."), config)


def test_conversion_refuses_projections_that_disagree():
    config, tensors = golden(1)
    state = part(tensors, "state.")
    state["bert.encoder.layer.1.attention.self.key.act_clip_val.0"] += 1
    with pytest.raises(ValueError, match="query, key and value"):
        convert_reference_state_dict(state, config)


def test_conversion_keeps_unknown_names_for_the_strict_loader_to_refuse():
    config, tensors = golden(1)
    state = {**part(tensors, "state."), "bert.surprise": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="bert.surprise"):
        SpikeLMForPreTraining(config).load_state_dict(convert_reference_state_dict(state, config))
