"""The build, described by pyproject.toml; what must be computed (the C++/CUDA extension) belongs here."""

from setuptools import setup

setup()
