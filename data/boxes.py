# SPDX-License-Identifier: Apache-2.0
"""
Boxes of other datasets as upright boxes `(cx, cy, cz, dx, dy, dz, yaw)`.

Convention:
    - Metres and radians, +z up. Results are canonical: `dx >= dy`, `yaw` in `(-pi/2, pi/2]`, and in `(-pi/4, pi/4]` where
      the footprint is square; see `geode.data.synthetic_rooms.boxes`.
    - A tilted box becomes the upright one around it: as high as it, with the smallest rectangle around its footprint.
"""

import math
from collections.abc import Sequence

import numpy as np

from geode.data.synthetic_rooms.boxes import canonical_box


_ORTHONORMAL_TOLERANCE = 1e-3
_VERTICAL_TOLERANCE = 1e-9  # an axis whose shadow is shorter points along z


def upright_box(center: Sequence[float], size: Sequence[float], rotation: np.ndarray) -> list[float]:
    """
    Return the upright box around an oriented one.

    The footprint of a box is the sum of three segments, the shadows of its edges, and of all rectangles around a convex
    polygon the smallest has a side along one of the polygon's (Freeman and Shapira, 1975). So three directions are
    tried.

    Args:
        center (`Sequence[float]`): Three coordinates.
        size (`Sequence[float]`): Full lengths along the box's own axes.
        rotation (`np.ndarray` of shape `(3, 3)`): Its columns are the box's axes.

    Returns:
        `list[float]`: The canonical box.

    Raises:
        ValueError: If a number is missing or not finite, a length is not positive, or the axes are not orthonormal.

    Example:
    ```python
    >>> turned = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    >>> [round(value, 3) for value in upright_box([1.0, 2.0, 3.0], [4.0, 2.0, 1.0], turned)]
    [1.0, 2.0, 3.0, 4.0, 2.0, 1.0, 1.571]

    ```
    """
    middle, lengths, axes = _numbers(center), _numbers(size), _numbers(rotation)
    if middle.shape != (3,) or lengths.shape != (3,) or axes.shape != (3, 3):
        raise ValueError(
            f"A box must have a centre and a size of 3 numbers and 3 axes, got shapes {middle.shape}, {lengths.shape}, {axes.shape}."
        )
    if not (np.isfinite(middle).all() and np.isfinite(lengths).all() and (lengths > 0).all()):
        raise ValueError(
            f"A box must have a finite centre and lengths above 0, got {middle.tolist()}, {lengths.tolist()}."
        )
    error = np.abs(axes.T @ axes - np.eye(3)).max()
    if not error <= _ORTHONORMAL_TOLERANCE:
        raise ValueError(f"The axes of a box must be orthonormal, they are off by {error:.3g}: {axes.tolist()}.")
    edges = axes * lengths  # columns
    shadows = edges[:2]
    reach = np.linalg.norm(shadows, axis=0)
    directions = (shadows / np.maximum(reach, _VERTICAL_TOLERANCE)).T[reach > _VERTICAL_TOLERANCE]
    across = directions[:, ::-1] * np.array([-1.0, 1.0])
    dx, dy = np.abs(directions @ shadows).sum(axis=1), np.abs(across @ shadows).sum(axis=1)
    best = int(np.argmin(dx * dy))
    yaw = math.atan2(directions[best, 1], directions[best, 0])
    height = np.abs(edges[2]).sum()
    return canonical_box(np.array([*middle, dx[best], dy[best], height, yaw])).tolist()


def box_from_axes(
    centroid: Sequence[float], axes_lengths: Sequence[float], normalized_axes: Sequence[float]
) -> list[float]:
    """
    Return the upright box around one that is given by its axes, as in ARKitScenes and ScanNet.

    Args:
        centroid (`Sequence[float]`): Three coordinates in metres, z up.
        axes_lengths (`Sequence[float]`): Full lengths along the axes.
        normalized_axes (`Sequence[float]`): Nine numbers: three unit vectors, one after the other.

    Returns:
        `list[float]`: The canonical box.

    Raises:
        ValueError: See [`upright_box`].
    """
    axes = _numbers(normalized_axes)
    if axes.size != 9:
        raise ValueError(f"`normalizedAxes` must have 9 numbers, got {axes.size}.")
    return upright_box(centroid, axes_lengths, axes.reshape(3, 3).T)


def box_from_euler(values: Sequence[float] | None) -> list[float]:
    """
    Return the upright box around one of nine numbers: centre, full size, Euler angles, as in EmbodiedScan.

    Source: the released code of EmbodiedScan, whose angles are pytorch3d's in the order ZXY: `R = Rz(a) Rx(b) Ry(c)` acts on
    columns.

    Args:
        values (`Sequence[float]`): Nine numbers in metres and radians. Of six there is no turn, of seven only that about z.

    Returns:
        `list[float]`: The canonical box.

    Raises:
        ValueError: If there are not six, seven or nine numbers; see also [`upright_box`].
    """
    numbers = _numbers(values).ravel().tolist()
    if len(numbers) not in (6, 7, 9):
        raise ValueError(f"A box must have 6, 7 or 9 numbers, got {len(numbers)}: {numbers}.")
    a, b, c = [*numbers[6:], 0.0, 0.0, 0.0][:3]
    return upright_box(numbers[:3], numbers[3:6], rotation_from_euler_zxy(a, b, c))


def rotation_from_euler_zxy(a: float, b: float, c: float) -> np.ndarray:
    """
    Return `Rz(a) Rx(b) Ry(c)`.

    Args:
        a (`float`): Radians about z.
        b (`float`): Radians about x.
        c (`float`): Radians about y.

    Returns:
        `np.ndarray` of shape `(3, 3)`: The rotation, which acts on columns.
    """
    about_z = np.array([[math.cos(a), -math.sin(a), 0.0], [math.sin(a), math.cos(a), 0.0], [0.0, 0.0, 1.0]])
    about_x = np.array([[1.0, 0.0, 0.0], [0.0, math.cos(b), -math.sin(b)], [0.0, math.sin(b), math.cos(b)]])
    about_y = np.array([[math.cos(c), 0.0, math.sin(c)], [0.0, 1.0, 0.0], [-math.sin(c), 0.0, math.cos(c)]])
    return about_z @ about_x @ about_y


def _numbers(values) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"A box must be made of numbers, got {values!r:.200}.") from error


__all__ = ["box_from_axes", "box_from_euler", "rotation_from_euler_zxy", "upright_box"]
