# SPDX-License-Identifier: Apache-2.0
"""A folder of encoded scenes that keeps those used last, within a number of bytes; several processes may share it."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from huggingface_hub.utils import WeakFileLock
from transformers.utils import logging

from .checked_files_geode import checked_path
from .scene_encoding_geode import SceneEncoding
from .scene_files_geode import sha256_of
from .shown_geode import shown
from .video_processing_geode import local_path


logger = logging.get_logger(__name__)

STORE_VERSION = 1  # raised when the same key comes to stand for other tokens
_KEY = re.compile(r"[\w-]{1,128}", flags=re.ASCII)
_SUFFIX, _LOCK, _SCRATCH = ".safetensors", ".lock", "unfinished"
# What the calls of the processor may set of a scene.
_OPTIONS = ("num_frames", "num_geometry_frames", "use_geometry")
# Of the image processor: with other ones the same frames are other pixels.
PIXEL_SETTINGS = (
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "do_resize",
    "image_mean",
    "image_std",
    "resample",
    "rescale_factor",
    "size",
)


class SceneStore:
    """
    Encoded scenes on disk, by the content of their video and geometry, the options, and the encoders' digest.

    A scene is a file that appears in one step. When all of them exceed `max_bytes`, those used longest ago go. Writers take
    turns at a lock; readers wait for nobody, and a scene that another process removes at this moment is one that is not there.
    `model.open_scene_store` makes one.

    Args:
        folder (`str` or `os.PathLike`):
            The folder, for nothing else; it is created if absent.
        model ([`GeodeForConditionalGeneration`]):
            The model that encodes.
        max_bytes (`int`):
            Largest size of all scenes together.

    Example:
        ```python
        store = model.open_scene_store("scenes", max_bytes=2 * 2**30)
        scene = store.encode(processor, "room.mp4", geometry="geometry")  # encoded once, then read
        answers = model.ask(processor, scene, ["How many chairs are there?", "How big is the room?"])
        ```
    """

    def __init__(self, folder: str | os.PathLike, model, *, max_bytes: int):
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"`max_bytes` must be a whole number of at least 1, got {max_bytes!r}.")
        self.folder, self.model, self.max_bytes = checked_path("folder", folder), model, max_bytes
        if self.folder.is_file():
            raise NotADirectoryError(f"`folder` must be a folder of scenes, got the file {self.folder}.")
        self.folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._files())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and _KEY.fullmatch(key) is not None and self._path_of(key).is_file()

    @property
    def num_bytes(self) -> int:
        """Size of all scenes together."""
        return sum(size for _, size, _ in self._files())

    def encode(
        self, processor, video: str | os.PathLike, *, geometry: str | os.PathLike | None = None, **options
    ) -> SceneEncoding:
        """
        Return the encoding of a video: a stored one, or a new one, which is stored.

        Args:
            processor ([`GeodeProcessor`]):
                The model's processor.
            video (`str` or `os.PathLike`):
                A file, or a folder of pictures.
            geometry (`str` or `os.PathLike`, *optional*):
                The folder of a saved [`SceneGeometry`]; without it the model's reconstructor makes the geometry.
            **options:
                `num_frames`, `num_geometry_frames` and `use_geometry`, as of [`~GeodeProcessor.prepare_scene`].

        Returns:
            [`SceneEncoding`]: The scene, on the model's device.

        Raises:
            FileNotFoundError: If there is no video or no geometry.
            ValueError: If the scene alone is larger than `max_bytes`, or cannot be encoded.
        """
        key = self.key_of(processor, video, geometry=geometry, **options)
        scene = self.get(key)
        if scene is None:
            scene = self.model.encode_scene(**processor.prepare_scene(video=video, geometry=geometry, **options))
            self.put(key, scene)
        return scene.to(self.model.device)

    def key_of(self, processor, video, *, geometry=None, **options) -> str:
        """Digest of everything that decides a scene's encoding; arguments are those of [`SceneStore.encode`]."""
        unknown = sorted(options.keys() - set(_OPTIONS))
        if unknown:
            raise TypeError(f"Unknown options {unknown}. A scene takes {list(_OPTIONS)}.")
        video = local_path(video, what="video")
        # As the processor takes them: None stands for its own default.
        chosen = {"num_frames": processor.num_frames, "num_geometry_frames": processor.num_geometry_frames}
        chosen |= {name: value for name, value in options.items() if value is not None}
        facts = {
            "store_version": STORE_VERSION,
            "video": _content_digest(video),
            "options": {"use_geometry": True, **chosen},
            "encoders": self.model.model.encoder_digest(),
            "pixels": {name: getattr(processor.image_processor, name, None) for name in PIXEL_SETTINGS},
        }
        facts["pixels"]["size"] = dict(processor.image_processor.size)
        if facts["options"]["use_geometry"]:
            facts |= {"grid_size": processor.grid_size, "max_points": processor.max_points}
            if geometry is not None:
                # Its header holds the digest of the tensors beside it.
                header = local_path(geometry, what="geometry") / "geometry.json"
                if not header.is_file():
                    raise FileNotFoundError(
                        f"`geometry` must be the folder of a saved scene; {geometry} has no {header.name}."
                    )
                facts["geometry"] = sha256_of(header)
            else:
                facts["reconstructor"] = self.model.model.reconstructor_digest()
                facts["geometry_frame_size"] = processor.geometry_frame_size
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> SceneEncoding | None:
        """
        Read a scene, and note that it was used.

        Args:
            key (`str`): Of [`SceneStore.key_of`].

        Returns:
            [`SceneEncoding`], *optional*: The scene, on the CPU; None if there is none. A damaged file is removed.
        """
        path = self._path_of(key)
        try:
            scene = SceneEncoding.load(path)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (TypeError, ValueError) as error:
            logger.warning(f"The stored scene {path} is damaged and is removed: {error}")
            path.unlink(missing_ok=True)
            return None
        return scene

    def put(self, key: str, scene: SceneEncoding) -> None:
        """
        Store a scene, and remove those used longest ago until all fit.

        Args:
            key (`str`): Of [`SceneStore.key_of`].
            scene ([`SceneEncoding`]): The scene.

        Raises:
            ValueError: If it is larger than `max_bytes` on its own.
        """
        path, scratch = self._path_of(key), self.folder / _SCRATCH
        if not isinstance(scene, SceneEncoding):
            raise TypeError(f"`scene` must be a SceneEncoding, got {type(scene).__name__}.")
        with WeakFileLock(self.folder / _LOCK):
            # Whoever writes holds the lock, so what is here was left by a process that died.
            shutil.rmtree(scratch, ignore_errors=True)
            scene.save(scratch / path.name)
            size = (scratch / path.name).stat().st_size
            if size > self.max_bytes:
                shutil.rmtree(scratch)
                raise ValueError(
                    f"`max_bytes` must be at least the size of one scene, {size} bytes, got {self.max_bytes}. Raise it, or "
                    "store the scene without its `prefix`."
                )
            others = sorted(file for file in self._files() if file[2] != path)
            total = size + sum(other for _, other, _ in others)
            for _, other, oldest in others:
                if total <= self.max_bytes:
                    break
                oldest.unlink(missing_ok=True)
                total -= other
            os.replace(scratch / path.name, path)
            shutil.rmtree(scratch)

    def _path_of(self, key: str) -> Path:
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise ValueError(f"`key` must be letters, digits and dashes, as `key_of` gives, got {shown(key)}.")
        return self.folder / f"{key}{_SUFFIX}"

    def _files(self) -> list[tuple[int, int, Path]]:
        """Time of last use in nanoseconds, size in bytes and path of each scene."""
        files = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # another process has just removed it
            files.append((stat.st_mtime_ns, stat.st_size, path))
        return files


def _content_digest(video: Path) -> str | list[list[str]]:
    if not video.is_dir():
        return sha256_of(video)
    return [[path.name, sha256_of(path)] for path in sorted(video.iterdir()) if path.is_file()]


__all__ = ["PIXEL_SETTINGS", "SceneStore"]
