# SPDX-License-Identifier: Apache-2.0
"""Rules of the tree that no linter checks: see docs/decisions/0001-package-layout.md."""

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import geode
from geode.modeling_geode.export_geode import MODEL_AUTO_MAPS, PROCESSOR_AUTO_MAP, collect_modules, shipped_modules


ROOT = Path(__file__).resolve().parents[1]
# Folders in the order of their arrows: a folder imports from its own level or from lower ones.
LEVELS = {
    "configuration": 0,
    "modeling_geode": 1,
    "data": 2,
    "evaluation": 2,
    "trainers": 3,
    "hub_cards": 4,
    "geode": 5,
}
# Names of the facade that load nothing, so that any folder may use them.
PLAIN_NAMES = {"geode.__version__", "geode.embedded_scene"}
OTHER_SOURCES = ("tests", "benchmarks", "examples", "docs")
# The Space's script is run on top of the installed package and is imported by nothing.
SPACE_SCRIPT = "hub_cards/space/app.py"


def list_sources(*folders: str) -> list[Path]:
    """Every module below some folders."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """`modeling_geode/x.py` is `geode.modeling_geode.x`; `geode/x.py` is `geode.x`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "geode" else ("geode", *parts))


def absolute_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "geode" and node.level == 0:
            # Each name may be a folder, as in `from geode import trainers`.
            yield from (f"geode.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


TOOL_FILES = (
    "Makefile",
    "MANIFEST.in",
    "pyproject.toml",
    "mkdocs.yml",
    ".ci/run",
    "requirements/audit.txt",
    "requirements/dev.txt",
    "requirements/docs.txt",
    "requirements/max.txt",
    "requirements/min.txt",
    "requirements/ui.txt",
    "scripts/audit.py",
    "scripts/system_packages.sh",
)
PACKAGE_SOURCES = list_sources(*LEVELS)
ALL_SOURCES = [ROOT / "setup.py", *PACKAGE_SOURCES, *list_sources(*OTHER_SOURCES)]


@pytest.mark.parametrize("path", ALL_SOURCES, ids=label)
def test_source_file_is_ascii_licensed_and_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.splitlines()[0] == "# SPDX-License-Identifier: Apache-2.0"
    assert [line for line in text.splitlines() if not line.isascii()] == []
    assert len(text.splitlines()) <= 800


@pytest.mark.parametrize("name", TOOL_FILES)
def test_tool_file_is_ascii(name):
    assert (ROOT / name).read_text(encoding="utf-8").isascii()


@pytest.mark.parametrize("path", ALL_SOURCES, ids=label)
def test_source_file_imports_no_folder_by_its_bare_name(path):
    bare = [name for name in absolute_imports(path) if name.split(".")[0] in LEVELS and not name.startswith("geode")]
    assert bare == []


@pytest.mark.parametrize("path", PACKAGE_SOURCES, ids=label)
def test_source_file_imports_along_the_arrows(path):
    own = "geode" if label(path) == SPACE_SCRIPT else path.relative_to(ROOT).parts[0]
    for name in absolute_imports(path):
        package, folder = (*name.split("."), "", "")[:2]
        if package == "geode" and name not in PLAIN_NAMES:
            # Whatever is not in a mapped folder belongs to the facade.
            assert LEVELS.get(folder, LEVELS["geode"]) <= LEVELS[own], f"{label(path)} imports {name}"


def test_modules_of_modeling_geode_are_flat_and_named_for_the_hub():
    folder = ROOT / "modeling_geode"
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if path.name != "__init__.py"]
    assert [name for name in found if not re.fullmatch(r"[a-z_0-9]+_geode\.py", name)] == []


def test_shipped_modules_obey_the_rules_and_are_all_reachable():
    modules = shipped_modules()
    references = [
        reference for auto_map in (*MODEL_AUTO_MAPS.values(), PROCESSOR_AUTO_MAP) for reference in auto_map.values()
    ]
    reachable = collect_modules([reference.split(".")[0] for reference in references], modules)
    assert sorted(reachable) == sorted(modules)


def test_shipped_checkpoint_carries_no_copy_of_the_code():
    folder = geode.tiny_checkpoint()
    assert (folder / "model.safetensors").is_file()
    assert list(folder.rglob("*.py")) == []
    assert "auto_map" not in (folder / "config.json").read_text(encoding="utf-8")


def test_version_is_the_same_everywhere():
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)
    changelog = re.search(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert citation[1] == geode.__version__
    assert changelog[1] == geode.__version__


def read_pins(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_requirements_pin_exactly_and_torch_first():
    assert read_pins("dev.txt")[0] == "torch==2.13.0"
    pins = [pin for name in ("dev", "docs", "ui", "audit", "min") for pin in read_pins(f"{name}.txt")]
    pins = [pin.partition(";")[0] for pin in pins]
    assert [pin for pin in pins if not re.fullmatch(r"[\w-]+==[\w.]+", pin)] == []


def requirements_of_setup() -> dict[str, SpecifierSet]:
    """What setup.py says of each package's versions."""
    strings = [node.value for node in ast.walk(ast.parse((ROOT / "setup.py").read_text("utf-8"))) if is_text(node)]
    found = [Requirement(text) for text in strings if re.fullmatch(r"[\w-]+(?:[<>=]=?[\d.]+,?)+", text)]
    return {requirement.name: requirement.specifier for requirement in found}


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_lowest_and_newest_versions_that_are_tried_are_those_of_setup():
    bounds = requirements_of_setup()
    lowest = {name: Version(spec.version) for name, specs in bounds.items() for spec in specs if spec.operator == ">="}
    # torch stays where it is; the page and the quantisers are not part of either environment's question.
    kept = ("torch", "gradio", "bitsandbytes", "torchao")
    tried = {name: version for name, version in lowest.items() if name not in kept}
    pins = [Requirement(pin) for pin in read_pins("min.txt")]
    assert {pin.name: Version(next(iter(pin.specifier)).version) for pin in pins} == tried
    for newest in map(Requirement, read_pins("max.txt")):
        highest = {spec.version for spec in bounds[newest.name] if spec.operator == "<"}
        assert {spec.version for spec in newest.specifier} == highest
    assert {newest.name for newest in map(Requirement, read_pins("max.txt"))} == tried.keys()


def test_tools_of_both_environments_are_the_same():
    docs = set(read_pins("docs.txt"))
    names = {pin.split("==")[0] for pin in docs}
    shared = {pin for pin in read_pins("dev.txt") if pin.split("==")[0] in names}
    assert len(shared) == 2
    assert shared <= docs


@pytest.mark.parametrize(
    "path", [path for path in PACKAGE_SOURCES if ">>>" in path.read_text(encoding="utf-8")], ids=label
)
def test_examples_in_docstrings_hold(path):
    results = doctest.testmod(importlib.import_module(module_name(path)))
    assert results.attempted > 0
    assert results.failed == 0
