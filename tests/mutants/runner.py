"""Plants each edit in a copy of the tree, runs its tests there, and says which edits no test noticed.

The tree itself is only read. Killed means that tests failed: pytest's exit status 1. A collection that breaks (2, 4),
no tests (5), a time limit or a crash show nothing about a test, and count as survival.
"""

import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tests.mutants.records import INTERPRETED, Mutant

NOT_COPIED = (
    *(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".benchmarks", ".hypothesis"),
    *("demo_out", "shared"),
)
TESTS_FAILED = 1  # of pytest's exit statuses
FORCED, INCREMENTAL = "self.force = True", "self.force = False"  # in setup.py: an object is built where it changed
GRACE_SECONDS = 2.0  # for a process that is asked to end
TAIL = 4000  # characters of a child's output that are shown


@dataclass(frozen=True)
class Outcome:
    """How a mutant fared; ``said`` is the end of the output, where something else than a test's verdict came of it."""

    mutant: Mutant
    verdict: str  # "killed", "survived", or why neither can be said
    said: str = ""

    @property
    def fine(self) -> bool:
        """Killed, or survived with a written reason."""
        return self.verdict == ("survived" if self.mutant.equivalent else "killed")


class Copies:
    """Copies of a tree to plant edits in, and the processes that run there."""

    def __init__(self, root: Path, folder: Path, seconds: float) -> None:
        self.root, self.folder, self.seconds = root, folder, seconds
        self.free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self.running: set[subprocess.Popen[str]] = set()
        self.lock, self.stopped = threading.Lock(), False

    def make(self, name: str) -> Path:
        """A fresh copy, with the extension where it is built."""
        return Path(shutil.copytree(self.root, self.folder / name, ignore=shutil.ignore_patterns(*NOT_COPIED)))

    @contextmanager
    def borrowed(self) -> Iterator[Path]:
        """One of the copies, for as long as nobody else uses it."""
        copy = self.free.get()
        try:
            yield copy
        finally:
            self.free.put(copy)

    def run(self, copy: Path, command: Sequence[str], seconds: float, **variables: str) -> tuple[int | None, str]:
        """(exit status, output) of a command in a copy; the status is None where the time limit ended it."""
        environment = os.environ | {
            "PYTHONPATH": str(copy),
            "PYTHONDONTWRITEBYTECODE": "1",  # two edits of one second and one size would share a file of bytecode
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "DPO_KERNELS_BF16": "portable",  # products of bfloat16 are tried on every CPU, by the same code
            "DPO_KERNELS_ISA": "avx2",  # and so are rows; tests/kernels/test_rows_alone.py edits those of AVX-512
        }
        with self.lock:
            if self.stopped:
                raise InterruptedError("stopped")
            process = subprocess.Popen(
                command,
                cwd=copy,
                env=environment | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # so that what a test has started ends with it
            )
            self.running.add(process)
        try:
            said, _ = process.communicate(timeout=seconds)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            kill(process)
            process.communicate()
            with self.lock:
                self.running.discard(process)

    def pytest(self, copy: Path, ids: Sequence[str], seconds: float, *options: str) -> tuple[int | None, str]:
        """Tests in a copy, in a process of their own."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *ids]
        interpret = "1" if ids[0].startswith(INTERPRETED) else "0"
        return self.run(copy, command, seconds, TRITON_INTERPRET=interpret)

    def stop(self) -> None:
        """End every process, and start no other."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                kill(process)


def kill(process: "subprocess.Popen[str]") -> None:
    """End a process and what it has started: it leads a session of its own.

    Asked first: ninja puts compilers into groups of their own, and ends them where it is asked to end.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_SECONDS)


@contextmanager
def planted(mutant: Mutant, copy: Path) -> Iterator[None]:
    """The edit in a copy, and afterwards the file as it was."""
    path = copy / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(mutant.applied(original), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(original, encoding="utf-8")


def verdict_of(mutant: Mutant, status: int | None, said: str, seconds: float) -> Outcome:
    """What an exit status of pytest says about a mutant."""
    if status == TESTS_FAILED:
        return Outcome(mutant, "killed")
    if status == 0:
        return Outcome(mutant, "survived")
    if status is None:
        return Outcome(mutant, f"its tests took longer than {seconds:.0f} s")
    what = f"were ended by signal {-status}" if status < 0 else f"did not run (pytest's exit status {status})"
    return Outcome(mutant, f"its tests {what}", said[-TAIL:])


def tried(mutant: Mutant, copies: Copies) -> Outcome:
    """Plant an edit of Python, run its tests."""
    with copies.borrowed() as copy, planted(mutant, copy):
        return verdict_of(mutant, *copies.pytest(copy, mutant.ids, copies.seconds, "-x"), copies.seconds)


def build(copy: Path, copies: Copies) -> bytes:
    """Build what has changed of the extension; its bytes. Raises ``RuntimeError`` with what the compiler said."""
    # One that is newer than its sources is not linked again, and a header is no source.
    for library in [*(copy / "dpo_kernels").glob("_C*.so"), *(copy / "build").rglob("_C*.so")]:
        library.unlink()
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    status, said = copies.run(copy, command, 3 * copies.seconds, DPO_KERNELS_BUILD="cpu")
    built = list((copy / "dpo_kernels").glob("_C*.so"))
    if status != 0 or not built:
        raise RuntimeError(said[-TAIL:] or "building took too long")
    return built[0].read_bytes()


def tried_compiled(mutants: Sequence[Mutant], copies: Copies) -> Iterator[Outcome]:
    """Plant edits of C++ one after another, in a copy that keeps the objects that no edit concerns."""
    copy = copies.make("compiled")
    script = copy / "setup.py"
    text = script.read_text(encoding="utf-8")
    assert text.count(FORCED) == 1, "setup.py builds everything each time, and says so in these words"
    script.write_text(text.replace(FORCED, INCREMENTAL), encoding="utf-8")
    plain = build(copy, copies)
    for mutant in mutants:
        with planted(mutant, copy):
            try:
                same = build(copy, copies) == plain
            except RuntimeError as error:
                yield Outcome(mutant, "the edited extension does not build", str(error))
                continue
            if same and not mutant.equivalent:
                yield Outcome(mutant, "the edited extension has the bytes of the other")
                continue
            yield verdict_of(mutant, *copies.pytest(copy, mutant.ids, copies.seconds, "-x"), copies.seconds)


def red_as_it_is(mutants: Sequence[Mutant], copies: Copies, jobs: int) -> str:
    """The output of the union of all named tests without any edit where they are not green, else an empty string."""
    union = dict.fromkeys(test for mutant in mutants for test in mutant.ids)
    plain = [test for test in union if not test.startswith(INTERPRETED)]
    files = list(dict.fromkeys(test.partition("::")[0] for test in plain))
    shares = [[test for test in plain if files.index(test.partition("::")[0]) % jobs == job] for job in range(jobs)]
    shares.append([test for test in union if test.startswith(INTERPRETED)])

    def run(ids: list[str]) -> str:
        with copies.borrowed() as copy:
            status, said = copies.pytest(copy, ids, copies.seconds * len(mutants), "--tb=short")
        return "" if status == 0 else f"pytest ended with {status}:\n{said[-TAIL:]}"

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return "\n".join(filter(None, pool.map(run, filter(None, shares))))
        except BaseException:  # Ctrl-C above all: leaving the pool waits for what runs in it
            copies.stop()
            raise


def wrong_place(copy: Path, copies: Copies) -> str:
    """What a child process imports where that is not the copy; an empty string where it is."""
    status, said = copies.run(copy, [sys.executable, "-c", "import dpo_kernels; print(dpo_kernels.__file__)"], 120)
    return "" if status == 0 and Path(said.strip()).is_relative_to(copy) else said


def outcomes(mutants: Sequence[Mutant], copies: Copies, jobs: int) -> Iterator[Outcome]:
    """Of every mutant, as they come; those in C++ one after another beside the others."""
    compiled = [mutant for mutant in mutants if mutant.compiled]
    found: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

    def all_compiled() -> None:
        for outcome in tried_compiled(compiled, copies):
            found.put(outcome)

    def one(mutant: Mutant) -> None:
        found.put(tried(mutant, copies))

    pool = ThreadPoolExecutor(jobs)
    try:
        waiting: list[Future[None]] = [pool.submit(all_compiled)] if compiled else []
        waiting += [pool.submit(one, mutant) for mutant in mutants if not mutant.compiled]
        for _ in mutants:
            while True:
                try:
                    yield found.get(timeout=1.0)
                    break
                except queue.Empty:
                    for future in waiting:
                        if future.done():
                            future.result()  # raises what went wrong in a thread
    finally:
        copies.stop()
        pool.shutdown(wait=True, cancel_futures=True)


def run(mutants: Sequence[Mutant], root: Path, folder: Path, jobs: int, seconds: float) -> list[Outcome]:
    """Try every mutant in copies under ``folder``; raises ``RuntimeError`` where the tests are not green as it is."""
    copies = Copies(root, folder, seconds)
    for number in range(jobs):
        copies.free.put(copies.make(f"copy-{number}"))
    with copies.borrowed() as copy:
        if (copy / "dpo_kernels").is_dir() and (said := wrong_place(copy, copies)):
            raise RuntimeError(f"a child process does not import the copy, but: {said}")
    print(f"the tests of {len(mutants)} edits, without any of them ...", flush=True)
    if red := red_as_it_is(mutants, copies, jobs):
        raise RuntimeError(f"the named tests are not green as the source is\n{red}")
    found = []
    with tqdm(total=len(mutants), unit="edit", disable=None) as bar:
        for outcome in outcomes(mutants, copies, jobs):
            found.append(outcome)
            bar.update()
            if not outcome.fine:
                bar.write(line(outcome))
    return sorted(found, key=lambda outcome: list(mutants).index(outcome.mutant))


def line(outcome: Outcome) -> str:
    """A mutant that is not fine, with what there is to see."""
    verdict = outcome.verdict
    if outcome.mutant.equivalent and verdict == "killed":
        verdict = f"killed, though the table says that it changes nothing: {outcome.mutant.equivalent}"
    said = "".join(f"\n      {text}" for text in outcome.said.splitlines())
    return f"  {outcome.mutant.name}\n    {verdict}; tests: {', '.join(outcome.mutant.ids)}{said}"


def table(found: Sequence[Outcome]) -> str:
    """Killed and planted by file, then in all, then the survivors with their reasons and those without."""
    files = list(dict.fromkeys(outcome.mutant.file for outcome in found))
    width = max(map(len, files), default=0)
    lines = ["killed / planted"]
    for file in files:
        of_file = [outcome for outcome in found if outcome.mutant.file == file]
        lines.append(f"  {file:{width}}  {sum(o.verdict == 'killed' for o in of_file):3} / {len(of_file)}")
    lines.append(f"  {'in all':{width}}  {sum(o.verdict == 'killed' for o in found):3} / {len(found)}")
    reasons = [o for o in found if o.mutant.equivalent and o.fine]
    if reasons:
        lines += ["surviving with a reason:", *(f"  {o.mutant.name}: {o.mutant.equivalent}" for o in reasons)]
    bad = [outcome for outcome in found if not outcome.fine]
    if bad:
        lines += ["not killed, and no reason written:", *map(line, bad)]
    return "\n".join(lines)
