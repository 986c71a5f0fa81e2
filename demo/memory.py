"""Peak memory of the head and the loss on a CPU, each way measured in a fresh process of its own.

As a program (`python -m demo.memory PROBLEM`, in JSON) it is that process and prints the bytes.
"""

import json
import os
import re
import resource
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Problem:
    """The shapes of one batch at the head, and the loss; memory does not depend on the values."""

    method: str  # one of demo.full_logits.METHODS
    prompt: int  # tokens before the scored ones, the same in each row
    scored: list[int]  # scored tokens of each row; the rest is padding
    hidden_size: int
    vocabulary: int
    threads: int
    loss: dict[str, Any]  # Options.loss_settings()


def peak_extra_bytes(problems: list[Problem]) -> list[int]:
    """Return, for each problem, the peak of forward and backward above what was held before them."""
    package = Path(__file__).absolute().parent
    path = os.pathsep.join(filter(None, [str(package.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", f"{package.name}.{Path(__file__).stem}"]
    with ExitStack() as stack:
        processes = []
        for problem in problems:
            process = subprocess.Popen(
                [*command, json.dumps(asdict(problem))],
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the demo alone, which then ends these
            )
            stack.enter_context(process)
            stack.callback(process.kill)  # does nothing to one that has ended
            processes.append(process)
        outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("a process that measures memory failed; its own message is above")
    return [int(output) for output in outputs]


def _measure(problem: Problem) -> int:
    import torch

    from demo.data import IGNORED
    from demo.full_logits import METHODS

    torch.set_num_threads(problem.threads)

    def step(scored: list[int], vocabulary: int) -> int:
        labels = torch.full((len(scored), problem.prompt + max(scored)), IGNORED, device="cpu")
        for row, count in enumerate(scored):
            labels[row, problem.prompt : problem.prompt + count] = 1
        hidden = torch.randn(*labels.shape, problem.hidden_size, device="cpu", requires_grad=True)
        weight = torch.full((vocabulary, problem.hidden_size), 0.01, device="cpu", requires_grad=True)
        ref_logps = torch.zeros(len(labels), device="cpu")
        before = _resident_bytes()
        METHODS[problem.method](hidden, weight, labels, ref_logps, **problem.loss).backward()
        return _peak_resident_bytes() - before

    # What the first call of anything loads and allocates once is not the method's memory.
    step([1, 1], vocabulary=8)
    return step(problem.scored, problem.vocabulary)


def _resident_bytes() -> int:
    """Return this process's resident memory (where the system does not tell: its peak so far)."""
    return _status("VmRSS")


def _peak_resident_bytes() -> int:
    """Return this process's own peak; ru_maxrss would start at the size of the process that started it."""
    return _status("VmHWM")


def _status(field: str) -> int:
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    print(_measure(Problem(**json.loads(sys.argv[1]))))
