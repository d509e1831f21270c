# SPDX-License-Identifier: Apache-2.0
"""
Paths, JSON and tensors that others wrote. What a header claims is compared with the file before anything is allocated.

Whatever is in a file, reading it works or raises a `ValueError` that names the file and the fault. Nothing is unpickled.
"""

import json
import os
from pathlib import Path

import torch
from huggingface_hub import load_state_dict_from_file

from .shown_geode import shown


# Far more than any header of ours, which has some hundred bytes, and far less than memory.
MAX_JSON_BYTES = 64 * 1024**2
MAX_HEADER_BYTES = 25_000_000  # of a safetensors file; the limit of huggingface_hub
_HEADER_ERRORS = (ValueError, RecursionError)


def checked_path(name: str, value) -> Path:
    """
    Return a path, or raise with the argument's name.

    Args:
        name (`str`): Of the argument, for the message.
        value (`str` or `os.PathLike`): The path.

    Returns:
        `Path`: The path, which need not exist.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(
            f"`{name}` must be a path (`str` or `os.PathLike`), got {shown(value)} of type {type(value).__name__}."
        )
    return Path(value)


def parse_json(data: bytes | str, where: str):
    """
    Parse JSON in UTF-8.

    Args:
        data (`bytes` or `str`): The text.
        where (`str`): What it is, for the message.

    Returns:
        What it says.

    Raises:
        ValueError: If it is none, or lists stand in lists deeper than Python follows.
    """
    try:
        return json.loads(data if isinstance(data, str) else data.decode("utf-8-sig"))
    except _HEADER_ERRORS as error:
        raise ValueError(
            f"{where} must be JSON in UTF-8, got {data[:40]!r}... ({type(error).__name__}: {str(error)[:200]}). Write it again, "
            "or fetch it anew."
        ) from error


def read_json(path: Path):
    """
    Read a JSON file.

    Args:
        path (`Path`): The file.

    Returns:
        What it says.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is not JSON, or larger than 64 MiB.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path} must be JSON of at most {MAX_JSON_BYTES} bytes, got {size}. It is some other file.")
    return parse_json(path.read_bytes(), str(path))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Read the tensors and facts of one safetensors file. It is mapped, so a forged shape takes no memory.

    Args:
        path (`Path`): The file.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, str]]`: The tensors, on the CPU, and the facts in its header.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is not a safetensors file of tensors that fill it exactly.
    """
    metadata = check_tensors_file(path)
    try:
        # The library asks for a note of who wrote the file, as an OSError.
        return load_state_dict_from_file(path), metadata
    except (OSError, ValueError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"{path} is damaged, or no safetensors file: {str(reason)[:200]}. Write it again.") from error


def check_tensors_file(path: Path) -> dict[str, str]:
    """
    Return the facts in the header of a safetensors file, once its tensors are known to fill it.

    Args:
        path (`Path`): The file.

    Returns:
        `dict[str, str]`: The facts.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If its header is none, or claims more or less than the file has.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{path} is damaged, or no safetensors file: its header claims {length} bytes, of at most {MAX_HEADER_BYTES}, and "
                f"the file has {size}. Write it again."
            )
        header = parse_json(file.read(length), f"The header of {path}")
    if not isinstance(header, dict):
        raise ValueError(f"The header of {path} must be a JSON object, got {shown(header)}. Write the file again.")
    metadata = header.pop("__metadata__", {})
    ends = [_end_of(entry, name, path) for name, entry in header.items()]
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"The header of {path} must hold facts as text, got {shown(metadata)}. Write the file again.")
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ValueError(
            f"{path} is damaged: its header says that it has {expected} bytes, got {size}. Write the file again."
        )
    return metadata


def _end_of(entry, name: str, path: Path) -> int:
    """Where a tensor ends, in bytes behind the header."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise ValueError(
            f"The header of {path} must give the place of {shown(name)}, got {shown(entry)}. Write it again."
        )
    return offsets[1]


__all__ = ["check_tensors_file", "checked_path", "parse_json", "read_json", "read_tensors"]
