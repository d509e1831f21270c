# SPDX-License-Identifier: Apache-2.0
"""
What [`SceneGeometry`] is built from: reading, checking and thinning of inputs. Not a public interface.

Each `to_` function turns an array into a CPU tensor, in float64 where it is geometry. Each `check_` function raises
with the values that are wrong. A `cloud` is a list of points, colours and, where known, normals.
"""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from .alignment_geode import Floor, find_floor
from .geometry_geode import (
    estimate_normals,
    invert_rigid,
    median_camera_distance,
    normals_from_depth,
    rotation_aligning_to_z,
    transform_points,
    unproject_depth,
    voxel_representatives,
)
from .shown_geode import shown


logger = logging.get_logger(__name__)

# A cloud of unknown scale is voxelised as if its cameras were, in the median, this far from its points.
NOMINAL_DISTANCE_M = 2.5
# The floor is this percentile of the points' heights: low enough to lie in the floor's points wherever it is seen,
# high enough to ignore stray points below it.
FLOOR_PERCENTILE = 1.0
# Points whose confidence lies in this lowest part are dropped, as VGGT's authors suggest.
DROPPED_CONFIDENCE_FRACTION = 0.2
# Guards against wrong units and runaway memory; no room comes near them.
MAX_INPUT_POINTS = 50_000_000
MAX_EXTENT_M = 1000.0
# Squares of coordinates must stay within float32, and copies of arrays within memory.
MAX_COORDINATE = 1e12
MAX_ARRAY_BYTES = 8 * 1024**3
# What gravity and the camera's height are read from: points of about this spacing at the nominal distance.
ROUGH_SPACING_M = 0.05
ROUGH_PIXELS = 200_000


class KnownLength(NamedTuple):
    """
    A distance that the caller knows, between the surfaces that two pixels show.

    Args:
        start (`tuple[int, float, float]`): Frame, column u and row v of one end, in pixels of the reconstructed frames.
        end (`tuple[int, float, float]`): The other end; the frames may differ.
        length_m (`float`): The distance in metres.
    """

    start: tuple[int, float, float]
    end: tuple[int, float, float]
    length_m: float


class ReconstructedFrames(NamedTuple):
    """One scene out of VGGT: depth, confidence `(N, H, W)`, intrinsics, `world_from_cam`, images `(N, H, W, 3)`."""

    depth: torch.Tensor
    confidence: torch.Tensor
    intrinsics: torch.Tensor
    world_from_cam: torch.Tensor
    images: torch.Tensor


def kind_of(value) -> str:
    """Dtype of an array, or the type of anything else, for messages."""
    return str(value.dtype) if isinstance(value, (torch.Tensor, np.ndarray)) else type(value).__name__


def to_tensor(name: str, value) -> torch.Tensor:
    """A CPU tensor of the same dtype, of real numbers."""
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            raise TypeError(f"`{name}` must hold real numbers, got {value.dtype}.")
        return value.detach().cpu()
    if not isinstance(value, (np.ndarray, list, tuple)):
        raise TypeError(f"`{name}` must be an array or a tensor, got {kind_of(value)}.")
    if isinstance(value, np.ndarray) and value.nbytes > MAX_ARRAY_BYTES:
        raise ValueError(
            f"`{name}` may have at most {MAX_ARRAY_BYTES} bytes, got shape {value.shape} of {value.nbytes} bytes. Use fewer "
            "frames, or thin the cloud."
        )
    try:
        # A copy in C order: torch refuses negative strides (`image[..., ::-1]`) and warns about read-only arrays.
        array = np.array(value, order="C")
    except ValueError as error:
        raise ValueError(f"`{name}` must be an array with rows of one length, got {shown(value)}: {error}") from error
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(f"`{name}` must hold real numbers of at most 64 bits, got {array.dtype} ({shown(value)}).")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def to_number(name: str, value) -> float:
    """A finite number as a float."""
    number = math.nan
    if not isinstance(value, (bool, str, bytes, bytearray)):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = float(value)
    if not math.isfinite(number):
        kind = ValueError if isinstance(value, (int, float)) else TypeError
        raise kind(f"`{name}` must be a finite number, got {shown(value)}.")
    return number


def to_points(name: str, value) -> torch.Tensor:
    """Finite points, `(num_points, 3)`, float64."""
    points = to_tensor(name, value).double()
    if points.dim() != 2 or points.shape[1] != 3 or len(points) == 0:
        raise ValueError(
            f"`{name}` must have shape (num_points, 3) with at least one point, got {tuple(points.shape)}."
        )
    check_finite(name, points)
    check_magnitude(name, points)
    return points


def to_colors(colors, points: torch.Tensor) -> torch.Tensor:
    """Colours in [0, 1], float64; zeros for `None`."""
    if colors is None:
        return torch.zeros_like(points)
    colors = to_tensor("colors", colors)
    check_same_shape("colors", colors, points)
    if colors.dtype == torch.uint8:
        return colors.double() / 255
    if not colors.is_floating_point():
        raise TypeError(f"`colors` must be uint8, or floating point in [0, 1], got {colors.dtype}.")
    return colors.double()


def to_normals(normals, points: torch.Tensor) -> torch.Tensor:
    """Unit normals, float64."""
    normals = to_tensor("normals", normals).double()
    check_same_shape("normals", normals, points)
    check_finite("normals", normals)
    length = torch.linalg.vector_norm(normals, dim=1, keepdim=True)
    if bool((length == 0).any()):
        raise ValueError(
            f"`normals` must have positive length, got {int((length == 0).sum())} zeros of {len(normals)}. Leave "
            "`normals` out to have them estimated."
        )
    return normals / length


def to_cameras(world_from_cam, intrinsics, timestamps_s) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Poses, intrinsics and times, float64; no cameras for `None`."""
    if (world_from_cam is None) != (intrinsics is None):
        missing = "world_from_cam" if world_from_cam is None else "intrinsics"
        raise ValueError(f"Cameras need both `world_from_cam` and `intrinsics`, got no `{missing}`.")
    if world_from_cam is None:
        world_from_cam, intrinsics = torch.zeros(0, 4, 4), torch.zeros(0, 3, 3)
    if timestamps_s is not None:
        timestamps_s = to_tensor("timestamps_s", timestamps_s).double()
    poses, intrinsics = to_tensor("world_from_cam", world_from_cam), to_tensor("intrinsics", intrinsics)
    return poses.double(), intrinsics.double(), timestamps_s


def to_images(images, depth: torch.Tensor) -> torch.Tensor | None:
    """Images, uint8, of the size of the depth."""
    if images is None:
        return None
    images = to_tensor("images", images)
    if images.dtype != torch.uint8:
        raise TypeError(f"`images` must be uint8 in 0..255, got {images.dtype}.")
    if tuple(images.shape) != (*depth.shape, 3):
        raise ValueError(
            f"`images` must have shape {(*depth.shape, 3)} to match `depth`, got {tuple(images.shape)}. Resize them "
            "to the depth, or the depth (nearest neighbour) and its `intrinsics` (`resize_intrinsics`) to them."
        )
    return images


def confident_pixels(depth_confidence, depth: torch.Tensor) -> torch.Tensor:
    """Pixels to use: those of positive depth, without the lowest fifth in confidence."""
    valid = torch.isfinite(depth) & (depth > 0)
    if not bool(valid.any()):
        raise ValueError(f"`depth` must have valid values, got none above 0 in {depth.numel()} pixels.")
    if depth_confidence is None:
        return valid
    confidence = to_tensor("depth_confidence", depth_confidence)
    check_same_shape("depth_confidence", confidence, depth)
    check_finite("depth_confidence", confidence[valid])
    rank = math.floor(DROPPED_CONFIDENCE_FRACTION * int(valid.sum())) + 1
    return valid & (confidence >= confidence[valid].kthvalue(rank).values)


def check_same_shape(name: str, value: torch.Tensor, other: torch.Tensor) -> None:
    """Raise unless the shapes agree."""
    if value.shape != other.shape:
        raise ValueError(f"`{name}` must have shape {tuple(other.shape)}, got {tuple(value.shape)}.")


def check_finite(name: str, value: torch.Tensor) -> None:
    """Raise if there are NaN or infinite values."""
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise ValueError(
            f"`{name}` must be finite, got {bad} NaN or infinite values of {value.numel()}. Drop them first."
        )


def check_magnitude(name: str, value: torch.Tensor) -> None:
    """Raise if a finite length is so large that its square is not."""
    most = max(abs(float(end)) for end in value.aminmax()) if value.numel() else 0.0
    if most > MAX_COORDINATE:
        raise ValueError(
            f"`{name}` must lie within {MAX_COORDINATE:g} of 0 in every coordinate, got {most:.4g}. Drop outliers, or choose a "
            "larger unit."
        )


def check_dtype(name: str, value, dtype: torch.dtype) -> None:
    """Raise unless the value is a CPU tensor of that dtype."""
    if not isinstance(value, torch.Tensor) or value.dtype != dtype or value.device.type != "cpu":
        raise TypeError(
            f"`{name}` must be a {dtype} tensor on the CPU, got {kind_of(value)}. `SceneGeometry.from_point_cloud` "
            "and `SceneGeometry.from_rgbd` convert arrays."
        )


def check_count(count: int, max_input_points: int) -> None:
    """Raise if there are more points than memory is planned for."""
    check_whole("max_input_points", max_input_points)
    if count > max_input_points:
        raise ValueError(
            f"At most `max_input_points`={max_input_points:,} points are taken, got {count:,}. Use fewer frames or "
            "thin the cloud, or raise the limit if the memory allows."
        )


def check_whole(name: str, value) -> None:
    """Raise unless a count is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be a whole number, got {shown(value)}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def check_flag(name: str, value) -> None:
    """Raise unless a switch is on or off."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {shown(value)}.")


def check_voxel_size(voxel_size_m: float) -> None:
    """Raise unless the voxel size is positive."""
    _check_positive("voxel_size_m", voxel_size_m)


def _check_positive(name: str, value) -> float:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{name}` must be positive, got {value}.")
    number = to_number(name, value)
    if number <= 0:
        raise ValueError(f"`{name}` must be positive, got {value}.")
    return number


def check_depth(depth: torch.Tensor, max_input_points: int) -> None:
    """Raise unless depth is a stack of floating-point maps without negative values."""
    if not depth.is_floating_point():
        raise TypeError(
            f"`depth` must be floating point, got {depth.dtype}. Sensors store millimetres as integers: divide by "
            "1000."
        )
    if depth.dim() != 3 or 0 in depth.shape:
        raise ValueError(
            f"`depth` must have shape (num_frames, height, width), none of them 0, got {tuple(depth.shape)}."
        )
    check_count(depth.numel(), max_input_points)
    if bool((depth < 0).any()):
        raise ValueError(
            f"`depth` must not be negative, got a minimum of {float(depth[depth < 0].min()):.4g}. Mark invalid pixels "
            "with 0; cameras look along +z."
        )
    check_magnitude("depth", torch.where(torch.isfinite(depth), depth, 0.0))


def check_cloud(points: torch.Tensor, colors: torch.Tensor, normals: torch.Tensor) -> None:
    """Raise unless points, colours and normals fit together and are valid."""
    if points.dim() != 2 or points.shape[1] != 3 or len(points) == 0:
        raise ValueError(
            f"`points` must have shape (num_points, 3) with at least one point, got {tuple(points.shape)}."
        )
    for name, value in (("points", points), ("colors", colors), ("normals", normals)):
        check_same_shape(name, value, points)
        check_finite(name, value)
    check_magnitude("points", points)
    low, high = float(colors.min()), float(colors.max())
    if low < 0 or high > 1:
        raise ValueError(f"`colors` must lie in [0, 1], got {low:.4g} to {high:.4g}. Give 0..255 as uint8.")
    error = float((torch.linalg.vector_norm(normals, dim=1) - 1).abs().max())
    if error > 1e-3:
        raise ValueError(f"`normals` must have unit length, got one that is {error:.4g} off.")


def check_cameras(world_from_cam, intrinsics, image_size, timestamps_s) -> None:
    """Raise unless poses, intrinsics, image size and times fit together and are valid."""
    count = len(world_from_cam) if world_from_cam.dim() else 0
    if tuple(world_from_cam.shape) != (count, 4, 4):
        raise ValueError(f"`world_from_cam` must have shape (num_cameras, 4, 4), got {tuple(world_from_cam.shape)}.")
    if tuple(intrinsics.shape) != (count, 3, 3):
        raise ValueError(
            f"`intrinsics` must have shape {(count, 3, 3)} to match the {count} poses of `world_from_cam`, got "
            f"{tuple(intrinsics.shape)}. To share one camera across frames, expand it first."
        )
    if timestamps_s is not None:
        check_dtype("timestamps_s", timestamps_s, torch.float64)
        if tuple(timestamps_s.shape) != (count,):
            raise ValueError(f"`timestamps_s` must have shape {(count,)}, got {tuple(timestamps_s.shape)}.")
        check_finite("timestamps_s", timestamps_s)
    if not count:
        return
    sizes_fit = isinstance(image_size, tuple) and len(image_size) == 2
    if not sizes_fit or not all(isinstance(side, int) and side > 0 for side in image_size):
        raise ValueError(f"`image_size` must be (height, width) in whole pixels with cameras, got {image_size!r}.")
    check_rigid("world_from_cam", world_from_cam)
    check_magnitude("world_from_cam", world_from_cam)
    check_intrinsics(intrinsics)


def check_rigid(name: str, matrices: torch.Tensor) -> None:
    """Raise unless every matrix is a rotation and a translation."""
    if tuple(matrices.shape[1:]) != (4, 4):
        raise ValueError(f"`{name}` must be made of 4x4 matrices, got shape {tuple(matrices.shape[1:])}.")
    finite = torch.isfinite(matrices).flatten(1).all(dim=1)
    if not bool(finite.all()):
        raise ValueError(
            f"`{name}` must be finite, but is not at {_which(~finite)}. Leave out frames that lost tracking."
        )
    rotation = matrices[:, :3, :3].double()
    error = (rotation @ rotation.transpose(1, 2) - torch.eye(3, dtype=torch.float64)).abs().amax(dim=(1, 2))
    determinant = torch.linalg.det(rotation)
    # Poses written with four decimals are within 1e-3.
    if bool((error > 1e-3).any()) or bool((determinant < 0).any()):
        raise ValueError(
            f"`{name}` must hold rotations (orthonormal, determinant 1), got an error of {float(error.max()):.3g} and "
            f"a least determinant of {float(determinant.min()):.3g} at {_which((error > 1e-3) | (determinant < 0))}."
        )
    bottom = matrices[:, 3] != torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=matrices.dtype)
    if bool(bottom.any()):
        raise ValueError(f"`{name}` must have the last row (0, 0, 0, 1), but has not at {_which(bottom.any(dim=1))}.")


def check_intrinsics(intrinsics: torch.Tensor) -> None:
    """Raise unless every matrix is a pinhole without skew."""
    check_finite("intrinsics", intrinsics)
    focal = torch.stack([intrinsics[:, 0, 0], intrinsics[:, 1, 1]], dim=1)
    if bool((focal <= 0).any()):
        raise ValueError(f"`intrinsics` must have positive focal lengths, got {float(focal.min()):.4g}.")
    check_magnitude("intrinsics", intrinsics)
    rest = intrinsics.clone()
    rest[:, 0, 0] = rest[:, 1, 1] = 1
    rest[:, :2, 2] = 0
    wrong = (rest != torch.eye(3, dtype=rest.dtype)).flatten(1).any(dim=1)
    if bool(wrong.any()):
        first = intrinsics[int(wrong.nonzero()[0])]
        raise ValueError(
            "`intrinsics` must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels, without skew, got "
            f"{first.tolist()} at {_which(wrong)}."
        )


def _which(flags: torch.Tensor) -> str:
    indices = flags.nonzero().flatten().tolist()
    more = ", ..." if len(indices) > 8 else ""
    return f"indices [{', '.join(map(str, indices[:8]))}{more}]"


def check_extent(points: torch.Tensor, *, is_turned: bool = True) -> None:
    """Raise if a metric cloud is wider than any scene. One that is still to be turned may be less wide then."""
    extent = float((points.max(dim=0).values - points.min(dim=0).values).max())
    if extent > MAX_EXTENT_M * (1 if is_turned else math.sqrt(3)):
        raise ValueError(
            f"A metric cloud may be at most {MAX_EXTENT_M:g} m wide, got {extent:.4g} m. Check the unit "
            "(millimetres?), drop outliers, or pass `is_metric=False`."
        )


def rigid_matrix(rotation: torch.Tensor, translation: torch.Tensor) -> torch.Tensor:
    """A rigid map, `(4, 4)`."""
    matrix = torch.eye(4, dtype=rotation.dtype)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = translation
    return matrix


def upright_rotation(up, poses: torch.Tensor, rough: Callable) -> tuple[torch.Tensor, str]:
    """The smallest rotation that takes up to +z, and where up comes from. `rough` gives a cloud to find a floor in."""
    if isinstance(up, str):
        if up != "floor":
            raise ValueError(f"`up` must be a direction of 3 numbers or 'floor', got {up!r}.")
        # The cameras' mean up is near the truth: how they are tilted and rolled averages out.
        prior = -poses[:, :3, 1].mean(dim=0) if len(poses) else torch.tensor([0.0, 0.0, 1.0])
        if float(torch.linalg.vector_norm(prior)) < 0.1:
            prior = -poses[0, :3, 1]  # cameras that hang every way up say nothing together
        floor = floor_of(rough(), prior)
        if floor is not None:
            return rotation_aligning_to_z(floor.up), "estimated"
        logger.warning(
            "No floor was found, so the first camera is taken to be held upright. Give the direction as `up` if you know it."
        )
    elif up is not None:
        up = to_tensor("up", up).double()
        if tuple(up.shape) != (3,):
            raise ValueError(f"`up` must be one direction of 3 numbers, got shape {tuple(up.shape)}.")
        return rotation_aligning_to_z(up), "given"
    if len(poses):
        return rotation_aligning_to_z(-poses[0, :3, 1]), "assumed"
    return torch.eye(3, dtype=torch.float64), "assumed"


class RoughCloud(NamedTuple):
    """Points evenly spread over the surfaces, their unit normals, and the median distance to the cameras."""

    points: torch.Tensor
    normals: torch.Tensor
    distance: float


def floor_of(rough: RoughCloud, prior: torch.Tensor) -> Floor | None:
    """The floor of a cloud, if one is seen."""
    return find_floor(rough.points, rough.normals, prior=prior, distance=rough.distance)


def height_above_floor(center: torch.Tensor, up: torch.Tensor, rough: RoughCloud) -> float:
    """How high a point is above the floor; where no floor is seen, above the lowest things."""
    floor = floor_of(rough, up)
    if floor is not None:
        # A plane through the floor averages out the noise that a percentile of the heights picks up.
        return float(center @ up) - floor.height
    logger.warning(
        "No floor was found, so heights count from the lowest things that are seen, and a scale from the camera's height "
        "may be off. Another source of scale needs no floor."
    )
    return float(center @ up) - float(floor_height((rough.points @ up)[:, None].expand(-1, 3)))


def rough_cloud(depth, intrinsics, poses) -> RoughCloud:
    """A coarse cloud of depth maps."""
    step = max(1, math.ceil(math.sqrt(depth.numel() / ROUGH_PIXELS)))
    depth, intrinsics = depth[:, ::step, ::step], intrinsics.clone()
    intrinsics[:, :2] /= step
    keep = depth > 0
    unit = nominal_unit(*sparse_points(depth, keep, intrinsics, poses))
    frames = zip(depth, keep, intrinsics, poses, strict=True)
    clouds = [
        frame_cloud(one, valid, None, camera, pose, ROUGH_SPACING_M * unit) for one, valid, camera, pose in frames
    ]
    cloud = thin_by_voxels([torch.cat(parts) for parts in zip(*clouds, strict=True)], ROUGH_SPACING_M * unit)
    return RoughCloud(cloud[0], torch.nn.functional.normalize(cloud[2], dim=1), unit * NOMINAL_DISTANCE_M)


def spread_cloud(points, normals, centers) -> RoughCloud:
    """A coarse version of a cloud."""
    unit = nominal_unit(points, centers)
    cloud = [points] if normals is None else [points, points, to_normals(normals, points)]
    cloud = thin_by_voxels(cloud, ROUGH_SPACING_M * unit)
    normals = estimate_normals(cloud[0], camera_centers=centers) if normals is None else cloud[2]
    return RoughCloud(cloud[0], torch.nn.functional.normalize(normals, dim=1), unit * NOMINAL_DISTANCE_M)


def reconstructed_frames(output, pixel_values, scene_index: int) -> ReconstructedFrames:
    """Take one scene out of VGGT's output, on the CPU and in float64, and check its cameras."""
    missing = [name for name in ("extrinsics", "depth") if getattr(output, name) is None]
    if missing:
        raise ValueError(f"`output` must have cameras and depth, got no {missing}. Run `heads=('camera', 'depth')`.")
    pixel_values = to_tensor("pixel_values", pixel_values)
    shape = tuple(output.depth.shape[:4])
    if pixel_values.dim() != 5 or (*pixel_values.shape[:2], *pixel_values.shape[3:]) != shape:
        raise ValueError(
            "`pixel_values` must be the frames that `output` was made from, of shape "
            f"{(*shape[:2], 3, *shape[2:])}, got {tuple(pixel_values.shape)}."
        )
    depth, confidence, extrinsics, intrinsics = (
        value[scene_index].detach().cpu().double()
        for value in (output.depth, output.depth_confidence, output.extrinsics, output.intrinsics)
    )
    cameras = torch.cat([extrinsics.flatten(1), intrinsics.flatten(1)], dim=1)
    lost = (~torch.isfinite(cameras).all(dim=1)).nonzero().flatten().tolist()
    if lost:
        raise ValueError(
            f"VGGT found no camera for frames {lost} of {len(depth)} (a field of view of 0 or no rotation). Leave these "
            "frames out, and check that the model is a trained one."
        )
    cam_from_world = torch.eye(4, dtype=torch.float64).repeat(len(depth), 1, 1)
    cam_from_world[:, :3] = extrinsics
    images = (pixel_values[scene_index].float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    return ReconstructedFrames(depth[..., 0], confidence, intrinsics, invert_rigid(cam_from_world), images)


def usable_pixels(frames: ReconstructedFrames, content_boxes, min_confidence: float | None) -> torch.Tensor:
    """Pixels of finite depth that are no padding and confident enough, `(num_frames, height, width)`."""
    depth = frames.depth
    inside = torch.ones_like(depth, dtype=torch.bool)
    if content_boxes is not None:
        boxes = to_tensor("content_boxes", content_boxes)
        if tuple(boxes.shape) != (len(depth), 4):
            raise ValueError(f"`content_boxes` must have shape {(len(depth), 4)}, got {tuple(boxes.shape)}.")
        rows, columns = torch.arange(depth.shape[1])[:, None], torch.arange(depth.shape[2])
        left, top, right, bottom = (side[:, None, None] for side in boxes.unbind(dim=1))
        inside = (columns >= left) & (columns < right) & (rows >= top) & (rows < bottom)
    inside &= torch.isfinite(depth)
    if min_confidence is None:
        return confident_pixels(frames.confidence, torch.where(inside, depth, 0.0))
    keep = inside & (depth > 0) & (frames.confidence >= min_confidence)
    if not bool(keep.any()):
        raise ValueError(
            f"`min_confidence` {min_confidence} drops every pixel: confidence lies between "
            f"{float(frames.confidence.min()):.4g} and {float(frames.confidence.max()):.4g}. Lower it, or leave it out."
        )
    return keep


def known_ends(known: KnownLength, frames: ReconstructedFrames) -> torch.Tensor:
    """The reconstructed ends of a known length, `(2, 3)`. Depth is that of the nearest pixel: edges must not mix."""
    ends = []
    num_frames, height, width = frames.depth.shape
    for frame, u, v in (known.start, known.end):
        column, row = round(u), round(v)
        if not (0 <= frame < num_frames and 0 <= column < width and 0 <= row < height):
            raise ValueError(
                f"The ends of `known_length` must be (frame, u, v) within {num_frames} frames of {height} x {width} "
                f"pixels, got {(frame, u, v)}."
            )
        z = frames.depth[frame, row, column]
        if not (bool(torch.isfinite(z)) and float(z) > 0):
            raise ValueError(f"There is no depth at the end {(frame, u, v)} of `known_length`. Choose another pixel.")
        ray = torch.linalg.solve(frames.intrinsics[frame], torch.tensor([u, v, 1.0], dtype=torch.float64))
        ends.append(transform_points(frames.world_from_cam[frame], (z * ray)[None])[0])
    return torch.stack(ends)


def check_factor(metres_per_unit: float) -> float:
    """Return a scale, once it is known to be positive."""
    return _check_positive("metres_per_unit", metres_per_unit)


def box_center(points: torch.Tensor) -> torch.Tensor:
    """Centre of the axis-aligned bounding box."""
    return (points.min(dim=0).values + points.max(dim=0).values) / 2


def nominal_unit(points: torch.Tensor, centers: torch.Tensor) -> float:
    """Length in the cloud's unit that stands for a nominal metre. Without cameras one is assumed in the middle."""
    if not len(centers):
        centers = box_center(points)[None]
    distance = float(median_camera_distance(points, centers))
    if distance == 0:
        raise ValueError(
            "A cloud of unknown scale needs points away from its cameras, but the median distance between them is 0."
        )
    return distance / NOMINAL_DISTANCE_M


def sparse_points(depth, keep, intrinsics, aligned_from_cam) -> tuple[torch.Tensor, torch.Tensor]:
    """A thinned cloud and the camera centres, enough for the median distance between them."""
    stride = max(1, depth.numel() // 65_536)
    clouds = []
    for i, pose in enumerate(aligned_from_cam):
        points = unproject_depth(_valid_depth(depth[i], keep[i]), intrinsics[i]).flatten(0, 1)
        clouds.append(transform_points(pose, points[points[:, 2] > 0][::stride]))
    return torch.cat(clouds), aligned_from_cam[:, :3, 3]


def _valid_depth(depth: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    depth = depth.double()
    return torch.where(torch.isfinite(depth) & keep, depth, 0.0)


def frame_cloud(depth, keep, image, intrinsics, aligned_from_cam, voxel_size: float) -> list[torch.Tensor]:
    """Points, colours and normals of one frame, one per voxel."""
    z = _valid_depth(depth, keep)
    valid = z > 0
    if not bool(valid.any()):
        return [torch.zeros(0, 3, dtype=torch.float64) for _ in range(3)]
    # Pixels two voxels apart: nearer ones would differ more by the sensor's noise than by the surface.
    step = round(min(2 * voxel_size * float(intrinsics[0, 0]) / float(z[valid].median()), max(z.shape)))
    normals = normals_from_depth(z, intrinsics, step=min(max(step, 1), max(1, min(z.shape) // 8)))[valid]
    points_cam = unproject_depth(z, intrinsics)[valid]
    # A pixel without neighbours has no normal of its own; it is taken to face the camera.
    facing = -points_cam / torch.linalg.vector_norm(points_cam, dim=1, keepdim=True)
    normals = torch.where((normals == 0).all(dim=1, keepdim=True), facing, normals) @ aligned_from_cam[:3, :3].T
    points = transform_points(aligned_from_cam, points_cam)
    colors = torch.zeros_like(points) if image is None else image[valid].double() / 255
    return thin_by_voxels([points, colors, normals], voxel_size)


def thin_by_voxels(
    cloud: list[torch.Tensor], voxel_size: float, *, origin: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Keep the point nearest to each voxel's centre; its normal becomes the sum of those that face the same way."""
    origin = cloud[0].new_zeros(3) if origin is None else origin
    rows, voxel_of_point = voxel_representatives(cloud[0], voxel_size, origin=origin)
    thinned = [values[rows] for values in cloud]
    if len(cloud) == 3:
        normals, own = cloud[2], thinned[2]
        same_side = (normals * own[voxel_of_point]).sum(dim=1, keepdim=True) > 0
        thinned[2] = torch.zeros_like(own).index_add(0, voxel_of_point, normals * same_side)
    return thinned


def thin_to_count(cloud: list[torch.Tensor], max_points: int | None) -> list[torch.Tensor]:
    """Keep one point per voxel, with voxels that grow until at most `max_points` are left."""
    if max_points is not None:
        check_whole("max_points", max_points)
    points, thinned = cloud[0], cloud
    origin = points.min(dim=0).values
    # The spacing of as many points on a square as wide as the cloud, so less than any that is needed.
    voxel_size = float((points - origin).max()) / math.sqrt(len(points)) or 1.0
    while max_points is not None and len(thinned[0]) > max_points:
        thinned = thin_by_voxels(cloud, voxel_size, origin=origin)
        # The count of occupied voxels on surfaces falls with the square of their edge.
        voxel_size *= max(1.05, math.sqrt(len(thinned[0]) / max_points))
    return thinned


def floor_height(points: torch.Tensor) -> torch.Tensor:
    """A low percentile of the heights."""
    return points[:, 2].kthvalue(max(1, math.ceil(FLOOR_PERCENTILE / 100 * len(points)))).values


def coarser_voxels(grid_coords: torch.Tensor, max_points: int | None) -> torch.Tensor:
    """Rows to keep so that at most `max_points` are left: of each block of voxels the one nearest to its centre."""
    rows = torch.arange(len(grid_coords))
    centers, side = grid_coords.double() + 0.5, 1.0
    while max_points is not None and len(rows) > max_points:
        side *= max(1.05, math.sqrt(len(rows) / max_points))
        rows, _ = voxel_representatives(centers, side, origin=torch.zeros(3, dtype=torch.float64))
    return rows
