"""Counts of the package's structure: run it before and after a change, on any checkout.

``python -m tests.tools.structure [--root PATH] [--json] [--against FILE]``

It reads source with ``ast`` and imports nothing of the checkout. What cannot be counted from the source alone, which
files a task touches, is declared in ``structure_tasks.json`` and checked against the source; ``problems`` says where
the declaration and the source disagree. Percentiles are nearest ranks. A function is every ``def``, methods and nested
ones included; its lines are those from ``def`` to its end, its parameters all but ``self`` and ``cls``.
"""

import argparse
import ast
import json
import math
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.tools.checkout import PACKAGE, Checkout, Function, absolute, last_name
from tests.tools.structure_tasks import TASKS, tasks

ENTRANCE = "fused_dpo_loss"
WORDS = ("softcap", "logit_scale", "stats")
COMMITS = 50
MODULE_LINES, FUNCTION_LINES, NAMED_OPTIONS, LONG_SENTENCE = 400, 45, 6, 35
# --- what is counted --------------------------------------------------------------------------------------------------


def percentile(values: Iterable[int], share: float) -> int:
    """The nearest rank: the smallest value that at least ``share`` of the values do not exceed; 0 of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0


def _spread(values: list[int]) -> dict[str, int]:
    return {"p50": percentile(values, 0.5), "p90": percentile(values, 0.9), "max": max(values, default=0)}


def count(root: Path, declared: Path | None = None) -> dict[str, Any]:
    """Everything that is counted of the checkout at ``root``."""
    source = Checkout(root)
    found, problems = tasks(source, declared)
    return {
        "commit": _git(source.root, "rev-parse", "HEAD").strip(),
        "imports": _imports(source),
        "parameters": _parameters(source),
        "modules": _modules(source),
        "functions": _function_lines(source),
        "words": {word: _lines_with(source, word) for word in WORDS},
        "option_lists": _option_lists(source),
        "prose": _pages(source),
        "docstrings": _docstrings(source),
        "tests": _tests(source),
        "commit_subjects": _subjects(source),
        "tasks": found,
        "problems": problems,
    }


def layer_of(module: str) -> str:
    """The file or folder directly under the package, as ``tests/architecture.py`` counts it."""
    parts = module.split(".")
    if len(parts) == 1:
        return "public"
    return "kernels" if parts[1].startswith("_C") else parts[1]  # the compiled extension is a backend


def _imported(source: Checkout, path: str) -> Iterator[str]:
    """Modules of the package that a file names in imports, wherever these stand."""
    for node in ast.walk(source.tree(path)):
        named: list[str] = []
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, path)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                named.append(full if full in source.modules or full.startswith(f"{PACKAGE}._C") else base)
        elif isinstance(node, ast.Call) and last_name(node.func) in ("import_module", "__import__") and node.args:
            given = node.args[0]
            named = [given.value] if isinstance(given, ast.Constant) and isinstance(given.value, str) else []
        yield from (name for name in named if name == PACKAGE or name.startswith(f"{PACKAGE}."))


def _imports(source: Checkout) -> dict[str, Any]:
    edges = {(name, target) for name, path in source.modules.items() for target in _imported(source, path)}
    files = {(a, b) for a, b in edges if a != b and b in source.modules}
    arrows = {(layer_of(a), layer_of(b)) for a, b in edges} - {(layer_of(a),) * 2 for a in source.modules}
    cycles = _cycles(arrows)
    table = _allowed(source)
    return {
        "nodes": len({layer_of(name) for name in source.modules}),
        "arrows": len(arrows),
        "layers": _depth(arrows, cycles),
        "cycles": cycles,
        # In a drawing by depth only arrows within a cycle can point up.
        "upward": sum(any(a in group and b in group for group in cycles) for a, b in arrows),
        "outside_the_table": None if table is None else sorted(f"{a} -> {b}" for a, b in arrows - table),
        "file_arrows": len(files),
        "file_cycles": _cycles(files),
    }


def _allowed(source: Checkout) -> set[tuple[str, str]] | None:
    """``MAY_IMPORT`` of ``tests/architecture.py``, None where there is none to read."""
    path = "tests/architecture.py"
    if not (source.root / path).is_file():
        return None
    for node in source.tree(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MAY_IMPORT":
            return {(layer, below) for layer, every in ast.literal_eval(node.value).items() for below in every}
    return None


def _reachable(edges: set[tuple[str, str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        here = todo.pop()
        fresh = {b for a, b in edges if a == here} - seen
        seen |= fresh
        todo += fresh
    return seen


def _cycles(edges: set[tuple[str, str]]) -> list[list[str]]:
    """Groups of nodes of which each reaches every other."""
    reach = {node: _reachable(edges, node) for edge in edges for node in edge}
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in reach if a in reach[a]}
    return [list(group) for group in sorted(groups)]


def _depth(edges: set[tuple[str, str]], cycles: list[list[str]]) -> int:
    """Nodes on the longest way down, a cycle counted as one."""
    name = {node: group[0] for group in cycles for node in group}
    below: dict[str, set[str]] = {}
    for a, b in ((name.get(a, a), name.get(b, b)) for a, b in edges):
        below.setdefault(b, set())
        below.setdefault(a, set()).update({b} - {a})

    def level(node: str) -> int:
        return 1 + max((level(under) for under in below[node]), default=0)

    return max((level(node) for node in below), default=0)


def _parameters(source: Checkout) -> dict[str, Any]:
    def numbers(functions: list[Function]) -> dict[str, Any]:
        n = [f.parameters for f in functions]
        return {"functions": len(n), **_spread(n), "above_7": sum(k > 7 for k in n), "above_12": sum(k > 12 for k in n)}

    inside = [f for f in source.functions if not (f.public_call or f.device)]
    widest = sorted(inside, key=lambda f: (-f.parameters, f.path, f.name))
    return {
        "all": numbers(source.functions),
        "inside": numbers(inside),
        "inside_above_12": [f"{f.path}:{f.name} {f.parameters}" for f in widest if f.parameters > 12],
        "public_calls": sorted(f"{f.path}:{f.name}" for f in source.functions if f.public_call),
        "device_functions": sum(f.device for f in source.functions),
    }


def _modules(source: Checkout) -> dict[str, Any]:
    lines = {path: len(source.text(path).splitlines()) for path in source.modules.values()}
    signatures: dict[str, int] = dict.fromkeys(lines, 0)
    for f in source.functions:
        signatures[f.path] += f.signature_lines
    return {
        "files": len(lines),
        "lines": sum(lines.values()),
        f"of_{MODULE_LINES}_lines": {path: n for path, n in sorted(lines.items()) if n >= MODULE_LINES},
        "signature_lines": sum(signatures.values()),
        "most_signature_lines": dict(sorted(signatures.items(), key=lambda item: (-item[1], item[0]))[:3]),
    }


def _function_lines(source: Checkout) -> dict[str, Any]:
    def numbers(values: list[int]) -> dict[str, int]:
        return {**_spread(values), f"over_{FUNCTION_LINES}": sum(n > FUNCTION_LINES for n in values)}

    long = sorted(source.functions, key=lambda f: (-f.body_lines, f.path, f.name))
    return {
        "number": len(source.functions),
        "whole": numbers([f.lines for f in source.functions]),
        "body": numbers([f.body_lines for f in source.functions]),
        "long_bodies": [f"{f.path}:{f.name} {f.body_lines}" for f in long if f.body_lines > FUNCTION_LINES],
    }


def _lines_with(source: Checkout, word: str) -> dict[str, int]:
    """Lines that hold the word by itself, comments and docstrings included."""
    by_file = [
        sum(bool(re.search(rf"\b{word}\b", line)) for line in source.text(path).splitlines())
        for path in source.modules.values()
    ]
    return {"lines": sum(by_file), "files": sum(n > 0 for n in by_file)}


def _listed(node: ast.AST) -> list[str]:
    """What a list of any kind names: parameters, arguments, keys, elements, annotated fields."""
    parts: Iterable[ast.AST | None] = ()
    if isinstance(node, ast.arguments):
        parts = (*node.posonlyargs, *node.args, *node.kwonlyargs)
    elif isinstance(node, ast.Call):
        parts = (*node.args, *node.keywords)
    elif isinstance(node, ast.Dict):
        parts = node.keys
    elif isinstance(node, ast.List | ast.Tuple | ast.Set):
        parts = node.elts
    elif isinstance(node, ast.ClassDef):
        parts = [field.target for field in node.body if isinstance(field, ast.AnnAssign)]
    return [last_name(part) for part in parts]


def _option_lists(source: Checkout) -> dict[str, Any]:
    place = source.definition(PACKAGE, ENTRANCE)
    entrance = next((f for f in source.functions if (f.path, f.name) == place), None)
    options = {arg.arg for arg in entrance.node.args.kwonlyargs} if entrance else set()
    lists = {
        path: sum(len(options & set(_listed(node))) >= NAMED_OPTIONS for node in ast.walk(source.tree(path)))
        for path in source.modules.values()
    }
    return {"options": len(options), "lists": sum(lists.values()), "by_file": {p: n for p, n in lists.items() if n}}


# --- prose ------------------------------------------------------------------------------------------------------------


def prose(text: str) -> dict[str, Any]:
    """Numbers of a Markdown page without its code, tables, headings, images, HTML and the targets of its links.

    Inline code is a word. A sentence ends at a full stop, question or exclamation mark that no small letter
    follows, and with its paragraph or item. Colons count where a space or the end follows.
    """
    kept = re.sub(r"^( *)(```|~~~).*?^ *\2[^\n]*$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    kept = re.sub(r"<!--.*?-->", "", kept, flags=re.DOTALL)
    kept = re.sub(r"(?:(?<=\n\n)|\A)(?: {4}.*(?:\n|\Z))+", "\n", kept)  # indented code
    kept = re.sub(r"^\s*\|.*$|^#.*$|^\[[^\]]*\]:.*$|^\s*(?:-{3,}|={3,})\s*$", "\n", kept, flags=re.MULTILINE)
    kept = re.sub(r"!\[[^\]]*\]\([^)]*\)|</?\w[^>\n]*>", "", kept)
    kept = re.sub(r"``[^`]+``|`[^`]+`", "code", kept)
    kept = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", kept)
    kept = re.sub(r"^\s*(?:[-*+]|\d+\.)\s+", "\n\n", kept, flags=re.MULTILINE)
    end = r"(?<=[.!?])[)\"*_]*\s+(?=[^a-z\s]|code\b)"
    sentences = [s for block in re.split(r"\n\s*\n", kept) for s in re.split(end, re.sub(r"\s+", " ", block).strip())]
    lengths = [n for s in sentences if (n := sum(bool(re.search(r"\w", word)) for word in s.split()))]
    breaks = len(re.findall(r":(?=\s|$)|;", "\n".join(sentences)))
    return {
        "lines": len(text.splitlines()),
        "words_with_code_and_tables": len(text.split()),
        "words": sum(lengths),
        "sentences": len(lengths),
        "words_a_sentence": round(sum(lengths) / max(1, len(lengths)), 1),
        f"sentences_over_{LONG_SENTENCE}_words": sum(n > LONG_SENTENCE for n in lengths),
        "colons_and_semicolons_a_sentence": round(breaks / max(1, len(lengths)), 2),
    }


def _pages(source: Checkout) -> dict[str, Any]:
    docs = sorted((source.root / "docs").rglob("*.md"))
    pages = [page for page in (source.root / "README.md", source.root / "CONTRIBUTING.md", *docs) if page.is_file()]
    found = {page.relative_to(source.root).as_posix(): prose(page.read_text("utf-8")) for page in pages}
    return {**found, "docs, all pages": prose("\n\n".join(page.read_text("utf-8") for page in docs))}


def _docstrings(source: Checkout) -> dict[str, int]:
    said = [(f.node.name.startswith("_"), ast.get_docstring(f.node)) for f in source.functions]
    return {
        "public_functions": sum(not private for private, _ in said),
        "public_without": sum(not private and text is None for private, text in said),
        "private_functions": sum(private for private, _ in said),
        "private_without": sum(private and text is None for private, text in said),
        "see_another": sum((text or "").startswith("See `") for _, text in said),
    }


# --- tests and history ------------------------------------------------------------------------------------------------


def _tests(source: Checkout) -> dict[str, Any]:
    files = source.files("tests")
    borrowers: dict[str, list[str]] = {}
    patches: list[str] = []
    for path in files:
        lenders = set()
        for node in ast.walk(source.tree(path)):
            if isinstance(node, ast.Import):
                lenders |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = absolute(node, path)
                lenders |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Call):
                patches += _patched(node)
        lenders = {f"{name.replace('.', '/')}.py" for name in lenders} - {path}
        lenders = {name for name in lenders if name in files and name.split("/")[-1].startswith("test_")}
        if lenders and path.split("/")[-1].startswith("test_"):
            borrowers[path] = sorted(lenders)
    private = sorted(name for name in patches if name.startswith("_") and not name.startswith("__"))
    lines = {path: len(source.text(path).splitlines()) for path in files}
    return {
        "files": len(files),
        "lines": sum(lines.values()),
        f"of_{MODULE_LINES}_lines": sum(n >= MODULE_LINES for n in lines.values()),
        "import_from_test_modules": borrowers,
        "patched_attributes": len(patches),
        "patched_private_names": len(private),
        "private_names": sorted(set(private)),
    }


def _patched(call: ast.Call) -> list[str]:
    """The name that ``monkeypatch.setattr``, ``patch.object`` or ``mock.patch`` replaces; '?' where it is computed."""
    function = ast.unparse(call.func)
    if re.search(r"\.(setattr|delattr)$", function) or re.search(r"\bpatch\.object$", function):
        first = call.args[:1]
        by_path = bool(first) and isinstance(first[0], ast.Constant) and isinstance(first[0].value, str)
        given = call.args[0] if by_path else (call.args[1] if len(call.args) > 1 else None)
    elif re.search(r"(^|\.)patch$", function) and call.args:
        given = call.args[0]
    else:
        return []
    return [given.value.split(".")[-1] if isinstance(given, ast.Constant) and isinstance(given.value, str) else "?"]


def _git(root: Path, *command: str) -> str:
    """What git says of ``root``, nothing where there is no git or ``root`` is not the top of a checkout."""
    try:
        top = subprocess.run(["git", "-C", root, "rev-parse", "--show-toplevel"], capture_output=True, text=True)
        if top.returncode or Path(top.stdout.strip()).resolve() != root:
            return ""
        return subprocess.run(["git", "-C", root, *command], capture_output=True, text=True).stdout
    except OSError:
        return ""


def _subjects(source: Checkout) -> dict[str, int] | None:
    lengths = [len(line) for line in _git(source.root, "log", f"-{COMMITS}", "--format=%s").splitlines()]
    if not lengths:
        return None
    return {"commits": len(lengths), "p50": percentile(lengths, 0.5), "max": max(lengths)}


# --- what is printed --------------------------------------------------------------------------------------------------

# What the table shows: a place in what is counted, and the keys there.
SHOWN = {
    "imports": "arrows layers upward cycles file_arrows file_cycles",
    "parameters.all": "p50 p90 max above_7",
    "parameters.inside": "p50 p90 max above_7 above_12",
    "modules": "files lines of_400_lines signature_lines",
    "functions": "number",
    "functions.whole": "p50 p90 max over_45",
    "functions.body": "p50 p90 max over_45",
    "words.softcap": "lines files",
    "words.logit_scale": "lines files",
    "words.stats": "lines files",
    "option_lists": "lists",
    "docstrings": "public_without private_without see_another",
    "tests": "files lines import_from_test_modules patched_attributes patched_private_names",
    "commit_subjects": "p50 max",
    "tasks.read_the_algorithm": "files functions files_to_arithmetic functions_to_arithmetic",
    "tasks.add_a_loss": "files edited",
    "tasks.add_a_backend": "files edited",
    "tasks.fix_the_streaming_kernel": "files edited",
    "tasks.shard_the_vocabulary": "files edited",
    "": "problems",
}
PROSE = ("lines", "words_with_code_and_tables", "words", "words_a_sentence", "colons_and_semicolons_a_sentence")
PROSE_PAGES = ("README.md", "docs/design.md", "docs, all pages")


def _at(found: dict[str, Any] | None, keys: Iterable[str]) -> str:
    """A number, or how many entries stand there; '-' where there is nothing."""
    value: Any = found
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return "-"
    return str(len(value) if isinstance(value, dict | list) else value)


def table(now: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """Name and number, or name, number before and number now."""
    rows = [(*filter(None, place.split(".")), key) for place, keys in SHOWN.items() for key in keys.split()]
    rows += [("prose", page, key) for page in PROSE_PAGES for key in PROSE]
    lines = [] if before is None else [f"{'':52} {'before':>8} {'now':>8}"]
    for keys in rows:
        name = " ".join(keys[1:]) if keys[0] == "prose" else ".".join(keys)
        columns = [_at(now, keys)] if before is None else [_at(before, keys), _at(now, keys)]
        lines.append(f"{name:52} " + " ".join(f"{column:>8}" for column in columns))
    return "\n".join(lines + [f"problem: {problem}" for problem in now["problems"]])


def main(arguments: list[str] | None = None) -> int:
    """Print the counts; 1 where the declared tasks do not fit the source."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.structure", description="counts of the structure")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2], help="the checkout")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument("--against", type=Path, help="JSON of an earlier run, to compare with")
    parser.add_argument("--tasks", type=Path, help=f"declared tasks; {TASKS} of the checkout, or else of this one")
    given = parser.parse_args(arguments)
    now = count(given.root, given.tasks)
    before = json.loads(given.against.read_text(encoding="utf-8")) if given.against else None
    print(json.dumps(now, indent=1, ensure_ascii=False) if given.json else table(now, before))
    return 1 if now["problems"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
