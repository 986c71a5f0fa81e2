"""What the library computes, bit for bit, so that a change which should change nothing can be seen to change nothing.

    python -m tests.tools.bits --check          # against tests/tools/bits.json, if it was recorded on such a machine
    python -m tests.tools.bits --write FILE     # record, at the commit before the change
    python -m tests.tools.bits --check FILE     # compare, at the commit after it
    python -m tests.tools.bits --save FILE --only NAME  # the tensors themselves, to see how far two commits are apart

``--only`` takes a part of the cases' names. What the cases are says ``bit_cases.py``. Every case is one digest, of all
of its outputs and gradients. Another CPU multiplies in another order, so a record says on what it was made, and nothing
is compared where that differs. Triton's kernels run in its interpreter, in a process of their own.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import dpo_kernels
from benchmarks import environment
from tests.tools.bit_cases import Case, all_cases, digest_of, results

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("bits.json")
SOURCE = ("dpo_kernels", "csrc", "setup.py")
ELSEWHERE = """\
{file} was recorded on another machine, so nothing was compared:
{differences}
Bits are comparable only where all of this is the same. To compare two commits on this machine, record the first one
here: check it out in a folder of its own (git worktree add), build its extension there as it was built here, give it
this script (a copy of tests/tools, if it has none), and run in that folder
    python -m tests.tools.bits --write FILE
then, in this one,
    python -m tests.tools.bits --check FILE"""


@contextmanager
def repeatable() -> Iterator[None]:
    """One thread, and only algorithms that give the same bits again."""
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.set_num_threads(threads)


def machine() -> dict[str, Any]:
    """All that decides about bits beside the library itself."""
    name, flags = environment.processor()
    return {
        "cpu": name,
        "flags": [flag for flag in environment.CPU_FLAGS if flag in flags],
        "rows": _extension("row_instruction_set"),
        "bfloat16_product": _extension("bfloat16_product"),
        "torch": torch.__version__,
        "torch_rows": torch.backends.cpu.get_cpu_capability(),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "threads": 1,
    }


def record(cases: dict[str, Case]) -> dict[str, str]:
    """The digest of every case by name; those of the interpreter are left to another process."""
    with repeatable():
        return {name: digest_of(case) for name, case in cases.items()}


def record_all(only: str = "") -> dict[str, str]:
    """All digests, or those of cases in whose names ``only`` stands."""
    cases = _cases(only)
    found = record({name: case for name, case in cases.items() if not case.interpreted})
    if len(found) < len(cases):
        found |= _interpreted(only)
    return found


def differences(old: dict[str, Any], new: dict[str, Any], only: str = "") -> list[str]:
    """Names of the digests that differ, or that only one of the two has, each with what happened to it."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        if only not in name or old.get(name) == new.get(name):
            continue
        change = "is new" if name not in old else "is gone" if name not in new else f"{old[name]} -> {new[name]}"
        found.append(f"{name}: {change}")
    return found


def write(file: Path, only: str = "") -> int:
    """Record into a file."""
    digests = record_all(only)
    made = {"commit": _commit(), "machine": machine(), "digests": dict(sorted(digests.items()))}
    file.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{file}: {len(digests)} cases, of which {sum(' ' in value for value in digests.values())} are refused")
    return 0


def check(file: Path, only: str = "") -> int:
    """Compare with a file: 1 where anything differs, or where nothing could be compared."""
    kept = json.loads(file.read_text())
    if elsewhere := differences(kept["machine"], machine()):
        print(ELSEWHERE.format(file=file, differences="\n".join(f"    {line}" for line in elsewhere)))
        return 1
    digests = record_all(only)
    changed = differences(kept["digests"], digests, only)
    for line in changed:
        print(line)
    print(f"{len(digests)} cases, {len(changed)} of them not as in {file}, recorded at {kept['commit']}")
    return 1 if changed else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.bits", description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", nargs="?", const=RECORD, type=Path, metavar="FILE", help="compare with a record")
    what.add_argument("--write", nargs="?", const=RECORD, type=Path, metavar="FILE", help="record")
    what.add_argument("--save", type=Path, metavar="FILE", help="save the tensors of cases, with torch.save")
    what.add_argument("--interpreted", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", metavar="NAME", help="only cases with this in their names")
    given = parser.parse_args(arguments)
    if given.interpreted:
        from tests.triton_tools.interpreter import install

        install()
        print(json.dumps(record({name: case for name, case in _cases(given.only).items() if case.interpreted})))
        return 0
    if given.save:
        chosen = {name: case for name, case in _cases(given.only).items() if not case.interpreted}
        with repeatable():
            torch.save({name: results(case) for name, case in chosen.items()}, given.save)
        return 0
    return write(given.write, given.only) if given.write else check(given.check, given.only)


def _cases(only: str) -> dict[str, Case]:
    return {name: case for name, case in all_cases().items() if only in name}


def _interpreted(only: str) -> dict[str, str]:
    once = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "DPO_KERNELS_AUTOTUNE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.tools.bits", "--interpreted", "--only", only],
        cwd=ROOT,
        env=os.environ | once,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _extension(operator: str) -> str | None:
    """What an operator of the extension says of itself; None without the extension."""
    dpo_kernels.empty_cache()  # it is loaded at its first use
    try:
        return str(getattr(torch.ops.dpo_kernels, operator)())
    except AttributeError:
        return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The last commit that could have changed a number."""
    command = ["git", "log", "-1", "--format=%h", "--", *SOURCE]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
