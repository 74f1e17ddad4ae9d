from configuration_spikelm.configuration_spikelm import SpikeLMConfig  # noqa: F401  (a checkpoint carries the real file)
