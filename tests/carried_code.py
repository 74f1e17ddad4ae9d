"""The code that a checkpoint has to carry: what the model classes import, by the name that it has in a checkpoint.

    python tests/carried_code.py

copies what a BERT's form needs to the checkpoint of this repository.
"""

import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOT_CARRIED = {"__init__.py", "reference_checkpoint.py"}
BERT = {"configuration_spikelm.py", "modeling_spikelm.py"}
BART = {"configuration_spikelm_bart.py", "modeling_spikelm_bart.py", "spike_cache.py"}
LLAMA = {"configuration_spikelm_llama.py", "modeling_spikelm_llama.py", "spike_cache.py"}
# Where modeling_spikelm has a module that only passes a configuration on, the real one counts.
_FILES = {
    path.name: path for folder in ("modeling_spikelm", "configuration_spikelm") for path in (ROOT / folder).glob("*.py")
}
_SHARED = {name: path for name, path in _FILES.items() if name not in NOT_CARRIED | BERT | BART | LLAMA}
CODE = _SHARED | {name: _FILES[name] for name in BERT}
BART_CODE = _SHARED | {name: _FILES[name] for name in BART}
LLAMA_CODE = _SHARED | {name: _FILES[name] for name in LLAMA}
CHECKPOINT = ROOT / "checkpoints/spikelm-minilm-l6"

if __name__ == "__main__":
    for path in CHECKPOINT.glob("*.py"):
        path.unlink()
    for name, path in CODE.items():
        shutil.copyfile(path, CHECKPOINT / name)
