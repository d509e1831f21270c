# SPDX-License-Identifier: Apache-2.0
"""Streams of records: the files of a dataset as a `datasets.IterableDataset`."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from datasets import IterableDataset
from transformers.utils import logging

from geode.data.readers import READERS, reader_of
from geode.data.readers.common import RECORD_FEATURES
from geode.data.readers.rows import iter_rows, parse_line
from geode.data.schemas import Record
from geode.modeling_geode.checked_files_geode import checked_path


logger = logging.get_logger(__name__)

ON_ERROR = ("raise", "skip")
BATCH_ROWS = 256


def read_records(
    name: str,
    root: str | Path,
    *,
    data_files: Sequence[str] | None = None,
    on_error: str | Callable[[str, int, str], None] = "raise",
    **options,
) -> IterableDataset:
    """
    Stream the records of a dataset.

    Each file is a shard. The stream's `state_dict` and `load_state_dict` resume it exactly; rows that were read before are
    skipped without being parsed where a file has one a line.

    Args:
        name (`str`): A key of `READERS`, or the dataset's name.
        root (`str` or `Path`): The dataset's folder.
        data_files (`Sequence[str]`, *optional*): Patterns below `root`; the default is the reader's.
        on_error (`str` or `Callable`, defaults to `"raise"`): What a malformed row does. `"skip"` leaves it out, and logs for
            each file how many there were and why the first could not be read. A function leaves it out as well, and is called
            with the file, the row's number and the message. A file whose JSON is broken as a whole raises always.
        **options: Options of the reader's `record_from_row`.

    Returns:
        `datasets.IterableDataset`: Fields of [`~geode.data.schemas.Record`], see its `from_dict`.

    Raises:
        ValueError: If `on_error` is unknown; while reading, if a row is malformed.
        FileNotFoundError: If no file fits.

    Example:
    ```python
    >>> import geode
    >>> scene = geode.embedded_scene()
    >>> try:
    ...     read_records("vsi_590k", scene, data_files=["nothing.jsonl"])
    ... except FileNotFoundError as error:
    ...     print(str(error).partition(" in ")[0])
    `vsi_590k` needs files ['nothing.jsonl']

    ```
    """
    if not callable(on_error) and on_error not in ON_ERROR:
        raise ValueError(f"`on_error` must be one of {ON_ERROR} or a function, got {on_error!r}.")
    root = checked_path("root", root)
    files = list_files(name, root, data_files)
    rows = IterableDataset.from_generator(_rows, gen_kwargs={"files": files, "root": str(root), "name": name})
    return rows.map(
        _RowParser(name, root, on_error, options),
        batched=True,
        batch_size=BATCH_ROWS,
        remove_columns=["file", "index", "row"],
        features=RECORD_FEATURES,
    )


def list_files(name: str, root: str | Path, data_files: Sequence[str] | None = None) -> list[str]:
    """
    Return the files of a dataset.

    Args:
        name (`str`): A key of `READERS`, or the dataset's name.
        root (`str` or `Path`): The dataset's folder.
        data_files (`Sequence[str]`, *optional*): Patterns below `root`; the default is the reader's.

    Returns:
        `list[str]`: Paths below `root`, sorted.

    Raises:
        FileNotFoundError: If no file fits.
        ValueError: If a pattern is none, or there is no such reader.
    """
    root, reader = checked_path("root", root), reader_of(name)
    patterns = [data_files] if isinstance(data_files, str) else data_files or reader.DATA_FILES
    for pattern in patterns if isinstance(patterns, list | tuple) else [patterns]:
        if not isinstance(pattern, str) or not pattern.strip("./") or Path(pattern).is_absolute():
            raise ValueError(f"`data_files` must be patterns of files below `root`, got {data_files!r:.200}.")
    patterns = list(patterns)
    found = {
        path.relative_to(root).as_posix() for pattern in patterns for path in root.glob(pattern) if path.is_file()
    }
    files = sorted(found.difference(getattr(reader, "OTHER_FILES", ())))
    if not files:
        raise FileNotFoundError(
            f"`{name}` needs files {patterns} in {root}, and there are none. Put them there, or name others with `data_files`."
        )
    return files


def _rows(files: list[str], root: str, name: str) -> Iterator[dict]:
    """Yield unparsed rows, and None at the end of each file."""
    rows_from_item = getattr(READERS[name], "rows_from_item", None)
    for file in files:
        rows: Iterator[bytes | dict | ValueError] = iter_rows(Path(root) / file)
        if rows_from_item is not None:
            rows = _taken_apart(rows, rows_from_item)
        index = -1
        for index, row in enumerate(rows):
            yield {"file": file, "index": index, "row": row}
        yield {"file": file, "index": index + 1, "row": None}


def _taken_apart(items, rows_from_item) -> Iterator[dict | ValueError]:
    for item in items:
        try:
            yield from rows_from_item(parse_line(item) if isinstance(item, bytes) else item)
        except (ValueError, OverflowError, RecursionError) as error:
            yield ValueError(str(error))


class _RowParser:
    """Parses batches of rows. With `"skip"` it counts what it leaves out, and says so at the end of each file."""

    def __init__(self, name: str, root: Path, on_error: str | Callable, options: dict):
        self.name, self.on_error, self.options = name, on_error, options
        row_options = getattr(READERS[name], "row_options", None)
        if row_options is not None:
            self.options = {**row_options(root), **options}
        self.num_skipped = 0
        self.first_error = ""

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        read = READERS[self.name].record_from_row
        records = []
        for file, index, row in zip(batch["file"], batch["index"], batch["row"], strict=True):
            if row is None:
                self._end_file(file, index)
                continue
            try:
                record = self._record(read, row, file, index)
            except ValueError as error:
                if self.on_error == "raise":
                    raise
                self._leave_out(file, index, str(error))
                continue
            if record is not None:
                records.append(record)
        return {field: [getattr(record, field) for record in records] for field in RECORD_FEATURES}

    def _record(self, read: Callable, row: bytes | dict | ValueError, file: str, index: int) -> Record | None:
        if isinstance(row, bytes):
            try:
                row = parse_line(row)
            except ValueError as error:
                raise ValueError(f"Row {index} of {file} is not JSON: {error}") from error
        elif isinstance(row, ValueError):
            raise ValueError(f"A scan of {file} cannot be read: {row}") from row
        return read(row, file=file, index=index, **self.options)

    def _leave_out(self, file: str, index: int, message: str) -> None:
        if callable(self.on_error):
            self.on_error(file, index, message)
        else:
            self.num_skipped += 1
            self.first_error = self.first_error or message

    def _end_file(self, file: str, num_rows: int) -> None:
        if self.num_skipped:
            logger.warning(
                "Skipped %d of the %d rows of %s that cannot be read. The first: %s",
                self.num_skipped,
                num_rows,
                file,
                self.first_error,
            )
        self.num_skipped, self.first_error = 0, ""


__all__ = ["list_files", "read_records"]
