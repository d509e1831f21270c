# SPDX-License-Identifier: Apache-2.0
"""Files of scenes: tensors with a version and checksums, and point clouds as PLY. Nothing is unpickled."""

import hashlib
import json
import os
import tempfile
import zlib
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict

from .checked_files_geode import checked_path, parse_json


FORMAT_VERSION = 1
# Names of PLY's types, old and new, as NumPy's.
_PLY_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip
_PLY_FORMATS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_MAX_PLY_HEADER = 65_536  # bytes
_TEXT_ROWS = 65_536  # that are parsed at a time
MAX_PLY_VERTICES = 50_000_000  # as many as a scene takes; in float64 with normals 2.4 GB


def check_version(header: dict, where: str) -> None:
    """Raise unless a header is of this version of the format."""
    version = header.get("format_version") if isinstance(header, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{where} must have `format_version` {FORMAT_VERSION}, got {version!r}. Write it again with this version "
            "of geode, or update geode."
        )


def sealed(document: dict) -> dict:
    """
    Add a checksum of its content to an object that JSON can hold, so that a flipped bit in its file shows.

    Args:
        document (`dict`): The object.

    Returns:
        `dict`: The same with `"crc32"`.

    Example:
        >>> unsealed(sealed({"scale": 1.0}), "scale.json is damaged.")
        {'scale': 1.0}
    """
    text = json.dumps(document, sort_keys=True)
    return {**document, "crc32": f"{zlib.crc32(text.encode()):08x}"}


def unsealed(document: dict, where: str) -> dict:
    """
    Check an object against its checksum, and take that off. One without was written by an earlier version, and passes.

    Args:
        document (`dict`): The object, as it was read.
        where (`str`): Its file, for the error, and what to do if it is damaged.

    Returns:
        `dict`: The object alone.

    Raises:
        ValueError: If it is damaged.
    """
    content = {name: value for name, value in document.items() if name != "crc32"}
    if "crc32" in document and sealed(content)["crc32"] != document["crc32"]:
        raise ValueError(f"{where} Its content has the checksum {sealed(content)['crc32']}, not {document['crc32']}.")
    return content


def read_sealed(path: Path, remedy: str) -> dict:
    """
    Read a sealed object from its file.

    Args:
        path (`Path`): The file.
        remedy (`str`): What to do if it is damaged.

    Returns:
        `dict`: What was given to [`sealed`].

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    where = f"{path} is damaged. {remedy}"
    found = parse_json(path.read_bytes(), str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{where} It holds no object, but {found!r:.100}.")
    return unsealed(found, where)


def tensor_checksum(tensor: torch.Tensor) -> str:
    """
    Return a CRC-32 of a tensor's type, shape and bytes. It is for faults of disks, not against forgery.

    Args:
        tensor (`torch.Tensor`): On any device.

    Returns:
        `str`: Eight hexadecimal digits.

    Example:
        >>> tensor_checksum(torch.tensor([1.0, 2.0])) == tensor_checksum(torch.tensor([[1.0, 2.0]]))
        False
    """
    start = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{zlib.crc32(content, start):08x}"


def check_tensors(tensors: dict[str, torch.Tensor], checksums: dict[str, str], where: str) -> None:
    """
    Raise unless tensors are those that were written.

    Args:
        tensors (`dict[str, torch.Tensor]`): As they were read.
        checksums (`dict[str, str]`): By name, of [`tensor_checksum`]; there may be more.
        where (`str`): Their file, for the error, and what to do if it is damaged.

    Raises:
        ValueError: If one is damaged.
    """
    for name, tensor in tensors.items():
        found = tensor_checksum(tensor)
        if found != checksums.get(name):
            raise ValueError(f"{where} The checksum of `{name}` is {found}, not {checksums.get(name)}.")


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to one safetensors file."""
    # Clones: the writer drops all but one of the tensors that share a storage.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    pattern = f"{path.stem}{{suffix}}.safetensors"
    save_torch_state_dict(tensors, path.parent, filename_pattern=pattern, max_shard_size="1TB", metadata=metadata)


def sha256_of(path: Path) -> str:
    """Return the digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PlyCloud(NamedTuple):
    """
    What a PLY file says about its vertices.

    Args:
        points (`np.ndarray` of shape `(num_points, 3)`): Coordinates, float64, in the file's frame and unit.
        colors (`np.ndarray` of shape `(num_points, 3)`, *optional*): Red, green, blue: uint8, or floating point.
        normals (`np.ndarray` of shape `(num_points, 3)`, *optional*): Normals, float64.
    """

    points: np.ndarray
    colors: np.ndarray | None = None
    normals: np.ndarray | None = None


class _PlyElement(NamedTuple):
    name: str
    count: int
    properties: list[tuple[str, str]]
    has_lists: bool


def write_ply(path: str | os.PathLike, cloud: PlyCloud, *, comments: tuple[str, ...] = ()) -> None:
    """
    Write a point cloud as binary PLY, in one step.

    Args:
        path (`str` or `os.PathLike`):
            A path ending in `.ply`. Its folder is created if absent.
        cloud ([`PlyCloud`]):
            Points, which are written as float32, with colours as uint8 and normals if there are any.
        comments (`tuple[str, ...]`):
            Lines for the header.

    Raises:
        ValueError: If the path ends in something else.
    """
    path = Path(path)
    if path.suffix.lower() != ".ply":
        raise ValueError(f"`path` must end in .ply, got {path}.")
    parts = [("xyz", "<f4", "float", cloud.points)]
    if cloud.normals is not None:
        parts.append((("nx", "ny", "nz"), "<f4", "float", cloud.normals))
    if cloud.colors is not None:
        parts.append((("red", "green", "blue"), "u1", "uchar", cloud.colors))
    rows = np.empty(len(cloud.points), dtype=[(name, dtype) for names, dtype, _, _ in parts for name in names])
    for names, _, _, values in parts:
        for column, name in enumerate(names):
            rows[name] = values[:, column]
    header = ["ply", "format binary_little_endian 1.0", *(f"comment {line}" for line in comments)]
    header += [f"element vertex {len(rows)}"]
    header += [f"property {kind} {name}" for names, _, kind, _ in parts for name in names]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        written = Path(scratch) / "cloud.ply"
        written.write_bytes("\n".join([*header, "end_header", ""]).encode("ascii") + rows.tobytes())
        os.replace(written, path)


def read_ply(path: str | os.PathLike) -> PlyCloud:
    """
    Read the vertices of a PLY file, text or binary. Faces and other elements are left out.

    Args:
        path (`str` or `os.PathLike`):
            The file.

    Returns:
        [`PlyCloud`]: Coordinates, and colours and normals where the file has them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a PLY file, has no vertices with x, y and z, promises more than 50,000,000, or is truncated.
    """
    path = checked_path("path", path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no point cloud at {path}.")
    with open(path, "rb") as file:
        order, elements, start = _ply_header(file.read(_MAX_PLY_HEADER), path)
        position = next((i for i, element in enumerate(elements) if element.name == "vertex"), None)
        if position is None:
            found = [element.name for element in elements]
            raise ValueError(f"{path} must have an element `vertex`, and has {found!r:.200}.")
        vertex, before = elements[position], elements[:position]
        _check_vertex(vertex, path)
        file.seek(start)
        rows = (_binary_rows if order else _text_rows)(file, path, order=order, before=before, vertex=vertex)
    names = {name for name, _ in vertex.properties}
    columns = [("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue")]
    colors = next((_stack(rows, wanted) for wanted in columns if set(wanted) <= names), None)
    if colors is not None and colors.dtype != np.uint8 and colors.dtype.kind != "f":
        raise ValueError(f"The colours of {path} must be uchar or floating point, and are {colors.dtype}.")
    normals = _stack(rows, ("nx", "ny", "nz")).astype(np.float64) if {"nx", "ny", "nz"} <= names else None
    return PlyCloud(_stack(rows, "xyz").astype(np.float64), colors, normals)


def _stack(rows: np.ndarray, names) -> np.ndarray:
    return np.stack([rows[name] for name in names], axis=1)


def _ply_header(data: bytes, path: Path) -> tuple[str, list[_PlyElement], int]:
    """The byte order, or an empty string for text, the elements, and where the content starts."""
    end = data.find(b"end_header", 0, _MAX_PLY_HEADER)
    start = data.find(b"\n", end) + 1
    if not data.startswith(b"ply") or end < 0 or start == 0:
        raise ValueError(f"{path} must be a PLY file, which starts with `ply` and a header, got {data[:16]!r}.")
    order, elements = None, []
    for line in data[:end].decode("ascii", errors="replace").splitlines():
        match line.split():
            case ["format", kind, _] if kind in _PLY_FORMATS:
                order = _PLY_FORMATS[kind]
            case ["element", name, count] if count.isdecimal() and len(count) <= 18:
                elements.append(_PlyElement(name, int(count), [], has_lists=False))
            case ["property", "list", *_] if elements:
                elements[-1] = elements[-1]._replace(has_lists=True)
            case ["property", kind, name] if elements and kind in _PLY_TYPES:
                elements[-1].properties.append((name, _PLY_TYPES[kind]))
            case [] | ["ply" | "comment" | "obj_info", *_]:
                pass
            case _:
                raise ValueError(f"{path} has a line in its header that PLY does not know: {line[:80]!r}.")
    if order is None:
        raise ValueError(f"{path} must state one of the formats {sorted(_PLY_FORMATS)} in its header, and has none.")
    return order, elements, start


def _check_vertex(vertex: _PlyElement, path: Path) -> None:
    names = [name for name, _ in vertex.properties]
    if vertex.has_lists or not {"x", "y", "z"} <= set(names) or len(set(names)) < len(names):
        raise ValueError(
            f"The vertices of {path} must have x, y and z and no lists, each property once, and have {names!r:.200}."
        )


def _check_count(vertex: _PlyElement, path: Path) -> None:
    if not 0 < vertex.count <= MAX_PLY_VERTICES:
        raise ValueError(
            f"{path} must have 1 to {MAX_PLY_VERTICES} vertices, and promises {vertex.count}. Thin the cloud first."
        )


def _binary_rows(
    file: BinaryIO, path: Path, *, order: str, before: list[_PlyElement], vertex: _PlyElement
) -> np.ndarray:
    """The vertices as a structured array; nothing is allocated for what the file does not hold."""
    if any(element.has_lists for element in before):
        raise ValueError(f"{path} has lists before its vertices. Save it again with the vertices first.")
    dtype = _ply_dtype(vertex, order)
    start = file.tell() + sum(
        element.count * sum(int(kind[1]) for _, kind in element.properties) for element in before
    )
    found = max(0, path.stat().st_size - start) // dtype.itemsize
    if found < vertex.count:
        raise ValueError(f"{path} is truncated: it promises {vertex.count} vertices and holds {found}.")
    _check_count(vertex, path)
    return np.fromfile(file, dtype, count=vertex.count, offset=start - file.tell())


def _text_rows(
    file: BinaryIO, path: Path, *, order: str, before: list[_PlyElement], vertex: _PlyElement
) -> np.ndarray:
    """The same from text, some lines at a time."""
    _check_count(vertex, path)
    dtype = _ply_dtype(vertex, order)
    first = sum(element.count for element in before)
    lines = (line for line in file if line.strip())
    lines = islice(lines, first, first + vertex.count)
    parts, found, fault = [], 0, None
    while chunk := [tuple(line.decode("ascii", errors="replace").split()) for line in islice(lines, _TEXT_ROWS)]:
        found += len(chunk)
        try:
            parts.append(np.array(chunk, dtype=dtype))
        except (ValueError, OverflowError) as error:
            fault = error
            break
    found += sum(1 for _ in lines)
    if found < vertex.count:
        raise ValueError(f"{path} is truncated: it promises {vertex.count} vertices and holds {found}.")
    if fault is not None:
        raise ValueError(
            f"The vertices of {path} do not fit their header, {len(vertex.properties)} numbers: {fault}."
        ) from fault
    return np.concatenate(parts)


def _ply_dtype(element: _PlyElement, order: str) -> np.dtype:
    return np.dtype([(name, order + kind) for name, kind in element.properties])


__all__ = [
    "FORMAT_VERSION",
    "PlyCloud",
    "check_tensors",
    "check_version",
    "read_ply",
    "read_sealed",
    "sealed",
    "sha256_of",
    "tensor_checksum",
    "unsealed",
    "write_ply",
    "write_tensors",
]
