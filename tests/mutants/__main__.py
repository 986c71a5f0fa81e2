"""The command: ``python -m tests.mutants``; 1 where an edit survives without a written reason, 2 for wrong use."""

import argparse
import fnmatch
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from demo.options import at_least
from tests import mutants as package
from tests.mutants import runner
from tests.mutants.records import Mutant, problems

ROOT = Path(__file__).parents[2]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=package.__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="a part of FILE: WHY, or a glob")
    parser.add_argument("--list", action="store_true", help="show the edits, and try none")
    parser.add_argument("--check", action="store_true", help="only look whether every edit still applies exactly once")
    parser.add_argument("--jobs", type=at_least(1), default=2, help="edits tried at a time (default: 2)")
    parser.add_argument(
        "--seconds", type=at_least(1, float), default=300.0, help="limit for the tests of an edit (default: 300)"
    )
    return parser.parse_args(arguments)


def chosen(mutants: Sequence[Mutant], patterns: Sequence[str]) -> list[Mutant]:
    """Those that a pattern names; all where there is none."""
    return [
        mutant
        for mutant in mutants
        if not patterns or any(part in mutant.name or fnmatch.fnmatch(mutant.name, part) for part in patterns)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parse(arguments)
    wrong = problems(package.MUTANTS, ROOT)
    if wrong:
        print("the table does not fit the source:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    mutants = chosen(package.MUTANTS, asked.only)
    if not mutants:
        print("no edit matches", file=sys.stderr)
        return 2
    if asked.list:
        print(*(f"{mutant.name}  [{', '.join(mutant.ids)}]" for mutant in mutants), sep="\n")
    if asked.list or asked.check:
        print(f"{len(mutants)} edits, each of which applies exactly once")
        return 0
    with tempfile.TemporaryDirectory(prefix="dpo_kernels-mutants-") as folder:
        try:
            found = runner.run(mutants, ROOT, Path(folder), asked.jobs, asked.seconds)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    print(runner.table(found))
    return int(not all(outcome.fine for outcome in found))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends, as with Ctrl-C
    sys.exit(main())
