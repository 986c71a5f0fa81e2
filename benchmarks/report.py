"""Pages from results: ``python -m benchmarks.report`` writes docs/benchmarks/ and the tables of other pages.

It writes a page for each results file, an index, a page of predictions for each GPU that was never measured and one for
many GPUs, the table of docs/performance.md, and the README's short tables and pictures. ``--check`` writes nothing. It
fails where a page or a section between markers is not what the results say.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import environment, model, scaling_page, store, tables
from benchmarks.cases import CASES
from benchmarks.tables import Line
from dpo_kernels.device_specs import GPUS, Gpu, gpu_of

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "benchmarks"
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
IMAGES = "docs/images"  # seen from the root, where the README is
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
SHOWN_PEERS = ("full logits", "TRL chunked head", "Liger DPO")
SHOWN_TOKENS = {"cpu": ("cpu", 2048), "cuda": ("gpu-models", 8192)}  # group and scored tokens of the cases in tables
ROUNDS = "A ratio is the median over rounds of measurement, so it is not the quotient of the times shown."
FULL_LOGITS = "The table's full logits are plain torch, not compiled."
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
    written.append(_save(pages / "scaling.md", _text(*scaling_page.parts())))
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
        "[The static model](model.md) predicts GPUs and is compared with published numbers. [Many GPUs](scaling.md) is "
        "what it says of heads that are split over ranks.",
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


# --- sections of other pages ------------------------------------------------------------------------------------------


def performance_section(known: dict[str, dict[str, Any]]) -> str:
    """The table of docs/performance.md: plain cases of CPUs at N=2048 and of GPUs at N=8192, trainable head."""
    parts: list[Any] = []
    for slug, state in known.items():
        rows = [_performance_row(case) for case in shown_cases(state)]
        if not rows:
            continue
        peers = " | ".join(f"{name} / floor" for name in SHOWN_PEERS)
        head = f"| case | floor | ours / floor | {peers} | extra MiB, ours | full logits |"
        parts += [
            f"[{state['machine']['name']}](benchmarks/{slug}.md), {_conditions(state)}: forward and backward over the "
            "floor of bare GEMMs, trainable head, cached reference.",
            [head, "|" + "---|" * (head.count("|") - 1), *rows],
            " ".join([ROUNDS, FULL_LOGITS, *_below_the_floor(shown_cases(state))]),
        ]
    parts.append(_predicted_only(known, "benchmarks"))
    return _text(*parts).strip()


def readme_section(known: dict[str, dict[str, Any]]) -> str:
    """The README's pictures and short tables: of one machine of each kind one dtype and the largest vocabulary."""
    parts: list[Any] = []
    shown = readme_machines(known)
    for slug, state in shown.items():
        cases = readme_cases(state)
        dtype, vocab = tables.case_of(cases[0]).dtype, max(tables.case_of(case).vocab for case in cases)
        rows = [_readme_row(case) for case in cases if tables.case_of(case).vocab == vocab]
        head = f"| case | ours | {' | '.join(SHOWN_PEERS)} |"
        picture = f"{IMAGES}/{slug}"
        about = f"Time and extra memory on {state['machine']['name']}: full logits, TRL, Liger and ours"
        parts += [
            [
                "<picture>",
                f'  <source media="(prefers-color-scheme: dark)" srcset="{picture}-dark.svg">',
                f'  <img alt="{about}" src="{picture}-light.svg">',
                "</picture>",
            ],
            f"Time and extra memory, forward and backward, {dtype}, trainable head, cached reference, on "
            f"[{state['machine']['name']}](docs/benchmarks/{slug}.md), {_conditions(state)}:",
            [head, "|" + "---|" * (head.count("|") - 1), *rows],
            f"{_said_of_ours(cases)} The picture shows time over that of the bare matrix products (dashed line). "
            f"{ROUNDS} {FULL_LOGITS} The picture has the fastest variant, which is compiled where that was measured.",
        ]
    others = [
        f"[{state['machine']['name']}](docs/benchmarks/{slug}.md)" for slug, state in known.items() if slug not in shown
    ]
    found = [f"Measured too: {', '.join(others)}." if others else "", _predicted_only(known, "docs/benchmarks")]
    parts.append(" ".join(filter(None, found)))
    return _text(*parts).strip()


def readme_machines(known: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each kind of device the machine with the newest results, and of these the one with most of them."""

    def newest(slug: str) -> tuple[str, int, str]:
        done = [case for case in known[slug]["cases"].values() if case["done"]]
        return max(case["environment"]["date"] for case in done), len(readme_cases(known[slug])), slug

    best: dict[str, str] = {}
    for slug, state in known.items():
        kind = state["machine"]["kind"]
        if readme_cases(state) and (kind not in best or newest(slug) > newest(best[kind])):
            best[kind] = slug
    return {slug: state for slug, state in known.items() if slug in best.values()}


def shown_cases(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of the finished cases that the tables show, those of ours that have a time."""
    found = []
    for results in state["cases"].values():
        case = tables.case_of(results)
        group, tokens = SHOWN_TOKENS[case.device]
        plain = group in case.groups and case.tokens == tokens and not (case.prompt or case.padding)
        if results["done"] and plain and case.trainable and _ours(results) is not None:
            found.append(results)
    return found


def readme_cases(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the shown cases that the README has a picture and a table of: in what the device multiplies fast."""
    fast = state["machine"]["kind"] == "cuda" or environment.FAST_BF16 & set(state["machine"].get("flags", ()))
    dtype = "bfloat16" if fast else "float32"
    return [results for results in shown_cases(state) if tables.case_of(results).dtype == dtype]


def _ours(results: dict[str, Any]) -> Line | None:
    """Our fastest row of a case."""
    timed = [one for one in tables.lines(results) if one.family == "ours" and one.seconds is not None]
    return min(timed, key=lambda one: one.seconds or 0.0) if timed else None


def _said_of_ours(cases: Iterable[dict[str, Any]]) -> str:
    """Which backend and strategy stand in the column of ours."""
    found = {ours.provider.removeprefix("ours/") for case in cases if (ours := _ours(case)) is not None}
    named = ("the backend `{}` with the strategy `{}`".format(*name.split("/", 1)) for name in sorted(found))
    return f'"Ours" is {", or ".join(named)}.'


def _below_the_floor(cases: Iterable[dict[str, Any]]) -> list[str]:
    """A sentence for each float32 row of ours that is below 1. The same GEMMs do not take less time than the floor."""
    said = []
    for results in cases:
        case, ours = tables.case_of(results), _ours(results)
        floor = tables.line(results, "floor")
        if case.dtype == "float32" and ours is not None and ours.over_floor is not None and ours.over_floor < 1:
            said.append(
                f"The {tables.ratio(ours.over_floor)} of H={case.hidden} V={case.vocab} {case.dtype} is noise of the "
                f"floor, whose rounds took {tables.interval(floor)} (median, 20th to 80th percentile)."
            )
    return said


def _conditions(state: dict[str, Any]) -> str:
    first = next(case for case in state["cases"].values() if case["done"])["environment"]
    return f"{first['threads']} threads, torch {first['torch']}, {first['date']}"


def _predicted_only(known: dict[str, dict[str, Any]], folder: str) -> str:
    missing = [gpu.name for gpu in GPUS.values() if gpu.name not in measured_gpus(known)]
    links = ", ".join(f"[{name}]({folder}/nvidia-{name.lower()}.md)" for name in missing)
    return f"Not measured, only predicted: {links}." if missing else ""


def _performance_row(results: dict[str, Any]) -> str:
    case, ours = tables.case_of(results), _ours(results)
    assert ours is not None
    lines = {one.provider: one for one in tables.lines(results)}
    peers = [tables.ratio(lines[name].over_floor) if name in lines else "–" for name in SHOWN_PEERS]
    floor = tables.duration(lines["floor"].seconds)
    backend = ours.provider.removeprefix("ours/")
    full = tables.mebibytes(lines["full logits"].extra_bytes) if "full logits" in lines else "–"
    return (
        f"| H={case.hidden} V={case.vocab} N={case.tokens} {case.dtype} | {floor} | "
        f"**{tables.ratio(ours.over_floor)}** ({backend}) | {' | '.join(peers)} | "
        f"{tables.mebibytes(ours.extra_bytes)} | {full} |"
    )


def _readme_row(results: dict[str, Any]) -> str:
    case, ours = tables.case_of(results), _ours(results)
    lines = {one.provider: one for one in tables.lines(results)}
    cells = [
        f"{tables.duration(one.seconds)}, {tables.mebibytes(one.extra_bytes)} MiB" if one and one.seconds else "–"
        for one in (ours, *(lines.get(name) for name in SHOWN_PEERS))
    ]
    return f"| H={case.hidden} V={case.vocab} N={case.tokens} | **{cells[0]}** | {' | '.join(cells[1:])} |"


def with_section(text: str, made: str) -> str:
    """A page's text with its section replaced. Raises ``ValueError`` where it has no markers."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the page has no section between {BEGIN} and {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{made}\n{END}", text)


def sections(results: Path, readme: Path, performance: Path) -> dict[Path, str]:
    """The pages with a section between markers, as their text should be."""
    known = machines(results)
    made = {readme: readme_section(known), performance: performance_section(known)}
    return {path: with_section(path.read_text(encoding="utf-8"), section) for path, section in made.items()}


# --- the command ------------------------------------------------------------------------------------------------------


def stale(results: Path, pages: Path, readme: Path, performance: Path) -> list[str]:
    """Pages and sections that are not what the results say; pictures are not compared."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        fresh = [path for path in write(results, Path(folder), pictures=False) if path.suffix == ".md"]
        for path in fresh:
            kept = pages / path.name
            if not kept.exists() or kept.read_text(encoding="utf-8") != path.read_text(encoding="utf-8"):
                found.append(str(kept))
        left = {path.name for path in pages.glob("*.md")} - {path.name for path in fresh}
        found += [str(pages / name) for name in sorted(left)]
    for path, text in sections(results, readme, performance).items():
        if path.read_text(encoding="utf-8") != text:
            found.append(str(path))
    return found


def main(arguments: list[str]) -> int:
    """Write, or check, the pages and the sections of others."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=store.RESULTS)
    parser.add_argument("--pages", type=Path, default=PAGES)
    parser.add_argument("--readme", type=Path, default=README, help="its pictures go to docs/images beside it")
    parser.add_argument("--performance", type=Path, default=PERFORMANCE)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is not current")
    asked = parser.parse_args(arguments)
    if asked.check:
        found = stale(asked.results, asked.pages, asked.readme, asked.performance)
        print("\n".join(f"not current: {path}" for path in found) or "all current")
        return int(bool(found))
    written = write(asked.results, asked.pages)
    print(f"{asked.pages}: {len(written)} files")
    try:
        texts = sections(asked.results, asked.readme, asked.performance)
    except ValueError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    draw_overviews(machines(asked.results), asked.readme.parent / IMAGES)
    return 0


def draw_overviews(known: dict[str, dict[str, Any]], folder: Path) -> None:
    """The README's pictures, light and dark; those of results that are gone are removed."""
    from benchmarks import plots

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    for slug, state in readme_machines(known).items():
        plots.overview([plots.measured(case, None) for case in readme_cases(state)], folder, slug)


def _span(dates: list[str]) -> str:
    return dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"


def _text(*parts: Any) -> str:
    """Paragraphs; a list is lines of one paragraph, an empty part nothing."""
    joined = ["\n".join(part) if isinstance(part, list) else part for part in parts if part]
    return "\n\n".join(joined) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
