# SPDX-License-Identifier: Apache-2.0
"""The card of a data set of rooms, written from its files."""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from geode.data.synthetic_rooms.baselines import best_blind
from geode.data.synthetic_rooms.questions import QUESTION_TYPES


SPLITS = ("train", "validation", "test")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
CHOICE_COLUMNS = ("n", "chance", "majority letter", "majority content", "contents by name")
NUMBER_COLUMNS = (
    "n",
    "most frequent number",
    "median",
    "best constant",
    "best constant by name",
    "best constant by names",
)

HEADER = """---
license: apache-2.0
pretty_name: Furnished rooms of known truth
language:
- en
task_categories:
- visual-question-answering
- video-text-to-text
tags:
- spatial-reasoning
- 3d
- synthetic
size_categories:
- {size}
configs:
- config_name: benchmark
  default: true
  data_files:
  - split: validation
    path: benchmark/validation.parquet
  - split: test
    path: benchmark/test.parquet
- config_name: questions
  data_files:
{questions}
- config_name: scenes
  data_files:
{scenes}
---
"""

BODY = """
# Furnished rooms of known truth

{num_scenes} rooms, each with a video, exact depth, cameras, boxes, a point cloud, and questions in the wording and the
answer formats of VSI-Bench. Everything is drawn from random numbers and ray cast: no scan, no photograph and no language
model took part, and every answer is computed from the geometry.

![Twelve rooms, and one from above](rooms.png)

## Use

```python
from datasets import load_dataset

questions = load_dataset("parquet", data_files={{"test": "benchmark/test.parquet"}}, split="test")
row = questions[0]
video = f"{{row['dataset']}}/{{row['scene_name']}}.mp4"
```

## Contents

| Path | What |
| --- | --- |
| `benchmark/` | questions for measuring, in VSI-Bench's columns (`id`, `dataset`, `scene_name`, `question_type`, `question`, `ground_truth`, `options`, `pruned`) |
| `questions/` | the same and more: `value` in `unit`, `value_si`, `box`, `rationale`, `video`; with the type `object_localization` |
| `scenes/` | one row a room: type, floor, objects with boxes, intrinsics, cameras, paths |
| `rooms/*.mp4` | {num_frames} frames of {width} x {height} pixels at 8 frames per second |
| `geometry/*/` | the point cloud (at most {max_points} points), for `geode.modeling_geode.scene_geode.SceneGeometry.load` |
| `depth/*.safetensors` | depth in millimetres and instance ids at {depth_width} x {depth_height}, cameras; the full record in the header |
| `world.json` | the options that made the files |
| `baselines.json` | the scores of the table below, unrounded |
| `SHA256SUMS` | digests of all files but `world.json` and this one; `sha256sum -c SHA256SUMS` compares them |

All of it takes {megabytes:.0f} MB.

| Question type | {split_names} |
| --- | {split_rule} |
{counts}

No room is in two splits: of ten rooms the second is for validation, the third for testing, the others for training.

For development take the `validation` split, not a part of `train`. Questions are chosen such that answers are balanced over
the whole split, so a part that is held out of `train` has the opposite frequencies of what remains.

## Conventions

Metres, radians and seconds. World frame of each room: right-handed, +z up, the origin on the floor below the first
camera, +y along its heading. Cameras are OpenCV's (+x right, +y down, +z forward), `world_from_cam`; pixel `(0, 0)` is
the centre of the top-left pixel. Depth is z-depth. Boxes are `(cx, cy, cz, dx, dy, dz, yaw)` with full sizes, `dx >= dy`
and yaw about +z. `ground_truth` is in the unit that the question asks for: metres, centimetres, square metres, counts.

## What one scores without looking

Fitted on the training split, scored on the test split, in percent: accuracy for choices, VSI-Bench's mean relative
accuracy (MRA) for numbers. The columns with "by name" read the question's names of categories; the others see the
answers alone. Report scores next to these: only what lies above them was seen.

{tables}

Questions are chosen such that answers are spread evenly, over the split and for each category that a question names. So
the answers' frequencies say nothing about rooms, and types of questions that need rare arrangements are rarer here.

## Limitations

- Rooms are rectangles of 8 to 56 square metres with one door and one window; furniture is built of boxes, tubes and balls in
  24 categories. Pieces are stretched far beyond what shops sell, on purpose: a category's name must not tell its size.
- Sizes are asked mostly of categories that come in all sizes (shelves, plants, pictures, radiators), since of the others the name
  would tell the answer.
- Small objects that the video shows at fewer than some dozen pixels are not asked about. Occlusion can hide one of several
  equal objects from most frames, but each one counted is in plain view in at least one.
- Pictures have no noise, no motion blur and one bounce of light. What is measured here need not hold for real videos.
- The bytes repeat on one machine and with the same versions of the libraries; other encoders may encode differently.

## How it was made

```bash
{command}
```
"""


def _count(path: Path) -> Counter:
    return Counter(pq.read_table(path, columns=["question_type"])["question_type"].to_pylist())


def _table(columns: tuple[str, ...], baselines: dict[str, dict[str, float]]) -> list[str]:
    lines = [f"| Question type | {' | '.join(columns)} | best blind |", f"| --- |{' --- |' * (len(columns) + 1)}"]
    for name, scores in baselines.items():
        if columns[1] in scores:
            values = [f"{scores[column]:.0f}" if column == "n" else f"{scores[column]:.1f}" for column in columns]
            lines.append(f"| `{name}` | {' | '.join(values)} | {best_blind(scores):.1f} |")
    return lines if len(lines) > 2 else []


def write_card(out: Path, options: dict, baselines: dict[str, dict[str, float]]) -> str:
    """
    Write the card of a data set.

    Args:
        out (`Path`): Its folder, complete but for the card.
        options (`dict`): What `world.json` holds.
        baselines (`dict[str, dict[str, float]]`): What `blind_baselines` gave for the train and the test split.

    Returns:
        `str`: The text of `README.md`, with the header that the Hub's viewer reads.
    """
    counts = {split: _count(out / "questions" / f"{split}.parquet") for split in SPLITS}
    rooms = {split: pq.read_metadata(out / "scenes" / f"{split}.parquet").num_rows for split in SPLITS}
    total = sum(sum(count.values()) for count in counts.values())
    lines = [f"| `{name}` | {' | '.join(str(counts[split][name]) for split in SPLITS)} |" for name in QUESTION_TYPES]
    lines.append(f"| rooms | {' | '.join(str(rooms[split]) for split in SPLITS)} |")
    files = {
        folder: "\n".join(f"  - split: {split}\n    path: {folder}/{split}.parquet" for split in SPLITS)
        for folder in ("questions", "scenes")
    }
    tables = [_table(CHOICE_COLUMNS, baselines), _table(NUMBER_COLUMNS, baselines)]
    (height, width), (depth_height, depth_width) = options["image_size"], options["depth_size"]
    command = [
        f"geode data rooms --scenes {options['num_scenes']} --seed {options['seed']} --out rooms",
        f"--image-size {height} {width} --frames {options['num_frames']} --supersampling {options['supersampling']}",
    ]
    files_of = (path for path in out.rglob("*") if path.is_file() and ".work" not in path.parts)
    header = HEADER.format(size=next((name for limit, name in SIZES if total < limit), "n>1M"), **files)
    return header + BODY.format(
        num_scenes=options["num_scenes"],
        num_frames=options["num_frames"],
        height=height,
        width=width,
        depth_height=depth_height,
        depth_width=depth_width,
        max_points=options["max_points"],
        # Without the card itself, which is not there yet and weighs some kilobytes.
        megabytes=sum(path.stat().st_size for path in files_of) / 1e6,
        split_names=" | ".join(SPLITS),
        split_rule=" | ".join("---:" for _ in SPLITS),
        counts="\n".join(lines),
        tables="\n\n".join("\n".join(table) for table in tables if table),
        command=" \\\n    ".join(command),
    )
