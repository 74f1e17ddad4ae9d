"""Puts the project's packages, one folder up, on the path of a script in this one; imported before them."""

import sys
import time
from pathlib import Path

# Of the command, before the imports that take seconds.
STARTED = time.monotonic()

sys.path.append(str(Path(__file__).resolve().parent.parent))
