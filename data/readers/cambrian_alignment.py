# SPDX-License-Identifier: Apache-2.0
"""
Cambrian-Alignment: 2,513,164 captions of images.

Source: https://huggingface.co/datasets/nyu-visionx/Cambrian-Alignment, `jsons/alignment_2.5m.jsonl`. The images lie in archives
that the repository's `merge_tars.py` and `extract.py` unpack.
"""

from datasets import Features

from geode.data.readers.common import CONVERSATIONS, TEXT, medium_of, names_its_row
from geode.data.schemas import Record, paired_turns, text_fields


NAME = "Cambrian-Alignment"
REPO_ID = "nyu-visionx/Cambrian-Alignment"
LICENSE = "apache-2.0"
DATA_FILES = ("jsons/alignment_2.5m.jsonl",)
FEATURES = Features({"id": TEXT, "image": TEXT, "video": TEXT, "conversations": CONVERSATIONS})
DEFAULT_PROMPT = "Describe the image briefly."  # for a row that asks nothing


@names_its_row
def record_from_row(row: dict, *, file: str, index: int) -> Record:
    """
    Read a row: a caption, which is text whatever its form.

    Args:
        row (`dict`): `image` (`./sam/1.jpg` is `sam/1.jpg`) and `conversations`.
        file (`str`): The file's path below the dataset's root.
        index (`int`): The row's number in the file.

    Returns:
        [`Record`]: The record; `subset` is the first folder of the path.

    Raises:
        ValueError: If the row is malformed.
    """
    media_type, media = medium_of(row)
    return Record(
        uid=f"{NAME}:{file}:{index}",
        source=NAME,
        media_type=media_type,
        media=media,
        subset=media.partition("/")[0],
        **text_fields(paired_turns(row.get("conversations"), default_question=DEFAULT_PROMPT)),
    )


__all__ = ["DATA_FILES", "FEATURES", "LICENSE", "NAME", "REPO_ID", "record_from_row"]
