# SPDX-License-Identifier: Apache-2.0
"""Licence files of the parts of a checkpoint, which go with every checkpoint that holds their weights."""

import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from geode.modeling_geode.vggt_conversion_geode import find_file, read_config


logger = logging.getLogger(__name__)

TEXTS = "licenses"
# Names are read from configurations of others, and must not lead elsewhere.
_TEXT_NAME = re.compile(rf"{TEXTS}/\w[^/\\]*")


def copy_texts(texts: Mapping[str, Path], folder: Path) -> None:
    """Copy licence files, given by their new names within a folder."""
    for name, path in texts.items():
        (folder / TEXTS).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def recorded_texts(checkpoint: str | os.PathLike, *, revision: str | None = None) -> dict[str, dict[str, Path | None]]:
    """
    Find the licence files that the `config.json` of a checkpoint names.

    Args:
        checkpoint (`str` or `os.PathLike`): A folder or a name on the Hub.
        revision (`str`, *optional*): Branch, tag or commit of a name on the Hub.

    Returns:
        `dict[str, dict[str, Path | None]]`: By part, each file by its name in the checkpoint, None where it is not there. Parts of
        which nothing is recorded are left out.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If what is recorded is no list of names within `licenses/`.
    """
    config = read_config(checkpoint, revision=revision) or {}
    entries = [entry for entry in config.get("parts") or [] if isinstance(entry, dict) and "texts" in entry]
    found = {}
    for entry in entries:
        names = entry["texts"]
        if not isinstance(names, list) or not all(
            isinstance(name, str) and _TEXT_NAME.fullmatch(name) for name in names
        ):
            raise ValueError(
                f"`texts` in `parts` of config.json must be names such as '{TEXTS}/point_encoder-LICENSE', got {names!r}. Assemble it again."
            )
        found[entry.get("name")] = {name: find_file(checkpoint, name, revision=revision) for name in names}
    return found


def read_texts(model) -> dict[str, bytes]:
    """
    Read the licence files of the parts of a model from where it was loaded.

    Args:
        model ([`GeodeForConditionalGeneration`]): The model.

    Returns:
        `dict[str, bytes]`: By name; empty for a model without recorded parts. What cannot be read is named in the log.

    Raises:
        ValueError: See [`recorded_texts`].
    """
    source = model.config._name_or_path
    if not source or not any("texts" in entry for entry in model.config.parts or [] if isinstance(entry, dict)):
        return {}
    revision = None if Path(source).is_dir() else getattr(model.config, "_commit_hash", None)
    try:
        recorded = recorded_texts(source, revision=revision)
        found = {name: path for texts in recorded.values() for name, path in texts.items()}
    except FileNotFoundError as error:
        logger.warning("The licence texts of the model's parts will be missing in what is saved: %s", error)
        return {}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        logger.warning("%s lacks %s, and so will what is saved. Add them before you publish it.", source, missing)
    return {name: path.read_bytes() for name, path in found.items() if path is not None}


def write_texts(texts: Mapping[str, bytes], folder: Path) -> None:
    """Write licence files, given by their names within a folder."""
    for name, content in texts.items():
        (folder / TEXTS).mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


__all__ = ["TEXTS", "copy_texts", "read_texts", "recorded_texts", "write_texts"]
