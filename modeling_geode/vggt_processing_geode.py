# SPDX-License-Identifier: Apache-2.0
"""What surrounds VGGT: frames to the size it takes, and the nine numbers in which it states a camera."""

import math
import os
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from .hub_geode import CodeOnHubMixin
from .video_processing_geode import IMAGE_SUFFIXES, load_video_frames


logger = logging.get_logger(__name__)

MODES = ("crop", "pad")
WHITE = 255
# Resampled frames may leave [0, 1] by rounding; anything beyond this is another value range.
PIXEL_RANGE_TOLERANCE = 1e-3
DEFAULT_NUM_FRAMES = 16


def decode_pose(pose_encoding: torch.Tensor, image_size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Turn VGGT's nine numbers per camera into matrices.

    Source: VGGT's "absT_quaR_FoV" encoding. Checked against outputs of the public implementation.

    Convention:
        - Entries 0-2 are the translation of `cam_from_world`, 3-6 its quaternion (x, y, z, w), which need not have unit
          length, 7 the vertical and 8 the horizontal field of view in radians.
        - A field of view of 0 gives an infinite focal length and a zero quaternion gives NaN; neither is guarded.

    Args:
        pose_encoding (`torch.Tensor` of shape `(..., 9)`): Encoded cameras.
        image_size (`tuple[int, int]`): Height and width in pixels that the intrinsics shall refer to.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `cam_from_world` of shape `(..., 3, 4)` in the units of the translation, and
        intrinsics of shape `(..., 3, 3)` in pixels with the principal point at `(width / 2, height / 2)`. At least
        float32.

    Raises:
        ValueError: If the last dimension is not 9.

    Example:
        ```python
        >>> import math
        >>> extrinsics, intrinsics = decode_pose(torch.tensor([0, 0, 5, 0, 0, 0, 1, math.pi / 2, math.pi / 2]), (28, 42))
        >>> extrinsics[:, 3].tolist(), [round(value, 4) for value in intrinsics.diagonal().tolist()]
        ([0.0, 0.0, 5.0], [21.0, 14.0, 1.0])

        ```
    """
    if pose_encoding.shape[-1:] != (9,):
        raise ValueError(f"`pose_encoding` must have shape (..., 9), got {tuple(pose_encoding.shape)}.")
    height, width = image_size
    pose_encoding = pose_encoding.to(torch.promote_types(pose_encoding.dtype, torch.float32))
    translation, quat_xyzw, fov = pose_encoding.split((3, 4, 2), dim=-1)
    x, y, z, w = F.normalize(quat_xyzw, dim=-1, eps=0.0).unbind(-1)
    rotation = torch.stack(
        (
            1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
            2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
            2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
        ),
        dim=-1,
    ).unflatten(-1, (3, 3))  # fmt: skip
    focal_y, focal_x = (height / 2) / torch.tan(fov[..., 0] / 2), (width / 2) / torch.tan(fov[..., 1] / 2)
    zero, one = torch.zeros_like(focal_x), torch.ones_like(focal_x)
    rows = (focal_x, zero, width / 2 * one, zero, focal_y, height / 2 * one, zero, zero, one)
    extrinsics = torch.cat((rotation, translation[..., None]), dim=-1)
    return extrinsics, torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def encode_pose(extrinsics: torch.Tensor, intrinsics: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """
    Turn camera matrices into VGGT's nine numbers per camera, the inverse of [`decode_pose`].

    The principal point and the skew are dropped. Of the two quaternions of a rotation, the one with a non-negative real
    part is taken.

    Args:
        extrinsics (`torch.Tensor` of shape `(..., 3, 4)`): `cam_from_world`, OpenCV axes.
        intrinsics (`torch.Tensor` of shape `(..., 3, 3)`): Pinhole matrices in pixels.
        image_size (`tuple[int, int]`): Height and width in pixels that `intrinsics` refers to.

    Returns:
        `torch.Tensor` of shape `(..., 9)`: Translation, quaternion (x, y, z, w), vertical and horizontal field of view in
        radians. At least float32.

    Raises:
        ValueError: If the shapes are not those above, with equal leading dimensions.
    """
    leading = extrinsics.shape[:-2]
    if extrinsics.shape[-2:] != (3, 4) or intrinsics.shape != (*leading, 3, 3):
        raise ValueError(
            "`extrinsics` and `intrinsics` must have shapes (..., 3, 4) and (..., 3, 3) with equal leading dimensions, "
            f"got {tuple(extrinsics.shape)} and {tuple(intrinsics.shape)}."
        )
    dtype = torch.promote_types(extrinsics.dtype, torch.float32)
    extrinsics, intrinsics = extrinsics.to(dtype), intrinsics.to(dtype)
    height, width = image_size
    fov_height = 2 * torch.atan(height / 2 / intrinsics[..., 1, 1])
    fov_width = 2 * torch.atan(width / 2 / intrinsics[..., 0, 0])
    quat_xyzw = _quat_xyzw_from_rotation(extrinsics[..., :3])
    return torch.cat((extrinsics[..., 3], quat_xyzw, torch.stack((fov_height, fov_width), dim=-1)), dim=-1)


def _quat_xyzw_from_rotation(rotation: torch.Tensor) -> torch.Tensor:
    """
    Quaternion (x, y, z, w) of a rotation matrix, from the best conditioned of the four formulas.

    Row `i` below is `4 * q[i] * q` for q = (w, x, y, z). The row with the largest diagonal is divided by `4 * q[i]`.
    """
    (m00, m01, m02), (m10, m11, m12), (m20, m21, m22) = (row.unbind(-1) for row in rotation.unbind(-2))
    products = torch.stack(
        (
            1 + m00 + m11 + m22, m21 - m12, m02 - m20, m10 - m01,
            m21 - m12, 1 + m00 - m11 - m22, m10 + m01, m02 + m20,
            m02 - m20, m10 + m01, 1 - m00 + m11 - m22, m12 + m21,
            m10 - m01, m20 + m02, m21 + m12, 1 - m00 - m11 + m22,
        ),
        dim=-1,
    ).unflatten(-1, (4, 4))  # fmt: skip
    squares = products.diagonal(dim1=-2, dim2=-1)
    best = squares.argmax(dim=-1, keepdim=True)
    chosen = products.gather(-2, best[..., None].expand(*best.shape, 4)).squeeze(-2)
    quat_wxyz = chosen / (2 * squares.gather(-1, best).clamp(min=0.01).sqrt())
    quat_wxyz = torch.where(quat_wxyz[..., :1] < 0, -quat_wxyz, quat_wxyz)
    return quat_wxyz.roll(-1, dims=-1)


def check_pixel_values(pixel_values: torch.Tensor, patch_size: int) -> None:
    """
    Refuse frames that VGGT cannot take.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch_size, num_frames, 3, height, width)`): Frames in [0, 1].
        patch_size (`int`): Patch side in pixels, which must divide height and width.

    Raises:
        ValueError: If the rank, the dtype, the size or a value is not as stated.
    """
    shape = tuple(pixel_values.shape)
    if pixel_values.ndim != 5 or shape[2] != 3:
        remedy = "Add the batch axis with `pixel_values[None]`." if len(shape) == 4 else "Use `preprocess_images`."
        raise ValueError(
            f"`pixel_values` must have shape (batch_size, num_frames, 3, height, width), got {shape}. {remedy}"
        )
    if 0 in shape:
        raise ValueError(f"`pixel_values` must hold at least one frame of at least one pixel, got shape {shape}.")
    height, width = shape[-2:]
    if height % patch_size or width % patch_size:
        near = tuple(max(1, round(side / patch_size)) * patch_size for side in (height, width))
        raise ValueError(
            f"`pixel_values` must have sides that are multiples of {patch_size}, got {(height, width)}. "
            f"Resize to {near}, or use `preprocess_images`."
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"`pixel_values` must be floating point in [0, 1], got {pixel_values.dtype}. Divide 8-bit frames by 255."
        )
    # Reading values waits for the device and cannot be traced.
    if pixel_values.device.type == "meta" or torch.compiler.is_compiling():
        return
    low, high = (value.item() for value in torch.aminmax(pixel_values.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"`pixel_values` must be finite, got values between {low} and {high}. Check the decoder.")
    if low < -PIXEL_RANGE_TOLERANCE or high > 1 + PIXEL_RANGE_TOLERANCE:
        remedy = "Do not normalise: the model does." if low < 0 else "Divide 8-bit frames by 255."
        raise ValueError(f"`pixel_values` must lie in [0, 1], got values between {low:g} and {high:g}. {remedy}")


class _Frame(NamedTuple):
    """A frame on its way to the common size; `scale` and `offset` are (x, y): `processed = scale * original + offset`."""

    pixels: np.ndarray
    scale: tuple[float, float]
    offset: tuple[int, int]
    original_size: tuple[int, int]


def _split_frames(images: Any) -> list:
    """List the single frames in whatever was given."""
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images]
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return list(images) if images.ndim == 4 else [images]
    return list(images)


def _is_video(images: Any) -> bool:
    """Whether `images` names a video file or a folder: a path that does not end as images do."""
    if not isinstance(images, (str, os.PathLike)):
        return False
    return os.path.isdir(images) or os.path.splitext(images)[1].lower() not in IMAGE_SUFFIXES


def _to_pil(image: Any) -> Image.Image:
    """
    Read one frame as 8-bit RGB.

    As in the public loader, the transparency of RGBA is composited over white, that of other modes is dropped, and EXIF
    orientation is not applied.
    """
    if isinstance(image, (str, os.PathLike)):
        with Image.open(image) as file:
            file.load()
            image = file
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        image = Image.fromarray(_to_uint8(image))
    elif not isinstance(image, Image.Image):
        raise ValueError(f"`images` must hold paths, PIL images, arrays or tensors, got {type(image).__name__}.")
    if image.mode[0] in "IF":
        raise ValueError(
            f"`images` must hold frames of 8 bits, got a PIL image of mode {image.mode!r}, whose values would be cut off "
            "at 255. Scale it to 0..255 and convert it to mode 'L' first."
        )
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (WHITE, WHITE, WHITE, WHITE)), image)
    return image.convert("RGB")


def _to_uint8(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """Bring an array `(height, width, 3)` or a tensor `(3, height, width)` to 8 bits, on which resizing is defined."""
    layout, axis = ("(3, height, width)", 0) if isinstance(image, torch.Tensor) else ("(height, width, 3)", -1)
    if image.ndim != 3 or image.shape[axis] != 3 or 0 in image.shape:
        raise ValueError(
            f"`images` must hold frames of shape {layout} as {type(image).__name__}, got {tuple(image.shape)}. "
            "Tensors have their channels first, NumPy arrays last."
        )
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().permute(1, 2, 0)
        image = (image.float() if image.is_floating_point() else image).numpy()
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    low, high = image.min(), image.max()
    if not np.issubdtype(image.dtype, np.floating) or not (low >= 0 and high <= 1):
        raise ValueError(
            f"`images` must hold uint8 frames or floating point ones in [0, 1], got {image.dtype} between {low} and "
            f"{high}. Convert 0..255 values to uint8, and remove NaN."
        )
    return np.ascontiguousarray(np.rint(image * 255).astype(np.uint8))


def _fit(image: Image.Image, mode: str, image_size: int, patch_size: int) -> _Frame:
    """Resize one frame, then crop its rows (`"crop"`) or pad it to a square (`"pad"`)."""
    width, height = image.size
    fixed = max(width, height) if mode == "pad" else width
    # `round` rounds half to even, as the public loader does.
    new_width, new_height = (
        image_size if side == fixed else round(side * (image_size / fixed) / patch_size) * patch_size
        for side in (width, height)
    )
    if new_width == 0 or new_height == 0:
        raise ValueError(
            f"`images` holds a frame of {height} x {width} pixels, so elongated that it would be resized to "
            f"{new_height} x {new_width}. Crop it first."
        )
    pixels = np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
    frame = _Frame(pixels, (new_width / width, new_height / height), (0, 0), (height, width))
    if mode == "pad":
        return _pad(frame, (image_size, image_size))
    if new_height > image_size:
        top = (new_height - image_size) // 2
        return frame._replace(pixels=pixels[top : top + image_size], offset=(0, -top))
    return frame


def _pad(frame: _Frame, size: tuple[int, int]) -> _Frame:
    """Centre a frame on white."""
    height, width = frame.pixels.shape[:2]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    rest = ((top, size[0] - height - top), (left, size[1] - width - left), (0, 0))
    pixels = np.pad(frame.pixels, rest, constant_values=WHITE)
    return frame._replace(pixels=pixels, offset=(frame.offset[0] + left, frame.offset[1] + top))


class VggtImageProcessorKwargs(ImagesKwargs, total=False):
    """What `from_pretrained` may change: the arguments of [`VggtImageProcessor`]."""

    mode: str
    image_size: int
    patch_size: int


class VggtImageProcessor(CodeOnHubMixin, BaseImageProcessor):
    """
    Bring the frames of one scene to the size that VGGT takes, and say how to get back.

    Source: the loader of the public model; its outputs are reproduced bit by bit. `"crop"` resizes to a width of
    `image_size` and crops the rows beyond `image_size`, so portrait frames lose their top and bottom. `"pad"` resizes
    the longer side to `image_size` and pads with white to a square. Frames that still differ are padded with white to
    the largest. Sides are multiples of `patch_size`, so the two axes are scaled slightly differently.

    Args:
        mode (`str`, defaults to `"crop"`): `"crop"` or `"pad"`.
        image_size (`int`, defaults to 518): Side in pixels that frames are resized to.
        patch_size (`int`, defaults to 14): Patch side in pixels of the model.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012
    valid_kwargs = VggtImageProcessorKwargs

    def __init__(self, mode: str = "crop", *, image_size: int = 518, patch_size: int = 14, **kwargs):
        super().__init__(**kwargs)
        if mode not in MODES:
            raise ValueError(f"`mode` must be one of {MODES}, got {mode!r}.")
        if patch_size < 1 or image_size < 1 or image_size % patch_size:
            raise ValueError(f"`image_size` must be a multiple of `patch_size`, got {image_size} and {patch_size}.")
        self.mode = mode
        self.image_size = image_size
        self.patch_size = patch_size

    def preprocess(self, images: Any, *, num_frames: int | None = None, return_tensors: str = "pt") -> BatchFeature:
        """See [`~VggtImageProcessor.__call__`]."""
        return self(images, num_frames=num_frames, return_tensors=return_tensors)

    def __call__(  # type: ignore[override]
        self, images: Any, *, num_frames: int | None = None, return_tensors: str = "pt"
    ) -> BatchFeature:
        """
        Preprocess frames.

        Convention:
            - Pixel `(0, 0)` is the centre of the top-left pixel. `original_from_processed @ (u, v, 1)` is the pixel of
              the original frame, and `original_from_processed @ intrinsics` the intrinsics of the original frame. Depth,
              points and extrinsics are the same for both.

        Args:
            images (`list` of path, `PIL.Image.Image`, `numpy.ndarray` or `torch.Tensor`, one of them, or a video):
                Frames. Arrays are `(height, width, 3)`, tensors `(3, height, width)`, uint8 or floating point in [0, 1],
                which is rounded to 8 bits; with a fourth dimension in front they are several frames. A path on its own
                is an image if it ends as one (.png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff); otherwise it is a video
                file or a folder of images, which [`load_video_frames`] reads: it turns frames upright and lays
                transparency over white, which the public loader does not. Put an image of another suffix in a list.
            num_frames (`int`, *optional*):
                Evenly spaced frames to take of a video file or folder; `None` is 16. For nothing else.
            return_tensors (`str`, defaults to `"pt"`):
                Only `"pt"`, PyTorch tensors.

        Returns:
            `BatchFeature` with:

            - `pixel_values` (`torch.FloatTensor` of shape `(num_frames, 3, height, width)`): RGB in [0, 1].
            - `original_from_processed` (`torch.DoubleTensor` of shape `(num_frames, 3, 3)`): Affine maps from pixels of
              `pixel_values` to pixels of the original frames.
            - `content_boxes` (`torch.LongTensor` of shape `(num_frames, 4)`): First column, first row, last column + 1
              and last row + 1 of the frame in `pixel_values`; the rest is padding.
            - `original_sizes` (`torch.LongTensor` of shape `(num_frames, 2)`): Height and width before.
            - `timestamps_s` (`torch.DoubleTensor` of shape `(num_frames,)`): Times of the frames in seconds, NaN where
              there is no clock; of a video file or folder only.

        Raises:
            OSError: If a file is missing or damaged.
            ValueError: If there are no frames, one is not readable as described, or an option does not apply.

        Example:
            ```python
            >>> import numpy as np
            >>> from geode.modeling_geode.vggt_processing_geode import VggtImageProcessor

            >>> # 84 x 56 pixels are halved to 42 x 28, of which the middle 28 rows stay.
            >>> batch = VggtImageProcessor(image_size=28)(np.zeros((84, 56, 3), np.uint8))
            >>> original_from_processed = batch["original_from_processed"][0]
            >>> (original_from_processed @ torch.tensor([10.0, 4.0, 1.0]).double()).tolist()
            [20.5, 22.5, 1.0]
            >>> intrinsics = torch.tensor([[20.0, 0.0, 14.0], [0.0, 30.0, 14.0], [0.0, 0.0, 1.0]])
            >>> (original_from_processed @ intrinsics.double()).tolist()
            [[40.0, 0.0, 28.5], [0.0, 60.0, 42.5], [0.0, 0.0, 1.0]]

            ```
        """
        if return_tensors != "pt":
            raise ValueError(f"`return_tensors` must be 'pt', got {return_tensors!r}. Convert the tensors afterwards.")
        timestamps_s = None
        if _is_video(images):
            images, timestamps_s = load_video_frames(
                images, num_frames=DEFAULT_NUM_FRAMES if num_frames is None else num_frames
            )
        elif num_frames is not None:
            raise ValueError(
                f"`num_frames` is for a video file or a folder of images, got {num_frames} with frames that are chosen "
                f"already ({type(images).__name__}). Leave it out."
            )
        frames = [_fit(_to_pil(image), self.mode, self.image_size, self.patch_size) for image in _split_frames(images)]
        if not frames:
            raise ValueError("`images` must hold at least one frame, got none.")
        sizes = {frame.pixels.shape[:2] for frame in frames}
        common = tuple(max(sides) for sides in zip(*sizes, strict=True))
        if len(sizes) > 1:
            logger.info(f"Frames of sizes {sorted(sizes)} are padded with white to {common}.")
        frames = [_pad(frame, common) for frame in frames]
        boxes, maps = [], []
        for frame in frames:
            (scale_x, scale_y), (left, top), (height, width) = frame.scale, frame.offset, frame.original_size
            right, bottom = left + round(scale_x * width), top + round(scale_y * height)
            boxes.append([max(0, left), max(0, top), right, min(common[0], bottom)])
            maps.append(
                [
                    [1 / scale_x, 0.0, (0.5 - left) / scale_x - 0.5],
                    [0.0, 1 / scale_y, (0.5 - top) / scale_y - 0.5],
                    [0.0, 0.0, 1.0],
                ]
            )
        pixels = torch.from_numpy(np.stack([frame.pixels for frame in frames])).permute(0, 3, 1, 2)
        data = {
            "pixel_values": pixels.float() / 255,
            "original_from_processed": torch.tensor(maps, dtype=torch.float64),
            "content_boxes": torch.tensor(boxes),
            "original_sizes": torch.tensor([frame.original_size for frame in frames]),
        }
        if timestamps_s is not None:
            data["timestamps_s"] = torch.from_numpy(timestamps_s)
        return BatchFeature(data)


def preprocess_images(images: Any, mode: str = "crop", *, image_size: int = 518, patch_size: int = 14) -> torch.Tensor:
    """
    Bring the frames of one scene to the size that VGGT takes.

    Args:
        images (`list` of path, `PIL.Image.Image`, `numpy.ndarray` or `torch.Tensor`, one of them, or a video):
            Frames, as [`VggtImageProcessor`] takes them; of a video, 16.
        mode (`str`, defaults to `"crop"`): `"crop"` or `"pad"`.
        image_size (`int`, defaults to 518): Side in pixels that frames are resized to.
        patch_size (`int`, defaults to 14): Patch side in pixels of the model.

    Returns:
        `torch.FloatTensor` of shape `(num_frames, 3, height, width)`: RGB in [0, 1]. Add the batch axis for the model.

    Raises:
        ValueError: As [`VggtImageProcessor`].
    """
    return VggtImageProcessor(mode, image_size=image_size, patch_size=patch_size)(images)["pixel_values"]


__all__ = ["VggtImageProcessor", "check_pixel_values", "decode_pose", "encode_pose", "preprocess_images"]
