"""The code that a checkpoint has to carry: what the model classes import, by the name that it has in a checkpoint."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
NOT_CARRIED = {"__init__.py", "reference_checkpoint.py"}
CODE = {
    path.name: path
    for folder in ("configuration_spikelm", "modeling_spikelm")
    for path in (ROOT / folder).glob("*.py")
    if path.name not in NOT_CARRIED
    # modeling_spikelm has a module that only passes the configuration on.
    and (folder, path.name) != ("modeling_spikelm", "configuration_spikelm.py")
}
