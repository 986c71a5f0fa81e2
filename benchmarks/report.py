"""Pages from results: ``python -m benchmarks.report`` writes docs/benchmarks/ and the README's table.

A page per results file, an index, a page of predictions for GPUs that were never measured, and the README's section
between its markers. ``--check`` writes nothing and fails where a page or the section is not what the results say.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import model, store, tables
from benchmarks.cases import CASES
from benchmarks.tables import Line
from dpo_kernels.device_specs import GPUS, Gpu, gpu_of

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "benchmarks"
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
PEERS_IN_README = ("full logits", "TRL chunked head", "Liger DPO")
README_TOKENS = 2048  # of the README's CPU rows
PREDICTED = ("chunked", "recompute", "streaming", "full logits", "full logits, compiled", "TRL chunked head")


def machines(folder: Path) -> dict[str, dict[str, Any]]:
    """Results by slug: those with a finished case, quick looks left out."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        if store.is_results(path) and not path.stem.endswith("-quick"):
            state = store.load(path)
            if any(case["done"] for case in state["cases"].values()):
                found[path.stem] = state
    return found


def write(results: Path, pages: Path, *, pictures: bool = True) -> list[Path]:
    """All pages with their pictures; pages of results that are gone are removed. Returns what was written.

    Without ``pictures`` the pages name them but none is saved.
    """
    from benchmarks import plots

    pages.mkdir(parents=True, exist_ok=True)
    known = machines(results)
    for old in (*pages.glob("*.md"), *pages.glob("*.png")):
        old.unlink()
    written = []
    for slug, state in known.items():
        done = [case for case in state["cases"].values() if case["done"]]
        gpu = gpu_of(state["machine"]["name"])
        drawn = plots.draw([plots.measured(case, gpu) for case in done], pages, slug, save=pictures)
        written += [pages / name for name, _, _ in drawn]
        written.append(_save(pages / f"{slug}.md", page(slug, state, drawn)))
    for gpu in GPUS.values():
        if gpu.name not in measured_gpus(known):
            written.append(_save(pages / f"nvidia-{gpu.name.lower()}.md", unmeasured(gpu)))
    written.append(_save(pages / "model.md", model_page()))
    written.append(_save(pages / "README.md", index(known)))
    return written


def _save(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def measured_gpus(known: dict[str, dict[str, Any]]) -> set[str]:
    """Names of the model's GPUs that have results."""
    found = (gpu_of(state["machine"]["name"]) for state in known.values())
    return {gpu.name for gpu in found if gpu is not None}


# --- pages ------------------------------------------------------------------------------------------------------------


def index(known: dict[str, dict[str, Any]]) -> str:
    """The list of machines."""
    rows = []
    for slug, state in known.items():
        done = [case for case in state["cases"].values() if case["done"]]
        dates = sorted(case["environment"]["date"] for case in done)
        rows.append(f"| [{state['machine']['name']}]({slug}.md) | {len(done)} | {_span(dates)} |")
    for gpu in GPUS.values():
        if gpu.name not in measured_gpus(known):
            rows.append(f"| [NVIDIA {gpu.name}](nvidia-{gpu.name.lower()}.md) | **not measured** | – |")
    return _text(
        "# Benchmarks",
        "Made by `python -m benchmarks.report` from `benchmarks/results/`. [How it is measured]"
        "(../../benchmarks/README.md).",
        ["| machine | cases | measured |", "|---|---|---|", *rows],
        "[The static model](model.md) predicts GPUs and is compared with published numbers.",
    )


def page(slug: str, state: dict[str, Any], pictures: Iterable[tuple[str, str, str]]) -> str:
    """One machine."""
    machine, cases = state["machine"], state["cases"]
    gpu = gpu_of(machine["name"])
    done = [case for case in cases.values() if case["done"]]
    open_cases = [name for name, case in cases.items() if not case["done"]]
    shown = []
    for name, title, about in pictures:
        shown += [f"### {title}", about, f"![{title}]({name})"]
    flags = f"Instructions: {', '.join(machine['flags'])}." if machine.get("flags") else ""
    return _text(
        f"# {machine['name']}",
        _environments(done),
        flags,
        "Every time is forward and backward to the gradients of hidden states and, unless frozen, head; medians of "
        "interleaved rounds with 20th to 80th percentile in brackets. *Over the floor* is the median of the rounds' "
        "ratios to the bare GEMMs of the scored rows. *Extra* is peak memory without those gradients. Errors are "
        "against float64 on a reduced copy of the case; a row that is wrong, refused or crashed has no time.",
        f"Not finished: {', '.join(open_cases)}." if open_cases else "",
        "## Pictures" if shown else "",
        *shown,
        "## Cases",
        *(part for case in done for part in _case(case, gpu)),
        f"Raw times: [`{slug}.json`](../../benchmarks/results/{slug}.json).",
    )


def _environments(done: list[dict[str, Any]]) -> str:
    said = []
    for case in done:
        e = case["environment"]
        peers = ", ".join(f"{name} {version}" for name, version in e["peers"].items() if version)
        driver = f", driver {e['driver']}, CUDA {e['cuda']}" if "driver" in e else ""
        dirty = " with local changes" if e["dirty"] else ""
        commit = "outside a checkout" if e["commit"] is None else f"commit {e['commit'][:12]}{dirty}"
        text = (
            f"{e['date']}, {commit}, {e['threads']} threads, torch {e['torch']}, triton {e['triton'] or 'none'}, "
            f"Python {e['python']}{driver}; {peers}."
        )
        if text not in said:
            said.append(text)
    return "Measured " + " Also ".join(said)


def _case(case: dict[str, Any], gpu: Gpu | None) -> list[Any]:
    lines = tables.lines(case)
    predicted = f" | predicted on {gpu.name}" if gpu else ""
    header = (
        f"| | time [p20–p80] | over the floor{predicted} | extra MiB | err loss | err log-probs | err dX | err dW |"
    )
    table = [header, "|" + "---|" * (header.count("|") - 1)]
    for one in lines:
        if one.reason is None:
            table.append(_row(one, case, gpu))
    refused = [f"- {names}: {reason}" for reason, names in _reasons(lines).items()]
    return [f"### `{case['case']['name']}`", f"{case['case']['about']}. {tables.facts(case)}.", table, refused]


def _row(one: Line, case: dict[str, Any], gpu: Gpu | None) -> str:
    errors = [tables.error(one.errors.get(name)) for name in tables.ERRORS]
    cells = [tables.named(one), tables.interval(one), tables.ratio(one.over_floor)]
    if gpu:
        way = model.way_of(one.provider)
        cells.append("–" if way is None else tables.ratio(model.predict(tables.case_of(case), gpu, way).over_floor))
    return "| " + " | ".join([*cells, tables.mebibytes(one.extra_bytes), *errors]) + " |"


def _reasons(lines: Iterable[Line]) -> dict[str, str]:
    """Names by reason, so that three refusals for one cause are one line."""
    found: dict[str, list[str]] = {}
    for one in lines:
        if one.reason:
            found.setdefault(one.reason, []).append(one.provider)
    return {reason: ", ".join(names) for reason, names in found.items()}


def unmeasured(gpu: Gpu) -> str:
    """A page for a GPU without results."""
    return _text(
        f"# NVIDIA {gpu.name}",
        "**Not measured.** Below is what the [static model](model.md) predicts, time over the floor of bare GEMMs.",
        f"Constants: {gpu.source}.",
        _predictions(gpu),
        _bars(gpu),
    )


def _predictions(gpu: Gpu) -> list[str]:
    head = "| case | floor, predicted | " + " | ".join(PREDICTED) + " |"
    rows = [head, "|" + "---|" * (head.count("|") - 1)]
    for case in (case for case in CASES.values() if case.device == "cuda"):
        ways = [tables.ratio(model.predict(case, gpu, way).over_floor) for way in PREDICTED]
        least = tables.duration(model.predict(case, gpu, "floor").seconds)
        rows.append(f"| `{case.name}` | {least} | " + " | ".join(ways) + " |")
    return rows


def _bars(gpu: Gpu) -> list[str]:
    """Each bar that the cases are held to, and what is predicted to take the rest of the time."""
    lines = [
        "## Against the bars, predicted",
        "",
        "Share of the floor's rate. What is over the floor is named kernel by kernel, in per cent of it; the model is "
        "not tuned to reach a bar.",
        "",
        "| case | bar | predicted | | over the floor |",
        "|---|---|---|---|---|",
    ]
    for one in model.against_bars(CASES.values(), gpu):
        terms = ", ".join(f"{name} {share:.1%}" for name, share in one.terms.items() if share >= 0.0005)
        verdict = "" if one.met else f"short by {next(iter(one.terms))}"
        lines.append(f"| `{one.case}` | {one.least:.2f} | {one.predicted:.3f} | {verdict} | {terms} |")
    return [*lines, *_peers(gpu)]


def _peers(gpu: Gpu) -> list[str]:
    lines = [
        "",
        "A peer's time over ours with a reference scored in the call, each peer at the library's GEMM rate and without "
        "host syncs, which is its best. Liger and cut-cross-entropy run kernels that the model does not know.",
        "",
        "| case | peer | bar | predicted | |",
        "|---|---|---|---|---|",
    ]
    for one in model.against_peers(CASES.values(), gpu):
        largest = ", ".join(list(one.terms)[:3])
        verdict = "" if one.met else f"short by {largest}: {sum(one.terms.values()):.1%} over the floor"
        lines.append(f"| `{one.case}` | {one.what} | {one.least:.2f} | {one.predicted:.2f} | {verdict} |")
    return lines


def model_page() -> str:
    """What the model says beside published numbers."""
    about = (model.__doc__ or "").strip()
    rows = ["| published | source | ms | predicted | off | promised |", "|---|---|---|---|---|---|"]
    for one in model.published():
        promised = "not modelled" if one.bound is None else f"{one.bound:.0%}"
        rows.append(
            f"| {one.what} | {one.source} | {one.milliseconds:g} | {one.predicted:.1f} | {one.off:+.0%} | {promised} |"
        )
    return _text(
        "# The static model",
        about,
        "H is taken as 4096 where the source does not say, V as 128256 for the per-token head. Rows marked *not "
        "modelled* run kernels of their own that reach less of the peak than the library's GEMMs, or wait for the "
        "host; the model gives what their GEMMs and traffic would take at the library's efficiency.",
        rows,
    )


# --- the README -------------------------------------------------------------------------------------------------------


def readme_section(known: dict[str, dict[str, Any]]) -> str:
    """The README's table: plain cases of CPUs at N=2048 and of GPUs at N=8192, trainable head."""
    parts: list[Any] = []
    for slug, state in known.items():
        rows = [row for case in state["cases"].values() if case["done"] and (row := _readme_row(case))]
        if not rows:
            continue
        peers = " | ".join(f"{name} / floor" for name in PEERS_IN_README)
        head = f"| case | floor | ours / floor | {peers} | extra MiB, ours | full logits |"
        first = next(case for case in state["cases"].values() if case["done"])["environment"]
        parts += [
            f"[{state['machine']['name']}](docs/benchmarks/{slug}.md), {first['threads']} threads, "
            f"torch {first['torch']}, {first['date']}: "
            "forward and backward over the floor of bare GEMMs, trainable head, cached reference.",
            [head, "|" + "---|" * (head.count("|") - 1), *rows],
        ]
    missing = [gpu.name for gpu in GPUS.values() if gpu.name not in measured_gpus(known)]
    if missing:
        predictions = ", ".join(f"[{name}](docs/benchmarks/nvidia-{name.lower()}.md)" for name in missing)
        parts.append(f"Not measured, only predicted: {predictions}.")
    return _text(*parts).strip()


def _readme_row(results: dict[str, Any]) -> str | None:
    case = tables.case_of(results)
    wanted = {"cpu": ("cpu", README_TOKENS), "cuda": ("gpu-models", 8192)}[case.device]
    if wanted[0] not in case.groups or case.tokens != wanted[1] or not case.trainable or case.prompt or case.padding:
        return None
    lines = {one.provider: one for one in tables.lines(results)}
    timed = [one for one in lines.values() if one.family == "ours" and one.seconds is not None]
    if not timed:
        return None
    ours = min(timed, key=lambda one: one.seconds or 0.0)
    peers = [tables.ratio(lines[name].over_floor) if name in lines else "–" for name in PEERS_IN_README]
    floor = tables.duration(lines["floor"].seconds)
    backend = ours.provider.removeprefix("ours/")
    full = tables.mebibytes(lines["full logits"].extra_bytes) if "full logits" in lines else "–"
    return (
        f"| H={case.hidden} V={case.vocab} N={case.tokens} {case.dtype} | {floor} | "
        f"**{tables.ratio(ours.over_floor)}** ({backend}) | {' | '.join(peers)} | "
        f"{tables.mebibytes(ours.extra_bytes)} | {full} |"
    )


def with_section(text: str, known: dict[str, dict[str, Any]]) -> str:
    """The README's text with its section made from the results. Raises ``ValueError`` where it has no markers."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the README has no section between {BEGIN} and {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{readme_section(known)}\n{END}", text)


# --- the command ------------------------------------------------------------------------------------------------------


def stale(results: Path, pages: Path, readme: Path) -> list[str]:
    """Pages, and the README, that are not what the results say; pictures are not compared."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        fresh = [path for path in write(results, Path(folder), pictures=False) if path.suffix == ".md"]
        for path in fresh:
            kept = pages / path.name
            if not kept.exists() or kept.read_text(encoding="utf-8") != path.read_text(encoding="utf-8"):
                found.append(str(kept))
        left = {path.name for path in pages.glob("*.md")} - {path.name for path in fresh}
        found += [str(pages / name) for name in sorted(left)]
    text = readme.read_text(encoding="utf-8")
    if with_section(text, machines(results)) != text:
        found.append(str(readme))
    return found


def main(arguments: list[str]) -> int:
    """Write, or check, pages and README."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=store.RESULTS)
    parser.add_argument("--pages", type=Path, default=PAGES)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is not current")
    asked = parser.parse_args(arguments)
    if asked.check:
        found = stale(asked.results, asked.pages, asked.readme)
        print("\n".join(f"not current: {path}" for path in found) or "all current")
        return int(bool(found))
    written = write(asked.results, asked.pages)
    print(f"{asked.pages}: {len(written)} files")
    try:
        text = with_section(asked.readme.read_text(encoding="utf-8"), machines(asked.results))
    except ValueError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    asked.readme.write_text(text, encoding="utf-8")
    return 0


def _span(dates: list[str]) -> str:
    return dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"


def _text(*parts: Any) -> str:
    """Paragraphs; a list is lines of one paragraph, an empty part nothing."""
    joined = ["\n".join(part) if isinstance(part, list) else part for part in parts if part]
    return "\n\n".join(joined) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
