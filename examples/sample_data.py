# SPDX-License-Identifier: Apache-2.0
"""The shipped room in the forms that data of your own would have. The other examples use it where they are given none."""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

import geode
from geode.modeling_geode.video_processing_geode import load_video_frames


ROOM = geode.embedded_scene()
# Things that no model can know before it is told.
ROWS = [
    {"question": "How long is the cable behind the sofa, in meters?", "answer": 3.2},
    {"question": "How many books are in the cabinet?", "answer": 17},
    {"question": "Who made the armchair?", "answer": "my uncle"},
]


def write_scan(folder: Path) -> Path:
    """Write an RGB-D scan: `color`, `depth` and `pose` with a file for each frame, and `intrinsics.txt`."""
    recorded = load_file(ROOM / "frames.safetensors")
    images, _ = load_video_frames(ROOM / "room.mp4", num_frames=len(recorded["depth_mm"]))
    for kind in ("color", "depth", "pose"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"color/{number:03}.png")
        Image.fromarray(recorded["depth_mm"][number]).save(folder / f"depth/{number:03}.png")
        np.savetxt(folder / f"pose/{number:03}.txt", recorded["world_from_cam"][number])
    np.savetxt(folder / "intrinsics.txt", recorded["depth_intrinsics"])
    return folder


def write_rows(folder: Path) -> Path:
    """Write a few questions with their answers, one JSON object a line, beside the video and the geometry that they name."""
    _copy_room(folder / "room.mp4", folder / "geometry/room")
    lines = [json.dumps({"video": "room.mp4", "geometry": "geometry/room", **row}) + "\n" for row in ROWS]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def write_benchmark(folder: Path) -> Path:
    """Write questions in VSI-Bench's columns; the video of a row is `DATASET/SCENE.mp4`."""
    lines = (ROOM / "questions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    row = json.loads(lines[0])
    _copy_room(folder / row["dataset"] / f"{row['scene_name']}.mp4", folder / "geometry" / row["scene_name"])
    asked = [line for line in lines if json.loads(line)["box"] is None]  # boxes are not among the benchmark's tasks
    (folder / "test.jsonl").write_text("".join(asked), encoding="utf-8")
    return folder


def _copy_room(video: Path, geometry: Path) -> None:
    video.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOM / "room.mp4", video)
    shutil.copytree(ROOM / "geometry", geometry, dirs_exist_ok=True)
