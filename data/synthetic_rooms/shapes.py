# SPDX-License-Identifier: Apache-2.0
"""The solids that furniture is made of, as triangles with smooth normals, and their materials."""

import functools
from dataclasses import dataclass

import numpy as np


ROUND_SEGMENTS = 32  # a multiple of four, so that a round solid reaches its radius along both axes
PATTERNS = ("solid", "noise", "wood", "planks", "checker", "stripes", "tiles", "painting", "sky")


@dataclass(frozen=True)
class Material:
    """
    How a surface looks.

    Args:
        color (`tuple[float, float, float]`): Main colour, sRGB in [0, 1].
        second (`tuple[float, float, float]`, *optional*): Second colour of the pattern; `None` is a darker `color`.
        pattern (`str`, defaults to `"noise"`): One of `PATTERNS`, evaluated in the object's own coordinates.
        scale_m (`float`, defaults to 0.1): Period of the pattern in metres (`"painting"`, `"sky"`: half height).
        emission (`float`, defaults to 0): Radiance as a multiple of the colour.
    """

    color: tuple[float, float, float]
    second: tuple[float, float, float] | None = None
    pattern: str = "noise"
    scale_m: float = 0.1
    emission: float = 0.0

    def __post_init__(self):
        if self.pattern not in PATTERNS:
            raise ValueError(f"`pattern` must be one of {PATTERNS}, got {self.pattern!r}.")


@dataclass(frozen=True)
class Part:
    """
    One solid of an object, in the object's frame.

    Args:
        kind (`str`): `"box"`, `"tube"` (a cylinder or a truncated cone) or `"ball"` (an ellipsoid).
        low (`tuple[float, float, float]`): Smallest coordinates in metres.
        high (`tuple[float, float, float]`): Largest coordinates in metres.
        material (`Material`): Its surface.
        axis (`int`, defaults to 2): Axis of a tube.
        taper (`float`, defaults to 1): Radius of a tube's high end over that of its low end; at most 1 if its
            low end gives the extent, more if its high end does.
    """

    kind: str
    low: tuple[float, float, float]
    high: tuple[float, float, float]
    material: Material
    axis: int = 2
    taper: float = 1.0


def _quads_to_triangles(quads: np.ndarray) -> np.ndarray:
    """Split quads (n, 4, 3) into triangles (2n, 3, 3)."""
    return np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])


@functools.cache
def _box_mesh() -> tuple[np.ndarray, np.ndarray]:
    quads, normals = [], []
    for axis in range(3):
        u, v = (axis + 1) % 3, (axis + 2) % 3
        for side in (-1.0, 1.0):
            quad = np.zeros((4, 3))
            quad[:, axis] = side
            quad[:, u] = [-1.0, 1.0, 1.0, -1.0]
            quad[:, v] = [-1.0, -1.0, 1.0, 1.0]
            normal = np.zeros((4, 3))
            normal[:, axis] = side
            quads.append(quad)
            normals.append(normal)
    return _quads_to_triangles(np.stack(quads)), _quads_to_triangles(np.stack(normals))


def _ring() -> np.ndarray:
    angle = 2.0 * np.pi * np.arange(ROUND_SEGMENTS + 1) / ROUND_SEGMENTS
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


@functools.cache
def _tube_mesh(taper: float) -> tuple[np.ndarray, np.ndarray]:
    low_radius, high_radius = (1.0, taper) if taper <= 1.0 else (1.0 / taper, 1.0)
    ring = _ring()
    level = np.ones((len(ring), 1))
    low = np.concatenate([ring * low_radius, -level], axis=1)
    high = np.concatenate([ring * high_radius, level], axis=1)
    side = np.concatenate([ring, 0.5 * (low_radius - high_radius) * level], axis=1)
    quads = np.stack([low[:-1], low[1:], high[1:], high[:-1]], axis=1)
    quad_normals = np.stack([side[:-1], side[1:], side[1:], side[:-1]], axis=1)
    meshes, normals = [_quads_to_triangles(quads)], [_quads_to_triangles(quad_normals)]
    for end, sign in ((low, -1.0), (high, 1.0)):
        center = np.tile([0.0, 0.0, sign], (ROUND_SEGMENTS, 1))
        meshes.append(np.stack([center, end[:-1], end[1:]], axis=1))
        normals.append(np.repeat(center[:, None], 3, axis=1))
    return np.concatenate(meshes), np.concatenate(normals)


@functools.cache
def _ball_mesh() -> tuple[np.ndarray, np.ndarray]:
    ring = _ring()
    polar = np.pi * np.arange(ROUND_SEGMENTS // 2 + 1) / (ROUND_SEGMENTS // 2)
    grid = np.stack(
        [
            np.sin(polar)[:, None] * ring[None, :, 0],
            np.sin(polar)[:, None] * ring[None, :, 1],
            np.repeat(-np.cos(polar)[:, None], len(ring), axis=1),
        ],
        axis=-1,
    )
    quads = np.stack([grid[:-1, :-1], grid[:-1, 1:], grid[1:, 1:], grid[1:, :-1]], axis=2).reshape(-1, 4, 3)
    triangles = _quads_to_triangles(quads)
    area = np.linalg.norm(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1)
    triangles = triangles[area > 1e-9]  # at the poles half of the quads collapse
    return triangles, triangles


def part_mesh(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """
    Triangulate a part.

    Args:
        part (`Part`): The solid.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Triangles and their unit vertex normals, both of shape
        `(num_triangles, 3, 3)` (corner, then coordinate), in the object's frame. The triangles' extent is exactly
        `part.low` to `part.high`.

    Raises:
        ValueError: If the kind is unknown.
    """
    if part.kind == "box":
        triangles, normals = _box_mesh()
    elif part.kind == "tube":
        triangles, normals = _tube_mesh(part.taper)
        order = {0: [2, 0, 1], 1: [1, 2, 0], 2: [0, 1, 2]}[part.axis]
        triangles, normals = triangles[..., order], normals[..., order]
    elif part.kind == "ball":
        triangles, normals = _ball_mesh()
    else:
        raise ValueError(f"`kind` must be 'box', 'tube' or 'ball', got {part.kind!r}.")
    low, high = np.asarray(part.low), np.asarray(part.high)
    half = 0.5 * (high - low)
    normals = normals / half  # normals transform with the inverse transpose
    normals = normals / np.linalg.norm(normals, axis=-1, keepdims=True)
    return triangles * half + 0.5 * (low + high), normals


class PartList(list):
    """A list of parts with one method per kind, so that a piece of furniture reads as its description."""

    def box(self, x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], material: Material) -> None:
        """Append a box given by its three intervals."""
        self.append(Part("box", (x[0], y[0], z[0]), (x[1], y[1], z[1]), material))

    def tube(self, center, radius: float, span: tuple[float, float], material: Material, *, axis=2, taper=1.0) -> None:
        """Append a tube: `center` in the two other axes (cyclic order), `radius` of its wide end, `span` along it."""
        low, high = np.zeros(3), np.zeros(3)
        u, v = (axis + 1) % 3, (axis + 2) % 3
        low[[u, v]] = np.asarray(center) - radius
        high[[u, v]] = np.asarray(center) + radius
        low[axis], high[axis] = span
        self.append(Part("tube", tuple(low), tuple(high), material, axis, taper))

    def ball(self, center, radii, material: Material) -> None:
        """Append an ellipsoid."""
        center, radii = np.asarray(center, dtype=np.float64), np.broadcast_to(radii, 3)
        self.append(Part("ball", tuple(center - radii), tuple(center + radii), material))

    def centred(self) -> "PartList":
        """Return the parts moved so that their common extent is centred in x and y and starts at z = 0."""
        low = np.min([part.low for part in self], axis=0)
        high = np.max([part.high for part in self], axis=0)
        shift = -np.array([0.5 * (low[0] + high[0]), 0.5 * (low[1] + high[1]), low[2]])
        moved = PartList()
        for part in self:
            low, high = tuple(np.asarray(part.low) + shift), tuple(np.asarray(part.high) + shift)
            moved.append(Part(part.kind, low, high, part.material, part.axis, part.taper))
        return moved

    def size(self) -> np.ndarray:
        """Return the common extent `(dx, dy, dz)` in metres."""
        return np.max([part.high for part in self], axis=0) - np.min([part.low for part in self], axis=0)
