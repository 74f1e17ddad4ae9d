from .configuration_spikelm import AUTO_MAP, SpikeLMConfig

__all__ = ["AUTO_MAP", "SpikeLMConfig"]
