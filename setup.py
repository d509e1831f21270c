# SPDX-License-Identifier: Apache-2.0
"""Install the top-level folders under one import name, `geode`."""

import ast
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).resolve().parent
FOLDERS = ("configuration", "modeling_geode", "trainers", "data", "evaluation", "hub_cards")
PACKAGE_DIR = {"geode": "geode", **{f"geode.{folder}": folder for folder in FOLDERS}}

VIDEO = ["av"]
# The lowest versions are those that `make test-min` installs: requirements/min.txt.
TRAIN = ["trl>=1.16,<2", "peft>=0.21", "datasets>=5.1", "evaluate"]
WORLD = ["embreex", "av", "pyarrow"]
GEOMETRY = ["scipy"]  # normals of large point clouds
UI = ["gradio>=6.31,<7"]  # older ones refuse huggingface_hub 2, or were not tried
QUANTIZATION = ["torchao>=0.18", "bitsandbytes>=0.50.2"]  # not for development: torchao writes to stderr when imported
DEVELOPMENT = ["pytest", "pytest-xdist", "hypothesis", "matplotlib", "ruff", "build", "mypy", "selenium"]
EXTRAS = {
    "video": VIDEO,
    "train": TRAIN,
    "demo": VIDEO,
    "world": WORLD,
    "geometry": GEOMETRY,
    "ui": [*UI, *VIDEO],
    "quantization": QUANTIZATION,
    "cuda": ["mamba-ssm", "causal-conv1d", "flash-attn"],
    "dev": [*DEVELOPMENT, *VIDEO, *TRAIN, *WORLD, *GEOMETRY, *UI],
}


def read_version() -> str:
    """Return `__version__` of the package without importing it, which would need its requirements."""
    for node in ast.parse((ROOT / "geode" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__version__":
            return ast.literal_eval(node.value)
    raise ValueError("`geode/__init__.py` must assign a literal to `__version__`, and it does not.")


def list_packages() -> list[str]:
    """Return every package by its import name, the packages inside the mapped folders included."""
    packages = []
    for name, folder in PACKAGE_DIR.items():
        packages += [name, *(f"{name}.{package}" for package in find_packages(str(ROOT / folder)))]
    return packages


def list_data(package: str, *patterns: str) -> list[str]:
    """Return a package's data files relative to it. A `**` in setuptools' own patterns depends on its version."""
    folder = ROOT / PACKAGE_DIR[package]
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    names = sorted(path.relative_to(folder).as_posix() for path in paths if path.suffix != ".pyc")
    return [name for name in names if not name.endswith(".py")]


setup(
    name="geode-vlm",
    version=read_version(),
    description="GEODE: a vision-language model that reasons in 3D and regresses the numbers it answers with",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    author="The GEODE authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords="vision-language spatial-reasoning 3d transformers",
    python_requires=">=3.11,<3.14",  # transformers 5.23 needs 3.11
    packages=list_packages(),
    package_dir=PACKAGE_DIR,
    package_data={
        "geode": list_data("geode", "assets/**/*", "tiny/**/*"),
        "geode.configuration": list_data("geode.configuration", "recipes/**/*", "accelerate/**/*"),
        "geode.hub_cards": list_data("geode.hub_cards", "**/*"),
        "geode.evaluation": list_data("geode.evaluation", "**/*"),
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.11",
        "transformers>=5.23,<5.25",  # minor versions rename arguments; these two are tried
        "huggingface_hub>=2",
        "safetensors>=0.8",
        "accelerate>=1.10.1",
        "numpy",
        "pillow",
        "tqdm",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["geode = geode.cli:main"],
        "lmms_eval.models": ["geode = geode.evaluation.lmms_eval_plugin:manifest"],
    },
    zip_safe=False,
)
