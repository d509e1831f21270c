# SPDX-License-Identifier: Apache-2.0
"""
Geometry as pure functions on tensors: rigid maps, pinhole cameras, boxes, normals.

Every function keeps dtype and device and takes leading batch dimensions where its docstring shows `...`. Frames, units
and pixel centres are those of `docs/conventions.md`.
"""

import math

import torch
from transformers.utils import logging


try:
    from scipy.spatial import cKDTree
except ImportError:
    cKDTree = None  # `estimate_normals` then compares all pairs of points


logger = logging.get_logger(__name__)

# A box keeps only its yaw, so a map that tilts +z by more than this would move its corners visibly: 0.5 degrees is
# 2 cm at the top of a wardrobe of 2 m.
MAX_BOX_TILT_DEG = 0.5


def _check_shape(name: str, value: torch.Tensor, tail: tuple[int | str, ...]) -> None:
    """Raise unless the last dimensions of `value` are `tail`; a string in `tail` stands for any size."""
    shape = tuple(value.shape)
    fits = len(shape) >= len(tail) and all(
        isinstance(want, str) or want == size for want, size in zip(tail, shape[len(shape) - len(tail) :], strict=True)
    )
    if not fits:
        wanted = ", ".join(["...", *map(str, tail)])
        raise ValueError(f"`{name}` must have shape ({wanted}), got {shape}.")


def invert_rigid(target_from_source: torch.Tensor) -> torch.Tensor:
    """
    Invert rigid maps by transposing their rotation.

    Convention:
        - `invert_rigid(world_from_cam)` is `cam_from_world`.

    Args:
        target_from_source (`torch.Tensor` of shape `(..., 4, 4)`):
            Rigid maps. A map that also scales or shears gives a wrong inverse; it is not checked here.

    Returns:
        `torch.Tensor` of shape `(..., 4, 4)`: `source_from_target`.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import invert_rigid
        >>> world_from_cam = torch.tensor([[0.0, -1, 0, 5], [1, 0, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]])
        >>> invert_rigid(world_from_cam)[:3, 3].tolist()
        [-6.0, 5.0, -7.0]
    """
    _check_shape("target_from_source", target_from_source, (4, 4))
    rotation = target_from_source[..., :3, :3].transpose(-1, -2)
    translation = -rotation @ target_from_source[..., :3, 3:]
    bottom = target_from_source[..., 3:, :]
    return torch.cat([torch.cat([rotation, translation], dim=-1), bottom], dim=-2)


def transform_points(target_from_source: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """
    Map points from a source frame to a target frame.

    Convention:
        - Points are columns of the mathematics and rows of the array: `target = rotation @ source + translation`.

    Args:
        target_from_source (`torch.Tensor` of shape `(..., 4, 4)`):
            Rigid (or affine) maps. Leading dimensions broadcast against those of `points`.
        points (`torch.Tensor` of shape `(..., num_points, 3)`):
            Points in the source frame.

    Returns:
        `torch.Tensor` of shape `(..., num_points, 3)`: The points in the target frame.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import transform_points
        >>> world_from_cam = torch.tensor([[0.0, -1, 0, 5], [1, 0, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]])
        >>> transform_points(world_from_cam, torch.tensor([[1.0, 2.0, 3.0]])).tolist()
        [[3.0, 7.0, 10.0]]
    """
    _check_shape("target_from_source", target_from_source, (4, 4))
    _check_shape("points", points, ("num_points", 3))
    rotation, translation = target_from_source[..., :3, :3], target_from_source[..., :3, 3]
    return points @ rotation.transpose(-1, -2) + translation[..., None, :]


def unproject_depth(depth: torch.Tensor, intrinsics: torch.Tensor) -> torch.Tensor:
    """
    Lift z-depth maps to camera-frame points.

    Source: Hartley and Zisserman, *Multiple View Geometry* (2004), section 6.1.

    Convention:
        - Camera frame: +x right, +y down, +z forward. Pixel `(0, 0)` is the centre of the top-left pixel.
        - `0` marks an invalid depth and gives the point `(0, 0, 0)`; mask with `depth > 0`.

    Args:
        depth (`torch.Tensor` of shape `(..., height, width)`):
            Z-depth; the points take its unit.
        intrinsics (`torch.Tensor` of shape `(..., 3, 3)`):
            Pinhole matrices in pixels, at the resolution of `depth`. Skew must be zero.

    Returns:
        `torch.Tensor` of shape `(..., height, width, 3)`: Points in the camera frame.

    Raises:
        ValueError: If the leading dimensions of `intrinsics` differ from those of `depth`.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import unproject_depth
        >>> intrinsics = torch.tensor([[2.0, 0, 1], [0, 4, 0], [0, 0, 1]])
        >>> unproject_depth(torch.tensor([[6.0, 6.0, 6.0], [6.0, 6.0, 0.0]]), intrinsics)[:, 2].tolist()
        [[3.0, 0.0, 6.0], [0.0, 0.0, 0.0]]
    """
    _check_shape("depth", depth, ("height", "width"))
    expected = (*depth.shape[:-2], 3, 3)
    if tuple(intrinsics.shape) != expected:
        raise ValueError(
            f"`intrinsics` must have shape {expected} to match `depth` of shape {tuple(depth.shape)}, "
            f"got {tuple(intrinsics.shape)}. To share one camera across frames, expand it first."
        )
    height, width = depth.shape[-2:]
    u = torch.arange(width, dtype=depth.dtype, device=depth.device)
    v = torch.arange(height, dtype=depth.dtype, device=depth.device)[:, None]
    fx, fy, cx, cy = (intrinsics[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    return torch.stack([(u - cx) / fx * depth, (v - cy) / fy * depth, depth], dim=-1)


def project_points(points_cam: torch.Tensor, intrinsics: torch.Tensor) -> torch.Tensor:
    """
    Project camera-frame points to pixels.

    Source: Hartley and Zisserman, *Multiple View Geometry* (2004), section 6.1.

    Convention:
        - Camera frame: +x right, +y down, +z forward. Pixel `(0, 0)` is the centre of the top-left pixel.
        - A point at or behind the camera (`z <= 0`) has no pixel and gives `(nan, nan)`, with zero gradient.

    Args:
        points_cam (`torch.Tensor` of shape `(..., num_points, 3)`):
            Points in the camera frame.
        intrinsics (`torch.Tensor` of shape `(..., 3, 3)`):
            Pinhole matrices in pixels. Leading dimensions broadcast against those of `points_cam`. Skew must be zero.

    Returns:
        `torch.Tensor` of shape `(..., num_points, 2)`: Pixels `(u, v)`, not clipped to the image.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import project_points
        >>> intrinsics = torch.tensor([[200.0, 0, 31], [0, 100, 23], [0, 0, 1]])
        >>> project_points(torch.tensor([[1.0, -2.0, 4.0], [1.0, 1.0, -1.0]]), intrinsics).tolist()
        [[81.0, -27.0], [nan, nan]]
    """
    _check_shape("points_cam", points_cam, ("num_points", 3))
    _check_shape("intrinsics", intrinsics, (3, 3))
    in_front = points_cam[..., 2:] > 0
    # Dividing by a safe depth first: where() alone would let the gradient of 1 / 0 through as NaN.
    z = torch.where(in_front, points_cam[..., 2:], 1.0)
    focal = torch.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], dim=-1)[..., None, :]
    pixels = points_cam[..., :2] / z * focal + intrinsics[..., None, :2, 2]
    return torch.where(in_front, pixels, float("nan"))


def resize_intrinsics(
    intrinsics: torch.Tensor, *, image_size: tuple[int, int], new_size: tuple[int, int]
) -> torch.Tensor:
    """
    Intrinsics of an image after it was resized.

    Convention:
        - Pixel `(0, 0)` is the centre of the top-left pixel, so the image spans -0.5 to width - 0.5, and a pixel moves
          to `u' = (u + 0.5) * s - 0.5`. Scaling the principal point alone would shift it by up to half a pixel.

    Args:
        intrinsics (`torch.Tensor` of shape `(..., 3, 3)`):
            Pinhole matrices in pixels at `image_size`.
        image_size (`tuple[int, int]`):
            `(height, width)` before.
        new_size (`tuple[int, int]`):
            `(height, width)` after.

    Returns:
        `torch.Tensor` of shape `(..., 3, 3)`: Pinhole matrices in pixels at `new_size`.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import resize_intrinsics
        >>> intrinsics = torch.tensor([[300.0, 0, 10], [0, 280, 6], [0, 0, 1]])
        >>> resize_intrinsics(intrinsics, image_size=(12, 20), new_size=(6, 40)).tolist()
        [[600.0, 0.0, 20.5], [0.0, 140.0, 2.75], [0.0, 0.0, 1.0]]
    """
    _check_shape("intrinsics", intrinsics, (3, 3))
    scale_v, scale_u = new_size[0] / image_size[0], new_size[1] / image_size[1]
    new_from_old = intrinsics.new_tensor(
        [[scale_u, 0.0, 0.5 * scale_u - 0.5], [0.0, scale_v, 0.5 * scale_v - 0.5], [0.0, 0.0, 1.0]]
    )
    return new_from_old @ intrinsics


def crop_intrinsics(intrinsics: torch.Tensor, *, top: int, left: int) -> torch.Tensor:
    """
    Intrinsics of an image after rows and columns were cut off.

    Args:
        intrinsics (`torch.Tensor` of shape `(..., 3, 3)`):
            Pinhole matrices in pixels of the whole image.
        top (`int`):
            Rows cut off above. Negative values pad.
        left (`int`):
            Columns cut off on the left. Negative values pad.

    Returns:
        `torch.Tensor` of shape `(..., 3, 3)`: Pinhole matrices in pixels of the crop.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import crop_intrinsics
        >>> intrinsics = torch.tensor([[300.0, 0, 10], [0, 280, 6], [0, 0, 1]])
        >>> crop_intrinsics(intrinsics, top=2, left=-3)[:2, 2].tolist()
        [13.0, 4.0]
    """
    _check_shape("intrinsics", intrinsics, (3, 3))
    crop_from_full = intrinsics.new_tensor([[1.0, 0.0, -left], [0.0, 1.0, -top], [0.0, 0.0, 1.0]])
    return crop_from_full @ intrinsics


def fov_from_intrinsics(intrinsics: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """
    Horizontal and vertical field of view.

    Convention:
        - Radians, horizontal first. The view is bounded by the outer edges of the border pixels, so along x it spans
          -0.5 to width - 0.5; an off-centre principal point is taken into account.

    Args:
        intrinsics (`torch.Tensor` of shape `(..., 3, 3)`):
            Pinhole matrices in pixels at `image_size`.
        image_size (`tuple[int, int]`):
            `(height, width)`.

    Returns:
        `torch.Tensor` of shape `(..., 2)`: Horizontal and vertical field of view in radians.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import fov_from_intrinsics
        >>> intrinsics = torch.tensor([[20.0, 0, 19.5], [0, 10, 9.5], [0, 0, 1]])
        >>> torch.rad2deg(fov_from_intrinsics(intrinsics, (20, 40))).tolist()
        [90.0, 90.0]
    """
    _check_shape("intrinsics", intrinsics, (3, 3))
    height, width = image_size
    size = intrinsics.new_tensor([width, height])
    focal = torch.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], dim=-1)
    principal = intrinsics[..., :2, 2]
    return torch.atan((principal + 0.5) / focal) + torch.atan((size - 0.5 - principal) / focal)


def encode_camera_poses(
    world_from_cam: torch.Tensor, intrinsics: torch.Tensor, image_size: tuple[int, int]
) -> torch.Tensor:
    """
    Encode cameras as the eleven numbers that the model reads.

    Source: the six rotation numbers are those of Zhou et al., "On the Continuity of Rotation Representations in Neural
    Networks" (CVPR 2019), section 4.2: two columns of the rotation, from which the third follows.

    Convention:
        - Camera centre in the scene frame (3), column 0 of the rotation of `world_from_cam` (3), its column 1 (3),
          horizontal and vertical field of view in radians (2). The columns are the camera's right and down axes.

    Args:
        world_from_cam (`torch.Tensor` of shape `(..., 4, 4)`):
            Rigid maps from camera to scene frame.
        intrinsics (`torch.Tensor` of shape `(..., 3, 3)`):
            Pinhole matrices in pixels at `image_size`.
        image_size (`tuple[int, int]`):
            `(height, width)`.

    Returns:
        `torch.Tensor` of shape `(..., 11)`: The encoded poses.

    Raises:
        ValueError: If the leading dimensions of the two tensors differ.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import encode_camera_poses
        >>> world_from_cam = torch.tensor([[1.0, 0, 0, 5], [0, 0, 1, 6], [0, -1, 0, 7], [0, 0, 0, 1]])
        >>> intrinsics = torch.tensor([[20.0, 0, 19.5], [0, 10, 9.5], [0, 0, 1]])
        >>> encode_camera_poses(world_from_cam, intrinsics, (20, 40))[:9].tolist()
        [5.0, 6.0, 7.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0]
    """
    _check_shape("world_from_cam", world_from_cam, (4, 4))
    if world_from_cam.shape[:-2] != intrinsics.shape[:-2]:
        raise ValueError(
            f"`intrinsics` must have shape {(*world_from_cam.shape[:-2], 3, 3)} to match `world_from_cam` of shape "
            f"{tuple(world_from_cam.shape)}, got {tuple(intrinsics.shape)}."
        )
    center, right, down = world_from_cam[..., :3, 3], world_from_cam[..., :3, 0], world_from_cam[..., :3, 1]
    return torch.cat([center, right, down, fov_from_intrinsics(intrinsics, image_size)], dim=-1)


def rotation_about_z(yaw: torch.Tensor) -> torch.Tensor:
    """
    Rotation by an angle about +z.

    Convention:
        - Radians, right-handed: a quarter turn takes +x to +y.

    Args:
        yaw (`torch.Tensor` of shape `(...)`):
            Angles.

    Returns:
        `torch.Tensor` of shape `(..., 3, 3)`: Rotations.

    Example:
        >>> import math, torch
        >>> from geode.modeling_geode.geometry_geode import rotation_about_z
        >>> (rotation_about_z(torch.tensor(math.pi / 2)) @ torch.tensor([1.0, 0, 0])).round().tolist()
        [-0.0, 1.0, 0.0]
    """
    cos, sin = torch.cos(yaw), torch.sin(yaw)
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    rows = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=-1)
    return rows.unflatten(-1, (3, 3))


def rotation_aligning_to_z(up: torch.Tensor) -> torch.Tensor:
    """
    Smallest rotation that takes a direction to +z.

    Source: Rodrigues' formula for the rotation between two unit vectors.

    Convention:
        - The identity, exactly, for `up` along +z. For `up` along -z, where no rotation is the smallest, half a turn
          about +x.

    Args:
        up (`torch.Tensor` of shape `(..., 3)`):
            Directions of any positive length.

    Returns:
        `torch.Tensor` of shape `(..., 3, 3)`: Rotations with `rotation @ up` along +z.

    Raises:
        ValueError: If a direction is zero or not finite.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import rotation_aligning_to_z
        >>> rotation_aligning_to_z(torch.tensor([0.0, -2.0, 0.0])).tolist()
        [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]]
    """
    _check_shape("up", up, (3,))
    norm = torch.linalg.vector_norm(up, dim=-1, keepdim=True)
    if not bool((torch.isfinite(norm) & (norm > 0)).all()):
        raise ValueError(f"`up` must be a finite direction of positive length, got {up.tolist()}.")
    x, y, z = (up / norm).unbind(-1)
    opposite = z < -1 + 1e-7
    # Along -z the formula divides by zero; the branch below replaces those rows.
    scale = 1 / torch.where(opposite, 1.0, 1 + z)
    rows = torch.stack([1 - x * x * scale, -x * y * scale, -x, -x * y * scale, 1 - y * y * scale, -y, x, y, z], dim=-1)
    half_turn = up.new_tensor([1.0, -1.0, -1.0]).diag()
    # `+ 0` turns -0 into 0, so that an already upright frame is left untouched to the bit.
    return torch.where(opposite[..., None, None], half_turn, rows.unflatten(-1, (3, 3)) + 0)


def wrap_yaw(yaw: torch.Tensor) -> torch.Tensor:
    """
    Yaw of a box, wrapped to half a turn.

    Convention:
        - Radians in (-pi/2, pi/2]: a box turned by pi is the same box.

    Args:
        yaw (`torch.Tensor` of shape `(...)`):
            Angles.

    Returns:
        `torch.Tensor` of shape `(...)`: The same angles modulo pi.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import wrap_yaw
        >>> wrap_yaw(torch.tensor([135.0, -90, 225, 1300]).deg2rad()).rad2deg().round().tolist()
        [-45.0, 90.0, 45.0, 40.0]
    """
    return yaw - math.pi * torch.ceil((yaw - math.pi / 2) / math.pi)


def box_corners(boxes: torch.Tensor) -> torch.Tensor:
    """
    Corners of oriented boxes.

    Convention:
        - A box is `(cx, cy, cz, dx, dy, dz, yaw)`: centre, full sizes along its own axes, angle about +z from the
          scene's x axis to the box's.
        - Corner `4 * i + 2 * j + k` lies on the positive side of the box's x, y, z axis where i, j, k is 1.

    Args:
        boxes (`torch.Tensor` of shape `(..., 7)`):
            Boxes.

    Returns:
        `torch.Tensor` of shape `(..., 8, 3)`: Corners in the frame of the boxes.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import box_corners
        >>> box_corners(torch.tensor([1.0, 2.0, 3.0, 4.0, 2.0, 6.0, 0.0]))[[0, 1, 4]].tolist()
        [[-1.0, 1.0, 0.0], [-1.0, 1.0, 6.0], [3.0, 1.0, 0.0]]
    """
    _check_shape("boxes", boxes, (7,))
    signs = torch.tensor([-0.5, 0.5], dtype=boxes.dtype, device=boxes.device)
    offsets = torch.cartesian_prod(signs, signs, signs) * boxes[..., None, 3:6]
    return offsets @ rotation_about_z(boxes[..., 6]).transpose(-1, -2) + boxes[..., None, :3]


def transform_boxes(boxes: torch.Tensor, scene_from_dataset: torch.Tensor) -> torch.Tensor:
    """
    Map gravity-aligned boxes through a rigid map that keeps +z.

    Convention:
        - Sizes stay. The centre is mapped, and the yaw grows by that of the map and is wrapped to (-pi/2, pi/2].

    Args:
        boxes (`torch.Tensor` of shape `(..., 7)`):
            Boxes `(cx, cy, cz, dx, dy, dz, yaw)` in the dataset's frame.
        scene_from_dataset (`torch.Tensor` of shape `(4, 4)`):
            Rigid map from the dataset's frame to the scene frame.

    Returns:
        `torch.Tensor` of shape `(..., 7)`: The boxes in the scene frame.

    Raises:
        ValueError: If the map tilts +z by more than 0.5 degrees, since a tilted box is not a box of seven numbers.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import transform_boxes
        >>> quarter_turn = torch.tensor([[0.0, -1, 0, 10], [1, 0, 0, 0], [0, 0, 1, -1], [0, 0, 0, 1]])
        >>> transform_boxes(torch.tensor([2.0, 3.0, 1.0, 4.0, 5.0, 6.0, 0.0]), quarter_turn)[:6].tolist()
        [7.0, 2.0, 0.0, 4.0, 5.0, 6.0]
    """
    _check_shape("boxes", boxes, (7,))
    if tuple(scene_from_dataset.shape) != (4, 4):
        raise ValueError(f"`scene_from_dataset` must have shape (4, 4), got {tuple(scene_from_dataset.shape)}.")
    scene_from_dataset = scene_from_dataset.to(boxes)
    rotation = scene_from_dataset[:3, :3].detach()
    tilt_deg = math.degrees(math.atan2(float(torch.linalg.vector_norm(rotation[:2, 2])), float(rotation[2, 2])))
    if tilt_deg > MAX_BOX_TILT_DEG:
        raise ValueError(
            f"`scene_from_dataset` must keep the z axis to within {MAX_BOX_TILT_DEG} degrees, because a box turns "
            f"only about +z; it tilts it by {tilt_deg:.1f} degrees. Give the dataset's up direction as `up` when the "
            "scene is built."
        )
    centers = transform_points(scene_from_dataset, boxes[..., None, :3])[..., 0, :]
    yaw = wrap_yaw(boxes[..., 6:] + torch.atan2(scene_from_dataset[1, 0], scene_from_dataset[0, 0]))
    return torch.cat([centers, boxes[..., 3:6], yaw], dim=-1)


def normals_from_depth(depth: torch.Tensor, intrinsics: torch.Tensor, *, step: int = 1) -> torch.Tensor:
    """
    Surface normals of depth maps, from differences between pixels `step` apart.

    Along each image axis the neighbour of the two that is nearer in depth is used, so that a normal does not mix the
    two sides of an edge. Exact on planes for every `step`.

    Convention:
        - Camera frame, unit length, facing the camera (`normal . point <= 0`).
        - `(0, 0, 0)` where the depth is invalid or no neighbour along one of the axes is valid.

    Args:
        depth (`torch.Tensor` of shape `(..., height, width)`):
            Z-depth; `0` is invalid.
        intrinsics (`torch.Tensor` of shape `(..., 3, 3)`):
            Pinhole matrices in pixels, at the resolution of `depth`.
        step (`int`, defaults to 1):
            Distance in pixels. A larger one averages out the noise of a sensor and rounds off smaller details.

    Returns:
        `torch.Tensor` of shape `(..., height, width, 3)`: Normals in the camera frame.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import normals_from_depth
        >>> intrinsics = torch.tensor([[2.0, 0, 1], [0, 4, 0], [0, 0, 1]])
        >>> normals_from_depth(torch.full((2, 3), 5.0), intrinsics)[1, 2].tolist()
        [0.0, 0.0, -1.0]
    """
    points = unproject_depth(depth, intrinsics)
    along_u, has_u = _smaller_difference(points, dim=-2, step=step)
    along_v, has_v = _smaller_difference(points, dim=-3, step=step)
    normals = torch.linalg.cross(along_v, along_u)
    length = torch.linalg.vector_norm(normals, dim=-1, keepdim=True)
    known = (has_u & has_v)[..., None] & (length > 0)
    # Down times right is towards the camera for every depth map, so no normal needs turning. `+ 0` turns -0 into 0.
    return torch.where(known, normals / torch.where(known, length, 1.0), 0.0) + 0


def _smaller_difference(points: torch.Tensor, *, dim: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Difference between a pixel and the one `step` after or before it along `dim`, and where there is one."""
    pairs = max(points.shape[dim] - step, 0)
    later, earlier = points.narrow(dim, points.shape[dim] - pairs, pairs), points.narrow(dim, 0, pairs)
    difference = torch.where((later[..., 2:] > 0) & (earlier[..., 2:] > 0), later - earlier, torch.inf)
    padding = torch.full_like(points.narrow(dim, 0, points.shape[dim] - pairs), torch.inf)
    forward = torch.cat([difference, padding], dim=dim)
    backward = torch.cat([padding, difference], dim=dim)
    nearer = torch.where((forward[..., 2:].abs() <= backward[..., 2:].abs()), forward, backward)
    exists = torch.isfinite(nearer[..., 2])
    return torch.where(exists[..., None], nearer, 0.0), exists


def estimate_normals(
    points: torch.Tensor, *, camera_centers: torch.Tensor | None = None, num_neighbors: int = 16
) -> torch.Tensor:
    """
    Surface normals of a point cloud: the direction in which the nearest neighbours vary least.

    Neighbours are found by scipy's k-d tree, or by comparing all pairs, which takes quadratic time, where scipy is not
    installed.

    Source: Hoppe et al., "Surface reconstruction from unorganized points" (SIGGRAPH 1992), section 3.2.

    Convention:
        - Unit length, in the frame of `points`. A normal faces the camera nearest to its point; without cameras, its z
          is not negative.

    Args:
        points (`torch.Tensor` of shape `(num_points, 3)`):
            At least three points.
        camera_centers (`torch.Tensor` of shape `(num_cameras, 3)`, *optional*):
            Camera centres in the frame of `points`.
        num_neighbors (`int`, defaults to 16):
            Neighbours per point, itself included; at most `num_points` are used.

    Returns:
        `torch.Tensor` of shape `(num_points, 3)`: Normals, without gradient.

    Raises:
        ValueError: If there are fewer than three points or neighbours.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import estimate_normals
        >>> floor = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [2, 1, 0]])
        >>> estimate_normals(floor, camera_centers=torch.tensor([[0.0, 0, -3]]), num_neighbors=4)[0].round().tolist()
        [0.0, 0.0, -1.0]
    """
    _check_shape("points", points, ("num_points", 3))
    num_neighbors = min(num_neighbors, len(points))
    if num_neighbors < 3:
        raise ValueError(
            f"Normals need at least 3 points and 3 neighbours, got {len(points)} points and `num_neighbors`="
            f"{num_neighbors}. Pass `normals` with the cloud."
        )
    with torch.no_grad():
        normals = torch.empty_like(points)
        # Chunks bound the memory: a chunk holds 16 neighbours of 65,536 points, 25 MB in float64.
        for rows, neighbors in _neighbor_chunks(points, num_neighbors):
            near = points[neighbors].double()
            near = near - near.mean(dim=1, keepdim=True)
            # Ascending eigenvalues: the first eigenvector is the direction of least variance.
            normals[rows] = torch.linalg.eigh(near.transpose(1, 2) @ near).eigenvectors[..., 0].to(points)
        if camera_centers is None or len(camera_centers) == 0:
            return torch.where(normals[:, 2:] < 0, -normals, normals) + 0
        towards = torch.empty_like(points)
        for rows in torch.arange(len(points), device=points.device).split(65_536):
            towards[rows] = camera_centers[torch.cdist(points[rows], camera_centers).argmin(dim=1)] - points[rows]
        return torch.where((normals * towards).sum(dim=1, keepdim=True) < 0, -normals, normals) + 0


def _neighbor_chunks(points: torch.Tensor, num_neighbors: int):
    """Yield rows and the indices of their nearest points, `(rows,)` and `(rows, num_neighbors)`."""
    indices = torch.arange(len(points), device=points.device)
    if cKDTree is None:
        if len(points) > 20_000:
            logger.warning_once(
                f"Finding the neighbours of {len(points)} points without scipy takes minutes. Run `pip install geode-vlm[geometry]`."
            )
        for rows in indices.split(max(1, 2**24 // len(points))):
            distances = torch.cdist(points[rows], points, compute_mode="donot_use_mm_for_euclid_dist")
            yield rows, distances.topk(num_neighbors, dim=1, largest=False).indices
        return
    array = points.detach().cpu().numpy()
    tree = cKDTree(array)
    for rows in indices.split(65_536):
        neighbors = tree.query(array[int(rows[0]) : int(rows[-1]) + 1], k=num_neighbors)[1]
        yield rows, torch.from_numpy(neighbors).to(points.device)


def farthest_point_indices(points: torch.Tensor, num_points: int) -> torch.Tensor:
    """
    Choose points one by one, each the farthest from those chosen before.

    Source: Eldar et al., "The farthest point strategy for progressive image sampling" (1997), on a finite set.

    Convention:
        - The first choice is point 0, and ties go to the lowest index, so the choice is deterministic.

    Args:
        points (`torch.Tensor` of shape `(..., num_points_in, 3)`):
            Clouds.
        num_points (`int`):
            How many to choose, at most `num_points_in`.

    Returns:
        `torch.Tensor` of shape `(..., num_points)`: Distinct indices, in the order of choice.

    Raises:
        ValueError: If there are fewer points than to be chosen.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import farthest_point_indices
        >>> points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [5, 0, 0], [3, 0, 0]])
        >>> farthest_point_indices(points, 3).tolist()
        [0, 2, 3]
    """
    _check_shape("points", points, ("num_points", 3))
    if points.shape[-2] < num_points:
        raise ValueError(f"`num_points` must be at most the {points.shape[-2]} points of `points`, got {num_points}.")
    points = points.detach()
    nearest = torch.full_like(points[..., 0], torch.inf)
    chosen = torch.zeros(*points.shape[:-2], num_points, dtype=torch.long, device=points.device)
    for step in range(num_points):
        # argmax() may return any of several maxima; the first True of a byte tensor is unique.
        index = (nearest == nearest.amax(dim=-1, keepdim=True)).to(torch.uint8).argmax(dim=-1)
        chosen[..., step] = index
        picked = points.gather(-2, index[..., None, None].expand(*index.shape, 1, 3))
        nearest = torch.minimum(nearest, ((points - picked) ** 2).sum(dim=-1))
        # Below every distance, so that coincident points are not chosen twice.
        nearest = nearest.scatter(-1, index[..., None], -1.0)
    return chosen


def median_camera_distance(points: torch.Tensor, camera_centers: torch.Tensor) -> torch.Tensor:
    """
    Median distance over all pairs of a camera and a point.

    At most 16,384 points and 64 cameras are used, evenly spaced in their order, which bounds the work.

    Convention:
        - The lower of the two middle values for an even number of pairs. In the unit of `points`.

    Args:
        points (`torch.Tensor` of shape `(num_points, 3)`):
            At least one point.
        camera_centers (`torch.Tensor` of shape `(num_cameras, 3)`):
            At least one camera centre, in the frame of `points`.

    Returns:
        `torch.Tensor` of shape `()`: The median distance.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import median_camera_distance
        >>> points = torch.tensor([[0.0, 3, 4], [0, 0, 1], [0, 0, 9]])
        >>> median_camera_distance(points, torch.zeros(1, 3)).item()
        5.0
    """
    points = points[evenly_spaced_indices(len(points), 16_384)]
    camera_centers = camera_centers[evenly_spaced_indices(len(camera_centers), 64)]
    return torch.cdist(points, camera_centers, compute_mode="donot_use_mm_for_euclid_dist").flatten().median()


def evenly_spaced_indices(count: int, num_indices: int) -> list[int]:
    """
    Up to `num_indices` indices below `count`, evenly spaced, first and last included.

    Args:
        count (`int`):
            Number of items to choose from.
        num_indices (`int`):
            Number of items to choose; all of them if there are no more.

    Returns:
        `list[int]`: Increasing indices. A single one is the first.

    Example:
        >>> from geode.modeling_geode.geometry_geode import evenly_spaced_indices
        >>> evenly_spaced_indices(10, 4), evenly_spaced_indices(3, 5), evenly_spaced_indices(7, 1)
        ([0, 3, 6, 9], [0, 1, 2], [0])
    """
    if num_indices >= count:
        return list(range(count))
    # Integer arithmetic: a rounded float would pick differently across platforms at exact halves.
    return [index * (count - 1) // max(num_indices - 1, 1) for index in range(num_indices)]


def voxel_representatives(
    points: torch.Tensor, voxel_size: float, *, origin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One point per occupied voxel: the one nearest to the voxel's centre.

    The choice does not depend on the order in which a cloud is thinned: representatives of parts, thinned again
    together, are those of the whole. Ties go to the lowest index.

    Args:
        points (`torch.Tensor` of shape `(num_points, 3)`):
            Points.
        voxel_size (`float`):
            Edge of a voxel in the unit of `points`.
        origin (`torch.Tensor` of shape `(3,)`):
            A corner of the voxel grid.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shapes `(num_voxels,)` and `(num_points,)`: Increasing indices into
        `points`, one per voxel, and for every point the position of its voxel among them.

    Raises:
        ValueError: If the cloud is more than 2,097,152 voxels wide.

    Example:
        >>> import torch
        >>> from geode.modeling_geode.geometry_geode import voxel_representatives
        >>> points = torch.tensor([[0.1, 0.1, 0.1], [1.2, 0.5, 0.5], [0.4, 0.5, 0.5]])
        >>> rows, voxel_of_point = voxel_representatives(points, 1.0, origin=torch.zeros(3))
        >>> rows.tolist(), voxel_of_point.tolist()
        ([1, 2], [1, 0, 1])
    """
    if len(points) == 0:
        return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    scaled = (points - origin) / voxel_size
    cells = torch.floor(scaled)
    off_center = ((scaled - cells - 0.5) ** 2).sum(dim=1)
    # Before they become integers, which wrap around.
    cells = cells - cells.min(dim=0).values
    width = float(cells.max()) + 1
    # 21 bits an axis fill 63 bits, the positive range of an int64 key.
    if not width <= 2**21:
        raise ValueError(
            f"The cloud is {width:.10g} voxels of edge {voxel_size:.4g} wide; at most {2**21} fit. Drop outliers or "
            "enlarge the voxels."
        )
    cells = cells.long()
    keys = (cells[:, 0] << 42) | (cells[:, 1] << 21) | cells[:, 2]
    order = torch.argsort(off_center, stable=True)
    order = order[torch.argsort(keys[order], stable=True)]
    starts = torch.ones(len(points), dtype=torch.bool, device=points.device)
    starts[1:] = keys[order[1:]] != keys[order[:-1]]
    rows, by_row = order[starts].sort()
    position = torch.empty_like(by_row)
    position[by_row] = torch.arange(len(by_row), device=points.device)
    voxel_of_point = torch.empty_like(order)
    voxel_of_point[order] = position[starts.cumsum(dim=0) - 1]
    return rows, voxel_of_point
