"""The build backend that pyproject.toml names: setuptools', or an error of one line if it is missing or too old."""

from csrc import prerequisites

prerequisites.check_setuptools()

from setuptools.build_meta import *  # noqa: E402, F403
