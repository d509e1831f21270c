# SPDX-License-Identifier: Apache-2.0
"""
What a reconstruction does not know: which way is up, and how long a metre is.

Lengths that go in are in the reconstruction's unit unless their name ends in `_m`; every scale that comes out is in metres
per unit.
"""

import math
from typing import NamedTuple

import torch
from transformers.utils import logging

from .geometry_geode import evenly_spaced_indices


logger = logging.get_logger(__name__)

# A floor is looked for within this angle of the direction that is taken for up. A wall is 90 degrees away from the
# floor, so within 45 degrees there is only one of them.
MAX_TILT_DEG = 45.0
# Points this far from a plane still belong to it, as a part of the median distance between cameras and points: 4 cm in a
# room, a few times the noise of a reconstruction.
PLANE_TOLERANCE = 0.016
# Normals of a plane's points may differ by this much from the plane's.
MAX_NORMAL_DEVIATION_DEG = 25.0
# The least part of all points that a floor holds, and the largest part that may lie below it: more, and it is a table.
MIN_FLOOR_SHARE = 0.02
MAX_SHARE_BELOW = 0.05
NUM_POINTS, NUM_PLANES = 8192, 256
# A trajectory that misses the known one by more than this part of its spread was probably matched to other frames.
MAX_TRAJECTORY_RESIDUAL = 0.2


class Floor(NamedTuple):
    """
    The plane of a floor: the points with `up @ point = height`.

    Args:
        up (`torch.Tensor` of shape `(3,)`): The unit vector against gravity, float64.
        height (`float`): Of the floor along `up`, in the unit of the points.
    """

    up: torch.Tensor
    height: float


def find_floor(points: torch.Tensor, normals: torch.Tensor, *, prior: torch.Tensor, distance: float) -> Floor | None:
    """
    Find the floor, whose normal is the direction against gravity.

    The floor is the plane with the most points among those that face `prior` to within 45 degrees and have hardly anything
    below. One plane is tried through each of 256 points, as its normal has it, and fitted three times to the points near it.

    Source: Fischler and Bolles, "Random sample consensus" (1981); evenly spaced instead of random samples, so that the
    result is repeatable.

    Args:
        points (`torch.Tensor` of shape `(num_points, 3)`):
            Points, evenly spread over the surfaces.
        normals (`torch.Tensor` of shape `(num_points, 3)`):
            Unit normals that face the cameras.
        prior (`torch.Tensor` of shape `(3,)`):
            A rough direction of up, in the frame of `points`.
        distance (`float`):
            Median distance between cameras and points, which sets the tolerance.

    Returns:
        [`Floor`] or None: The floor; None where none is seen.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.alignment_geode import find_floor
        >>> u, v = torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij")
        >>> floor = torch.stack([u, v, 0.1 * u], dim=-1).flatten(0, 1)
        >>> normals = torch.nn.functional.normalize(torch.tensor([[-0.1, 0, 1]]), dim=1).expand(400, 3)
        >>> found = find_floor(floor, normals, prior=torch.tensor([0.0, 0, 1]), distance=2.5)
        >>> found.up[[0, 2]].round(decimals=4).tolist(), abs(round(found.height, 6))
        ([-0.0995, 0.995], 0.0)
    """
    rows = evenly_spaced_indices(len(points), NUM_POINTS)
    points, normals = points[rows].double(), normals[rows].double()
    center = points.mean(dim=0)
    points = points - center
    prior = torch.nn.functional.normalize(prior.double(), dim=0)
    tolerance = PLANE_TOLERANCE * distance
    facing = (normals @ prior > math.cos(math.radians(MAX_TILT_DEG))).nonzero().flatten()
    if len(facing) < 3:
        return None
    seeds = facing[evenly_spaced_indices(len(facing), NUM_PLANES)]
    directions, anchors = normals[seeds], points[seeds]
    # What a plane is fitted from: counts, sums and sums of products of its points.
    moments = torch.cat([torch.ones_like(points[:, :1]), points, _products(points)], dim=1)
    for _ in range(3):
        members = _members(points, normals, directions, anchors, tolerance).to(moments)
        sums = members @ moments  # (planes, 10)
        count = sums[:, :1].clamp(min=1)
        means, products = sums[:, 1:4] / count, (sums[:, 4:] / count).unflatten(1, (2, 3))
        directions = _least_variance(products, means, directions)
        anchors = means
    heights = points @ directions.T - (anchors * directions).sum(dim=1)  # (points, planes)
    share = _members(points, normals, directions, anchors, tolerance).double().mean(dim=1)
    is_floor = (heights < -2 * tolerance).double().mean(dim=0) <= MAX_SHARE_BELOW
    is_floor &= directions @ prior > math.cos(math.radians(MAX_TILT_DEG))
    best = int(torch.where(is_floor, share, 0.0).argmax())
    if not is_floor[best] or share[best] < MIN_FLOOR_SHARE:
        return None
    up = directions[best]
    return Floor(up, float(up @ (anchors[best] + center)))


def _products(points: torch.Tensor) -> torch.Tensor:
    """The six products of the coordinates of `(num_points, 3)`: xx, yy, zz, yz, xz, xy."""
    return torch.cat([points**2, points[:, [1, 0, 0]] * points[:, [2, 2, 1]]], dim=1)


def _least_variance(products: torch.Tensor, means: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Unit directions `(planes, 3)` of least variance, on the side of `like`, from means of products and points."""
    spread = products.flatten(1) - _products(means)
    xx, yy, zz, yz, xz, xy = spread.unbind(dim=1)
    covariance = torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz], dim=1).unflatten(1, (3, 3))
    directions = torch.linalg.eigh(covariance).eigenvectors[..., 0]
    return directions * torch.where((directions * like).sum(dim=1, keepdim=True) < 0, -1.0, 1.0)


def _members(points, normals, directions, anchors, tolerance: float) -> torch.Tensor:
    """Which points lie on which plane and face the same way, `(planes, num_points)`."""
    offsets = (directions @ points.T - (directions * anchors).sum(dim=1, keepdim=True)).abs()
    return (offsets < tolerance) & (directions @ normals.T > math.cos(math.radians(MAX_NORMAL_DEVIATION_DEG)))


def scale_from_positions(centers: torch.Tensor, positions_m: torch.Tensor) -> float:
    """
    Metres per unit from known camera positions.

    The ratio of the two spreads about their means, which favours neither side if both are noisy.

    Source: Horn, "Closed-form solution of absolute orientation using unit quaternions" (1987), section 2.E.

    Args:
        centers (`torch.Tensor` of shape `(num_cameras, 3)`):
            Reconstructed camera centres.
        positions_m (`torch.Tensor` of shape `(num_cameras, 3)`):
            The same cameras in metres, in any right-handed frame.

    Returns:
        `float`: Metres per unit.

    Raises:
        ValueError: If the shapes differ, a value is not finite, or the cameras do not move.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.alignment_geode import scale_from_positions
        >>> scale_from_positions(torch.tensor([[0.0, 0, 0], [0, 0, 2]]), torch.tensor([[5.0, 1, 0], [5, 2, 0]]))
        0.5
    """
    centers, positions_m = centers.double(), positions_m.double()
    if centers.shape != positions_m.shape or centers.shape[1:] != (3,):
        raise ValueError(
            "`camera_positions_m` must hold one position in metres for each reconstructed camera, shape "
            f"{tuple(centers.shape)}, got {tuple(positions_m.shape)}."
        )
    if not bool(torch.isfinite(positions_m).all()):
        raise ValueError("`camera_positions_m` must be finite. Leave out the frames whose tracking was lost.")
    centers, positions_m = centers - centers.mean(dim=0), positions_m - positions_m.mean(dim=0)
    spread, spread_m = float(centers.square().sum()), float(positions_m.square().sum())
    if not (spread > 0 and spread_m > 0):
        raise ValueError(
            "Known camera positions give a scale only if the camera moves, and here "
            f"{'the known' if spread > 0 else 'the reconstructed'} positions of {len(centers)} cameras coincide. Give "
            "another source of scale, such as `camera_height_m`."
        )
    scale = math.sqrt(spread_m / spread)
    left, singular, right = torch.linalg.svd(positions_m.T @ centers)
    # The best rotation may not mirror.
    singular[-1] *= torch.sign(torch.linalg.det(left @ right))
    residual = math.sqrt(max(0.0, 2 - 2 * float(singular.sum()) / math.sqrt(spread * spread_m)))
    if residual > MAX_TRAJECTORY_RESIDUAL:
        logger.warning(
            f"The reconstructed cameras miss the known positions by {100 * residual:.0f} % of their spread, so the scale "
            f"of {scale:.4g} metres per unit is doubtful. Check that the positions belong to the frames, in their order."
        )
    return scale


def scale_from_depth(depth: torch.Tensor, depth_m: torch.Tensor) -> float:
    """
    Metres per unit from metric depth: the median ratio over the pixels where both are valid.

    Args:
        depth (`torch.Tensor`):
            Reconstructed z-depth; 0 and non-finite values are invalid.
        depth_m (`torch.Tensor` of the same shape):
            Z-depth in metres at the same pixels; 0 and non-finite values are invalid.

    Returns:
        `float`: Metres per unit.

    Raises:
        ValueError: If the shapes differ or no pixel is valid in both.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.alignment_geode import scale_from_depth
        >>> scale_from_depth(torch.tensor([1.0, 2.0, 4.0, 1.0]), torch.tensor([0.5, 0.0, 2.0, 9.0]))
        0.5
    """
    if depth.shape != depth_m.shape:
        raise ValueError(
            f"`depth_m` must have the shape of the reconstructed depth, {tuple(depth.shape)}, got {tuple(depth_m.shape)}. "
            "Resample it with nearest neighbours, so that no depth is mixed across an edge."
        )
    depth, depth_m = depth.double(), depth_m.double()
    valid = torch.isfinite(depth) & torch.isfinite(depth_m) & (depth > 0) & (depth_m > 0)
    if not bool(valid.any()):
        raise ValueError(
            f"`depth_m` must be above 0 at some pixels of reconstructed depth, got none of {depth.numel()}."
        )
    return float((depth_m[valid] / depth[valid]).median())


def scale_from_length(ends: torch.Tensor, length_m: float) -> float:
    """
    Metres per unit from one known length.

    Args:
        ends (`torch.Tensor` of shape `(2, 3)`):
            The two reconstructed ends.
        length_m (`float`):
            Their distance in metres.

    Returns:
        `float`: Metres per unit.

    Raises:
        ValueError: If the length is not positive, or the ends coincide.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.alignment_geode import scale_from_length
        >>> scale_from_length(torch.tensor([[0.0, 0, 1], [0, 4, 1]]), 2.0)
        0.5
    """
    _check_positive_m("length_m", length_m)
    length = float(torch.linalg.vector_norm(ends[0].double() - ends[1].double()))
    if not (math.isfinite(length) and length > 0):
        raise ValueError(f"The two ends of a known length must be apart, got a reconstructed distance of {length}.")
    return length_m / length


def scale_from_camera_height(height: float, height_m: float) -> float:
    """
    Metres per unit from the height of a camera above the floor.

    Args:
        height (`float`):
            Height above the floor in the reconstruction.
        height_m (`float`):
            The same in metres.

    Returns:
        `float`: Metres per unit.

    Raises:
        ValueError: If the height in metres is not positive, or the camera is not above the floor.

    Example:
        >>> from geode.modeling_geode.alignment_geode import scale_from_camera_height
        >>> scale_from_camera_height(3.0, 1.5)
        0.5
    """
    _check_positive_m("camera_height_m", height_m)
    if not height > 0:
        raise ValueError(
            f"The first camera must be above the floor for its height to give a scale, got a height of {height:.4g} units. "
            "No floor may have been seen, or the direction of gravity is wrong: give `up`, or another source of scale."
        )
    return height_m / height


def _check_positive_m(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be a positive number of metres, got {value}.")


__all__ = [
    "Floor",
    "find_floor",
    "scale_from_camera_height",
    "scale_from_depth",
    "scale_from_length",
    "scale_from_positions",
]
