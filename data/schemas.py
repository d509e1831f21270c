# SPDX-License-Identifier: Apache-2.0
"""
The one form that every dataset is read into, and the rules that read numbers, letters and units out of rows.

Source: the public rows of the datasets; each reader in `geode.data.readers` names its own.

Convention:
    - `prompt` and `answer_text` are plain text: no media token, and nothing in them is a control token.
    - `value` is in `unit`, the unit that the question asks for; `value_si` is in metres, square metres or counts.
    - `box` is `(cx, cy, cz, dx, dy, dz, yaw)` in metres and radians, z up, in the frame of the dataset; the geometry of its
      scene carries it into the scene frame.
    - Paths are relative to the root of the dataset's media, with forward slashes.
"""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import PurePosixPath
from string import Formatter

from geode.modeling_geode.answers_geode import COUNT, asked_unit, convert_to_si
from geode.modeling_geode.shown_geode import shown


MEDIA_TYPES = ("video", "image")
KINDS = ("number", "choice", "text", "box")
# What VSI-Bench puts around a question. Source: its public task file, section A.3 of the benchmark's description.
PRE_PROMPT = "These are frames of a video."
NUMBER_POST_PROMPT = "Please answer the question using a single word or phrase."
CHOICE_POST_PROMPT = "Answer with the option's letter from the given choices directly."
# The unit of a type whose question names none: of the first of these parts that its name has.
DEFAULT_UNITS = {
    "room_size": "m2",
    "absolute_size_room": "m2",
    "abs_distance": "m",
    "absolute_distance": "m",
    "size_estimation": "cm",
    "absolute_size_object": "cm",
    "absolute_count": COUNT,
    "object_count": COUNT,
    "displacement": "m",
    "dist_change": "m",
    "abs_dist": "m",
}
UNKNOWN_ANGLE_UNIT = "deg?"  # whether such numbers are degrees is not published, so they stay text
# Words of units that `asked_unit` leaves alone because they often mean something else. In a question for a length or an
# area they name its unit, but for the foot of a bed and for lengths that are given ("the 2 meters shelf").
_BARE_UNITS = tuple(
    (re.compile(rf"(?<!\d[\s-])(?<!\d)\b(?:{words})", flags=re.IGNORECASE), unit)
    for words, unit in (
        (r"square[\s-]+met|sq\.?[\s-]*m\b", "m2"),
        ("square[\\s-]+f(?:ee|oo)t\\b|sq\\.?[\\s-]*ft\\b|ft(?:\\^?2\\b|\u00b2)", "ft2"),
        (r"centimet|cms?\b", "cm"),
        (r"inch(?:es)?\b", "in"),
        (r"(?:feet|foot|ft)\b(?!\s+of\b)", "ft"),
        (r"met(?:er|re)s?\b", "m"),
    )
)
_NUMBER = re.compile(r"-?\d+(?:\.(\d+))?", flags=re.ASCII)
_CHOICE = re.compile(r"([A-Z])(?:\.\s.*|\.)?")
_MEDIA_TOKEN = re.compile(r"<(?:image|video)>\r?\n?")
_PLAIN_PATH = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)*")
_HUMAN = frozenset(("human", "user"))
_ASSISTANT = frozenset(("gpt", "assistant"))


@dataclass(slots=True, kw_only=True)
class Record:
    """
    One question about one video or image.

    Args:
        uid (`str`): Names the row within all datasets: `source:file:row`, or the row's own id.
        source (`str`): Name of the dataset.
        media_type (`str`): `"video"` or `"image"`.
        media (`str`): Path of the video or image below the dataset's media root.
        prompt (`str`): What the user says, without the media token.
        kind (`str`): `"number"`, `"choice"`, `"text"` or `"box"`.
        answer_text (`str`): What the assistant says, as text.
        question_type (`str`, *optional*): The dataset's name for the task.
        value (`float`, *optional*): The number, in `unit`.
        unit (`str`, *optional*): `"m"`, `"cm"`, `"ft"`, `"in"`, `"m2"`, `"ft2"`, `"count"`; `"deg?"` stays text.
        value_si (`float`, *optional*): The number in SI. Only numbers with one are regressed.
        decimals (`int`, *optional*): Decimal places of the answer.
        letter (`str`, *optional*): The letter of a choice.
        box (`list[float]`, *optional*): Seven numbers, see the module.
        rationale (`str`, *optional*): The reasoning that leads to the answer.
        final (`str`, *optional*): The short answer that ends a rationale.
        turns (`int`, defaults to 1): Number of questions in the conversation.
        conversation (`list[list[str]]`, *optional*): All `[question, answer]` pairs where there are several.
        subset (`str`, *optional*): The part of the dataset.
        scene (`str`, *optional*): The scene's id, where the row names it.
        geometry (`str`, *optional*): Path of a saved `SceneGeometry`, as `media`.
        num_frames (`int`, *optional*): The question counts frames: it means these many, uniformly sampled with both ends.
        label_suspect (`bool`, defaults to `False`): The published label is known to be computed wrongly.
    """

    uid: str
    source: str
    media_type: str
    media: str
    prompt: str
    kind: str
    answer_text: str
    question_type: str | None = None
    value: float | None = None
    unit: str | None = None
    value_si: float | None = None
    decimals: int | None = None
    letter: str | None = None
    box: list[float] | None = None
    rationale: str | None = None
    final: str | None = None
    turns: int = 1
    conversation: list[list[str]] | None = None
    subset: str | None = None
    scene: str | None = None
    geometry: str | None = None
    num_frames: int | None = None
    label_suspect: bool = False

    @property
    def is_regressed(self) -> bool:
        """Whether the answer is a control token with a target: a number in a known unit, or a box."""
        return self.box is not None or self.value_si is not None

    def to_dict(self) -> dict:
        """Return the record as plain types."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_dict(cls, row: dict) -> "Record":
        """
        Build a record from what [`Record.to_dict`] gave, or a row of a dataset of records.

        Args:
            row (`dict`): The fields; those that are absent take their defaults.

        Returns:
            [`Record`]: The record.

        Raises:
            TypeError: If `row` is no dict.
            ValueError: If a field is unknown, a required one is missing, or one is not of its type.
        """
        if not isinstance(row, dict):
            raise TypeError(f"A record must be a dict of its fields, got {shown(row)}.")
        unknown, missing = sorted(map(str, row.keys() - set(_FIELDS))), sorted(REQUIRED_FIELDS - row.keys())
        if unknown or missing:
            raise ValueError(f"A record must have the fields {sorted(_FIELDS)}: unknown {unknown}, missing {missing}.")
        _check_types(row)
        return cls(**row)


_FIELDS = tuple(entry.name for entry in fields(Record))
REQUIRED_FIELDS = frozenset(("uid", "source", "media_type", "media", "prompt", "kind", "answer_text"))
_OPTIONAL_TEXTS = ("question_type", "unit", "letter", "rationale", "final", "subset", "scene", "geometry")
_OPTIONAL_NUMBERS = ("value", "value_si", "decimals", "turns", "num_frames")


def _check_types(row: dict) -> None:
    """Refuse what no reader gives."""
    for names, may_be_none in ((REQUIRED_FIELDS, False), (_OPTIONAL_TEXTS, True)):
        for name in names:
            value = row.get(name)
            if not isinstance(value, str) and not (may_be_none and value is None):
                raise ValueError(f"`{name}` of a record must be text, got {shown(value)}.")
    for name, allowed in (("kind", KINDS), ("media_type", MEDIA_TYPES)):
        if row[name] not in allowed:
            raise ValueError(f"`{name}` of a record must be one of {allowed}, got {shown(row[name])}.")
    for name in _OPTIONAL_NUMBERS:
        if row.get(name) is not None and not _is_finite(row[name]):
            raise ValueError(f"`{name}` of a record must be a finite number, got {shown(row[name])}.")
    box, conversation = row.get("box"), row.get("conversation")
    if box is not None and not (isinstance(box, list) and len(box) == 7 and all(map(_is_finite, box))):
        raise ValueError(f"`box` of a record must be seven finite numbers, got {shown(box)}.")
    if conversation is not None and not (isinstance(conversation, list) and all(map(_is_pair, conversation))):
        raise ValueError(f"`conversation` of a record must be pairs of texts, got {shown(conversation)}.")


def _is_finite(value) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def _is_pair(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def strip_media_tokens(text: str) -> str:
    r"""
    Remove every `<image>` and `<video>` with the newline that follows it, and surrounding space.

    Args:
        text (`str`): A turn of a conversation.

    Returns:
        `str`: The text alone.

    Example:
    ```python
    >>> strip_media_tokens("<image>\nWhat room is it?<image>")
    'What room is it?'

    ```
    """
    # Again until nothing is left: a token that is removed may leave another one behind.
    while "<" in text and _MEDIA_TOKEN.search(text):
        text = _MEDIA_TOKEN.sub("", text)
    return text.strip()


def benchmark_prompt(question: str, options: list[str] | None = None) -> str:
    """
    Return the text in which VSI-Bench asks a question.

    Args:
        question (`str`): The bare question.
        options (`list[str]`, *optional*): `"A. ..."` and so on for a choice.

    Returns:
        `str`: Pre-prompt, question, options and post-prompt, a line each.
    """
    if options:
        return "\n".join([PRE_PROMPT, question, "Options:", *options, CHOICE_POST_PROMPT])
    return "\n".join([PRE_PROMPT, question, NUMBER_POST_PROMPT])


def bare_prompt(prompt: str) -> str:
    r"""
    Return a prompt without the lines of [`benchmark_prompt`] before and after the question.

    Args:
        prompt (`str`): A prompt, of the benchmark or not.

    Returns:
        `str`: Question and options.

    Example:
    ```python
    >>> bare_prompt(benchmark_prompt("How high is the lamp?"))
    'How high is the lamp?'

    ```
    """
    prompt = prompt.removeprefix(f"{PRE_PROMPT}\n")
    return prompt.removesuffix(f"\n{NUMBER_POST_PROMPT}").removesuffix(f"\n{CHOICE_POST_PROMPT}")


@lru_cache(maxsize=1024)
def default_unit(question_type: str | None) -> str | None:
    """
    Return the unit of a task whose question names none.

    Args:
        question_type (`str`, *optional*): The dataset's name for the task.

    Returns:
        `str`, *optional*: The unit; None where the task has none.
    """
    for part, unit in DEFAULT_UNITS.items():
        if part in (question_type or ""):
            return unit
    return None


def number_unit(question: str, question_type: str | None = None) -> str | None:
    """
    Return the unit of a question's number: the one that the question names, otherwise the task's.

    `asked_unit` reads it, which is what inference converts to. Here the task is known as well, so words that it leaves
    alone because they often mean something else ("the feet between the two") count too, and a task that counts is
    never in metres.

    Args:
        question (`str`): The question.
        question_type (`str`, *optional*): The dataset's name for the task.

    Returns:
        `str`, *optional*: The unit; None where neither says.

    Example:
    ```python
    >>> number_unit("Give the feet separating lamp and sink."), number_unit("How far is it?", "object_abs_distance")
    ('ft', 'm')

    ```
    """
    default = default_unit(question_type)
    if default == COUNT:
        return COUNT
    unit = asked_unit(question)
    # "The number of feet between ..." is no count.
    if unit is None or (unit == COUNT and default is not None):
        unit = next((unit for pattern, unit in _BARE_UNITS if pattern.search(question)), default)
    return unit


def number_fields(answer: str, question: str, question_type: str | None = None) -> dict | None:
    """
    Read a number and its unit.

    The unit is the one that the question asks for, or the task's, see [`number_unit`].

    Args:
        answer (`str`): The answer.
        question (`str`): The question, which names the unit.
        question_type (`str`, *optional*): The dataset's name for the task.

    Returns:
        `dict`, *optional*: `value`, `unit`, `value_si` (None where the unit is not known) and `decimals`; None if the answer
        is not a plain decimal number.

    Raises:
        ValueError: If the number is beyond what a float holds.

    Example:
    ```python
    >>> number_fields("5.6", "What is the distance in feet between the lamp and the sink?")
    {'value': 5.6, 'unit': 'ft', 'value_si': 1.70688, 'decimals': 1}

    ```
    """
    match = _NUMBER.fullmatch(answer.strip())
    if match is None:
        return None
    value, decimals = float(match[0]), len(match[1] or "")
    if math.isinf(value):
        raise ValueError(f"A number must be one that a float holds, got {answer!r:.200}. Correct it, or leave it out.")
    if question_type and "direction" in question_type:
        return {"value": value, "unit": UNKNOWN_ANGLE_UNIT, "value_si": None, "decimals": decimals}
    unit = number_unit(question, question_type)
    # Seven significant digits are what float32 holds; conversion writes more that mean nothing.
    value_si = None if unit is None else float(f"{convert_to_si(value, unit):.7g}")
    return {"value": value, "unit": unit, "value_si": value_si, "decimals": decimals}


def answer_fields(answer: str, question: str, question_type: str | None = None) -> dict:
    """
    Read an answer by its form: a decimal number, a letter with or without its text, or text.

    Args:
        answer (`str`): The assistant's words.
        question (`str`): The user's, which name the unit of a number.
        question_type (`str`, *optional*): The dataset's name for the task; it never decides the kind.

    Returns:
        `dict`: Fields of a [`Record`]: `kind`, `answer_text` and what the kind has.
    """
    answer = answer.strip()
    number = number_fields(answer, question, question_type)
    if number is not None:
        return {"kind": "number", "answer_text": answer, **number}
    match = _CHOICE.fullmatch(answer)
    if match is not None:
        return {"kind": "choice", "answer_text": answer, "letter": match[1]}
    return {"kind": "text", "answer_text": answer}


def media_path(path: str | None) -> str:
    """
    Normalise the path of a medium below its root.

    Args:
        path (`str`): The path as a row gives it, such as `./sam/1.jpg`.

    Returns:
        `str`: The path with forward slashes and without `.` parts.

    Raises:
        ValueError: If the path is empty, absolute, or leaves its root.
    """
    if isinstance(path, str) and _PLAIN_PATH.fullmatch(path):
        return path
    if not isinstance(path, str):
        raise ValueError(f"The path of a medium must be text, got {path!r}.")
    clean = PurePosixPath(path.replace("\\", "/"))
    if not clean.parts or clean.is_absolute() or ".." in clean.parts or clean.parts[0][1:2] == ":" or "\0" in path:
        raise ValueError(f"The path of a medium must stay below its root, got {path!r}.")
    return str(clean)


def fill_path(pattern: str, names: Mapping[str, str | None]) -> str:
    """
    Put names that a dataset gives into a path that the user gives.

    Args:
        pattern (`str`): A path with names in braces, such as `"geometry/{scene}"`. It is trusted: it may lead anywhere.
        names (`Mapping[str, str | None]`): What each name stands for. It is not trusted, see [`media_path`].

    Returns:
        `str`: The path.

    Raises:
        ValueError: If the pattern has another name, or what a name of it stands for is missing or leaves its place in the path.

    Example:
    ```python
    >>> fill_path("../geometry/{scene}", {"scene": "room_1", "source": None})
    '../geometry/room_1'

    ```
    """
    try:
        used = {name for _, name, _, _ in Formatter().parse(pattern) if name is not None}
        if not used <= names.keys():
            raise ValueError(f"it has {sorted(used - names.keys())}")
    except ValueError as error:
        raise ValueError(
            f"`geometry` must be a path with no other names in braces than {sorted(names)}, got {pattern!r}: {error}."
        ) from error
    # The folder of a path without folders is written as one dot.
    return pattern.format_map({name: names[name] if names[name] == "." else media_path(names[name]) for name in used})


def paired_turns(conversations: list[dict] | None, *, default_question: str | None = None) -> list[list[str]]:
    """
    Return the questions and answers of a LLaVA-style conversation.

    Args:
        conversations (`list[dict]`): Turns with `from` (`"human"` or `"gpt"`) and `value`, in turn.
        default_question (`str`, *optional*): Stands in for a question that is nothing but a media token. Without it, such a
            question is an error.

    Returns:
        `list[list[str]]`: `[question, answer]` pairs, without media tokens.

    Raises:
        ValueError: If turns are missing, out of order or not text.
    """
    if not isinstance(conversations, list) or len(conversations) < 2 or len(conversations) % 2:
        raise ValueError(f"`conversations` must hold questions and answers in pairs, got {conversations!r:.200}.")
    pairs = []
    for human, gpt in zip(conversations[::2], conversations[1::2], strict=True):
        question, answer = _turn(human, _HUMAN), _turn(gpt, _ASSISTANT)
        asked = question or default_question
        if not asked or not answer:
            raise ValueError(f"Every question and answer must have text, got {question!r:.200} and {answer!r:.200}.")
        pairs.append([asked, answer])
    return pairs


def _turn(turn: dict, speakers: frozenset[str]) -> str:
    """Return the text of a turn that one of `speakers` says."""
    speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if not isinstance(speaker, str) or speaker not in speakers or not isinstance(text, str):
        raise ValueError(
            f"Turns must come from 'human' and 'gpt' in turn, with text in `value`; got {turn!r:.200} where one of "
            f"{sorted(speakers)} speaks."
        )
    return strip_media_tokens(text)


def conversation_fields(conversations: list[dict] | None, question_type: str | None = None) -> dict:
    """
    Read a LLaVA-style conversation.

    Args:
        conversations (`list[dict]`): Turns, see [`paired_turns`].
        question_type (`str`, *optional*): The dataset's name for the task.

    Returns:
        `dict`: Fields of a [`Record`]: prompt, answer and kind. A conversation of several questions is text.

    Raises:
        ValueError: If turns are missing or out of order.
    """
    pairs = paired_turns(conversations)
    if len(pairs) > 1:
        return text_fields(pairs)
    prompt, answer = pairs[0]
    return {"prompt": prompt, **answer_fields(answer, prompt, question_type)}


def text_fields(pairs: list[list[str]]) -> dict:
    """
    Return the fields of a conversation whose answers are text, whatever their form.

    Args:
        pairs (`list[list[str]]`): `[question, answer]` pairs, see [`paired_turns`].

    Returns:
        `dict`: Fields of a [`Record`]: prompt and answer of the first pair, and all pairs where there are several.
    """
    prompt, answer = pairs[0]
    fields_of_text: dict = {"prompt": prompt, "kind": "text", "answer_text": answer}
    if len(pairs) > 1:
        fields_of_text.update(turns=len(pairs), conversation=pairs)
    return fields_of_text


__all__ = [
    "CHOICE_POST_PROMPT",
    "KINDS",
    "MEDIA_TYPES",
    "NUMBER_POST_PROMPT",
    "PRE_PROMPT",
    "Record",
    "answer_fields",
    "bare_prompt",
    "benchmark_prompt",
    "conversation_fields",
    "default_unit",
    "fill_path",
    "media_path",
    "number_fields",
    "number_unit",
    "paired_turns",
    "strip_media_tokens",
    "text_fields",
]
