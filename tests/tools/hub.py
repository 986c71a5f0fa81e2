"""The package as a kernel of the Hugging Face Hub: the layout that the package ``kernels`` loads (0.17).

``python -m tests.tools.hub`` (``make hub``) writes it to ``build/hub`` from the package's own sources:

- ``build.toml`` and ``torch-ext/dpo_kernels/`` are what ``kernel-builder`` builds from.
- ``build/torch-cpu/`` and ``build/torch-cuda/`` are its variants ``torch-noarch``, which nobody has to compile.

Several versions of a kernel may run in one process. So the package's modules import each other by relative names, and
its operators are registered under the name of the build, which ``_ops.py`` holds. Command line and integrations with
trainers stay out, because a kernel may import the standard library and torch only.
"""

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "dpo_kernels"
NAME = "dpo-kernels"
VERSION = 0  # by the Hub's convention that of kernels that are not recommended for production yet
BACKENDS = ("cpu", "cuda")
LEFT_OUT = ("__main__.py", "integrations/")
BUILD_TOML = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = [{", ".join(f'"{backend}"' for backend in BACKENDS)}]

[torch-noarch]
"""
OPS = '''"""The name that the operators of this build are registered under."""

import torch

_OPS_NAME = "{id}"
ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """Return an operator's full name."""
    return f"{{_OPS_NAME}}::{{op_name}}"
'''
# Older releases of ``kernels`` load this folder instead of the variant's own module.
OLD_LAYOUT = '''"""The same module for older releases of ``kernels``."""

import importlib.util
import sys
from pathlib import Path

_NAME = "{id}"
if _NAME not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).parents[1] / "__init__.py")
    sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_NAME])
_all = sys.modules[_NAME]
globals().update({{name: getattr(_all, name) for name in _all.__all__}})
__all__ = list(_all.__all__)
'''


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the layout, and say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hub", help="an earlier layout there is replaced")
    folder = parser.parse_args(arguments).out
    for variant in write(folder):
        print(variant)


def write(folder: Path) -> list[Path]:
    """Write the layout into a folder, and return those of the variants. Equal sources give equal bytes."""
    sources = view()
    for part in ("torch-ext", "build"):
        shutil.rmtree(folder / part, ignore_errors=True)
    _write(folder, {"build.toml": BUILD_TOML, "LICENSE": (ROOT / "LICENSE").read_text("utf-8")})
    _write(folder / "torch-ext" / PACKAGE, sources)
    variants = []
    for backend in BACKENDS:
        build = f"_{PACKAGE}_{backend}_{_fingerprint(sources)}"
        files = sources | {"_ops.py": OPS.format(id=build), f"{PACKAGE}/__init__.py": OLD_LAYOUT.format(id=build)}
        variants.append(folder / "build" / f"torch-{backend}")
        _write(variants[-1], files | {"metadata.json": metadata(build, backend, files)})
    return variants


def view() -> dict[str, str]:
    """Return the texts of the package's modules as a kernel has them, by their paths in it."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = path.relative_to(ROOT / PACKAGE).as_posix()
        if not name.startswith(LEFT_OUT):
            found[name] = relative(path.read_text("utf-8"), PurePosixPath(name))
    return found


def metadata(build: str, backend: str, files: dict[str, str]) -> str:
    """Return the text of ``metadata.json``: what the variant is, and the digest of each of its files."""
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in sorted(files.items())
    }
    about = {
        "id": build,
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return json.dumps(about, indent=2) + "\n"


def relative(text: str, path: PurePosixPath) -> str:
    """Return a module's text with relative imports, and with operators and compiled modules under the build's name.

    Args:
        text: a module of the package.
        path: where it is in the package.

    Raises:
        ValueError: something in it would still be that of the installed package.

    """
    depth = len(path.parts) - 1
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _is_ours(node.module or ""):
            module = (node.module or "").removeprefix(PACKAGE).removeprefix(".")
            old, new = f"from {node.module} import", f"from {'.' * (depth + 1)}{module} import"
            line = node.lineno - 1
            if lines[line].count(old) != 1:
                raise ValueError(f"{path}:{node.lineno}: cannot make this import relative: {lines[line].strip()}")
            lines[line] = lines[line].replace(old, new)
    text = "".join(lines)
    named = re.sub(rf"\btorch\.ops\.{PACKAGE}\b", "ops", text)
    named = re.sub(rf'"{PACKAGE}::(\w+)"', r'add_op_namespace_prefix("\1")', named)
    named = re.sub(rf'f"{PACKAGE}::\{{(\w+)\}}"', r"add_op_namespace_prefix(\1)", named)
    named = re.sub(rf'Library\("{PACKAGE}", ', "Library(ops.name, ", named)
    if named != text:
        used = [name for name in ("add_op_namespace_prefix", "ops") if re.search(rf"\b{name}\b", named)]
        named = _with_import(named, f"from {'.' * (depth + 1)}_ops import {', '.join(used)}\n")
    root = f'__package__.rsplit(".", {depth})[0]'
    named = re.sub(rf'f?"{PACKAGE}\.(_C\w*|\{{\w+\}})"', lambda found: _below(root, found[1]), named)
    _check(named, path)
    return named


def _is_ours(module: str) -> bool:
    return module == PACKAGE or module.startswith(f"{PACKAGE}.")


def _below(root: str, module: str) -> str:
    """Return the expression of a module's name, given that of the kernel and a literal or ``{variable}``."""
    return f"{root} + " + (f'"." + {module[1:-1]}' if module.startswith("{") else f'".{module}"')


def _with_import(text: str, line: str) -> str:
    """Return a module's text with one more import, before its first one from the package."""
    at = min(node.lineno for node in ast.parse(text).body if isinstance(node, ast.ImportFrom) and node.level)
    lines = text.splitlines(keepends=True)
    return "".join([*lines[: at - 1], line, *lines[at - 1 :]])


def _check(text: str, path: PurePosixPath) -> None:
    """Raise where a module still names the installed package's modules or operators."""
    tree = ast.parse(text)
    docs = {node.body[0].value for node in ast.walk(tree) if isinstance(node, DOCUMENTED) and ast.get_docstring(node)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if _is_ours(alias.name)]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module] if _is_ours(node.module or "") else []
        elif isinstance(node, ast.Attribute) and node.attr == PACKAGE:
            names = [f"an attribute {PACKAGE}"]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs:
            names = [node.value] if re.match(rf"{PACKAGE}(::|\._C|\.(\w+\.)*\w*$)", node.value) else []
        if names:
            raise ValueError(f"{path}:{node.lineno}: {names[0]} is that of the installed package")


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def _fingerprint(sources: dict[str, str]) -> str:
    """Return seven digits that other sources do not have."""
    digest = hashlib.sha256()
    for name, text in sorted(sources.items()):
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:7]


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
