# SPDX-License-Identifier: Apache-2.0
"""What a card states and no file of the folder tells: read from YAML, completed from `facts/common.yaml`, and checked."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

import yaml

from geode.data.yaml_files import read_yaml
from geode.hub_cards.terms import Part, check_license, read_part


FACTS = Path(__file__).with_name("facts")
KINDS = ("model", "adapter", "dataset", "metric")
# Beside those that every card needs.
_NEEDED = {"model": ("parts", "data"), "adapter": ("base_model", "data"), "dataset": ("data",), "metric": ()}
_ALWAYS = ("name", "summary", "license", "intended_use", "limitations", "conventions", "citation")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """
    The facts of a card; see `docs/hub.md` for a file of them.

    Args:
        name (`str`): Title.
        summary (`str`): What it is, in a paragraph.
        license (`str`): Licence of what was trained or made, as the Hub names it; its parts may bind it further.
        intended_use (`str`): What for, and what not.
        limitations (`tuple[str, ...]`): What it cannot do.
        conventions (`tuple[str, ...]`): Frames and units.
        citation (`str`): BibTeX.
        parts (`tuple[Part, ...]`): What a model is made of.
        base_model (`Part`, *optional*): What an adapter belongs to.
        data (`tuple[Part, ...]`): What was trained on, or what a dataset was made from.
        question (`str`, *optional*): Asked in the snippet of a model's card.
        recipe (`str`, *optional*): Command or file that trained it.
        tags (`tuple[str, ...]`): More tags.
    """

    name: str
    summary: str
    license: str
    intended_use: str
    limitations: tuple[str, ...]
    conventions: tuple[str, ...]
    citation: str
    parts: tuple[Part, ...] = ()
    base_model: Part | None = None
    data: tuple[Part, ...] = ()
    question: str = "How far is the chair from the table, in meters?"
    recipe: str | None = None
    tags: tuple[str, ...] = ()


def read_facts(path: str | os.PathLike, kind: str, *, parts: Sequence[Part] = ()) -> CardFacts:
    """
    Read the facts of a card. What all cards of a kind state is added from `facts/common.yaml`.

    Args:
        path (`str` or `os.PathLike`): A YAML file.
        kind (`str`): `"model"`, `"adapter"`, `"dataset"` or `"metric"`.
        parts (`Sequence[Part]`): What the model itself says that it is made of; the file adds to it, and may not contradict.

    Returns:
        [`CardFacts`]: Complete facts.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no mapping, lacks a fact, or has one that is unknown or of the wrong form.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {KINDS}, got {kind!r}.")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"`facts` must be a YAML file, and there is none at {str(path)!r}. docs/hub.md shows one."
        )
    common = yaml.safe_load((FACTS / "common.yaml").read_text(encoding="utf-8"))
    own = read_yaml(path, "The facts")
    if not isinstance(own, dict):
        raise ValueError(f"{path} must hold a mapping of facts, got a {type(own).__name__}. docs/hub.md shows one.")
    return _checked({**common["all"], **common.get(kind, {})}, own, kind, path, parts)


def _checked(common: dict, own: dict, kind: str, path: Path, parts: Sequence[Part]) -> CardFacts:
    known = {field.name for field in fields(CardFacts)}
    for name in sorted(set(own) - known):
        near = get_close_matches(str(name), known, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else f" The facts are {sorted(known)}."
        raise ValueError(f"{path} has the unknown fact `{name}`.{hint}")
    facts = {**common, **own}
    if parts:
        facts.setdefault("parts", {part.name: {} for part in parts})
    missing = [name for name in (*_ALWAYS, *_NEEDED[kind]) if facts.get(name) in (None, "") or _is_bare(facts, name)]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(f'`{name}`' for name in missing)}, which the card of {_with_article(kind)} must state. docs/hub.md "
            "says what each is; an empty list under `data` says that there were none."
        )
    # Limitations that hold for every model stay, whatever else a file adds.
    facts["limitations"] = _texts(common.get("limitations", []), "limitations") + _texts(
        own.get("limitations", []), "limitations"
    )
    for name in ("conventions", "tags"):
        facts[name] = _texts(facts.get(name, []), name)
    for name in ("name", "summary", "intended_use", "citation", "question", "recipe"):
        if name in facts:
            facts[name] = _text(facts[name], name)
    check_license(facts["license"], "`license`")
    facts["parts"] = _parts(facts.get("parts", {}), "parts", parts)
    facts["data"] = _parts(facts["data"], "data") if "data" in facts else ()
    if "base_model" in facts:
        facts["base_model"] = read_part("base_model", facts["base_model"])
    return CardFacts(**facts)


def _with_article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _is_bare(facts: dict, name: str) -> bool:
    """Return whether a list is empty that may not be."""
    return name != "data" and facts[name] in ([], {})


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{name}` must be a text, got {value!r}.")
    return value.strip()


def _texts(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"`{name}` must be a list of texts, got {value!r}.")
    return tuple(_text(entry, name) for entry in value)


def _parts(value: object, name: str, known: Sequence[Part] = ()) -> tuple[Part, ...]:
    if value in ([], {}):
        return ()
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must map names to their `source` and `license`, got {value!r}.")
    of_model = {part.name: part for part in known}
    entries = {str(key): entry for key, entry in value.items()}
    names = dict.fromkeys([*of_model, *entries])
    return tuple(read_part(key, entries.get(key, {}), of_model.get(key)) for key in names)


__all__ = ["FACTS", "KINDS", "CardFacts", "read_facts"]
