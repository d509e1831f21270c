# SPDX-License-Identifier: Apache-2.0
"""
VSI-590K: 590,667 questions about videos and images of rooms, real and simulated, with twelve task types.

Source: https://huggingface.co/datasets/nyu-visionx/VSI-590K, `vsi_590k.jsonl`. The scans below have licences of their own.
"""

from datasets import Features

from geode.data.readers.common import CONVERSATIONS, TEXT, medium_of, names_its_row, optional_text, scene_of
from geode.data.schemas import Record, conversation_fields


NAME = "VSI-590K"
REPO_ID = "nyu-visionx/VSI-590K"
LICENSE = "apache-2.0"
DATA_FILES = ("*.jsonl",)
FEATURES = Features({"id": TEXT, "conversations": CONVERSATIONS, "question_type": TEXT, "video": TEXT, "image": TEXT})


@names_its_row
def record_from_row(row: dict, *, file: str, index: int) -> Record:
    """
    Read a row: a number in the unit that its question names, or a letter.

    The fifth of rows with an `id` have ids of one simulator, which are not taken for names among all datasets.

    Args:
        row (`dict`): `conversations`, `question_type`, and `video` or `image`.
        file (`str`): The file's path below the dataset's root.
        index (`int`): The row's number in the file.

    Returns:
        [`Record`]: The record; `subset` is the first folder of the path, the source of the scene.

    Raises:
        ValueError: If the row is malformed.
    """
    media_type, media = medium_of(row)
    question_type = optional_text(row, "question_type")
    return Record(
        uid=f"{NAME}:{file}:{index}",
        source=NAME,
        media_type=media_type,
        media=media,
        question_type=question_type,
        subset=media.partition("/")[0],
        scene=scene_of(media),
        **conversation_fields(row.get("conversations"), question_type),
    )


__all__ = ["DATA_FILES", "FEATURES", "LICENSE", "NAME", "REPO_ID", "record_from_row"]
