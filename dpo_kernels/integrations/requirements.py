"""What an integration needs of the stack that it serves. It is checked where the integration is used."""

import functools
from importlib import metadata, util

# The oldest releases that the tests of the integrations have passed on.
TRANSFORMERS = "4.55"
TRL = "0.29"
# The oldest release whose KTO trainer takes its log-probs from the fused LM head.
TRL_KTO = "1.15"
# The only release of LLaMA-Factory that the tests have passed on.
LLAMAFACTORY = "0.9.5"


@functools.cache
def require(package: str, least: str, by: str) -> None:
    """Check that a package is installed, in a release that is new enough. Each question is answered once.

    Pre-releases count as the release that they come before. A package that can be imported and says no version, such as
    a clone on ``PYTHONPATH``, is taken as it is.

    Args:
        package: its name on PyPI, under which it is imported too.
        least: the oldest release that will do, such as "0.29".
        by: what needs it, the beginning of the message.

    Raises:
        ImportError: it is not there, or is older. The message says which.

    Example:
        >>> require("torch", "2.11", "dpo_kernels")
        >>> require("torch", "99", "A test")
        Traceback (most recent call last):
        ImportError: A test needs torch >= 99, and torch ... is installed

    """
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        if _importable(package):
            return
        raise ImportError(f"{by} needs {package} >= {least}, which is not installed") from None
    from packaging.version import Version  # what is asked for here needs it too

    if Version(Version(found).base_version) < Version(least):
        raise ImportError(f"{by} needs {package} >= {least}, and {package} {found} is installed")


def _importable(package: str) -> bool:
    """Whether there is a package of this name. A folder without ``__init__.py``, as a clone's own is, is none."""
    try:
        spec = util.find_spec(package)
    except ValueError:  # a module that somebody has put into sys.modules, without a spec
        return True
    return spec is not None and spec.origin is not None
