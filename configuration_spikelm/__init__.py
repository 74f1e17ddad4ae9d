from .configuration_spikelm import AUTO_MAP, CALIBRATION_FIELDS, SpikeLMConfig, calibration_differences

__all__ = ["AUTO_MAP", "CALIBRATION_FIELDS", "SpikeLMConfig", "calibration_differences"]
