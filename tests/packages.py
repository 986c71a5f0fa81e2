"""Building the package as pip does."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "demo_out")

# What pip calls once it has the build requirements: no network, and no pip of a certain age.
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"


def run(*arguments: str, cwd: Path, **environment: str) -> str:
    """Standard output of this Python with ``arguments``; fails with everything it printed."""
    command = [sys.executable, *arguments]
    env = os.environ | {"DPO_KERNELS_BUILD": "none"} | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    return out / run("-c", BUILD, kind, str(out), cwd=source).splitlines()[-1]


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}
