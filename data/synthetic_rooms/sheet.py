# SPDX-License-Identifier: Apache-2.0
"""A picture of a data set of rooms: a frame of each of twelve rooms, and one of them from above."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from geode.data.plans import FAINT, INK, PAPER, PATH, font_of
from geode.data.synthetic_rooms.boxes import footprint
from geode.data.synthetic_rooms.draw import TRUTH, read_video


COLUMNS, ROWS = 4, 3
CELL = (320, 240)  # width and height in pixels
GAP, MARGIN, CAPTION = 12, 24, 26
PLAN_WIDTH = 620
FONT_SCALE = 2  # `plans.font_of` gives fonts for pages at twice their final size


def _read_scenes(out: Path) -> list[dict]:
    tables = [pq.read_table(path) for path in sorted((out / "scenes").glob("*.parquet"))]
    scenes = [row for table in tables for row in table.to_pylist()]
    return sorted(scenes, key=lambda scene: scene["scene_name"])


def _choose(scenes: list[dict], count: int) -> list[dict]:
    """Take the types of rooms in turns, each in the order of its scenes."""
    by_type: dict[str, list[dict]] = {}
    for scene in scenes:
        by_type.setdefault(scene["room_type"], []).append(scene)
    turns = [(turn, kind, scene) for kind in sorted(by_type) for turn, scene in enumerate(by_type[kind])]
    return [scene for _, _, scene in sorted(turns, key=lambda item: item[:2])][:count]


def _best_frame(scene: dict) -> int:
    """Return the frame whose camera looks at most objects' centres, near ones counting more."""
    centers = np.array([item["box"][:3] for item in scene["objects"]])
    scores = []
    for pose in np.asarray(scene["world_from_cam"]):
        points_cam = (centers - pose[:3, 3]) @ pose[:3, :3]
        ahead = points_cam[:, 2]
        is_seen = (ahead > 0.5) & (np.abs(points_cam[:, :2]) < 0.7 * ahead[:, None]).all(axis=1)
        scores.append(float((is_seen / np.maximum(ahead, 1.0)).sum()))
    return int(np.argmax(scores))


def _draw_plan(draw: ImageDraw.ImageDraw, scene: dict, region: tuple[float, float, float, float]) -> None:
    """Draw a room's floor, its objects' boxes with their names, and the camera's path into a region of the page."""
    corners = np.asarray(scene["floor_polygon"])
    along = corners[1] - corners[0]
    turn = np.array([[along[0], along[1]], [-along[1], along[0]]]) / np.linalg.norm(along)
    turned = corners @ turn.T
    low, extent = turned.min(axis=0), np.ptp(turned, axis=0)
    scale = min((region[2] - region[0]) / extent[0], (region[3] - region[1]) / extent[1])
    origin = np.array(
        [0.5 * (region[0] + region[2] - scale * extent[0]), 0.5 * (region[1] + region[3] + scale * extent[1])]
    )

    def to_page(points) -> list[tuple[float, float]]:
        page = origin + ((np.atleast_2d(points) @ turn.T) - low) * scale * [1.0, -1.0]
        return [tuple(point) for point in page.tolist()]

    floor = to_page(corners)
    draw.polygon(floor, fill=(255, 255, 255), outline=INK, width=3)
    for item in sorted(scene["objects"], key=lambda item: item["box"][2]):
        draw.polygon(to_page(footprint(np.asarray(item["box"]))), fill=(226, 240, 234), outline=TRUTH, width=2)
    path = to_page(np.asarray(scene["world_from_cam"])[:, :2, 3])
    draw.line([*path], fill=PATH, width=3)
    x, y = path[0]
    draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=PATH)
    for item in scene["objects"]:
        draw.text(to_page(item["box"][:2])[0], item["category"], font=font_of(6.5), fill=INK, anchor="mm")


def draw_contact_sheet(out_folder: str | os.PathLike, png: str | os.PathLike) -> None:
    """
    Draw twelve rooms of a data set, and the first of them from above.

    Args:
        out_folder (`str` or `os.PathLike`): The data set's folder.
        png (`str` or `os.PathLike`): Where to write the picture.
    """
    out = Path(out_folder)
    shown = _choose(_read_scenes(out), COLUMNS * ROWS)
    width = 2 * MARGIN + COLUMNS * CELL[0] + (COLUMNS - 1) * GAP + MARGIN + PLAN_WIDTH
    height = 2 * MARGIN + ROWS * (CELL[1] + CAPTION + GAP) - GAP
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    for number, scene in enumerate(shown):
        row, column = divmod(number, COLUMNS)
        left, top = MARGIN + column * (CELL[0] + GAP), MARGIN + row * (CELL[1] + CAPTION + GAP)
        frame = read_video(out / scene["video"])[_best_frame(scene)]
        image.paste(Image.fromarray(frame).resize(CELL, Image.Resampling.LANCZOS), (left, top))
        text = f"{scene['room_type']}, {scene['area_m2']:.1f} m2, {len(scene['objects'])} objects"
        draw.text((left, top + CELL[1] + 4), text, font=font_of(14 / FONT_SCALE), fill=FAINT, anchor="lt")
    left = width - MARGIN - PLAN_WIDTH
    _draw_plan(draw, shown[0], (left, MARGIN, width - MARGIN, height - MARGIN - CAPTION - GAP))
    text = f"{shown[0]['scene_name']}, the first room, from above: boxes of the objects, path of the camera"
    draw.text((left, height - MARGIN - CAPTION + 4), text, font=font_of(14 / FONT_SCALE), fill=FAINT, anchor="lt")
    image.save(png)
