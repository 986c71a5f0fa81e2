"""The files that a task touches: declared in ``structure_tasks.json``, and checked against the source.

``call_path`` names, from the entrance down, functions of which each must name the next; ``loop`` is the one that goes
over the chunks, the last one does arithmetic. A task declares the ``files`` that it reads or edits, those ``edited``,
the number of ``new_files``, what ``each`` of its files must match, and ``found_by``, a criterion: whatever meets it
must be declared, or stand in ``found_but_not_touched`` with a reason, and nothing in it may be met by no file.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any

from tests.tools.checkout import PACKAGE, Checkout, Def

TASKS = "tests/tools/structure_tasks.json"


def tasks(source: Checkout, table: Path | None) -> tuple[dict[str, Any], list[str]]:
    """Files by task, as declared, and where the declaration does not hold."""
    own, here = source.root / TASKS, Path(__file__).with_name(Path(TASKS).name)
    table = table or (own if own.is_file() else here)
    declared = json.loads(table.read_text(encoding="utf-8"))
    path, problems = _call_path(source, declared["call_path"])
    found: dict[str, Any] = {"read_the_algorithm": path}
    for name, task in declared["tasks"].items():
        files, edited, criterion = task["files"], task.get("edited", []), task.get("found_by", {})
        problems += [f"{name}: {file} is edited, but not declared" for file in edited if file not in files]
        problems += [f"{name}: {file} does not exist" for file in files if not (source.root / file).is_file()]
        if "each" in task:
            lacking = [f for f in files if (source.root / f).is_file() and not re.search(task["each"], source.text(f))]
            problems += [f"{name}: {file} has nothing like {task['each']!r}" for file in lacking]
        seen, stale = _matching(source, criterion)
        problems += [f"{name}: no file has {what}" for what in stale]
        known = {*files, *task.get("found_but_not_touched", {})}
        problems += [f"{name}: {file} is not declared, but has {seen[file]}" for file in seen if file not in known]
        new = task.get("new_files", 0)
        inside = sum(file.startswith(f"{PACKAGE}/") for file in files)
        numbers = {"files": len(files) + new, "in_package": inside + new, "edited": len(edited) + new}
        found[name] = {**numbers, "found": len(seen), "named": files}
    return found, problems


def _call_path(source: Checkout, declared: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Each function of the path must exist and name the next one; the one called ``loop`` must hold a loop."""
    steps: list[str] = declared["steps"]
    problems, nodes = [], []
    for step in steps:
        path, _, name = step.partition(":")
        nodes.append(_find(source, path, name))
        problems += [] if nodes[-1] else [f"read_the_algorithm: {step} does not exist"]
    for step, node, following in zip(steps, nodes, steps[1:], strict=False):
        called = following.rpartition(":")[2].split(".")[-1]
        if node and called not in _code_names(node):
            problems.append(f"read_the_algorithm: {step} does not name {called}")
    loop = declared["loop"]
    end = steps.index(loop) if loop in steps else len(steps) - 1
    if loop not in steps or not any(
        isinstance(node, ast.For | ast.While) for node in ast.walk(nodes[end] or ast.Pass())
    ):
        problems.append(f"read_the_algorithm: {loop} is not a step with a loop")
    to_loop = list(dict.fromkeys(step.partition(":")[0] for step in steps[: end + 1]))
    to_arithmetic = list(dict.fromkeys(step.partition(":")[0] for step in steps))
    return {
        "files": len(to_loop),
        "functions": end + 1,
        "files_to_arithmetic": len(to_arithmetic),
        "functions_to_arithmetic": len(steps),
        "named": to_arithmetic,
    }, problems


def _find(source: Checkout, path: str, name: str) -> ast.AST | None:
    if not (source.root / path).is_file():
        return None
    node: ast.AST | None = source.tree(path)
    for part in name.split("."):
        inside = node.body if isinstance(node, ast.Module | ast.ClassDef | Def) else []
        node = next((n for n in inside if isinstance(n, Def | ast.ClassDef) and n.name == part), None)
    return node


def _code_names(node: ast.AST) -> set[str]:
    """Names, attributes, definitions and imports; no strings, so no docstrings."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    names |= {n.name for n in ast.walk(node) if isinstance(n, Def | ast.ClassDef)}
    return names | {n.name.split(".")[-1] for n in ast.walk(node) if isinstance(n, ast.alias)}


def _matching(source: Checkout, criterion: dict[str, Any]) -> tuple[dict[str, list[str]], list[str]]:
    """Files by what they have of the criterion's ``names`` and ``strings`` in code; what of it no file has.

    ``lists_under`` are folders where only a list of at least two of the ``listed`` strings counts, if the first of
    them is one.
    """
    found: dict[str, list[str]] = {}
    outside = tuple(criterion.get("except", ())) or ("\0",)
    for path in (p for folder in criterion.get("under", ()) for p in source.files(folder) if not p.startswith(outside)):
        strings = {n.value for n in ast.walk(source.tree(path)) if isinstance(n, ast.Constant)}
        names = _code_names(source.tree(path))
        has = [name for name in criterion.get("names", ()) if name in names]
        has += [repr(text) for text in criterion.get("strings", ()) if text in strings]
        if has:
            found[path] = has
    wanted = [*criterion.get("names", ()), *map(repr, criterion.get("strings", ()))]
    stale = [what for what in wanted if not any(what in has for has in found.values())]
    listed = criterion.get("listed", [])
    for path in (p for folder in criterion.get("lists_under", ()) for p in source.files(folder)):
        for node in ast.walk(source.tree(path)):
            if isinstance(node, ast.List | ast.Tuple | ast.Set):
                inside = {n.value for n in node.elts if isinstance(n, ast.Constant)} & set(listed)
                if len(inside) > 1 and listed[0] in inside:
                    found[path] = [f"a list of {' and '.join(sorted(inside))}"]
    return found, stale
