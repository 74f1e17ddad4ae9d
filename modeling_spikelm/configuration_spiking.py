from configuration_spikelm.configuration_spiking import (  # noqa: F401  (a checkpoint carries the real file)
    CALIBRATION_FIELDS,
    INT8_FIELDS,
    NEURONS,
    SpikingConfig,
    calibration_differences,
)
