"""The generated parts of docs/architecture.md: the picture of the layers, and the map of the files.

``python -m tests.tools.layer_picture --write`` writes them between their markers, ``--check`` fails where they are not
current. The picture comes from ``MAY_IMPORT`` in ``tests/architecture.py``, the map from the first sentence of each
module's docstring. No module of the package is imported.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.architecture import MAY_IMPORT, PACKAGE

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"


def picture(may_import: Mapping[str, set[str]] = MAY_IMPORT) -> str:
    """The layers as a mermaid flowchart. An arrow that follows from others is left out."""
    arrows = [f"    {layer} --> {below}" for layer in may_import for below in sorted(_direct(may_import, layer))]
    return "\n".join(["```mermaid", "flowchart TD", *arrows, "```"])


def _direct(may_import: Mapping[str, set[str]], layer: str) -> set[str]:
    """What a layer may import that none of the layers it may import reaches."""
    below = set(may_import[layer]) - {layer}
    return below - {further for other in below for further in _reached(may_import, other)}


def _reached(may_import: Mapping[str, set[str]], layer: str) -> set[str]:
    """Every layer that lies below another. Raises ``ValueError`` where it lies below itself."""
    reached: set[str] = set()
    todo = set(may_import[layer]) - {layer}
    while todo:
        below = todo.pop()
        reached.add(below)
        todo |= set(may_import.get(below, ())) - {below} - reached
    if layer in reached:
        raise ValueError(f"the layers of MAY_IMPORT have a cycle through {layer}")
    return reached


def file_map(root: Path = ROOT) -> str:
    """The files of the package, folder by folder, each with the first sentence of its docstring."""
    files = sorted((root / PACKAGE).rglob("*.py"), key=_folder_first)
    lines = ["| file | what it does |", "|---|---|"]
    for path in files:
        said = first_sentence(path)
        if path.name != "__init__.py" or path.parent == root / PACKAGE:
            name = path.relative_to(root / PACKAGE).as_posix()
            lines.append(f"| [`{name}`](../{PACKAGE}/{name}) | {said} |")
    return "\n".join(lines)


def _folder_first(path: Path) -> tuple[str, str]:
    return path.parent.as_posix(), path.name


def first_sentence(path: Path) -> str:
    """Of a module's docstring, as text of a table: code in single backticks, no bar. Raises where there is none."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{path} has no docstring")
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[^.])\.(?=\s+[A-Z`]|$)", paragraph)[0]
    return sentence.replace("``", "`").replace("|", "\\|")


def generated(root: Path = ROOT) -> dict[str, str]:
    """The parts of the page by the name in their markers."""
    return {"layers": picture(), "files": file_map(root)}


def with_parts(text: str, parts: Mapping[str, str]) -> str:
    """The page with its parts replaced. Raises ``ValueError`` where the markers of one are missing."""
    for name, part in parts.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        found = re.search(f"{begin}.*?{end}", text, re.DOTALL)
        if found is None:
            raise ValueError(f"the page has no part between {begin} and {end}")
        text = text.replace(found[0], f"{begin}\n{part}\n{end}")
    return text


def stale(page: Path = PAGE, root: Path = ROOT) -> Iterator[str]:
    """Lines that the page lacks, then lines that it should not have."""
    kept = page.read_text(encoding="utf-8")
    current = with_parts(kept, generated(root))
    yield from (f"missing: {line}" for line in current.splitlines() if line not in kept.splitlines())
    yield from (f"left over: {line}" for line in kept.splitlines() if line not in current.splitlines())


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or say what is not current in it."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.layer_picture", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--check", action="store_true", help="write nothing; fail where the page is not current")
    which.add_argument("--write", action="store_true", help="write the generated parts of the page")
    if parser.parse_args(arguments).write:
        PAGE.write_text(with_parts(PAGE.read_text(encoding="utf-8"), generated()), encoding="utf-8")
        return 0
    found = list(stale())
    print("\n".join(found) or "current")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
