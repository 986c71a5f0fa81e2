"""Results: a JSON file per machine, and beside it a journal of what was measured since it was last written.

Every piece (a provider's check, its peak memory, one round's time) is appended to ``<machine>.jsonl`` as soon as it is
there. After each case the journal is folded into ``<machine>.json``, which is replaced atomically. A kill loses at most
the piece that ran; folding a journal twice, or one whose last line is cut off, changes nothing.

The file: ``{"schema", "machine", "cases": {name: {"case", "environment", "data", "done", "rows": {provider: row}}}}``.
A row holds ``reason`` (why it has no time) or ``gate``, ``memory``, ``variant``, ``sweep`` and ``rounds``, the raw
times in seconds as ``[[round, [seconds, ...]], ...]``.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import environment
from benchmarks.cases import Case

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
Event = dict[str, Any]


class Store:
    """The results of one machine, in memory and on disk."""

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path = path
        self.journal = path.with_suffix(".jsonl")
        self.state: dict[str, Any] = {"schema": SCHEMA, "machine": machine, "cases": {}}
        if path.exists():
            self.state = load(path)
            if self.state["machine"].get("name") != machine.get("name"):
                was = self.state["machine"].get("name")
                raise ValueError(f"{path} was measured on {was!r}, this is {machine.get('name')!r}: give another --out")
            self.state["machine"] = machine
        self.recovered = self._recover()

    def begin(self, case: Case, now: dict[str, Any], names: set[str], resume: bool) -> dict[str, Any]:
        """Start or continue a case, or return it as it is where ``resume`` finds a row for each of ``names``.

        What was begun under another commit, version or number of threads than ``now`` is not continued but begun again.
        """
        had = self.state["cases"].get(case.name)
        kept = resume and had and had["case"] == _plain(case)
        finished = kept and had["done"] and names <= had["rows"].keys()
        if not finished and not (kept and environment.comparable(had["environment"], now)):
            self.append({"event": "case", "name": case.name, "case": _plain(case), "environment": now})
        found: dict[str, Any] = self.state["cases"][case.name]
        return found

    def append(self, event: Event) -> None:
        """Apply an event and have it on disk before going on."""
        fold(self.state, event)
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write(self) -> None:
        """Fold the journal into the results file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".json.new")
        fresh.write_text(dump(self.state), encoding="utf-8")
        os.replace(fresh, self.path)
        self.journal.unlink(missing_ok=True)

    def _recover(self) -> int:
        """Fold what an interrupted run left; returns how many pieces."""
        if not self.journal.exists():
            return 0
        lines = self.journal.read_text(encoding="utf-8").splitlines()
        count = 0
        for at, line in enumerate(lines):
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                if at != len(lines) - 1:  # only the last line can have been cut off by a kill
                    raise ValueError(f"{self.journal}, line {at + 1}: not JSON") from None
                break
            fold(self.state, event)
            count += 1
        self.write()
        return count


def fold(state: dict[str, Any], event: Event) -> None:
    """Apply one event to the results. Applying it again changes nothing but a restarted case."""
    cases, kind = state["cases"], event["event"]
    if kind == "case":
        cases[event["name"]] = {
            "case": event["case"],
            "environment": event["environment"],
            "data": None,
            "done": False,
            "rows": {},
        }
        return
    here = cases[event["name"]]
    if kind == "data":
        here["data"] = event["data"]
    elif kind == "row":
        here["rows"].setdefault(event["provider"], {"rounds": []}).update(event["row"])
    elif kind == "time":
        row = here["rows"].setdefault(event["provider"], {"rounds": []})
        if all(number != event["round"] for number, _ in row["rounds"]):
            row["rounds"].append([event["round"], event["seconds"]])
    elif kind == "done":
        here["done"] = True
    else:
        raise ValueError(f"no event {kind!r}")


def load(path: Path) -> dict[str, Any]:
    """A results file. Raises ``ValueError`` for one of another schema."""
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if state.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a results file of schema {SCHEMA}")
    return state


def is_results(path: Path) -> bool:
    """Whether a JSON file is one of ours: the folder holds others too."""
    try:
        load(path)
    except (ValueError, AttributeError):
        return False
    return True


def dump(state: dict[str, Any]) -> str:
    """JSON with one line per row, so that a change is readable and a file stays small."""
    lines = [
        "{",
        f' "schema": {SCHEMA},',
        f' "machine": {json.dumps(state["machine"], ensure_ascii=False)},',
        ' "cases": {',
    ]
    cases = []
    for name, case in state["cases"].items():
        head = ",\n".join(
            f"   {json.dumps(key)}: {json.dumps(case[key])}" for key in ("case", "environment", "data", "done")
        )
        rows = ",\n".join(f"    {json.dumps(key)}: {json.dumps(row)}" for key, row in case["rows"].items())
        cases.append(f'  {json.dumps(name)}: {{\n{head},\n   "rows": {{\n{rows}\n   }}\n  }}')
    return "\n".join([*lines, ",\n".join(cases), " }", "}"]) + "\n"


def _plain(case: Case) -> dict[str, Any]:
    """As it comes back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(case)))
    return plain


# --- reading ----------------------------------------------------------------------------------------------------------


def seconds(row: dict[str, Any]) -> list[float]:
    """The median of each round."""
    return [median(times) for _, times in row.get("rounds", [])]


def quantile(values: list[float], share: float) -> float:
    """By linear interpolation."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def ratios(row: dict[str, Any], base: dict[str, Any]) -> list[float]:
    """A row's time over another's, round by round: what drifts between rounds cancels."""
    others = {number: median(times) for number, times in base.get("rounds", [])}
    return [median(times) / others[number] for number, times in row.get("rounds", []) if number in others]


def over(results: dict[str, Any], provider: str, base: str = "floor") -> float | None:
    """Median over rounds of a provider's time over another's; None where one has no time."""
    rows = results["rows"]
    if provider not in rows or base not in rows:
        return None
    values = ratios(rows[provider], rows[base])
    return median(values) if values else None
