# SPDX-License-Identifier: Apache-2.0
"""
Features of scenes that frozen encoders computed once, read by memory map.

A store is a folder that `geode.trainers.precompute` writes: `manifest.json` (the options), `index.json` (which scene is
where, and which videos failed) and `shard-00000.safetensors` and so on. A scene's key is a digest of its video's bytes, of
its geometry, of the encoders' weights and of the settings that decide the features. Nothing is unpickled. Whatever is read is
compared with checksums, as the format of the shards has none.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from geode.modeling_geode.checked_files_geode import parse_json
from geode.modeling_geode.collation_geode import collate_scenes
from geode.modeling_geode.geometry_geode import transform_boxes
from geode.modeling_geode.scene_encoding_geode import digest_of
from geode.modeling_geode.scene_files_geode import check_tensors, unsealed
from geode.modeling_geode.scene_geode import SceneGeometry
from geode.modeling_geode.scene_store_geode import PIXEL_SETTINGS


FORMAT_VERSION = 1  # of the files
FEATURES_VERSION = 1  # raised when the same weights and settings come to give other features
MANIFEST_FILE, INDEX_FILE = "manifest.json", "index.json"
SHARD_KEY = "geode_feature_shard"  # of the facts in a shard's header
_REMEDY = "Run the same `geode precompute` again, which makes it anew."
# What the model reads of a scene; `video_features` are there if the store has them.
MODEL_TENSORS = ("point_tokens", "point_token_positions", "camera_poses", "log_scale", "scale_known", "video_features")
GEOMETRY_TENSORS = (
    "points",
    "colors",
    "normals",
    "world_from_cam",
    "intrinsics",
    "timestamps_s",
)
GEOMETRY_FACTS = ("image_size", "is_metric", "scale_source", "gravity", "metres_per_unit")
# The settings of each encoder, by the names of the configuration.
_ENCODER_SETTINGS = {
    "point_encoder": ("point_config",),
    "reconstructor": ("reconstructor_config",),
    "vision_tower": ("vision_config", "vision_feature_layer", "vision_feature_select_strategy"),
}
# The processor asks a scene how many rationale tokens it has. The model makes them anew, as many as are asked for.
_ANY_NUMBER_OF_TOKENS = 65_536


def frozen_encoder_digest(model, name: str) -> str:
    """
    Digest of the weights and settings of one encoder. Unlike `model.encoder_digest()`, nothing in it trains.

    Args:
        model ([`GeodeForConditionalGeneration`] or [`GeodeModel`]):
            The model.
        name (`str`):
            `"point_encoder"`, `"vision_tower"` or `"reconstructor"`.

    Returns:
        `str`: Equal for two models exactly if the encoder's features are interchangeable.

    Raises:
        ValueError: If there is no such encoder.
    """
    part = getattr(getattr(model, "model", model), name, None) if name in _ENCODER_SETTINGS else None
    if part is None:
        raise ValueError(f"`name` must be an encoder of the model, one of {sorted(_ENCODER_SETTINGS)}, got {name!r}.")
    config = model.config.to_dict()
    return digest_of(part.state_dict(), {setting: config[setting] for setting in _ENCODER_SETTINGS[name]})


def store_options(
    model,
    processor,
    *,
    has_reconstructions: bool,
    has_video_features: bool,
    has_geometry: bool = True,
    dtype: str | None = None,
) -> dict:
    """
    Everything besides a scene's files that decides its features, in a form that JSON can hold.

    Args:
        model ([`GeodeForConditionalGeneration`] or [`GeodeModel`]):
            The model.
        processor ([`GeodeProcessor`]):
            Its processor.
        has_reconstructions (`bool`):
            Some scenes are made by the model's reconstructor.
        has_video_features (`bool`):
            Features of the vision tower are stored.
        has_geometry (`bool`, defaults to `True`):
            What the reconstructor makes is stored itself.
        dtype (`str`, *optional*):
            Floating-point type that features are rounded to; None keeps the model's.

    Returns:
        `dict`: The options. Those that decide nothing are None.
    """
    config, tower, reconstructor = model.config, None, None
    if has_video_features:
        settings = {name: getattr(processor.image_processor, name, None) for name in PIXEL_SETTINGS}
        settings["size"] = dict(processor.image_processor.size)
        tower = {
            "digest": frozen_encoder_digest(model, "vision_tower"),
            "num_frames": processor.num_frames,
            "pixels": settings,
        }
    if has_reconstructions:
        reconstructor = {
            "digest": frozen_encoder_digest(model, "reconstructor"),
            "geometry_frame_size": processor.geometry_frame_size,
            "max_points": config.max_points,
            "stores_geometry": has_geometry,
        }
    options = {
        "format_version": FORMAT_VERSION,
        "features_version": FEATURES_VERSION,
        "dtype": dtype,
        "point_encoder": {
            "digest": frozen_encoder_digest(model, "point_encoder"),
            "grid_size": processor.grid_size,
            "max_points": processor.max_points,
            "num_geometry_frames": processor.num_geometry_frames,
        },
        "reconstructor": reconstructor,
        "vision_tower": tower,
    }
    return json.loads(json.dumps(options))


def digest_of_json(value) -> str:
    """SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def option_differences(given: dict, stored: dict, prefix: str = "") -> list[str]:
    """Name every option that differs, with both values."""
    lines = []
    for name in sorted(given.keys() | stored.keys()):
        new, old = given.get(name), stored.get(name)
        if isinstance(new, dict) and isinstance(old, dict):
            lines += option_differences(new, old, f"{prefix}{name}.")
        elif new != old:
            lines.append(f"`{prefix}{name}` {json.dumps(new)} instead of the stored {json.dumps(old)}")
    return lines


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.safetensors"


def read_shard_facts(path: Path, *, checks_tensors: bool = False) -> dict | None:
    """
    Read what a shard says about itself, from its header.

    Args:
        path (`Path`):
            A shard.
        checks_tensors (`bool`, defaults to `False`):
            Compare its tensors with their checksums, too, which reads all of the file.

    Returns:
        `dict`, *optional*: `keys`, `scenes` and `failures`; None if the file is absent, damaged or no shard.
    """
    try:
        # Opening checks that the tensors of the header fill the file exactly.
        with safe_open(path, framework="pt") as shard:
            facts = unsealed(json.loads((shard.metadata() or {})[SHARD_KEY]), f"{path} is damaged.")
            for key, scene in facts["scenes"].items() if checks_tensors else ():
                for name in scene["tensors"]:
                    _check_tensor(shard.get_tensor(f"{key}.{name}"), name, scene, path)
            return facts
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _check_tensor(tensor: torch.Tensor, name: str, facts: dict, path: Path) -> None:
    """Compare a tensor with its checksum; shards of earlier versions have none."""
    if "checksums" in facts:
        check_tensors({name: tensor}, facts["checksums"], f"{path} is damaged. {_REMEDY}")


class StoredScene:
    """
    One scene of a [`FeatureStore`]. Its tensors are read when they are asked for.

    It stands as the `geometry` of a video part in a chat, or, where the vision tower's features are stored, as the
    `scene` of a scene part; `as_part` gives the right one.

    Args:
        store ([`FeatureStore`]): The store.
        key (`str`): The scene's key.
    """

    def __init__(self, store: "FeatureStore", key: str):
        self.store, self.key = store, key
        self.facts = store.entries[key]

    def __repr__(self) -> str:
        return f"StoredScene({self.key[:12]}, {self.facts})"

    @property
    def has_video_features(self) -> bool:
        """Whether the vision tower's features are stored."""
        return "num_frames" in self.facts

    @property
    def num_frames(self) -> int:
        """Number of frames that the vision tower saw."""
        if not self.has_video_features:
            raise ValueError(
                "The store has no features of the vision tower, so the frames are the video's. Use the scene as the "
                "`geometry` of its video, as `as_part` does, or precompute with `store_vision_features=True`."
            )
        return self.facts["num_frames"]

    @property
    def rationale_tokens(self) -> torch.Tensor:
        """Only a number of tokens, of width 0: the model makes as many as the processor asks for."""
        return torch.zeros(_ANY_NUMBER_OF_TOKENS, 0)

    @property
    def geometry(self) -> SceneGeometry | None:
        """What the reconstructor made; None where the geometry was given, or it is not stored."""
        fields: dict[str, Any] = {name: self.facts[name] for name in GEOMETRY_FACTS}
        if not self.facts["stores_geometry"]:
            return None
        fields["image_size"] = tuple(fields["image_size"]) if fields["image_size"] else None
        names = [*GEOMETRY_TENSORS, "scene_from_dataset"]
        fields |= self.store.read(self.key, [name for name in names if name in self.facts["tensors"]])
        return SceneGeometry(**fields)

    def tensors(self) -> dict[str, torch.Tensor]:
        """
        Everything stored that the model reads, not batched.

        Returns:
            `dict[str, torch.Tensor]`: `point_tokens` `(num_tokens, point_hidden_size)`, `point_token_positions`
            `(num_tokens, 3)`, `camera_poses` `(num_cameras, 11)`, `log_scale` `()`, `scale_known` `()`, and if stored
            `video_features` `(num_frames, num_patches, vision_hidden_size)`. They lie in the mapped file: do not write to
            them.
        """
        return self.store.read(self.key, [name for name in MODEL_TENSORS if name in self.facts["tensors"]])

    def to_model_inputs(
        self, grid_size: float, *, max_points: int | None = None, num_cameras: int | None = None
    ) -> dict[str, torch.Tensor]:
        """
        The tensors in place of those of [`SceneGeometry.to_model_inputs`], without the frames' features.

        Args:
            grid_size (`float`):
                Voxel edge of the point encoder, in metres; must be that of the store, like the arguments that follow.
            max_points (`int`, *optional*):
                Largest number of voxels.
            num_cameras (`int`, *optional*):
                Largest number of cameras.

        Returns:
            `dict[str, torch.Tensor]`: As [`StoredScene.tensors`]; see [`collate_scenes`].

        Raises:
            ValueError: If an argument is not that of the store.
        """
        stored = self.store.options["point_encoder"]
        given = {"grid_size": grid_size, "max_points": max_points, "num_geometry_frames": num_cameras}
        differences = option_differences(given, {name: stored[name] for name in given})
        if differences:
            raise ValueError(
                f"A stored scene keeps the settings it was made with; asked for {', '.join(differences)}. Set the "
                "processor to them, or precompute again."
            )
        names = [name for name in MODEL_TENSORS if name in self.facts["tensors"] and name != "video_features"]
        return self.store.read(self.key, names)

    def as_part(self, path: str | os.PathLike) -> dict:
        """
        The part of a chat that stands for this scene.

        Args:
            path (`str` or `os.PathLike`):
                The video, which is read again where the vision tower's features are not stored.

        Returns:
            `dict`: `{"type": "scene", "scene": self}` or `{"type": "video", "path": path, "geometry": self}`. With the
            former, `collate_stored_scenes` gives the model inputs.
        """
        if self.has_video_features:
            return {"type": "scene", "scene": self}
        return {"type": "video", "path": os.fspath(path), "geometry": self}

    def boxes_in_scene(self, boxes) -> torch.Tensor:
        """
        Bring boxes of the dataset's frame into the scene frame; see [`SceneGeometry.boxes_in_scene`].

        Args:
            boxes (`np.ndarray` or `torch.Tensor` of shape `(num_boxes, 7)`):
                Boxes `(cx, cy, cz, dx, dy, dz, yaw)` in the dataset's frame and unit.

        Returns:
            `torch.Tensor` of shape `(num_boxes, 7)`: Boxes in the scene frame, float32.
        """
        scene_from_dataset = self.store.read(self.key, ["scene_from_dataset"])["scene_from_dataset"]
        boxes = transform_boxes(torch.as_tensor(boxes).double(), scene_from_dataset)
        return torch.cat([boxes[..., :6] * self.facts["metres_per_unit"], boxes[..., 6:]], dim=-1).float()


class FeatureStore:
    """
    A folder of stored scenes, by key: `store[store.key_of("rooms/1.mp4")]`.

    Opening it reads two JSON files. Shards are mapped into memory when a scene of theirs is read first, in each process
    anew, so a store may be given to the workers of a `DataLoader`.

    Args:
        folder (`str` or `os.PathLike`):
            What `geode precompute` wrote.

    Raises:
        FileNotFoundError: If there is no store, or it is not complete.
        ValueError: If it is of another version.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.manifest = self._read(MANIFEST_FILE, "is no feature store. `geode precompute` makes one")
        self.options: dict = self.manifest["options"]
        index = self._read(INDEX_FILE, "is not complete. Run the same `geode precompute` again, which resumes")
        self.entries: dict[str, dict] = index["scenes"]
        self.paths: dict[str, str] = index["paths"]
        self.failures: dict[str, str] = index["failures"]
        self.shards: list[dict] = index["shards"]
        self._open_shards: dict[int, safe_open] = {}
        self._checked: set[str] = set()
        self._process = os.getpid()

    def _read(self, name: str, otherwise: str) -> dict:
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"The folder {self.folder} has no {name}, so it {otherwise}.")
        found = parse_json(path.read_bytes(), str(path))  # of a million scenes, so of any size
        if name == MANIFEST_FILE:  # before the checksum, as another version may have another one
            options = found.get("options") if isinstance(found, dict) else None
            version = options.get("format_version") if isinstance(options, dict) else None
            if version != FORMAT_VERSION:
                raise ValueError(
                    f"{path} must have `format_version` {FORMAT_VERSION}, got {version!r}. Precompute the store again with "
                    "this version of geode, or update geode."
                )
        return unsealed(found, f"{path} is damaged. {_REMEDY}")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open_shards": {}, "_checked": set(), "_process": None}

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def __getitem__(self, key: str) -> StoredScene:
        if key not in self.entries:
            raise KeyError(
                f"The store {self.folder} has no scene of key {key!r}; `key_of` gives the key of a video's path."
            )
        return StoredScene(self, key)

    def keys(self) -> list[str]:
        """Keys of all scenes."""
        return list(self.entries)

    def key_of(self, path: str) -> str:
        """
        The key of a video.

        Args:
            path (`str`):
                Its path below the media root, with forward slashes, as it was given to `precompute`.

        Returns:
            `str`: The key.

        Raises:
            KeyError: If the video was not given to `precompute`, or could not be read.
        """
        if path in self.failures:
            raise KeyError(
                f"The video {path!r} could not be stored: {self.failures[path]} Repair it and run the same `geode "
                "precompute --retry-failed`, or leave its questions out."
            )
        if path not in self.paths:
            raise KeyError(
                f"The store {self.folder} has none of its {len(self.paths)} videos at {path!r}. Paths are relative to the "
                "media root of `geode precompute`; precompute a store that includes this video."
            )
        return self.paths[path]

    def scene_of(self, path: str) -> StoredScene:
        """The scene of a video; see [`FeatureStore.key_of`]."""
        return self[self.key_of(path)]

    def check(self, model, processor) -> None:
        """
        Refuse to be used with encoders or settings other than those that made the features.

        Args:
            model ([`GeodeForConditionalGeneration`] or [`GeodeModel`]):
                The model that is to read the features.
            processor ([`GeodeProcessor`]):
                Its processor.

        Raises:
            ValueError: If an encoder or a setting differs, naming both, or an encoder would train.
        """
        base = getattr(model, "model", model)
        # A model without a reconstructor takes the geometry as it is: there is nothing that could contradict it.
        stored = {name: None if getattr(base, name, self) is None else value for name, value in self.options.items()}
        tower, reconstructor = stored["vision_tower"], stored["reconstructor"]
        used = {"point_encoder": True, "reconstructor": reconstructor, "vision_tower": tower}
        for name in (name for name, is_used in used.items() if is_used):
            if any(parameter.requires_grad for parameter in getattr(base, name).parameters()):
                raise ValueError(
                    f"The `{name}` would train, and its stored features would stay as they are. Freeze it, or train "
                    "without the store."
                )
        options = store_options(
            model,
            processor,
            has_reconstructions=reconstructor is not None,
            has_video_features=tower is not None,
            has_geometry=bool(reconstructor and reconstructor["stores_geometry"]),
            dtype=stored["dtype"],
        )
        differences = option_differences(options, stored)
        if differences:
            raise ValueError(
                f"The store {self.folder} was made by other encoders or settings than this model's: "
                f"{'; '.join(differences)}. Use the model and processor that it was made with, or precompute to a new "
                "folder."
            )

    def read(self, key: str, names: list[str]) -> dict[str, torch.Tensor]:
        """
        Read tensors of one scene, through the memory map. When a process reads one first, it is compared with its checksum.

        Args:
            key (`str`):
                The scene.
            names (`list[str]`):
                Names of its tensors.

        Returns:
            `dict[str, torch.Tensor]`: The tensors, which lie in the mapped file.

        Raises:
            ValueError: If the shard is damaged.
        """
        facts = self.entries[key]
        shard, path = self._shard(facts["shard"]), self.folder / self.shards[facts["shard"]]["file"]
        try:
            tensors = {name: shard.get_tensor(f"{key}.{name}") for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}). {_REMEDY}") from error
        for name, tensor in tensors.items():
            if f"{key}.{name}" not in self._checked:
                _check_tensor(tensor, name, facts, path)
                self._checked.add(f"{key}.{name}")
        return tensors

    def _shard(self, number: int) -> safe_open:
        if self._process != os.getpid():
            self._open_shards, self._process = {}, os.getpid()
        if number not in self._open_shards:
            expected = self.shards[number]
            if expected["file"] != Path(expected["file"]).name:
                raise ValueError(
                    f"The shards of {self.folder} must lie in it, and {INDEX_FILE} names {expected['file']!r}. Run the same "
                    "`geode precompute` again, which makes it anew."
                )
            path = self.folder / expected["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != expected["bytes"]:
                raise ValueError(
                    f"{path} must have {expected['bytes']} bytes, got {size}. It is damaged: run the same `geode precompute` "
                    "again, which makes it anew."
                )
            try:
                self._open_shards[number] = safe_open(path, framework="pt", device="cpu")
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}). {_REMEDY}") from error
        return self._open_shards[number]


def collate_stored_scenes(samples: list[list[StoredScene]]) -> dict[str, torch.Tensor]:
    """
    Make the model inputs of stored scenes, to be added to what the processor makes of their chats.

    Args:
        samples (`list[list[StoredScene]]`):
            For each sample its scenes in order, possibly none.

    Returns:
        `dict[str, torch.Tensor]`: See [`collate_scenes`].
    """
    return collate_scenes([[scene.tensors() for scene in scenes] for scenes in samples])


__all__ = ["FeatureStore", "StoredScene", "collate_stored_scenes", "frozen_encoder_digest", "store_options"]
