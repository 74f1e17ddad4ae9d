"""From the reference implementation's checkpoints (github.com/Xingrun-Xing/SpikeLM) to ours: names only, no values."""

import re
from collections import defaultdict

import torch

from .configuration_spikelm import SpikeLMConfig

# Which of our neuron groups holds the amplitudes that the reference keeps under a projection's name. The three
# projections of an attention layer hold the same numbers there: one group serves all three here.
_AMPLITUDES = re.compile(
    r"(?P<layer>bert\.encoder\.layer\.\d+\.)"
    r"(?:(?P<place>attention\.self\.(?:query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)"
    r"\.act_clip_val|attention\.self\.(?P<clip>clip_key|clip_value))\.(?P<step>\d+)"
)
_GROUPS = {
    "attention.self.query": "attention.self.neurons",
    "attention.self.key": "attention.self.neurons",
    "attention.self.value": "attention.self.neurons",
    "attention.output.dense": "attention.output.neurons",
    "intermediate.dense": "intermediate.neurons",
    "output.dense": "output.neurons",
    "clip_key": "attention.self.key_neurons",
    "clip_value": "attention.self.value_neurons",
}
# Buffers of the reference that carry nothing, and the second name of `cls.predictions.bias`.
_IGNORED = re.compile(r"(.*\.)?(position_ids|weight_clip_val|predictions\.decoder\.bias)$")


def convert_reference_state_dict(state_dict: dict[str, torch.Tensor], config: SpikeLMConfig) -> dict[str, torch.Tensor]:
    """Renames a reference state dict to what `SpikeLMForPreTraining(config).load_state_dict` takes, strictly.

    Args:
        state_dict: a state dict of the reference's pre-training model, amplitudes included (`...act_clip_val.{t}`,
            `...clip_key.{t}`, `...clip_value.{t}`, one scalar per time step).
        config: gives the number of time steps.

    Returns:
        The parameters, and one `(T,)` float32 `...neurons.amplitude` per group of neurons.

    Raises:
        ValueError: a group lacks a time step or has one too many, or query, key and value of a layer disagree.
    """
    converted: dict[str, torch.Tensor] = {}
    amplitudes: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for name, tensor in state_dict.items():
        match = _AMPLITUDES.fullmatch(name)
        if match:
            group = match["layer"] + _GROUPS[match["place"] or match["clip"]] + ".amplitude"
            step, amplitude = int(match["step"]), tensor.detach().float().reshape(())
            if not torch.equal(amplitudes[group].setdefault(step, amplitude), amplitude):
                raise ValueError(
                    f"{name} is {amplitude.item()}, another projection of this layer has "
                    f"{amplitudes[group][step].item()}; query, key and value see the same input, so their amplitudes "
                    "have to be equal. Was the checkpoint edited or averaged?"
                )
        elif not _IGNORED.fullmatch(name):
            converted[name] = tensor
    for group, by_step in amplitudes.items():
        if sorted(by_step) != list(range(config.num_time_steps)):
            raise ValueError(
                f"{group}: the checkpoint has amplitudes for the steps {sorted(by_step)}, but the configuration says "
                f"num_time_steps={config.num_time_steps}; set num_time_steps={len(by_step)}."
            )
        converted[group] = torch.stack([by_step[step] for step in range(config.num_time_steps)])
    return converted
