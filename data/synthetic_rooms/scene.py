# SPDX-License-Identifier: Apache-2.0
"""
A scene's record: what is where, and what each frame shows, as plain values that JSON can hold.

Convention:
    - Scene frame: metres, +z up, origin on the floor below the first camera, +y along its heading. Boxes are canonical
      `(cx, cy, cz, dx, dy, dz, yaw)`, see `boxes.py`.
    - Answers are computed from the record, so whoever has the record can compute them again.
"""

import numpy as np

from geode.data.synthetic_rooms.boxes import transform_box
from geode.data.synthetic_rooms.rooms import Room


GENERATOR_VERSION = 1
DATASET = "synthetic_rooms"
MIN_VISIBLE_SHARE = 0.004  # of a frame's pixels: from here on an object counts as seen
DECIMALS = 6


def _rounded(values) -> list[float]:
    return [round(float(value), DECIMALS) + 0.0 for value in np.asarray(values).ravel()]


def describe_scene(room: Room, walk, *, fps: float = 8.0) -> dict:
    """
    Write down a room as its walk sees it.

    Args:
        room (`Room`): The room.
        walk (`Walk`): Its film.
        fps (`float`, defaults to 8): Frames per second of the video.

    Returns:
        `dict`: The record. `objects` have `id`, `category`, `box`, `color_rgb`, `pixel_shares` (per frame, the share
        of pixels that shows the object) and `visible_frames`; `room` has `type`, `size_m`, `area_m2` and the
        `floor_polygon`; `camera` has the video's size and intrinsics.
    """
    shares = walk.visible_shares(len(room.objects))
    objects = []
    for item in room.objects:
        seen = shares[:, item.instance_id]
        objects.append(
            {
                "id": item.instance_id,
                "category": item.category,
                "box": _rounded(transform_box(walk.scene_from_room, item.box)),
                "color_rgb": [round(255 * value) for value in item.color],
                "visible_frames": np.flatnonzero(seen >= MIN_VISIBLE_SHARE).tolist(),
                "pixel_shares": [round(float(value), 5) for value in seen],
            }
        )
    half_x, half_y = 0.5 * room.size[0], 0.5 * room.size[1]
    corners = np.array(
        [[-half_x, -half_y, 0, 1], [half_x, -half_y, 0, 1], [half_x, half_y, 0, 1], [-half_x, half_y, 0, 1]]
    )
    polygon = (corners @ walk.scene_from_room.T)[:, :2]
    num_frames, height, width = walk.depth.shape
    return {
        "generator_version": GENERATOR_VERSION,
        "dataset": DATASET,
        "scene_name": f"room_{room.seed:06d}",
        "seed": room.seed,
        "room": {
            "type": room.room_type,
            "size_m": _rounded(room.size),
            "area_m2": round(room.area, DECIMALS),
            "floor_polygon": [_rounded(corner) for corner in polygon],
        },
        "camera": {
            "num_frames": num_frames,
            "fps": fps,
            "image_size": [height, width],
            "intrinsics": [_rounded(row) for row in walk.intrinsics],
        },
        "objects": objects,
    }
