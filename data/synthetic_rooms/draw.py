# SPDX-License-Identifier: Apache-2.0
"""
A picture of a scene folder: four frames, the room from above with its boxes, and the camera's path.

Needs Pillow for drawing and PyAV for reading the video; no ray caster.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from geode.data.plans import (
    INK,
    NUM_FRAMES_SHOWN,
    PATH,
    PREDICTION,
    SCALE,
    draw_camera_path,
    draw_label,
    draw_panel,
    draw_strip,
    lay_out,
    new_page,
    outline_box,
    paint_points,
    save_page,
)
from geode.data.synthetic_rooms.boxes import footprint


TRUTH = (22, 122, 94)


def read_video(path: Path) -> np.ndarray:
    """
    Decode a video.

    Args:
        path (`Path`): The file.

    Returns:
        `np.ndarray` of shape `(num_frames, height, width, 3)`: uint8 sRGB.

    Raises:
        ImportError: If PyAV is missing.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "Reading a video requires PyAV, which is not installed. Run `pip install geode-vlm[video]`."
        ) from error
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def colored_points(folder: Path, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Lift the stored depth maps of a scene folder to points with the video's colours.

    Args:
        folder (`Path`): The scene folder.
        frames (`np.ndarray` of shape `(num_frames, height, width, 3)`): Its video.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Points `(num_points, 3)` in the scene frame, in metres, and colours
        `(num_points, 3)`, uint8.
    """
    stored = load_file(folder / "frames.safetensors")
    depth = stored["depth_mm"].astype(np.float64) / 1000.0
    intrinsics, (height, width) = stored["depth_intrinsics"], depth.shape[1:]
    v, u = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    rays = np.stack(
        [(u - intrinsics[0, 2]) / intrinsics[0, 0], (v - intrinsics[1, 2]) / intrinsics[1, 1], np.ones_like(u)],
        axis=-1,
    )
    points, colors = [], []
    for pose, frame_depth, frame in zip(stored["world_from_cam"], depth, frames, strict=True):
        valid = frame_depth > 0
        points_cam = (rays * frame_depth[..., None])[valid]
        points.append(points_cam @ pose[:3, :3].T + pose[:3, 3])
        small = Image.fromarray(frame).resize((width, height), Image.Resampling.BOX)
        colors.append(np.asarray(small)[valid])
    return np.concatenate(points), np.concatenate(colors)


def _as_box(box) -> np.ndarray:
    """Accept seven numbers or an object with `center`, `size` and `yaw`."""
    values = [*box.center, *box.size, box.yaw] if hasattr(box, "center") else list(box)
    if len(values) != 7:
        raise ValueError(
            f"`answers` must hold boxes of 7 numbers (cx, cy, cz, dx, dy, dz, yaw), got {len(values)} numbers."
        )
    return np.asarray(values, dtype=np.float64)


def draw_scene(folder: Path, out_png: Path, *, answers: list[tuple[str, object]] | None = None) -> None:
    """
    Draw a scene folder: frames on top, the room from above below.

    Args:
        folder (`Path`): A folder as `build_scene` writes it.
        out_png (`Path`): Where to write the picture.
        answers (`list[tuple[str, object]]`, *optional*): Names and predicted boxes in the scene frame: seven numbers
            `(cx, cy, cz, dx, dy, dz, yaw)`, or objects with `center`, `size` and `yaw`.

    Raises:
        ValueError: If an answer's box does not have seven numbers.
    """
    folder = Path(folder)
    scene = json.loads((folder / "scene.json").read_text(encoding="ascii"))
    predicted = [(name, _as_box(box)) for name, box in answers or []]
    frames = read_video(folder / "room.mp4")
    shown = np.linspace(0, len(frames), NUM_FRAMES_SHOWN, endpoint=False).astype(int).tolist()
    image, draw = new_page(f"{scene['room']['type'].capitalize()}, seen by a walking camera")
    bottom = draw_strip(image, draw, frames, shown, 60)
    plan, beside = lay_out(np.asarray(scene["room"]["floor_polygon"]), bottom)
    points, colors = colored_points(folder, frames)
    paint_points(image, plan, points, colors)
    walls = [*(plan.origin - plan.half), *(plan.origin + plan.half)]
    draw.rectangle(walls, outline=INK, width=3 * SCALE)
    cameras = load_file(folder / "frames.safetensors")["world_from_cam"]
    boxes = [(item["category"], np.asarray(item["box"])) for item in scene["objects"]]
    for _, box in boxes:
        outline_box(draw, plan, footprint(box), TRUTH, width=2.0)
    for _, box in predicted:
        outline_box(draw, plan, footprint(box), PREDICTION, width=2.5)
    taken = draw_camera_path(draw, plan, cameras, shown)
    for name, box in boxes:
        draw_label(draw, plan, name, plan.to_page(box), TRUTH, taken)
    for name, box in predicted:
        draw_label(draw, plan, name, plan.to_page(box), PREDICTION, taken)
    entries = [("boxes of the objects (truth)", TRUTH)]
    entries += [("boxes that the model gives", PREDICTION)] if predicted else []
    facts = [
        f"floor {scene['room']['area_m2']:.1f} m2, height {scene['room']['size_m'][2]:.2f} m",
        f"{len(scene['objects'])} objects, {len({item['category'] for item in scene['objects']})} categories",
        f"{scene['camera']['num_frames']} frames at {scene['camera']['fps']:g} per second",
    ]
    entries += [("path of the camera", PATH)]
    draw_panel(draw, plan, beside, entries=entries, facts=facts, scale_label="1 m")
    save_page(image, Path(out_png))
