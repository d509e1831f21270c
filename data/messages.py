# SPDX-License-Identifier: Apache-2.0
"""
Records as chats: the parts that [`~geode.modeling_geode.processing_geode.GeodeProcessor`] takes.

Everything that a dataset says is a text part, in which the processor lets no special token arise. The control tokens of a
chat are those of its value parts.
"""

import os
from pathlib import Path

import torch

from geode.data.schemas import Record, media_path
from geode.data.synthetic_rooms.boxes import canonical_box
from geode.modeling_geode.answers_geode import COUNT
from geode.modeling_geode.scene_geode import SceneGeometry


NUMBER_TOKEN = "<REG>"
BOX_TOKEN = "<3DBBOX>"


def messages_from_record(
    record: Record,
    *,
    media_root: str | os.PathLike | None = None,
    geometry: SceneGeometry | str | os.PathLike | None = None,
    use_geometry: bool = True,
    with_values: bool = True,
    with_answer: bool = True,
) -> list[dict]:
    """
    Return the chat of a record.

    Convention:
        - A number with an SI value is a `<REG>` with that value and its SI unit, unless the record is `label_suspect`. A box is a
          `<3DBBOX>` in the frame of its scene. All else is text: letters with their text, and numbers of unknown unit.
        - The medium stands in the first user turn. How many of its frames are taken is not part of a chat: where a record has
          `num_frames`, give them to the processor.

    Args:
        record ([`~geode.data.schemas.Record`]): The record.
        media_root (`str` or `os.PathLike`, *optional*): Folder that `media` and `geometry` are relative to.
        geometry ([`SceneGeometry`], `str` or `os.PathLike`, *optional*): The scene's geometry, or the folder of a saved one. The
            default is the record's own, if it has one.
        use_geometry (`bool`, defaults to `True`): False leaves geometry out of the chat. A box is still brought into the
            frame of its scene.
        with_values (`bool`, defaults to `True`): False makes text of numbers and boxes.
        with_answer (`bool`, defaults to `True`): False leaves the last answer out, for a prompt.

    Returns:
        `list[dict]`: User and assistant turns with lists of parts.

    Raises:
        ValueError: If a box cannot be brought into the frame of its scene, or a path of the record leaves its root.

    Example:
    ```python
    >>> record = Record(
    ...     uid="a:b:0",
    ...     source="a",
    ...     media_type="video",
    ...     media="c.mp4",
    ...     prompt="How far is it, in feet?",
    ...     kind="number",
    ...     answer_text="5.6",
    ...     value=5.6,
    ...     unit="ft",
    ...     value_si=1.70688,
    ... )
    >>> messages_from_record(record)[1]["content"]
    [{'type': 'value', 'token': '<REG>', 'value': 1.70688, 'unit': 'm'}]

    ```
    """
    if geometry is None and record.geometry is not None:
        geometry = _below(media_root, record.geometry)
    answer: list[dict] = [{"type": "text", "text": record.answer_text}]
    if with_values and not record.label_suspect:
        if record.box is not None:
            if geometry is not None and not isinstance(geometry, SceneGeometry):
                geometry = SceneGeometry.load(geometry)
            answer = [{"type": "value", "token": BOX_TOKEN, "value": _box_in_scene(record.box, geometry)}]
        elif record.value_si is not None:
            answer = [
                {"type": "value", "token": NUMBER_TOKEN, "value": record.value_si, "unit": _si_unit(record.unit)}
            ]
    medium: dict = {"type": record.media_type, "path": _below(media_root, record.media)}
    if use_geometry and geometry is not None:
        medium["geometry"] = geometry if isinstance(geometry, SceneGeometry) else os.fspath(geometry)
    turns: list[tuple[str, list[dict]]] = [("user", [{"type": "text", "text": record.prompt}]), ("assistant", answer)]
    if record.conversation is not None:
        roles = ("user", "assistant")
        turns = [
            (role, [{"type": "text", "text": text}])
            for pair in record.conversation
            for role, text in zip(roles, pair, strict=True)
        ]
    turns[0][1].insert(0, medium)
    return [{"role": role, "content": content} for role, content in (turns if with_answer else turns[:-1])]


def _below(root: str | os.PathLike | None, path: str) -> str:
    path = media_path(path)
    return path if root is None else str(Path(root) / path)


def _si_unit(unit: str | None) -> str | None:
    if unit is None or unit == COUNT:
        return unit
    return f"m{unit[-1]}" if unit[-1] in "23" else "m"


def _box_in_scene(box: list[float], geometry: SceneGeometry | None) -> list[float]:
    if geometry is None:
        return list(box)
    moved = geometry.boxes_in_scene(torch.tensor(box, dtype=torch.float64))
    return [round(value, 6) for value in canonical_box(moved.numpy()).tolist()]


__all__ = ["messages_from_record"]
