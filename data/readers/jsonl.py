# SPDX-License-Identifier: Apache-2.0
r"""
Rows of your own, in one of two forms, a JSON object a line (or a JSON list, or Parquet).

A conversation as LLaVA has it, with one medium:

    {"video": "a.mp4", "conversations": [{"from": "human", "value": "<image>\nHow far is it, in feet?"},
                                         {"from": "gpt", "value": "5.6"}]}

or a question and its answer:

    {"image": "b.jpg", "question": "Which is bigger?", "options": ["lamp", "sofa"], "answer": "sofa"}
    {"media": "c.mp4", "prompt": "How long is the desk?", "answer": 142, "unit": "cm", "rationale": "..."}
    {"video": "d.mp4", "prompt": "Locate the lamp.", "box": [1.0, 2.0, 0.5, 0.4, 0.4, 1.0, 0.0], "geometry": "geometry/d"}

- `video`, `image`, or `media` with an ending that says which (otherwise `media_type`), relative to the media root.
- `prompt` or `question`. Options get letters, `A. lamp` (or have them, as `A. lamp`, `A) lamp` or `(A) lamp`), and follow the
  prompt unless it has them already.
- `answer`: text, a number, a letter, an option's text, or both (`B. sofa`). `unit`: that of the number, where the question
  does not name it; in a conversation of one question as well.
- `box`: seven numbers in metres and radians, in the frame that the scene's geometry was built from.
- `rationale`, `final`, `question_type`, `subset`, `scene`, `geometry`, `num_frames`: as they are. `id` and other fields are
  ignored, but for those that look like one of these misspelt. A record is named after its file and row.
"""

import difflib
import json
import math
import re
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from datasets import Features, List, Value

from geode.data.readers.common import CONVERSATIONS, MAX_FRAMES, TEXT, names_its_row, optional_text, text_of
from geode.data.schemas import (
    CHOICE_POST_PROMPT,
    MEDIA_TYPES,
    Record,
    answer_fields,
    conversation_fields,
    media_path,
    strip_media_tokens,
)
from geode.data.synthetic_rooms.boxes import canonical_box
from geode.modeling_geode.answers_geode import convert_to_si, parse_unit


NAME = "jsonl"
REPO_ID = None
LICENSE = None
DATA_FILES = ("*.jsonl", "*.json")
_TEXT_FIELDS = ("rationale", "final", "question_type", "subset", "scene", "geometry")
FEATURES = Features(
    {
        **dict.fromkeys(("id", "video", "image", "media", "media_type", "prompt", "question", "answer", "unit"), TEXT),
        **dict.fromkeys(_TEXT_FIELDS, TEXT),
        "conversations": CONVERSATIONS,
        "options": List(TEXT),
        "box": List(Value("float64")),
        "num_frames": Value("int64"),
    }
)
_ENDINGS = {
    **dict.fromkeys((".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v"), "video"),
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"), "image"),
}
_LETTERED = re.compile(r"\(?([A-Z])(?:[.)]\s*(.*))?", flags=re.DOTALL)


@names_its_row
def record_from_row(row: dict, *, file: str, index: int) -> Record:
    """
    Read a row of either form.

    Args:
        row (`dict`): See the module.
        file (`str`): The file's path below the root.
        index (`int`): The row's number in the file.

    Returns:
        [`Record`]: The record.

    Raises:
        ValueError: If the row has neither form, or a field is misspelt.
    """
    _check_names(frozenset(row))
    media_type, media = _medium(row)
    fields: dict[str, Any] = {name: optional_text(row, name) for name in _TEXT_FIELDS}
    if row.get("conversations") is not None:
        answer = _in_unit(conversation_fields(row["conversations"], fields["question_type"]), row.get("unit"))
    else:
        answer = _question_and_answer(row, fields["question_type"])
    if fields["geometry"] is not None:
        fields["geometry"] = media_path(fields["geometry"])
    num_frames = row.get("num_frames")
    is_whole = isinstance(num_frames, int) and not isinstance(num_frames, bool)
    if num_frames is not None and not (is_whole and 1 <= num_frames <= MAX_FRAMES):
        raise ValueError(f"`num_frames` must be a whole number from 1 to {MAX_FRAMES}, got {num_frames!r:.200}.")
    return Record(
        uid=f"{NAME}:{file}:{index}",
        source=NAME,
        media_type=media_type,
        media=media,
        num_frames=num_frames,
        **fields,
        **answer,
    )


@lru_cache(maxsize=1024)
def _check_names(names: frozenset[str]) -> None:
    for name in sorted(names - set(FEATURES)):
        close = difflib.get_close_matches(name, FEATURES, n=1, cutoff=0.8)
        if close and close[0] not in names:
            raise ValueError(f"The row has a field {name!r}. Rename it to {close[0]!r} if that is meant.")


def _medium(row: dict) -> tuple[str, str]:
    given = [name for name in ("video", "image", "media") if row.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"A row must have exactly one of `video`, `image` and `media`, got {given} of {sorted(row)}.")
    media = media_path(row[given[0]])
    media_type = (
        given[0] if given[0] != "media" else row.get("media_type") or _ENDINGS.get(PurePosixPath(media).suffix.lower())
    )
    if media_type not in MEDIA_TYPES:
        raise ValueError(
            f"`media_type` must be one of {MEDIA_TYPES} where the ending does not say, got {media_type!r} for {media!r}."
        )
    return media_type, media


def _question_and_answer(row: dict, question_type: str | None) -> dict:
    asked = [name for name in ("prompt", "question") if row.get(name) is not None]
    if len(asked) != 1:
        raise ValueError(
            f"A row must have `conversations`, or one of `prompt` and `question`, got {asked} of {sorted(row)}."
        )
    prompt = strip_media_tokens(text_of(row, asked[0]))
    if row.get("box") is not None:
        return {"prompt": prompt, **_box_fields(row)}
    answer, unit, options = row.get("answer"), row.get("unit"), row.get("options")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = _decimal(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"`answer` must be text or a number, got {answer!r:.200}.")
    if options:
        prompt, answer = _with_options(prompt, answer.strip(), options)
    return {"prompt": prompt, **_in_unit(answer_fields(strip_media_tokens(answer), prompt, question_type), unit)}


def _decimal(number: float) -> str:
    try:
        is_finite = math.isfinite(number)
    except OverflowError:  # a whole number beyond what a float holds
        is_finite = False
    if not is_finite:
        raise ValueError(f"`answer` must be text or a finite number, got {number!r:.200}.")
    return np.format_float_positional(number, trim="-")


def _in_unit(fields: dict, unit: str | None) -> dict:
    """Return the fields of an answer, its number in `unit` if the row names one."""
    if unit is None:
        return fields
    if fields["kind"] != "number":
        raise ValueError(f"A row with a `unit` must have a number as its answer, got {fields['answer_text']!r:.200}.")
    unit = parse_unit(unit)
    return {**fields, "unit": unit, "value_si": float(f"{convert_to_si(fields['value'], unit):.7g}")}


def _box_fields(row: dict) -> dict:
    if row.get("unit") is not None:
        raise ValueError(
            f"A `box` is in metres and radians, and has no `unit`; got {row['unit']!r:.200}. Leave it out."
        )
    try:
        box = np.asarray(row["box"], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        box = np.empty(0)
    if box.shape != (7,) or not np.isfinite(box).all() or not (box[3:6] > 0).all():
        raise ValueError(f"`box` must be cx, cy, cz, dx, dy, dz, yaw with sizes above 0, got {row['box']!r:.200}.")
    values = [round(value, 6) for value in canonical_box(box).tolist()]
    return {"kind": "box", "answer_text": json.dumps([round(value, 3) for value in values]), "box": values}


def _with_options(prompt: str, answer: str, options: list[str]) -> tuple[str, str]:
    """Return the prompt with its options, and the answer with its letter."""
    if not isinstance(options, list) or len(options) > 26 or not all(isinstance(option, str) for option in options):
        raise ValueError(f"`options` must be a list of at most 26 texts, got {options!r:.200}.")
    letters = [chr(ord("A") + number) for number in range(len(options))]
    texts = [_without_letter(option.strip(), letter) for letter, option in zip(letters, options, strict=True)]
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    if answer in texts and answer not in letters:
        answer = letters[texts.index(answer)]
    match = _LETTERED.fullmatch(answer)
    if match is None or match[1] not in letters:
        raise ValueError(f"`answer` must be one of the options {lines} or its letter, got {answer!r:.200}.")
    letter, text = match[1], (match[2] or "").strip()
    if text and _plain(text) != _plain(texts[letters.index(letter)]):
        raise ValueError(
            f"The letter and the text of `answer` must name the same one of the options {lines}, got {answer!r:.200}. Give "
            "the letter alone, or correct it."
        )
    answer = f"{letter}. {text}" if text else letter
    if not all(line in prompt for line in lines):
        prompt = "\n".join([prompt, "Options:", *lines, CHOICE_POST_PROMPT])
    return prompt, answer


def _without_letter(option: str, letter: str) -> str:
    match = _LETTERED.fullmatch(option)
    return match[2].strip() if match is not None and match[1] == letter and match[2] else option


def _plain(text: str) -> str:
    return text.casefold().rstrip(".")


__all__ = ["DATA_FILES", "FEATURES", "LICENSE", "NAME", "REPO_ID", "record_from_row"]
