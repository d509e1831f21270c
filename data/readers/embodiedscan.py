# SPDX-License-Identifier: Apache-2.0
"""
Boxes in the form of EmbodiedScan: "Locate the X." for every category that a scan has once.

Source: the released code of EmbodiedScan. Its annotations are pickles, which run code when they are read, so JSON is read here:
JSON Lines or a JSON list of scans, or one object with `data_list` (and `metainfo.categories`). A scan is

    {"sample_idx": "scannet/scene0191_00", "categories": {"chair": 0}, "instances": [{"bbox_3d": [9], "bbox_label_3d": 0}]}

with `scan_id` in place of `sample_idx` if liked, `category` (a name) in place of `bbox_label_3d`, and `categories` as a
list of names. A box is centre, full size and Euler angles, see [`box_from_euler`]. The licence follows that of the scans.

Boxes are in the frame of the scan; see `geode.data.readers.arkitscenes`.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath

from datasets import Features, List, Value

from geode.data.boxes import box_from_euler
from geode.data.readers.common import TEXT, located, names_its_row, paths_of, text_of
from geode.data.schemas import Record


NAME = "EmbodiedScan"
REPO_ID = None
LICENSE = None
DATA_FILES = ("*train*.json", "*train*.jsonl")
FEATURES = Features({"scan_id": TEXT, "category": TEXT, "bbox_3d": List(Value("float64"))})


def rows_from_item(item: dict) -> Iterator[dict]:
    """
    Yield the objects of scans whose category is there once.

    Args:
        item (`dict`): A scan, or an object with a `data_list` of scans.

    Yields:
        `dict`: `scan_id`, `category` and `bbox_3d`.

    Raises:
        ValueError: If a scan has no name or no instances, or a label has no name.
    """
    if "data_list" in item:
        scans, metainfo = item["data_list"], item.get("metainfo") or item
        if not isinstance(scans, list) or not all(isinstance(scan, dict) for scan in scans):
            raise ValueError(f"`data_list` must be a list of scans, got {scans!r:.200}.")
        if not isinstance(metainfo, dict):
            raise ValueError(f"`metainfo` must be an object with `categories`, got {metainfo!r:.200}.")
        for scan in scans:
            yield from rows_from_item({"categories": metainfo.get("categories"), **scan})
        return
    instances = item.get("instances")
    if not isinstance(instances, list) or not all(isinstance(entry, dict) for entry in instances):
        raise ValueError(f"A scan must have a list `instances` of objects, got {instances!r:.200}.")
    scan_id = text_of(item, "scan_id" if item.get("scan_id") is not None else "sample_idx")
    names = _category_names(item.get("categories"))
    categories = [_category(entry, names) for entry in instances]
    counts = Counter(categories)
    for entry, category in zip(instances, categories, strict=True):
        if counts[category] == 1:
            yield {"scan_id": scan_id, "category": category, "bbox_3d": entry.get("bbox_3d")}


@names_its_row
def record_from_row(
    row: dict, *, file: str, index: int, media_pattern: str = "{scan_id}.mp4", geometry_pattern: str | None = None
) -> Record:
    """
    Read an object.

    Args:
        row (`dict`): `scan_id`, `category` and `bbox_3d`, see [`rows_from_item`].
        file (`str`): The file's path below the root.
        index (`int`): The object's number among those of the file that are asked for.
        media_pattern (`str`, defaults to `"{scan_id}.mp4"`): Where the scan's video is, below the media root. `{scene}` is the
            last part of the scan's name.
        geometry_pattern (`str`, *optional*): Where the scan's geometry is, with the same names.

    Returns:
        [`Record`]: The record, a box in the frame of the scan.

    Raises:
        ValueError: If the object is malformed.
    """
    scan_id = text_of(row, "scan_id")
    scene = PurePosixPath(scan_id).name
    return Record(
        uid=f"{NAME}:{file}:{index}",
        source=NAME,
        scene=scene,
        **located(text_of(row, "category"), box_from_euler(row.get("bbox_3d"))),
        **paths_of({"scan_id": scan_id, "scene": scene}, media_pattern, geometry_pattern),
    )


def _category_names(categories) -> dict[int, str]:
    if categories is None:
        return {}
    if isinstance(categories, list):
        return dict(enumerate(categories))
    if isinstance(categories, dict):
        if all(isinstance(label, int) for label in categories.values()):
            return {label: name for name, label in categories.items()}
    raise ValueError(
        f"`categories` must be a list of names, or an object from names to labels, got {categories!r:.200}."
    )


def _category(entry: dict, names: dict[int, str]) -> str:
    if entry.get("category") is not None:
        return text_of(entry, "category")
    label = entry.get("bbox_label_3d")
    if not isinstance(label, int) or not isinstance(names.get(label), str):
        raise ValueError(
            f"`bbox_label_3d` must be a label of `categories`, which has {len(names)}, got {label!r}. Write `categories` into "
            "each scan, or a `category` into each instance."
        )
    return names[label]


__all__ = ["DATA_FILES", "FEATURES", "LICENSE", "NAME", "REPO_ID", "record_from_row", "rows_from_item"]
