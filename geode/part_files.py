# SPDX-License-Identifier: Apache-2.0
"""The files of a public checkpoint: found here or on the Hub, listed without reading their data, then read tensor by tensor."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from geode.hub_cards.licences import TEXT_PATTERNS
from geode.modeling_geode.vggt_conversion_geode import (
    CONFIG_NAME,
    FILE_SUFFIXES,
    INDEX_NAME,
    WEIGHT_NAMES,
    read_object,
    read_weights,
)


SIDE_FILES = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "README.md", *TEXT_PATTERNS)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Owner and repository, then perhaps one file of it, then perhaps a branch, tag or commit.
_HUB_SOURCE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/([\w.-]+))?(?:@([\w./-]+))?")


class TensorRef(NamedTuple):
    """Where a tensor lies, and what it is. `dtype` is a name where it is none of `DTYPES`."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str


class PartFiles(NamedTuple):
    """
    A public checkpoint, as it lies on disk.

    `name` is its name for others: that on the Hub, or the last part of its path here. `revision` is its commit, or `None` for one
    that is not from the Hub.
    """

    name: str
    revision: str | None
    folder: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorRef]


class TensorReader:
    """Reads tensors. The last file stays open, and no more than one: what was read of a file stays in memory while it is open."""

    def __init__(self):
        self._path: Path | None = None
        self._opened: Any = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._path = self._opened = None

    def read(self, ref: TensorRef) -> torch.Tensor:
        """Return one tensor, which lies in the file until it is touched."""
        if ref.path != self._path:
            self._opened = None
            self._path, self._opened = ref.path, _open(ref.path)
        return self._opened[ref.key] if isinstance(self._opened, Mapping) else self._opened.get_tensor(ref.key)


def find_part(source: str) -> PartFiles:
    """
    Find a public checkpoint, download it if need be, and list its tensors.

    Args:
        source (`str`):
            A folder; one file with weights; or a name on the Hub as `owner/repository`, `owner/repository/file` and either of them
            with `@revision`. What is here goes first. Without a revision, the head of the main branch is taken; its commit is told.

    Returns:
        [`PartFiles`]: Its files and tensors.

    Raises:
        FileNotFoundError: If there is no such checkpoint, or no weights in it.
        ValueError: If a file is damaged, or index and files contradict each other.
    """
    path = Path(source).expanduser()
    if path.exists():
        # Links are not followed: the name of what they point to in a cache says nothing.
        folder, file, name, revision = *_split(path), Path(os.path.abspath(path)).name, None
    else:
        folder, file, name, revision = _download(source)
    if file is not None:
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{name!r} has no file {file!r}. Correct the name after the repository's.")
        config, tensors = _list_file(path)
        config = config if config is not None else _config_of(folder)
        return PartFiles(name, revision, folder, config, (path,), tensors)
    files = _weight_files(folder, name)
    tensors = {}
    for path in files:
        for key, ref in _list_file(path)[1].items():
            if key in tensors:
                raise ValueError(f"{name!r} holds `{key}` twice, in {tensors[key].path.name} and {path.name}.")
            tensors[key] = ref
    if files[0].name not in WEIGHT_NAMES:
        _check_index(folder / INDEX_NAME, tensors)
    return PartFiles(name, revision, folder, _config_of(folder), files, tensors)


def _split(path: Path) -> tuple[Path, str | None]:
    return (path, None) if path.is_dir() else (path.parent, path.name)


def _config_of(folder: Path) -> dict[str, Any]:
    return read_object(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}


def _download(source: str) -> tuple[Path, str | None, str, str]:
    match = _HUB_SOURCE.fullmatch(source)
    if match is None:
        raise FileNotFoundError(
            f"A part must be a folder, a file ending in {', '.join(FILE_SUFFIXES)}, or a name on the Hub such as "
            f"'owner/repository', 'owner/repository/file.pth' or 'owner/repository@revision', and there is nothing at "
            f"{source!r}. A path is relative to {Path.cwd()}."
        )
    name, file, revision = match.groups()
    try:
        weights = ["*.safetensors"] if file is None else [file]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*SIDE_FILES, *weights]))
        if file is None and not any(folder.glob("*.safetensors")):
            # Only now, as some publish the same weights in both forms.
            snapshot_download(name, revision=folder.name, allow_patterns=[WEIGHT_NAMES[-1]])
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{source!r} is neither here nor does the Hub (offline, its cache) give it: {error}"
        ) from error
    return folder, file, name, folder.name


def _weight_files(folder: Path, name: str) -> tuple[Path, ...]:
    for candidate in WEIGHT_NAMES:
        path = folder / candidate
        if not path.is_file():
            continue
        if candidate != INDEX_NAME:
            return (path,)
        shards = sorted(set(_weight_map(path).values()))
        # An index could otherwise name files outside of its folder.
        absent = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file()]
        if absent or not shards:
            raise FileNotFoundError(
                f"{path} names {absent or 'no files'}, not found beside it. Download the checkpoint again."
            )
        return tuple(folder / shard for shard in shards)
    raise FileNotFoundError(
        f"{name!r} must hold one of {', '.join(WEIGHT_NAMES)}, and holds none. Name the file itself if it is called otherwise, as "
        "'owner/repository/file.pth' or by its path."
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} must hold a `weight_map` from tensors to files. Download the checkpoint again.")
    return weight_map


def _check_index(index: Path, tensors: Mapping[str, TensorRef]) -> None:
    """Each tensor lies where the index says, and there is no other."""
    named = _weight_map(index)
    wrong = sorted(named.items() ^ {(key, ref.path.name) for key, ref in tensors.items()})
    if wrong:
        key, file = wrong[0]
        raise ValueError(
            f"{index} and its files disagree about {len({key for key, _ in wrong})} tensors, such as `{key}` in {file}. Download "
            "the checkpoint again."
        )


def _open(path: Path) -> Any:
    if path.suffix != ".safetensors":
        content = read_weights(path)
        return content.get("state_dict", content)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is damaged or incomplete: {error}. Download it again."
        ) from error


def _list_file(path: Path) -> tuple[Mapping[str, Any] | None, dict[str, TensorRef]]:
    """Return the configuration that lies in a file, if one does, and the file's tensors."""
    if path.suffix == ".safetensors":
        opened = _open(path)
        slices = {key: opened.get_slice(key) for key in opened.keys()}
        dtypes = {key: found.get_dtype() for key, found in slices.items()}
        return None, {
            key: TensorRef(path, key, tuple(found.get_shape()), DTYPES.get(dtypes[key], dtypes[key]))
            for key, found in slices.items()
        }
    content = read_weights(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    foreign = (
        [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
        if isinstance(state, Mapping)
        else [type(state).__name__]
    )
    if foreign:
        raise ValueError(
            f"{path} must hold tensors by name, alone or as `state_dict` beside `config`, and {foreign[0]!r} is none."
        )
    known = set(DTYPES.values())
    return content.get("config") if state is not content else None, {
        key: TensorRef(path, key, tuple(value.shape), value.dtype if value.dtype in known else str(value.dtype))
        for key, value in state.items()
    }


__all__ = ["PartFiles", "TensorReader", "TensorRef", "find_part"]
