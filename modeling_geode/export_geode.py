# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The GEODE authors.
"""
Make a saved folder self-contained: copy the modules that define a model or processor next to its weights.

This module is not copied. The modules that are copied import it through `try`, as the last line of `save_pretrained`:

    if type(self).__module__.startswith("geode."):
        try:
            from geode.modeling_geode.export_geode import export_code
        except ImportError:
            ...

Transformers 5.23 decides what the rules are (`transformers/dynamic_module_utils.py`): it follows lines that look like
`from .module import`, wherever they stand, and tries to import every package named outside of a `try`.
"""

import ast
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, NoReturn

from geode.configuration import configuration_geode


ALLOWED_PACKAGES = frozenset({"torch", "numpy", "PIL", "transformers", "huggingface_hub"})
CONFIGURATION_IMPORT = "geode.configuration.configuration_geode"
EXPORTER_IMPORT = "geode.modeling_geode.export_geode"
MODEL_AUTO_MAPS = {
    "geode": {
        "AutoConfig": "configuration_geode.GeodeConfig",
        "AutoModel": "modeling_geode.GeodeForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_geode.GeodeForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_geode.GeodeForConditionalGeneration",
    },
    "geode_sonata": {"AutoConfig": "configuration_geode.SonataConfig", "AutoModel": "sonata_geode.SonataModel"},
    "geode_vggt": {"AutoConfig": "configuration_geode.VggtConfig", "AutoModel": "vggt_geode.VggtModel"},
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_geode.GeodeProcessor"}
# The pattern of transformers' `get_relative_imports`, which does not parse: it also matches in docstrings.
_FOLLOWED = re.compile(r"^\s*from\s+\.(\S+)\s+import", flags=re.MULTILINE)


class _Import(NamedTuple):
    node: ast.Import | ast.ImportFrom
    is_guarded: bool


class _Source:
    """A module that may be copied, read and parsed at most once."""

    def __init__(self, path: Path):
        self.name = path.name
        self.path = path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @cached_property
    def names(self) -> set[str]:
        return _bound_names(self.tree.body)


def export_code(save_directory: str | os.PathLike) -> list[Path]:
    """
    Copy the code of a saved GEODE model or processor into its folder, and name its classes in `auto_map`.

    Call it after the weights and JSON files are written. Whichever of `config.json`, `processor_config.json` and
    `preprocessor_config.json` are present decide what is copied; running it twice changes nothing. The folder then loads
    with `trust_remote_code=True` where no `geode` package is installed.

    Args:
        save_directory (`str` or `os.PathLike`):
            A folder that `save_pretrained` of a GEODE class has written.

    Returns:
        `list[Path]`: The files that were written or edited, sorted.

    Raises:
        FileNotFoundError: If the folder holds none of these files.
        ValueError: If a file names a foreign class, or a module breaks a rule for modules on the Hub.
    """
    folder = Path(save_directory)
    modules = {name: _Source(path) for name, path in shipped_modules().items()}
    documents = {}
    for name, add_auto_map in _DOCUMENTS.items():
        if (folder / name).is_file():
            document = json.loads((folder / name).read_text(encoding="utf-8"))
            documents[name] = add_auto_map(document, modules)
    if not documents:
        raise FileNotFoundError(
            f"`save_directory` must hold one of {sorted(_DOCUMENTS)}, and {str(folder)!r} holds none. "
            "Save the model or the processor there first."
        )
    references = sorted({reference for document in documents.values() for reference in _auto_map_values(document)})
    _check_references(references, modules)
    sources = _collect([reference.split(".")[0] for reference in references], modules)
    files = {f"{name}.py": source for name, source in sources.items()}
    # transformers writes its JSON files in this form, so that an export adds lines and moves none.
    files |= {name: json.dumps(data, indent=2, sort_keys=True) + "\n" for name, data in documents.items()}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return sorted(folder / name for name in files)


def shipped_modules() -> dict[str, Path]:
    """Return the modules that may be copied, by name: `configuration_geode` and this folder's, without this one."""
    here = Path(__file__)
    modules = {path.stem: path for path in sorted(here.parent.glob("*_geode.py")) if path.name != here.name}
    modules["configuration_geode"] = Path(configuration_geode.__file__)
    return modules


def collect_modules(entries: Sequence[str], modules: Mapping[str, Path]) -> dict[str, str]:
    """
    Return the sources of modules and of everything they import, rewritten for a flat folder.

    Args:
        entries (`Sequence[str]`):
            Names of the modules to start from.
        modules (`Mapping[str, Path]`):
            The files that may be copied, by module name.

    Returns:
        `dict[str, str]`: Rewritten source by module name, sorted by name.

    Raises:
        ValueError: If a module breaks a rule for modules on the Hub; the message has file, line and remedy.
    """
    return _collect(entries, {name: _Source(path) for name, path in modules.items()})


def _collect(entries: Sequence[str], modules: Mapping[str, _Source]) -> dict[str, str]:
    rewritten, pending = {}, [*entries]
    while pending:
        name = pending.pop()
        if name not in rewritten:
            rewritten[name], needed = _rewrite(modules[name], modules)
            pending.extend(needed)
    return dict(sorted(rewritten.items()))


def _rewrite(module: _Source, modules: Mapping[str, _Source]) -> tuple[str, list[str]]:
    """Return the rewritten source of one module, and the names of the modules that it needs."""
    lines = module.text.splitlines(keepends=True)
    needed = set()
    for found in _imports(module.tree, is_guarded=False):
        node = found.node
        if isinstance(node, ast.Import):
            for alias in node.names:
                _check_package(module, found, alias.name)
        elif node.level:
            if node.level == 1 and node.module == "export_geode":
                _check_package(module, found, EXPORTER_IMPORT)
                _replace(lines, node, ".export_geode", EXPORTER_IMPORT)
            else:
                needed.add(_check_relative(module, node, modules))
        elif node.module == CONFIGURATION_IMPORT:
            _replace(lines, node, CONFIGURATION_IMPORT, ".configuration_geode")
            needed.add("configuration_geode")
            _check_names(module, node, modules["configuration_geode"])
        else:
            _check_package(module, found, node.module)
    source = "".join(lines)
    _check_followed(module, source, needed)
    return source, sorted(needed)


def _imports(node: ast.AST, is_guarded: bool) -> Iterator[_Import]:
    """Yield every import below `node`. One is guarded if a missing package is caught where it stands."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield _Import(node, is_guarded)
    guarded_children = []
    if isinstance(node, ast.Try) and any(_catches_import_error(handler) for handler in node.handlers):
        guarded_children = [*node.body, *node.orelse]
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, is_guarded or child in guarded_children)


def _catches_import_error(handler: ast.ExceptHandler) -> bool:
    caught = ast.walk(handler.type) if handler.type is not None else ()
    return any(isinstance(name, ast.Name) and name.id in ("ImportError", "ModuleNotFoundError") for name in caught)


def _replace(lines: list[str], node: ast.ImportFrom, old: str, new: str) -> None:
    index = node.lineno - 1
    lines[index] = lines[index].replace(f"from {old} import", f"from {new} import", 1)


def _check_package(module: _Source, found: _Import, imported: str) -> None:
    package = imported.split(".")[0]
    if imported == EXPORTER_IMPORT and isinstance(found.node, ast.ImportFrom) and found.is_guarded:
        return
    if package == "geode":
        _refuse(
            module,
            found.node,
            f"imports `{imported}`",
            f"Use `from .module import` or `from {CONFIGURATION_IMPORT} import`",
        )
    if package not in ALLOWED_PACKAGES and package not in sys.stdlib_module_names and not found.is_guarded:
        remedy = (
            f"Put it in `try`/`except ImportError`; only the standard library and {sorted(ALLOWED_PACKAGES)} need none"
        )
        _refuse(module, found.node, f"imports the package `{package}`", remedy)


def _check_relative(module: _Source, node: ast.ImportFrom, modules: Mapping[str, _Source]) -> str:
    """Return the module that a relative import names, once it is known to be one that Transformers will find."""
    written = f"from {'.' * node.level}{node.module or ''} import"
    if node.level > 1 or not node.module or "." in node.module:
        _refuse(module, node, f"has `{written}`", "A Hub folder is flat: write `from .module import name`")
    if node.module not in modules:
        _refuse(module, node, f"has `{written}`", f"The modules that are copied are {sorted(modules)}")
    _check_names(module, node, modules[node.module])
    return node.module


def _check_names(module: _Source, node: ast.ImportFrom, target: _Source) -> None:
    missing = [alias.name for alias in node.names if alias.name not in target.names]
    if missing:
        _refuse(module, node, f"imports {missing} from `{target.name}`", "It defines no such names; name each one")


def _bound_names(statements: Sequence[ast.stmt]) -> set[str]:
    """Return the names that a module's own statements bind, those under `if` and `try` included."""
    names = set()
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            names |= {
                node.id
                for node in ast.walk(statement)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            }
        elif isinstance(statement, ast.If | ast.Try):
            handlers = getattr(statement, "handlers", [])
            for block in (statement.body, statement.orelse, *(handler.body for handler in handlers)):
                names |= _bound_names(block)
    return names


def _check_followed(module: _Source, source: str, needed: set[str]) -> None:
    """Refuse text, such as an example in a docstring, that Transformers would take for an import."""
    for match in _FOLLOWED.finditer(source):
        if match[1] not in needed:
            line = source.count("\n", 0, match.end()) + 1
            raise ValueError(
                f"{module.name}:{line} has text that Transformers follows as an import of `{match[1]}.py`, which is not "
                "copied. Reword it so that no line starts with `from .`."
            )


def _check_references(references: Sequence[str], modules: Mapping[str, _Source]) -> None:
    for reference in references:
        module, name = reference.split(".")
        if module not in modules or name not in modules[module].names:
            raise ValueError(f"`auto_map` names `{reference}`, and no such class is in {sorted(modules)}.")


def _refuse(module: _Source, node: ast.stmt, what: str, remedy: str) -> NoReturn:
    raise ValueError(f"{module.name}:{node.lineno} {what}, which a copy on the Hub cannot. {remedy}.")


def _with_model_auto_map(document: dict, modules: Mapping[str, _Source]) -> dict:
    model_type = document.get("model_type")
    if model_type not in MODEL_AUTO_MAPS:
        raise ValueError(f"`config.json` must have a `model_type` of {sorted(MODEL_AUTO_MAPS)}, got {model_type!r}.")
    return {**document, "auto_map": MODEL_AUTO_MAPS[model_type]}


def _with_processor_auto_map(document: dict, modules: Mapping[str, _Source]) -> dict:
    found = document.get("processor_class")
    if found != "GeodeProcessor":
        raise ValueError(f"`processor_config.json` must have the `processor_class` 'GeodeProcessor', got {found!r}.")
    document = {**document, "auto_map": PROCESSOR_AUTO_MAP}
    if "image_processor" in document:
        document["image_processor"] = _with_image_processor_auto_map(document["image_processor"], modules)
    return document


def _with_image_processor_auto_map(document: dict, modules: Mapping[str, _Source]) -> dict:
    """Name the image processor's class if it is one of ours; transformers knows its own."""
    class_name = document.get("image_processor_type")
    for module, source in modules.items():
        if any(isinstance(node, ast.ClassDef) and node.name == class_name for node in source.tree.body):
            return {**document, "auto_map": {"AutoImageProcessor": f"{module}.{class_name}"}}
    return document


def _auto_map_values(document: dict) -> Iterator[str]:
    for part in (document, document.get("image_processor", {})):
        yield from part.get("auto_map", {}).values()


_DOCUMENTS = {
    "config.json": _with_model_auto_map,
    "processor_config.json": _with_processor_auto_map,
    "preprocessor_config.json": _with_image_processor_auto_map,
}

__all__ = ["collect_modules", "export_code", "shipped_modules"]
