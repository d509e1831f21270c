# SPDX-License-Identifier: Apache-2.0
"""Whether the files of a data set of rooms end too early, where no digest of them is known."""

import json
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open


def is_whole(path: Path) -> bool:
    """
    Tell whether a file is there and does not end too early, from what it says about its own length.

    Args:
        path (`Path`): A file of a data set of rooms.

    Returns:
        `bool`: Whether it is.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), "np"):
                return True
        if path.suffix == ".parquet":
            return pq.read_metadata(path).num_columns > 0
        if path.suffix == ".json":
            return bool(json.loads(path.read_bytes()))
        if path.suffix == ".png":
            return path.read_bytes()[-8:-4] == b"IEND"
        return _is_whole_mp4(path) if path.suffix == ".mp4" else path.stat().st_size > 0
    except (OSError, ValueError, SafetensorError, pa.ArrowInvalid):
        return False


def _is_whole_mp4(path: Path) -> bool:
    """Tell whether the boxes of an MP4 file, each of which begins with its length, end where the file does."""
    size, start, kinds = path.stat().st_size, 0, set()
    with open(path, "rb") as file:
        while start < size:
            file.seek(start)
            length, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
            if length == 1:  # a long one
                (length,) = struct.unpack(">Q", file.read(8).ljust(8, b"\0"))
            if length < 8:
                return False
            start += length
            kinds.add(kind)
    return start == size and kinds >= {b"moov", b"mdat"}


__all__ = ["is_whole"]
