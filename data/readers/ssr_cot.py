# SPDX-License-Identifier: Apache-2.0
"""
SSR-CoT: over a million questions about images, each with a rationale.

Source: https://huggingface.co/datasets/yliu-cs/SSR-CoT, `ssr-cot.jsonl`. The depth images beside the images are not used. The
licence of the rows is not stated where we could read it.
"""

from datasets import Features

from geode.data.readers.common import TEXT, names_its_row, optional_text, text_of
from geode.data.schemas import Record, media_path, strip_media_tokens


NAME = "SSR-CoT"
REPO_ID = "yliu-cs/SSR-CoT"
LICENSE = None
DATA_FILES = ("ssr-cot.jsonl",)
FEATURES = Features(dict.fromkeys(("question", "rationale", "answer", "image_path", "depth_path"), TEXT))


@names_its_row
def record_from_row(row: dict, *, file: str, index: int) -> Record:
    """
    Read a row: the answer is text whatever its form.

    Args:
        row (`dict`): `question`, `answer`, `image_path`, and `rationale` if there is one.
        file (`str`): The file's path below the dataset's root.
        index (`int`): The row's number in the file.

    Returns:
        [`Record`]: The record; `final` is the answer.

    Raises:
        ValueError: If the row is malformed.
    """
    media = media_path(row.get("image_path"))
    prompt, answer = (strip_media_tokens(text_of(row, name)) for name in ("question", "answer"))
    if not prompt or not answer:
        raise ValueError(f"`question` and `answer` must have text, got {prompt!r:.200} and {answer!r:.200}.")
    return Record(
        uid=f"{NAME}:{file}:{index}",
        source=NAME,
        media_type="image",
        media=media,
        prompt=prompt,
        kind="text",
        answer_text=answer,
        rationale=optional_text(row, "rationale"),
        final=answer,
        subset=media.partition("/")[0],
    )


__all__ = ["DATA_FILES", "FEATURES", "LICENSE", "NAME", "REPO_ID", "record_from_row"]
