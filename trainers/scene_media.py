# SPDX-License-Identifier: Apache-2.0
"""The media of records, prepared for the model once per scene, and put together for a batch."""

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from geode.data.feature_store import FeatureStore, StoredScene, collate_stored_scenes
from geode.data.schemas import Record, fill_path, media_path
from geode.data.synthetic_rooms.boxes import canonical_box
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.modeling_geode.scene_geode import SceneGeometry
from geode.modeling_geode.video_processing_geode import load_image
from geode.trainers.packing import scene_key


# What runs along the tokens of a prompt; the rest of what the processor returns belongs to the media.
TOKEN_INPUTS = (
    "input_ids",
    "attention_mask",
    "assistant_masks",
    "mm_token_type_ids",
    "regression_targets",
    "question_input_ids",
    "question_attention_mask",
)


@dataclass(frozen=True)
class ScenePlace:
    """What the processor needs to write the placeholders of a scene whose tensors are ready: see `SceneEncoding`."""

    num_frames: int
    rationale_tokens: Sequence | None


@dataclass(frozen=True)
class SceneMedia:
    """
    One video or image, ready for the model.

    Args:
        part (`dict`): Stands for it in a chat.
        tensors (`dict[str, torch.Tensor]`): Inputs of the model for a batch of one.
        geometry (*optional*): What has `boxes_in_scene`: a [`SceneGeometry`] or a stored scene.
    """

    part: dict
    tensors: dict[str, torch.Tensor]
    geometry: object | None = None


class VoxelisedGeometry:
    """Geometry whose model inputs are made once, however many questions are asked about it."""

    def __init__(self, geometry: SceneGeometry):
        self.geometry = geometry
        self._inputs: dict[tuple, dict[str, torch.Tensor]] = {}

    def to_model_inputs(self, grid_size: float, **limits) -> dict[str, torch.Tensor]:
        """See [`SceneGeometry.to_model_inputs`]."""
        key = (grid_size, *sorted(limits.items()))
        if key not in self._inputs:
            self._inputs[key] = self.geometry.to_model_inputs(grid_size, **limits)
        return self._inputs[key]


class SceneLoader:
    """
    Finds and prepares the medium and the geometry of records. The last few scenes are kept.

    Args:
        processor ([`GeodeProcessor`]): Makes the tensors.
        media_root (path, or `dict[str, path]`, *optional*):
            Folder that the paths of records are relative to; with a dict, the folder of each `source`. Default: where the
            program runs.
        geometry (`str` or `Callable`, *optional*):
            Where the geometry of a record without `geometry` is: a path below its root with `{stem}` and `{parent}` of the
            medium, `{scene}` or `{source}` in it, or a function from a record to a path, a [`SceneGeometry`] or None.
        use_geometry (`bool`, defaults to `True`): False leaves geometry out.
        feature_store ([`FeatureStore`] or `dict[str, FeatureStore]`, *optional*):
            Its features stand for the clouds of videos and, if it has them, for their frames; with a dict, one store for each
            `source`.
        num_cached_scenes (`int`, defaults to 2): Scenes that are kept.
    """

    def __init__(
        self,
        processor: GeodeProcessor,
        *,
        media_root: str | os.PathLike | Mapping[str, str | os.PathLike] | None = None,
        geometry: str | Callable[[Record], object] | None = None,
        use_geometry: bool = True,
        feature_store: FeatureStore | Mapping[str, FeatureStore] | None = None,
        num_cached_scenes: int = 2,
    ):
        self.processor = processor
        self.media_root = media_root
        self.geometry = geometry
        self.use_geometry = use_geometry
        self.feature_store = feature_store
        self.num_cached_scenes = num_cached_scenes
        self._cache: OrderedDict[tuple, SceneMedia] = OrderedDict()

    def load(self, record: Record) -> SceneMedia:
        """
        Return the medium of a record.

        Args:
            record ([`Record`]): The record.

        Returns:
            [`SceneMedia`]: The medium.

        Raises:
            FileNotFoundError: If there is no such medium or geometry.
            ValueError: If the medium or its geometry cannot be read or is missing, or the question counts more frames than
                the video has.
        """
        key = scene_key(record)
        if key not in self._cache:
            self._cache[key] = self._load(record)
            while len(self._cache) > max(1, self.num_cached_scenes):
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def root_of(self, record: Record) -> Path:
        """Return the folder that the paths of a record are relative to."""
        root = _of_source(self.media_root, record, name="media_root")
        return Path("." if root is None else root)

    def box_in_scene(self, record: Record, medium: SceneMedia) -> list[float]:
        """
        Bring the box of a record into the frame of its scene.

        Args:
            record ([`Record`]): A record with a box, in the frame of its dataset.
            medium ([`SceneMedia`]): Its medium.

        Returns:
            `list[float]`: The canonical box in the scene frame, see `canonical_box`.

        Raises:
            ValueError: If the record has no geometry, or its scale is unknown.
        """
        geometry = medium.geometry or self._find_stored(record) or self._find_geometry(record)
        if geometry is None:
            raise ValueError(
                f"Record {record.uid!r} has a box in the frame of its dataset, and no geometry that carries it into the "
                "scene frame. Give it a `geometry`, name a pattern with the collator's `geometry`, or train on digits with "
                "`with_values=False`."
            )
        is_metric = geometry.facts["is_metric"] if isinstance(geometry, StoredScene) else geometry.is_metric
        if not is_metric:
            raise ValueError(
                f"Record {record.uid!r} has a box in metres, and the scale of its geometry is unknown, as that of a "
                "reconstruction is. Give it metric geometry in the frame of its dataset, or train on digits with "
                "`with_values=False`."
            )
        (box,) = geometry.boxes_in_scene(torch.tensor([record.box], dtype=torch.float64)).numpy()
        return canonical_box(box).tolist()

    def _load(self, record: Record) -> SceneMedia:
        stored = self._find_stored(record)
        if stored is not None and stored.has_video_features:
            return self._stored_media(record, stored)
        path = self.root_of(record) / media_path(record.media)
        if not path.exists():
            raise FileNotFoundError(
                f"Record {record.uid!r} needs the {record.media_type} {path}, and there is no such file. `media_root` must be "
                "the folder that `media` is relative to."
            )
        geometry = None
        if self.use_geometry:
            geometry = self._find_geometry(record) if stored is None else stored
        try:
            if record.media_type == "image":
                return self._load_image(path, geometry)
            tensors = self.processor.prepare_scene(
                video=path, geometry=geometry, num_frames=record.num_frames, use_geometry=self.use_geometry
            )
            num_frames = tensors["pixel_values_videos"].shape[2]
            if num_frames < (record.num_frames or 0):
                raise ValueError(
                    f"The question counts {record.num_frames} frames, and the video has only {num_frames}, so that none of them "
                    "is the one that is meant. Leave the record out, or correct its `num_frames`."
                )
        except ValueError as error:
            raise ValueError(f"The medium of record {record.uid!r}, {path}: {error}") from error
        num_rationale_tokens = self.processor.num_rationale_tokens * self.use_geometry
        place = ScenePlace(num_frames, range(num_rationale_tokens))
        return SceneMedia({"type": "scene", "scene": place}, dict(tensors), geometry)

    def _find_stored(self, record: Record) -> StoredScene | None:
        store = _of_source(self.feature_store, record, name="feature_store")
        if store is None or record.media_type != "video":
            return None
        try:
            return store.scene_of(media_path(record.media))
        except KeyError as error:
            raise ValueError(f"Record {record.uid!r}: {error.args[0]}") from error

    def _stored_media(self, record: Record, stored: StoredScene) -> SceneMedia:
        if record.num_frames not in (None, stored.num_frames):
            raise ValueError(
                f"Record {record.uid!r} asks about {record.num_frames} frames, and the store has the features of "
                f"{stored.num_frames}. Leave it out, or train it from its frames."
            )
        tensors = collate_stored_scenes([[stored]])
        if not self.use_geometry:
            tensors = {name: tensors[name] for name in ("video_features", "video_frame_mask", "scene_mask")}
        return SceneMedia({"type": "scene", "scene": stored}, tensors, stored)

    def _load_image(self, path: Path, geometry: SceneGeometry | None) -> SceneMedia:
        part = {"type": "image", "image": load_image(path)}
        if geometry is not None:
            part["geometry"] = VoxelisedGeometry(geometry)
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": [part]}], tokenize=True, return_dict=True, use_geometry=self.use_geometry
        )
        tensors = {name: tensor for name, tensor in inputs.items() if name not in TOKEN_INPUTS}
        return SceneMedia(part, tensors, geometry)

    def _find_geometry(self, record: Record) -> SceneGeometry | None:
        found = None if record.geometry is None else media_path(record.geometry)
        if found is None and callable(self.geometry):
            found = self.geometry(record)
        elif found is None and self.geometry is not None:
            medium = Path(media_path(record.media))
            names = {"stem": medium.stem, "parent": medium.parent.as_posix(), "scene": record.scene}
            found = fill_path(self.geometry, {**names, "source": record.source})
        if found is None or hasattr(found, "boxes_in_scene"):
            return found
        path = self.root_of(record) / found
        if not path.exists():
            raise FileNotFoundError(
                f"Record {record.uid!r} needs the geometry {path}, and there is nothing. Make it, correct `geometry`, or "
                "leave geometry out with `use_geometry=False`."
            )
        return SceneGeometry.load(path)


def _of_source(value, record: Record, *, name: str):
    """What an option says about a record's source, if it tells sources apart."""
    if not isinstance(value, Mapping):
        return value
    if record.source not in value:
        raise ValueError(
            f"`{name}` must have an entry for the source of each record, got {sorted(value)}, and record {record.uid!r} is of "
            f"{record.source!r}."
        )
    return value[record.source]


def collate_media(media: Sequence[SceneMedia]) -> dict[str, torch.Tensor]:
    """
    Put the media of a batch's rows together: images one after another, scenes padded.

    Args:
        media (`Sequence[SceneMedia]`): The medium of each row.

    Returns:
        `dict[str, torch.Tensor]`: Inputs of the model. Padding is 0 and False; a row without a scene has none.

    Raises:
        ValueError: If scenes have different inputs, or frames of different sizes.
    """
    images = [medium.tensors["pixel_values"] for medium in media if "pixel_values" in medium.tensors]
    batch = {"pixel_values": torch.cat(images)} if images else {}
    scenes = {row: medium.tensors for row, medium in enumerate(media) if "pixel_values" not in medium.tensors}
    kinds = {tuple(sorted(tensors)) for tensors in scenes.values()}
    if len(kinds) > 1:
        raise ValueError(
            "All scenes of a batch must have the same inputs, geometry of one kind included; got scenes with "
            f"{' and with '.join(str(list(names)) for names in sorted(kinds))}. Give all of them geometry, or none."
        )
    for name in next(iter(kinds), ()):
        batch[name] = _pad_scenes(name, {row: tensors[name] for row, tensors in scenes.items()}, len(media))
    return batch


def _pad_scenes(name: str, scenes: dict[int, torch.Tensor], batch_size: int) -> torch.Tensor:
    """Pad tensors `(1, num_scenes, count, ...)` to `(batch_size, num_scenes, count, ...)`."""
    sizes = {tuple(tensor.shape[3:]) for tensor in scenes.values()}
    if len(sizes) > 1:
        raise ValueError(
            f"`{name}` must have one size in a batch, got {sorted(sizes)}. Split the batch by the aspect ratio of the videos, "
            "or give `geometry`."
        )
    first = next(iter(scenes.values()))
    shape = [max(tensor.shape[axis] for tensor in scenes.values()) for axis in range(1, min(3, first.ndim))]
    padded = first.new_zeros(batch_size, *shape, *first.shape[3:])
    for row, tensor in scenes.items():
        padded[(row, *(slice(size) for size in tensor.shape[1:3]))] = tensor[0]
    return padded


__all__ = ["SceneLoader", "SceneMedia", "ScenePlace", "collate_media"]
