"""Fetching packages with pip, without installing or importing them."""

import subprocess
import sys
from pathlib import Path


class NotAvailable(Exception):
    """Something the demo needs could not be had."""


def pip_download(requirement: str, folder: Path, *, source: bool = False) -> Path:
    """Download one package (its wheel, or its source archive) into `folder` and return the file.

    What an earlier run left there is not downloaded again. Raises NotAvailable where pip fails.
    """
    name, version = requirement.split("==")
    kind = "--no-binary" if source else "--only-binary"
    pattern = f"{name.replace('-', '_')}-{version}*{'.tar.gz' if source else '.whl'}"
    found = sorted(folder.glob(pattern))
    if not found:
        command = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "--no-input",
            "--no-deps",
        ]
        command += [kind, name, "--dest", str(folder), requirement]
        if subprocess.run(command, check=False).returncode:
            raise NotAvailable(f"pip could not download {requirement}")
        found = sorted(folder.glob(pattern))
    if not found:
        raise NotAvailable(f"pip downloaded no {pattern} for {requirement}")
    return found[0]
