"""setuptools as the build backend; an isolated build gets a torch where it compiles the extension, for its headers.

torch is no fixed requirement of the build, since on Linux the package index's torch brings gigabytes of CUDA. A source
archive, the metadata and the pure package (``DPO_KERNELS_BUILD=none``) need none.
"""

import os

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the other hooks are setuptools' own

# The headers of every torch from 2.11 on do; a fixed one makes the same wheel every time.
TORCH = "torch==2.13.0"


def get_requires_for_build_wheel(config_settings=None):
    """What is installed before a wheel is built: see PEP 517."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *headers()]


def get_requires_for_build_editable(config_settings=None):
    """What is installed before an editable wheel is built: see PEP 660."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *headers()]


def headers():
    return [] if os.environ.get("DPO_KERNELS_BUILD") == "none" else [TORCH, "numpy"]
