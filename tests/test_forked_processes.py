import os
import subprocess

import pytest

from tests.forked_processes import ROOT, run_forked

SCRIPT = """
import os, sys
print(__name__, sys.argv[1:], os.getcwd(), os.environ["GIVEN"])
print("was imported before:", "run_mlm" in sys.modules)
print("said", file=sys.stderr)
sys.exit(3)
"""
ENDLESS = """
import os, sys, time
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
time.sleep(600)
"""


def test_a_script_has_arguments_variables_output_and_a_code_of_its_own(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run_forked([str(tmp_path / "script.py"), "one", "two"], GIVEN="variable")
    said = f"__main__ ['one', 'two'] {ROOT} variable\nwas imported before: True\n"
    assert (done.returncode, done.stdout, done.stderr) == (3, said, "said\n")
    assert "GIVEN" not in os.environ


def test_a_script_that_does_not_end_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(ENDLESS)
    with pytest.raises(subprocess.TimeoutExpired):
        run_forked([str(tmp_path / "script.py"), str(tmp_path / "process")], timeout=5)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "process").read_text()), 0)
