# SPDX-License-Identifier: Apache-2.0
"""Install the top-level folders under one import name, `geode`."""

from setuptools import setup


FOLDERS = ("configuration", "modeling_geode", "trainers", "data", "evaluation", "hub_cards")

setup(
    name="geode-vlm",
    version="0.1.0",
    packages=["geode", *(f"geode.{folder}" for folder in FOLDERS)],
    package_dir={"geode": "geode", **{f"geode.{folder}": folder for folder in FOLDERS}},
)
