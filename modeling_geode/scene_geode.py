# SPDX-License-Identifier: Apache-2.0
"""
A scene's geometry, its tensors for the model, and its encoding.

[`SceneGeometry`] brings RGB-D frames or a point cloud into the scene frame of `docs/conventions.md`: right-handed, z
up, origin on the floor below the first camera. [`SceneEncoding`] is what the model makes of a scene once, for many
questions.
"""

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from transformers.utils import logging

from .alignment_geode import (
    scale_from_camera_height,
    scale_from_depth,
    scale_from_length,
    scale_from_positions,
)
from .checked_files_geode import checked_path, read_json, read_tensors
from .collation_geode import collate_scenes
from .geometry_geode import (
    encode_camera_poses,
    estimate_normals,
    evenly_spaced_indices,
    transform_boxes,
    transform_points,
)
from .scene_encoding_geode import SceneEncoding
from .scene_files_geode import (
    FORMAT_VERSION,
    PlyCloud,
    check_version,
    read_ply,
    sealed,
    sha256_of,
    unsealed,
    write_ply,
    write_tensors,
)
from .scene_inputs_geode import (
    MAX_INPUT_POINTS,
    KnownLength,
    box_center,
    check_cameras,
    check_cloud,
    check_count,
    check_depth,
    check_dtype,
    check_extent,
    check_factor,
    check_finite,
    check_flag,
    check_rigid,
    check_voxel_size,
    check_whole,
    coarser_voxels,
    confident_pixels,
    floor_height,
    frame_cloud,
    height_above_floor,
    known_ends,
    nominal_unit,
    reconstructed_frames,
    rigid_matrix,
    rough_cloud,
    sparse_points,
    spread_cloud,
    thin_by_voxels,
    thin_to_count,
    to_cameras,
    to_colors,
    to_images,
    to_normals,
    to_points,
    to_tensor,
    upright_rotation,
    usable_pixels,
)
from .sonata_geode import prepare_point_cloud


logger = logging.get_logger(__name__)

# Where metres come from: the input was metric, or the caller knew poses, depth, one length, the camera's height or the
# factor itself.
SCALE_SOURCES = ("metric", "poses", "depth", "length", "camera_height", "factor", "unknown")
GRAVITY_SOURCES = ("given", "assumed", "estimated")

_TENSORS_FILE, _HEADER_FILE = "geometry.safetensors", "geometry.json"
_CLOUD_FIELDS = ("points", "colors", "normals", "scene_from_dataset")
_CAMERA_FIELDS = ("world_from_cam", "intrinsics", "timestamps_s")
_HEADER_FIELDS = ("image_size", "is_metric", "scale_source", "gravity", "metres_per_unit")


@dataclass(frozen=True, eq=False)
class SceneGeometry:
    """
    Points and cameras of one scene, in the scene frame.

    Build it with [`SceneGeometry.from_rgbd`] or [`SceneGeometry.from_point_cloud`], which bring any input into the
    scene frame. The constructor takes tensors that are there already and checks them.

    Convention:
        - Scene frame ("world"): right-handed, +z up, origin on the floor below the first camera. Cameras: +x right, +y
          down, +z forward. Pixel `(0, 0)` is the centre of the top-left pixel.
        - Metres if `is_metric`, otherwise the input's unit.
        - `points = metres_per_unit * (scene_from_dataset @ points_dataset)`.

    Args:
        points (`torch.Tensor` of shape `(num_points, 3)`):
            Points, float32.
        colors (`torch.Tensor` of shape `(num_points, 3)`):
            Red, green, blue in [0, 1], float32; zeros where unknown.
        normals (`torch.Tensor` of shape `(num_points, 3)`):
            Unit normals, float32.
        world_from_cam (`torch.Tensor` of shape `(num_cameras, 4, 4)`):
            Camera poses, float32. May be empty.
        intrinsics (`torch.Tensor` of shape `(num_cameras, 3, 3)`):
            Pinhole matrices in pixels at `image_size`, float32.
        image_size (`tuple[int, int]`, *optional*):
            `(height, width)` of the images that `intrinsics` stand for. Required with cameras.
        is_metric (`bool`, defaults to `True`):
            Lengths are metres.
        scale_source (`str`, defaults to `"metric"`):
            Where metres come from: `"metric"` (the input was), `"poses"`, `"depth"`, `"length"`, `"camera_height"`,
            `"factor"`, or `"unknown"` if and only if the scene is not metric.
        gravity (`str`, defaults to `"given"`):
            Where +z comes from: `"given"` by the caller, `"assumed"` (the first camera is held upright, or the input's
            +z is up) or `"estimated"`.
        scene_from_dataset (`torch.Tensor` of shape `(4, 4)`):
            Rigid map from the input's frame to the scene frame, float64.
        metres_per_unit (`float`, defaults to 1.0):
            Factor applied after that map.
        timestamps_s (`torch.Tensor` of shape `(num_cameras,)`, *optional*):
            Times of the cameras in seconds, float64.

    Raises:
        TypeError: If a tensor is missing or has the wrong dtype.
        ValueError: If shapes disagree, a value is not finite, a pose is not rigid, an intrinsics matrix is not a
            pinhole, or the cloud is empty or more than 1,000 m wide.
    """

    points: torch.Tensor
    colors: torch.Tensor
    normals: torch.Tensor
    world_from_cam: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 4, 4))
    intrinsics: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 3, 3))
    image_size: tuple[int, int] | None = None
    is_metric: bool = True
    scale_source: str = "metric"
    gravity: str = "given"
    scene_from_dataset: torch.Tensor = field(default_factory=lambda: torch.eye(4, dtype=torch.float64))
    metres_per_unit: float = 1.0
    timestamps_s: torch.Tensor | None = None

    def __post_init__(self):
        for name in ("points", "colors", "normals", "world_from_cam", "intrinsics"):
            check_dtype(name, getattr(self, name), torch.float32)
        check_dtype("scene_from_dataset", self.scene_from_dataset, torch.float64)
        check_cloud(self.points, self.colors, self.normals)
        check_cameras(self.world_from_cam, self.intrinsics, self.image_size, self.timestamps_s)
        check_rigid("scene_from_dataset", self.scene_from_dataset[None])
        check_flag("is_metric", self.is_metric)
        if (self.scale_source == "unknown") == self.is_metric or self.scale_source not in SCALE_SOURCES:
            raise ValueError(
                f"`scale_source` must be one of {SCALE_SOURCES}, 'unknown' exactly if the scene is not metric; got "
                f"{self.scale_source!r} with `is_metric`={self.is_metric}."
            )
        if self.gravity not in GRAVITY_SOURCES:
            raise ValueError(f"`gravity` must be one of {GRAVITY_SOURCES}, got {self.gravity!r}.")
        check_factor(self.metres_per_unit)
        if self.is_metric:
            check_extent(self.points)

    @classmethod
    def from_rgbd(
        cls,
        depth,
        intrinsics,
        world_from_cam,
        *,
        images=None,
        up=None,
        is_metric: bool = True,
        depth_confidence=None,
        timestamps_s=None,
        max_points: int | None = None,
        voxel_size_m: float = 0.02,
        max_input_points: int = MAX_INPUT_POINTS,
    ) -> "SceneGeometry":
        """
        Fuse posed depth maps into one thinned cloud in the scene frame.

        Of each voxel the point nearest to its centre stays, with its colour. Its normal is the mean over the pixels of
        the voxel that face the same way, which averages out the noise of the sensor.

        Args:
            depth (`np.ndarray` or `torch.Tensor` of shape `(num_frames, height, width)`):
                Z-depth, floating point, in metres if `is_metric`. Zero and non-finite values are dropped.
            intrinsics (`np.ndarray` or `torch.Tensor` of shape `(num_frames, 3, 3)`):
                Pinhole matrices in pixels, at the resolution of `depth`.
            world_from_cam (`np.ndarray` or `torch.Tensor` of shape `(num_frames, 4, 4)`):
                Poses in the input's frame, cameras with +x right, +y down, +z forward.
            images (`np.ndarray` or `torch.Tensor` of shape `(num_frames, height, width, 3)`, *optional*):
                Red, green, blue as uint8, aligned with `depth`. Without images the colours are zeros.
            up (sequence of 3 `float` or `"floor"`, *optional*):
                Direction against gravity in the input's frame, `(0, 0, 1)` for a dataset with +z up. `"floor"` takes
                the normal of the floor, and `gravity` is `"estimated"` where one is seen. Otherwise the first camera
                is taken to be held upright, and `gravity` is `"assumed"`.
            is_metric (`bool`, defaults to `True`):
                Depth and poses are in metres. Otherwise `voxel_size_m` is of the scene scaled to a median
                camera-to-point distance of 2.5.
            depth_confidence (`np.ndarray` or `torch.Tensor` of shape `(num_frames, height, width)`, *optional*):
                The lowest fifth, over all frames, is dropped.
            timestamps_s (`np.ndarray` or `torch.Tensor` of shape `(num_frames,)`, *optional*):
                Times of the frames in seconds.
            max_points (`int`, *optional*):
                Largest number of points; the voxels grow until it holds.
            voxel_size_m (`float`, defaults to 0.02):
                Edge of a voxel.
            max_input_points (`int`, defaults to 50,000,000):
                Largest number of depth pixels, a guard against running out of memory.

        Returns:
            [`SceneGeometry`]: The scene.

        Raises:
            TypeError: If `depth` is of integers (often millimetres) or `images` is not uint8.
            ValueError: If shapes disagree, no depth is valid, some depth is negative, or a camera is not valid.
        """
        check_flag("is_metric", is_metric)
        depth = to_tensor("depth", depth)
        check_depth(depth, max_input_points)
        poses, intrinsics, timestamps_s = to_cameras(world_from_cam, intrinsics, timestamps_s)
        image_size = (depth.shape[1], depth.shape[2])
        check_cameras(poses, intrinsics, image_size, timestamps_s)
        if len(poses) != len(depth):
            raise ValueError(
                f"`depth` has {len(depth)} frames and `world_from_cam` has {len(poses)}; they must agree."
            )
        images = to_images(images, depth)
        keep = confident_pixels(depth_confidence, depth)
        check_voxel_size(voxel_size_m)

        rotation, gravity = upright_rotation(
            up, poses, lambda: rough_cloud(torch.where(keep, depth, 0.0), intrinsics, poses)
        )
        aligned_from_dataset = rigid_matrix(rotation, -rotation @ poses[0, :3, 3])
        aligned_from_cam = aligned_from_dataset @ poses
        unit = 1.0 if is_metric else nominal_unit(*sparse_points(depth, keep, intrinsics, aligned_from_cam))
        clouds = [
            frame_cloud(
                depth[i], keep[i], None if images is None else images[i], intrinsics[i], pose, voxel_size_m * unit
            )
            for i, pose in enumerate(aligned_from_cam)
        ]
        cloud = [torch.cat(parts) for parts in zip(*clouds, strict=True)]
        cloud = thin_by_voxels(cloud, voxel_size_m * unit)
        # Before it is thinned further, so that the frame does not depend on `max_points`.
        floor = floor_height(cloud[0])
        return _place_on_floor(
            thin_to_count(cloud, max_points),
            floor,
            aligned_from_dataset,
            poses,
            intrinsics=intrinsics,
            image_size=image_size,
            is_metric=is_metric,
            gravity=gravity,
            timestamps_s=timestamps_s,
        )

    @classmethod
    def from_point_cloud(
        cls,
        points,
        *,
        colors=None,
        normals=None,
        world_from_cam=None,
        intrinsics=None,
        image_size: tuple[int, int] | None = None,
        up=None,
        is_metric: bool = True,
        timestamps_s=None,
        max_points: int | None = None,
        voxel_size_m: float | None = 0.02,
        max_input_points: int = MAX_INPUT_POINTS,
    ) -> "SceneGeometry":
        """
        Bring a point cloud, and the cameras that saw it if there are any, into the scene frame.

        Args:
            points (`np.ndarray` or `torch.Tensor` of shape `(num_points, 3)`):
                Points in the input's frame, in metres if `is_metric`.
            colors (`np.ndarray` or `torch.Tensor` of shape `(num_points, 3)`, *optional*):
                Red, green, blue: uint8, or floating point in [0, 1]. Without them the colours are zeros.
            normals (`np.ndarray` or `torch.Tensor` of shape `(num_points, 3)`, *optional*):
                Normals of any positive length; a voxel keeps the mean of those that face the same way. Without them
                they are estimated from 16 neighbours and face the nearest camera, or upwards.
            world_from_cam (`np.ndarray` or `torch.Tensor` of shape `(num_cameras, 4, 4)`, *optional*):
                Poses in the input's frame, cameras with +x right, +y down, +z forward. Given with `intrinsics`.
            intrinsics (`np.ndarray` or `torch.Tensor` of shape `(num_cameras, 3, 3)`, *optional*):
                Pinhole matrices in pixels at `image_size`.
            image_size (`tuple[int, int]`, *optional*):
                `(height, width)`. Required with cameras.
            up (sequence of 3 `float` or `"floor"`, *optional*):
                Direction against gravity in the input's frame, or `"floor"` for the normal of the floor. Without
                either the first camera is taken to be held upright, or, without cameras, the input's +z to be up;
                `gravity` is then `"assumed"`.
            is_metric (`bool`, defaults to `True`):
                The cloud and the poses are in metres. Otherwise `voxel_size_m` is of the scene scaled to a median
                camera-to-point distance of 2.5.
            timestamps_s (`np.ndarray` or `torch.Tensor` of shape `(num_cameras,)`, *optional*):
                Times of the cameras in seconds.
            max_points (`int`, *optional*):
                Largest number of points; the voxels grow until it holds.
            voxel_size_m (`float`, *optional*, defaults to 0.02):
                Edge of the voxels in which the point nearest to the centre stays; `None` keeps every point.
            max_input_points (`int`, defaults to 50,000,000):
                Largest number of points, a guard against running out of memory.

        Returns:
            [`SceneGeometry`]: The scene.

        Raises:
            ValueError: If the cloud is empty or not finite, shapes disagree, or a camera is not valid.
        """
        check_flag("is_metric", is_metric)
        points = to_points("points", points)
        check_count(len(points), max_input_points)
        if is_metric:
            check_extent(points, is_turned=False)
        poses, intrinsics, timestamps_s = to_cameras(world_from_cam, intrinsics, timestamps_s)
        check_cameras(poses, intrinsics, image_size, timestamps_s)
        colors = to_colors(colors, points)
        if voxel_size_m is not None:
            check_voxel_size(voxel_size_m)

        rotation, gravity = upright_rotation(up, poses, lambda: spread_cloud(points, normals, poses[:, :3, 3]))
        points = points @ rotation.T
        anchor = rotation @ poses[0, :3, 3] if len(poses) else box_center(points)
        points = points - anchor
        aligned_from_dataset = rigid_matrix(rotation, -anchor)
        cloud = [points, colors] if normals is None else [points, colors, to_normals(normals, points) @ rotation.T]
        centers = transform_points(aligned_from_dataset, poses[:, :3, 3])
        if voxel_size_m is not None:
            unit = 1.0 if is_metric else nominal_unit(points, centers)
            cloud = thin_by_voxels(cloud, voxel_size_m * unit)
        # Before it is thinned further, so that the frame does not depend on `max_points`.
        floor = floor_height(cloud[0])
        cloud = thin_to_count(cloud, max_points)
        if normals is None:
            cloud.append(estimate_normals(cloud[0], camera_centers=centers))
        return _place_on_floor(
            cloud,
            floor,
            aligned_from_dataset,
            poses,
            intrinsics=intrinsics,
            image_size=image_size,
            is_metric=is_metric,
            gravity=gravity,
            timestamps_s=timestamps_s,
        )

    @classmethod
    def from_vggt(
        cls,
        output,
        pixel_values,
        *,
        scene_index: int = 0,
        content_boxes=None,
        min_confidence: float | None = None,
        up="floor",
        metres_per_unit: float | None = None,
        camera_positions_m=None,
        camera_height_m: float | None = None,
        depth_m=None,
        known_length: KnownLength | None = None,
        timestamps_s=None,
        max_points: int | None = None,
        voxel_size_m: float = 0.02,
    ) -> "SceneGeometry":
        """
        Fuse what VGGT predicted into one cloud in the scene frame, in metres if one thing about the scene is known.

        Depth maps and cameras are used, which are more accurate than the predicted points. At most one of
        `metres_per_unit`, `camera_positions_m`, `camera_height_m`, `depth_m` and `known_length` may be given; without any
        the scale stays unknown.

        Args:
            output ([`VggtModelOutput`]):
                With cameras and depth.
            pixel_values (`torch.Tensor` of shape `(batch_size, num_frames, 3, height, width)`):
                The frames, as the model got them; they colour the points.
            scene_index (`int`, defaults to 0):
                Which row of the batch.
            content_boxes (`torch.Tensor` of shape `(num_frames, 4)`, *optional*):
                First column, first row, last column + 1 and last row + 1 of each frame without its padding, as
                `VggtImageProcessor` returns them. Padding is dropped.
            min_confidence (`float`, *optional*):
                Least confidence of depth, which is at least 1; 1.5 to 3 are usual. Without it the lowest fifth is dropped.
            up (sequence of 3 `float` or `"floor"`, defaults to `"floor"`):
                See [`SceneGeometry.from_rgbd`]; a direction is in the frame of `output`, about the first camera's.
            metres_per_unit (`float`, *optional*):
                The scale itself.
            camera_positions_m (`np.ndarray` or `torch.Tensor` of shape `(num_frames, 3)`, *optional*):
                Where each camera was, in metres and in any frame. At least two differ.
            camera_height_m (`float`, *optional*):
                Height of the first camera above the floor.
            depth_m (`np.ndarray` or `torch.Tensor` of shape `(num_frames, height, width)`, *optional*):
                Measured z-depth in metres at the pixels of `pixel_values`; 0 where there is none.
            known_length ([`KnownLength`], *optional*):
                The distance between the surfaces at two pixels.
            timestamps_s (`np.ndarray` or `torch.Tensor` of shape `(num_frames,)`, *optional*):
                Times of the frames in seconds.
            max_points (`int`, *optional*):
                See [`SceneGeometry.from_rgbd`].
            voxel_size_m (`float`, defaults to 0.02):
                See [`SceneGeometry.from_rgbd`].

        Returns:
            [`SceneGeometry`]: The scene; its dataset frame is that of `output`.

        Raises:
            ValueError: If a head is missing, a camera is not valid, no depth is confident, or the scale cannot be found.
        """
        frames = reconstructed_frames(output, pixel_values, scene_index)
        keep = usable_pixels(frames, content_boxes, min_confidence)
        depth, intrinsics, poses = torch.where(keep, frames.depth, 0.0), frames.intrinsics, frames.world_from_cam
        rough = cache(lambda: rough_cloud(depth, intrinsics, poses))
        rotation, gravity = upright_rotation(up, poses, rough)
        known = {
            "factor": metres_per_unit,
            "poses": camera_positions_m,
            "camera_height": camera_height_m,
            "depth": depth_m,
            "length": known_length,
        }
        given = [name for name, value in known.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"One source of scale is taken at most, got {given}. Give the one you trust most.")
        scale, source = 1.0, given[0] if given else "unknown"
        if metres_per_unit is not None:
            scale = check_factor(metres_per_unit)
        elif camera_positions_m is not None:
            scale = scale_from_positions(poses[:, :3, 3], to_tensor("camera_positions_m", camera_positions_m))
        elif camera_height_m is not None:
            height = height_above_floor(poses[0, :3, 3], rotation[2], rough())
            scale = scale_from_camera_height(height, camera_height_m)
        elif depth_m is not None:
            scale = scale_from_depth(depth, to_tensor("depth_m", depth_m))
        elif known_length is not None:
            scale = scale_from_length(known_ends(known_length, frames), known_length.length_m)
        # Scaled before the cloud is thinned, so that its voxels are of metres.
        scaled = poses.clone()
        scaled[:, :3, 3] *= scale
        scene = cls.from_rgbd(
            depth * scale,
            intrinsics,
            scaled,
            images=frames.images,
            up=rotation[2],
            is_metric=bool(given),
            timestamps_s=timestamps_s,
            max_points=max_points,
            voxel_size_m=voxel_size_m,
        )
        scene_from_dataset = scene.scene_from_dataset.clone()
        scene_from_dataset[:3, 3] /= scale
        return dataclasses.replace(
            scene, scale_source=source, gravity=gravity, metres_per_unit=scale, scene_from_dataset=scene_from_dataset
        )

    @classmethod
    def from_ply(cls, path: str | os.PathLike, **options) -> "SceneGeometry":
        """
        Read a point cloud from a PLY file, text or binary.

        Args:
            path (`str` or `os.PathLike`):
                The file. Colours and normals are used where it has them; faces are left out.
            **options:
                Arguments of [`SceneGeometry.from_point_cloud`], such as `up`, `is_metric` and cameras.

        Returns:
            [`SceneGeometry`]: The scene.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a PLY file of points, or the cloud is not valid.
        """
        cloud = read_ply(path)
        return cls.from_point_cloud(cloud.points, colors=cloud.colors, normals=cloud.normals, **options)

    def save_ply(self, path: str | os.PathLike) -> None:
        """
        Write the cloud as binary PLY, for viewers. Cameras and the scale are only in [`SceneGeometry.save`].

        Args:
            path (`str` or `os.PathLike`):
                A path ending in `.ply`; an existing file is replaced.
        """
        unit = "metres" if self.is_metric else "an unknown unit"
        colors = (self.colors * 255).round().byte().numpy()
        cloud = PlyCloud(self.points.numpy(), colors, self.normals.numpy())
        write_ply(path, cloud, comments=(f"lengths in {unit}, +z up, origin on the floor below the first camera",))

    @property
    def num_points(self) -> int:
        """Number of points."""
        return len(self.points)

    @property
    def num_cameras(self) -> int:
        """Number of cameras, which may be zero."""
        return len(self.world_from_cam)

    def boxes_in_scene(self, boxes) -> torch.Tensor:
        """
        Bring boxes of the input's frame into the scene frame, the way the points went.

        Args:
            boxes (`np.ndarray` or `torch.Tensor` of shape `(num_boxes, 7)`):
                Boxes `(cx, cy, cz, dx, dy, dz, yaw)` in the input's frame and unit, upright there.

        Returns:
            `torch.Tensor` of shape `(num_boxes, 7)`: Boxes in the scene frame, float32, yaw in (-pi/2, pi/2].

        Raises:
            ValueError: If the scene's +z is not the input's +z, to within 0.5 degrees.
        """
        boxes = to_tensor("boxes", boxes).double()
        check_finite("boxes", boxes)
        boxes = transform_boxes(boxes, self.scene_from_dataset)
        return torch.cat([boxes[..., :6] * self.metres_per_unit, boxes[..., 6:]], dim=-1).float()

    def with_scale(self, metres_per_unit: float, source: str) -> "SceneGeometry":
        """
        The same scene in metres, once the caller knows its scale.

        Args:
            metres_per_unit (`float`):
                Metres in one unit of this scene: a known length over the same length measured here.
            source (`str`):
                What the caller knew: `"poses"`, `"depth"`, `"length"`, `"camera_height"` or the `"factor"`.

        Returns:
            [`SceneGeometry`]: The metric scene.

        Raises:
            ValueError: If the scene is metric already, or the factor or the source is not valid.
        """
        if self.is_metric:
            raise ValueError(
                "`with_scale` needs a scene of unknown scale, this one is metric "
                f"(`scale_source`={self.scale_source!r})."
            )
        sources = tuple(name for name in SCALE_SOURCES if name not in ("metric", "unknown"))
        if source not in sources:
            raise ValueError(f"`source` must be one of {sources}, got {source!r}.")
        check_factor(metres_per_unit)
        points, world_from_cam = self._scaled(metres_per_unit)
        return dataclasses.replace(
            self,
            points=points,
            world_from_cam=world_from_cam,
            is_metric=True,
            scale_source=source,
            metres_per_unit=self.metres_per_unit * float(metres_per_unit),
        )

    def _scaled(self, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        world_from_cam = self.world_from_cam.clone()
        world_from_cam[:, :3, 3] *= factor
        return self.points * factor, world_from_cam

    def summary(self) -> dict:
        """
        Facts about the scene that JSON can hold.

        Returns:
            `dict`: `num_points`, `num_cameras`, `extent` (sizes along x, y, z, in metres if `is_metric`), `is_metric`,
            `scale_source`, `metres_per_unit` and `gravity`.
        """
        extent = self.points.max(dim=0).values - self.points.min(dim=0).values
        return {
            "num_points": self.num_points,
            "num_cameras": self.num_cameras,
            "extent": extent.tolist(),
            "is_metric": self.is_metric,
            "scale_source": self.scale_source,
            "metres_per_unit": self.metres_per_unit,
            "gravity": self.gravity,
        }

    def to_model_inputs(
        self, grid_size: float, *, max_points: int | None = None, num_cameras: int | None = None
    ) -> dict[str, torch.Tensor]:
        """
        The tensors that the model reads, for this one scene.

        A scene of unknown scale is first scaled to a median camera-to-point distance of 2.5, about that of a room.
        Where the scale is known, `point_coords * exp(log_scale)` are metres.

        Args:
            grid_size (`float`):
                Voxel edge of the point encoder, in metres.
            max_points (`int`, *optional*):
                Largest number of voxels. Where there are more, blocks of voxels keep the one nearest to their centre.
                The side of the blocks, not a whole number, grows from 1 until it suffices. `grid_size` and the voxel
                indices stay, since the encoder was trained on them. Nothing is random.
            num_cameras (`int`, *optional*):
                Largest number of cameras, evenly spaced; all by default.

        Returns:
            `dict[str, torch.Tensor]`: `point_features` `(num_voxels, 9)` (centred x y z, red green blue, normal),
            `point_coords` `(num_voxels, 3)` in the scene frame, `point_grid_coords` `(num_voxels, 3)`, `camera_poses`
            `(num_cameras, 11)`, `log_scale` `()` and `scale_known` `()`. Not batched; see [`collate_scenes`].

        Raises:
            ValueError: If a count is below 1, or the cloud is too wide for the point encoder.
        """
        for name, count in (("max_points", max_points), ("num_cameras", num_cameras)):
            if count is not None:
                check_whole(name, count)
        points, world_from_cam = self.points, self.world_from_cam
        if not self.is_metric:
            logger.warning_once(
                "The scale of this scene is unknown, so lengths in metres are guesses. Give it with "
                "`SceneGeometry.with_scale(metres_per_unit, source)`."
            )
            points, world_from_cam = self._scaled(1 / nominal_unit(points, world_from_cam[:, :3, 3]))
        cloud = prepare_point_cloud(points, self.colors * 255, self.normals, grid_size)
        # The encoder's coordinates are centred on the bounding box, with the lowest point at 0.
        shift = box_center(points)
        shift[2] = points[:, 2].min()
        rows = coarser_voxels(cloud["grid_coord"], max_points)
        cameras = evenly_spaced_indices(self.num_cameras, num_cameras or self.num_cameras)
        if cameras:
            poses = encode_camera_poses(world_from_cam[cameras], self.intrinsics[cameras], self.image_size)
        else:
            poses = points.new_zeros(0, 11)
        return {
            "point_features": cloud["feat"][rows].float(),
            "point_coords": cloud["coord"][rows].float() + shift,
            "point_grid_coords": cloud["grid_coord"][rows].long(),
            "camera_poses": poses,
            "log_scale": torch.zeros(()),
            "scale_known": torch.tensor(self.is_metric),
        }

    def save(self, folder: str | os.PathLike) -> None:
        """
        Write `geometry.safetensors` and `geometry.json` to a folder, each in one step.

        Args:
            folder (`str` or `os.PathLike`):
                Created if absent. A scene that is there already is replaced.
        """
        folder = checked_path("folder", folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name) for name in _CLOUD_FIELDS}
        if self.num_cameras:
            tensors |= {"world_from_cam": self.world_from_cam, "intrinsics": self.intrinsics}
        if self.timestamps_s is not None:
            tensors["timestamps_s"] = self.timestamps_s
        header = {
            "format_version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in _HEADER_FIELDS},
        }
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            write_tensors(tensors, Path(scratch) / _TENSORS_FILE)
            # The digest ties the two files together: a crash between the two moves must not pass unnoticed.
            header["tensors_sha256"] = sha256_of(Path(scratch) / _TENSORS_FILE)
            (Path(scratch) / _HEADER_FILE).write_text(json.dumps(sealed(header), indent=2) + "\n", encoding="utf-8")
            for name in (_TENSORS_FILE, _HEADER_FILE):
                os.replace(Path(scratch) / name, folder / name)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "SceneGeometry":
        """
        Read a scene that [`SceneGeometry.save`] wrote. Nothing is unpickled.

        Args:
            folder (`str` or `os.PathLike`):
                The folder given to `save`.

        Returns:
            [`SceneGeometry`]: The scene.

        Raises:
            FileNotFoundError: If the folder or one of its two files is missing.
            ValueError: If `folder` is a file, the format version is another, the two files do not belong together, or
                the content is not valid.
        """
        folder = checked_path("folder", folder)
        if folder.is_file():
            raise ValueError(f"`folder` must be a folder written by `SceneGeometry.save`, got the file {folder}.")
        for name in (_HEADER_FILE, _TENSORS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"A saved scene has {_HEADER_FILE} and {_TENSORS_FILE}; {folder} has no {name}."
                )
        header, damage = (
            read_json(folder / _HEADER_FILE),
            f"{folder / _HEADER_FILE} is damaged or was edited. Save the scene again.",
        )
        check_version(header, str(folder / _HEADER_FILE))
        digest = sha256_of(folder / _TENSORS_FILE)
        if header.get("tensors_sha256") != digest:
            raise ValueError(
                f"{folder / _TENSORS_FILE} has SHA-256 {digest}, but {_HEADER_FILE} expects "
                f"{header.get('tensors_sha256')}. The files are damaged or of two scenes; save the scene again."
            )
        tensors, _ = read_tensors(folder / _TENSORS_FILE)
        missing = sorted(set(_HEADER_FIELDS) - header.keys() | set(_CLOUD_FIELDS) - tensors.keys())
        unknown = sorted(tensors.keys() - {*_CLOUD_FIELDS, *_CAMERA_FIELDS})
        if missing or unknown:
            raise ValueError(
                f"The scene of {folder / _HEADER_FILE} lacks {missing} and has unknown {unknown}. Save it again."
            )
        fields = {name: header[name] for name in _HEADER_FIELDS}
        # JSON has lists for tuples.
        if isinstance(fields["image_size"], list):
            fields["image_size"] = tuple(fields["image_size"])
        try:
            scene = cls(**tensors, **fields)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{damage} {error}") from error
        unsealed(header, damage)  # last, as what is wrong with a value says more
        return scene


def _place_on_floor(
    cloud: list[torch.Tensor],
    floor: torch.Tensor,
    aligned_from_dataset: torch.Tensor,
    poses: torch.Tensor,
    *,
    is_metric: bool,
    **fields,
) -> SceneGeometry:
    """Lower an upright cloud onto its floor and build the scene."""
    points, colors, normals = cloud
    scene_from_dataset = aligned_from_dataset.clone()
    scene_from_dataset[2, 3] -= floor
    points = points - torch.stack([torch.zeros_like(floor), torch.zeros_like(floor), floor])
    fields["intrinsics"] = fields["intrinsics"].float()
    return SceneGeometry(
        points=points.float(),
        colors=colors.float(),
        normals=torch.nn.functional.normalize(normals.float(), dim=1),
        world_from_cam=(scene_from_dataset @ poses).float(),
        is_metric=is_metric,
        scale_source="metric" if is_metric else "unknown",
        scene_from_dataset=scene_from_dataset,
        **fields,
    )


__all__ = ["KnownLength", "SceneEncoding", "SceneGeometry", "collate_scenes"]
