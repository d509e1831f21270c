# SPDX-License-Identifier: Apache-2.0
"""
A room as an oracle for scene geometry.

Its walls are planes, and depth, points and normals come from a loop over rays, in a dataset frame that is not centred.
"""

import itertools
import math

import numpy as np

from geode.modeling_geode.scene_geode import SceneGeometry


# Walls in the frame of the dataset: the floor is at z = -0.3 and the sides are 5 x 4.4 x 2.6 metres.
LOW, HIGH = (-1.5, -2.0, -0.3), (3.5, 2.4, 2.3)
CENTERS = ((0.4, 0.2, 1.1), (1.0, -0.3, 1.3), (0.1, 0.6, 0.9))
HEADINGS_DEG, PITCHES_DEG = (20.0, 105.0, -130.0), (-12.0, -20.0, -5.0)
HEIGHT, WIDTH = 18, 26
FX, FY, CX, CY = 15.0, 14.0, 11.7, 9.4
CAMERA_HEIGHT = CENTERS[0][2] - LOW[2]
FINE = 1e-4  # voxels so small that every pixel keeps its own point


def pose_by_hand(center, heading_deg, pitch_deg):
    """Camera at `center` that looks along the heading (from +x towards +y), pitched up, without roll."""
    heading, pitch = math.radians(heading_deg), math.radians(pitch_deg)
    forward = (math.cos(pitch) * math.cos(heading), math.cos(pitch) * math.sin(heading), math.sin(pitch))
    right = (math.sin(heading), -math.cos(heading), 0.0)
    down = tuple(np.cross(forward, right))
    pose = np.eye(4)
    pose[:3, :3] = np.array([right, down, forward]).T
    pose[:3, 3] = center
    return pose


def cast_ray(center, direction):
    """Steps along `direction` to the first wall, and the wall's normal, pointing inwards."""
    best, normal = math.inf, None
    for axis, (walls, sign) in itertools.product(range(3), ((LOW, 1.0), (HIGH, -1.0))):
        if direction[axis] * sign < 0:
            steps = (walls[axis] - center[axis]) / direction[axis]
            if steps < best:
                best, normal = steps, tuple(sign if i == axis else 0.0 for i in range(3))
    return best, normal


class Room:
    """Three frames of the room: depth, wall normals, poses and images, all made by a loop."""

    def __init__(self):
        self.world_from_cam = np.stack(
            [pose_by_hand(*args) for args in zip(CENTERS, HEADINGS_DEG, PITCHES_DEG, strict=True)]
        )
        self.intrinsics = np.broadcast_to(np.array([[FX, 0.0, CX], [0.0, FY, CY], [0.0, 0.0, 1.0]]), (3, 3, 3))
        self.depth = np.zeros((3, HEIGHT, WIDTH))
        self.points, self.normals = np.zeros((2, 3, HEIGHT, WIDTH, 3))
        for frame, v, u in itertools.product(range(3), range(HEIGHT), range(WIDTH)):
            ray = self.world_from_cam[frame, :3, :3] @ np.array([(u - CX) / FX, (v - CY) / FY, 1.0])
            self.depth[frame, v, u], self.normals[frame, v, u] = cast_ray(CENTERS[frame], ray)
            self.points[frame, v, u] = CENTERS[frame] + self.depth[frame, v, u] * ray
        generator = np.random.default_rng(0)
        self.images = generator.integers(0, 256, (3, HEIGHT, WIDTH, 3), dtype=np.uint8)

    def build(self, **changes):
        fields = {name: getattr(self, name) for name in ("depth", "intrinsics", "world_from_cam", "images")}
        return SceneGeometry.from_rgbd(**{**fields, "up": (0, 0, 1), **changes})


def in_order(points, *others):
    """Rows sorted by their first three columns, so that clouds compare as sets."""
    rows = np.concatenate(
        [np.asarray(values, dtype=np.float64).reshape(-1, 3) for values in (points, *others)], axis=1
    )
    return rows[np.lexsort(np.round(rows[:, 2::-1], 4).T)]


def rigid(yaw, pitch, roll, translation):
    a, b, c = (np.array([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]]) for t in (yaw, pitch, roll))
    about_z, about_y, about_x = np.eye(4), np.eye(4), np.eye(4)
    about_z[:2, :2], about_x[1:3, 1:3] = a, c
    about_y[np.ix_((0, 2), (0, 2))] = b
    matrix = about_z @ about_y @ about_x
    matrix[:3, 3] = translation
    return matrix


def scaled_room(room, factor, **changes):
    poses = room.world_from_cam.copy()
    poses[:, :3, 3] *= factor
    return room.build(depth=room.depth * factor, world_from_cam=poses, is_metric=False, **changes)
