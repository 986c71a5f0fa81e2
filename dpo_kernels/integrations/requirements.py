"""What an integration needs of the stack that it serves. It is checked where the integration is used."""

import functools
from importlib import metadata

# The oldest releases that the tests of the integrations have passed on.
TRANSFORMERS = "4.55"
TRL = "0.29"


@functools.cache
def require(package: str, least: str, by: str) -> None:
    """Check that a package is installed, in a release that is new enough. Each question is answered once.

    Args:
        package: its name on PyPI.
        least: the oldest release that will do, such as "0.29".
        by: what needs it, the beginning of the message.

    Raises:
        ImportError: it is not installed, or is older. The message says which.

    Example:
        >>> require("torch", "2.11", "dpo_kernels")
        >>> require("torch", "99", "A test")
        Traceback (most recent call last):
        ImportError: A test needs torch >= 99, and torch ... is installed

    """
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{by} needs {package} >= {least}, which is not installed") from None
    from packaging.version import Version  # what is asked for here needs it too

    if Version(found) < Version(least):
        raise ImportError(f"{by} needs {package} >= {least}, and {package} {found} is installed")
