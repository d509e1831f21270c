# SPDX-License-Identifier: Apache-2.0
"""
A picture of a scene folder: four frames, the room from above with its boxes, and the camera's path.

Needs Pillow for drawing and PyAV for reading the video; no ray caster.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from safetensors.numpy import load_file

from geode.data.synthetic_rooms.boxes import footprint


SIZE = (1280, 1040)  # (width, height) of the picture
SCALE = 2  # everything is drawn this much larger, then reduced, which smooths its edges
MARGIN = 28
PANEL_WIDTH = 310
NUM_FRAMES_SHOWN = 4
FLOOR_CUT_M = 0.03
CEILING_CUT_M = 2.2  # points above are left out, so that one looks into the room

PAPER = (250, 249, 246)
INK = (38, 42, 48)
FAINT = (128, 132, 138)
TRUTH = (22, 122, 94)
PREDICTION = (214, 64, 42)
PATH = (32, 92, 196)
AXES = ((200, 52, 52), (40, 150, 60))


class _Plan(NamedTuple):
    """Where a scene point falls on the page: rotate to the walls, scale, flip y."""

    rotation: np.ndarray
    center: np.ndarray
    pixels_per_m: float
    origin: np.ndarray
    half: np.ndarray

    def to_page(self, points: np.ndarray) -> np.ndarray:
        turned = (np.asarray(points)[..., :2] @ self.rotation.T - self.center) * self.pixels_per_m
        return turned * [1.0, -1.0] + self.origin


def _font(size: float) -> ImageFont.ImageFont:
    return ImageFont.load_default(size * SCALE)


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


def _fit_plan(polygon: np.ndarray, region: tuple[float, float, float, float]) -> _Plan:
    """Choose the turn (walls along the page, the longer side across) and the scale that fill a region of the page."""
    edges = np.roll(polygon, -1, axis=0) - polygon
    longest = edges[np.argmax(np.linalg.norm(edges, axis=1))]
    turn = -math.atan2(longest[1], longest[0])
    turn -= math.pi * round(turn / math.pi)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    turned = polygon @ rotation.T
    low, high = turned.min(axis=0), turned.max(axis=0)
    left, top, right, bottom = region
    pixels_per_m = min((right - left) / (high[0] - low[0]), (bottom - top) / (high[1] - low[1]))
    half = 0.5 * (high - low) * pixels_per_m
    origin = np.array([left + half[0], 0.5 * (top + bottom)])
    return _Plan(rotation, 0.5 * (low + high), pixels_per_m, origin, half)


def _paint_points(image: Image.Image, plan: _Plan, points: np.ndarray, colors: np.ndarray) -> None:
    """Splat the floor's points broadly, then all points, the highest last; lightened so that outlines stand out."""
    small = max(1, round(0.014 * plan.pixels_per_m))
    is_floor = points[:, 2] < FLOOR_CUT_M
    _splat(image, plan, points[is_floor], colors[is_floor], reach=3 * small)
    keep = points[:, 2] < CEILING_CUT_M
    _splat(image, plan, points[keep], colors[keep], reach=small)


def _splat(image: Image.Image, plan: _Plan, points: np.ndarray, colors: np.ndarray, *, reach: int) -> None:
    order = np.argsort(points[:, 2], kind="stable")
    page = np.floor(plan.to_page(points[order])).astype(int)
    canvas = np.array(image)
    soft = (0.72 * colors[order] + 0.28 * 255).astype(np.uint8)
    inside = (np.abs(page - plan.origin) <= plan.half).all(axis=1)
    page, soft = page[inside], soft[inside]
    # Of each cell of half the reach the last point is enough: the others would be painted over.
    cells = page // max(1, reach // 2)
    last = len(cells) - 1 - np.unique(cells[::-1] @ [1, canvas.shape[0]], return_index=True)[1]
    page, soft = page[np.sort(last)], soft[np.sort(last)]
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            y = np.clip(page[:, 1] + dy, 0, canvas.shape[0] - 1)
            x = np.clip(page[:, 0] + dx, 0, canvas.shape[1] - 1)
            canvas[y, x] = soft
    image.paste(Image.fromarray(canvas))


def _outline(draw: ImageDraw.ImageDraw, plan: _Plan, box: np.ndarray, color, *, width: float) -> None:
    corners = [tuple(corner) for corner in plan.to_page(footprint(box))]
    draw.line(
        [*corners, corners[0], corners[1]], fill=(255, 255, 255), width=round((width + 2.0) * SCALE), joint="curve"
    )
    draw.line([*corners, corners[0], corners[1]], fill=color, width=round(width * SCALE), joint="curve")


def _label(draw: ImageDraw.ImageDraw, plan: _Plan, text: str, at: np.ndarray, color, taken: list) -> None:
    """Write a name at a point of the page, or as near to it as other names allow."""
    font, pad = _font(13), 3 * SCALE
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font, anchor="mm")
    half_x, half_y = 0.5 * (right - left) + pad, 0.5 * (bottom - top) + pad
    steps = sorted(
        ((dx, dy) for dx in range(-90, 91, 10) for dy in range(-90, 91, 6)),
        key=lambda step: step[0] ** 2 + step[1] ** 2,
    )
    low, high = plan.origin - plan.half, plan.origin + plan.half
    for dx, dy in steps:
        x, y = at[0] + dx * SCALE, at[1] + dy * SCALE
        x = min(max(x, low[0] + half_x + 2), high[0] - half_x - 2)
        y = min(max(y, low[1] + half_y + 2), high[1] - half_y - 2)
        spot = (x - half_x, y - half_y, x + half_x, y + half_y)
        if all(spot[2] < t[0] or t[2] < spot[0] or spot[3] < t[1] or t[3] < spot[1] for t in taken):
            break
    taken.append(spot)
    if math.hypot(x - at[0], y - at[1]) > 1.6 * half_y + 4 * SCALE:
        draw.line([tuple(at), (x, y)], fill=color, width=SCALE)
    draw.rounded_rectangle(spot, radius=4 * SCALE, fill=(255, 255, 255), outline=color, width=SCALE)
    draw.text((x, y), text, font=font, fill=color, anchor="mm")


def _camera_path(draw: ImageDraw.ImageDraw, plan: _Plan, cameras: np.ndarray, shown: list[int]) -> list[tuple]:
    """Draw the path and a numbered field of view at each frame shown; return the spots that they take."""
    centers = plan.to_page(cameras[:, :3, 3])
    for width, color in ((5.0, (255, 255, 255)), (2.5, PATH)):
        draw.line([tuple(center) for center in centers], fill=color, width=round(width * SCALE), joint="curve")
    spots, radius = [], 9 * SCALE
    for number, index in enumerate(shown, start=1):
        ahead = cameras[index, :3, 2] / np.linalg.norm(cameras[index, :2, 2])
        aside = np.array([-ahead[1], ahead[0], 0.0])
        apex = cameras[index, :3, 3]
        fan = plan.to_page(np.stack([apex, apex + 0.42 * ahead + 0.36 * aside, apex + 0.42 * ahead - 0.36 * aside]))
        draw.polygon([tuple(corner) for corner in fan], fill=(205, 222, 250), outline=PATH, width=SCALE)
        x, y = centers[index]
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=PATH, outline=(255, 255, 255), width=SCALE)
        draw.text((x, y), str(number), font=_font(12), fill=(255, 255, 255), anchor="mm")
        spots.append((x - radius, y - radius, x + radius, y + radius))
    return spots


def _arrow(draw: ImageDraw.ImageDraw, start: np.ndarray, along: np.ndarray, color, name: str) -> None:
    end = start + along
    unit = along / np.linalg.norm(along)
    side = np.array([-unit[1], unit[0]])
    head = 7 * SCALE
    draw.line([tuple(start), tuple(end)], fill=color, width=2 * SCALE)
    tip = [end + head * unit, end + 0.5 * head * side, end - 0.5 * head * side]
    draw.polygon([tuple(corner) for corner in tip], fill=color)
    draw.text(tuple(end + 2.1 * head * unit), name, font=_font(13), fill=color, anchor="mm")


def _strip(image: Image.Image, draw: ImageDraw.ImageDraw, frames: np.ndarray, shown: list[int], top: float) -> float:
    """Paste the frames side by side; return the strip's lower end."""
    gap = 10
    width = (SIZE[0] - 2 * MARGIN - gap * (len(shown) - 1)) / len(shown)
    height = width * frames.shape[1] / frames.shape[2]
    for number, index in enumerate(shown, start=1):
        left = MARGIN + (number - 1) * (width + gap)
        picture = Image.fromarray(frames[index]).resize(
            (round(width * SCALE), round(height * SCALE)), Image.Resampling.LANCZOS
        )
        image.paste(picture, (round(left * SCALE), round(top * SCALE)))
        x, y, radius = (left + 16) * SCALE, (top + 16) * SCALE, 10 * SCALE
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=PATH, outline=(255, 255, 255), width=SCALE)
        draw.text((x, y), str(number), font=_font(13), fill=(255, 255, 255), anchor="mm")
    return top + height


def _side_panel(
    draw: ImageDraw.ImageDraw, scene: dict, plan: _Plan, left: float, top: float, *, has_answers: bool
) -> None:
    """Draw the legend, the facts of the room, the axes of the scene frame and the scale bar."""
    x, y = left * SCALE, top * SCALE
    entries = [("boxes of the objects (truth)", TRUTH)]
    entries += [("boxes that the model gives", PREDICTION)] if has_answers else []
    entries += [("path of the camera", PATH)]
    for text, color in entries:
        draw.line((x, y + 8 * SCALE, x + 26 * SCALE, y + 8 * SCALE), fill=color, width=3 * SCALE)
        draw.text((x + 36 * SCALE, y + 8 * SCALE), text, font=_font(14), fill=INK, anchor="lm")
        y += 25 * SCALE
    y += 14 * SCALE
    size = scene["room"]["size_m"]
    facts = [
        f"floor {scene['room']['area_m2']:.1f} m2, height {size[2]:.2f} m",
        f"{len(scene['objects'])} objects, {len({item['category'] for item in scene['objects']})} categories",
        f"{scene['camera']['num_frames']} frames at {scene['camera']['fps']:g} per second",
    ]
    for text in facts:
        draw.text((x, y), text, font=_font(14), fill=FAINT, anchor="lt")
        y += 22 * SCALE
    y += 64 * SCALE
    base = np.array([x + 62 * SCALE, y + 20 * SCALE])
    for name, axis, color in (("x", (1.0, 0.0), AXES[0]), ("y", (0.0, 1.0), AXES[1])):
        along = plan.rotation @ np.asarray(axis) * [1.0, -1.0]
        _arrow(draw, base, 36 * SCALE * along, color, name)
    draw.ellipse((base[0] - 4 * SCALE, base[1] - 4 * SCALE, base[0] + 4 * SCALE, base[1] + 4 * SCALE), fill=INK)
    draw.text((x + 132 * SCALE, base[1]), "z towards you", font=_font(13), fill=FAINT, anchor="lm")
    y = base[1] + 92 * SCALE
    metre = plan.pixels_per_m
    draw.line((x, y, x + metre, y), fill=INK, width=3 * SCALE)
    for tick in (x, x + metre):
        draw.line((tick, y - 5 * SCALE, tick, y + 5 * SCALE), fill=INK, width=2 * SCALE)
    draw.text((x + 0.5 * metre, y + 9 * SCALE), "1 m", font=_font(14), fill=INK, anchor="mt")


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
    image = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), PAPER)
    draw = ImageDraw.Draw(image)
    title = f"{scene['room']['type'].capitalize()}, seen by a walking camera"
    draw.text((MARGIN * SCALE, 18 * SCALE), title, font=_font(24), fill=INK, anchor="lt")
    bottom = _strip(image, draw, frames, shown, 60)
    region = tuple(value * SCALE for value in (MARGIN + 4, bottom + 30, SIZE[0] - PANEL_WIDTH, SIZE[1] - MARGIN))
    plan = _fit_plan(np.asarray(scene["room"]["floor_polygon"]), region)
    spare = SIZE[0] - PANEL_WIDTH - MARGIN - (plan.origin[0] + plan.half[0]) / SCALE
    plan = plan._replace(
        origin=np.add(plan.origin, [0.5 * spare * SCALE, 0.0])
    )  # plan and panel together in the middle
    points, colors = colored_points(folder, frames)
    _paint_points(image, plan, points, colors)
    walls = [*(plan.origin - plan.half), *(plan.origin + plan.half)]
    draw.rectangle(walls, outline=INK, width=3 * SCALE)
    cameras = load_file(folder / "frames.safetensors")["world_from_cam"]
    boxes = [(item["category"], np.asarray(item["box"])) for item in scene["objects"]]
    for _, box in boxes:
        _outline(draw, plan, box, TRUTH, width=2.0)
    for _, box in predicted:
        _outline(draw, plan, box, PREDICTION, width=2.5)
    taken = _camera_path(draw, plan, cameras, shown)
    for name, box in boxes:
        _label(draw, plan, name, plan.to_page(box), TRUTH, taken)
    for name, box in predicted:
        _label(draw, plan, name, plan.to_page(box), PREDICTION, taken)
    panel = plan.origin[0] / SCALE + plan.half[0] / SCALE + 32
    _side_panel(draw, scene, plan, panel, bottom + 34, has_answers=bool(predicted))
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    image.resize(SIZE, Image.Resampling.LANCZOS).save(out_png)
