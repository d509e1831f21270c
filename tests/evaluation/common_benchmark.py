# SPDX-License-Identifier: Apache-2.0
"""A small benchmark in VSI-Bench's format: the embedded room and two videos of noise, with some questions about each."""

import json
import shutil
from pathlib import Path

import geode
from tests.common_tiny import read_rows
from tests.trainers.common_precompute import make_geometry, make_video


NUM_SCENES = 3
QUESTIONS = (
    ("object_abs_distance", "What is the distance between the bed and the lamp (in meters)?", None),
    ("object_counting", "How many chair(s) are in this room?", None),
    (
        "object_size_estimation",
        "What is the length of the longest dimension of the bed, measured in centimeters?",
        None,
    ),
    ("route_planning", "Where do you turn?", ["A. Turn Left", "B. Turn Right", "C. Turn Back"]),
    ("object_rel_distance", "Which is the closest to the bed?", ["A. lamp", "B. chair", "C. sofa", "D. table"]),
)


def make_rows() -> list[dict]:
    """Questions, the scenes in turn, as no reader may rely on their order. Those about the first room are the embedded ones."""
    rows, embedded = [], {row["question_type"]: row for row in read_rows(geode.embedded_scene())}
    for kind, (question_type, asked, choices) in enumerate(QUESTIONS):
        for scene in range(NUM_SCENES):
            question, options = asked, choices
            truth = "ABC"[(kind + scene) % 3] if options else str(round(1.5 + kind + scene, 1))
            if question_type == "object_counting":
                truth = str(2 + scene)
            if scene == 0 and question_type in embedded:
                own = embedded[question_type]
                question, options, truth = own["question"], own["options"], own["ground_truth"]
            rows.append(
                {
                    "id": len(rows),
                    "dataset": "rooms",
                    "scene_name": f"room_{scene}",
                    "question_type": question_type,
                    "question": question,
                    "ground_truth": truth,
                    "options": options,
                    "pruned": kind == 0,
                }
            )
    return rows


def make_benchmark(folder: Path) -> Path:
    """Write the benchmark, its videos and their geometry."""
    (folder / "rooms").mkdir(parents=True)
    shutil.copy(geode.embedded_scene() / "room.mp4", folder / "rooms/room_0.mp4")
    shutil.copytree(geode.embedded_scene() / "geometry", folder / "geometry/room_0")
    for scene in range(1, NUM_SCENES):
        make_video(folder / f"rooms/room_{scene}.mp4", seed=scene)
        make_geometry(scene).save(folder / f"geometry/room_{scene}")
    lines = [json.dumps(row) + "\n" for row in make_rows()]
    (folder / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
