"""Runs a script that tells where it is on SIGUSR1, in a file that is named after its process and its rank.

STACK_FOLDER=folder python tests/watched.py script arguments
"""

import faulthandler
import os
import runpy
import signal
import sys

if __name__ == "__main__":
    # A whole life is half a second, and whoever waits for a moment of it has to be the first to get a busy core.
    os.nice(5)
    with open(f"{os.environ['STACK_FOLDER']}/{os.getpid()}-{os.environ.get('RANK', '')}", "w") as stack:
        faulthandler.register(signal.SIGUSR1, stack, all_threads=True)
        del sys.argv[0]
        runpy.run_path(sys.argv[0], run_name="__main__")
