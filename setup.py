"""The build, which pyproject.toml describes. What has to be computed at build time, the C++/CUDA extension, goes here."""

from setuptools import setup

setup()
