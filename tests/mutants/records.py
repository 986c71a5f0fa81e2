"""What an entry of the table is, and whether the table still fits the source."""

import ast
import functools
import re
from collections.abc import Callable, Iterable
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
    found: list[str] = []
    names: set[str] = set()
    fitting: dict[str, list[Mutant]] = {}
    read = functools.cache(lambda path: path.read_text(encoding="utf-8"))
    for mutant in mutants:
        if mutant.name in names:
            found.append(f"{mutant.name}: another entry has the same file and words")
        names.add(mutant.name)
        if len({test.startswith(INTERPRETED) for test in mutant.ids}) != 1:
            found.append(f"{mutant.name}: tests inside and outside of {INTERPRETED} cannot share a process")
        found += [f"{mutant.name}: there is no {test}" for test in mutant.ids if not _is_written(test, root, read)]
        path = root / mutant.file
        if not path.is_file():
            found.append(f"{mutant.name}: there is no such file")
        elif mutant.old == mutant.new:
            found.append(f"{mutant.name}: the edit changes nothing")
        else:
            try:
                mutant.applied(read(path))
                fitting.setdefault(mutant.file, []).append(mutant)
            except ValueError as error:
                found.append(str(error))
    for file, edits in fitting.items():
        if file.endswith(".py"):
            found += _no_python(edits, read(root / file))
    return found


def _no_python(edits: list[Mutant], text: str) -> list[str]:
    """Edits that leave a file which is no Python: all that can be are planted together, to read the file but once."""
    together, alone = text, []
    for mutant in edits:
        if together.count(mutant.old) == 1:
            together = mutant.applied(together)
        else:
            alone.append(mutant)
    if _syntax_error(together):
        alone = edits
    return [
        f"{mutant.name}: the edited file is no Python ({error})"
        for mutant in alone
        if (error := _syntax_error(mutant.applied(text)))
    ]


def _syntax_error(text: str) -> str:
    try:
        ast.parse(text)
    except SyntaxError as error:
        return str(error)
    return ""


def _is_written(test: str, root: Path, read: Callable[[Path], str]) -> bool:
    """Whether the file of a test's id exists and defines a test of that name; parameters are not looked at."""
    file, _, rest = test.partition("::")
    path = root / file
    if not path.is_file():
        return False
    name = rest.partition("[")[0].rpartition("::")[2]
    return not name or bool(re.search(rf"^\s*def {re.escape(name)}\(", read(path), re.MULTILINE))
