# SPDX-License-Identifier: Apache-2.0
"""
Camera walks: smooth paths at eye level through the free floor of a room.

Convention:
    - OpenCV cameras (+x right, +y down, +z forward), `world_from_cam` in the frame that its caller names.
    - Scene frame: metres, +z up, origin on the floor below the first camera, +y along its horizontal heading.
    - Pixel `(0, 0)` is the centre of the top-left pixel.
"""

import math

import numpy as np

from geode.data.synthetic_rooms.boxes import rotation_about_z
from geode.data.synthetic_rooms.rooms import Room


def camera_rotation(heading: float, pitch_down: float) -> np.ndarray:
    """
    Return the rotation of an upright camera.

    Args:
        heading (`float`): Horizontal viewing direction, radians from +x towards +y.
        pitch_down (`float`): How far the camera looks below the horizon, radians.

    Returns:
        `np.ndarray` of shape `(3, 3)`: Columns are the camera's right, down and forward axes.
    """
    cosine, sine = math.cos(heading), math.sin(heading)
    forward = np.array([cosine * math.cos(pitch_down), sine * math.cos(pitch_down), -math.sin(pitch_down)])
    right = np.array([sine, -cosine, 0.0])
    return np.stack([right, np.cross(forward, right), forward], axis=1)


def pinhole_intrinsics(image_size: tuple[int, int], fov_deg: float) -> np.ndarray:
    """
    Return the pinhole matrix of a centred camera with square pixels.

    Args:
        image_size (`tuple[int, int]`): `(height, width)` in pixels.
        fov_deg (`float`): Horizontal field of view in degrees.

    Returns:
        `np.ndarray` of shape `(3, 3)`: Intrinsics in pixels.

    Example:
    ```python
    >>> pinhole_intrinsics((240, 320), 90.0)[0].tolist()
    [160.0, 0.0, 159.5]

    ```
    """
    height, width = image_size
    focal = round(0.5 * width / math.tan(0.5 * math.radians(fov_deg)), 9)
    return np.array([[focal, 0.0, 0.5 * (width - 1)], [0.0, focal, 0.5 * (height - 1)], [0.0, 0.0, 1.0]])


def resize_intrinsics(intrinsics: np.ndarray, image_size: tuple[int, int], *, new_size: tuple[int, int]) -> np.ndarray:
    """
    Return the intrinsics of the same camera at another resolution.

    Pixel centres are integers, so the image's left edge is at -0.5 and the principal point moves with it.

    Args:
        intrinsics (`np.ndarray` of shape `(3, 3)`): Pinhole matrix at `image_size`.
        image_size (`tuple[int, int]`): `(height, width)` of `intrinsics`.
        new_size (`tuple[int, int]`): `(height, width)` wanted.

    Returns:
        `np.ndarray` of shape `(3, 3)`: Intrinsics at `new_size`.
    """
    scale_v, scale_u = new_size[0] / image_size[0], new_size[1] / image_size[1]
    scaled = intrinsics.copy()
    scaled[0] *= scale_u
    scaled[1] *= scale_v
    scaled[0, 2] = (intrinsics[0, 2] + 0.5) * scale_u - 0.5
    scaled[1, 2] = (intrinsics[1, 2] + 0.5) * scale_v - 0.5
    return scaled


def plan_walk(room: Room, rng: np.random.Generator, *, num_frames: int) -> np.ndarray:
    """
    Draw a path around the room's free floor that looks across it, turning nearly once about itself.

    Args:
        room (`Room`): The room; the path stays in its `walk_area`.
        rng (`np.random.Generator`): Source of the start, the direction and the height.
        num_frames (`int`): Number of cameras.

    Returns:
        `np.ndarray` of shape `(num_frames, 4, 4)`: `room_from_cam`, float64.
    """
    x, y, half_x, half_y = room.walk_area
    start, sense = rng.uniform(-math.pi, math.pi), rng.choice((-1.0, 1.0))
    sweep, height = math.radians(rng.uniform(320.0, 345.0)), rng.uniform(*room.camera_heights_m)
    phase = rng.uniform(0.0, 2.0 * math.pi)
    cameras = np.tile(np.eye(4), (num_frames, 1, 1))
    for index in range(num_frames):
        share = index / max(1, num_frames - 1)
        heading = start + sense * (sweep * share + 0.12 * math.sin(2.0 * math.pi * share + phase))
        pitch_down = math.radians(14.0 + 3.0 * math.sin(4.0 * math.pi * share + phase))
        cameras[index, :3, :3] = camera_rotation(heading, pitch_down)
        cameras[index, :3, 3] = (
            x - half_x * math.cos(heading),
            y - half_y * math.sin(heading),
            height + 0.025 * math.sin(6.0 * math.pi * share),
        )
    return cameras


def scene_from_room(room_from_first_cam: np.ndarray) -> np.ndarray:
    """
    Return the transform into the scene frame of a walk.

    Args:
        room_from_first_cam (`np.ndarray` of shape `(4, 4)`): The first camera.

    Returns:
        `np.ndarray` of shape `(4, 4)`: Rigid transform that puts the floor below the first camera at the origin and
        its horizontal heading along +y.
    """
    forward = room_from_first_cam[:3, 2]
    rotation = rotation_about_z(0.5 * math.pi - math.atan2(forward[1], forward[0]))
    transform = np.eye(4)
    transform[:3, :3] = rotation
    transform[:3, 3] = -rotation @ (room_from_first_cam[:3, 3] * [1.0, 1.0, 0.0])
    return transform
