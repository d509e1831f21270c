# SPDX-License-Identifier: Apache-2.0
"""
Boxes of ARKitScenes: "Locate the X." for every category that a scan has once.

Source: the annotations of the 3D object detection set (apple/ARKitScenes), `{split}/{video_id}/{video_id}_3dod_annotation.json`:
`data[i].label` and `data[i].segments.obbAligned` with `centroid`, `axesLengths` (full, metres) and `normalizedAxes`
(three unit vectors), z up. The data have a licence of their own. VSI-Bench asks about scans of the validation split, so only the
training split is read by default.

Boxes are in the frame of the scan. To learn from them, store the scan's geometry from its true poses, so that its
`scene_from_dataset` leads from there, and name its place with `geometry_pattern`.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath

from datasets import Features, List, Value

from geode.data.boxes import box_from_axes
from geode.data.readers.common import TEXT, located, names_its_row, paths_of, text_of
from geode.data.schemas import Record


NAME = "ARKitScenes"
REPO_ID = None
LICENSE = None
DATA_FILES = ("**/Training/*/*_3dod_annotation.json",)
_NUMBERS = List(Value("float64"))
_BOX = {"centroid": _NUMBERS, "axesLengths": _NUMBERS, "normalizedAxes": _NUMBERS}
FEATURES = Features({"data": List({"label": TEXT, "segments": {"obbAligned": _BOX}})})
_SUFFIX = "_3dod_annotation"


def rows_from_item(item: dict) -> Iterator[dict]:
    """
    Yield the objects of a scan whose category is there once.

    Args:
        item (`dict`): The content of an annotation file.

    Yields:
        `dict`: An entry of `data`.

    Raises:
        ValueError: If `data` is not a list of objects with a label.
    """
    entries = item.get("data")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"An annotation must have a list `data` of objects, got {entries!r:.200}.")
    labels = [text_of(entry, "label") for entry in entries]
    counts = Counter(labels)
    yield from (entry for entry, label in zip(entries, labels, strict=True) if counts[label] == 1)


@names_its_row
def record_from_row(
    row: dict,
    *,
    file: str,
    index: int,
    media_pattern: str = "{folder}/{video_id}.mp4",
    geometry_pattern: str | None = None,
) -> Record:
    """
    Read an object.

    Args:
        row (`dict`): An entry of `data`, see [`rows_from_item`].
        file (`str`): The file's path below the root.
        index (`int`): The object's number among those of the file that are asked for.
        media_pattern (`str`, defaults to `"{folder}/{video_id}.mp4"`): Where the scan's video is, below the media root.
            `{folder}` is the annotation's, `{split}` its parent's name.
        geometry_pattern (`str`, *optional*): Where the scan's geometry is, with the same names.

    Returns:
        [`Record`]: The record, a box in the frame of the scan.

    Raises:
        ValueError: If the object is malformed.
    """
    segments = row.get("segments")
    box = segments.get("obbAligned") if isinstance(segments, dict) else None
    if not isinstance(box, dict) or any(box.get(name) is None for name in _BOX):
        raise ValueError(f"`segments.obbAligned` must have {sorted(_BOX)}, got {box!r:.200}.")
    path = PurePosixPath(file)
    video_id = path.stem.removesuffix(_SUFFIX)
    names = {"folder": path.parent.as_posix(), "split": path.parent.parent.name, "video_id": video_id}
    return Record(
        uid=f"{NAME}:{file}:{index}",
        source=NAME,
        scene=video_id,
        **located(text_of(row, "label"), box_from_axes(*(box[name] for name in _BOX))),
        **paths_of(names, media_pattern, geometry_pattern),
    )


__all__ = ["DATA_FILES", "FEATURES", "LICENSE", "NAME", "REPO_ID", "record_from_row", "rows_from_item"]
