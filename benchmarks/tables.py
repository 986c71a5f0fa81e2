"""Numbers as text: what the terminal, the report pages and the README show of a case."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks import store
from benchmarks.cases import Case, gigaflop, groups
from benchmarks.providers import Provider

MIB = 2**20
ERRORS = ("loss", "logps", "dX", "dW")


@dataclass(frozen=True)
class Line:
    """One provider in one case, ready to be shown."""

    provider: str
    family: str
    reason: str | None  # why it has no time
    seconds: float | None  # median over rounds
    low: float | None  # 20th percentile
    high: float | None  # 80th
    over_floor: float | None  # median of the rounds' ratios
    over_low: float | None
    over_high: float | None
    extra_bytes: int | None  # peak memory without the gradients
    errors: dict[str, float]  # against float64
    green: bool | None  # None: not judged
    variant: dict[str, Any]
    rounds: int


def line(results: dict[str, Any], provider: str) -> Line:
    """A provider's row of a case's results."""
    row = results["rows"][provider]
    times = store.seconds(row)
    ratios = store.ratios(row, results["rows"].get("floor", {"rounds": []}))
    gate = row.get("gate") or {}
    quantile = store.quantile
    return Line(
        provider,
        row.get("family", ""),
        row.get("reason"),
        median(times) if times else None,
        quantile(times, 0.2) if times else None,
        quantile(times, 0.8) if times else None,
        median(ratios) if ratios else None,
        quantile(ratios, 0.2) if ratios else None,
        quantile(ratios, 0.8) if ratios else None,
        (row.get("memory") or {}).get("extra_bytes"),
        {name: float(found[0]) for name, found in gate.get("errors", {}).items()},
        gate.get("green"),
        row.get("variant") or {},
        len(times),
    )


def lines(results: dict[str, Any]) -> list[Line]:
    """All rows of a case; a row that is red, refused or crashed shows no time."""
    found = [line(results, name) for name in results["rows"]]
    return [blank(one) if one.reason else one for one in found]


def blank(one: Line) -> Line:
    """Without any time."""
    kept = {name: getattr(one, name) for name in ("provider", "family", "reason", "errors", "green", "variant")}
    return Line(
        **kept,
        seconds=None,
        low=None,
        high=None,
        over_floor=None,
        over_low=None,
        over_high=None,
        extra_bytes=None,
        rounds=0,
    )


def matches(name: str, pattern: str) -> bool:
    """A provider by its name, a glob over it, or the beginning of its path ("ours")."""
    return name == pattern or fnmatch.fnmatch(name, pattern) or name.startswith(pattern + "/")


def duration(seconds: float | None) -> str:
    """With three digits and a unit."""
    if seconds is None:
        return "–"
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def interval(one: Line) -> str:
    """Median and 20th to 80th percentile, in the median's unit."""
    if one.seconds is None or one.low is None or one.high is None:
        return "–"
    scale, unit = (1.0, "s") if one.seconds >= 1 else (1e3, "ms")
    return f"{one.seconds * scale:.3g} {unit} [{one.low * scale:.3g}–{one.high * scale:.3g}]"


def mebibytes(value: int | None) -> str:
    """Whole MiB."""
    return "–" if value is None else f"{value / MIB:.0f}"


def ratio(value: float | None) -> str:
    """Two digits after the point."""
    return "–" if value is None else f"{value:.2f}"


def error(value: float | None) -> str:
    """Two digits."""
    return "–" if value is None else f"{value:.1e}"


def named(one: Line) -> str:
    """The provider and the variant that was its best."""
    return one.provider + "".join(f" ({key}={value})" for key, value in one.variant.items())


def case_of(results: dict[str, Any]) -> Case:
    """The case of a results file's entry."""
    return Case(**{**results["case"], "groups": tuple(results["case"]["groups"])})


def facts(results: dict[str, Any]) -> str:
    """What the case is and how its logits look."""
    case = case_of(results)
    drawn = results["data"]
    if drawn is None:
        return case.axes
    return (
        f"{case.axes}; mean target probability {drawn['target_probability']:.2f}, entropy "
        f"{drawn['entropy_nats']:.1f} nats, keep-rate at 2^-12 {drawn['keep_rate']:.2%}"
    )


def terminal(results: dict[str, Any]) -> str:
    """A case as a table of fixed width."""
    header = ("", "time [p20–p80]", "/floor", "extra MiB", *(f"err {name}" for name in ERRORS))
    rows: list[tuple[str, ...]] = [header]
    reasons: dict[str, list[str]] = {}
    for one in lines(results):
        if one.reason:
            reasons.setdefault(one.reason, []).append(one.provider)
            continue
        errors = [error(one.errors.get(name)) for name in ERRORS]
        rows.append((named(one), interval(one), ratio(one.over_floor), mebibytes(one.extra_bytes), *errors))
    widths = [max(len(row[at]) for row in rows) for at in range(len(header))]
    table = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    refused = [f"  {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join([f"{results['case']['name']}: {facts(results)}", *table, *refused, ""])


def listing(chosen: Iterable[Case], known: dict[str, Provider]) -> str:
    """What ``--list`` prints."""
    out = ["cases:"]
    out += [f"  {case.name:50} {gigaflop(case):>9.0f} GFLOP  {case.axes}" for case in chosen]
    out += ["", "groups: " + ", ".join(f"{name} ({count})" for name, count in groups().items())]
    out += ["", "providers:"]
    out += [f"  {name:32} {provider.about}" for name, provider in known.items()]
    return "\n".join(out)
