"""The part of the packaging that pyproject.toml cannot say: a wheel has workflow/ as dmd2/workflow."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dmd2*", "eval*"]), "dmd2.workflow"],
    package_dir={"dmd2.workflow": "workflow"},
    package_data={"": ["templates/*", "*.yaml"], "dmd2.workflow": ["**/*"]},
)
