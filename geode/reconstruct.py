# SPDX-License-Identifier: Apache-2.0
"""What `geode reconstruct` does: a video becomes geometry, cameras, a point cloud and a picture."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging

from geode.configuration.configuration_geode import GeodeConfig
from geode.data.plans import draw_geometry
from geode.hub_cards.terms import forbids_commerce
from geode.hub_cards.vggt_card import resolve_license
from geode.modeling_geode.geometry_geode import invert_rigid
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.reconstruction_geode import reconstruct_with_vggt
from geode.modeling_geode.scene_geode import KnownLength, SceneGeometry
from geode.modeling_geode.vggt_geode import VggtModel, convert_vggt_checkpoint
from geode.modeling_geode.vggt_processing_geode import VggtImageProcessor, encode_pose
from geode.modeling_geode.video_processing_geode import load_video_frames
from geode.vggt_export import find_origin


logger = logging.get_logger(__name__)

DEFAULT_MODEL = "facebook/VGGT-1B"
PICTURE, CLOUD, COLMAP_FOLDER = "scene.png", "points.ply", "colmap"


def reconstruct_video(
    video: str | os.PathLike,
    out: str | os.PathLike,
    *,
    model: str | os.PathLike = DEFAULT_MODEL,
    revision: str | None = None,
    num_frames: int = 16,
    image_size: int | None = None,
    mode: str = "crop",
    frames_chunk_size: int | None = None,
    min_confidence: float | None = None,
    up: tuple[float, float, float] | None = None,
    metres_per_unit: float | None = None,
    camera_height_m: float | None = None,
    known_length: tuple[float, ...] | None = None,
    camera_positions: str | os.PathLike | None = None,
) -> SceneGeometry:
    """
    Reconstruct the scene of a video, and write it to a folder.

    The folder is a saved `SceneGeometry`, so `geode ask VIDEO --geometry FOLDER` takes it. Beside it lie `points.ply`,
    `colmap/` (a text model and the frames, at the video's own resolution) and `scene.png`. At most one source of scale is
    taken; without any, lengths have no unit.

    Args:
        video (`str` or `os.PathLike`):
            A video file or a folder of images, see `load_video_frames`.
        out (`str` or `os.PathLike`):
            A folder that is new or empty.
        model (`str` or `os.PathLike`, defaults to `"facebook/VGGT-1B"`):
            A VGGT model in our form, public VGGT weights (a file, a folder or a name on the Hub), or a GEODE model with a
            reconstructor.
        revision (`str`, *optional*):
            Branch, tag or commit of a name on the Hub.
        num_frames (`int`, defaults to 16):
            Frames to take of the video, evenly spaced.
        image_size (`int`, *optional*):
            Width in pixels that frames are resized to; the model's by default. A smaller one is faster.
        mode (`str`, defaults to `"crop"`):
            `"crop"` or `"pad"`, see `VggtImageProcessor`.
        frames_chunk_size (`int`, *optional*):
            Frames handled at a time, which bounds memory.
        min_confidence (`float`, *optional*):
            Least confidence of a pixel; without it the lowest fifth is dropped.
        up (`tuple[float, float, float]`, *optional*):
            Direction against gravity in the first camera's axes (+x right, +y down, +z forward); without it the floor's normal.
        metres_per_unit (`float`, *optional*):
            The scale itself.
        camera_height_m (`float`, *optional*):
            Height of the first camera above the floor.
        known_length (`tuple[float, ...]` of 7, *optional*):
            Frame, u and v of one end, frame, u and v of the other, and the distance in metres: pixels of the frames as they lie
            in `colmap/images`, counted from 0.
        camera_positions (`str` or `os.PathLike`, *optional*):
            A text file with x, y and z in metres in each line, one line for each frame taken.

    Returns:
        [`SceneGeometry`]: What was written.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If `out` holds something, or an input is not as described.
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"`out` must be new or empty, and {str(folder)!r} is not. Choose another folder.")
    options: dict[str, Any] = {
        "metres_per_unit": metres_per_unit,
        "camera_height_m": camera_height_m,
        "min_confidence": min_confidence,
        "up": "floor" if up is None else up,
    }
    if known_length is not None:
        options["known_length"] = _known_length(known_length)
    if camera_positions is not None:
        options["camera_positions_m"] = read_positions(camera_positions)
    frames, timestamps_s = load_video_frames(video, num_frames=num_frames)
    if np.isfinite(timestamps_s).all():
        options["timestamps_s"] = timestamps_s
    reconstructor = load_reconstructor(model, revision)
    with show_progress(reconstructor, len(frames), frames_chunk_size):
        scene = reconstruct_with_vggt(
            frames, reconstructor, mode=mode, image_size=image_size, frames_chunk_size=frames_chunk_size, **options
        )
    size = {"image_size": image_size or reconstructor.config.image_size, "patch_size": reconstructor.config.patch_size}
    original_from_processed = VggtImageProcessor(mode, **size)(frames)["original_from_processed"]
    folder.mkdir(parents=True, exist_ok=True)
    scene.save_ply(folder / CLOUD)
    write_colmap(scene, frames, folder / COLMAP_FOLDER, intrinsics=original_from_processed @ scene.intrinsics.double())
    draw_geometry(scene, frames, folder / PICTURE, title=f"{Path(video).name}, seen by {len(frames)} cameras")
    scene.save(folder)  # last, so that a folder with geometry is a complete one
    return scene


def _known_length(numbers: tuple[float, ...]) -> KnownLength:
    if len(numbers) != 7 or any(frame != int(frame) for frame in (numbers[0], numbers[3])):
        raise ValueError(
            f"`known_length` must be FRAME U V FRAME U V METRES with whole frames, got {' '.join(map(str, numbers))}."
        )
    first, u, v, second, other_u, other_v, length_m = numbers
    return KnownLength((int(first), u, v), (int(second), other_u, other_v), length_m)


def read_positions(path: str | os.PathLike) -> np.ndarray:
    """
    Read positions in metres, one line `x y z` for each.

    Args:
        path (`str` or `os.PathLike`): A text file. Text after `#` is left out.

    Returns:
        `np.ndarray` of shape `(num_positions, 3)`: float64.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line does not hold three numbers.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`camera_positions` must be a text file, and there is none at {os.fspath(path)!r}.")
    try:
        positions = np.loadtxt(path, ndmin=2)
    except ValueError as error:
        raise ValueError(f"`camera_positions` {os.fspath(path)!r} must hold `x y z` in each line: {error}.") from error
    if positions.shape[1] != 3:
        raise ValueError(
            f"`camera_positions` {os.fspath(path)!r} must hold 3 numbers in each line, got {positions.shape[1]}."
        )
    return positions


def load_reconstructor(model: str | os.PathLike, revision: str | None = None) -> VggtModel:
    """
    Load VGGT, from whatever holds it.

    Args:
        model (`str` or `os.PathLike`): See [`reconstruct_video`].
        revision (`str`, *optional*): See [`reconstruct_video`].

    Returns:
        [`VggtModel`]: In eval mode.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it is of another kind, or a GEODE model without a reconstructor.
    """
    logging.disable_progress_bar()
    origin = find_origin(model, revision)
    pinned = {} if origin.commit is None else {"revision": origin.commit}
    license_id = resolve_license(origin.name, origin.commit, None)
    if forbids_commerce(license_id):
        logger.warning(f"The weights of {origin.name} are under {license_id}: they are not for commercial use.")
    if origin.model_type is None:
        return convert_vggt_checkpoint(origin.model, **pinned)
    if origin.model_type != GeodeConfig.model_type:
        return VggtModel.from_pretrained(origin.model, **pinned).eval()
    reconstructor = GeodeForConditionalGeneration.from_pretrained(origin.model, **pinned).detach_reconstructor()
    if reconstructor is None:
        raise ValueError(
            f"`model` must hold a reconstructor, and the GEODE model {origin.model!r} has none. Name VGGT."
        )
    return reconstructor


@contextlib.contextmanager
def show_progress(model: VggtModel, num_frames: int, frames_chunk_size: int | None = None) -> Iterator[None]:
    """Show a bar on standard error while the model runs: one step per layer and per chunk of trunk and depth head."""
    chunks = math.ceil(num_frames / (frames_chunk_size or model.config.frames_chunk_size))
    parts = [model.trunk, *model.layers, model.camera_head, model.depth_head]
    with tqdm(total=2 * chunks + len(model.layers) + 1, desc="reconstructing", unit="step") as bar:

        def advance(*_) -> None:
            bar.update()

        hooks = [part.register_forward_hook(advance) for part in parts]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def write_colmap(
    scene: SceneGeometry, frames: list[np.ndarray], folder: str | os.PathLike, *, intrinsics: torch.Tensor
) -> None:
    """
    Write cameras and points as a COLMAP text model, and the frames beside it.

    Source: COLMAP's documentation, "Output format", text.

    Convention:
        - The world is the scene frame, in metres if the scene is metric. COLMAP's poses are `cam_from_world`, with OpenCV axes.
        - COLMAP's pixel (0, 0) is the corner of the top-left pixel, so that principal points are larger by one half.

    Args:
        scene ([`SceneGeometry`]):
            Cameras and points.
        frames (`list[np.ndarray]`):
            A frame `(height, width, 3)`, uint8, for each camera; they become `images/frame_0000.png` and so on.
        folder (`str` or `os.PathLike`):
            Where `cameras.txt`, `images.txt`, `points3D.txt` and `images/` go.
        intrinsics (`torch.Tensor` of shape `(num_cameras, 3, 3)`):
            Pinhole matrices in pixels of `frames`.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    cam_from_world = invert_rigid(scene.world_from_cam.double())
    cameras, images = (
        ["# CAMERA_ID, MODEL, WIDTH, HEIGHT, FX, FY, CX, CY"],
        ["# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME"],
    )
    for index, frame in enumerate(frames):
        height, width = frame.shape[:2]
        name = f"frame_{index:04d}.png"
        Image.fromarray(frame).save(folder / "images" / name)
        fx, fy, cx, cy = intrinsics[index][[0, 1, 0, 1], [0, 1, 2, 2]].tolist()
        cameras.append(f"{index + 1} PINHOLE {width} {height} {fx:.9g} {fy:.9g} {cx + 0.5:.9g} {cy + 0.5:.9g}")
        encoded = encode_pose(cam_from_world[index, :3], intrinsics[index].double(), (height, width)).tolist()
        (tx, ty, tz), (qx, qy, qz, qw) = encoded[:3], encoded[3:7]
        pose = " ".join(f"{value:.9g}" for value in (qw, qx, qy, qz, tx, ty, tz))
        images += [f"{index + 1} {pose} {index + 1} {name}", ""]  # the empty line would hold keypoints
    points = ["# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[]"]
    colors = (scene.colors * 255).round().int().tolist()
    rows = zip(scene.points.tolist(), colors, strict=True)
    for index, ((x, y, z), (red, green, blue)) in enumerate(rows, start=1):
        points.append(f"{index} {x:.6g} {y:.6g} {z:.6g} {red} {green} {blue} 0")
    for name, lines in (("cameras.txt", cameras), ("images.txt", images), ("points3D.txt", points)):
        (folder / name).write_text("\n".join([*lines, ""]), encoding="ascii")


__all__ = ["load_reconstructor", "read_positions", "reconstruct_video", "show_progress", "write_colmap"]
