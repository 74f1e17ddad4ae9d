"""What older versions of transformers, which the model takes, cannot do by themselves."""

import pytest
import transformers
from packaging.version import Version

VERSION = Version(transformers.__version__)

takes_masks_unseen = pytest.mark.skipif(
    Version("5.15") > VERSION, reason="transformers up to 5.14 looks at every mask, which waits for the device"
)
# With an encoder; 5.17 writes nothing then, and of what lies between these two nothing is known.
LOOKS_PROMPTS_UP = Version("5.23") <= VERSION
