"""Measure: ``python -m benchmarks.run`` runs every case of this machine's kind of device against every provider.

Each case is measured in a process of its own, in pieces that are written down as they come. Interrupting it (Ctrl-C, a
kill, a power cut) loses the piece that ran; ``--resume`` goes on. Without ``--only`` or ``--quick`` it takes hours on a
CPU. The results are one JSON file per machine; ``python -m benchmarks.report`` makes pages of them.
"""

import argparse
import json
import os
import select as selecting
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import cases as registry_of_cases
from benchmarks import environment, providers, tables
from benchmarks.cases import Case
from benchmarks.devices import Broken, Device, open_device
from benchmarks.measure import Effort, Measurement
from benchmarks.providers import Provider
from benchmarks.store import RESULTS, Event, Store
from benchmarks.worker import BROKEN
from demo.options import at_least

PIECE_SECONDS = 450.0  # nothing that is measured in one go may take longer
WORKER = [sys.executable, "-m", "benchmarks.worker"]
ROOT = Path(__file__).parents[1]
BF16_ON_CPU = 4  # how much slower than float32, roughly, where the processor has no instructions for it


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--list", action="store_true", help="show cases, groups and providers, and measure nothing")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="a group, or a glob over names")
    parser.add_argument("--providers", action="append", default=[], metavar="GLOB", help="only these (and the floor)")
    parser.add_argument("--quick", action="store_true", help="a few small cases, few rounds: a minute or two")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=at_least(1), default=_cores(), help="torch's threads (default: all cores)")
    parser.add_argument("--rounds", type=at_least(1), help="exactly so many rounds per case, whatever they take")
    budget = "budget for the timed rounds of a case (at least 3 are run)"
    parser.add_argument("--seconds", type=at_least(0.0, float), help=budget)
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/<machine>.json)")
    parser.add_argument("--resume", action="store_true", help="keep what is measured already, and go on")
    parser.add_argument("--in-process", action="store_true", help="no process per case: for debugging a provider")
    return parser.parse_args(arguments)


def main(arguments: list[str], known: dict[str, Provider] | None = None, device: Device | None = None) -> int:
    """Measure what the command line asks for. ``known`` and ``device`` replace what is there, for tests."""
    asked = parse(arguments)
    known = providers.registry() if known is None else known
    try:
        device = open_device(asked.device) if device is None else device
        chosen = registry_of_cases.select(asked.only, device.kind, asked.quick and not asked.only)
        named = _choose_providers(known, asked.providers)
    except ValueError as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2
    if asked.list:
        print(tables.listing(chosen, named))
        return 0
    machine = environment.machine(device)
    out = asked.out or RESULTS / (machine["slug"] + ("-quick" if asked.quick else "") + ".json")
    store = Store(out, machine)
    if store.recovered:
        print(f"found {store.recovered} pieces of an interrupted run")
    torch.set_num_threads(asked.threads)
    now = environment.record(device.kind, asked.threads)
    run = Run(store, device, named, _effort(asked), asked.threads, now)
    return run.all(chosen, resume=asked.resume, in_process=asked.in_process)


class Run:
    """The cases of one command."""

    def __init__(
        self,
        store: Store,
        device: Device,
        known: dict[str, Provider],
        effort: Effort,
        threads: int,
        now: dict[str, Any],
    ) -> None:
        self.store, self.device, self.known = store, device, known
        self.effort, self.threads, self.now = effort, threads, now

    def all(self, chosen: list[Case], *, resume: bool, in_process: bool) -> int:
        """Measure each case that is not done; the results file is written after each."""
        costs = {case.name: self._cost(case) for case in chosen}
        failed = 0
        with tqdm(total=round(sum(costs.values())), unit="GFLOP", unit_scale=True, mininterval=1.0) as bar:
            for case in chosen:
                names = set(self._names(case))
                had = self.store.begin(case, self.now, names, resume)
                if not (had["done"] and names <= had["rows"].keys()):
                    bar.set_description(case.name)
                    measure = self._here if in_process else self._apart
                    failed += not measure(case, had, bar)
                self.store.write()
                bar.write(tables.terminal(self.store.state["cases"][case.name]))
                bar.update(round(costs[case.name]))
        print(f"{self.store.path}: {len(chosen)} cases" + (f", {failed} not finished" if failed else ""))
        return int(failed > 0)

    def _names(self, case: Case) -> list[str]:
        return [name for name, provider in self.known.items() if provider.runs_in(case)]

    def _cost(self, case: Case) -> float:
        slow = BF16_ON_CPU if case.dtype == "bfloat16" and case.device == "cpu" else 1
        return registry_of_cases.gigaflop(case) * slow * (1 + len(self._names(case)))

    def _accept(self, case: Case, event: Event, bar: tqdm) -> None:
        if event["event"] == "start":
            bar.set_postfix_str(f"{event['provider'] or ''} {event['what']}".strip())
        else:
            self.store.append({**event, "name": case.name})

    def _here(self, case: Case, had: dict[str, Any], bar: tqdm) -> bool:
        measurement = Measurement(case, self.device, self.known, had, lambda event: self._accept(case, event, bar))
        try:
            measurement.run(self.effort)
        except Broken as error:
            print(f"{case.name}: the device is broken: {error}", file=sys.stderr)
            return False
        return True

    def _apart(self, case: Case, had: dict[str, Any], bar: tqdm) -> bool:
        """Processes until the case is done; each that dies costs the provider that it died in, so this ends."""
        for _ in range(len(self.known) + 2):
            asked = {
                "case": case.name,
                "device": self.device.kind,
                "threads": self.threads,
                "effort": asdict(self.effort),
                "providers": self._names(case),
                "had": had,
            }
            at, status, log = self._one_process(case, asked, bar)
            if had["done"]:
                return True
            if status == BROKEN:
                continue
            reason = _why(status, log)
            if at is None:
                print(f"{case.name}: not measured: {reason}", file=sys.stderr)
                return False
            family = self.known[at].family
            self.store.append(
                {"event": "row", "name": case.name, "provider": at, "row": {"family": family, "reason": reason}}
            )
        return False

    def _one_process(self, case: Case, asked: dict[str, Any], bar: tqdm) -> tuple[str | None, int | None, str]:
        """Run a worker; returns the provider that it was at, its exit status (None: stopped) and its last words."""
        at: str | None = None
        environ = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": _path()}
        pipe = subprocess.PIPE
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
            subprocess.Popen(WORKER, cwd=ROOT, env=environ, stdin=pipe, stdout=pipe, stderr=log) as worker,
        ):
            try:
                assert worker.stdin is not None
                with suppress(BrokenPipeError):  # it died before it read: its status says why
                    worker.stdin.write(json.dumps(asked).encode())
                    worker.stdin.close()
                for event in _events(worker):
                    at = event["provider"] if event["event"] == "start" else at
                    self._accept(case, event, bar)
                status: int | None = worker.wait(timeout=60)
            except (TimeoutError, subprocess.TimeoutExpired):
                status = None
            finally:
                worker.kill()
            log.seek(0)
            return at, status, log.read()[-2000:]


def _events(worker: "subprocess.Popen[bytes]") -> Iterator[Event]:
    """What a worker tells, until it ends. Raises ``TimeoutError`` where a piece takes too long."""
    assert worker.stdout is not None
    pipe, rest, last = worker.stdout.fileno(), b"", time.monotonic()
    while True:
        ready, _, _ = selecting.select([pipe], [], [], 1.0)
        if not ready:
            if time.monotonic() - last > PIECE_SECONDS:
                raise TimeoutError
            continue
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            return
        last = time.monotonic()
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _why(status: int | None, log: str) -> str:
    """Why a process ended before its time."""
    words = [line for line in log.splitlines() if line.strip()]
    said = f": {words[-1].strip()[:200]}" if words else ""
    if status is None:
        return f"stopped after {PIECE_SECONDS:.0f} s without a result"
    if status == -9:
        return "crashed: killed by signal 9, as the system does when memory is short"
    if status < 0:
        return f"crashed: killed by signal {-status}{said}"
    return f"crashed: exit status {status}{said}"


def _effort(asked: argparse.Namespace) -> Effort:
    if asked.rounds is not None:
        return Effort(0.0, asked.rounds, asked.rounds)
    if asked.seconds is not None:
        return Effort(asked.seconds)
    return Effort(5.0, 3, 5) if asked.quick else Effort()


def _choose_providers(known: dict[str, Provider], patterns: list[str]) -> dict[str, Provider]:
    if not patterns:
        return known
    for pattern in patterns:
        if not any(tables.matches(name, pattern) for name in known):
            raise ValueError(f"no provider matches {pattern!r}; there are: {', '.join(known)}")
    wanted = (*patterns, "floor", "full logits")
    return {name: p for name, p in known.items() if any(tables.matches(name, pattern) for pattern in wanted)}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
