# SPDX-License-Identifier: Apache-2.0
"""
Spoken Moments in Time: transcribed captions of clips of about three seconds.

Source: http://moments.csail.mit.edu/spoken.html; the data are handed out on request, in a form that is not published. So
the reader takes a manifest that the user writes: JSON Lines `{"video": "clip.mp4", "caption": "someone pours tea"}`.
"""

from datasets import Features

from geode.data.readers.common import TEXT, names_its_row, text_of
from geode.data.schemas import Record, media_path


NAME = "S-MiT"
REPO_ID = None
LICENSE = None
DATA_FILES = ("*.jsonl",)
FEATURES = Features({"video": TEXT, "caption": TEXT})
PROMPT = "Describe the video briefly."


@names_its_row
def record_from_row(row: dict, *, file: str, index: int) -> Record:
    """
    Read a row of the manifest.

    Args:
        row (`dict`): `video` and `caption`.
        file (`str`): The manifest's path below the root.
        index (`int`): The row's number in the file.

    Returns:
        [`Record`]: The record, always text.

    Raises:
        ValueError: If the row is malformed.
    """
    return Record(
        uid=f"{NAME}:{file}:{index}",
        source=NAME,
        media_type="video",
        media=media_path(row.get("video")),
        prompt=PROMPT,
        kind="text",
        answer_text=text_of(row, "caption"),
    )


__all__ = ["DATA_FILES", "FEATURES", "LICENSE", "NAME", "REPO_ID", "record_from_row"]
