"""Files that a process keeps for later ones: where they lie, and how they are read and written."""

import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

with suppress(ImportError):  # Windows has none
    import fcntl

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


def add_entry(path: Path, name: str, entry: Any, unless: Callable[[Any], bool] = lambda kept: False) -> Any:
    """Add an entry to a file, which is made if need be. No reader sees half a file, and its mode follows the umask.

    Processes that add entries at the same time wait for each other, so that none is lost.

    Args:
        path: the file.
        name: the name of the entry, which replaces an older one of that name.
        entry: what json can hold.
        unless: says of the older entry, or None, whether it stays.

    Returns:
        The entry that the file now has.

    Raises:
        OSError: the folder or the file cannot be written. Or the file cannot be read, and its entries would be lost.

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    with _locked(path.parent):
        if path.exists():
            path.open().close()  # raises where it belongs to somebody who keeps it to himself
        entries = entries_of(path)
        if unless(entries.get(name)):
            return entries[name]
        try:
            with new.open("x") as file:  # made by ``open`` and not by ``tempfile``, whose files nobody else may read
                json.dump(entries | {name: entry}, file, indent=1)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    return entry


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder that other processes respect. Windows has no such lock."""
    if "fcntl" not in globals():
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
