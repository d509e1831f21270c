# SPDX-License-Identifier: Apache-2.0
"""`geode_export.json`: which code and which weights a folder holds, by their SHA-256, and the terms of its parts."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from geode import __version__
from geode.hub_cards.terms import Part, recorded_parts


MANIFEST = "geode_export.json"
# What its owner may edit on the Hub, and what says what it says elsewhere.
UNRECORDED = ("README.md", ".gitattributes", MANIFEST)
_CHUNK = 1 << 22


class Tensor(NamedTuple):
    """Where a tensor lies: its name, file, type, shape, and its first byte and the one after its last."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """
    Read which tensors a file in safetensors format holds, without reading them.

    Args:
        path (`Path`): The file.

    Returns:
        `dict[str, Tensor]`: By name.

    Raises:
        ValueError: If the file is not in this format, or is cut off.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path.name} is not in safetensors format, or is cut off ({size:,} bytes).")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: Tensor(
                    name,
                    path,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    *(8 + length + offset for offset in entry["data_offsets"]),
                )
                for name, entry in header.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path.name} is not in safetensors format: its header cannot be read.") from error
    end = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if end != size:
        raise ValueError(f"{path.name} is cut off or has bytes after its tensors: {size:,} bytes instead of {end:,}.")
    return tensors


def part_of(name: str) -> str:
    """
    Return the part of the model that a tensor belongs to.

    Example:
        >>> part_of("model.vision_tower.encoder.layer.0.norm.weight"), part_of("drh.heads.0.weight")
        ('vision_tower', 'drh')
    """
    first, _, rest = name.removeprefix("model.").partition(".")
    return first if rest else "model"


def hash_parts(folder: Path) -> dict[str, dict]:
    """
    Hash each part of a model: the same weights give the same hash, however they are put in files.

    Args:
        folder (`Path`): A folder with `*.safetensors`.

    Returns:
        `dict[str, dict]`: `parameters` and `sha256` by the part's name. The hash is over name, type, shape and bytes of each
        tensor, in the order of their names, which are taken within the part.

    Raises:
        ValueError: If a file cannot be read, or a tensor is in two files.
    """
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_header(path).items():
            if name in found[part_of(name)]:
                raise ValueError(
                    f"`{name}` is in {path.name} and in another file. Remove the files of an earlier save."
                )
            found[part_of(name)][name] = tensor
    parts = {}
    for part, tensors in sorted(found.items()):
        digest, count = hashlib.sha256(), 0
        for name in sorted(tensors):
            tensor = tensors[name]
            within = name.removeprefix("model.").removeprefix(f"{part}.")
            digest.update(f"{within} {tensor.dtype} {list(tensor.shape)}\n".encode())
            for chunk in _chunks(tensor.path, tensor.start, tensor.end):
                digest.update(chunk)
            count += tensor.size
        parts[part] = {"parameters": count, "sha256": digest.hexdigest()}
    return parts


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recorded_files(folder: Path) -> list[str]:
    """Return the files of a folder whose hashes are recorded, relative to it; what lies in hidden folders is not, but for results."""
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        name.as_posix()
        for name in names
        if name.as_posix() not in UNRECORDED
        and (not name.parts[0].startswith(".") or name.parts[0] == ".eval_results")
    ]


def write_manifest(folder: Path, *, license_id: str, parts: Sequence[Part]) -> dict:
    """
    Record the files of a folder, which is complete but for its card.

    Args:
        folder (`Path`): The folder.
        license_id (`str`): Licence of what was trained or made here.
        parts (`Sequence[Part]`): What it is made of.

    Returns:
        `dict`: What was written.

    Raises:
        ValueError: See [`hash_parts`].
    """
    from geode.evaluation.results import commit_of_code  # slow to import

    hashes = {name: hash_file(folder / name) for name in recorded_files(folder)}
    terms = {part.name: {key: value for key, value in part._asdict().items() if key != "name"} for part in parts}
    weights = hash_parts(folder)
    document = {
        "geode": __version__,
        "commit": commit_of_code(),
        "license": license_id,
        "code": {name: value for name, value in hashes.items() if name.endswith(".py")},
        "files": {name: value for name, value in hashes.items() if not name.endswith(".py")},
        "parts": {name: {**terms.get(name, {}), **weights.get(name, {})} for name in sorted({*terms, *weights})},
    }
    (folder / MANIFEST).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def recorded_terms(document: dict) -> tuple[str | None, list[Part]]:
    """
    Return what a record says of licences.

    Args:
        document (`dict`): The content of `geode_export.json`.

    Returns:
        `tuple[str, list[Part]]`: The licence of what was trained or made, None in records without it, and the parts that have terms.

    Raises:
        ValueError: If a field is of a wrong type.
    """
    own, entries = document.get("license"), document.get("parts", {})
    if not isinstance(own, str | None) or not isinstance(entries, dict):
        raise ValueError(
            f"{MANIFEST} must have a text as `license` and an object as `parts`, got {own!r} and {entries!r}. Write it again."
        )
    named = [
        {**entry, "name": name} for name, entry in entries.items() if isinstance(entry, dict) and "source" in entry
    ]
    return own, recorded_parts(named, f"`parts` of {MANIFEST}")


def _chunks(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            chunk = file.read(min(_CHUNK, end - start))
            start += len(chunk)
            yield chunk


__all__ = [
    "MANIFEST",
    "Tensor",
    "hash_file",
    "hash_parts",
    "part_of",
    "read_header",
    "recorded_files",
    "recorded_terms",
    "write_manifest",
]
