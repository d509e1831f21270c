# SPDX-License-Identifier: Apache-2.0
"""Surface patterns and light, in numpy. All of it is a fixed function of position: no random numbers."""

import numpy as np

from geode.data.synthetic_rooms.shapes import PATTERNS, Material


def _hash(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Map integer lattice points to [0, 1)."""
    mixed = x.astype(np.uint32) * np.uint32(374761393) + y.astype(np.uint32) * np.uint32(668265263)
    mixed += z.astype(np.uint32) * np.uint32(2246822519)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(1274126177)
    return ((mixed ^ (mixed >> np.uint32(16))) & np.uint32(0xFFFF)).astype(np.float32) / np.float32(65536.0)


def value_noise(points: np.ndarray) -> np.ndarray:
    """
    Return smooth noise in [0, 1): a random value per lattice point, blended in between.

    Args:
        points (`np.ndarray` of shape `(num_points, 3)`): Positions in lattice units.

    Returns:
        `np.ndarray` of shape `(num_points,)`: Noise, float32.
    """
    cell = np.floor(points).astype(np.int64)
    share = (points - cell).astype(np.float32)
    share = share * share * (3.0 - 2.0 * share)
    total = np.zeros(len(points), dtype=np.float32)
    for corner in range(8):
        step = [(corner >> axis) & 1 for axis in range(3)]
        weight = np.ones(len(points), dtype=np.float32)
        for axis in range(3):
            weight *= share[:, axis] if step[axis] else 1.0 - share[:, axis]
        total += weight * _hash(cell[:, 0] + step[0], cell[:, 1] + step[1], cell[:, 2] + step[2])
    return total


def _dominant_plane(points: np.ndarray, normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the two coordinates that run along the surface (horizontal one first)."""
    axis = np.abs(normals).argmax(axis=1)
    first = np.where(axis == 0, points[:, 1], points[:, 0])
    second = np.where(axis == 2, points[:, 1], points[:, 2])
    return first, second


def pattern_share(pattern: str, points: np.ndarray, normals: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """
    Return how much of the second colour a surface shows.

    Args:
        pattern (`str`): One of `PATTERNS`.
        points (`np.ndarray` of shape `(num_points, 3)`): Positions in the object's frame.
        normals (`np.ndarray` of shape `(num_points, 3)`): Normals in the object's frame.
        scale (`np.ndarray` of shape `(num_points,)`): Period in metres.

    Returns:
        `np.ndarray` of shape `(num_points,)`: Shares in [0, 1].
    """
    unit = points / scale[:, None]
    if pattern == "solid":
        return np.zeros(len(points), dtype=np.float32)
    if pattern == "noise":
        return 0.55 * value_noise(unit + 37.0) + 0.35 * value_noise(3.1 * unit + 11.0)
    first, second = _dominant_plane(unit, normals)
    if pattern == "wood":
        wave = value_noise(unit * [0.16, 0.9, 0.9] + 5.0)  # stretched along the object's width
        return 0.5 + 0.5 * np.sin(11.0 * wave)
    if pattern == "planks":
        row = np.floor(second)
        along = first / 6.0 + _hash(row.astype(np.int64), np.zeros(len(row), np.int64), np.ones(len(row), np.int64))
        shade = _hash(row.astype(np.int64), np.floor(along).astype(np.int64), np.full(len(row), 7))
        grain = value_noise(np.stack([2.0 * along, 9.0 * second, row], axis=1))
        seam = (second - row < 0.045) | (along - np.floor(along) < 0.012)
        return np.where(seam, 1.0, 0.75 * shade + 0.25 * grain)
    if pattern == "tiles":
        seam = (first - np.floor(first) < 0.03) | (second - np.floor(second) < 0.03)
        shade = _hash(
            np.floor(first).astype(np.int64), np.floor(second).astype(np.int64), np.zeros(len(first), np.int64)
        )
        return np.where(seam, 1.0, 0.35 * shade)
    if pattern == "checker":
        return ((np.floor(first) + np.floor(second)) % 2 == 0).astype(np.float32)
    if pattern == "stripes":
        along = np.where(np.abs(normals[:, 2]) > 0.7, second, first)
        return (np.mod(along, 1.0) < 0.5).astype(np.float32)
    if pattern == "painting":
        blobs = value_noise(np.stack([unit[:, 0], 40.0 * scale, unit[:, 2]], axis=1))
        return np.clip(3.0 * (blobs - 0.35) + 0.25 * np.sin(3.0 * unit[:, 2] + 2.0 * unit[:, 0]), 0.0, 1.0)
    horizon = unit[:, 2] - 0.75 - 0.25 * value_noise(np.stack([2.5 * unit[:, 0], unit[:, 1] * 0, unit[:, 0] * 0], 1))
    return np.clip(0.5 - 12.0 * horizon, 0.0, 1.0)  # "sky": trees below, sky above


def surface_colors(
    materials: list[Material], index: np.ndarray, points: np.ndarray, normals: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """
    Return the linear reflectance and emission at surface points.

    Args:
        materials (`list[Material]`): The materials.
        index (`np.ndarray` of shape `(num_points,)`): Which of them each point has.
        points (`np.ndarray` of shape `(num_points, 3)`): Positions in their objects' frames.
        normals (`np.ndarray` of shape `(num_points, 3)`): Normals in their objects' frames.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Reflectance `(num_points, 3)` and emission `(num_points, 3)`, float32.
    """
    first = np.array([item.color for item in materials], dtype=np.float32)
    second = np.array([item.second or tuple(0.78 * v for v in item.color) for item in materials], dtype=np.float32)
    scales = np.array([item.scale_m for item in materials])
    patterns = np.array([PATTERNS.index(item.pattern) for item in materials])
    emission = np.array([item.emission for item in materials], dtype=np.float32)
    share = np.zeros(len(points), dtype=np.float32)
    for number, pattern in enumerate(PATTERNS):
        chosen = np.flatnonzero(patterns[index] == number)
        if len(chosen):
            share[chosen] = pattern_share(pattern, points[chosen], normals[chosen], scales[index[chosen]])
    color = (1.0 - share[:, None]) * first[index] + share[:, None] * second[index]
    color = color**2.2  # sRGB to linear
    glow = emission[index, None]
    return np.where(glow > 0, 0.15 * color, color), glow * color


def tone_map(radiance: np.ndarray) -> np.ndarray:
    """
    Turn linear radiance into bytes: a filmic shoulder, then gamma.

    Args:
        radiance (`np.ndarray`): Linear values, any shape.

    Returns:
        `np.ndarray` of the same shape: uint8.
    """
    mapped = radiance * (1.0 + radiance / 9.0) / (1.0 + 0.62 * radiance)
    return np.clip(255.0 * np.clip(mapped, 0.0, 1.0) ** (1.0 / 2.2) + 0.5, 0.0, 255.0).astype(np.uint8)
