"""Package layout; pyproject.toml has the metadata."""

from setuptools import setup

setup(
    packages=["nest_fast", "nest_fast.ops", "nest_fast.integrations", "nest_fast.kernels"],
    package_dir={"nest_fast": "nest_fast", "nest_fast.kernels": "kernels"},
)
