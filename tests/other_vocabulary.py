"""A tokenizer of the same size in which ids mean other words."""

import json
import shutil
from pathlib import Path


def with_other_vocabulary(checkpoint: Path, folder: Path) -> Path:
    """Copies a checkpoint into a new folder, in which the last two tokens of its tokenizer have changed places."""
    shutil.copytree(checkpoint, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
