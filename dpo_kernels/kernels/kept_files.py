"""Files that a process keeps for later ones: where they lie, and how they are read and written."""

import json
import os
import re
import secrets
import tempfile
from pathlib import Path
from typing import Any

FOLDER = "DPO_KERNELS_CACHE_DIR"


def path_of(what: str, gpu: str, digest: str) -> Path:
    """Return the file for a kind of results on a GPU. ``digest`` stands for all versions that the results depend on."""
    root = os.environ.get(FOLDER) or Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "dpo_kernels"
    return Path(root) / f"{what}-{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}-{digest}.json"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a container may have no HOME and no entry for this user
        return Path(tempfile.gettempdir())


def entries_of(path: Path) -> dict[str, Any]:
    """Return the entries of a file. A file that cannot be read has none, which costs one more measurement."""
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def add_entry(path: Path, name: str, entry: Any) -> None:
    """Add an entry to a file, which is made if need be. No reader sees half a file, and its mode follows the umask.

    Raises:
        OSError: the folder or the file cannot be written.

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with new.open("x") as file:  # made by ``open`` and not by ``tempfile``, whose files nobody else may read
            json.dump(entries_of(path) | {name: entry}, file, indent=1)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
