# SPDX-License-Identifier: Apache-2.0
"""Read images and videos, sample frames, and resize them for the vision tower and for the reconstructor."""

import os
import re
import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.utils import logging

from .checked_files_geode import checked_path


try:
    import av
except ImportError:
    av = None

logger = logging.get_logger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Guards against files that never end and against running out of memory; no clip of a room comes near them.
MAX_VIDEO_FRAMES = 2_000_000
MAX_SAMPLED_BYTES = 4 * 1024**3
# 8192 x 8192, below the number at which Pillow warns.
MAX_IMAGE_PIXELS = 2**26
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
# What Pillow raises, beside OSError, for files that are not what they say.
_IMAGE_ERRORS = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where warnings are errors
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
# FFmpeg also reads playlists, which name other files and addresses. Only formats that hold their own pictures pass.
_CONTAINER_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,gif,asf"


class GeodeImageProcessor(PilBackend):
    """
    Image processor of GEODE: a bicubic PIL resize to a fixed size, values in [0, 1], then ImageNet statistics.

    It needs no torchvision. `size` (`{"height": 448, "width": 448}` by default) must be the vision tower's image size;
    the aspect ratio is not kept, as in InternVL.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 448, "width": 448}  # noqa: RUF012 - the library reads and copies this class attribute
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True


def sample_frame_indices(num_available: int, num_frames: int) -> list[int]:
    """
    Choose frames evenly: the one at the centre of each of `num_frames` equal segments.

    Args:
        num_available (`int`):
            Number of frames there are.
        num_frames (`int`):
            Number of frames to choose. If there are fewer, each is chosen once.

    Returns:
        `list[int]`: Increasing indices, `floor((i + 0.5) * num_available / num_frames)`.

    Raises:
        ValueError: If a count is below 1.

    Example:
        >>> from geode.modeling_geode.video_processing_geode import sample_frame_indices
        >>> sample_frame_indices(10, 4)
        [1, 3, 6, 8]
        >>> sample_frame_indices(2, 4)
        [0, 1]
    """
    for name, count in (("num_available", num_available), ("num_frames", num_frames)):
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
    num_frames = min(num_frames, num_available)
    return [(2 * i + 1) * num_available // (2 * num_frames) for i in range(num_frames)]


def load_video_frames(source, *, num_frames: int) -> tuple[list[np.ndarray], np.ndarray]:
    """
    Read evenly spaced frames of a video.

    A file is decoded once, from start to end, and only the chosen frames are kept. Its length is counted, not read
    from its header. Rotation stored in the file, as phones do, is applied.

    Args:
        source (`str`, `os.PathLike`, `list`, `np.ndarray` or `torch.Tensor`):
            A video file; a folder of images, in the order of their names with numbers compared as numbers; a list of
            images as [`load_image`] takes; uint8 of shape `(num_frames, height, width, 3)`; or, as a tensor, also of
            shape `(num_frames, 3, height, width)`.
        num_frames (`int`):
            Number of frames, see [`sample_frame_indices`]. A shorter video gives each of its frames once, with a
            warning.

    Returns:
        `tuple[list[np.ndarray], np.ndarray]`: The frames, uint8 of shape `(height, width, 3)`, and their times in
        seconds. The times are NaN where the source has no clock.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If a video file is to be read and PyAV is missing.
        TypeError: If `source` is of another kind, or its values are not uint8.
        ValueError: If the file is empty, not a video, truncated or corrupt, or too large.
    """
    return load_frame_sets(source, num_frames=[num_frames])[0]


def load_frame_sets(source, *, num_frames: Sequence[int]) -> list[tuple[list[np.ndarray], np.ndarray]]:
    """
    Read several even samplings of one video in one pass; see [`load_video_frames`].

    Args:
        source:
            As in [`load_video_frames`].
        num_frames (`Sequence[int]`):
            Number of frames of each sampling.

    Returns:
        `list[tuple[list[np.ndarray], np.ndarray]]`: Frames and times of each sampling. Samplings share their arrays.
    """
    for count in num_frames:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"`num_frames` must be a whole number of at least 1, got {count!r}.")
    if isinstance(source, str | os.PathLike):
        path = local_path(source, what="video")
        if path.is_file():
            return _load_file(path, num_frames)
        source = _list_folder(path)
    frames = _as_frames(source)
    sets = [sample_frame_indices(len(frames), count) for count in num_frames]
    _warn_if_short(len(frames), max(num_frames, default=0), "the given frames")
    images = {index: load_image(frames[index]) for index in sorted({index for indices in sets for index in indices})}
    return [([images[index] for index in indices], np.full(len(indices), np.nan)) for indices in sets]


class VideoFacts(NamedTuple):
    """
    What a video file holds, counted without decoding it.

    Args:
        num_frames (`int`): Frames.
        height (`int`): Of the pictures as they are stored, before a rotation that the file asks for; in pixels.
        width (`int`): Likewise.
    """

    num_frames: int
    height: int
    width: int


def probe_video(path: str | os.PathLike) -> VideoFacts:
    """
    Count the frames of a video file, so that one that is too long can be refused before it is decoded.

    Args:
        path (`str` or `os.PathLike`):
            A video file.

    Returns:
        [`VideoFacts`]: Its facts. Frames are counted; the size of the pictures is that of the file's header.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If PyAV is missing.
        ValueError: If it is not a video, empty or damaged.
    """
    path = local_path(path, what="video")
    _require_av(path)
    try:
        container, stream = _open(path)
        with container:
            height, width = stream.codec_context.height, stream.codec_context.width
        num_frames = _count_packets(path)
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(_unreadable(path, str(error))) from error
    return VideoFacts(num_frames, height, width)


def load_image(source) -> np.ndarray:
    """
    Read one image as RGB.

    Args:
        source (`str`, `os.PathLike`, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            A file (its EXIF orientation is applied, transparency is laid over white); a PIL image; uint8 of shape
            `(height, width, 3)`; or, as a tensor, also of shape `(3, height, width)`.

    Returns:
        `np.ndarray` of shape `(height, width, 3)`: uint8.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If `source` is of another kind, or its values are not uint8.
        ValueError: If the file is not an image, or shape or size are not those of an image.
    """
    if isinstance(source, str | os.PathLike):
        return _load_image_file(local_path(source, what="image"))
    if isinstance(source, Image.Image):
        _check_size(source.height, source.width, "the image")
        return _to_rgb(source)
    if isinstance(source, np.ndarray | torch.Tensor):
        return _as_frames(source[None])[0]
    raise TypeError(f"An image must be a path, a PIL image, an array or a tensor, got {type(source).__name__}.")


def local_path(source: str | os.PathLike, *, what: str) -> Path:
    """
    Check that `source` names something on this machine.

    Args:
        source (`str` or `os.PathLike`):
            A path, or a `file://` address.
        what (`str`):
            What the path is of, for the message.

    Returns:
        `Path`: The existing path.

    Raises:
        FileNotFoundError: If there is nothing.
        TypeError: If `source` is no path.
        ValueError: If `source` is an address on another machine, or data instead of a path.
    """
    checked_path(what, source)
    text = os.fspath(source)
    if text.startswith("file://"):
        text = text[len("file://") :]
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(//|[^\\/])", text)
    if scheme and not _exists(text):
        raise ValueError(
            f"The {what} must be a local path, got {text[:80]!r}. Nothing is downloaded here: fetch the file first, "
            "for example with `huggingface_hub.hf_hub_download`, and pass its path."
        )
    if not _exists(text):
        raise FileNotFoundError(f"There is no {what} at {text[:200]}. Check the path; it is relative to {Path.cwd()}.")
    return Path(text)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # a name that no file system takes
        return False


# ---- files ----


def _load_image_file(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            size = image.height, image.width
            is_small = size[0] * size[1] <= MAX_IMAGE_PIXELS  # before anything is decoded
            if is_small and not image.mode.startswith(("I", "F")):
                return _to_rgb(ImageOps.exif_transpose(image))
            mode = image.mode
    except _IMAGE_ERRORS as error:
        raise ValueError(
            f"An image file was expected, but {path} cannot be read ({type(error).__name__}: {str(error)[:200]}). It may be "
            f"empty, truncated, too large or of another format than {IMAGE_FORMATS}: save it again as PNG or JPEG."
        ) from error
    _check_size(*size, str(path))
    raise ValueError(_not_8_bits(mode))


def _require_av(path: Path) -> None:
    if av is None:
        raise ImportError(
            f"Reading the video {path} needs PyAV, which is not installed: `pip install geode-vlm[video]`. Or decode "
            "it yourself and pass the frames."
        )


def _load_file(path: Path, num_frames: Sequence[int]) -> list[tuple[list[np.ndarray], np.ndarray]]:
    _require_av(path)
    try:
        total = _count_packets(path)
        sets, kept, decoded = _decode(path, total, num_frames)
        if decoded != total:
            # Packets and frames differ in number where a format hides some: the count of frames is the true one.
            total = decoded
            sets, kept, decoded = _decode(path, total, num_frames)
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(_unreadable(path, str(error))) from error
    _warn_if_short(total, max(num_frames, default=0), str(path))
    return [
        ([kept[index][0] for index in indices], np.array([kept[index][1] for index in indices], dtype=np.float64))
        for indices in sets
    ]


def _unreadable(path: Path, reason: str) -> str:
    return (
        f"A video file was expected, but {path} ({path.stat().st_size} bytes) cannot be read: {reason}. It may be "
        "empty, truncated, corrupt or of another format: copy it again, or re-encode it with `ffmpeg -i in out.mp4`."
    )


def _open(path: Path):
    # Titles and comments may be in any encoding; nobody reads them here.
    container = av.open(
        os.fspath(path.absolute()), options={"format_whitelist": _CONTAINER_FORMATS}, metadata_errors="replace"
    )
    if not container.streams.video:
        container.close()
        raise ValueError(_unreadable(path, "it has no video stream"))
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    # FFmpeg refuses larger pictures before it allocates them, whatever the header says.
    stream.codec_context.options = {"max_pixels": str(MAX_IMAGE_PIXELS)}
    return container, stream


def _count_packets(path: Path) -> int:
    """Count the frames of a file without decoding them. The count in its header is not looked at."""
    container, stream = _open(path)
    count = 0
    with container:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ValueError(_unreadable(path, f"its packet {count} is incomplete"))
            count += packet.size > 0 and not packet.is_discard
            if count > MAX_VIDEO_FRAMES:
                raise ValueError(
                    f"A video may have at most {MAX_VIDEO_FRAMES} frames, and {path} has more. Cut it into parts."
                )
    if count == 0:
        raise ValueError(_unreadable(path, "it has no frames"))
    return count


def _decode(path: Path, total: int, num_frames: Sequence[int]) -> tuple[list[list[int]], dict, int]:
    """
    Decode a file once.

    Returns the indices of each sampling out of `total` frames, the picture and time of each index, and the number of
    frames that there were.
    """
    sets = [sample_frame_indices(total, count) for count in num_frames]
    wanted = {index for indices in sets for index in indices}
    kept, decoded = {}, 0
    container, stream = _open(path)
    with container:
        for index, frame in enumerate(container.decode(stream)):
            decoded = index + 1
            if frame.is_corrupt:
                raise ValueError(_unreadable(path, f"its frame {index} is damaged"))
            if index in wanted:
                _check_size(frame.height, frame.width, f"frame {index} of {path}", num_pictures=len(wanted))
                kept[index] = (_to_upright(frame), _time_of(frame, index, stream.average_rate))
    if not decoded:
        raise ValueError(_unreadable(path, "no frame could be decoded"))
    return sets, kept, decoded


def _time_of(frame, index: int, rate: Fraction | None) -> float:
    """Return the time of a frame; where the file stores none, that of the average rate."""
    if frame.time is not None:
        return float(frame.time)
    return index / float(rate) if rate else float("nan")


def _to_upright(frame) -> np.ndarray:
    """Return the RGB picture, turned by the rotation that the file stores."""
    picture = frame.to_ndarray(format="rgb24")
    quarter_turns, rest = divmod(round(frame.rotation), 90)
    if rest:
        raise ValueError(
            f"The rotation that a video stores must be by quarter turns, got {frame.rotation} degrees. Encode it again, upright."
        )
    return np.ascontiguousarray(np.rot90(picture, quarter_turns))


# ---- frames in memory ----


def _list_folder(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"A video must be a regular file or a folder of images, and {folder} is neither.")
    paths = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not paths:
        raise ValueError(f"The folder {folder} holds no images. Their names must end in one of {IMAGE_SUFFIXES}.")

    def natural(path: Path) -> list:
        # "frame2" comes before "frame10". Odd entries of the split are the digits, so that like meets like.
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]

    return sorted(paths, key=natural)


def _as_frames(source) -> Sequence:
    """Return a sequence of images, each as [`load_image`] takes."""
    if isinstance(source, list | tuple):
        if not source:
            raise ValueError("A video needs at least one frame, got an empty list.")
        return source
    if not isinstance(source, np.ndarray | torch.Tensor):
        raise TypeError(
            "A video must be a path, a folder of images, a list of images, an array or a tensor, got "
            f"{type(source).__name__}. Wrap a single image in a list."
        )
    kind = "tensor" if isinstance(source, torch.Tensor) else "array"
    if source.dtype not in (torch.uint8, np.uint8):
        raise TypeError(f"Frames in an {kind} must be uint8 with values in 0..255, got {source.dtype}.")
    shape = tuple(source.shape)
    if kind == "tensor":
        if source.ndim == 4 and shape[1] == 3 and shape[-1] == 3:
            raise ValueError(f"Frames of shape {shape} could be channels first or last. Pass a list of numpy arrays.")
        if source.ndim == 4 and shape[1] == 3:
            source = source.permute(0, 2, 3, 1)
        source = source.detach().cpu().numpy()
    if source.ndim != 4 or source.shape[-1] != 3 or 0 in shape:
        layouts = "(num_frames, height, width, 3)" + (" or (num_frames, 3, height, width)" if kind == "tensor" else "")
        raise ValueError(f"Frames in an {kind} must have shape {layouts}, got {shape}.")
    return [_checked_picture(frame) for frame in source]


def _checked_picture(frame: np.ndarray) -> np.ndarray:
    _check_size(frame.shape[0], frame.shape[1], "a frame")
    return frame


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        # Pillow would cut every value above 255 off.
        raise ValueError(_not_8_bits(image.mode))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.array(image.convert("RGB"))


def _not_8_bits(mode: str) -> str:
    return f"An image must have 8 bits per channel, got one of mode {mode!r}. Scale its values to 0..255 first."


def _check_size(height: int, width: int, name: str, *, num_pictures: int = 1) -> None:
    if height * width == 0:
        raise ValueError(f"A picture needs at least one pixel; {name} is {height} x {width}.")
    if height * width > MAX_IMAGE_PIXELS or 3 * height * width * num_pictures > MAX_SAMPLED_BYTES:
        raise ValueError(
            f"Pictures may have at most {MAX_IMAGE_PIXELS} pixels and {MAX_SAMPLED_BYTES} bytes together; {name} is "
            f"{height} x {width}, and {num_pictures} are asked for. Ask for fewer frames, or scale them down first."
        )


def _warn_if_short(num_available: int, num_frames: int, name: str) -> None:
    if num_available < num_frames:
        logger.warning_once(
            f"{num_frames} frames were asked of {name}, which has {num_available}: each is used once. Pass "
            f"`num_frames={num_available}` or less to be rid of this warning."
        )


__all__ = [
    "GeodeImageProcessor",
    "VideoFacts",
    "load_frame_sets",
    "load_image",
    "load_video_frames",
    "local_path",
    "probe_video",
    "sample_frame_indices",
]
