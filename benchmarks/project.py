"""Puts the project's packages, one folder up, on the path of a script in this one; imported before them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
