# SPDX-License-Identifier: Apache-2.0
"""What readers share: features of common columns, checks of fields, and errors that name the row."""

import functools
import json
import math
from pathlib import PurePosixPath

from datasets import Features, List, Value

from geode.data.schemas import Record, media_path


TEXT = Value("string")
CONVERSATIONS = List({"from": TEXT, "value": TEXT})
RECORD_FEATURES = Features(
    {
        **dict.fromkeys(("uid", "source", "media_type", "media", "prompt", "kind", "answer_text"), TEXT),
        "question_type": TEXT,
        "value": Value("float64"),
        "unit": TEXT,
        "value_si": Value("float64"),
        "decimals": Value("int64"),
        "letter": TEXT,
        "box": List(Value("float64")),
        "rationale": TEXT,
        "final": TEXT,
        "turns": Value("int64"),
        "conversation": List(List(TEXT)),
        "subset": TEXT,
        "scene": TEXT,
        "geometry": TEXT,
        "num_frames": Value("int64"),
        "label_suspect": Value("bool"),
    }
)
MAX_FRAMES = 10_000  # a question that counts on more of them means something else
# Folders of scans whose videos are named after their scenes.
SCAN_FOLDERS = frozenset(("arkitscenes", "scannet", "scannetpp", "scannetppv2"))


def names_its_row(read):
    """
    Make a function's errors about a row name the file and the row, and refuse records that no table can hold.

    Args:
        read (`Callable`): A reader's `record_from_row`.

    Returns:
        `Callable`: The same with a message in front of those of its ValueErrors. A number that is too large or a list that
        is nested too deep is one as well.
    """

    @functools.wraps(read)
    def record_from_row(row: dict, *, file: str, index: int, **options) -> Record | None:
        try:
            if not isinstance(row, dict) or not all(isinstance(name, str) for name in row):
                raise ValueError(f"A row must be an object with names for its fields, got {row!r:.200}.")
            record = read(row, file=file, index=index, **options)
            if record is not None:
                _check_fields(record)
            return record
        except (ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"Row {index} of {file} cannot be read: {error}") from error

    return record_from_row


def _check_fields(record: Record) -> None:
    """Refuse text that is not Unicode and numbers that are not finite: Arrow cannot write the one, nor a model learn the other."""
    texts = [record.uid, record.media, record.prompt, record.answer_text, record.question_type, record.rationale]
    texts += [record.final, record.subset, record.scene, record.geometry, record.unit]
    if record.conversation is not None:
        texts += [text for pair in record.conversation for text in pair]
    for text in texts:
        if text is not None and not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"Text must be Unicode, and {text!r:.200} has half of a surrogate pair at {error.start}. Write the whole "
                    "character, or leave it out."
                ) from error
    numbers = record.box if record.value is None else (record.value, record.value_si or 0.0)
    if numbers is not None and not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"Numbers must be finite, got {numbers} of the answer {record.answer_text!r:.200}. Correct the row, or leave it out."
        )


def text_of(row: dict, name: str) -> str:
    """
    Return a field that must be text, with more than white space.

    Args:
        row (`dict`): The row.
        name (`str`): The field.

    Returns:
        `str`: The text, stripped.

    Raises:
        ValueError: If it is absent, empty or not text.
    """
    text = optional_text(row, name)
    if text is None:
        raise ValueError(f"`{name}` must be text, got {row.get(name)!r}; the row has {sorted(map(str, row))}.")
    return text


def optional_text(row: dict, name: str) -> str | None:
    """
    Return a field that is text if it is there.

    Args:
        row (`dict`): The row.
        name (`str`): The field.

    Returns:
        `str`, *optional*: The text, stripped; None if it is absent or empty.

    Raises:
        ValueError: If it is not text.
    """
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be text, got {value!r:.200}; the row has {sorted(map(str, row))}.")
    return value.strip() or None


def medium_of(row: dict) -> tuple[str, str]:
    """
    Return the type and path of a row's only medium.

    Args:
        row (`dict`): A row with `video` or `image`.

    Returns:
        `tuple[str, str]`: `"video"` or `"image"`, and the path.

    Raises:
        ValueError: If there is none, or both.
    """
    video, image = row.get("video"), row.get("image")
    if (video is None) == (image is None):
        raise ValueError(f"A row must have exactly one of `video` and `image`, got {video!r:.200} and {image!r:.200}.")
    return ("video", media_path(video)) if image is None else ("image", media_path(image))


def scene_of(media: str) -> str | None:
    """
    Return the scene that a video of a scan is named after.

    Args:
        media (`str`): The path, such as `scannet/videos/scene0191_00.mp4`.

    Returns:
        `str`, *optional*: The name; None outside of the folders of ARKitScenes, ScanNet and ScanNet++.
    """
    if media.partition("/")[0] not in SCAN_FOLDERS:
        return None
    name = media.rpartition("/")[2]
    return name.rpartition(".")[0] or name


def stem_of(file: str) -> str:
    """Return the name of a file without folders and ending."""
    return PurePosixPath(file).stem


def located(category: str, box: list[float]) -> dict:
    """
    Return the fields of a question for a box.

    Args:
        category (`str`): What is sought, such as `tv_monitor`.
        box (`list[float]`): The seven numbers.

    Returns:
        `dict`: Fields of a [`Record`]. The answer's text has millimetres.
    """
    return {
        "prompt": f"Locate the {category.replace('_', ' ')}.",
        "kind": "box",
        "answer_text": json.dumps([round(value, 3) for value in box]),
        "question_type": "object_localization",
        "box": [round(value, 6) for value in box],
    }


def paths_of(names: dict[str, str], media_pattern: str, geometry_pattern: str | None) -> dict:
    """
    Return the fields that say where a scan's video and geometry are.

    Args:
        names (`dict[str, str]`): What may stand in braces.
        media_pattern (`str`): A path with names in braces.
        geometry_pattern (`str`, *optional*): Another.

    Returns:
        `dict`: Fields of a [`Record`].

    Raises:
        ValueError: If a pattern has another name in braces, or a path leaves its root.
    """
    paths = []
    for pattern in (media_pattern, geometry_pattern):
        try:
            paths.append(None if pattern is None else media_path(pattern.format_map(names)))
        except KeyError as error:
            raise ValueError(f"A pattern may have {sorted(names)} in braces, got {error} in {pattern!r}.") from error
    return {"media_type": "video", "media": paths[0], "geometry": paths[1]}


__all__ = [
    "CONVERSATIONS",
    "MAX_FRAMES",
    "RECORD_FEATURES",
    "SCAN_FOLDERS",
    "TEXT",
    "located",
    "medium_of",
    "names_its_row",
    "optional_text",
    "paths_of",
    "scene_of",
    "stem_of",
    "text_of",
]
