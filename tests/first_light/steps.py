"""The steps of first light: each runs a command, and says what it proved, or what is wrong."""

import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.first_light.widths import TRITON_KERNELS

ROOT = Path(__file__).resolve().parents[2]
KERNELS, STEPS = "tests/kernels/test_gpu.py::test_", "tests/gpu/test_steps.py::test_"
# The twenty most telling tests: what only hardware shows, what a reading of the code found doubtful, and one of each
# kind of step.
TESTS_ON_A_GPU = (
    f"{STEPS}triton_is_here",
    f"{KERNELS}tiles_of_one_row[torch.bfloat16-triton]",
    f"{KERNELS}tiles_of_one_row[torch.float16-torch]",
    f"{KERNELS}every_launch_of_the_families[plain-0-torch.bfloat16]",
    f"{KERNELS}every_launch_of_the_families[plain-1-torch.bfloat16]",
    f"{KERNELS}every_launch_of_the_families[rich-0-torch.float16]",
    f"{KERNELS}equivalence[packed-shift-interleaved-torch.bfloat16-chunked-triton]",
    f"{KERNELS}equivalence[packed-shift-interleaved-torch.float32-recompute-triton]",
    f"{KERNELS}equivalence[padded-torch.float16-streaming-triton]",
    f"{KERNELS}no_sync_with_a_static_capacity[triton]",
    f"{KERNELS}a_captured_step_replays_on_other_data[False-triton]",
    f"{KERNELS}flat_rows_of_a_large_vocabulary_in_float16[triton]",
    f"{KERNELS}a_bad_label_is_nan_not_a_device_assert[triton]",
    f"{KERNELS}repeated_runs_are_equal[recompute-triton]",
    f"{STEPS}a_graph_is_captured_with_autotuning_on",
    f"{STEPS}a_compiled_call_is_the_call[cuda-triton]",
    f"{STEPS}main_grad[torch.bfloat16-cuda-triton]",
    f"{STEPS}the_peak_is_what_the_plan_says[triton-torch.bfloat16]",
    f"{STEPS}two_streams[cuda-triton]",
    f"{STEPS}sequences_and_groups[cuda-triton]",
)
TESTS_ON_A_CPU = (
    f"{STEPS}main_grad[torch.bfloat16-cpu-torch]",
    f"{STEPS}two_streams[cpu-torch]",
    f"{STEPS}sequences_and_groups[cpu-torch]",
)
BACKENDS = {"cuda": ("triton", "cuda", "torch"), "cpu": ("torch",)}
# The benchmark cases that decide, and what they decide.
CASES = {
    "cuda": {
        "gpu/llama3-8b/n8192/bf16/trainable": "whether three products beat four, and compiled full logits",
        "gpu/llama3-8b/n2048/bf16/trainable": "what the host's time before the first product costs a small batch",
        "gpu/llama3-8b/n8192/bf16/frozen": "what the kernel of one reading is worth",
        "gpu-axes/own-reference": "what is left of the lead with a reference in the call",
    },
    "cpu": {"quick/256x8192/n128/fp32/trainable": "nothing: it tries the step"},
}
PROVIDERS = {
    "cuda": ("full logits*", "ours/*/chunked", "TRL chunked head", "Liger DPO"),
    "cpu": ("ours/torch/chunked",),
}
SECONDS = {"cuda": "5", "cpu": "0"}  # of timed rounds for a case; three rounds at least


@dataclass
class Result:
    """What came of a step."""

    ok: bool
    proved: str  # in one sentence, also where it failed
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where the steps run, and where they leave files."""

    device: str  # cuda or cpu
    folder: Path
    in_process: bool = False  # no processes of their own, for tests

    def run(self, module: str, *arguments: str, seconds: float) -> tuple[int, str]:
        """Run a module's ``main``; returns its status and what it printed. A process that hangs ends with 124."""
        if self.in_process:
            said = io.StringIO()
            name = f"{module}.__main__" if module == "dpo_kernels" else module
            with redirect_stdout(said):
                status = import_module(name).main(list(arguments))
            return status, said.getvalue()
        return command(sys.executable, "-m", module, *arguments, seconds=seconds)


def command(*words: str, seconds: float) -> tuple[int, str]:
    """Run a command in the checkout; returns its status and both streams."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        return 124, said.decode(errors="replace") if isinstance(said, bytes) else said
    return done.returncode, done.stdout


def _ending(status: int, text: str) -> str:
    """How a process ended, with its last words."""
    words = [line for line in text.splitlines() if line.strip() and not line.startswith("USDT")]
    how = "did not end in time" if status == 124 else f"ended with {status}"
    return f"{how}: {words[-1].strip()[:300] if words else 'it said nothing'}"


# --- the steps --------------------------------------------------------------------------------------------------------


def machine(place: Place, seconds: float) -> Result:
    """Run ``python -m dpo_kernels``."""
    status, text = place.run("dpo_kernels", "--device", place.device, seconds=seconds)
    failed = [line.strip() for line in text.splitlines() if "its self-check" in line]
    if failed:
        return Result(False, failed[0], {"report": text})
    if status != 0:
        return Result(False, f"the report {_ending(status, text)}", {"report": text})
    healthy = text.count("agrees with torch")
    return Result(True, f"{healthy} pairs of backend and dtype agree with torch on small problems", {"report": text})


def tests(place: Place, seconds: float) -> Result:
    """Run the most telling tests, each of which pytest judges."""
    names = TESTS_ON_A_GPU if place.device == "cuda" else TESTS_ON_A_CPU
    place.folder.mkdir(parents=True, exist_ok=True)
    report = place.folder / "tests.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-W", "default", "-p", "no:cacheprovider", f"--junitxml={report}"]
    if place.device == "cuda":
        options += ["-n", "4"]  # most of the time goes to compilers, which run on the CPU
    status, text = command(sys.executable, "-m", "pytest", *options, *names, seconds=seconds)
    if not report.exists():
        return Result(False, f"pytest {_ending(status, text)}", {"output": text[-4000:]})
    outcomes = dict(_outcomes(report))
    passed = [name for name, outcome in outcomes.items() if outcome == "passed"]
    rest = {name: outcome for name, outcome in outcomes.items() if outcome != "passed"}
    said = f"{len(passed)} of {len(names)} tests pass"
    if rest:
        said += "; " + "; ".join(f"{name}: {outcome}" for name, outcome in list(rest.items())[:3])
    return Result(len(passed) == len(names), said, {"outcomes": outcomes, "output": text[-8000:] if rest else ""})


def _outcomes(report: Path) -> Iterator[tuple[str, str]]:
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        worse = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if worse is None else f"{worse.tag}: {worse.attrib.get('message', '')[:300]}"
        yield case.attrib["name"], outcome


def widths(place: Place, seconds: float, backend: str) -> Result:
    """Compare a backend with the oracle at the widths of models."""
    status, text = place.run("tests.first_light.widths", place.device, backend, seconds=seconds)
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    judged = {each["case"]: each["broken"] for each in found if "case" in each}
    launched = next((each["launched"] for each in found if "launched" in each), [])
    broken = {name: rules for name, rules in judged.items() if rules}
    facts = {"cases": judged, "launched": launched}
    if status != 0:
        return Result(False, f"after {len(judged)} cases it {_ending(status, text)}", facts | {"output": text[-4000:]})
    if broken:
        name, rules = next(iter(broken.items()))
        return Result(False, f"{len(broken)} of {len(judged)} cases differ from the oracle; {name}: {rules[0]}", facts)
    missing = sorted(set(TRITON_KERNELS) - set(launched)) if (place.device, backend) == ("cuda", "triton") else []
    if missing:
        return Result(False, f"all agree, but the profiler saw no launch of {', '.join(missing)}", facts)
    kernels = f", {len(launched)} kernels were launched" if launched else ""
    return Result(True, f"{len(judged)} cases keep the tolerance against float64{kernels}", facts)


def trace(place: Place, seconds: float) -> Result:
    """Trace one call of the backend that ``auto`` takes."""
    status, text = place.run("tests.first_light.trace", place.device, str(place.folder), seconds=seconds)
    found = next((json.loads(line) for line in text.splitlines() if line.startswith("{")), None)
    if status != 0 or found is None:
        return Result(False, f"the trace {_ending(status, text)}", {"output": text[-4000:]})
    if not found["launches"] or not found["products"]:
        return Result(False, "the profiler saw no matrix product", found)
    said = (
        f"{found['launches']} launches, {found['idle_before_first_product_us']:g} us idle before the first product, "
        f"{found['idle_us']:g} of {found['span_us']:g} us idle in all"
    )
    return Result(True, said, found)


def bench(place: Place, seconds: float, case: str) -> Result:
    """Measure one benchmark case."""
    out = place.folder / "benchmarks.json"
    options = [
        "--device",
        place.device,
        "--only",
        case,
        "--out",
        str(out),
        "--seconds",
        SECONDS[place.device],
        "--resume",
    ]
    for pattern in PROVIDERS[place.device]:
        options += ["--providers", pattern]
    options += ["--in-process"] if place.in_process else []
    place.folder.mkdir(parents=True, exist_ok=True)
    status, text = place.run("benchmarks.run", *options, seconds=seconds)
    if not out.exists():
        return Result(False, f"the benchmark {_ending(status, text)}", {"output": text[-4000:]})
    return _judged(case, json.loads(out.read_text()), status, text)


def _judged(case: str, results: dict[str, Any], status: int, text: str) -> Result:
    """What the rows of a case say: times as multiples of our fastest, or what is wrong."""
    rows = results["cases"].get(case, {"rows": {}})["rows"]
    times = {
        name: 1e3 * statistics.median(seconds for _, samples in row["rounds"] for seconds in samples)
        for name, row in rows.items()
        if row["rounds"]
    }
    reasons = {name: row["reason"] for name, row in rows.items() if row.get("reason")}
    facts = {"milliseconds": {name: round(ms, 4) for name, ms in times.items()}, "reasons": reasons}
    wrong = [f"{name}: {reason}" for name, reason in reasons.items() if reason.startswith(("wrong", "crashed"))]
    ours = [(ms, name) for name, ms in times.items() if name.startswith("ours/")]
    if wrong:
        return Result(False, wrong[0], facts)
    if status != 0:
        return Result(False, f"the benchmark {_ending(status, text)}", facts | {"output": text[-4000:]})
    if not ours:
        return Result(False, "nothing of ours was timed", facts | {"output": text[-4000:]})
    least, fastest = min(ours)
    others = [f"{ms / least:.2f} {name}" for name, ms in times.items() if not name.startswith("ours/")]
    return Result(True, f"{fastest} takes {least:.4g} ms; as multiples of it: {', '.join(others)}", facts)


Step = Callable[[Place, float], Result]


def all_steps(device: str) -> dict[str, tuple[Step, float]]:
    """The steps by name in their order, each with the most seconds that it may take."""
    found: dict[str, tuple[Step, float]] = {"machine": (machine, 180.0)}
    for backend in BACKENDS[device]:
        found[f"widths/{backend}"] = (_with(widths, backend), 240.0)
    found["trace"] = (trace, 120.0)
    found["tests"] = (tests, 420.0)
    for case in CASES[device]:
        found[f"bench/{case}"] = (_with(bench, case), 300.0)
    return found


def _with(function: Callable[[Place, float, str], Result], what: str) -> Step:
    return lambda place, seconds: function(place, seconds, what)
