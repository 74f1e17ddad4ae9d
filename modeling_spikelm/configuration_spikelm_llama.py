from configuration_spikelm.configuration_spikelm_llama import (  # noqa: F401  (a checkpoint carries the real file)
    SpikeLMLlamaConfig,
)
