"""Finds the fastest launch of a matmul kernel on this GPU, once, and keeps the choice on disk.

``DPO_KERNELS_AUTOTUNE`` sets the mode:

- ``1`` (default): the first call of a kind (dtype, width, vocabulary to the next power of two) times the launches of a
  family. The fastest is kept in ``DPO_KERNELS_CACHE_DIR`` (default: ``~/.cache/dpo_kernels``), where other processes
  find it. The number of rows counts once: what was timed with fewer than ``FULL_ROWS`` rows, as by a small trial before
  a training, is timed again by the first call or ``warm_up`` that has as many. After that a training does not stop.
- ``cached``: kept choices are used, and nothing is timed.
- ``0``: the first launch of each family is used.

Two launches may differ in the last bits of their results. Mode ``0``, or one folder for all, makes runs on several
machines alike. ``dpo_kernels.warm_up`` gives all ranks the choices of the first one.

A trial runs the kernel on the call's own inputs. The call overwrites its outputs afterwards, so a kernel that adds to
its output must not be timed. A process keeps its choices, so a second call repeats the first one's bits, unless a call
with ``FULL_ROWS`` rows has come in between and was the first. Nothing can be timed while a CUDA graph is captured. A
kind that is first seen there takes the first launch of its family, and a later call times it.
"""

import hashlib
import os
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from dpo_kernels.kernels.kept_files import FOLDER, add_entry, entries_of
from dpo_kernels.kernels.kept_files import path_of as kept_path_of
from dpo_kernels.kernels.triton.configs import MatrixLaunch

MODE = "DPO_KERNELS_AUTOTUNE"
MODES = ("1", "0", "cached")
# A launch that was timed with as many rows stays. They are four of the largest blocks. The number is a choice and not
# measured.
FULL_ROWS = 512
ROUNDS = 7  # each round times every launch once; the medians are compared
CANNOT_RUN = (CompilationError, OutOfResources, PTXASError)  # raised where this GPU or compiler cannot take a launch
PASS_FAILED = "PassManager::run failed"  # the text of a RuntimeError that the compiler raises for the same reason
Trial = Callable[[MatrixLaunch], object]


class Choice(NamedTuple):
    """A launch, and the number of rows with which it was timed."""

    launch: MatrixLaunch
    rows: int


_chosen: dict[tuple[str, str], Choice] = {}


def fastest_launch(
    kernel: str, family: Sequence[MatrixLaunch], facts: Sequence[object], like: Tensor, run: Trial
) -> MatrixLaunch:
    """The launch of ``family`` to take. ``run`` launches the kernel; ``facts`` tell one kind of call from another.

    ``like`` is the operand with the call's rows, on the device of the launch.

    Raises ValueError for a mode that is none.
    """
    mode = os.environ.get(MODE, MODES[0])
    if mode not in MODES:
        raise ValueError(f"{MODE}={mode!r}, expected one of {', '.join(MODES)}")
    if mode == "0" or len(family) < 2:
        return family[0]
    gpu, kind = device_name(like), " ".join(map(str, (kernel, *facts)))
    enough = _enough(like.shape[0]) if mode == "1" else 0
    known = _chosen.get((gpu, kind))
    if known is None or known.rows < enough:
        known = _remembered(gpu, kind, family) or known
    if known is None or known.rows < enough:
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            return known.launch if known else family[0]  # nothing can be timed now, but a later call can
        known = _timed(gpu, kind, family, like, run, mode)
    _chosen[gpu, kind] = known
    return known.launch


def _enough(rows: int) -> int:
    """The rows with which a choice for a call of ``rows`` rows must have been timed."""
    return FULL_ROWS if rows >= FULL_ROWS else 0


def bucket(size: int) -> int:
    """The next power of two, so that sizes between two powers are one kind of call."""
    return 1 << max(0, size - 1).bit_length()


def clear_cache() -> None:
    """Forget the choices of this process; those on disk stay."""
    _chosen.clear()


def device_name(like: Tensor) -> str:
    """The name under which results on disk are kept."""
    return torch.cuda.get_device_name(like.device) if like.is_cuda else "interpreter"


def path_of(gpu: str) -> Path:
    """The file with the results for a GPU; each version of the kernels and of their compiler has its own."""
    text = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py")))
    versions = f"{triton.__version__} {torch.version.cuda} {torch.version.hip}"
    digest = hashlib.sha256((text + versions).encode()).hexdigest()[:12]
    return kept_path_of("autotune", gpu, digest)


# --- timing -----------------------------------------------------------------------------------------------------------


def _timed(gpu: str, kind: str, family: Sequence[MatrixLaunch], like: Tensor, run: Trial, mode: str) -> Choice:
    rows = like.shape[0]
    if mode != "1":
        return Choice(family[0], rows)
    runnable = [launch for launch in family if _runs(launch, run)]
    if not runnable:
        return Choice(family[0], rows)  # the caller sees the error of this launch
    samples: dict[MatrixLaunch, list[float]] = {launch: [] for launch in runnable}
    for _ in range(ROUNDS):  # launches take turns, so that a clock that rises or falls meets all of them
        for launch in runnable:
            samples[launch].append(milliseconds(lambda launch=launch: run(launch), like))  # type: ignore[misc]
    times = {launch: statistics.median(sample) for launch, sample in samples.items()}
    fastest = min(times, key=lambda launch: times[launch])
    return _remember(gpu, kind, family, Choice(fastest, rows), times)


def _runs(launch: MatrixLaunch, run: Trial) -> bool:
    """Whether the launch compiles and runs; also warms it up."""
    try:
        run(launch)
    except (*CANNOT_RUN, RuntimeError) as error:
        if cannot_run(error):
            return False
        raise
    return True


def cannot_run(error: Exception) -> bool:
    """Whether an error of a launch says that this GPU or compiler cannot take it."""
    return isinstance(error, CANNOT_RUN) or PASS_FAILED in str(error)


def milliseconds(call: Callable[[], object], like: Tensor) -> float:
    """The time of a call on the GPU. Another call before it keeps the GPU at work while the host prepares this one."""
    with torch.cuda.device(like.device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        call()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))


# --- on disk ----------------------------------------------------------------------------------------------------------


def _remembered(gpu: str, kind: str, family: Sequence[MatrixLaunch]) -> Choice | None:
    """The choice on disk, if it is a launch of the family."""
    return _choice_of(entries_of(path_of(gpu)).get(kind), family)


def _remember(
    gpu: str, kind: str, family: Sequence[MatrixLaunch], fastest: Choice, times: dict[MatrixLaunch, float]
) -> Choice:
    """Keep the choice on disk. If another process was first, its choice is taken, so that the two agree."""
    path = path_of(gpu)
    entry = {
        "launch": asdict(fastest.launch),
        "rows": fastest.rows,
        "milliseconds": {str(launch): round(ms, 4) for launch, ms in times.items()},
    }

    def stays(first: Any) -> bool:
        choice = _choice_of(first, family)
        return choice is not None and choice.rows >= _enough(fastest.rows)

    try:
        kept = add_entry(path, kind, entry, unless=stays)
    except OSError as error:
        warnings.warn(
            f"what was timed cannot be kept in {path.parent} ({error}) and will be timed in each process; "
            f"{FOLDER} names another folder, {MODE}=0 turns timing off",
            stacklevel=2,
        )
        return fastest
    return _choice_of(kept, family) or fastest


def _choice_of(entry: Any, family: Sequence[MatrixLaunch]) -> Choice | None:
    """The choice that a kept entry names, if its launch is one of the family."""
    if not isinstance(entry, dict) or not isinstance(rows := entry.get("rows"), int):
        return None
    kept = entry.get("launch")
    return next((Choice(launch, rows) for launch in family if asdict(launch) == kept), None)


# --- from process to process ------------------------------------------------------------------------------------------


def choices() -> dict[tuple[str, str], MatrixLaunch]:
    """The choices of this process, by the name of the GPU and the kind of call."""
    return {key: choice.launch for key, choice in _chosen.items()}


def take(theirs: dict[tuple[str, str], MatrixLaunch]) -> None:
    """Take the choices of another process instead of one's own, for good.

    Whatever they were timed with, they are not timed again, since the ranks that share them would no longer agree.
    """
    _chosen.update({key: Choice(launch, FULL_ROWS) for key, launch in theirs.items()})
