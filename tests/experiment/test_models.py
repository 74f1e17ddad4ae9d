import pytest
import torch
from transformers import AutoModelForSequenceClassification

from configuration_spikelm import SpikeLMConfig
from experiment.arguments import ModelArguments
from experiment.models import load_config, load_model
from modeling_spikelm import SpikeLMForMaskedLM, SpikingNeurons

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 50}


@pytest.mark.parametrize(
    ("neuron", "overrides", "stays"),
    [
        ("elastic", None, True),
        ("elastic", "amplitude_scale=2.0,hidden_dropout_prob=0.0", True),
        ("elastic", "amplitude_scale=6.0", False),
        ("elastic", "num_time_steps=1", False),
        ("bi-spiking", "neuron=elastic", False),
        ("lif", "neuron=elastic,num_time_steps=2", False),
    ],
)
def test_overrides_that_amplitudes_were_not_made_for_leave_a_model_not_calibrated(neuron, overrides, stays, tmp_path):
    base = SpikeLMForMaskedLM(SpikeLMConfig(**SIZES, neuron=neuron, num_time_steps=3))
    base.calibrate({"input_ids": torch.arange(5, 12)[None]})
    base.save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), config_overrides=overrides)
    model = load_model(AutoModelForSequenceClassification, arguments, load_config(arguments))
    amplitudes = [m.amplitude for m in model.modules() if isinstance(m, SpikingNeurons)]
    assert all(bool(amplitude.any()) == stays for amplitude in amplitudes)
