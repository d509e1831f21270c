# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are there whole or not at all, whatever stops their writer: a kill, a full disk, an error."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


# Of a disk that is full, or of which the share is used up, or that cannot be written to.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
UNFINISHED = ".unfinished"  # the folder in which a folder is built


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """
    Let the error of a disk that takes no more say where, and what to do: it names no file itself. Others pass.

    Args:
        path (`str` or `os.PathLike`): What is being written.

    Raises:
        OSError: Of the kind that occurred, also where the writer of safetensors has an error of its own.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if isinstance(error, OSError) and number not in _NO_ROOM:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        remedy = f"{os.fspath(path)} could not be written ({reason}). Make room or name another place, and run the same again."
        # A number makes Python choose the class, such as `PermissionError`.
        raise (OSError(remedy) if number is None else OSError(number, remedy)) from error


def write_whole(path: str | os.PathLike, content: bytes | str) -> None:
    """
    Make a file appear under its name, whole, even if the machine stops; one that is there is replaced.

    Args:
        path (`str` or `os.PathLike`): The file.
        content (`bytes` or `str`): What it shall hold; text is written as UTF-8.

    Raises:
        OSError: If it cannot be written; nothing of it stays.
    """
    path = Path(path)
    # In the same folder, and always of this name, so that what a kill left is written over.
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def is_free(folder: str | os.PathLike) -> bool:
    """Return whether a folder is absent or empty, or holds only what a [`whole_folder`] that was killed has left."""
    folder = Path(folder)
    return not folder.exists() or not any(folder.iterdir()) or (folder / UNFINISHED).is_dir()


@contextmanager
def whole_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """
    Build the content of a folder in a hidden one inside it, and move it to its place once the block has ended.

    Args:
        folder (`str` or `os.PathLike`): Free, see [`is_free`]. After an error it is as it was.

    Yields:
        `Path`: Where to write.

    Raises:
        OSError: If something cannot be written.
    """
    folder = Path(folder)
    work = folder / UNFINISHED
    is_new, is_ours = not folder.exists(), work.is_dir()
    with writing(folder):
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            yield work
            # A loader looks for the configuration first: without it nothing counts as a model yet.
            for path in sorted(work.iterdir(), key=lambda path: path.name == "config.json"):
                if (folder / path.name).is_dir():
                    shutil.rmtree(folder / path.name)  # moved before a kill
                os.replace(path, folder / path.name)
            work.rmdir()
        except BaseException:
            shutil.rmtree(folder if is_new else work, ignore_errors=True)
            if is_ours:  # what a kill has left beside it stays free to be replaced
                work.mkdir(exist_ok=True)
            raise


__all__ = ["UNFINISHED", "is_free", "whole_folder", "write_whole", "writing"]
