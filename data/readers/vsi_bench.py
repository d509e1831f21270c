# SPDX-License-Identifier: Apache-2.0
"""
VSI-Bench: the benchmark's own questions. They are for evaluation, never for training.

Source: https://huggingface.co/datasets/nyu-visionx/VSI-Bench, and its task file in vision-x-nyu/thinking-in-space, whose
prompts these are.
"""

from datasets import Features, List, Value

from geode.data.readers.common import TEXT, names_its_row, text_of
from geode.data.schemas import Record, answer_fields, benchmark_prompt, media_path


NAME = "VSI-Bench"
REPO_ID = "nyu-visionx/VSI-Bench"
LICENSE = "apache-2.0"
DATA_FILES = ("test*.parquet", "**/test*.parquet", "test.jsonl")
FEATURES = Features(
    {
        "id": Value("int64"),
        **dict.fromkeys(("dataset", "scene_name", "question_type", "question", "ground_truth"), TEXT),
        "options": List(TEXT),
        "pruned": Value("bool"),
    }
)
NUMBER_TYPES = ("object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation")
CHOICE_TYPES = (
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
    "object_rel_distance",
    "route_planning",
    "obj_appearance_order",
)


@names_its_row
def record_from_row(row: dict, *, file: str, index: int) -> Record:
    """
    Read a row with the benchmark's prompt around its question.

    Args:
        row (`dict`): The benchmark's columns.
        file (`str`): Path or split, for errors.
        index (`int`): The row's number, for errors and for rows without `id`.

    Returns:
        [`Record`]: The record; `subset` is `"pruned"` for what the debiased version leaves out.

    Raises:
        ValueError: If the row is malformed or its type is none of the ten.
    """
    question_type, scene = text_of(row, "question_type"), text_of(row, "scene_name")
    kind = {**dict.fromkeys(NUMBER_TYPES, "number"), **dict.fromkeys(CHOICE_TYPES, "choice")}.get(question_type)
    if kind is None:
        raise ValueError(f"`question_type` must be one of {NUMBER_TYPES + CHOICE_TYPES}, got {question_type!r}.")
    options = row.get("options")
    if kind == "choice" and not (options and all(isinstance(option, str) for option in options)):
        raise ValueError(f"`options` of {question_type} must be a list of texts, got {options!r:.200}.")
    prompt = benchmark_prompt(text_of(row, "question"), options if kind == "choice" else None)
    answer = answer_fields(text_of(row, "ground_truth"), prompt, question_type)
    if answer["kind"] != kind:
        raise ValueError(f"`ground_truth` of {question_type} must be a {kind}, got {answer['answer_text']!r:.200}.")
    return Record(
        uid=f"{NAME}:{row['id']}" if row.get("id") is not None else f"{NAME}:{file}:{index}",
        source=NAME,
        media_type="video",
        media=media_path(f"{text_of(row, 'dataset')}/{scene}.mp4"),
        prompt=prompt,
        question_type=question_type,
        subset="pruned" if row.get("pruned") else None,
        scene=scene,
        **answer,
    )


__all__ = ["CHOICE_TYPES", "DATA_FILES", "FEATURES", "LICENSE", "NAME", "NUMBER_TYPES", "REPO_ID", "record_from_row"]
