"""The process that measures one case: the parent stays alive whatever a kernel does to this one.

It reads one JSON object from standard input (case, device, threads, effort, and what is measured already) and writes
one event per line to standard output. What peers print goes to standard error.
"""

import json
import os
import sys
import threading
import time
from typing import Any

import torch

from benchmarks import cases, providers
from benchmarks.devices import Broken, open_device
from benchmarks.measure import Effort, Measurement
from benchmarks.store import Event

ORPHAN_SECONDS = 1.0  # how often to look whether the parent is still there
BROKEN = 17  # exit status: the device is of no use to this process any more, and the row that did it is told


def end_with_parent() -> None:
    """Where the parent is killed nobody reads what is measured: end, and leave the processor to the next run."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Measure what standard input asks for."""
    end_with_parent()
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asked: dict[str, Any] = json.loads(sys.stdin.read())
    torch.set_num_threads(asked["threads"])

    def tell(event: Event) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    case = cases.CASES[asked["case"]]
    known = providers.registry()
    chosen = {name: known[name] for name in asked["providers"]}
    try:
        Measurement(case, open_device(asked["device"]), chosen, asked["had"], tell).run(Effort(**asked["effort"]))
    except Broken:
        return BROKEN
    return 0


if __name__ == "__main__":
    sys.exit(main())
