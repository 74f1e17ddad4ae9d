from configuration_spikelm.configuration_spikelm import (  # noqa: F401  (a checkpoint carries the real file)
    CALIBRATION_FIELDS,
    NEURONS,
    SpikeLMConfig,
    calibration_differences,
)
