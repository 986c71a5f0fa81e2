"""What an entry of the table is, and whether the table still fits the source."""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

INTERPRETED = "tests/interpreted/"  # these tests need Triton's interpreter, which is chosen once for a process


@dataclass(frozen=True)
class Mutant:
    """One edit of one file, and the tests of which at least one must go red.

    Attributes:
        file: its path from the root of the repository.
        old: text that occurs in it exactly once.
        new: what takes its place.
        tests: ids as pytest takes them, the narrowest that notice.
        why: why this is a fault, in a few words that no other entry of the file has.
        equivalent: where no test can notice it, why it changes nothing; the tests must then stay green.

    """

    file: str
    old: str
    new: str
    tests: str | tuple[str, ...]
    why: str
    equivalent: str = ""

    @property
    def name(self) -> str:
        """What a report calls it, and what ``--only`` is matched with."""
        return f"{self.file}: {self.why}"

    @property
    def ids(self) -> tuple[str, ...]:
        """The tests, always as a tuple."""
        return (self.tests,) if isinstance(self.tests, str) else self.tests

    @property
    def interpreted(self) -> bool:
        """Whether its tests run in Triton's interpreter."""
        return self.ids[0].startswith(INTERPRETED)

    @property
    def compiled(self) -> bool:
        """Whether the extension must be built again to try it."""
        return self.file.startswith("csrc/")

    def applied(self, text: str) -> str:
        """The file's text with the edit; raises ``ValueError`` unless it applies exactly once."""
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {found} times, expected once")
        return text.replace(self.old, self.new)


def problems(mutants: Iterable[Mutant], root: Path) -> list[str]:
    """What is wrong with a table for the source under ``root``, a line for each; nothing is run."""
    found, names = [], set()
    for mutant in mutants:
        if mutant.name in names:
            found.append(f"{mutant.name}: another entry has the same file and words")
        names.add(mutant.name)
        if len({test.startswith(INTERPRETED) for test in mutant.ids}) != 1:
            found.append(f"{mutant.name}: tests inside and outside of {INTERPRETED} cannot share a process")
        found += _problems_of_the_edit(mutant, root / mutant.file)
        found += [f"{mutant.name}: there is no {test}" for test in mutant.ids if not _is_written(test, root)]
    return found


def _problems_of_the_edit(mutant: Mutant, path: Path) -> list[str]:
    if not path.is_file():
        return [f"{mutant.name}: there is no such file"]
    if mutant.old == mutant.new:
        return [f"{mutant.name}: the edit changes nothing"]
    try:
        edited = mutant.applied(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return [str(error)]
    if path.suffix == ".py":
        try:
            ast.parse(edited)
        except SyntaxError as error:
            return [f"{mutant.name}: the edited file is no Python ({error})"]
    return []


def _is_written(test: str, root: Path) -> bool:
    """Whether the file of a test's id exists and defines a test of that name; parameters are not looked at."""
    file, _, rest = test.partition("::")
    path = root / file
    if not path.is_file():
        return False
    name = rest.partition("[")[0].rpartition("::")[2]
    return not name or bool(re.search(rf"^\s*def {re.escape(name)}\(", path.read_text(encoding="utf-8"), re.MULTILINE))
