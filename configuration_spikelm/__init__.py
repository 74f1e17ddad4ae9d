from .configuration_spikelm import AUTO_MAP, SpikeLMConfig
from .configuration_spikelm_bart import SpikeLMBartConfig
from .configuration_spikelm_llama import SpikeLMLlamaConfig
from .configuration_spiking import CALIBRATION_FIELDS, SpikingConfig, calibration_differences

__all__ = [
    "AUTO_MAP",
    "CALIBRATION_FIELDS",
    "SpikeLMBartConfig",
    "SpikeLMConfig",
    "SpikeLMLlamaConfig",
    "SpikingConfig",
    "calibration_differences",
]
