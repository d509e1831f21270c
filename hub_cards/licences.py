# SPDX-License-Identifier: Apache-2.0
"""Licences of the parts of a checkpoint, as their publishers state them, and what follows for the whole."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import metadata_load

from geode.modeling_geode.vggt_conversion_geode import find_file, read_config

from .terms import PUBLISHED_LICENSES


CARD_NAME = "README.md"
# Terms of a publisher's own that are known to allow commercial use, with conditions.
_COMMERCIAL = ("facebook/vggt-1b-commercial",)
# Licences that may be combined under the one of this package, if their notices are kept.
_PERMISSIVE = ("apache-2.0", "bsd-2-clause", "bsd-3-clause", "mit")
_OWN_LICENCE = "apache-2.0"
_NON_COMMERCIAL = re.compile(r"(?:^|-)nc(?:-|$)|non-?commercial|research")
_ANSWERS = {True: "no", False: "yes", None: "not known"}


class Whole(NamedTuple):
    """The licence of a checkpoint, `None` if one of a part is not known, and whether it forbids commercial use."""

    license_id: str | None
    is_non_commercial: bool | None


def terms_of_part(name: str, revision: str | None, folder: str | os.PathLike) -> dict[str, Any]:
    """
    Say what is known of a part's licence, in a form that JSON can hold.

    Args:
        name (`str`):
            Its name on the Hub, or that of a file or folder.
        revision (`str`, *optional*):
            Its commit; `None` for a part that is not from the Hub, whose name tells nothing.
        folder (`str` or `os.PathLike`):
            Where its files are. A card among them is read.

    Returns:
        `dict`: `license` (as the Hub names it, or None), `license_name` and `license_link` of terms that the Hub has no name for,
        `stated_by` (`"publisher"`, `"card"` or None) and `is_non_commercial` (None where that is not known). Where the two
        speak of different licences, `license` is the publisher's for the weights, and either can forbid commercial use.
    """
    card = _card_of(Path(folder))
    stated = {key: card.get(key) for key in ("license", "license_name", "license_link")}
    published = None if revision is None else PUBLISHED_LICENSES.get(name.lower())
    license_id = published or stated["license"]
    is_non_commercial = _forbids_commerce([published, stated["license"], stated["license_name"]])
    if not is_non_commercial and license_id not in _PERMISSIVE:
        # Terms of one's own can say anything.
        is_non_commercial = False if revision is not None and name.lower() in _COMMERCIAL else None
    if published == "other" and stated["license_link"] is None:
        stated["license_link"] = f"https://huggingface.co/{name}"
    stated_by = "publisher" if published else "card" if license_id else None
    return {**stated, "license": license_id, "stated_by": stated_by, "is_non_commercial": is_non_commercial}


def terms_of_whole(parts: Sequence[Mapping[str, Any]]) -> Whole:
    """
    Say under which licence a checkpoint is whose parts have these.

    A part that is not for commercial use makes the whole so. Permissive parts are passed on under this package's licence; any other
    mixture is `"other"`: the terms of each part hold.

    Args:
        parts (`Sequence[Mapping]`):
            What [`terms_of_part`] returned for each part.

    Returns:
        [`Whole`]: The licence.

    Example:
        >>> terms_of_whole(
        ...     [
        ...         {"license": "mit", "is_non_commercial": False},
        ...         {"license": "cc-by-nc-4.0", "is_non_commercial": True},
        ...     ]
        ... )
        Whole(license_id='cc-by-nc-4.0', is_non_commercial=True)
    """
    others = sorted({part["license"] or "" for part in parts} - set(_PERMISSIVE))
    if any(part["is_non_commercial"] for part in parts):
        is_non_commercial = True
    else:
        is_non_commercial = None if any(part["is_non_commercial"] is None for part in parts) else False
    if not others:
        # A permissive name with terms beside it that forbid commercial use is not permissive.
        return Whole("other" if is_non_commercial else _OWN_LICENCE, is_non_commercial)
    if "" in others:
        return Whole(None if is_non_commercial is None else "other", is_non_commercial)
    return Whole(others[0] if len(others) == 1 and is_non_commercial else "other", is_non_commercial)


def licence_report(checkpoint: str | os.PathLike, *, revision: str | None = None) -> str:
    """
    Write down the terms of every part of a checkpoint, and those of the whole.

    Args:
        checkpoint (`str` or `os.PathLike`):
            A folder or a name on the Hub.
        revision (`str`, *optional*):
            Branch, tag or commit of a name on the Hub.

    Returns:
        `str`: Several lines.

    Raises:
        FileNotFoundError: If there is no such checkpoint, or no `config.json` in it.
        ValueError: If neither its configuration nor its card says anything.
    """
    config = read_config(checkpoint, revision=revision)
    if config is None:
        raise FileNotFoundError(f"`checkpoint` must hold a config.json, and {os.fspath(checkpoint)!r} holds none.")
    parts = config.get("parts")
    if not parts:
        return _report_of_card(checkpoint, revision)
    lines = [("part", "from", "licence", "stated by", "commercial use")]
    for part in parts:
        source = part["name"] + (f"@{part['revision'][:12]}" if part["revision"] else " (a local copy)")
        licence = part["license"] or "not known"
        licence += f" ({part['license_name']})" if part.get("license_name") else ""
        lines.append(
            (part["part"], source, licence, part["stated_by"] or "nobody", _ANSWERS[part["is_non_commercial"]])
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    text += [f"terms of {part['part']}: {part['license_link']}" for part in parts if part.get("license_link")]
    return "\n".join([*text, "", verdict(parts)])


def verdict(parts: Sequence[Mapping[str, Any]]) -> str:
    """Say on one line what the licences of parts, see [`terms_of_part`], mean for the whole."""
    whole = terms_of_whole(parts)
    unknown = [part["part"] for part in parts if part["license"] is None]
    text = f"the whole: {whole.license_id or 'not known'}"
    if whole.is_non_commercial:
        causes = [part["part"] for part in parts if part["is_non_commercial"]]
        text += f", not for commercial use, because of {' and '.join(causes)}"
    elif whole.license_id == "other":
        text += ": the terms of each part hold, read them before use"
    if unknown:
        text += f"; the licence of {' and '.join(unknown)} is to be found out before anything is published"
    return text


def _report_of_card(checkpoint: str | os.PathLike, revision: str | None) -> str:
    path = find_file(checkpoint, CARD_NAME, revision=revision)
    licence = None if path is None else _card_of(path.parent).get("license")
    if licence is None:
        raise ValueError(
            f"`checkpoint` {os.fspath(checkpoint)!r} does not say what it was made from: its config.json has no `parts`, and no card "
            "states a licence. Assemble it with `geode assemble`, or ask who made it."
        )
    commerce = _forbids_commerce([licence]) or (False if licence in _PERMISSIVE else None)
    return f"parts: none recorded\nthe whole: {licence}, as its card states (commercial use: {_ANSWERS[commerce]})"


def _card_of(folder: Path) -> dict[str, Any]:
    path = folder / CARD_NAME
    try:
        card = (metadata_load(path) or {}) if path.is_file() else {}
    except yaml.YAMLError as error:
        raise ValueError(f"The head of {path} must be YAML, and it is not ({error}). Correct or remove it.") from error
    licence = card.get("license")
    # The Hub allows a list of licences; then none of them is the one.
    return {**card, "license": "other", "license_name": ", ".join(licence)} if isinstance(licence, list) else card


def _forbids_commerce(names: Sequence[str | None]) -> bool:
    return any(name is not None and _NON_COMMERCIAL.search(name.lower()) is not None for name in names)


__all__ = ["Whole", "licence_report", "terms_of_part", "terms_of_whole", "verdict"]
