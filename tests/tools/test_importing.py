"""What importing the package costs beside torch, counted: times depend on the machine and its load."""

import json
import os
import subprocess
import sys

from tests.packages import ROOT

IMPORT = """if True:
    import json, sys
    import numpy, torch
    before, calls = set(sys.modules), [0]
    def count(frame, event, argument):
        calls[0] += event == "call"
    sys.setprofile(count)
    import dpo_kernels
    sys.setprofile(None)
    print(json.dumps([sorted(set(sys.modules) - before), calls[0]]))
"""
MOST_MODULES = 90  # 83 in November 2026
MOST_CALLS = 60_000  # of Python functions; 20,000 in November 2026, mostly for data classes and operators
AT_FIRST_USE = ("integrations", "kernels.triton", "kernels.verdicts", "kernels.self_check", "reference", "_C")


def imported():
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IMPORT], env=env, capture_output=True, text=True, check=True)
    names, calls = json.loads(done.stdout)
    return names, calls, done.stderr


def test_importing_costs_a_bounded_number_of_modules_and_calls():
    names, calls, said = imported()
    assert said == ""
    assert [name for name in names if name.split(".")[0] != "dpo_kernels"] == []
    late = [name for name in names if name.removeprefix("dpo_kernels.").startswith(AT_FIRST_USE)]
    assert late == [], "these are imported where they are first used"
    assert 50 < len(names) <= MOST_MODULES
    assert 5_000 < calls <= MOST_CALLS
