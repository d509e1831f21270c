# SPDX-License-Identifier: Apache-2.0
"""Drawings of a room: from above as a picture, and in space as a figure that plotly.js draws in the browser."""

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from geode.data.plans import (
    CEILING_CUT_M,
    INK,
    PAPER,
    PREDICTION,
    SCALE,
    draw_camera_path,
    draw_label,
    fit_plan,
    font_of,
    outline_box,
    outline_of,
    paint_points,
)
from geode.modeling_geode.answers_geode import Box3D
from geode.modeling_geode.geometry_geode import box_corners, evenly_spaced_indices
from geode.modeling_geode.scene_geode import SceneGeometry
from geode.modeling_geode.scene_inputs_geode import nominal_unit


SIZE = (760, 600)  # (width, height) of the picture from above
STRIP_HEIGHT = 120  # of the frames over it
MARGIN = 24
MAX_POINTS = 15_000  # in the browser
MAX_CAMERAS = 8
CAMERA_DEPTH_M = 0.25  # how far the drawn pyramid of a camera reaches
_BOTTOM, _TOP = (0, 4, 6, 2), (1, 5, 7, 3)  # corners of a box in order around it, see `box_corners`


def picture_from_above(geometry: SceneGeometry, boxes: Sequence[Box3D]) -> Image.Image:
    """
    Draw a room from above: the cloud without its ceiling, the cameras' path and the predicted boxes with their numbers.

    Args:
        geometry ([`SceneGeometry`]): The room.
        boxes (`Sequence[Box3D]`): Boxes in the scene frame; the first has number 1.

    Returns:
        `PIL.Image.Image`: A picture of [`SIZE`].
    """
    points, cameras, colors, unit = _drawn_scene(geometry)
    image = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), PAPER)
    draw = ImageDraw.Draw(image)
    corners = _corners_of(boxes)
    seen = np.concatenate([points[:, :2], cameras[:, :2, 3], corners[..., :2].reshape(-1, 2)])
    region = tuple(value * SCALE for value in (MARGIN, MARGIN, SIZE[0] - MARGIN, SIZE[1] - MARGIN - 40))
    plan = fit_plan(outline_of(seen), region)
    plan = plan._replace(origin=np.array([0.5 * SIZE[0] * SCALE, plan.origin[1]]))
    paint_points(image, plan, points, (colors * 255).astype(np.uint8))
    shown = evenly_spaced_indices(len(cameras), min(4, len(cameras)))
    taken = draw_camera_path(draw, plan, cameras, shown) if len(cameras) else []
    for box in corners:
        outline_box(draw, plan, box[list(_BOTTOM)], PREDICTION, width=2.5)
    for number, box in enumerate(corners, start=1):
        draw_label(draw, plan, str(number), plan.to_page(box.mean(axis=0)), PREDICTION, taken)
    _draw_scale(draw, plan, "1 m" if geometry.is_metric else f"{unit:.3g} units")
    return image.resize(SIZE, Image.Resampling.LANCZOS)


def figure_in_space(geometry: SceneGeometry, boxes: Sequence[Box3D]) -> dict:
    """
    Make a figure of a room that can be turned: points, cameras as pyramids along their path, and predicted boxes.

    Args:
        geometry ([`SceneGeometry`]): The room.
        boxes (`Sequence[Box3D]`): Boxes in the scene frame; the first has number 1.

    Returns:
        `dict`: `data` and `layout` as plotly.js takes them, of plain types.
    """
    points, cameras, colors, _ = _drawn_scene(geometry)
    below = np.flatnonzero(points[:, 2] < CEILING_CUT_M)
    below = below[evenly_spaced_indices(len(below), min(MAX_POINTS, len(below)))]
    hues = [f"#{bytes(color).hex()}" for color in (colors[below] * 255).astype(np.uint8)]
    cloud = {
        **_trace("points", "markers", points[below]),
        "marker": {"size": 2.5, "color": hues},
        "hoverinfo": "skip",
    }
    data = [cloud]
    if len(cameras):
        line = {"color": "rgb(32,92,196)", "width": 4}
        data.append({**_trace("path of the camera", "lines", cameras[:, :3, 3]), "line": line, "hoverinfo": "skip"})
        pyramids = _pyramids(cameras, geometry)
        data.append({**_trace("cameras", "lines", pyramids), "line": {**line, "width": 2}, "hoverinfo": "skip"})
    for number, corners in enumerate(_corners_of(boxes), start=1):
        name = f"box {number}"
        line = {"color": "rgb(214,64,42)", "width": 6}
        data.append({**_trace(name, "lines", _edges(corners)), "line": line, "hoverinfo": "name"})
    unit = "m" if geometry.is_metric else "of no known unit"
    axes = {f"{axis}axis": {"title": {"text": f"{axis} ({unit})"}} for axis in "xyz"}
    eye = {"eye": {"x": -1.2, "y": -1.2, "z": 1.4}}
    layout = {
        # The same value in every figure of a room: the view stays where it was turned to when a box comes.
        "uirevision": "room",
        "scene": {**axes, "aspectmode": "data", "camera": eye, "uirevision": "room"},
        "margin": {"l": 0, "r": 0, "t": 0, "b": 0},
        "legend": {"x": 0, "y": 1},
        "height": 460,
    }
    return {"data": data, "layout": layout}


def strip_of(frames: Sequence[np.ndarray]) -> Image.Image:
    """Put frames side by side, [`STRIP_HEIGHT`] high."""
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures = [
        picture.resize((max(1, round(picture.width * STRIP_HEIGHT / picture.height)), STRIP_HEIGHT))
        for picture in pictures
    ]
    strip = Image.new("RGB", (sum(picture.width + 6 for picture in pictures) - 6, STRIP_HEIGHT), PAPER)
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width + 6
    return strip


def as_html(image: Image.Image, description: str) -> str:
    """
    Put a picture into HTML as data, so that there is no file of it that others could ask the server for.

    Args:
        image (`PIL.Image.Image`): The picture.
        description (`str`): For those who do not see it; plain words.

    Returns:
        `str`: An `img` element.
    """
    target = io.BytesIO()
    image.save(target, "JPEG", quality=88)
    data = base64.b64encode(target.getvalue()).decode("ascii")
    return f'<img alt="{description}" style="width: 100%" src="data:image/jpeg;base64,{data}">'


def _drawn_scene(geometry: SceneGeometry) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Points, poses and colours as the model sees them: a scene of unknown scale at the nominal distance from its cameras."""
    unit = 1.0 if geometry.is_metric else float(nominal_unit(geometry.points, geometry.world_from_cam[:, :3, 3]))
    points, cameras = geometry.points.double().numpy() / unit, geometry.world_from_cam.double().numpy().copy()
    cameras[:, :3, 3] /= unit
    return points, cameras, geometry.colors.double().numpy(), unit


def _corners_of(boxes: Sequence[Box3D]) -> np.ndarray:
    rows = [[*box.center, *box.size, box.yaw] for box in boxes]
    return box_corners(torch.tensor(rows, dtype=torch.float64).reshape(-1, 7)).numpy()


def _edges(corners: np.ndarray) -> np.ndarray:
    """The twelve edges of a box as one line; NaN lifts the pen."""
    gap = np.full((1, 3), np.nan)
    rings = [corners[[*ring, ring[0]]] for ring in (_BOTTOM, _TOP)]
    pillars = [np.concatenate([corners[[low, high]], gap]) for low, high in zip(_BOTTOM, _TOP, strict=True)]
    return np.concatenate([rings[0], gap, rings[1], gap, *pillars])


def _pyramids(cameras: np.ndarray, geometry: SceneGeometry) -> np.ndarray:
    """What some cameras see, as one line: from each centre to the corners of its image and around them."""
    height, width = geometry.image_size
    # Pixel (0, 0) is the centre of the first one, so the image reaches from -0.5.
    left, top, right, bottom = -0.5, -0.5, width - 0.5, height - 0.5
    pixels = np.array([[left, top, 1.0], [right, top, 1.0], [right, bottom, 1.0], [left, bottom, 1.0]])
    gap, lines = np.full((1, 3), np.nan), []
    for index in evenly_spaced_indices(len(cameras), min(MAX_CAMERAS, len(cameras))):
        rays = pixels @ np.linalg.inv(geometry.intrinsics[index].double().numpy()).T * CAMERA_DEPTH_M
        world_from_cam = cameras[index]
        ends, apex = rays @ world_from_cam[:3, :3].T + world_from_cam[:3, 3], world_from_cam[None, :3, 3]
        lines += [ends[[0, 1, 2, 3, 0]], gap]
        lines += [part for end in ends for part in (apex, end[None], gap)]
    return np.concatenate(lines)


def _trace(name: str, mode: str, points: np.ndarray) -> dict:
    # JSON has no NaN; null lifts the pen too. Millimetres are enough for drawing.
    columns = [[None if np.isnan(value) else round(value, 3) for value in column] for column in points.T.tolist()]
    return {"type": "scatter3d", "name": name, "mode": mode, **dict(zip("xyz", columns, strict=True))}


def _draw_scale(draw: ImageDraw.ImageDraw, plan, label: str) -> None:
    x, y = MARGIN * SCALE, (SIZE[1] - MARGIN) * SCALE
    end = x + plan.pixels_per_m
    draw.line((x, y, end, y), fill=INK, width=3 * SCALE)
    for tick in (x, end):
        draw.line((tick, y - 5 * SCALE, tick, y + 5 * SCALE), fill=INK, width=2 * SCALE)
    draw.text((end + 10 * SCALE, y), label, font=font_of(15), fill=INK, anchor="lm")


__all__ = ["as_html", "figure_in_space", "picture_from_above", "strip_of"]
