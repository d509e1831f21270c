# SPDX-License-Identifier: Apache-2.0
"""
VLM-3R-DATA: 207,658 questions like VSI-Bench's, and some 132,000 about camera and time.

Source: https://huggingface.co/datasets/Journey9ni/VLM-3R-DATA, JSON lists in `vsibench_train/` and `vstibench_train/`, and the
code that made them (VITA-Group/VLM-3R). The licence of the rows is not stated where we could read it.

That code takes the camera's centre out of an inverse that is not one, so five families in `vstibench_train/` are labelled
wrongly. Their rows are `label_suspect`, which keeps them from the regression loss, unless the list of dropped rows that a
correction brings lies beside them: then those rows are left out and the rest is trusted.
"""

import re
from pathlib import Path

from datasets import Features

from geode.data.readers.common import (
    CONVERSATIONS,
    MAX_FRAMES,
    TEXT,
    medium_of,
    names_its_row,
    optional_text,
    scene_of,
    stem_of,
)
from geode.data.schemas import Record, conversation_fields
from geode.modeling_geode.checked_files_geode import read_json


NAME = "VLM-3R-DATA"
REPO_ID = "Journey9ni/VLM-3R-DATA"
LICENSE = None
ERRATUM_FILE = "vstibench_train/erratum_dropped_items.json"
DATA_FILES = ("vsibench_train/*.json", "vstibench_train/qa_*.json", ERRATUM_FILE)
OTHER_FILES = (ERRATUM_FILE,)  # belongs to the dataset, and has no rows
FEATURES = Features(
    {
        **dict.fromkeys(("id", "data_source", "scene_name", "question_type", "video"), TEXT),
        "conversations": CONVERSATIONS,
    }
)
SUSPECT_FAMILIES = frozenset(
    (
        "camera_displacement",
        "camera_obj_abs_dist",
        "camera_obj_rel_dist",
        "camera_obj_rel_dist_v1",
        "camera_obj_rel_dist_v2",
        "camera_obj_rel_dist_v3",
    )
)
TEMPORAL_FRAMES = 32  # what all temporal questions count on
_TEMPORAL_FOLDER = "vstibench_train/"
_NAMED_FRAME = r"\bframes?\s+(?:#|no\.?\s|numbers?\s|index\s)?\s*(\d+)\b"
# The total stands right behind a named frame, or behind the second of two: elsewhere "of" counts other things.
_FRAME_OF = re.compile(
    rf"{_NAMED_FRAME}(?:\s*(?:and|to|-)\s*(\d+))?\s*\(?of\s+(?:the\s+)?(\d+)\b", flags=re.IGNORECASE
)
_FRAME = re.compile(_NAMED_FRAME, flags=re.IGNORECASE)
_LONGEST_NUMBER = len(str(MAX_FRAMES))


def row_options(root: Path) -> dict:
    """
    Return what [`record_from_row`] needs to know about the dataset's folder.

    Args:
        root (`Path`): The folder. The form of its erratum is not published: a list of ids, a list of objects with an `id`,
            and an object whose values are such lists are understood.

    Returns:
        `dict`: `dropped_ids`: the ids that the erratum names; None where there is none.

    Raises:
        ValueError: If the erratum has another form.
    """
    path = root / ERRATUM_FILE
    if not path.is_file():
        return {"dropped_ids": None}
    content = read_json(path)
    lists = list(content.values()) if isinstance(content, dict) else [content]
    if not all(isinstance(entries, list) for entries in lists):
        raise ValueError(
            f"{path} must be a list of ids or objects with `id`, or an object of such lists, got {content!r:.200}."
        )
    ids = [entry.get("id") if isinstance(entry, dict) else entry for entries in lists for entry in entries]
    wrong = [entry for entry in ids if isinstance(entry, bool) or not isinstance(entry, str | int)]
    if wrong:
        raise ValueError(f"{path} must name rows by ids, as text or whole numbers, got {wrong[0]!r:.200}.")
    return {"dropped_ids": frozenset(str(entry) for entry in ids)}


@names_its_row
def record_from_row(row: dict, *, file: str, index: int, dropped_ids: frozenset[str] | None = None) -> Record | None:
    """
    Read a row: a number in the unit that its question names, or a letter.

    Args:
        row (`dict`): `video` and `conversations`; `id`, `question_type` and `scene_name` if there are any.
        file (`str`): The file's path below the dataset's root. In `vstibench_train/` its name is the type of rows without.
        index (`int`): The row's number in the file.
        dropped_ids (`frozenset[str]`, *optional*): The ids that a correction leaves out. None: the rows are not corrected.

    Returns:
        [`Record`], *optional*: The record, None if it is left out. `num_frames` is set where the question counts frames.

    Raises:
        ValueError: If the row is malformed.
    """
    is_temporal = f"/{file}".rpartition("/")[0].endswith("/" + _TEMPORAL_FOLDER.strip("/"))
    family = stem_of(file).removeprefix("qa_") if is_temporal else None
    if is_temporal and dropped_ids is not None and str(row.get("id")) in dropped_ids:
        return None
    question_type = optional_text(row, "question_type") or family
    media_type, media = medium_of(row)
    answer = conversation_fields(row.get("conversations"), question_type)
    is_suspect = dropped_ids is None and not SUSPECT_FAMILIES.isdisjoint((question_type, family))
    return Record(
        uid=f"{NAME}:{file}:{index}",
        source=NAME,
        media_type=media_type,
        media=media,
        question_type=question_type,
        subset=file.rpartition("/")[0] or None,
        scene=optional_text(row, "scene_name") or scene_of(media),
        num_frames=counted_frames(answer["prompt"], TEMPORAL_FRAMES if is_temporal else None),
        label_suspect=is_suspect,
        **answer,
    )


def counted_frames(prompt: str, default: int | None = None) -> int | None:
    """
    Return how many frames a question counts on.

    Args:
        prompt (`str`): The question.
        default (`int`, *optional*): For one that names a frame and no number of frames.

    Returns:
        `int`, *optional*: The N of "frame 3 of N", if it is one: at most 10,000, and no frame before it is beyond it. None for
        a question that names no frame.

    Example:
    ```python
    >>> counted_frames("How far does the camera move from frame 3 to frame 17 of 32?")
    32

    ```
    """
    for match in _FRAME_OF.finditer(prompt):
        numbers = [number for number in match.groups() if number is not None]
        if max(map(len, numbers)) <= _LONGEST_NUMBER:
            *named, total = map(int, numbers)
            if 1 <= total <= MAX_FRAMES and max(named) <= total:
                return total
    return default if default is not None and _FRAME.search(prompt) else None


__all__ = ["DATA_FILES", "FEATURES", "LICENSE", "NAME", "OTHER_FILES", "REPO_ID", "record_from_row", "row_options"]
