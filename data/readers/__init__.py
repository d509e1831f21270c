# SPDX-License-Identifier: Apache-2.0
"""
Readers of public datasets: each row becomes a [`~geode.data.schemas.Record`], in a stream.

A reader is a module with `NAME`, `REPO_ID`, `LICENSE` (None where it is not stated), `DATA_FILES` (patterns below the dataset's
root), `FEATURES` (of its rows, for `datasets.load_dataset("json", features=...)`) and `record_from_row`. More may follow:
`row_options(root)` gives what `record_from_row` needs from the folder, `rows_from_item(item)` takes objects out of a scan,
and `OTHER_FILES` are those of `DATA_FILES` that have no rows.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from types import ModuleType


_MODULES = {
    "arkitscenes": "ARKitScenes",
    "cambrian_alignment": "Cambrian-Alignment",
    "embodiedscan": "EmbodiedScan",
    "jsonl": "jsonl",
    "rooms": "synthetic_rooms",
    "smit": "S-MiT",
    "ssr_cot": "SSR-CoT",
    "vica": "ViCA-322K",
    "vica_thinking": "ViCA-thinking-2.68k",
    "vlm_3r": "VLM-3R-DATA",
    "vsi_590k": "VSI-590K",
    "vsi_bench": "VSI-Bench",
}
_KEYS = {name: key for key, name in _MODULES.items()}


class _Readers(Mapping):
    """Readers by name, imported on first use. Their keys are modules' names; a dataset's own name finds it as well."""

    def __getitem__(self, name: str) -> ModuleType:
        key = _KEYS.get(name, name) if isinstance(name, str) else None
        if key not in _MODULES:
            raise KeyError(f"There is no reader {name!r}. There are {', '.join(self)}.")
        return import_module(f"geode.data.readers.{key}")

    def __contains__(self, name) -> bool:
        return isinstance(name, str) and (name in _MODULES or name in _KEYS)

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)


READERS: Mapping[str, ModuleType] = _Readers()


def reader_of(name: str) -> ModuleType:
    """
    Return a reader.

    Args:
        name (`str`): A key of `READERS`, or the dataset's name.

    Returns:
        `ModuleType`: The reader's module.

    Raises:
        ValueError: If there is none of this name.
    """
    try:
        return READERS[name]
    except KeyError as error:
        raise ValueError(f"`name` must be that of a reader, got {name!r:.80}. {error.args[0]}") from error


def record_from_row(name: str, row: dict, *, file: str = "", index: int = 0, **options):
    """
    Read one row.

    Args:
        name (`str`): A key of `READERS`, or the dataset's name.
        row (`dict`): The row as its file has it.
        file (`str`, *optional*): The file's path below the dataset's root.
        index (`int`, defaults to 0): The row's number in the file.
        **options: Options of the reader.

    Returns:
        [`~geode.data.schemas.Record`], *optional*: The record, None for a row that is left out on purpose.

    Raises:
        ValueError: If the row is malformed, or there is no such reader.
    """
    return reader_of(name).record_from_row(row, file=file, index=index, **options)


def __getattr__(name: str):
    if name != "read_records":
        raise AttributeError(f"module `geode.data.readers` has no attribute `{name}`.")
    from geode.data.readers.streams import read_records

    return read_records


__all__ = ["READERS", "read_records", "reader_of", "record_from_row"]
