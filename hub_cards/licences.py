# SPDX-License-Identifier: Apache-2.0
"""Licences of the parts of a checkpoint, as their publishers state them, and what follows for the whole."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from geode.hub_cards.contents import find_danger
from geode.hub_cards.manifest import MANIFEST, recorded_terms
from geode.hub_cards.terms import (
    OWN_LICENSE,
    PUBLISHED_LICENSES,
    Part,
    combined_terms,
    forbids_commerce,
    recorded_parts,
)
from geode.modeling_geode.vggt_conversion_geode import find_file, read_config, read_object
from geode.trainers.licence_texts import TEXTS, recorded_texts


CARD_NAME = "README.md"
TEXT_PATTERNS = ("LICENSE*", "NOTICE*")
_ANSWERS = {True: "yes", False: "no", None: "not known"}


def find_terms(name: str, source: str, revision: str | None, folder: str | os.PathLike) -> Part:
    """
    Say what is known of a part's licence.

    Args:
        name (`str`):
            What it is here, such as `"point_encoder"`.
        source (`str`):
            Its name on the Hub, or that of a file or folder.
        revision (`str`, *optional*):
            Its commit; `None` for a part that is not from the Hub, whose name tells nothing.
        folder (`str` or `os.PathLike`):
            Where its files are. A card among them is read.

    Returns:
        [`Part`]: Where card and publisher speak of different licences, `license` is the publisher's for the weights, and either can
        forbid commercial use.
    """
    card = _card_of(Path(folder))
    license_id, link, license_name = (card.get(key) for key in ("license", "license_link", "license_name"))
    if link is not None and "://" not in link:
        # Within its repository, and not within what is made of it.
        link = None if revision is None else f"https://huggingface.co/{source}/blob/{revision}/{link}"
    stated = Part(name, source, license_id, revision, link, None, license_name, "card" if license_id else None)
    published = None if revision is None else PUBLISHED_LICENSES.get(source.lower())
    if published is None:
        return stated
    return stated._replace(
        license=published,
        link=link or (stated.page if published == "other" else None),
        is_commercial=False if forbids_commerce(license_id) else None,
        stated_by="publisher",
    )


def find_texts(name: str, folder: str | os.PathLike) -> dict[str, Path]:
    """
    Find the licence files of a part.

    Args:
        name (`str`): What the part is here, such as `"point_encoder"`.
        folder (`str` or `os.PathLike`): Where its files are.

    Returns:
        `dict[str, Path]`: Each by the name that it has in a folder that is made of several parts, such as
        `"licenses/point_encoder-LICENSE.txt"`; those that are no text are left out.
    """
    found = [path for pattern in TEXT_PATTERNS for path in sorted(Path(folder).glob(pattern)) if path.is_file()]
    return {f"{TEXTS}/{name}-{path.name}": path for path in found if find_danger(path) is None}


def text_lines(parts: Sequence[Part], texts: Mapping[str, Mapping[str, Path | None]]) -> list[str]:
    """
    Say where the licence texts of parts are.

    Args:
        parts (`Sequence[Part]`): The parts.
        texts (`Mapping[str, Mapping[str, Path | None]]`): See [`recorded_texts`].

    Returns:
        `list[str]`: A line for each file, and one for each part that came without one.
    """
    lines = []
    for part in (part for part in parts if part.name in texts):
        for name, path in texts[part.name].items():
            lines.append(f"text of {part.name}: {path or f'{name} of the assembled checkpoint, and not here'}")
        if not texts[part.name]:
            lines.append(f"text of {part.name}: none came with it{f', see {part.page}' if part.page else ''}")
    return lines


def licence_report(checkpoint: str | os.PathLike, *, revision: str | None = None) -> str:
    """
    Write down the terms of every part of a checkpoint, and those of the whole.

    Args:
        checkpoint (`str` or `os.PathLike`):
            A folder or a name on the Hub: exported, assembled, or trained from one of these.
        revision (`str`, *optional*):
            Branch, tag or commit of a name on the Hub.

    Returns:
        `str`: Several lines.

    Raises:
        FileNotFoundError: If there is no such checkpoint, or no `config.json` in it.
        ValueError: If neither its record, its configuration nor its card says anything.
    """
    record = find_file(checkpoint, MANIFEST, revision=revision)
    own, parts = (None, []) if record is None else recorded_terms(read_object(record))
    config = read_config(checkpoint, revision=revision)
    texts = {} if config is None else recorded_texts(checkpoint, revision=revision)
    if own:
        config = {}
    elif config is None:
        raise FileNotFoundError(f"`checkpoint` must hold a config.json, and {os.fspath(checkpoint)!r} holds none.")
    parts = parts or recorded_parts(config.get("parts") or [], "`parts` of config.json")
    if config.get("reconstructor_config") and parts and "reconstructor" not in [part.name for part in parts]:
        parts.append(Part("reconstructor", "attached later", None))
    if own is None and not parts:
        return _report_of_card(checkpoint, revision)
    lines = [("part", "from", "licence", "stated by", "commercial use")]
    for part in parts:
        is_copy = part.revision is None and part.stated_by != "facts"
        source = part.source + (f"@{part.revision[:12]}" if part.revision else " (a local copy)" if is_copy else "")
        licence = part.license or "not known"
        licence += f" ({part.license_name})" if part.license_name else ""
        lines.append((part.name, source, licence, part.stated_by or "nobody", _ANSWERS[part.permits_commerce]))
    if own is not None:
        lines.append(("added to these", "", own, "facts", _ANSWERS[combined_terms(own, []).is_commercial]))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    text += [f"terms of {part.name}: {part.link}" for part in parts if part.link]
    text += text_lines(parts, texts)
    return "\n".join([*text, "", verdict(parts, own or OWN_LICENSE)])


def verdict(parts: Sequence[Part], own: str = OWN_LICENSE) -> str:
    """Say on one line what the licences of parts, and that of what was added to them, mean for the whole."""
    whole = combined_terms(own, parts)
    unknown = [part.name for part in parts if part.license is None]
    text = f"the whole: {whole.license or 'not known'}"
    if whole.is_commercial is False:
        causes = [part.name for part in parts if part.permits_commerce is False] or ["what was added"]
        text += f", not for commercial use, because of {' and '.join(causes)}"
    elif whole.license == "other":
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
    answer = _ANSWERS[combined_terms(licence, []).is_commercial]
    return f"parts: none recorded\nthe whole: {licence}, as its card states (commercial use: {answer})"


def _card_of(folder: Path) -> dict[str, str]:
    """Return what a card states of its licence."""
    path = folder / CARD_NAME
    try:
        card = (metadata_load(path) or {}) if path.is_file() else {}
    except yaml.YAMLError as error:
        raise ValueError(f"The head of {path} must be YAML, and it is not ({error}). Correct or remove it.") from error
    found = {key: card[key] for key in ("license", "license_name", "license_link") if card.get(key)}
    if isinstance(found.get("license"), list):
        # The Hub allows several; then none of them is the one.
        found |= {"license": "other", "license_name": ", ".join(map(str, found["license"]))}
    return {key: str(value) for key, value in found.items()}


__all__ = [
    "TEXT_PATTERNS",
    "find_terms",
    "find_texts",
    "licence_report",
    "text_lines",
    "verdict",
]
