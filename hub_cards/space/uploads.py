# SPDX-License-Identifier: Apache-2.0
"""What visitors of the Space upload: limits, and archives that are unpacked without trusting a word they say."""

import os
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from geode.modeling_geode.video_processing_geode import probe_video


VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi")
MAX_UPLOAD_BYTES = 64 * 2**20
MAX_VIDEO_FRAMES = 9_000  # five minutes at 30 frames a second
MAX_FRAME_PIXELS = 1920 * 1088  # Full HD, as codecs pad it
MAX_QUESTION_LENGTH = 500
# Names of what `SceneGeometry.save` writes, and the largest size of each once it is unpacked.
GEOMETRY_FILES = {"geometry.json": 2**20, "geometry.safetensors": 256 * 2**20}
_MAX_MEMBERS = 10_000
_CHUNK = 2**20
WANTED = (
    "Upload a .zip of the folder that `SceneGeometry.save` writes: geometry.json and geometry.safetensors. In Python, "
    "`SceneGeometry.from_rgbd(...)` makes it from depth and cameras, and `geode reconstruct VIDEO -o DIR` from a video alone."
)


def check_video(path: str | os.PathLike) -> None:
    """
    Refuse a video that is too large to be looked at, before it is decoded.

    Args:
        path (`str` or `os.PathLike`): The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no video, or exceeds a limit.
    """
    check_size(path)
    facts = probe_video(path)
    if facts.num_frames > MAX_VIDEO_FRAMES:
        raise ValueError(
            f"A video may have at most {MAX_VIDEO_FRAMES:,} frames here, and {Path(path).name} has {facts.num_frames:,}. Cut "
            "it, or lower its rate: `ffmpeg -i in.mp4 -r 10 out.mp4`."
        )
    if facts.height * facts.width > MAX_FRAME_PIXELS:
        raise ValueError(
            f"A frame may have at most {MAX_FRAME_PIXELS:,} pixels here, and {Path(path).name} is {facts.width} x "
            f"{facts.height}. Scale it down: `ffmpeg -i in.mp4 -vf scale=-2:720 out.mp4`."
        )


def check_size(path: str | os.PathLike) -> None:
    """
    Refuse a file that is missing or larger than [`MAX_UPLOAD_BYTES`].

    Args:
        path (`str` or `os.PathLike`): The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is too large.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{Path(path).name} is no longer here. Upload it again.")
    size = Path(path).stat().st_size
    if size > MAX_UPLOAD_BYTES:
        raise ValueError(
            f"A file may have at most {MAX_UPLOAD_BYTES:,} bytes here, and {Path(path).name} has {size:,}. Use a shorter video, "
            "or fewer points."
        )


def check_question(text: str) -> str:
    """
    Return a question without the space around it.

    Args:
        text (`str`): What was typed.

    Raises:
        ValueError: If nothing was, or too much.
    """
    text = text.strip()
    if not text:
        raise ValueError("There is no question. Type one, or take one of the examples.")
    if len(text) > MAX_QUESTION_LENGTH:
        raise ValueError(f"A question may have at most {MAX_QUESTION_LENGTH} characters, got {len(text)}. Shorten it.")
    return text


def unpack_geometry(archive: str | os.PathLike, folder: str | os.PathLike) -> None:
    """
    Take the two files of a saved `SceneGeometry` out of a .zip, and nothing else.

    They may lie at its root or in one folder. Names in the archive decide nothing about where a file goes, and sizes are counted
    while bytes are read, so neither a path nor a small file that unpacks to a large one does harm.

    Args:
        archive (`str` or `os.PathLike`): The .zip.
        folder (`str` or `os.PathLike`): An existing folder, where both go under their own names.

    Raises:
        FileNotFoundError: If there is no archive.
        ValueError: If it is none, is damaged or encrypted, lacks a file, holds one twice, or one that is too large.
    """
    check_size(archive)
    name = Path(archive).name
    try:
        with zipfile.ZipFile(archive) as opened:
            members = _find_members(opened, name)
            for wanted, member in members.items():
                _copy_member(opened, member, Path(folder) / wanted, limit=GEOMETRY_FILES[wanted])
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError) as error:
        # RuntimeError is how `zipfile` says that a member is encrypted.
        raise ValueError(f"The archive {name} cannot be read: {error}. {WANTED}") from error


def _find_members(opened: zipfile.ZipFile, name: str) -> dict[str, zipfile.ZipInfo]:
    infos = opened.infolist()
    if len(infos) > _MAX_MEMBERS:
        raise ValueError(f"The archive {name} may hold at most {_MAX_MEMBERS:,} files, got {len(infos):,}. {WANTED}")
    found: dict[str, zipfile.ZipInfo] = {}
    for wanted in GEOMETRY_FILES:
        members = [info for info in infos if PurePosixPath(info.filename).name == wanted]
        if len(members) != 1:
            raise ValueError(f"The archive {name} must hold one {wanted}, and it holds {len(members)}. {WANTED}")
        found[wanted] = members[0]
    return found


def _copy_member(opened: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, *, limit: int) -> None:
    size = 0
    with opened.open(member) as source, path.open("xb") as target:
        while chunk := source.read(_CHUNK):
            size += len(chunk)
            if size > limit:
                raise ValueError(
                    f"{path.name} may have at most {limit:,} bytes here, and the archive holds more. Keep fewer points: "
                    "`SceneGeometry` takes `max_points`."
                )
            target.write(chunk)


__all__ = [
    "GEOMETRY_FILES",
    "MAX_QUESTION_LENGTH",
    "MAX_UPLOAD_BYTES",
    "MAX_VIDEO_FRAMES",
    "VIDEO_SUFFIXES",
    "WANTED",
    "check_question",
    "check_size",
    "check_video",
    "unpack_geometry",
]
