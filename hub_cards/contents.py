# SPDX-License-Identifier: Apache-2.0
"""Tell from its content what a file is: text, weights and media, or something that could run code when it is opened."""

import codecs
import pickletools
import re
import zipfile
from pathlib import Path
from typing import BinaryIO

from geode.hub_cards.manifest import read_header


HEAD_BYTES = 1 << 20
PICKLE_ENDINGS = (".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
# What calls or imports something when a pickle is opened.
_ACTIVE = {"GLOBAL", "INST", "OBJ", "REDUCE", "BUILD", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL"}
_MEDIA = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"PAR1", b"ply\n", b"ply\r\n")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c")
# A user access token of the Hub: `hf_` and 34 letters at present.
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")


def is_pickle(file: BinaryIO) -> bool:
    """
    Tell whether a file begins as a pickle, without opening it as one.

    Binary pickles (protocols 2 to 5) begin with their protocol. Those of protocols 0 and 1 are text: they count if they can be
    read to their end and would import or call something.

    Args:
        file (`BinaryIO`): An open file, at its start.

    Returns:
        `bool`: Whether it is one.

    Example:
        >>> import io, pickle
        >>> [is_pickle(io.BytesIO(data)) for data in (pickle.dumps(1), pickle.dumps(print, protocol=0), b"# A card")]
        [True, True, False]
    """
    start = file.read(2)
    if start[:1] == b"\x80":
        return len(start) == 2 and 2 <= start[1] <= 5
    file.seek(0)
    is_active = False
    try:
        # All of the file, since what runs may stand behind a long text; of what is no pickle it reads a few bytes.
        for opcode, _, _ in pickletools.genops(file):
            is_active = is_active or opcode.name in _ACTIVE
    except (ValueError, IndexError, OverflowError, MemoryError):
        return False
    return is_active


def find_danger(path: Path) -> str | None:
    """
    Say what is wrong with a file that is to be published.

    Args:
        path (`Path`): The file.

    Returns:
        `str`: What it is, if it is a pickle, holds one, may hold one unseen, is damaged, or holds an access token; else None.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(0)
        if is_pickle(file):
            return "is a pickle, which can run code when it is opened"
    if zipfile.is_zipfile(path):
        return _in_archive(path)
    if path.suffix == ".safetensors":
        try:
            read_header(path)
        except ValueError as error:
            return str(error).removeprefix(path.name).strip(" .")
        return None
    if path.suffix in PICKLE_ENDINGS:
        return f"ends in {path.suffix}, which libraries open as a pickle"
    if head.startswith(_MEDIA) or head[4:8] == b"ftyp" or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return None
    if head.startswith(_COMPRESSED):
        return "is compressed, so that nobody sees what it holds"
    if not _is_text(head):
        return "is binary, and neither safetensors nor a picture, a video, parquet or ply"
    if _TOKEN.search(path.read_bytes()):
        return "holds an access token of the Hub"
    return None


def _in_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    if is_pickle(member):
                        return f"is an archive with the pickle {name}, as `torch.save` writes it"
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
        return f"is an archive that cannot be read ({error})"
    return "is an archive, so that nobody sees what it holds"


def _is_text(head: bytes) -> bool:
    try:
        # Not final: the head of a long file may end within a character.
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < HEAD_BYTES)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


__all__ = ["find_danger", "is_pickle"]
