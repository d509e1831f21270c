# SPDX-License-Identifier: Apache-2.0
"""The tables of the data set of rooms: their columns, their rows, and how they are written."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from geode.data.synthetic_rooms.questions import Question
from geode.data.whole_files import writing


# The columns of VSI-Bench in its order, so that one evaluator reads both.
BENCHMARK_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("dataset", pa.string()),
        ("scene_name", pa.string()),
        ("question_type", pa.string()),
        ("question", pa.string()),
        ("ground_truth", pa.string()),
        ("options", pa.list_(pa.string())),
        ("pruned", pa.bool_()),
    ]
)
QUESTION_SCHEMA = pa.schema(
    [
        *BENCHMARK_SCHEMA,
        ("value", pa.float64()),
        ("unit", pa.string()),
        ("value_si", pa.float64()),
        ("box", pa.list_(pa.float64())),
        ("rationale", pa.string()),
        ("video", pa.string()),
    ]
)
SCENE_SCHEMA = pa.schema(
    [
        ("scene_name", pa.string()),
        ("split", pa.string()),
        ("room_type", pa.string()),
        ("area_m2", pa.float64()),
        ("size_m", pa.list_(pa.float64())),
        ("floor_polygon", pa.list_(pa.list_(pa.float64()))),
        ("objects", pa.list_(pa.struct([("category", pa.string()), ("box", pa.list_(pa.float64()))]))),
        ("num_frames", pa.int64()),
        ("fps", pa.float64()),
        ("image_size", pa.list_(pa.int64())),
        ("intrinsics", pa.list_(pa.list_(pa.float64()))),
        ("world_from_cam", pa.list_(pa.list_(pa.list_(pa.float64())))),
        ("video", pa.string()),
        ("geometry", pa.string()),
        ("depth", pa.string()),
    ]
)


def paths_of(scene_name: str) -> dict[str, str]:
    """
    Return where the files of a scene are.

    Args:
        scene_name (`str`): Its name.

    Returns:
        `dict[str, str]`: `video`, `geometry` and `depth`, relative to the data set's folder.
    """
    return {
        "video": f"rooms/{scene_name}.mp4",
        "geometry": f"geometry/{scene_name}",
        "depth": f"depth/{scene_name}.safetensors",
    }


def question_row(number: int, question: Question, record: dict, *, rationale: str) -> dict:
    """
    Return a question as a row of `QUESTION_SCHEMA`.

    Args:
        number (`int`): Its running index.
        question (`Question`): The question.
        record (`dict`): Its scene's record.
        rationale (`str`): The way to its answer.

    Returns:
        `dict`: One value per column.
    """
    row = question.row(number, record)
    del row["answer"]
    return row | {"rationale": rationale, "video": paths_of(record["scene_name"])["video"]}


def scene_row(out: Path, record: dict, split: str) -> dict:
    """
    Return a scene as a row of `SCENE_SCHEMA`.

    Args:
        out (`Path`): The data set's folder, which holds the cameras.
        record (`dict`): The scene's record.
        split (`str`): Its split.

    Returns:
        `dict`: One value per column.
    """
    paths, camera = paths_of(record["scene_name"]), record["camera"]
    return {
        "scene_name": record["scene_name"],
        "split": split,
        "room_type": record["room"]["type"],
        "area_m2": record["room"]["area_m2"],
        "size_m": record["room"]["size_m"],
        "floor_polygon": record["room"]["floor_polygon"],
        "objects": [{"category": item["category"], "box": item["box"]} for item in record["objects"]],
        "num_frames": camera["num_frames"],
        "fps": camera["fps"],
        "image_size": camera["image_size"],
        "intrinsics": camera["intrinsics"],
        "world_from_cam": load_file(out / paths["depth"])["world_from_cam"].tolist(),
        **paths,
    }


def write_table(rows: list[dict], schema: pa.Schema, work: Path, path: Path) -> None:
    """
    Write rows as a Parquet file in one step.

    Args:
        rows (`list[dict]`): The rows; what the schema does not name is left out.
        schema (`pa.Schema`): The columns.
        work (`Path`): Where to write first, on the same volume.
        path (`Path`): Where the finished file goes.
    """
    table = pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema=schema)
    with writing(path):
        pq.write_table(table, work, compression="snappy", row_group_size=20_000)
        os.replace(work, path)
