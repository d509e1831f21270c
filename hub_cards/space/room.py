# SPDX-License-Identifier: Apache-2.0
"""The model's side of the Space: a room is encoded once, and asked many times."""

import dataclasses
import os
import re
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from geode import embedded_scene
from geode.hub_cards.space.uploads import WANTED, check_question, check_video, unpack_geometry
from geode.modeling_geode.answers_geode import Answer, Box3D, Measurement, format_number
from geode.modeling_geode.geometry_geode import evenly_spaced_indices
from geode.modeling_geode.reconstruction_geode import reconstruct_with_vggt
from geode.modeling_geode.scene_geode import SceneEncoding, SceneGeometry
from geode.modeling_geode.shared_prefix_geode import can_share_prefix
from geode.modeling_geode.video_processing_geode import load_frame_sets


MAX_NEW_TOKENS = 64
# What a session keeps for showing; the model has seen all of it.
NUM_FRAMES_KEPT = 4
MAX_HEIGHT_KEPT = 240  # pixels of a frame
MAX_POINTS_KEPT = 200_000
MAX_CAMERAS_KEPT = 1_000


class Room(NamedTuple):
    """
    A scene that the model has encoded, and what is needed to draw it.

    Args:
        name (`str`): Of the video.
        frames (`list[np.ndarray]`): Some of its frames, uint8 of shape `(height, width, 3)`, at most [`MAX_HEIGHT_KEPT`] high.
        geometry ([`SceneGeometry`], *optional*): With at most [`MAX_POINTS_KEPT`] points and [`MAX_CAMERAS_KEPT`] cameras. None
            where the model answers from the frames alone.
        facts (`dict`, *optional*): [`SceneGeometry.summary`] of the whole geometry.
        encoding ([`SceneEncoding`]): With the prefix of its questions, where the language model can share one.
        seconds (`float`): From the files to the encoding.
    """

    name: str
    frames: list[np.ndarray]
    geometry: SceneGeometry | None
    facts: dict | None
    encoding: SceneEncoding
    seconds: float


class Reply(NamedTuple):
    """An answer, and the seconds that it took."""

    answer: Answer
    seconds: float


def open_room(
    model,
    processor,
    video: str | os.PathLike | None,
    archive: str | os.PathLike | None = None,
    *,
    use_geometry: bool = True,
    camera_height_m: float | None = None,
) -> Room:
    """
    Encode what was uploaded.

    Args:
        model ([`GeodeForConditionalGeneration`]):
            The model.
        processor ([`GeodeProcessor`]):
            Its processor.
        video (`str` or `os.PathLike`, *optional*):
            The video file; None is an error, which says what to do.
        archive (`str` or `os.PathLike`, *optional*):
            A .zip of a saved [`SceneGeometry`]. Without it the model's reconstructor makes the geometry, if it has one.
        use_geometry (`bool`, defaults to `True`):
            False answers from the frames alone.
        camera_height_m (`float`, *optional*):
            Height of the first camera above the floor, which gives a reconstruction its scale.

    Returns:
        [`Room`]: The scene.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file cannot be read or is too large, there is no geometry where it is needed, or what is given has no use.
    """
    if video is None:
        raise ValueError("There is no video. Upload one, or take the embedded room.")
    if not use_geometry and archive is not None:
        raise ValueError(
            f"{Path(archive).name} is geometry, and the frames alone are asked for. Untick that, or remove the file."
        )
    reconstructor = model.model.reconstructor
    if use_geometry and archive is None and reconstructor is None:
        raise ValueError(
            "This model cannot make geometry from frames: it has no reconstructor, so a video alone is not enough. "
            f"{WANTED} Or tick the frames alone: the answers then know nothing of depth."
        )
    start = time.perf_counter()
    check_video(video)
    geometry = None
    if archive is not None:
        with tempfile.TemporaryDirectory(prefix="geode-space-") as folder:
            unpack_geometry(archive, folder)
            geometry = SceneGeometry.load(folder)
    counts = [processor.num_frames, processor.num_geometry_frames]
    (frames, _), (geometry_frames, _) = load_frame_sets(os.fspath(video), num_frames=counts)
    if use_geometry and geometry is None:
        geometry = reconstruct_with_vggt(
            geometry_frames, reconstructor, max_points=model.config.max_points, camera_height_m=camera_height_m
        )
    return _encode(model, processor, Path(video).name, frames, geometry, start)


def open_embedded_room(model, processor) -> Room:
    """
    Encode the room that comes with the package; arguments are those of [`open_room`].

    Returns:
        [`Room`]: The scene.
    """
    start = time.perf_counter()
    folder = embedded_scene()
    ((frames, _),) = load_frame_sets(str(folder / "room.mp4"), num_frames=[processor.num_frames])
    return _encode(model, processor, "the embedded room", frames, SceneGeometry.load(folder / "geometry"), start)


def _encode(model, processor, name: str, frames: list, geometry: SceneGeometry | None, start: float) -> Room:
    use_geometry = geometry is not None
    inputs = processor.prepare_scene(
        frames=frames, geometry=geometry, num_frames=len(frames), use_geometry=use_geometry
    )
    encoding = model.encode_scene(**inputs)
    if can_share_prefix(model.model.language_model.config):
        # Questions come one at a time here, and each would compute it anew.
        encoding = model.prefill_scene(processor, encoding, use_geometry=use_geometry)
    kept = [small_frame(frame) for frame in frames[:: max(1, len(frames) // NUM_FRAMES_KEPT)][:NUM_FRAMES_KEPT]]
    facts = None if geometry is None else geometry.summary()
    shown = None if geometry is None else small_geometry(geometry)
    return Room(name, kept, shown, facts, encoding, time.perf_counter() - start)


def small_frame(frame: np.ndarray) -> np.ndarray:
    """Return a frame that is at most [`MAX_HEIGHT_KEPT`] high."""
    height, width = frame.shape[:2]
    if height <= MAX_HEIGHT_KEPT:
        return frame
    size = (max(1, round(width * MAX_HEIGHT_KEPT / height)), MAX_HEIGHT_KEPT)
    return np.array(Image.fromarray(frame).resize(size))


def small_geometry(geometry: SceneGeometry) -> SceneGeometry:
    """Return a scene with at most [`MAX_POINTS_KEPT`] points and [`MAX_CAMERAS_KEPT`] cameras, evenly spaced ones."""
    points = torch.tensor(evenly_spaced_indices(geometry.num_points, MAX_POINTS_KEPT), dtype=torch.long)
    cameras = torch.tensor(evenly_spaced_indices(geometry.num_cameras, MAX_CAMERAS_KEPT), dtype=torch.long)
    fields = {name: getattr(geometry, name)[points] for name in ("points", "colors", "normals")}
    fields |= {name: getattr(geometry, name)[cameras] for name in ("world_from_cam", "intrinsics")}
    times = geometry.timestamps_s
    return dataclasses.replace(geometry, **fields, timestamps_s=None if times is None else times[cameras])


def ask_room(model, processor, room: Room | None, question: str) -> Reply:
    """
    Ask one question about a room.

    Args:
        model ([`GeodeForConditionalGeneration`]):
            The model.
        processor ([`GeodeProcessor`]):
            Its processor.
        room ([`Room`], *optional*):
            The scene; None is an error, which says what to do.
        question (`str`):
            The question.

    Returns:
        [`Reply`]: The answer.

    Raises:
        ValueError: If there is no room, or no question or one that is too long.
    """
    if room is None:
        raise ValueError("There is no room to ask about. Upload a video, or take the embedded room.")
    question = check_question(question)
    start = time.perf_counter()
    (answer,) = model.ask(
        processor, room.encoding, [question], use_geometry=room.geometry is not None, max_new_tokens=MAX_NEW_TOKENS
    )
    return Reply(answer, time.perf_counter() - start)


def plain(text: str) -> str:
    r"""
    Write a text in Markdown so that it is shown as it is: neither a picture of another host nor a heading comes of it.

    Args:
        text (`str`): What a visitor or the model wrote.

    Returns:
        `str`: Markdown, in which every mark of punctuation is escaped.

    Example:
        >>> print(plain("![x](http://y)"))
        \!\[x\]\(http\:\/\/y\)
    """
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def describe_room(room: Room, coverage: float | None) -> str:
    """
    Say in Markdown what was encoded.

    Args:
        room ([`Room`]): The scene.
        coverage (`float`, *optional*): How often an interval shall hold the truth; None of a model without intervals.

    Returns:
        `str`: A few lines.
    """
    lines = [f"**{plain(room.name)}** is encoded: {room.encoding.num_frames} frames, once, in {room.seconds:.2f} s."]
    if room.geometry is None:
        lines.append("From the frames alone: there is no point cloud to draw, and lengths are guesses.")
    else:
        facts = room.facts
        extent = " x ".join(f"{side:.2f}" for side in facts["extent"])
        unit = "m" if room.geometry.is_metric else "units"
        lines.append(
            f"{facts['num_points']:,} points, {facts['num_cameras']} cameras, {extent} {unit}; scale: {facts['scale_source']}, "
            f"gravity: {facts['gravity']}."
        )
        if not room.geometry.is_metric:
            lines.append("**The scale is not known, so lengths in metres are guesses.**")
    if coverage is None:
        lines.append("This model gives no intervals.")
    else:
        lines.append(f"Intervals are meant to hold the truth {100 * coverage:.0f} % of the time.")
    return "\n\n".join(lines)


def describe_reply(reply: Reply, first_box: int) -> str:
    """
    Write an answer in Markdown: values with unit and interval, boxes with their number in the drawing, and the time.

    Args:
        reply ([`Reply`]): The answer.
        first_box (`int`): Number of its first box.

    Returns:
        `str`: Some lines.

    Example:
        >>> from geode.modeling_geode.answers_geode import Answer, Measurement
        >>> value = Measurement("<REG>", 2.31, "m", 2.31, interval=(2.0, 2.7))
        >>> print(describe_reply(Reply(Answer("2.31", [value], []), 0.125), 1))
        **2.31 m**, between 2.00 and 2.70 m
        <BLANKLINE>
        <sub>0.12 s</sub>
    """
    answer = reply.answer
    parts = [describe_value(value) for value in answer.values]
    parts += [describe_box(box, number) for number, box in enumerate(answer.boxes, start=first_box)]
    written = [item.text for item in (*answer.values, *answer.boxes)]
    text = " ".join(answer.text.split())
    if [text] != written:
        # There is more than one value, or words around it.
        parts.insert(0, plain(text) or "(no answer)")
    return "\n\n".join([*parts, f"<sub>{reply.seconds:.2f} s</sub>"])


def describe_value(value: Measurement) -> str:
    """Write a number with its unit and interval; without a unit in the question it is in SI, of which the model knows no more."""
    unit = "" if value.unit in (None, "count") else f" {value.unit}"
    text = f"**{value.text}{unit}**"
    if value.is_withheld or value.kind != "scalar":
        return text
    if value.unit is None:
        text += " (SI: the question names no unit)"
    if value.interval is None:
        return text
    low, high = (format_number(end, value.unit) for end in value.interval)
    return f"{text}, between {low} and {high}{unit}"


def describe_box(box: Box3D, number: int) -> str:
    """Write a box with its number in the drawing, lengths in metres, its yaw in degrees as well."""
    center, size = (", ".join(format_number(value) for value in triple) for triple in (box.center, box.size))
    return (
        f"**Box {number}**: centre ({center}) m, size ({size}) m, yaw {format_number(box.yaw)} rad "
        f"({np.degrees(box.yaw):.0f} degrees)"
    )


__all__ = [
    "Reply",
    "Room",
    "ask_room",
    "describe_box",
    "describe_reply",
    "describe_room",
    "describe_value",
    "open_embedded_room",
    "open_room",
    "plain",
]
