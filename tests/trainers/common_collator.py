# SPDX-License-Identifier: Apache-2.0
"""Two scenes and a picture on disk, records about them, and a small random model with every option that packing could break."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import set_seed

import geode
from geode.data.schemas import Record
from geode.data.synthetic_rooms.questions import prompt_of
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.scene_geode import SceneGeometry
from tests import common_tiny
from tests.common_tiny import make_config, read_rows


GEOMETRY = "geometry/{stem}"
# A quarter turn about +z, then a shift.
SCENE_FROM_DATASET = [[0.0, -1.0, 0.0, 10.0], [1.0, 0.0, 0.0, 20.0], [0.0, 0.0, 1.0, 30.0], [0.0, 0.0, 0.0, 1.0]]


def make_media(root: Path) -> Path:
    """`rooms/one.mp4` of four frames, `rooms/two` of three, `pictures/a.png`, and the geometry of the rooms."""
    scene = geode.embedded_scene()
    for folder in ("rooms/two", "pictures", "geometry"):
        (root / folder).mkdir(parents=True)
    shutil.copy(scene / "room.mp4", root / "rooms" / "one.mp4")
    shutil.copytree(scene / "geometry", root / "geometry" / "one")
    geometry = SceneGeometry.load(scene / "geometry")
    turned = dataclasses.replace(
        geometry,
        points=geometry.points[::3],
        colors=None if geometry.colors is None else geometry.colors[::3],
        normals=None if geometry.normals is None else geometry.normals[::3],
        scene_from_dataset=torch.tensor(SCENE_FROM_DATASET, dtype=geometry.scene_from_dataset.dtype),
    )
    turned.save(root / "geometry" / "two")
    generator = np.random.default_rng(0)
    pictures = [*(f"rooms/two/{index}.png" for index in range(3)), "pictures/a.png"]
    for name in pictures:
        Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(root / name)
    return root


def make_processor():
    """A small processor, as tests may change it."""
    return common_tiny.make_processor()


def record_of(row: dict, *, media: str = "rooms/one.mp4", **changes) -> Record:
    """A line of `questions.jsonl` as a record."""
    kind = "box" if row["box"] else "number" if row["value_si"] is not None else "choice"
    fields = {name: row[name] for name in ("value", "unit", "value_si", "box", "question_type")}
    record = Record(
        uid=f"{media}:{row['id']}:{row['question_type']}",
        source="rooms",
        media_type="video",
        media=media,
        prompt=prompt_of(row),
        kind=kind,
        answer_text=row["ground_truth"],
        **fields,
    )
    return dataclasses.replace(record, **changes)


def make_records(media: str = "rooms/one.mp4", *, count: int = 6) -> list[Record]:
    """Questions of every kind, numbers, boxes and choices in turn."""
    rows = read_rows(geode.embedded_scene())
    kinds = [
        [row for row in rows if row["box"]],
        [row for row in rows if row["value_si"] is not None and row["options"] is None],
        [row for row in rows if row["box"] is None and row["value_si"] is None],
    ]
    return [record_of(kinds[number % 3][number // 3], media=media) for number in range(count)]


def text_record(prompt: str = "What is it?", answer: str = "A room.", **changes) -> Record:
    """A question whose answer is text."""
    settings = {
        "uid": "text:0",
        "source": "rooms",
        "media_type": "video",
        "media": "rooms/one.mp4",
        "prompt": prompt,
        "kind": "text",
        "answer_text": answer,
    }
    return Record(**{**settings, **changes})


def make_model(processor, *, hidden_position: str = "token", value_feedback: bool = True, attention: str = "sdpa"):
    """A random model of the tiny checkpoint's size, with feature injection that is open."""
    set_seed(0)
    config = make_config(processor)
    config.drh_config.hidden_position = hidden_position
    config.drh_config.value_feedback = value_feedback
    config.drm_config.inject_features = True
    config._attn_implementation = attention
    config.text_config._attn_implementation = attention
    model = GeodeForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.feature_injection.gate)
    return model
