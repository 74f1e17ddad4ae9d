"""Which Auto class loads a checkpoint with the head that it was saved with."""

from typing import Any

import transformers
from transformers import AutoModel, PreTrainedConfig

import modeling_spikelm  # noqa: F401  (registers SpikeLM with the Auto classes)
from configuration_spikelm import configuration_spikelm, configuration_spikelm_bart, configuration_spikelm_llama

HEADS = [
    getattr(transformers, name)
    for form in (configuration_spikelm, configuration_spikelm_bart, configuration_spikelm_llama)
    for name in form.AUTO_MAP
    if name.startswith("AutoModelFor")
]


def auto_class_of(config: PreTrainedConfig) -> Any:
    """The Auto class that loads what `config.architectures` names; AutoModel for anything else."""
    for saved_as in config.architectures or ():
        for auto_class in HEADS:
            model_class = auto_class._model_mapping.get(type(config), None)
            remote = getattr(config, "auto_map", {}).get(auto_class.__name__, "")
            if saved_as in (getattr(model_class, "__name__", None), remote.rpartition(".")[2]):
                return auto_class
    return AutoModel
