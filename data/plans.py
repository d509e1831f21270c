# SPDX-License-Identifier: Apache-2.0
"""Pictures of scenes from above, with a strip of frames and the cameras' path. They need Pillow only."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from geode.modeling_geode.scene_geode import SceneGeometry
from geode.modeling_geode.scene_inputs_geode import nominal_unit


SIZE = (1280, 1040)  # (width, height) of the picture
SCALE = 2  # everything is drawn this much larger, then reduced, which smooths its edges
MARGIN = 28
PANEL_WIDTH = 310
NUM_FRAMES_SHOWN = 4
MAX_STRIP_HEIGHT = 300  # of portrait frames
FLOOR_CUT_M = 0.03
CEILING_CUT_M = 2.2  # points above are left out, so that one looks into the room

PAPER = (250, 249, 246)
INK = (38, 42, 48)
FAINT = (128, 132, 138)
PATH = (32, 92, 196)
PREDICTION = (214, 64, 42)
AXES = ((200, 52, 52), (40, 150, 60))


class Plan(NamedTuple):
    """Where a scene point falls on the page: rotate to the walls, scale, flip y."""

    rotation: np.ndarray
    center: np.ndarray
    pixels_per_m: float
    origin: np.ndarray
    half: np.ndarray

    def to_page(self, points: np.ndarray) -> np.ndarray:
        """Points `(..., 2)` or `(..., 3)` to pixels of the page."""
        turned = (np.asarray(points)[..., :2] @ self.rotation.T - self.center) * self.pixels_per_m
        return turned * [1.0, -1.0] + self.origin


def font_of(size: float) -> ImageFont.ImageFont:
    """The font of a size in pixels of the final picture."""
    return ImageFont.load_default(size * SCALE)


def fit_plan(polygon: np.ndarray, region: tuple[float, float, float, float]) -> Plan:
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
    return Plan(rotation, 0.5 * (low + high), pixels_per_m, origin, half)


def paint_points(image: Image.Image, plan: Plan, points: np.ndarray, colors: np.ndarray) -> None:
    """Splat the floor's points broadly, then all points, the highest last; lightened so that outlines stand out."""
    small = max(1, round(0.014 * plan.pixels_per_m))
    is_floor = points[:, 2] < FLOOR_CUT_M
    _splat(image, plan, points[is_floor], colors[is_floor], reach=3 * small)
    keep = points[:, 2] < CEILING_CUT_M
    _splat(image, plan, points[keep], colors[keep], reach=small)


def _splat(image: Image.Image, plan: Plan, points: np.ndarray, colors: np.ndarray, *, reach: int) -> None:
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


def draw_camera_path(draw: ImageDraw.ImageDraw, plan: Plan, cameras: np.ndarray, shown: list[int]) -> list[tuple]:
    """Draw the path and a numbered field of view at each frame shown; return the spots that they take."""
    centers = plan.to_page(cameras[:, :3, 3])
    for width, color in ((5.0, (255, 255, 255)), (2.5, PATH)):
        draw.line([tuple(center) for center in centers], fill=color, width=round(width * SCALE), joint="curve")
    spots, radius = [], 9 * SCALE
    for number, index in enumerate(shown, start=1):
        # A camera that looks straight down has no heading; its fan shrinks to a point.
        ahead = cameras[index, :3, 2] / max(np.linalg.norm(cameras[index, :2, 2]), 1e-3)
        aside = np.array([-ahead[1], ahead[0], 0.0])
        apex = cameras[index, :3, 3]
        fan = plan.to_page(np.stack([apex, apex + 0.42 * ahead + 0.36 * aside, apex + 0.42 * ahead - 0.36 * aside]))
        draw.polygon([tuple(corner) for corner in fan], fill=(205, 222, 250), outline=PATH, width=SCALE)
        x, y = centers[index]
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=PATH, outline=(255, 255, 255), width=SCALE)
        draw.text((x, y), str(number), font=font_of(12), fill=(255, 255, 255), anchor="mm")
        spots.append((x - radius, y - radius, x + radius, y + radius))
    return spots


def outline_box(draw: ImageDraw.ImageDraw, plan: Plan, corners: np.ndarray, color, *, width: float) -> None:
    """Draw the outline of a box from the corners of its footprint, `(4, 2)` or `(4, 3)` in order, on white."""
    corners = [tuple(corner) for corner in plan.to_page(corners)]
    draw.line(
        [*corners, corners[0], corners[1]], fill=(255, 255, 255), width=round((width + 2.0) * SCALE), joint="curve"
    )
    draw.line([*corners, corners[0], corners[1]], fill=color, width=round(width * SCALE), joint="curve")


def draw_label(draw: ImageDraw.ImageDraw, plan: Plan, text: str, at: np.ndarray, color, taken: list) -> None:
    """Write a name at a point of the page, or as near to it as other names allow."""
    font, pad = font_of(13), 3 * SCALE
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


def draw_arrow(draw: ImageDraw.ImageDraw, start: np.ndarray, along: np.ndarray, color, name: str) -> None:
    """Draw a named arrow."""
    end = start + along
    unit = along / np.linalg.norm(along)
    side = np.array([-unit[1], unit[0]])
    head = 7 * SCALE
    draw.line([tuple(start), tuple(end)], fill=color, width=2 * SCALE)
    tip = [end + head * unit, end + 0.5 * head * side, end - 0.5 * head * side]
    draw.polygon([tuple(corner) for corner in tip], fill=color)
    draw.text(tuple(end + 2.1 * head * unit), name, font=font_of(13), fill=color, anchor="mm")


def draw_strip(image: Image.Image, draw: ImageDraw.ImageDraw, frames, shown: list[int], top: float) -> float:
    """Paste the frames side by side; return the strip's lower end."""
    gap = 10
    width = (SIZE[0] - 2 * MARGIN - gap * (NUM_FRAMES_SHOWN - 1)) / NUM_FRAMES_SHOWN
    height = min(width * frames[shown[0]].shape[0] / frames[shown[0]].shape[1], MAX_STRIP_HEIGHT)
    for number, index in enumerate(shown, start=1):
        left = MARGIN + (number - 1) * (width + gap)
        wide = min(width, height * frames[index].shape[1] / frames[index].shape[0])
        picture = Image.fromarray(frames[index]).resize(
            (round(wide * SCALE), round(height * SCALE)), Image.Resampling.LANCZOS
        )
        image.paste(picture, (round(left * SCALE), round(top * SCALE)))
        x, y, radius = (left + 16) * SCALE, (top + 16) * SCALE, 10 * SCALE
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=PATH, outline=(255, 255, 255), width=SCALE)
        draw.text((x, y), str(number), font=font_of(13), fill=(255, 255, 255), anchor="mm")
    return top + height


def draw_panel(
    draw: ImageDraw.ImageDraw,
    plan: Plan,
    at: tuple[float, float],
    *,
    entries: list[tuple[str, tuple]],
    facts: list[str],
    scale_label: str,
) -> None:
    """Draw a legend, facts, the axes of the scene frame and a bar of one unit, downwards from a point of the page."""
    x, y = at[0] * SCALE, at[1] * SCALE
    for text, color in entries:
        draw.line((x, y + 8 * SCALE, x + 26 * SCALE, y + 8 * SCALE), fill=color, width=3 * SCALE)
        draw.text((x + 36 * SCALE, y + 8 * SCALE), text, font=font_of(14), fill=INK, anchor="lm")
        y += 25 * SCALE
    y += 14 * SCALE
    for text in facts:
        draw.text((x, y), text, font=font_of(14), fill=FAINT, anchor="lt")
        y += 22 * SCALE
    y += 64 * SCALE
    base = np.array([x + 62 * SCALE, y + 20 * SCALE])
    for name, axis, color in (("x", (1.0, 0.0), AXES[0]), ("y", (0.0, 1.0), AXES[1])):
        along = plan.rotation @ np.asarray(axis) * [1.0, -1.0]
        draw_arrow(draw, base, 36 * SCALE * along, color, name)
    draw.ellipse((base[0] - 4 * SCALE, base[1] - 4 * SCALE, base[0] + 4 * SCALE, base[1] + 4 * SCALE), fill=INK)
    draw.text((x + 132 * SCALE, base[1]), "z towards you", font=font_of(13), fill=FAINT, anchor="lm")
    y = base[1] + 92 * SCALE
    metre = plan.pixels_per_m
    draw.line((x, y, x + metre, y), fill=INK, width=3 * SCALE)
    for tick in (x, x + metre):
        draw.line((tick, y - 5 * SCALE, tick, y + 5 * SCALE), fill=INK, width=2 * SCALE)
    draw.text((x + 0.5 * metre, y + 9 * SCALE), scale_label, font=font_of(14), fill=INK, anchor="mt")


def new_page(title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty page with a title."""
    image = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN * SCALE, 18 * SCALE), title, font=font_of(24), fill=INK, anchor="lt")
    return image, draw


def lay_out(polygon: np.ndarray, top: float) -> tuple[Plan, tuple[float, float]]:
    """Where the plan goes below `top`, and where the panel beside it: both together in the middle of the page."""
    region = tuple(value * SCALE for value in (MARGIN + 4, top + 30, SIZE[0] - PANEL_WIDTH, SIZE[1] - MARGIN))
    plan = fit_plan(polygon, region)
    spare = SIZE[0] - PANEL_WIDTH - MARGIN - (plan.origin[0] + plan.half[0]) / SCALE
    plan = plan._replace(origin=np.add(plan.origin, [0.5 * spare * SCALE, 0.0]))
    return plan, ((plan.origin[0] + plan.half[0]) / SCALE + 32, top + 34)


def save_page(image: Image.Image, path: Path) -> None:
    """Reduce a page to its final size and write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize(SIZE, Image.Resampling.LANCZOS).save(path)


def draw_geometry(scene: SceneGeometry, frames: list[np.ndarray], path: Path, *, title: str) -> None:
    """
    Draw a scene: four of its frames, the cloud from above without its ceiling, and the cameras' path.

    Args:
        scene ([`SceneGeometry`]): The scene.
        frames (`list[np.ndarray]`): The frames of its cameras, uint8 of one shape `(height, width, 3)` each.
        path (`Path`): Where to write the picture.
        title (`str`): The line on top.
    """
    # A scene of unknown scale is drawn as the model sees it: at the nominal distance from its cameras.
    unit = 1.0 if scene.is_metric else nominal_unit(scene.points, scene.world_from_cam[:, :3, 3])
    points, cameras = scene.points.double().numpy() / unit, scene.world_from_cam.double().numpy()
    cameras[:, :3, 3] /= unit
    shown = np.linspace(0, len(frames), min(NUM_FRAMES_SHOWN, len(frames)), endpoint=False).astype(int).tolist()
    image, draw = new_page(title)
    bottom = draw_strip(image, draw, frames, shown, 60)
    plan, beside = lay_out(outline_of(np.concatenate([points[:, :2], cameras[:, :2, 3]])), bottom)
    paint_points(image, plan, points, (scene.colors * 255).byte().numpy())
    draw_camera_path(draw, plan, cameras, shown)
    extent = " x ".join(f"{side:.2f}" for side in scene.summary()["extent"])
    facts = [
        f"{scene.num_points:,} points, {scene.num_cameras} cameras",
        f"extent {extent} {'m' if scene.is_metric else 'units'}",
        f"scale: {scene.scale_source}",
        f"gravity: {scene.gravity}",
    ]
    label = "1 m" if scene.is_metric else f"{unit:.3g} units"
    draw_panel(draw, plan, beside, entries=[("path of the camera", PATH)], facts=facts, scale_label=label)
    save_page(image, path)


def outline_of(points: np.ndarray) -> np.ndarray:
    """The smallest of 90 turned rectangles around most of the points, `(4, 2)`: its sides follow the walls."""
    best = None
    for turn in np.deg2rad(np.arange(90)):
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        low, high = np.percentile(points[:: max(1, len(points) // 20_000)] @ rotation.T, [0.5, 99.5], axis=0)
        low, high = low - 0.1, high + 0.1
        area = float(np.prod(high - low))
        if best is None or area < best[0]:
            corners = np.array([low, [high[0], low[1]], high, [low[0], high[1]]])
            best = area, corners @ rotation
    return best[1]
