# SPDX-License-Identifier: Apache-2.0
"""
Upright boxes `(cx, cy, cz, dx, dy, dz, yaw)`: corners, canonical form and the exact distance between two of them.

Convention:
    - Metres and radians, +z up, `yaw` about +z, `dx` along the box's own x axis.
    - Canonical boxes have `dx >= dy` and `yaw` in `(-pi/2, pi/2]`; those with a square footprint have it in
      `(-pi/4, pi/4]`. So one solid has one description.
"""

import math

import numpy as np


SQUARE_TOLERANCE_M = 1e-6


def rotation_about_z(yaw: float) -> np.ndarray:
    """
    Return the 3x3 rotation by `yaw` radians about +z.

    Args:
        yaw (`float`): Angle in radians, counterclockwise seen from above.

    Returns:
        `np.ndarray` of shape `(3, 3)`: The rotation, float64.
    """
    cosine, sine = math.cos(yaw), math.sin(yaw)
    return np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def canonical_box(box: np.ndarray) -> np.ndarray:
    """
    Return the one description of a solid among its equivalent ones.

    Args:
        box (`np.ndarray` of shape `(7,)`): Any box.

    Returns:
        `np.ndarray` of shape `(7,)`: The same solid with `dx >= dy` and `yaw` in `(-pi/2, pi/2]`.

    Example:
    ```python
    >>> canonical_box(np.array([0.0, 0.0, 0.5, 1.0, 2.0, 1.0, 0.0])).round(3).tolist()
    [0.0, 0.0, 0.5, 2.0, 1.0, 1.0, 1.571]

    ```
    """
    cx, cy, cz, dx, dy, dz, yaw = (float(value) for value in box)
    period = math.pi
    if abs(dx - dy) <= SQUARE_TOLERANCE_M:
        period = math.pi / 2
    elif dx < dy:
        dx, dy, yaw = dy, dx, yaw + math.pi / 2
    yaw -= period * math.ceil(yaw / period - 0.5)  # into (-period/2, period/2]
    return np.array([cx, cy, cz, dx, dy, dz, yaw])


def transform_box(target_from_source: np.ndarray, box: np.ndarray) -> np.ndarray:
    """
    Express a box in another upright frame.

    Args:
        target_from_source (`np.ndarray` of shape `(4, 4)`): Rigid transform whose rotation is about +z.
        box (`np.ndarray` of shape `(7,)`): Box in the source frame.

    Returns:
        `np.ndarray` of shape `(7,)`: The canonical box in the target frame.
    """
    center = target_from_source[:3, :3] @ np.asarray(box[:3], dtype=np.float64) + target_from_source[:3, 3]
    turn = math.atan2(target_from_source[1, 0], target_from_source[0, 0])
    return canonical_box(np.concatenate([center, box[3:6], [box[6] + turn]]))


def footprint(box: np.ndarray) -> np.ndarray:
    """
    Return the four floor-plan corners of a box, counterclockwise.

    Args:
        box (`np.ndarray` of shape `(7,)`): The box.

    Returns:
        `np.ndarray` of shape `(4, 2)`: Corners `(x, y)`.
    """
    half = 0.5 * np.array([[-box[3], -box[4]], [box[3], -box[4]], [box[3], box[4]], [-box[3], box[4]]])
    return half @ rotation_about_z(box[6])[:2, :2].T + np.asarray(box[:2])


def points_in_box(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    """
    Express points in a box's own centred axes.

    Args:
        points (`np.ndarray` of shape `(num_points, 3)`): Points in the frame of `box`.
        box (`np.ndarray` of shape `(7,)`): The box.

    Returns:
        `np.ndarray` of shape `(num_points, 3)`: Coordinates; a point is inside if each is at most half a size.
    """
    return (points - np.asarray(box[:3])) @ rotation_about_z(box[6])


def _point_segment_distances(points: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the distance of every point to every segment, shape `(num_points, num_segments)`."""
    along = ends - starts
    offset = points[:, None, :] - starts[None, :, :]
    share = np.clip((offset * along).sum(-1) / np.maximum((along * along).sum(-1), 1e-300), 0.0, 1.0)
    return np.linalg.norm(offset - share[..., None] * along, axis=-1)


def is_separated(first: np.ndarray, second: np.ndarray) -> bool:
    """
    Tell whether two rectangles are apart, by the separating axis theorem over their four edge normals.

    Args:
        first (`np.ndarray` of shape `(4, 2)`): Corners in order.
        second (`np.ndarray` of shape `(4, 2)`): Corners in order.

    Returns:
        `bool`: `False` where they touch or overlap.
    """
    for polygon in (first, second):
        for edge in (polygon[1] - polygon[0], polygon[2] - polygon[1]):
            normal = np.array([-edge[1], edge[0]])
            a, b = first @ normal, second @ normal
            if a.max() < b.min() or b.max() < a.min():
                return True
    return False


def plan_distance(first: np.ndarray, second: np.ndarray) -> float:
    """
    Return the distance between two rectangles in the floor plan, 0 where they touch or overlap.

    Two convex polygons that are apart have a closest pair in which one member is a corner, so the corners against
    the edges, both ways, give the exact value.

    Args:
        first (`np.ndarray` of shape `(4, 2)`): Corners in order.
        second (`np.ndarray` of shape `(4, 2)`): Corners in order.

    Returns:
        `float`: Distance in metres.
    """
    if not is_separated(first, second):
        return 0.0
    to_second = _point_segment_distances(first, second, np.roll(second, -1, axis=0)).min()
    to_first = _point_segment_distances(second, first, np.roll(first, -1, axis=0)).min()
    return float(min(to_second, to_first))


def box_distance(first: np.ndarray, second: np.ndarray) -> float:
    """
    Return the exact distance between the closest points of two upright boxes, 0 where they touch or overlap.

    An upright box is the product of a rectangle and an interval, so the squared distance is the sum of the squared
    plan distance and the squared vertical gap.

    Args:
        first (`np.ndarray` of shape `(7,)`): A box.
        second (`np.ndarray` of shape `(7,)`): A box in the same frame.

    Returns:
        `float`: Distance in metres.

    Example:
    ```python
    >>> a = np.array([0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.0])
    >>> b = np.array([4.0, 0.0, 5.5, 1.0, 1.0, 1.0, 0.0])
    >>> box_distance(a, b)
    5.0

    ```
    """
    gap = max(0.0, abs(float(first[2] - second[2])) - 0.5 * float(first[5] + second[5]))
    return math.hypot(plan_distance(footprint(first), footprint(second)), gap)
