"""What importing the package costs beside torch, counted: times depend on the machine and its load."""

import json
import os
import subprocess
import sys

from tests.packages import ROOT

IMPORT = """if True:
    import json, sys
    import numpy, torch
    before, calls, compiled = set(sys.modules), [0], [0]
    file = lambda code: code.co_filename.rpartition("/")[2]
    def count(frame, event, argument):
        calls[0] += event == "call"
        compiled[0] += event == "c_call" and argument is exec and file(frame.f_code) in ("dataclasses.py", "records.py")
    sys.setprofile(count)
    import dpo_kernels
    sys.setprofile(None)
    print(json.dumps([sorted(set(sys.modules) - before), calls[0], compiled[0]]))
"""
MOST_MODULES = 95  # 90 in November 2026
MOST_CALLS = 40_000  # of Python functions; 18,000 in December 2026, mostly for data classes and operators
# Pieces of code that are compiled for data classes, at 0.1 ms each before Python 3.13: 79 in December 2026. They were
# 294 without ``dpo_kernels.records``.
MOST_COMPILED = 95
AT_FIRST_USE = ("integrations", "kernels.triton", "kernels.verdicts", "kernels.self_check", "reference", "_C")


def imported():
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IMPORT], env=env, capture_output=True, text=True, check=True)
    return *json.loads(done.stdout), done.stderr


def test_importing_costs_a_bounded_number_of_modules_and_calls():
    names, calls, compiled, said = imported()
    assert said == ""
    assert [name for name in names if name.split(".")[0] != "dpo_kernels"] == []
    late = [name for name in names if name.removeprefix("dpo_kernels.").startswith(AT_FIRST_USE)]
    assert late == [], "these are imported where they are first used"
    assert 50 < len(names) <= MOST_MODULES
    assert 5_000 < calls <= MOST_CALLS
    assert 20 < compiled <= MOST_COMPILED
