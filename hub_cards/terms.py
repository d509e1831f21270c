# SPDX-License-Identifier: Apache-2.0
"""Terms of what a model, an adapter or a dataset is made of, and what follows from them for the whole."""

import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple


DISTRIBUTION = "geode-vlm"
# What the publishers state, by names in lower case. `other` are terms of their own.
PUBLISHED_LICENSES = {
    "facebook/sonata": "cc-by-nc-4.0",
    "facebook/vggt-1b": "cc-by-nc-4.0",
    "facebook/vggt-1b-commercial": "other",
    "opengvlab/internvit-300m-448px-v2_5": "mit",
    "qwen/qwen2.5-1.5b-instruct": "apache-2.0",
}
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")


class Part(NamedTuple):
    """
    One thing with terms of its own: an encoder, a base model, a dataset.

    Args:
        name (`str`): What it is here, such as `"point_encoder"`.
        source (`str`): A name on the Hub, or in words where it is from.
        license (`str`): Its licence as the Hub names it; `"other"` for terms that have no name there.
        revision (`str`, *optional*): Commit of a name on the Hub.
        link (`str`, *optional*): Where terms of its own can be read.
        is_commercial (`bool`, *optional*): Whether the terms permit commercial use; by default read from the licence's name.
    """

    name: str
    source: str
    license: str
    revision: str | None = None
    link: str | None = None
    is_commercial: bool | None = None

    @property
    def is_non_commercial(self) -> bool:
        """Whether commercial use is excluded."""
        return "-nc" in self.license if self.is_commercial is None else not self.is_commercial

    @property
    def is_on_hub(self) -> bool:
        """Whether `source` looks like a name on the Hub."""
        return re.fullmatch(r"[\w.-]+/[\w.-]+", self.source) is not None


class Terms(NamedTuple):
    """A licence as the header of a card states it: `name` and `link` belong to `other` alone."""

    license: str
    name: str | None = None
    link: str | None = None


def check_license(license_id: object, of_what: str) -> str:
    """
    Return a licence's name as it is, if it has the form of one.

    Raises:
        ValueError: If it has not.
    """
    if not isinstance(license_id, str) or not _LICENSE_ID.fullmatch(license_id):
        raise ValueError(
            f"{of_what} must be a licence as the Hub names it, such as 'cc-by-nc-4.0', or 'other', got {license_id!r}. See "
            "https://huggingface.co/docs/hub/repositories-licenses."
        )
    return license_id


def read_part(name: str, entry: object) -> Part:
    """
    Read a part from a file of facts.

    Args:
        name (`str`): What it is here.
        entry (`dict`): The fields of [`Part`] but `name`.

    Returns:
        [`Part`]: The part.

    Raises:
        ValueError: If a field is missing or unknown, the licence is in no licence's form, or it contradicts the publisher.
    """
    fields = set(Part._fields) - {"name"}
    if not isinstance(entry, dict) or not {"source", "license"} <= set(entry) <= fields:
        got = sorted(entry) if isinstance(entry, dict) else entry
        raise ValueError(
            f"`{name}` must have `source` and `license`, and may have others of {sorted(fields)}, got {got}."
        )
    part = Part(name, **entry)
    check_license(part.license, f"`license` of `{name}`")
    published = PUBLISHED_LICENSES.get(str(part.source).lower())
    if published not in (None, part.license):
        raise ValueError(
            f"`license` of `{name}` is {part.license!r}, and {part.source} states {published!r}. Correct it."
        )
    if part.license == "other" and part.link is None and not part.is_on_hub:
        raise ValueError(f"`{name}` has the licence 'other', and no `link` says where its terms are. Add one.")
    return part


def combined_terms(own: str, parts: Sequence[Part]) -> Terms:
    """
    Return what the whole may state, given the licence of what was added: never more than a part permits.

    Args:
        own (`str`): Licence of what was trained or made here.
        parts (`Sequence[Part]`): What it is made of.

    Returns:
        [`Terms`]: `own`, unless a part is not for commercial use or has terms of its own.

    Example:
        >>> combined_terms("apache-2.0", [Part("vision_tower", "a/b", "mit")])
        Terms(license='apache-2.0', name=None, link=None)
        >>> combined_terms("apache-2.0", [Part("point_encoder", "facebook/sonata", "cc-by-nc-4.0")])
        Terms(license='cc-by-nc-4.0', name=None, link=None)
    """
    if "-nc" in own:
        return Terms(own)
    bound = [part for part in parts if part.is_non_commercial]
    if bound:
        names = {part.license for part in bound}
        return (
            Terms(names.pop())
            if names != {"other"} and len(names) == 1
            else Terms("other", "non-commercial", "LICENSE")
        )
    if own == "other" or any(part.license == "other" for part in parts):
        return Terms("other", "terms-of-its-parts", "LICENSE")
    return Terms(own)


def license_file(own: str | None, parts: Sequence[Part]) -> str:
    """
    Write the licence file of a folder: the terms of its weights or data, part by part, and the licence of its code.

    Args:
        own (`str`, *optional*): Licence of what was trained or made here; None where nothing was.
        parts (`Sequence[Part]`): What it is made of.

    Returns:
        `str`: The text of `LICENSE`. Where everything is under Apache-2.0 it is that licence alone.
    """
    if own in (None, "apache-2.0") and all(part.license == "apache-2.0" for part in parts):
        return apache_text()
    lines = ["The contents of this folder have several terms.", ""]
    for part in parts:
        where = part.source if part.revision is None else f"{part.source} at {part.revision}"
        page = part.link or (f"https://huggingface.co/{part.source}" if part.is_on_hub else None)
        lines.append(f"- {part.name} ({where}): {part.license}{f', see {page}' if page else ''}")
    if own is not None:
        lines.append(f"- what was added to these: {own}")
    if any(part.is_non_commercial for part in parts) or "-nc" in (own or ""):
        lines += ["", "As a whole it is not for commercial use."]
    return "\n".join([*lines, "", "The code (*.py) is under the following licence.", "", ""]) + apache_text()


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
    "PUBLISHED_LICENSES",
    "Part",
    "Terms",
    "apache_text",
    "check_license",
    "combined_terms",
    "license_file",
    "read_part",
]
