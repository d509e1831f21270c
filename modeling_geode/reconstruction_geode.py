# SPDX-License-Identifier: Apache-2.0
"""
From frames to a scene: one plain function per reconstructor.

A function takes frames as they were decoded and returns a [`SceneGeometry`]. Another reconstructor is another function.
"""

from typing import Any

import torch

from .scene_geode import KnownLength, SceneGeometry
from .vggt_geode import VggtModel
from .vggt_processing_geode import VggtImageProcessor


@torch.no_grad()
def reconstruct_with_vggt(
    frames: Any,
    model: VggtModel,
    *,
    mode: str = "crop",
    image_size: int | None = None,
    frames_chunk_size: int | None = None,
    known_length: KnownLength | None = None,
    depth_m: Any = None,
    **options,
) -> SceneGeometry:
    """
    Reconstruct one scene from its frames with VGGT (paper, Eq. 1).

    Args:
        frames (`list` of path, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`, or one array of them):
            Frames of one scene, as [`VggtImageProcessor`] takes them. The first one is the reference.
        model ([`VggtModel`]):
            The reconstructor, in eval mode.
        mode (`str`, defaults to `"crop"`):
            `"crop"` loses the top and bottom of portrait frames; `"pad"` keeps everything.
        image_size (`int`, *optional*):
            Width in pixels that frames are resized to, a multiple of the patch size; the model's by default. Time grows with
            its fourth power, so a smaller one is the way to fit a slow machine.
        frames_chunk_size (`int`, *optional*):
            See [`VggtModel.forward`].
        known_length ([`KnownLength`], *optional*):
            A known distance, between pixels of `frames`.
        depth_m (`list` or array of shape `(num_frames, height, width)`, *optional*):
            Measured z-depth in metres that covers the same view as `frames`, at any resolution; 0 where there is none.
        **options:
            Arguments of [`SceneGeometry.from_vggt`]: `up`, `min_confidence`, `timestamps_s`, `max_points`, `voxel_size_m`, and
            the other sources of scale.

    Returns:
        [`SceneGeometry`]: The scene; its cameras are those of the resized frames.

    Raises:
        ValueError: If the frames cannot be taken, or as [`SceneGeometry.from_vggt`].
    """
    config = model.config
    processor = VggtImageProcessor(mode, image_size=image_size or config.image_size, patch_size=config.patch_size)
    batch = processor(frames)
    pixel_values = batch["pixel_values"][None]
    output = model(pixel_values.to(model.device), heads=("camera", "depth"), frames_chunk_size=frames_chunk_size)
    if known_length is not None:
        ends = [_to_processed(end, batch["original_from_processed"]) for end in known_length[:2]]
        known_length = KnownLength(*ends, known_length.length_m)
    if depth_m is not None:
        depth_m = resample_depth(depth_m, batch)
    return SceneGeometry.from_vggt(
        output,
        pixel_values,
        content_boxes=batch["content_boxes"],
        known_length=known_length,
        depth_m=depth_m,
        **options,
    )


def _to_processed(pixel: tuple[int, float, float], original_from_processed: torch.Tensor) -> tuple[int, float, float]:
    """Pixel (frame, u, v) of a given frame to that of the processed one."""
    frame, u, v = pixel
    if not 0 <= frame < len(original_from_processed):
        raise ValueError(
            f"`known_length` names frame {frame}, and there are {len(original_from_processed)}, counted from 0."
        )
    (scale_u, _, shift_u), (_, scale_v, shift_v), _ = original_from_processed[frame].tolist()
    return frame, (u - shift_u) / scale_u, (v - shift_v) / scale_v


def resample_depth(depth_m: Any, batch: dict) -> torch.Tensor:
    """
    Bring measured depth to the pixels of processed frames, by nearest neighbours: depth must not mix across an edge.

    Args:
        depth_m (`list` or array of shape `(num_frames, height, width)`):
            Z-depth in metres that covers the same view as the original frames, at any resolution.
        batch (`BatchFeature`):
            What [`VggtImageProcessor`] returned for the frames.

    Returns:
        `torch.Tensor` of shape `(num_frames, height, width)`: Z-depth in metres at the pixels of `pixel_values`, 0 outside.

    Raises:
        ValueError: If there is not one depth map for each frame.
    """
    sizes, maps = batch["original_sizes"].tolist(), batch["original_from_processed"]
    if len(depth_m) != len(sizes):
        raise ValueError(f"`depth_m` must hold one map for each of the {len(sizes)} frames, got {len(depth_m)}.")
    height, width = batch["pixel_values"].shape[-2:]
    resampled = []
    for given, size, ((scale_u, _, shift_u), (_, scale_v, shift_v), _) in zip(
        depth_m, sizes, maps.tolist(), strict=True
    ):
        given = torch.as_tensor(given).double()
        rows = ((scale_v * torch.arange(height) + shift_v + 0.5) * given.shape[0] / size[0] - 0.5).round().long()
        columns = ((scale_u * torch.arange(width) + shift_u + 0.5) * given.shape[1] / size[1] - 0.5).round().long()
        inside = ((rows >= 0) & (rows < given.shape[0]))[:, None] & ((columns >= 0) & (columns < given.shape[1]))
        nearest = given[rows.clamp(0, given.shape[0] - 1)][:, columns.clamp(0, given.shape[1] - 1)]
        resampled.append(torch.where(inside, nearest, 0.0))
    return torch.stack(resampled)


__all__ = ["reconstruct_with_vggt", "resample_depth"]
