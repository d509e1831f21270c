# SPDX-License-Identifier: Apache-2.0
"""`geode check`: whether a folder or repository is whole, safe to open, honest about itself, and runs without this package."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries, snapshot_download
from huggingface_hub.utils import disable_progress_bars

from geode.hub_cards.adapter_check import ADAPTER_CONFIG, CARD_AGAIN, check_adapter, check_on_base
from geode.hub_cards.contents import find_danger
from geode.hub_cards.manifest import MANIFEST, hash_file, read_header, recorded_files, recorded_terms
from geode.hub_cards.problems import Problem, Report, read_json
from geode.hub_cards.terms import Part, combined_terms


SECTIONS = ("Use", "Intended use", "Frames and units", "Evaluation", "Limitations", "Licence", "Citation")
EXPORT_AGAIN = "Write the folder again with `geode export`"
_CONFIGS = ("config.json", "processor_config.json", "preprocessor_config.json")
_CODE_OF_OTHERS = "--"  # in `auto_map`, between a repository and its module
_SNIPPET = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)


def check(source: str | os.PathLike, *, revision: str | None = None, base: str | os.PathLike | None = None) -> Report:
    """
    Check a folder, or a repository on the Hub.

    Args:
        source (`str` or `os.PathLike`): A folder with `README.md` or `config.json`, or a name on the Hub, which is downloaded.
        revision (`str`, *optional*): Branch, tag or commit of a name on the Hub.
        base (`str` or `os.PathLike`, *optional*): Of an adapter, the folder of its base model.

    Returns:
        [`Report`]: Of files and card; and of a run of its code, or of an adapter on its base model, unless something is wrong that
        makes it unsafe.

    Raises:
        FileNotFoundError: If there is neither a folder nor a repository of this name, or no model in `base`.
        ValueError: If `revision` is given for a folder, or `base` for what is no adapter.
    """
    text = os.fspath(source)
    if Path(text).is_dir():
        if revision is not None:
            raise ValueError(
                f"`revision` is for names on the Hub, got {revision!r} for the folder {text!r}. Leave it out."
            )
        return _check(Path(text), base, is_on_hub=False)
    if text.startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no folder at {text!r}.")
    disable_progress_bars()
    return _check(Path(snapshot_download(text, revision=revision)), base, is_on_hub=True)


def check_files(folder: Path) -> list[Problem]:
    """
    Check a folder without running anything of it.

    Args:
        folder (`Path`): A model or an adapter.

    Returns:
        `list[Problem]`: What is wrong.
    """
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    problems = [
        *check_contents(folder),
        *(check_adapter(folder) if is_adapter else _check_weights(folder)),
        *_check_manifest(folder),
        *_check_code(folder),
        *_check_card(folder),
        *_check_results(folder),
        *_check_presence(folder),
    ]
    if not is_adapter:
        return problems
    # What is said of models and adapters alike speaks of the command for models.
    return [problem._replace(remedy=problem.remedy.replace(EXPORT_AGAIN, CARD_AGAIN)) for problem in problems]


def check_contents(folder: Path) -> list[Problem]:
    """
    Look for pickles, archives, other binary files and access tokens in every file.

    Args:
        folder (`Path`): Any folder.

    Returns:
        `list[Problem]`: One for each file that should not be published.
    """
    problems = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.startswith((".git/", ".cache/huggingface/")):
            continue
        what = find_danger(path)
        if what is not None and "access token" in what:
            problems.append(Problem(name, what, "Remove it there, and revoke it on the Hub's page of access tokens"))
        elif what is not None:
            problems.append(Problem(name, what, "Remove it; weights belong in safetensors"))
    return problems


def snippet_of(folder: Path) -> str | None:
    """Return the first Python block of a folder's card, or None."""
    path = folder / "README.md"
    found = _SNIPPET.search(path.read_text(encoding="utf-8")) if path.is_file() else None
    return None if found is None else found[1]


def _check(folder: Path, base: str | os.PathLike | None, *, is_on_hub: bool) -> Report:
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if base is not None and not is_adapter:
        raise ValueError(
            f"`base` is for adapters, got {os.fspath(base)!r} for a folder without {ADAPTER_CONFIG}. Leave it out."
        )
    problems, notes = check_files(folder), []
    if is_on_hub and (folder / "README.md").is_file():
        try:
            ModelCard.load(folder / "README.md", ignore_metadata_errors=True).validate()
        except (ValueError, yaml.YAMLError) as error:
            problems.append(Problem("README.md", f"the Hub refuses its header: {error}", "Correct the header"))
    else:
        notes.append("the header of the card was read here; the Hub itself checks it when it is uploaded")
    if is_adapter:
        found, done = check_on_base(folder, base, is_on_hub=is_on_hub, is_sound=not problems)
        problems += found
        notes += done
    elif problems:
        notes.append("not run: its code is run only where nothing is wrong with its files")
    else:
        found, printed = _run(folder)
        problems += found
        notes += [f"the snippet printed: {line}" for line in printed.splitlines()]
    return Report(problems, notes)


def _run(folder: Path) -> tuple[list[Problem], str]:
    # It needs numpy and Pillow, which a check of the files alone does not.
    from geode.hub_cards.stranger import NAME_LINE, run_as_stranger

    snippet = snippet_of(folder)
    if not NAME_LINE.search(snippet or ""):
        remedy = 'Write `name = "ORG/NAME"` on a line of its own, and use `name` below it'
        return [Problem("README.md", 'its snippet has no line `name = "..."` that says what is loaded', remedy)], ""
    outcome = run_as_stranger(folder, snippet)
    if outcome.failed_step is None:
        return [], outcome.printed
    what = f"{outcome.failed_step} failed where `geode` is not installed: {outcome.error}".rstrip(".")
    where = "README.md" if "snippet" in outcome.failed_step else "code"
    return [Problem(where, what, EXPORT_AGAIN)], outcome.printed


def _check_weights(folder: Path) -> Iterator[Problem]:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if not files:
        yield Problem("*.safetensors", "there are no weights", EXPORT_AGAIN)
    if not index.is_file():
        return
    document = read_json(index)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict):
        yield Problem(index.name, "it has no `weight_map`", EXPORT_AGAIN)
        return
    for name in sorted(set(weight_map.values())):
        if name not in files:
            yield Problem(index.name, f"it names {name}, which is not there", EXPORT_AGAIN)
            continue
        try:
            lost = {key for key, value in weight_map.items() if value == name} - set(read_header(folder / name))
        except ValueError:  # found by its content already
            continue
        if lost:
            yield Problem(name, f"it lacks `{min(lost)}`, which {index.name} says is there", EXPORT_AGAIN)


def _check_manifest(folder: Path) -> Iterator[Problem]:
    document = read_json(folder / MANIFEST)
    tables = [document.get(name) for name in ("code", "files")] if isinstance(document, dict) else [None]
    if not all(isinstance(table, dict) for table in tables):
        what = "is missing" if not (folder / MANIFEST).is_file() else "cannot be read"
        yield Problem(MANIFEST, f"{what}, so that nobody can tell whether the code is what was written", EXPORT_AGAIN)
        return
    recorded = {name: value for table in tables for name, value in table.items()}
    found = recorded_files(folder)
    for name, value in recorded.items():
        if name not in found:
            yield Problem(name, f"it is recorded in {MANIFEST} and not there", EXPORT_AGAIN)
        elif hash_file(folder / name) != value:
            yield Problem(
                name, f"its SHA-256 is not the one in {MANIFEST}: it was changed after it was written", EXPORT_AGAIN
            )
    for name in found:
        if name not in recorded and name.endswith((".py", ".safetensors")):
            yield Problem(
                name, f"it is not recorded in {MANIFEST}: it was added later", f"Remove it, or {EXPORT_AGAIN.lower()}"
            )


def _check_code(folder: Path) -> Iterator[Problem]:
    """Check that `auto_map` leads to classes, and every import within the folder to a file."""
    if (folder / ADAPTER_CONFIG).is_file():
        return
    for name in (*_CONFIGS, "tokenizer_config.json"):
        if (folder / name).is_file():
            yield from _check_auto_map(folder, name, is_needed=name in _CONFIGS)
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for module in re.findall(r"^\s*from\s+\.(\w+)\s+import", text, flags=re.MULTILINE):
            if not (folder / f"{module}.py").is_file():
                yield Problem(path.name, f"it imports .{module}, which is not there", EXPORT_AGAIN)


def _check_auto_map(folder: Path, name: str, *, is_needed: bool) -> Iterator[Problem]:
    document = read_json(folder / name)
    if not isinstance(document, dict):
        yield Problem(name, "it is no object in JSON", EXPORT_AGAIN)
        return
    nested = document.get("image_processor")
    owners = [document, *([nested] if isinstance(nested, dict) else [])]
    maps = [owner["auto_map"] for owner in owners if isinstance(owner.get("auto_map"), dict)]
    if is_needed and "auto_map" not in document:
        yield Problem(name, "it has no `auto_map`, so that transformers does not find its code", EXPORT_AGAIN)
    for reference in (str(value) for auto_map in maps for value in auto_map.values()):
        module, _, class_name = reference.partition(".")
        if _CODE_OF_OTHERS in reference:
            yield Problem(name, f"its `auto_map` names {reference}, the code of another repository", EXPORT_AGAIN)
        elif class_name not in _classes(folder / f"{module}.py"):
            yield Problem(name, f"its `auto_map` names {reference}, which is not there", EXPORT_AGAIN)


def _check_card(folder: Path) -> Iterator[Problem]:
    path = folder / "README.md"
    if not path.is_file():
        yield Problem("README.md", "there is no card", EXPORT_AGAIN)
        return
    try:
        card = ModelCard.load(path, ignore_metadata_errors=False)
    except (ValueError, yaml.YAMLError) as error:
        yield Problem(
            "README.md", f"its header cannot be read: {error}".rstrip("."), "Correct the YAML between the `---`"
        )
        return
    for name in ("license", "library_name", "pipeline_tag"):
        if not card.data.get(name):
            yield Problem("README.md", f"its header has no `{name}`", "State it there")
    for section in SECTIONS:
        found = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", card.text, flags=re.MULTILINE | re.DOTALL)
        if found is None or not found[1].strip():
            yield Problem(
                "README.md",
                f'it has no section "{section}", or an empty one',
                "Write it, or export again with all facts",
            )
    if snippet_of(folder) is None:
        yield Problem("README.md", "it has no Python block that shows its use", "Write one")
    yield from _check_terms(folder, card)


def _check_terms(folder: Path, card: ModelCard) -> Iterator[Problem]:
    document, stated = read_json(folder / MANIFEST), card.data.license
    if not isinstance(document, dict) or not isinstance(stated, str):
        return
    try:
        own, parts = recorded_terms(document)
    except ValueError as error:
        yield Problem(MANIFEST, str(error).rstrip("."), EXPORT_AGAIN)
        return
    if own is not None:
        parts.append(Part("what was added", "here", own))
    allowed = combined_terms(stated, parts).license or "other"
    if allowed != stated:
        bound = [part.name for part in parts if combined_terms(stated, [part]).license != stated]
        yield Problem(
            "README.md",
            f"its licence is {stated!r}, and it has parts that do not permit it: {', '.join(bound)}",
            f"State {allowed!r}, or leave these parts out",
        )


def _check_results(folder: Path) -> Iterator[Problem]:
    for path in sorted((folder / ".eval_results").glob("*")):
        name = path.relative_to(folder).as_posix()
        try:
            entries = parse_eval_result_entries(yaml.safe_load(path.read_text(encoding="utf-8")))
            is_sound = len(entries) > 0 and all(isinstance(entry.value, int | float) for entry in entries)
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError):
            is_sound = False
        if not is_sound:
            yield Problem(
                name, "it is no list of results as the Hub reads it", "Write it again with `geode eval --rescore`"
            )


def _check_presence(folder: Path) -> Iterator[Problem]:
    document = read_json(folder / "config.json")
    model_type = document.get("model_type") if isinstance(document, dict) else None
    needed = {"LICENSE": "licence", "config.json": "configuration"}
    if model_type == "geode" and not (folder / ADAPTER_CONFIG).is_file():
        needed["generation_config.json"] = "generation configuration"
        needed |= {"processor_config.json": "processor", "tokenizer.json": "tokenizer"}
    elif model_type == "geode_vggt":
        needed["preprocessor_config.json"] = "processor"
    for name, what in needed.items():
        if not (folder / name).is_file():
            yield Problem(name, f"the {what} is missing", EXPORT_AGAIN)


def _classes(path: Path) -> set[str]:
    """Return the classes that a module defines; none if it is missing."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return set(re.findall(r"^class (\w+)", text, flags=re.MULTILINE))


__all__ = ["Problem", "Report", "check", "check_contents", "check_files", "snippet_of"]
