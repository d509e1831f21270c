# SPDX-License-Identifier: Apache-2.0
"""A benchmark in VSI-Bench's format, from a folder, a file or the Hub."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from geode.data.readers import READERS
from geode.data.schemas import Record


READER = "vsi_bench"
SUBSETS = ("full", "debiased", "pruned")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Question:
    """
    One question of a benchmark.

    Args:
        record ([`Record`]): The question with its prompt, its scene, its unit and the path of its video.
        ground_truth (`str`): The truth as the benchmark has it.
        num_options (`int`, *optional*): Number of choices, where there are some.
    """

    record: Record
    ground_truth: str
    num_options: int | None


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """
    Questions, and where their videos are.

    Args:
        name (`str`): Path or Hub id, as it was given.
        revision (`str`): Commit on the Hub, or a digest of the file.
        split (`str`): The split.
        subset (`str`): `"full"`, `"debiased"` or `"pruned"`.
        is_on_hub (`bool`): `name` is an id on the Hub.
        questions (`list[Question]`): In the order of the benchmark.
        media_root (`Path`): Folder that the paths of videos are relative to.
    """

    name: str
    revision: str
    split: str
    subset: str
    is_on_hub: bool
    questions: list[Question]
    media_root: Path

    def scenes(self) -> dict[str, list[Question]]:
        """Return the questions of each video, in the order in which the videos first occur."""
        groups: dict[str, list[Question]] = {}
        for question in self.questions:
            groups.setdefault(question.record.media, []).append(question)
        return groups


def load_benchmark(
    name: str | Path,
    *,
    split: str = "test",
    subset: str = "full",
    revision: str | None = None,
    media_root: str | Path | None = None,
    max_scenes: int | None = None,
) -> Benchmark:
    """
    Read a benchmark.

    Args:
        name (`str` or `Path`): A parquet or JSON Lines file, a folder with one, or an id on the Hub. In a folder it is
            `benchmark/SPLIT.parquet`, or the one file whose name begins with the split.
        split (`str`, defaults to `"test"`): The split.
        subset (`str`, defaults to `"full"`): `"debiased"` leaves out the rows whose `pruned` is true, `"pruned"` all others.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        media_root (`str` or `Path`, *optional*): Folder of the videos, `DATASET/SCENE.mp4`. The default is the benchmark's own
            folder; for one on the Hub, whose videos are in archives, it is needed.
        max_scenes (`int`, *optional*): Only the first videos.

    Returns:
        [`Benchmark`]: The benchmark.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a row is malformed, two have one id, nothing is left, or an option is unknown.
    """
    if subset not in SUBSETS:
        raise ValueError(f"`subset` must be one of {SUBSETS}, got {subset!r}.")
    if max_scenes is not None and max_scenes < 1:
        raise ValueError(f"`max_scenes` must be at least 1, got {max_scenes}.")
    path = Path(name)
    if path.exists():
        file = path if path.is_file() else _file_of(path, split)
        kind = "parquet" if file.suffix == ".parquet" else "json"
        rows = _rows_of(kind, file)
        found = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        folder = file.parent.parent if file.parent.name == "benchmark" else file.parent
    elif _HUB_ID.fullmatch(str(name)) and not str(name).startswith("."):
        if media_root is None:
            raise ValueError(
                f"The videos of {name} are in archives on the Hub: unpack them, and name their folder as `media_root`."
            )
        rows = load_dataset(str(name), split=split, revision=revision)
        found, folder = _commit_of(rows, revision), Path(media_root)
    else:
        raise FileNotFoundError(f"`name` must be a file, a folder or an id on the Hub, and there is no {str(name)!r}.")
    if subset != "full" and "pruned" not in rows.column_names:
        raise ValueError(f"`subset={subset!r}` needs a column `pruned`, and {name} has {rows.column_names}.")
    questions = [_question_of(row, index, str(name)) for index, row in enumerate(rows)]
    repeated = [uid for uid, count in Counter(item.record.uid for item in questions).items() if count > 1]
    if repeated:
        raise ValueError(f"Each question must have an `id` of its own, and {name} has {repeated[0]!r} more than once.")
    if subset != "full":
        questions = [item for item in questions if (item.record.subset == "pruned") == (subset == "pruned")]
    if max_scenes is not None:
        kept = list(dict.fromkeys(item.record.media for item in questions))[:max_scenes]
        questions = [item for item in questions if item.record.media in set(kept)]
    if not questions:
        raise ValueError(f"{name} has no question in split {split!r} and subset {subset!r}.")
    return Benchmark(
        name=str(name),
        revision=found,
        split=split,
        subset=subset,
        is_on_hub=not path.exists(),
        questions=questions,
        media_root=Path(media_root or folder),
    )


def _file_of(folder: Path, split: str) -> Path:
    own = folder / "benchmark" / f"{split}.parquet"
    files = [own] if own.is_file() else sorted({*folder.glob(f"{split}*.parquet"), *folder.glob(f"{split}*.jsonl")})
    if len(files) != 1:
        raise FileNotFoundError(
            f"{folder} must hold the benchmark as `benchmark/{split}.parquet`, or one file `{split}*.parquet` or "
            f"`{split}*.jsonl`; it has {[file.name for file in files]}. Name the file itself."
        )
    return files[0]


def _rows_of(kind: str, file: Path) -> Dataset:
    try:
        rows = load_dataset(kind, data_files=str(file), split="train")
    except (DatasetGenerationError, ValueError, RecursionError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise ValueError(
            f"The benchmark {file} must be Parquet, or JSON Lines with an object for each question, and cannot be read: {reason}. "
            "Fetch it again."
        ) from error
    if not isinstance(rows, Dataset):
        raise ValueError(f"The benchmark {file} must hold one table, got {type(rows).__name__}.")
    return rows


def _commit_of(rows: Dataset, revision: str | None) -> str:
    """The commit in the address that the rows were downloaded from."""
    addresses = " ".join(rows.info.download_checksums or ())
    commit = re.search(r"@([0-9a-f]{40})/", addresses)
    return commit[1] if commit else str(revision or "main")


def _question_of(row: dict, index: int, file: str) -> Question:
    record = READERS[READER].record_from_row(row, file=file, index=index)
    options = row.get("options") if record.kind == "choice" else None
    return Question(record=record, ground_truth=row["ground_truth"], num_options=len(options) if options else None)


__all__ = ["SUBSETS", "Benchmark", "Question", "load_benchmark"]
