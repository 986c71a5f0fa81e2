"""The arrows of the package (docs/architecture.md): who may import whom, read from the source with ``ast``.

``violations(root)`` reads ``root/dpo_kernels`` and ``root/csrc`` and imports nothing. It sees every import
statement, wherever it stands (functions and ``if TYPE_CHECKING`` included: a type is knowledge too),
``import_module`` and ``__import__``, and ``torch.distributed`` where it is reached as an attribute.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "dpo_kernels"

# The layers of ours that each layer may import, beside its own. Whatever is not here is forbidden.
MAY_IMPORT = {
    "public": {"api", "kernels", "losses", "loss_interface", "outputs", "tiled_weight"},
    "__main__": {"public", "kernels", "planning", "problem", "shapes"},
    "integrations": {"public", "api", "checks", "distributed", "losses", "loss_interface", "outputs", "shapes"},
    "api": {"checks", "distributed", "engine", "inputs", "loss_interface", "losses", "outputs", "planning", "shapes"},
    "engine": {
        "checks",
        "inputs",
        "kernel_interface",
        "losses",
        "outputs",
        "planning",
        "problem",
        "segments",
        "shapes",
        "tiled_weight",
    },
    "planning": {
        "checks",
        "device_specs",
        "kernel_interface",
        "kernels",
        "loss_interface",
        "problem",
        "records",
        "shapes",
        "strategies",
    },
    "strategies": {"kernel_interface", "problem", "records", "segments", "shapes"},
    "distributed": {"checks", "problem", "shapes"},
    "inputs": {
        "checks",
        "kernels",
        "loss_interface",
        "losses",
        "problem",
        "records",
        "shapes",
        "tiled_weight",
    },  # kernels: packing
    "kernels": {"kernel_interface", "loss_interface", "segments", "shapes", "tiled_weight"},
    "losses": {"checks", "loss_interface", "outputs", "records", "shapes"},
    "kernel_interface": {"loss_interface", "records", "segments", "shapes"},
    "problem": {"checks", "loss_interface", "records", "shapes", "tiled_weight"},
    "checks": {"shapes"},
    "segments": {"shapes"},
    "loss_interface": set(),
    "device_specs": {"records"},
    "outputs": set(),
    "records": set(),
    "shapes": {"records"},
    "tiled_weight": set(),
    "naive": set(),
    "reference": set(),
}
WHY = {
    "kernels": "kernels know rows, not preferences",
    "losses": "losses know sequences, not vocabularies",
    "segments": "it knows sequences, not vocabularies",
    "strategies": "they are given their kernels, their problem and their schedule",
    "shapes": "everything rests on it",
    "naive": "a newcomer reads it alone",
    "reference": "the oracle shares no code with what it judges",
}
# Third parties that only one place may import: a prefix of module names.
ONLY_IN = {
    "triton": f"{PACKAGE}.kernels.triton",
    "torch.distributed": f"{PACKAGE}.distributed",
    "trl": f"{PACKAGE}.integrations",
    "transformers": f"{PACKAGE}.integrations",
    "peft": f"{PACKAGE}.integrations",
    "bitsandbytes": f"{PACKAGE}.integrations",
    "datasets": f"{PACKAGE}.integrations",
    "accelerate": f"{PACKAGE}.integrations",
    "deepspeed": f"{PACKAGE}.distributed",
}
OUTSIDE = ("tests", "benchmarks", "demo", "examples")
# Imported at its first use: whoever imports the package must not import triton with it.
LAZY = f"{PACKAGE}.kernels.triton"
# A computed name of a module would hide an arrow; the tables of planning may load by one.
COMPUTED_NAMES_IN = {"planning"}
TORCH_HEADERS = ("torch", "ATen", "c10")
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?P<open>[<"])(?P<name>[^>"]+)[>"]', re.MULTILINE)


class Violation(NamedTuple):
    """One broken rule; ``str()`` is ``path:line: rule``, with the path relative to the root."""

    path: str
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}"


class Import(NamedTuple):
    """One module that a file names: absolute, or None where the name is computed or leaves the package."""

    target: str | None
    line: int
    lazy: bool
    source: str


def violations(root: Path) -> list[Violation]:
    """Every broken arrow under ``root``, by file and line. Raises where there is no package to read."""
    root = root.resolve()
    files = {_module_name(path.relative_to(root)): path for path in sorted((root / PACKAGE).rglob("*.py"))}
    if PACKAGE not in files:
        raise FileNotFoundError(f"no {PACKAGE}/__init__.py under {root}")
    found = []
    for name, path in files.items():
        where = path.relative_to(root).as_posix()
        layer = layer_of(name)
        if layer not in MAY_IMPORT:
            found.append(Violation(where, 1, f"{name} belongs to no layer: give it a line in MAY_IMPORT"))
            continue
        for imported in _imports(path, name, set(files)):
            found += [Violation(where, imported.line, rule) for rule in _broken_rules(name, layer, imported)]
    return sorted(set(found + _header_violations(root)))


def layer_of(module: str) -> str:
    """The layer of a module of ours: the file or folder directly under the package."""
    parts = module.split(".")
    if len(parts) == 1:
        return "public"
    return "kernels" if parts[1].startswith("_C") else parts[1]  # the compiled extension is a backend


def _within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


# --- the rules ----------------------------------------------------------------------------------------------


def _broken_rules(name: str, layer: str, imported: Import) -> Iterator[str]:
    target = imported.target
    if target is None:
        if layer not in COMPUTED_NAMES_IN:
            yield f"{imported.source} cannot be followed: name a module of {PACKAGE} literally"
    elif _within(target, PACKAGE):
        yield from _broken_arrows(name, layer, target, imported.lazy)
    else:
        yield from _broken_third_party(name, layer, target)


def _broken_arrows(name: str, layer: str, target: str, lazy: bool) -> Iterator[str]:
    to = layer_of(target)
    if to != layer and to not in MAY_IMPORT[layer]:
        allowed = ", ".join(sorted(MAY_IMPORT[layer])) or "nothing of ours"
        reason = f"; {WHY[layer]}" if layer in WHY else ""
        yield f"{layer} must not import {to} ({target}); it may import {allowed}{reason}"
    elif _within(target, LAZY) and not _within(name, LAZY) and not lazy:
        yield f"{target} must be imported inside a function: importing {PACKAGE} must not import triton"


def _broken_third_party(name: str, layer: str, target: str) -> Iterator[str]:
    top = target.split(".")[0]
    if top in OUTSIDE:
        yield f"the package must not import {top} ({target})"
    elif layer == "reference" and top != "torch" and top not in sys.stdlib_module_names:
        yield f"reference must not import {target}: the oracle imports torch and the standard library only"
    for module, home in ONLY_IN.items():
        if _within(target, module) and not _within(name, home):
            yield f"{module} must not be imported outside {home.replace('.', '/')} (here: {target})"


# --- reading Python -----------------------------------------------------------------------------------------


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, module: str, known: set[str]) -> list[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    reader = _Reader(package, known)
    reader.aliases = _aliases(tree)
    reader.visit(tree)
    return reader.found


def _aliases(tree: ast.AST) -> dict[str, str]:
    """What local names stand for, as far as torch and importlib go: ``{"th": "torch"}``."""
    aliases = {"__import__": "__import__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.name if alias.asname else alias.name.split(".")[0]
                aliases[alias.asname or bound] = bound
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    roots = ("torch", "importlib", "__import__")
    return {name: full for name, full in aliases.items() if full.split(".")[0] in roots}


class _Reader(ast.NodeVisitor):
    """Collects the imports of one file; ``lazy`` are those that importing the file does not run."""

    def __init__(self, package: str, known: set[str]) -> None:
        self.package = package
        self.known = known
        self.aliases: dict[str, str] = {}
        self.found: list[Import] = []
        self.lazy = False

    def add(self, node: ast.expr | ast.stmt, target: str | None) -> None:
        self.found.append(Import(target, node.lineno, self.lazy, ast.unparse(node)))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            relative = self.absolute("." * node.level + base)
            if relative is None:
                self.add(node, None)
                return
            base = relative
        for alias in node.names:
            self.add(node, self.from_name(base, alias.name))

    def from_name(self, base: str, name: str) -> str:
        """``from base import name``: the name itself if it is a module with rules, else where it is from."""
        full = f"{base}.{name}"
        compiled = base == PACKAGE and name.startswith("_C")
        return full if full in self.known or full in ONLY_IN or compiled else base

    def absolute(self, name: str) -> str | None:
        """A relative module name made absolute, or None where it leaves the package."""
        level = len(name) - len(name.lstrip("."))
        parts = self.package.split(".")
        if level > len(parts):
            return None
        return ".".join(parts[: len(parts) - level + 1] + [part for part in [name[level:]] if part])

    def visit_Call(self, node: ast.Call) -> None:
        if self.full_name(node.func) in ("importlib.import_module", "__import__"):
            self.add(node, self.dynamic_target(node))
        self.generic_visit(node)

    def dynamic_target(self, node: ast.Call) -> str | None:
        given = node.args[0] if node.args else next((k.value for k in node.keywords if k.arg == "name"), None)
        if not (isinstance(given, ast.Constant) and isinstance(given.value, str)):
            return None
        return self.absolute(given.value) if given.value.startswith(".") else given.value

    def visit_Attribute(self, node: ast.Attribute) -> None:
        full = self.full_name(node)
        if full is not None and full in ONLY_IN:
            self.add(node, full)
        self.generic_visit(node)

    def full_name(self, node: ast.expr) -> str | None:
        """``th.distributed`` as ``torch.distributed``, where ``th`` is torch in this file."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self.full_name(node.value)
            return base and f"{base}.{node.attr}"
        return None

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for outer in (*node.decorator_list, node.args, node.returns):
            if outer is not None:
                self.visit(outer)
        self.visit_lazily(node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.args)
        self.visit_lazily([node.body])

    def visit_If(self, node: ast.If) -> None:
        guard = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", None)
        if guard != "TYPE_CHECKING":
            self.generic_visit(node)
            return
        self.visit_lazily(node.body)
        for statement in node.orelse:
            self.visit(statement)

    def visit_lazily(self, nodes: list[ast.stmt] | list[ast.expr]) -> None:
        outer, self.lazy = self.lazy, True
        for node in nodes:
            self.visit(node)
        self.lazy = outer


# --- reading CUDA headers -----------------------------------------------------------------------------------


def _header_violations(root: Path) -> list[Violation]:
    found = []
    for path in sorted((root / "csrc").rglob("*.cuh")):
        where = path.relative_to(root).as_posix()
        for line, header, through in _torch_headers(path, root / "csrc", frozenset({path})):
            via = "".join(f" through {step.relative_to(root).as_posix()}" for step in through)
            found.append(Violation(where, line, f"a .cuh must not include torch headers: {header}{via}"))
    return found


Reached = tuple[int, str, tuple[Path, ...]]


def _torch_headers(path: Path, csrc: Path, seen: frozenset[Path]) -> Iterator[Reached]:
    """Each torch header that ``path`` reaches: (line in ``path``, header, files of ours in between)."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.DOTALL)
    for match in INCLUDE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        name = match["name"]
        if name.split("/")[0] in TORCH_HEADERS:
            yield line, name, ()
        ours = next((file for file in (path.parent / name, csrc / name) if file.is_file()), None)
        if ours is not None and ours.resolve() not in seen:
            inside = ours.resolve()
            for _, header, through in _torch_headers(inside, csrc, seen | {inside}):
                yield line, header, (inside, *through)
