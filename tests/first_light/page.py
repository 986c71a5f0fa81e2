"""The report of first light: Markdown for an issue, from the state that the steps left."""

from typing import Any

from tests.first_light.steps import CASES


def page(device: str, state: dict[str, Any], names: list[str]) -> str:
    """The report. ``state`` has an entry for each step that ran, ``names`` lists all of them."""
    steps = state["steps"]
    good = sum(steps.get(name, {}).get("ok", False) for name in names)
    lines = [
        f"# First light: {state['name']}",
        "",
        f"{good} of {len(names)} steps proved what they are for."
        + ("" if device == "cuda" else " **A dry run on a CPU with small sizes, which proves nothing about a GPU.**"),
        "",
        "| step | result | seconds | what it proved |",
        "|---|---|---|---|",
    ]
    for name in names:
        entry = steps.get(name)
        if entry is None:
            lines.append(f"| {name} | not run | – | – |")
        else:
            said = entry["proved"].replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {name} | {'ok' if entry['ok'] else '**failed**'} | {entry['seconds']:.0f} | {said} |")
    lines += ["", "## Times", "", "| case | decides | milliseconds, median |", "|---|---|---|"]
    for case, question in CASES[device].items():
        facts = steps.get(f"bench/{case}", {}).get("facts", {})
        times = ", ".join(f"{name} {ms:.4g}" for name, ms in sorted(facts.get("milliseconds", {}).items(), key=_second))
        lines.append(f"| {case} | {question} | {times or 'not measured'} |")
    lines += [*_trace(steps), *_widths(steps), *_outputs(steps)]
    report = steps.get("machine", {}).get("facts", {}).get("report")
    if report:
        lines += ["", "## python -m dpo_kernels", "", "```text", report.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _second(item: tuple[str, float]) -> float:
    return item[1]


def _trace(steps: dict[str, Any]) -> list[str]:
    facts = steps.get("trace", {}).get("facts", {})
    if not facts.get("launches"):
        return []
    plain = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "largest")
    rows = [f"| `{name[:100]}` | {number} | {us:g} |" for name, number, us in facts["largest"]]
    return ["", "## One call", "", plain, "", "| kernel | launches | us |", "|---|---|---|", *rows]


def _widths(steps: dict[str, Any]) -> list[str]:
    found = [
        f"- {name}, {case}: {rule}"
        for name, entry in steps.items()
        for case, rules in entry["facts"].get("cases", {}).items()
        for rule in rules
    ]
    return ["", "## Rules that broke", "", *found] if found else []


def _outputs(steps: dict[str, Any]) -> list[str]:
    lines = []
    for name, entry in steps.items():
        if text := entry["facts"].get("output"):
            lines += ["", f"## Output of {name}", "", "```text", text.rstrip(), "```"]
    return lines
