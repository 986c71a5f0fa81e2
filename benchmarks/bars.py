"""What was promised beside what was measured: ``python -m benchmarks.bars RESULTS.json``.

Each line is a bar, its limit, the worst measured number and where, and one of *met*, *missed* or *not measured*. A bar
on 16-bit GEMMs of a CPU applies only where the processor has instructions for them; elsewhere its number is shown as
*does not apply*. Nothing is measured here.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment, report, store, tables
from benchmarks.cases import CASES, CPU_SHAPES, Case
from benchmarks.providers.ours import EVERY_POSITION

OURS = "ours/cpp/chunked"
RIVALS = ("full logits", "TRL chunked head", "Liger DPO")
CPU_PEERS = (
    "full logits",
    "full logits, compiled",
    "TRL chunked head",
    "Liger DPO",
    "cut-cross-entropy, unfiltered",
    "torch linear_cross_entropy",
)
HALF = 0.6  # "about half the time"
# The rule of tests/tolerance.py in bfloat16: twice what plain torch loses; gradients in relative L2 at most this, or
# what plain torch loses where that is more.
TOLERANCE = 2.0
GRADIENT_BAR = 2.2e-3


@dataclass(frozen=True)
class Bar:
    """A promise and what became of it."""

    what: str
    limit: str
    value: str
    verdict: str  # "met", "missed", "not measured" or "does not apply"


Value = Callable[[str], float | None]  # of a case, by its name


class Bars:
    """The bars of one results file."""

    def __init__(self, state: dict[str, Any], ours: str = OURS) -> None:
        self.machine, self.ours = state["machine"], ours
        self.rows = {
            name: {one.provider: one for one in tables.lines(case)}
            for name, case in state["cases"].items()
            if case["done"]
        }
        self.results = {name: case for name, case in state["cases"].items() if case["done"]}
        self.tokens = {
            name: case["rows"].get(ours, {}).get("token_error") for name, case in state["cases"].items() if case["done"]
        }

    def all(self) -> Iterator[Bar]:
        """Every bar, in the order in which they were promised."""
        fast = bool(environment.FAST_BF16 & set(self.machine.get("flags", ())))
        yield self.worst("bf16, trainable, N=2048: time over the floor", 1.10, self.over, "bf16/trainable", 2048, fast)
        yield self.worst("bf16, trainable, N=256: time over the floor", 1.40, self.over, "bf16/trainable", 256, fast)
        yield self.token_bar()
        yield self.worst("fp32, trainable, N=2048: time over the floor", 1.12, self.over, "fp32/trainable", 2048)
        yield self.worst("fp32, trainable, N=256: time over the floor", 1.12, self.over, "fp32/trainable", 256)
        for dtype, tokens in (("bf16", 2048), ("bf16", 256), ("fp32", 2048), ("fp32", 256)):
            what = f"{dtype}, frozen, N={tokens}: time over its two GEMMs"
            yield self.worst(what, 1.20, self.over, f"{dtype}/frozen", tokens, fast or dtype == "fp32")
        for dtype, tokens in (("bf16", 2048), ("bf16", 256), ("fp32", 2048), ("fp32", 256)):
            yield self.half(dtype, tokens, fast or dtype == "fp32")
        for rival in RIVALS:
            yield self.worst(
                f"time over {rival}, every shape, head and dtype", 1.0, self.against(rival), "*", None, strict=True
            )
        for rival in ("full logits", "Liger DPO"):
            what = f"bf16, N=2048, H=1024: {rival} over our time"
            yield self.faster(what, rival, 1.5, fast)
        for rival in RIVALS:
            what = f"peak extra memory over that of {rival}, every shape, head and dtype"
            yield self.worst(what, 1.0, self.memory(rival), "*", None, strict=True)
        for name in ("loss", "logps", "dX", "dW"):
            yield self.worst(
                f"bf16: error of {name} over what the tolerance rule allows", 1.0, self.error(name), "bf16/*", None
            )
        yield self.peers()

    # --- values of a case ---

    def over(self, case: str) -> float | None:
        """Our time over the floor."""
        return self.rows[case][self.ours].over_floor if self.ours in self.rows[case] else None

    def against(self, rival: str) -> Value:
        """Our time over a rival's, round by round."""

        def value(case: str) -> float | None:
            lines = self.rows[case]
            if any(name not in lines or lines[name].seconds is None for name in (self.ours, rival)):
                return None
            return store.over(self.results[case], self.ours, rival)

        return value

    def memory(self, rival: str) -> Value:
        """Our peak extra memory over a rival's; 1 MiB is as little as can be told."""

        def value(case: str) -> float | None:
            lines = self.rows[case]
            ours, theirs = (lines[name].extra_bytes if name in lines else None for name in (self.ours, rival))
            return None if ours is None or theirs is None else max(ours, tables.MIB) / max(theirs, tables.MIB)

        return value

    def error(self, name: str) -> Value:
        """Our error over what the tolerance rule allows, given that of full logits in the same dtype."""

        def value(case: str) -> float | None:
            lines = self.rows[case]
            if not {self.ours, "full logits"} <= lines.keys() or name not in lines[self.ours].errors:
                return None
            plain = lines["full logits"].errors.get(name)
            if plain is None:
                return None
            allowed = max(GRADIENT_BAR, plain) if name in ("dX", "dW") else TOLERANCE * plain + 1e-6
            return lines[self.ours].errors[name] / allowed

        return value

    # --- bars ---

    def cases(self, kind: str, tokens: int | None) -> list[Case]:
        """Unmasked cases of the CPU group: "bf16/trainable", "bf16/*" or "*"."""
        wanted = [c for c in CASES.values() if "cpu" in c.groups and "half" not in c.groups]
        return [c for c in wanted if tokens in (None, c.tokens) and tables.matches(c.name.split("/", 3)[3], kind)]

    def worst(
        self,
        what: str,
        limit: float,
        value: Value,
        kind: str,
        tokens: int | None,
        applies: bool = True,
        strict: bool = False,
    ) -> Bar:
        """The largest value over cases; every case must be there."""
        cases = self.cases(kind, tokens)
        if "of dW" in what:
            cases = [case for case in cases if case.trainable]
        found = {case.name: value(case.name) for case in cases if case.name in self.rows}
        return _judge(what, limit, {k: v for k, v in found.items() if v is not None}, len(cases), applies, strict)

    def faster(self, what: str, rival: str, least: float, applies: bool) -> Bar:
        """A speed-up that must be reached in every case."""
        cases = [c for c in self.cases("bf16/trainable", 2048) if c.hidden == 1024]
        measured = [self.against(rival)(c.name) for c in cases if c.name in self.rows]
        values = [1 / value for value in measured if value]
        verdict = _verdict(bool(values) and min(values) >= least, len(values), len(cases), applies)
        return Bar(what, f">= {least:g}", f"{min(values):.2f}" if values else "–", verdict)

    def half(self, dtype: str, tokens: int, applies: bool) -> Bar:
        """Half the positions masked over none masked, same positions, round by round of one run."""
        names = [f"cpu/{hidden}x{vocab}/n{tokens}-half/{dtype}/trainable" for hidden, vocab in CPU_SHAPES]
        value = self.against(self.ours + EVERY_POSITION)
        ratios = {name: value(name) for name in names if name in self.rows}
        found = {name: ratio for name, ratio in ratios.items() if ratio is not None}
        return _judge(
            f"{dtype}, N={tokens}: half the tokens masked, time over none masked", HALF, found, len(CPU_SHAPES), applies
        )

    def token_bar(self) -> Bar:
        """Token log-probs in bfloat16."""
        cases = self.cases("bf16/*", None)
        found = {c.name: float(error) for c in cases if (error := self.tokens.get(c.name)) is not None}
        return _judge(
            "bf16 on a CPU: error of token log-probs against float64, nats",
            1e-4,
            found,
            len(cases),
            True,
            form="{:.1e}",
        )

    def peers(self) -> Bar:
        """Whether every peer that runs on a CPU has a time somewhere."""
        timed = {one.provider for lines in self.rows.values() for one in lines.values() if one.seconds is not None}
        missing = [name for name in CPU_PEERS if name not in timed]
        verdict = "met" if not missing else "not measured"
        return Bar("peers with a time", "all", f"without: {', '.join(missing)}" if missing else "all", verdict)


def _judge(
    what: str,
    limit: float,
    found: dict[str, float],
    wanted: int,
    applies: bool,
    strict: bool = False,
    form: str = "{:.2f}",
) -> Bar:
    if not found:
        return Bar(what, _limit(limit, strict), "–", "not measured")
    where = max(found, key=lambda name: found[name])
    value = found[where]
    met = value < limit if strict else value <= limit
    shown = f"{form.format(value)} ({where}; {len(found)} of {wanted} cases)"
    return Bar(what, _limit(limit, strict), shown, _verdict(met, len(found), wanted, applies))


def _limit(limit: float, strict: bool) -> str:
    return f"{'<' if strict else '<='} {limit:g}"


def _verdict(met: bool, found: int, wanted: int, applies: bool) -> str:
    if not found:
        return "not measured"
    if not applies:
        return "does not apply"
    if not met:
        return "missed"
    return "met" if found == wanted else "not measured"


def main(arguments: list[str]) -> int:
    """Print the bars of results files; 1 where one is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bars", description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, help="default: every CPU results file")
    parser.add_argument("--ours", default=OURS, help="the row that is ours")
    asked = parser.parse_args(arguments)
    states = [store.load(path) for path in asked.results] or list(report.machines(store.RESULTS).values())
    states = [state for state in states if state["machine"]["kind"] == "cpu"]
    if not states:
        print("not measured: there is no CPU results file")
        return 1
    missed = 0
    for state in states:
        print(state["machine"]["name"])
        for bar in Bars(state, asked.ours).all():
            missed += bar.verdict == "missed"
            print(f"  {bar.verdict.upper():14}  {bar.what}: {bar.limit}: {bar.value}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
