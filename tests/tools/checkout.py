"""A checkout as its source says it is: files, functions, and which of these users call. Nothing of it is imported."""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "dpo_kernels"
Def = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """One ``def``: where it stands and what it is."""

    path: str
    name: str  # dotted from the module: ``Class.method``, ``outer.inner``
    node: Def
    public_call: bool
    device: bool
    method: bool

    @property
    def lines(self) -> int:
        return (self.node.end_lineno or self.node.lineno) - self.node.lineno + 1

    @property
    def body_lines(self) -> int:
        body = self.node.body[1:] if ast.get_docstring(self.node, clean=False) is not None else self.node.body
        return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0

    @property
    def signature_lines(self) -> int:
        return max(1, self.node.body[0].lineno - self.node.lineno)

    @property
    def parameters(self) -> int:
        a = self.node.args
        names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if arg is not None]
        return len(names) - (self.method and names[:1] in (["self"], ["cls"]))


class Checkout:
    """The Python files of a checkout, parsed."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        if not (self.root / PACKAGE / "__init__.py").is_file():
            raise FileNotFoundError(f"no {PACKAGE}/__init__.py under {self.root}")
        self.trees: dict[str, ast.Module] = {}

    def files(self, folder: str) -> list[str]:
        return [path.relative_to(self.root).as_posix() for path in sorted((self.root / folder).rglob("*.py"))]

    def text(self, path: str) -> str:
        return (self.root / path).read_text(encoding="utf-8")

    def tree(self, path: str) -> ast.Module:
        if path not in self.trees:
            self.trees[path] = ast.parse(self.text(path), filename=path)
        return self.trees[path]

    @cached_property
    def modules(self) -> dict[str, str]:
        """Dotted name to path, of the package."""
        return {_module(path): path for path in self.files(PACKAGE)}

    @cached_property
    def functions(self) -> list[Function]:
        public = self.public_names()
        return [f for path in self.files(PACKAGE) for f in _functions(self.tree(path).body, path, public)]

    def public_names(self) -> set[tuple[str, str]]:
        """(path, name) of what users call: exports of the package, and what the pages import from integrations."""
        asked = {(PACKAGE, alias) for alias in _exports(self.tree(self.modules[PACKAGE]))}
        pages = [self.root / "README.md", *sorted((self.root / "docs").rglob("*.md"))]
        wanted = rf"^\s*from ({PACKAGE}\.integrations[\w.]*) import (\([^)]*\)|.*)"
        for page in pages:
            for module, names in re.findall(wanted, page.read_text("utf-8") if page.is_file() else "", re.MULTILINE):
                asked |= {(module, name) for name in re.findall(r"(\w+)(?: as \w+)?", names)}
        return {found for module, name in asked if (found := self.definition(module, name))}

    def definition(self, module: str, name: str, depth: int = 0) -> tuple[str, str] | None:
        """Where a name that ``module`` offers is defined, through whatever re-exports it."""
        path = self.modules.get(module)
        if path is None or depth > 10:
            return None
        for node in self.tree(path).body:
            if isinstance(node, Def | ast.ClassDef) and node.name == name:
                return path, name
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.definition(absolute(node, path), alias.name, depth + 1)
        return None


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def absolute(node: ast.ImportFrom, path: str) -> str:
    if not node.level:
        return node.module or ""
    folder = path.split("/")[: -node.level]
    return ".".join([*folder, *([node.module] if node.module else [])])


def _exports(tree: ast.Module) -> set[str]:
    imported = {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    for node in tree.body:
        if isinstance(node, ast.Assign) and [t.id for t in node.targets if isinstance(t, ast.Name)] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    return {name for name in imported if not name.startswith("_")}


def _functions(
    body: Iterable[ast.AST], path: str, public: set[tuple[str, str]], prefix: str = "", kind: str = "module"
) -> Iterator[Function]:
    for node in body:
        inner, inner_kind = prefix, kind
        if isinstance(node, Def):
            first, *rest = (prefix + node.name).split(".")
            method = kind == "class"
            shown = not rest or (
                method and len(rest) == 1 and (rest[0] in ("__init__", "__call__") or rest[0][0] != "_")
            )
            device = any(re.search(r"\bjit\b", ast.unparse(decorator)) for decorator in node.decorator_list)
            yield Function(path, prefix + node.name, node, shown and (path, first) in public, device, method)
        if isinstance(node, Def | ast.ClassDef):
            inner, inner_kind = f"{prefix}{node.name}.", "class" if isinstance(node, ast.ClassDef) else "function"
        yield from _functions(ast.iter_child_nodes(node), path, public, inner, inner_kind)


def last_name(node: ast.AST | None) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript):  # options["beta"]
        return last_name(node.slice)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Starred):
        return last_name(node.value)
    return node.arg or "" if isinstance(node, ast.keyword | ast.arg) else ""
