# SPDX-License-Identifier: Apache-2.0
"""
Furnished rooms of known truth, as `geode.data.synthetic_rooms` makes them: Parquet with VSI-Bench's columns and ours.

Boxes are in the scene frame, which is the dataset's: the rooms' `scene_from_dataset` is the identity.
"""

from datasets import Features, List, Value

from geode.data.readers.common import TEXT, names_its_row, optional_text, text_of
from geode.data.schemas import Record, answer_fields, benchmark_prompt, media_path


NAME = "synthetic_rooms"
REPO_ID = None
LICENSE = "apache-2.0"
DATA_FILES = ("questions/train.parquet",)
FEATURES = Features(
    {
        "id": Value("int64"),
        **dict.fromkeys(("dataset", "scene_name", "question_type", "question", "ground_truth"), TEXT),
        "options": List(TEXT),
        "pruned": Value("bool"),
        "value": Value("float64"),
        "unit": TEXT,
        "value_si": Value("float64"),
        "box": List(Value("float64")),
        "rationale": TEXT,
        "video": TEXT,
    }
)


@names_its_row
def record_from_row(row: dict, *, file: str, index: int) -> Record:
    """
    Read a row; numbers and boxes are taken from their columns, which are more precise than `ground_truth`.

    Args:
        row (`dict`): The columns.
        file (`str`): The file's path below the root.
        index (`int`): The row's number in the file.

    Returns:
        [`Record`]: The record, with the path of the scene's geometry. Questions but those for boxes have the benchmark's
        prompt.

    Raises:
        ValueError: If the row is malformed.
    """
    scene, question_type = text_of(row, "scene_name"), text_of(row, "question_type")
    answer: dict
    question, truth, box = text_of(row, "question"), text_of(row, "ground_truth"), row.get("box")
    if box is not None:
        if not isinstance(box, list) or len(box) != 7 or not all(isinstance(value, int | float) for value in box):
            raise ValueError(f"`box` must have 7 numbers, got {box!r:.200}.")
        answer = {"kind": "box", "answer_text": truth, "box": [float(value) for value in box]}
    else:
        answer = answer_fields(truth, question, question_type)
    if answer["kind"] == "number" and row.get("value") is not None:
        numbers = {name: row.get(name) for name in ("value", "value_si")}
        if not all(isinstance(number, int | float | None) for number in numbers.values()):
            raise ValueError(f"`value` and `value_si` must be numbers, got {numbers!r:.200}.")
        answer.update(numbers, unit=optional_text(row, "unit"))
    return Record(
        uid=f"{NAME}:{file}:{index}",
        source=NAME,
        media_type="video",
        media=media_path(text_of(row, "video")),
        prompt=question if box is not None else benchmark_prompt(question, row.get("options")),
        question_type=question_type,
        rationale=optional_text(row, "rationale"),
        scene=scene,
        geometry=media_path(f"geometry/{scene}"),
        **answer,
    )


__all__ = ["DATA_FILES", "FEATURES", "LICENSE", "NAME", "REPO_ID", "record_from_row"]
