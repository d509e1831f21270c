# SPDX-License-Identifier: Apache-2.0
"""Terms of what a model, an adapter or a dataset is made of, and what follows from them for the whole."""

import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple


DISTRIBUTION = "geode-vlm"
OWN_LICENSE = "apache-2.0"
# What the publishers state, by names in lower case. `other` are terms of their own.
PUBLISHED_LICENSES = {
    "facebook/sonata": "cc-by-nc-4.0",
    "facebook/vggt-1b": "cc-by-nc-4.0",
    "facebook/vggt-1b-commercial": "other",
    "opengvlab/internvit-300m-448px-v2_5": "mit",
    "qwen/qwen2.5-1.5b-instruct": "apache-2.0",
}
# Terms of a publisher's own that are known to allow commercial use, with conditions.
_COMMERCIAL = ("facebook/vggt-1b-commercial",)
# What may be passed on under another licence, if its notices are kept.
_PERMISSIVE = ("apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "mit")
_NON_COMMERCIAL = re.compile(r"(?:^|-)nc(?:-|$)|non-?commercial|research")
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")


class Part(NamedTuple):
    """
    One thing with terms of its own: an encoder, a base model, a dataset.

    Args:
        name (`str`): What it is here, such as `"point_encoder"`.
        source (`str`): A name on the Hub, that of a file or folder, or in words where it is from.
        license (`str`, *optional*): Its licence as the Hub names it; `"other"` for terms that have no name there, None if not known.
        revision (`str`, *optional*): Commit of a name on the Hub.
        link (`str`, *optional*): Where terms of its own can be read.
        is_commercial (`bool`, *optional*): Whether terms of its own permit commercial use.
        license_name (`str`, *optional*): What terms of its own are called.
        stated_by (`str`, *optional*): Who says so: `"publisher"`, `"card"` or `"facts"`.
    """

    name: str
    source: str
    license: str | None
    revision: str | None = None
    link: str | None = None
    is_commercial: bool | None = None
    license_name: str | None = None
    stated_by: str | None = None

    @property
    def permits_commerce(self) -> bool | None:
        """Whether commercial use is permitted; None if that is not known."""
        if self.is_commercial is False or forbids_commerce(self.license) or forbids_commerce(self.license_name):
            return False
        is_known = self.license in _PERMISSIVE or self.source.lower() in _COMMERCIAL
        return True if self.is_commercial or is_known else None

    @property
    def is_on_hub(self) -> bool:
        """Whether `source` looks like a name on the Hub."""
        return re.fullmatch(r"[\w.-]+/[\w.-]+", self.source) is not None

    @property
    def page(self) -> str | None:
        """Where its terms can be read."""
        return self.link or (f"https://huggingface.co/{self.source}" if self.is_on_hub else None)


class Terms(NamedTuple):
    """The licence of a whole, None if that of a part is not known, and whether it permits commercial use, None likewise."""

    license: str | None
    is_commercial: bool | None

    def header(self) -> dict[str, str]:
        """Return the fields of a card's header; terms that the Hub has no name for have a name here, and are in `LICENSE`."""
        if self.license != "other":
            return {} if self.license is None else {"license": self.license}
        name = "non-commercial" if self.is_commercial is False else "terms-of-its-parts"
        return {"license": "other", "license_name": name, "license_link": "LICENSE"}


def forbids_commerce(license_id: str | None) -> bool:
    """
    Tell whether a licence excludes commercial use by its name.

    Example:
        >>> [forbids_commerce(name) for name in ("cc-by-nc-4.0", "qwen-research", "mit", None)]
        [True, True, False, False]
    """
    return license_id is not None and _NON_COMMERCIAL.search(license_id.lower()) is not None


def check_license(license_id: object, of_what: str) -> str:
    """
    Return a licence's name as it is, if it has the form of one.

    Raises:
        ValueError: If it has not.
    """
    if not isinstance(license_id, str) or not _LICENSE_ID.fullmatch(license_id):
        raise ValueError(
            f"{of_what} must be a licence as the Hub names it ('other' is one without a name), such as 'cc-by-nc-4.0', got "
            f"{license_id!r}. See https://huggingface.co/docs/hub/repositories-licenses."
        )
    return license_id


def read_part(name: str, entry: object, known: Part | None = None) -> Part:
    """
    Read a part from a file of facts.

    Args:
        name (`str`): What it is here.
        entry (`dict`): Fields of [`Part`], but for `name` and `stated_by`.
        known ([`Part`], *optional*): What the model itself says of it; the facts add what is not known.

    Returns:
        [`Part`]: The part.

    Raises:
        ValueError: If a field is missing or unknown, the licence is in no licence's form, or it contradicts the publisher or the model.
    """
    fields = set(Part._fields) - {"name", "stated_by"}
    stated = {} if known is None else {key: value for key, value in known._asdict().items() if value is not None}
    found = {key: stated[key] for key in stated.keys() & fields} | entry if isinstance(entry, dict) else entry
    if not isinstance(found, dict) or not {"source", "license"} <= set(found) <= fields:
        got = sorted(found) if isinstance(found, dict) else found
        raise ValueError(
            f"`{name}` must have `source` and `license`, and may have others of {sorted(fields)}, got {got}."
        )
    for key in sorted(stated.keys() & found.keys()):
        if found[key] != stated[key]:
            raise ValueError(
                f"`{key}` of `{name}` is {found[key]!r}, and the model's config.json has {stated[key]!r} in its `parts`. Leave it out."
            )
    part = Part(name, **found, stated_by=stated.get("stated_by", "facts"))
    _check_types(part, f"`{name}`")
    check_license(part.license, f"`license` of `{name}`")
    published = PUBLISHED_LICENSES.get(part.source.lower())
    if published not in (None, part.license):
        raise ValueError(
            f"`license` of `{name}` is {part.license!r}, and {part.source} states {published!r}. Correct it."
        )
    if part.is_commercial and part.permits_commerce is False:
        raise ValueError(
            f"`{name}` has the licence {part.license_name or part.license!r}, which excludes commercial use, and `is_commercial` says "
            "otherwise. Terms that were agreed upon are 'other', with a `link`."
        )
    if part.license == "other" and part.page is None:
        raise ValueError(f"`{name}` has the licence 'other', and no `link` says where its terms are. Add one.")
    return part


def recorded_parts(entries: object, where: str) -> list[Part]:
    """
    Return the parts that a file of a checkpoint records.

    Args:
        entries (`list[dict]`): Fields of [`Part`] for each; others are passed over.
        where (`str`): What holds them, for errors.

    Returns:
        `list[Part]`: The parts.

    Raises:
        ValueError: If an entry has no `name` or `source`, or a field of a wrong type.
    """
    parts = []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict):
            raise ValueError(f"{where} must be a list of objects, got {entry!r}. Write it again.")
        parts.append(Part(*map(entry.get, Part._fields)))
        _check_types(parts[-1], where)
    return parts


def combined_terms(own: str, parts: Sequence[Part]) -> Terms:
    """
    Return what the whole may state, given the licence of what was added: never more than a part permits.

    A part that is not for commercial use makes the whole so. Permissive parts are passed on under the own licence. Any other mixture is
    `"other"`: the terms of each part hold.

    Args:
        own (`str`): Licence of what was trained or made here.
        parts (`Sequence[Part]`): What it is made of.

    Returns:
        [`Terms`]: Licence, and whether commercial use is permitted.

    Example:
        >>> combined_terms("apache-2.0", [Part("vision_tower", "a/b", "mit")])
        Terms(license='apache-2.0', is_commercial=True)
        >>> combined_terms("apache-2.0", [Part("point_encoder", "facebook/sonata", "cc-by-nc-4.0")])
        Terms(license='cc-by-nc-4.0', is_commercial=False)
    """
    answers = [part.permits_commerce for part in [*parts, Part("own", "", own)]]
    is_commercial = False if False in answers else None if None in answers else True
    # A permissive name with terms beside it that forbid commercial use is not permissive.
    binding = {
        "other" if part.permits_commerce is False and part.license in _PERMISSIVE else part.license
        for part in parts
        if part.license not in _PERMISSIVE or part.permits_commerce is False
    } - {own}
    if not binding or (forbids_commerce(own) and all(map(forbids_commerce, binding))):
        return Terms(own, is_commercial)
    if None in binding and is_commercial is None:
        return Terms(None, None)
    (first, *others) = binding
    return Terms(first if own in _PERMISSIVE and not others and forbids_commerce(first) else "other", is_commercial)


def license_file(own: str | None, parts: Sequence[Part]) -> str:
    """
    Write the licence file of a folder: the terms of its weights or data, part by part, and the licence of its code.

    Args:
        own (`str`, *optional*): Licence of what was trained or made here; None where nothing was.
        parts (`Sequence[Part]`): What it is made of.

    Returns:
        `str`: The text of `LICENSE`. Where everything is under Apache-2.0 it is that licence alone.
    """
    terms = combined_terms(own or OWN_LICENSE, parts)
    if terms.is_commercial and {own or OWN_LICENSE, *(part.license for part in parts)} == {OWN_LICENSE}:
        return apache_text()
    lines = ["The contents of this folder have several terms.", ""]
    for part in parts:
        where = part.source if part.revision is None else f"{part.source} at {part.revision}"
        lines.append(
            f"- {part.name} ({where}): {part.license or 'not known'}{f', see {part.page}' if part.page else ''}"
        )
    if own is not None:
        lines.append(f"- what was added to these: {own}")
    if terms.is_commercial is False:
        lines += ["", "As a whole it is not for commercial use."]
    return "\n".join([*lines, "", "The code (*.py) is under the following licence.", "", ""]) + apache_text()


def _check_types(part: Part, where: str) -> None:
    for field, value in part._asdict().items():
        kind, is_needed = bool if field == "is_commercial" else str, field in ("name", "source")
        if not isinstance(value, kind) and (is_needed or value is not None):
            raise ValueError(
                f"`{field}` of {where} must be a {kind.__name__}, got {value!r}. In YAML, a text may need quotes."
            )


def apache_text() -> str:
    """Return the licence of this package's code."""
    path = Path(__file__).resolve().parents[1] / "LICENSE"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    text = metadata.distribution(DISTRIBUTION).read_text("licenses/LICENSE")
    if text is None:
        raise FileNotFoundError(f"The installed {DISTRIBUTION} lacks its licence file. Install it again.")
    return text


__all__ = [
    "OWN_LICENSE",
    "PUBLISHED_LICENSES",
    "Part",
    "Terms",
    "apache_text",
    "check_license",
    "combined_terms",
    "forbids_commerce",
    "license_file",
    "read_part",
    "recorded_parts",
]
