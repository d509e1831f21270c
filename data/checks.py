# SPDX-License-Identifier: Apache-2.0
"""
The check of a mixture before it is trained on: no scene of the benchmark, no missing media, no row that is not understood.

Scenes are recognised by their ids in a record's paths and in its scene, whatever the folders are called and whatever stands before
or after them. Two scans of one ScanNet space (`scene0191_00`, `scene0191_01`) show the same room and count as one. ARKitScenes
gives each video an id of its own, so two videos of one of its rooms are not recognised.
"""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm

from geode.data.mixtures import Mixture, MixtureSource
from geode.data.readers import READERS
from geode.data.schemas import Record


BENCHMARKS = {"vsi-bench": "nyu-visionx/VSI-Bench"}
MAX_EXAMPLES = 5
# Numbers beyond these do not occur in rooms; they are in SI.
PLAUSIBLE_RANGES = {"m": (0.0, 200.0), "m2": (0.0, 5000.0), "count": (0.0, 500.0)}
PLAUSIBLE_BOX_SIZE_M = (0.0, 50.0)
# Ids are compared as words joined by underscores: `scene0191-00` and `room_000001.mp4` are found in any longer name.
_WORD = re.compile(r"[0-9a-z]+")
_ARKIT_ID = re.compile(r"(?<!\d)\d{8}(?!\d)")  # also behind a letter, as in `v41069025`
_SCANNET_ID = re.compile(r"(scene\d{4})_\d{2}")
_OPTION = re.compile(r"^\s*\(?([A-Z])[.)]\s*(.*\S)", flags=re.MULTILINE)
PROBLEMS = {
    "bad_rows": "rows that are not understood",
    "no_unit": "numbers without a unit",
    "out_of_range": "numbers that no room has",
    "bad_letters": "letters that are no option, or whose option says something else",
    "missing_media": "videos, images and geometry that do not exist",
    "leaks": "rows about scenes of the benchmark",
    "rescans": "rows about other scans of the benchmark's scenes",
    "no_rows": "no rows at all",
}


@dataclass
class SourceReport:
    """
    What was found in one dataset of a mixture.

    Args:
        name (`str`): The reader's name and the folder.
        rows (`int`): Records that were read.
        kinds (`Counter`): Records of each kind.
        suspect (`int`): Records with labels that are known to be wrong.
        problems (`Counter`): Findings of each kind of `PROBLEMS`.
        examples (`dict[str, list[str]]`): The first few of each.
        scenes (`set[str]`): The benchmark's scenes among them.
    """

    name: str
    rows: int = 0
    kinds: Counter = field(default_factory=Counter)
    suspect: int = 0
    problems: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    scenes: set[str] = field(default_factory=set)

    def add(self, problem: str, example: str) -> None:
        """Count a finding, and keep it if it is among the first."""
        self.problems[problem] += 1
        examples = self.examples.setdefault(problem, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(example)

    def to_dict(self) -> dict:
        """Return plain types for JSON."""
        return {
            "name": self.name,
            "rows": self.rows,
            "kinds": dict(sorted(self.kinds.items())),
            "suspect_labels": self.suspect,
            "problems": {name: self.problems[name] for name in PROBLEMS},
            "examples": self.examples,
            "benchmark_scenes": sorted(self.scenes),
        }


@dataclass
class MixtureReport:
    """
    What was found in a mixture.

    Args:
        mixture (`str`): Its name.
        benchmark (`str`, *optional*): The benchmark that it was compared with.
        num_benchmark_scenes (`int`): Scenes of the benchmark.
        sources (`list[SourceReport]`): One report for each dataset.
    """

    mixture: str
    benchmark: str | None
    num_benchmark_scenes: int
    sources: list[SourceReport]

    @property
    def has_passed(self) -> bool:
        """Whether nothing was found."""
        return not any(sum(source.problems.values()) for source in self.sources)

    def to_dict(self) -> dict:
        """Return plain types for JSON."""
        return {
            "mixture": self.mixture,
            "benchmark": self.benchmark,
            "benchmark_scenes": self.num_benchmark_scenes,
            "has_passed": self.has_passed,
            "sources": [source.to_dict() for source in self.sources],
        }

    def table(self) -> str:
        """Return a table with a line for each dataset, the findings in words, and the verdict."""
        head = ["dataset", "rows", "number", "choice", "text", "box", "suspect", "problems"]
        lines = [
            [
                source.name,
                *(
                    f"{count:,}"
                    for count in (source.rows, *(source.kinds[kind] for kind in head[2:6]), source.suspect)
                ),
                f"{sum(source.problems.values()):,}",
            ]
            for source in self.sources
        ]
        widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
        rows = [
            "  ".join(
                cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(pairs)
            )
            for pairs in (list(zip(line, widths, strict=True)) for line in [head, *lines])
        ]
        for source in self.sources:
            for problem, count in source.problems.items():
                examples = "; ".join(source.examples[problem])
                rows.append(f"{source.name}: {count:,} {PROBLEMS[problem]}, such as {examples}")
        compared = f"no scene of {self.benchmark} ({self.num_benchmark_scenes:,} scenes)" if self.benchmark else ""
        found = f"passed: {compared}".rstrip(": ") if self.has_passed else "FAILED"
        return "\n".join([*rows, f"{self.mixture}: {found}"])

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, in one step."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(path.name + ".partial")
        scratch.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(scratch, path)


def benchmark_scenes(benchmark: str | Path, data_root: str | Path = ".") -> set[str]:
    """
    Return the scenes of a benchmark: the values of its column `scene_name`.

    Args:
        benchmark (`str` or `Path`): `"vsi-bench"`, or a Parquet, JSON Lines or CSV file in its format, or a folder of them.
        data_root (`str` or `Path`, defaults to `"."`): Where a folder `VSI-Bench` is looked for before the Hub is asked.

    Returns:
        `set[str]`: Ids in lower case, their words joined by underscores.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If a file has no column `scene_name`, or no scene at all is named.
    """
    path = Path(benchmark)
    if str(benchmark) in BENCHMARKS:
        repo_id = BENCHMARKS[str(benchmark)]
        path = Path(data_root) / repo_id.split("/")[1]
        if not path.is_dir():
            patterns = ["*.parquet", "*.jsonl"]
            path = Path(snapshot_download(repo_id, repo_type="dataset", allow_patterns=patterns))
    readers = {
        ".parquet": pyarrow.parquet.read_table,
        ".jsonl": pyarrow.json.read_json,
        # Without a type, pyarrow takes ids of digits for numbers, and drops their zeros.
        ".csv": lambda file: pyarrow.csv.read_csv(
            file, convert_options=pyarrow.csv.ConvertOptions(column_types={"scene_name": pyarrow.string()})
        ),
    }
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in readers)
    if not files or any(file.suffix not in readers for file in files):
        raise FileNotFoundError(
            f"The benchmark must be one of {sorted(BENCHMARKS)}, or a file or folder of {sorted(readers)}; got {benchmark!s}, "
            f"where {'no such file is' if not files else 'the ending is another'}."
        )
    scenes: set[str] = set()
    for file in files:
        try:
            table = readers[file.suffix](file)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"The benchmark file {file} cannot be read: {' '.join(str(error).split())}.") from error
        if "scene_name" not in table.column_names:
            raise ValueError(f"A benchmark needs a column `scene_name`; {file} has {table.column_names}.")
        scenes |= {_joined(str(name)) for name in table["scene_name"].unique().to_pylist() if name is not None}
    scenes.discard("")
    if not scenes:
        raise ValueError(f"The benchmark {benchmark!s} names no scene: its column `scene_name` is empty.")
    return scenes


def _joined(text: str) -> str:
    return "_".join(_WORD.findall(text.lower()))


def scene_ids(record: Record, *, num_words: int = 2) -> set[str]:
    """
    Return all that may be the id of a record's scene: every run of words in its paths and its scene.

    Args:
        record ([`Record`]): A record.
        num_words (`int`, defaults to 2): Words of the longest id; `scene0191_00` has two.

    Returns:
        `set[str]`: Candidates in lower case, words joined by underscores.

    Example:
    ```python
    >>> record = Record(
    ...     uid="0", source="s", media_type="video", media="a/scene0191_00.mp4", prompt="", kind="text", answer_text=""
    ... )
    >>> sorted(scene_ids(record))
    ['00', '00_mp4', 'a', 'a_scene0191', 'mp4', 'scene0191', 'scene0191_00']

    ```
    """
    found = set()
    for text in (record.media, record.geometry, record.scene):
        if text is None:
            continue
        words = _WORD.findall(text.lower())
        found |= {
            "_".join(words[start : start + count])
            for count in range(1, num_words + 1)
            for start in range(len(words) - count + 1)
        }
        found.update(_ARKIT_ID.findall(text))
    return found


def _rooms(ids: set[str]) -> set[str]:
    """Return the spaces that ScanNet's ids name without the number of the scan."""
    return {match[1] for name in ids if (match := _SCANNET_ID.fullmatch(name))}


def _check_number(report: SourceReport, record: Record) -> None:
    if record.unit is None:
        report.add("no_unit", f"{record.uid}: {record.prompt!r:.120}")
        return
    base = "m2" if record.unit.endswith("2") else "count" if record.unit == "count" else "m"
    if record.value_si is None or record.unit.endswith("3"):
        return
    low, high = PLAUSIBLE_RANGES[base]
    is_whole = base != "count" or float(record.value).is_integer()
    is_positive = record.value_si > low or (base == "count" and record.value_si == 0.0)
    if not (is_positive and record.value_si <= high and is_whole):
        report.add("out_of_range", f"{record.uid}: {record.answer_text} {record.unit}")


def _check_box(report: SourceReport, record: Record) -> None:
    low, high = PLAUSIBLE_BOX_SIZE_M
    if len(record.box) != 7 or not all(low < size <= high for size in record.box[3:6]):
        report.add("out_of_range", f"{record.uid}: box {record.box}")


def _check_letter(report: SourceReport, record: Record) -> None:
    options = dict(_OPTION.findall(record.prompt))
    if not options:
        return
    said = record.answer_text[1:].lstrip(". ").strip()
    if record.letter not in options or (said and said.casefold() != options[record.letter].casefold()):
        report.add("bad_letters", f"{record.uid}: {record.answer_text!r:.80} of {sorted(options)}")


def check_source(
    source: MixtureSource,
    stream,
    *,
    media_folder: Path | None,
    scenes: set[str],
    report: SourceReport,
) -> SourceReport:
    """
    Read one dataset and count what is wrong with it. A benchmark is wrong as a whole.

    Args:
        source ([`MixtureSource`]): The dataset.
        stream (`Iterable[dict]`): Its records.
        media_folder (`Path`, *optional*): Where its media must exist; None does not look.
        scenes (`set[str]`): Ids of scenes that must not occur.
        report ([`SourceReport`]): Takes the findings.

    Returns:
        [`SourceReport`]: The report.
    """
    rooms, exists = _rooms(scenes), {}
    num_words = max((scene.count("_") + 1 for scene in scenes), default=1)
    is_benchmark = READERS[source.reader].REPO_ID in BENCHMARKS.values()
    checks = {"number": _check_number, "box": _check_box, "choice": _check_letter}
    for row in stream:
        record = Record.from_dict(row)
        report.rows += 1
        report.kinds[record.kind] += 1
        report.suspect += record.label_suspect
        if record.kind in checks:
            checks[record.kind](report, record)
        ids = scene_ids(record, num_words=num_words) if scenes else set()
        found = ids & scenes
        if found or is_benchmark:
            report.scenes |= found
            report.add("leaks", f"{record.uid}: {record.media}")
        elif rooms and _rooms(ids) & rooms:
            report.scenes |= _rooms(ids) & rooms
            report.add("rescans", f"{record.uid}: {record.media}")
        for path in (record.media, record.geometry) if media_folder is not None else ():
            if path is not None and path not in exists:
                exists[path] = (media_folder / path).exists()
                if not exists[path]:
                    report.add("missing_media", str(media_folder / path))
    if report.rows == 0:
        report.add("no_rows", source.path)
    return report


def check_mixture(
    mixture: Mixture,
    data_root: str | Path = ".",
    *,
    benchmark: str | Path | None = None,
    checks_media: bool = True,
    show_progress: bool = False,
) -> MixtureReport:
    """
    Read a whole mixture and look for what must not be trained on.

    Args:
        mixture ([`Mixture`]): The mixture.
        data_root (`str` or `Path`, defaults to `"."`): Folder of its datasets.
        benchmark (`str` or `Path`, *optional*): See [`benchmark_scenes`]; its scenes must not occur.
        checks_media (`bool`, defaults to `True`): Whether every video and image must exist.
        show_progress (`bool`, defaults to `False`): Show a progress bar.

    Returns:
        [`MixtureReport`]: What was found.
    """
    scenes = benchmark_scenes(benchmark, data_root) if benchmark is not None else set()
    reports = []
    for source in mixture.sources:
        report = SourceReport(f"{source.reader} {source.path}")

        def note(file: str, index: int, message: str, report: SourceReport = report) -> None:
            report.add("bad_rows", message)

        stream = source.stream(data_root, seed=mixture.seed, suspect_labels=mixture.suspect_labels, on_error=note)
        stream = tqdm(stream, desc=report.name, unit=" rows", disable=not show_progress)
        folder = source.media_folder(data_root) if checks_media else None
        try:
            check_source(source, stream, media_folder=folder, scenes=scenes, report=report)
        except ValueError as error:  # a file that is broken as a whole; the other datasets are still of interest
            note("", 0, str(error))
        reports.append(report)
    return MixtureReport(mixture.name, None if benchmark is None else str(benchmark), len(scenes), reports)


__all__ = [
    "BENCHMARKS",
    "PROBLEMS",
    "MixtureReport",
    "SourceReport",
    "benchmark_scenes",
    "check_mixture",
    "check_source",
    "scene_ids",
]
