"""``python -m tests.first_light``: prove what a GPU has to prove, in steps that resume, with a report for an issue."""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from demo.options import at_least
from dpo_kernels.kernels import verdicts
from tests.first_light import page
from tests.first_light.steps import ROOT, Place, Result, all_steps

CODE, SUFFIXES = ("dpo_kernels", "csrc", "tests", "benchmarks"), (".py", ".cpp", ".h", ".cu", ".cuh")
NO_GPU = "first-light: torch finds no CUDA device, so that nothing is proved here; --device cpu tries the steps"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.first_light", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a dry run with small sizes")
    parser.add_argument("--minutes", type=at_least(0.0, float), default=10.0, help="start no step after so many (10)")
    parser.add_argument("--only", action="append", default=[], metavar="STEP", help="a step, or the part before its /")
    parser.add_argument("--again", action="store_true", help="run what was proved already, too")
    parser.add_argument("--folder", type=Path, help="where state and report lie (build/first-light/DEVICE)")
    parser.add_argument("--in-process", action="store_true", help="no process for each step, for debugging one")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps. Returns 0 if all of them have proved what they are for, in this run or in an earlier one."""
    asked = parse(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 1
    place = Place(asked.device, asked.folder or ROOT / "build" / "first-light" / asked.device, asked.in_process)
    steps = all_steps(asked.device)
    wanted = [name for name in steps if not asked.only or {name, name.split("/")[0]} & set(asked.only)]
    if not wanted:
        print(f"first-light: no step is called {', '.join(asked.only)}; there are: {', '.join(steps)}", file=sys.stderr)
        return 2
    state = read_state(place)
    begin = time.monotonic()
    for number, name in enumerate(wanted, 1):
        head = f"[{number}/{len(wanted)}] {name}"
        if state["steps"].get(name, {}).get("ok") and not asked.again:
            print(f"{head}: proved earlier: {state['steps'][name]['proved']}", flush=True)
            continue
        if time.monotonic() - begin >= 60 * asked.minutes:
            print(f"{head}: left, since {asked.minutes:g} minutes are over; the same command goes on", flush=True)
            continue
        print(f"{head} ...", flush=True)
        step, seconds = steps[name]
        started = time.monotonic()
        result = step(place, seconds)
        keep(place, state, name, result, time.monotonic() - started, list(steps))
        print(f"{head}: {'proved' if result.ok else 'FAILED'}: {result.proved}", flush=True)
    good = sum(state["steps"].get(name, {}).get("ok", False) for name in steps)
    print(f"{good} of {len(steps)} steps proved; attach {place.folder / 'report.md'} and report.json", flush=True)
    return 0 if all(state["steps"].get(name, {}).get("ok") for name in wanted) else 1


def read_state(place: Place) -> dict[str, Any]:
    """What earlier runs proved of the same code, device and versions; nothing where any of them is another."""
    device = torch.device(place.device)
    name, version = verdicts.name_of(device), f"{verdicts.path_of(device).stem} {digest_of(ROOT)}"
    path = place.folder / "report.json"
    state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if state.get("version") != version:
        state = {"name": name, "version": version, "steps": {}}
    return state


def digest_of(root: Path) -> str:
    """What stands for the code that the steps run."""
    paths = (path for folder in CODE for path in sorted((root / folder).rglob("*")) if path.suffix in SUFFIXES)
    text = b"".join(path.relative_to(root).as_posix().encode() + path.read_bytes() for path in paths)
    return hashlib.sha256(text).hexdigest()[:12]


def keep(place: Place, state: dict[str, Any], name: str, result: Result, seconds: float, names: list[str]) -> None:
    """Write state and report, each at once."""
    state["steps"][name] = {"ok": result.ok, "proved": result.proved, "seconds": seconds, "facts": result.facts}
    place.folder.mkdir(parents=True, exist_ok=True)
    for file, text in (
        ("report.json", json.dumps(state, indent=1)),
        ("report.md", page.page(place.device, state, names)),
    ):
        new = place.folder / f".{file}"
        new.write_text(text, encoding="utf-8")
        new.replace(place.folder / file)


if __name__ == "__main__":
    sys.exit(main())
