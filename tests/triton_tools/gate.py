"""The ahead-of-time gate compiles every configuration of every Triton kernel for every target and checks the code.

``python -m tests.triton_tools.gate`` (``make kernels-check``) needs no GPU. It prints a line for each configuration
(``configurations.py``) and target. It exits with 1 and the reasons if a rule of ``broken_rules`` is broken, or if a
kernel has no configuration. Results are kept in ``.kernels_check_cache`` (another folder: ``DPO_KERNELS_CHECK_CACHE``),
so that a run without changes takes seconds. A kernel that does not compile is compiled again each time.

``--keep`` writes ``measured.json``: the results, with a key of what was compiled. They are the bar for later runs. With
``--known``, as the tests run the gate, a kept result counts if source, launch and triton are still the same. One
configuration for each target is compiled all the same.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tests.triton_tools.aot import Measured
    from tests.triton_tools.configurations import Configuration

ROOT = Path(__file__).resolve().parents[2]
KERNELS, CONFIGURED = "dpo_kernels.kernels.triton", "tests.triton_tools.configurations"
PROCESSES = 2
STACK_CAP = 128  # bytes a thread; a few spills outside the loop cost nothing, so "no stack at all" is too strict
NARROW_CAP = 8  # accesses of 16 bits; a bias is read once a tile, in its own 16 bits
TENSOR_COLUMNS_CAP = 512  # columns of Blackwell's tensor memory, which has no more
REASON_LENGTH = 200


class Job(NamedTuple):
    """One configuration for one target, by names with which another process finds it."""

    module: str
    index: int  # in the module's CONFIGURATIONS
    target: str


class Verdict(NamedTuple):
    """A line of the table; ``measured`` is None where the kernel does not compile."""

    name: str
    target: str
    measured: "Measured | None"
    reasons: list[str]


# --- the rules ----------------------------------------------------------------------------------------------


def broken_rules(configuration: "Configuration", target: str, measured: "Measured") -> list[str]:
    """Why a compiled configuration must not be launched on ``target``; empty if it may be."""
    from tests.triton_tools.aot import TARGETS

    gpu, reasons = TARGETS[target], []
    if measured.shared_bytes > gpu.shared_cap:
        reasons.append(f"{measured.shared_bytes} bytes of shared memory, {target} has {gpu.shared_cap}")
    if measured.tensor_columns > TENSOR_COLUMNS_CAP:
        reasons.append(f"{measured.tensor_columns} columns of tensor memory, {target} has {TENSOR_COLUMNS_CAP}")
    if measured.local_in_loops:
        reasons.append(f"{measured.local_in_loops} local loads and stores in the MMA loop")
    if measured.stack_bytes > STACK_CAP:
        reasons.append(f"{measured.stack_bytes} bytes of stack, more than {STACK_CAP}")
    if measured.narrow > NARROW_CAP:
        reasons.append(f"{measured.narrow} accesses of 16 bits or fewer: rows are not known to be aligned")
    if unknown := sorted(set(measured.approximate) - set(gpu.approximate)):
        reasons.append(f"the interpreter has no model of {', '.join(unknown)}")
    if not configuration.matrix:
        return reasons
    if not measured.matrix.get(gpu.matrix):
        others = " and ".join(measured.matrix)
        reasons.append(f"no {gpu.matrix}" + (f" but {others}" if others else ", no matrix instruction at all"))
    if gpu.backend == "hip":
        if not measured.prefetched:
            reasons.append("loads are not pipelined: the MMA loop waits for what it loads")
    elif not measured.async_copies:
        reasons.append("loads are not pipelined: no cp.async, no TMA")
    elif measured.loads_in_loops:
        reasons.append(f"loads are not pipelined: {measured.loads_in_loops} plain global loads in the MMA loop")
    return reasons


def ungated(modules: list[str], jobs: list[Job]) -> list[str]:
    """Public kernels of these modules that no configuration compiles for some target."""
    from triton.runtime.jit import JITFunction

    from tests.triton_tools.aot import TARGETS

    seen = {(_configuration(job).kernel, job.target) for job in jobs}
    missing = []
    for module in modules:
        for name, kernel in vars(importlib.import_module(module)).items():
            if isinstance(kernel, JITFunction) and kernel.__module__ == module and not name.startswith("_"):
                targets = [target for target in TARGETS if (kernel, target) not in seen]
                missing += [f"{module}.{name}: no configuration for {', '.join(targets)}"] if targets else []
    return missing


# --- which configurations -----------------------------------------------------------------------------------


def kernel_modules() -> list[str]:
    """Every module of the package of Triton kernels."""
    package = importlib.import_module(KERNELS)
    return sorted(module.name for module in pkgutil.walk_packages(package.__path__, f"{KERNELS}."))


def all_jobs(modules: list[str]) -> list[Job]:
    """Every configuration of ``modules`` with each of its targets."""
    from tests.triton_tools.aot import TARGETS

    jobs = []
    for module in modules:
        for index, configuration in enumerate(getattr(importlib.import_module(module), "CONFIGURATIONS", [])):
            unknown = set(configuration.targets) - set(TARGETS)
            if unknown:
                raise ValueError(f"{module}: {configuration.name!r} names the unknown targets {sorted(unknown)}")
            jobs += [Job(module, index, target) for target in configuration.targets]
    names = Counter((job.module, _configuration(job).name, job.target) for job in jobs)
    if twice := [key for key, count in names.items() if count > 1]:
        raise ValueError(f"two configurations of one name: {twice}")
    return jobs


def _configuration(job: Job) -> "Configuration":
    return importlib.import_module(job.module).CONFIGURATIONS[job.index]


# --- measuring, in other processes --------------------------------------------------------------------------


def measured_or_why(
    jobs: list[Job], cache: Path, known: dict[str, "Measured"] | None = None
) -> Iterator["Measured | str"]:
    """For each job the measurements, or why it does not compile; ``known`` are results by key."""
    keys = [_key(job) for job in jobs]
    # One job of each target is compiled even if known. Its key chooses it, so each change of source draws another.
    by_key = sorted(zip(keys, jobs, strict=True), reverse=True)
    samples = {job.target: job for _, job in by_key}.values()
    results: list[Measured | str | None] = []
    for key, job in zip(keys, jobs, strict=True):
        trusted = None if known is None or job in samples else known.get(key)
        results.append(trusted or _recall(cache / f"{key}.json"))
    missing = [number for number, result in enumerate(results) if result is None]
    if missing:
        print(f"compiling {len(missing)} of {len(jobs)}, the rest is known", flush=True)
        compiled = _compile_all([jobs[number] for number in missing], cache)
        for number, result in zip(missing, compiled, strict=True):
            results[number] = result
    yield from (result for result in results if result is not None)


def _compile_all(jobs: list[Job], cache: Path) -> list["Measured | str"]:
    results: dict[int, Measured | str] = {}
    with tempfile.TemporaryDirectory(prefix="kernels-check-") as scratch:
        logs = [Path(scratch, f"{number}.log") for number in range(len(jobs))]
        run = partial(_run, jobs, logs, cache)
        while waiting := [number for number in range(len(jobs)) if number not in results]:
            results |= run(waiting, PROCESSES)
            # A compiler that aborts takes the pool with it. The jobs that were running are then tried alone.
            lost = [number for number in waiting if number not in results]
            for number in [number for number in lost if logs[number].exists()] or lost:
                results |= run([number], 1) or {number: f"does not compile: crash: {_said(logs[number])}"}
    return [results[number] for number in range(len(jobs))]


def _said(log: Path) -> str:
    return (log.exists() and shortened(log.read_text(errors="replace"))) or "the compiler's process died without a word"


def _workers() -> BaseContext:
    """Processes forked from one that has imported torch and triton, if the system can fork; imports take seconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.triton_tools.aot", CONFIGURED])
    return context


def _run(
    jobs: list[Job], logs: list[Path], cache: Path, numbers: list[int], processes: int
) -> dict[int, "Measured | str"]:
    """The results of the jobs that finished."""
    with ProcessPoolExecutor(min(processes, len(numbers)), mp_context=_workers()) as pool:
        futures: dict[int, Future[Measured | str]] = {}
        with contextlib.suppress(BrokenProcessPool):
            for number in numbers:
                futures[number] = pool.submit(_compile, jobs[number], logs[number], cache)
    return {
        number: future.result()
        for number, future in futures.items()
        if not isinstance(future.exception(), BrokenProcessPool)
    }


def _compile(job: Job, log: Path, cache: Path) -> "Measured | str":
    from tests.triton_tools import aot

    # Intermediate code of targets that nobody launches on would only fill Triton's usual cache.
    os.environ["TRITON_CACHE_DIR"] = str(log.with_name("triton"))
    configuration = _configuration(job)
    try:
        with _output_to(log):
            compiled = aot.compile_for(configuration, job.target)
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the finding
        printed = log.read_text(errors="replace")  # MLIR raises "PassManager::run failed" and prints what did
        message = shortened(f"{printed}\n{type(error).__name__}: {error}")
        return f"does not compile: {message}"
    measured = aot.measure(compiled, job.target)
    # Under this process's key: the source may have been edited since the other one read it.
    _keep(cache / f"{_key(job)}.json", measured)
    return measured


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send what this process and its children write to ``log``; MLIR and ptxas print whole programs."""
    kept = [os.dup(1), os.dup(2)]
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in enumerate(kept, start=1):
                os.dup2(copy, number)
                os.close(copy)


def shortened(text: str) -> str:
    """The line of a compiler's message that names the error, or the last; at most REASON_LENGTH characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" \t^~")]
    for telling in (r"\bfatal\b", r"\bLLVM ERROR\b", r"error\b ?:"):
        if found := [line for line in lines if re.search(telling, line)]:
            return found[0][:REASON_LENGTH]
    return "".join(lines[-1:])[:REASON_LENGTH]


# --- what is known already ----------------------------------------------------------------------------------


def _cache_folder() -> Path:
    folder = Path(os.environ.get("DPO_KERNELS_CHECK_CACHE") or ROOT / ".kernels_check_cache")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    return folder


def _key(job: Job) -> str:
    """A hash of everything that decides about the machine code, and of the code that measures it."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars

    from tests.triton_tools import aot

    configuration = _configuration(job)
    try:
        source = configuration.kernel.cache_key  # includes the functions that the kernel calls
    except Exception as error:  # noqa: BLE001 - the source has what Triton refuses, and the compiler will say so again
        source = repr(error)
    own = {name: value for name, value in os.environ.items() if re.match(r"TRITON_(PTXAS|DEFAULT)", name)}
    parts = [
        triton.__version__,
        [getattr(configuration.kernel, "__module__", ""), getattr(configuration.kernel, "__name__", ""), source],
        sorted((name, repr(value)) for name, value in configuration.arguments.items()),
        sorted(configuration.options.items()),
        job.target,
        sorted((get_cache_invalidating_env_vars() | own).items()),
        Path(aot.__file__).read_text(encoding="utf-8"),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _recall(path: Path) -> "Measured | None":
    from tests.triton_tools.aot import Measured

    try:
        return Measured(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, TypeError, ValueError):  # a damaged record is measured again
        return None


def _keep(path: Path, measured: "Measured") -> None:
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(dataclasses.asdict(measured)), encoding="utf-8")
    beside.replace(path)


# --- what it was before -------------------------------------------------------------------------------------

KEPT = Path(__file__).with_name("measured.json")
SLACK = 1.1  # the change, as a factor, that counts as ptxas's own variation
GROWS = ("registers", "stack_bytes", "shared_bytes", "local", "local_in_loops", "loads_in_loops", "narrow")
SHRINKS = ("widest_bits", "async_copies")


def regressions(verdicts: list[Verdict], kept: dict[str, object], version: str) -> list[str]:
    """Facts that became worse than those kept; none if another version of triton compiled those."""
    if kept.get("triton") != version:
        return []
    before, found = kept["kernels"], []
    assert isinstance(before, dict)
    for verdict in verdicts:
        was, now = before.get(f"{verdict.name} @ {verdict.target}"), verdict.measured
        if was is None or now is None:
            continue
        for name in GROWS:
            if getattr(now, name) > SLACK * was[name]:
                found.append(f"{verdict.name} on {verdict.target}: {name} {was[name]} -> {getattr(now, name)}")
        for name in SHRINKS:
            if SLACK * getattr(now, name) < was[name]:
                found.append(f"{verdict.name} on {verdict.target}: {name} {was[name]} -> {getattr(now, name)}")
        if was["matrix"] != now.matrix:
            found.append(f"{verdict.name} on {verdict.target}: matrix instructions {was['matrix']} -> {now.matrix}")
    return found


def known_results(kept: dict[str, object]) -> dict[str, "Measured"]:
    """The kept results, by the keys of what was compiled."""
    from tests.triton_tools.aot import Measured

    kernels = kept["kernels"]
    assert isinstance(kernels, dict)
    records = [dict(record) for record in kernels.values()]
    return {record.pop("of"): Measured(**record) for record in records}


def keep_measured(verdicts: list[Verdict], keys: list[str], version: str) -> None:
    """Make these results the bar for the next run; ``keys`` are those of what was compiled.

    A record and its key stand on one line, so that a merge takes both or neither.
    """
    records = {
        f"{verdict.name} @ {verdict.target}": dataclasses.asdict(verdict.measured) | {"of": key}
        for verdict, key in zip(verdicts, keys, strict=True)
        if verdict.measured is not None
    }
    lines = [f"  {json.dumps(name)}: {json.dumps(record)}" for name, record in sorted(records.items())]
    listed = ",\n".join(lines)
    KEPT.write_text(f'{{"triton": {json.dumps(version)}, "kernels": {{\n{listed}\n}}}}\n', encoding="utf-8")


# --- the command --------------------------------------------------------------------------------------------

_began = False  # whether the gate ran in this process before, and so imported triton itself
COLUMNS = "{:<8}{:>9}{:>7}{:>9}  {:<12}{:<14}{:>6}{:>8}  {:<9}{}"
HEADER = ("target", "registers", "stack", "shared", "local", "matrix", "async", "widest", "verdict", "configuration")


def line(verdict: Verdict) -> str:
    """A line of the table. Stack and shared memory are in bytes, the widest access in bits."""
    facts, cells = verdict.measured, ["-"] * 7
    if facts is not None:
        local = f"{facts.local} ({facts.local_in_loops})" if facts.local else "0"
        matrix = " ".join(f"{count} {kind}" for kind, count in facts.matrix.items()) or "-"
        cells = [facts.registers, facts.stack_bytes, facts.shared_bytes, local, matrix]
        cells += [facts.async_copies, facts.widest_bits]
    return COLUMNS.format(verdict.target, *cells, "FAIL" if verdict.reasons else "ok", verdict.name)


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 where every rule holds."""
    parser = argparse.ArgumentParser(prog="python -m tests.triton_tools.gate", description=__doc__)
    parser.add_argument("--modules", nargs="+", help=f"with a list CONFIGURATIONS; default: {CONFIGURED}")
    parser.add_argument("--targets", nargs="+", help="default: all that the configurations name")
    parser.add_argument("--only", default="", metavar="TEXT", help="configurations with this in their names")
    parser.add_argument("--json", type=Path, help="write the table there as well")
    parser.add_argument("--known", action="store_true", help=f"compile only what {KEPT.name} does not know already")
    parser.add_argument("--keep", action="store_true", help=f"make this the bar of the next run, in {KEPT.name}")
    options = parser.parse_args(arguments)

    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported, or there is nothing to compile
    global _began
    if "triton" in sys.modules and not _began:
        raise RuntimeError("the gate needs a process of its own: triton was imported before it")
    _began = True
    import triton

    started = time.perf_counter()
    modules = options.modules or [CONFIGURED]
    jobs = every = all_jobs(modules)
    uncovered = [] if options.modules else ungated(kernel_modules(), jobs)
    jobs = [job for job in jobs if options.only in _configuration(job).name]
    jobs = [job for job in jobs if job.target in (options.targets or [job.target])]
    if not jobs:
        print(f"no configuration to compile in {', '.join(modules)}")
        return 1
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    known = known_results(kept) if options.known else None
    verdicts = []
    for job, result in zip(jobs, measured_or_why(jobs, _cache_folder(), known), strict=True):
        configuration = _configuration(job)
        if isinstance(result, str):
            verdicts.append(Verdict(configuration.name, job.target, None, [result]))
        else:
            reasons = broken_rules(configuration, job.target, result)
            verdicts.append(Verdict(configuration.name, job.target, result, reasons))
    refused = [verdict for verdict in verdicts if verdict.reasons]
    print(COLUMNS.format(*HEADER), *map(line, verdicts), "", sep="\n")
    for verdict in refused:
        print(f"{verdict.name} on {verdict.target}: {'; '.join(verdict.reasons)}")
    print(*uncovered, sep="\n", end="\n" if uncovered else "")
    worse = []
    if options.keep and (options.modules or len(jobs) < len(every)):
        print("--keep goes with every configuration: what is left out would be forgotten")
        return 1
    if options.keep:
        keep_measured(verdicts, [_key(job) for job in jobs], triton.__version__)
    elif not options.modules:
        worse = regressions(verdicts, kept, triton.__version__)
        print(*[f"worse than before: {reason}" for reason in worse], sep="\n", end="\n" if worse else "")
    took = time.perf_counter() - started
    print(f"triton {triton.__version__}: {len(verdicts)} compiled or known, {len(refused)} refused, {took:.1f} s")
    if options.json:
        options.json.write_text(json.dumps([_plain(verdict) for verdict in verdicts], indent=1), encoding="utf-8")
    return 1 if refused or uncovered or worse else 0


def _plain(verdict: Verdict) -> dict[str, object]:
    return verdict._asdict() | {"measured": verdict.measured and dataclasses.asdict(verdict.measured)}


if __name__ == "__main__":
    sys.exit(main())
