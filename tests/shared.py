"""What is made once in a run of pytest and used by all of its worker processes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder ``name`` as ``make`` has filled it; whoever asks first makes it, and the others wait."""
    root = factory.getbasetemp()
    if root.name.startswith("popen-"):  # a worker's own folder lies in that of the run
        root = root.parent
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a failed attempt has left
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
