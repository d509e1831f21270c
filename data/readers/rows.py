# SPDX-License-Identifier: Apache-2.0
"""
Rows of annotation files, one at a time: JSON Lines, JSON lists, single JSON objects and Parquet.

Nothing is read whole but a single object: a JSON list of any length needs the memory of its longest row.
"""

import json
from collections.abc import Iterator
from pathlib import Path


CHUNK_CHARS = 1 << 18
MAX_ROW_CHARS = 1 << 24  # 16 MiB: far more than any conversation, far less than a file without line ends
_SPACE = " \t\r\n"


def iter_rows(path: Path) -> Iterator[bytes | dict]:
    """
    Yield the rows of a file.

    Args:
        path (`Path`): A file whose name ends in `.jsonl`, `.json` or `.parquet`.

    Yields:
        `bytes` or `dict`: A line of JSON Lines as it stands, since it is cheaper to skip than to parse; otherwise a row.

    Raises:
        ValueError: If the file is of another kind, or not what its name says, or a row has more than 16 MiB.
    """
    if path.suffix == ".jsonl":
        return (line for _, line in iter_lines(path))
    if path.suffix == ".json":
        return _list_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix in (".pkl", ".pickle"):
        raise ValueError(
            f"{path} is a pickle, which runs code when it is read, and is not opened here. Load it where you trust its source, "
            "and write JSON Lines, one scene a line: `json.dumps({'sample_idx': ..., 'categories': ..., 'instances': [...]}, "
            "default=list)`."
        )
    raise ValueError(f"Annotation files must be .jsonl, .json or .parquet, got {path}.")


def parse_line(line: bytes) -> dict:
    """
    Parse a line of JSON Lines.

    Args:
        line (`bytes`): The line.

    Returns:
        `dict`: The row.

    Raises:
        ValueError: If it is not a JSON object.
    """
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise ValueError(f"A line must not be nested as deep as one that begins with {line[:100]!r}.") from error
    except ValueError as error:  # no JSON, no Unicode, or a number of thousands of digits
        raise ValueError(f"A line must be a JSON object, got {line[:100]!r} ({str(error)[:200]}).") from error
    if not isinstance(row, dict):
        raise ValueError(f"A line must be a JSON object, got {line[:100]!r}.")
    return row


def iter_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """
    Yield the lines of a JSON Lines file that are not blank.

    Args:
        path (`Path`): The file. A byte order mark at its start is no part of it.

    Yields:
        `tuple[int, bytes]`: The line's number in the file, from 1, and the line.

    Raises:
        ValueError: If a line is so long that the file is none of lines.
    """
    with open(path, "rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":  # a mark that some editors put in front of UTF-8
            file.seek(0)
        number = 0
        while line := file.readline(MAX_ROW_CHARS + 1):
            number += 1
            if len(line) > MAX_ROW_CHARS:
                raise ValueError(
                    f"Line {number} of {path} is longer than {MAX_ROW_CHARS} bytes. A .jsonl file must have one JSON object a "
                    "line; a JSON list must be in a file named .json."
                )
            if not line.isspace():
                yield number, line


class _Text:
    """A text file of which a window is in memory."""

    def __init__(self, file):
        self.file, self.window, self.at = file, "", 0

    def grow(self) -> bool:
        """Drop what is behind and read on; False at the end."""
        try:
            more = self.file.read(max(CHUNK_CHARS, len(self.window) - self.at))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.file.name} must be JSON in UTF-8: {error}. Save it in UTF-8.") from error
        self.window, self.at = self.window[self.at :] + more, 0
        return bool(more)

    def next_char(self) -> str:
        """The next character that is not white space, without taking it; empty at the end."""
        while True:
            while self.at < len(self.window) and self.window[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.window):
                return self.window[self.at]
            if not self.grow():
                return ""


def _list_rows(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8-sig") as file:
        text = _Text(file)
        first = text.next_char()
        if first == "{":
            while len(text.window) <= MAX_ROW_CHARS and text.grow():
                pass
            if len(text.window) > MAX_ROW_CHARS:
                raise ValueError(
                    f"{path} must be one JSON object of at most {MAX_ROW_CHARS} characters, and is longer. Write a list of objects, "
                    "or one a line in a .jsonl file."
                )
            try:
                yield json.loads(text.window[text.at :])
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} must be one JSON object: {error}.") from error
            return
        if first != "[":
            raise ValueError(f"{path} must be a JSON list of objects or one object, it starts with {first!r}.")
        text.at += 1
        decode, number = json.JSONDecoder().raw_decode, 0
        while (char := text.next_char()) != "]":
            if number:
                if char != ",":
                    raise ValueError(f"{path} must have a comma or its end after row {number - 1}, got {char!r}.")
                text.at += 1
                char = text.next_char()
            if char != "{":
                raise ValueError(f"{path} must be a JSON list of objects: row {number} starts with {char!r}.")
            yield _decoded(text, decode, f"Row {number} of {path}")
            number += 1
        text.at += 1
        if rest := text.next_char():
            raise ValueError(f"{path} must end after its list, and goes on with {rest!r}.")


def _decoded(text: _Text, decode, where: str) -> dict:
    while True:
        try:
            row, text.at = decode(text.window, text.at)
            return row
        except json.JSONDecodeError as error:
            # The row may go on behind the window.
            if len(text.window) - text.at > MAX_ROW_CHARS:
                raise ValueError(f"{where} is not JSON of at most {MAX_ROW_CHARS} characters: {error}.") from error
            if not text.grow():
                raise ValueError(f"{where} is not JSON: {error}. A row must be an object.") from error
        except (ValueError, RecursionError) as error:  # a number of too many digits, or lists in lists in lists
            raise ValueError(f"{where} cannot be decoded: {error}.") from error


def _parquet_rows(path: Path) -> Iterator[dict]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(
            f"{path} must be a Parquet file, and cannot be read: {str(error)[:200]}. Fetch it again."
        ) from error


__all__ = ["iter_lines", "iter_rows", "parse_line"]
