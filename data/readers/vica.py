# SPDX-License-Identifier: Apache-2.0
"""
ViCA-322K: 322,003 questions about the training scans of ARKitScenes, ScanNet and ScanNet++.

Source: https://huggingface.co/datasets/nkkbr/ViCA-322K, JSON lists at `{dataset}/{base,complex}/{task}.json`. Rows have
neither id nor type, so the path says both. The licence of the rows is not stated where we could read it.
"""

from pathlib import PurePosixPath

from datasets import Features

from geode.data.readers.common import CONVERSATIONS, TEXT, medium_of, names_its_row, scene_of
from geode.data.schemas import Record, conversation_fields, paired_turns, text_fields


NAME = "ViCA-322K"
REPO_ID = "nkkbr/ViCA-322K"
LICENSE = None
DATA_FILES = ("*/base/*.json", "*/complex/*.json")
FEATURES = Features({"video": TEXT, "conversations": CONVERSATIONS})
SUBSETS = ("base", "complex")
TRIANGLES = "triangular_positional_relationship"  # a sentence with three lengths and three angles


@names_its_row
def record_from_row(row: dict, *, file: str, index: int) -> Record:
    """
    Read a row: a number or letter in `base`, words in `complex` and about triangles.

    Args:
        row (`dict`): `video` and `conversations`, of several turns in `complex/conversation.json`.
        file (`str`): The file's path below the dataset's root; its last two folders and its name are read.
        index (`int`): The row's number in the file.

    Returns:
        [`Record`]: The record; `subset` is `"base"` or `"complex"`.

    Raises:
        ValueError: If the row is malformed, or the path has no `base` or `complex`.
    """
    path = PurePosixPath(file)
    subset, task = path.parent.name, path.stem
    if subset not in SUBSETS:
        raise ValueError(f"Files must be at `{{dataset}}/{{base,complex}}/{{task}}.json`, got {file!r}.")
    media_type, media = medium_of(row)
    if subset == "complex" or task == TRIANGLES:
        answer = text_fields(paired_turns(row.get("conversations")))
    else:
        answer = conversation_fields(row.get("conversations"), task)
    return Record(
        uid=f"{NAME}:{file}:{index}",
        source=NAME,
        media_type=media_type,
        media=media,
        question_type=task,
        subset=subset,
        scene=scene_of(media),
        **answer,
    )


__all__ = ["DATA_FILES", "FEATURES", "LICENSE", "NAME", "REPO_ID", "record_from_row"]
