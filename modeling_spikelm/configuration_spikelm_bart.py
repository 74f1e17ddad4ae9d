from configuration_spikelm.configuration_spikelm_bart import (  # noqa: F401  (a checkpoint carries the real file)
    SpikeLMBartConfig,
)
