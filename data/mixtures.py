# SPDX-License-Identifier: Apache-2.0
"""
Mixtures: several datasets in one training set, as a YAML file describes them.

A mixture is read in one of two ways. [`Mixture.stream`] reads the files as they are, for a look, a check, or a corpus that fits no
disk. [`Mixture.load`] writes the records once into a memory-mapped Arrow file, which gives random access: it is what the
trainers take. Both give the same records for the same file, seed and epoch.
"""

import hashlib
import importlib.resources
import json
import logging
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from datasets import Dataset, IterableDataset, interleave_datasets
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi, snapshot_download

from geode.data import readers as _readers
from geode.data import schemas, wordings
from geode.data.readers import READERS
from geode.data.readers.common import RECORD_FEATURES
from geode.data.readers.streams import list_files, read_records
from geode.data.yaml_files import read_yaml
from geode.modeling_geode import answers_geode
from geode.modeling_geode.checked_files_geode import checked_path
from geode.modeling_geode.shown_geode import shown


logger = logging.getLogger(__name__)

SUSPECT_LABELS = ("mask", "drop", "keep")
# Rows are never shuffled in one piece, so each is kept or dropped by a hash of its identifier: the same rows at any number of
# processes, and those of a smaller fraction are among those of a larger one.
_HASH_SPAN = 2**64


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """
    One dataset of a mixture.

    Args:
        reader (`str`): A key of `geode.data.readers.READERS`.
        path (`str`): Folder of the dataset, absolute or below the data root.
        repo_id (`str`, *optional*): Dataset on the Hub whose annotation files are fetched where the folder is absent. The default is
            the reader's.
        revision (`str`, *optional*): Commit on the Hub. Without one the newest is taken and named in the log.
        data_files (`list[str]`, *optional*): Patterns of annotation files below `path`; the default is the reader's.
        media_root (`str`, *optional*): Folder of the videos and images, as `path`, which is the default.
        fraction (`float`, defaults to 1.0): Share of the rows that is taken.
        weight (`float`, defaults to 1.0): How often a row of this dataset is drawn, beside the others' weights. Weights in
            proportion to the numbers of rows spread every dataset evenly over the whole.
        skip_missing_media (`bool`, defaults to `False`): Leave out rows whose video or image is not there, and say how many.
        options (`dict`, *optional*): Options of the reader, such as `geometry_pattern` of the readers of boxes.
        bare_fraction (`float`, defaults to 0.0): Share of the questions that are asked as people ask them, without the lines that
            VSI-Bench puts before and after a question.
        reworded_fraction (`float`, defaults to 0.0): Share of the questions about numbers and boxes that are asked in other words
            than those of VSI-Bench, and in other units; see `geode.data.wordings`.
    """

    reader: str
    path: str
    repo_id: str | None = None
    revision: str | None = None
    data_files: list[str] | None = None
    media_root: str | None = None
    fraction: float = 1.0
    weight: float = 1.0
    skip_missing_media: bool = False
    options: dict | None = None
    bare_fraction: float = 0.0
    reworded_fraction: float = 0.0

    def __post_init__(self):
        if not isinstance(self.reader, str) or self.reader not in READERS:
            raise ValueError(f"`reader` must be one of {sorted(READERS)}, got {self.reader!r}.")
        for name in ("path", "repo_id", "revision", "media_root"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and (name == "path" or value is not None):
                raise ValueError(f"`{name}` of {self.reader} must be text, in quotes if it is digits, got {value!r}.")
        if self.data_files is not None and not (
            isinstance(self.data_files, list)
            and self.data_files
            and all(isinstance(item, str) for item in self.data_files)
        ):
            raise ValueError(f"`data_files` of {self.reader} must be a list of patterns, got {self.data_files!r}.")
        if not isinstance(self.skip_missing_media, bool):
            raise ValueError(
                f"`skip_missing_media` of {self.reader} must be true or false, got {self.skip_missing_media!r}."
            )
        if self.options is not None and not isinstance(self.options, dict):
            raise ValueError(f"`options` of {self.reader} must be a mapping, got {self.options!r}.")
        limits = {"fraction": 1.0, "weight": float("inf"), "bare_fraction": 1.0, "reworded_fraction": 1.0}
        for name, most in limits.items():
            value, may_be_zero = getattr(self, name), name in ("bare_fraction", "reworded_fraction")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            # Beyond the largest float, a whole number of YAML has no finite value.
            if (
                not is_number
                or not abs(value) <= sys.float_info.max
                or not 0.0 <= value <= most
                or (value == 0.0 and not may_be_zero)
            ):
                start = "[" if may_be_zero else "("
                raise ValueError(f"`{name}` of {self.reader} must lie in {start}0, {most:g}], got {shown(value)}.")

    def root(self, data_root: str | Path) -> Path:
        """
        Return the folder of the annotation files, fetched from the Hub if there is none.

        Args:
            data_root (`str` or `Path`): Folder that a relative `path` lies in.

        Returns:
            `Path`: The folder.

        Raises:
            FileNotFoundError: If there is no folder and the dataset is not on the Hub.
        """
        folder = Path(data_root) / self.path
        if folder.is_dir():
            return folder
        repo_id = self.repo_id or READERS[self.reader].REPO_ID
        if repo_id is None:
            raise FileNotFoundError(
                f"{self.reader} needs its files in {folder}, which is not a folder, and it is not on the Hub. Put them there, or "
                "name another place with `path` or the data root."
            )
        revision = self.revision
        if revision is None:
            revision = HfApi().dataset_info(repo_id).sha
            logger.warning(
                "%s is not pinned: took commit %s of %s. Write it as `revision` into the mixture.",
                self.reader,
                revision,
                repo_id,
            )
        return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=self.patterns))

    @property
    def patterns(self) -> list[str]:
        """Patterns of the annotation files, and of files that change how they are read."""
        reader = READERS[self.reader]
        return [*(self.data_files or reader.DATA_FILES), *getattr(reader, "OTHER_FILES", ())]

    def media_folder(self, data_root: str | Path) -> Path:
        """Return the folder that the records' `media` are relative to."""
        return Path(data_root) / (self.media_root or self.path)

    def stream(
        self, data_root: str | Path, *, seed: int = 0, suspect_labels: str = "mask", on_error: str = "raise"
    ) -> IterableDataset:
        """
        Read this dataset's share.

        Args:
            data_root (`str` or `Path`): Folder of the datasets.
            seed (`int`, defaults to 0): Decides which rows are taken.
            suspect_labels (`str`, defaults to `"mask"`): See [`Mixture`].
            on_error (`str`, defaults to `"raise"`): What a malformed row does: `"raise"`, or `"skip"` with a count in the log.

        Returns:
            `IterableDataset`: Records as dicts.
        """
        root, options = self.root(data_root), self.options or {}
        stream = read_records(self.reader, root, data_files=self.data_files, on_error=on_error, **options)
        drops_suspect = suspect_labels == "drop"
        if self.fraction < 1.0 or drops_suspect:
            settings = {"seed": seed, "fraction": self.fraction, "drops_suspect": drops_suspect}
            stream = stream.filter(_is_taken, fn_kwargs=settings)
        if self.skip_missing_media:
            stream = stream.filter(_ExistingMedia(self.reader, self.media_folder(data_root)))
        if self.bare_fraction:
            stream = stream.map(_bare, fn_kwargs={"seed": seed, "fraction": self.bare_fraction})
        if self.reworded_fraction:
            stream = stream.map(_reworded, fn_kwargs={"seed": seed, "fraction": self.reworded_fraction})
        return stream.map(_trusted) if suspect_labels == "keep" else stream


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """
    Several datasets in one.

    Args:
        name (`str`): Its name.
        sources (`list[MixtureSource]`): The datasets.
        seed (`int`, defaults to 0): Decides which rows are taken and how they are interleaved.
        suspect_labels (`str`, defaults to `"mask"`): What becomes of rows whose published label is known to be computed
            wrongly: `"mask"` marks them, so that their numbers are not regressed, `"drop"` leaves them out, `"keep"` trusts them.
    """

    name: str
    sources: list[MixtureSource] = field(default_factory=list)
    seed: int = 0
    suspect_labels: str = "mask"

    def __post_init__(self):
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"`name` must be text, got {self.name!r}.")
        if not isinstance(self.sources, list) or not all(isinstance(item, MixtureSource) for item in self.sources):
            raise TypeError(
                f"`sources` of the mixture {self.name!r} must be a list of `MixtureSource`, got {shown(self.sources)}."
            )
        if not self.sources:
            raise ValueError(f"`sources` of the mixture {self.name!r} must name at least one dataset, got none.")
        if self.suspect_labels not in SUSPECT_LABELS:
            raise ValueError(f"`suspect_labels` must be one of {SUSPECT_LABELS}, got {self.suspect_labels!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"`seed` must be a whole number from 0, got {self.seed!r}.")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Mixture":
        """
        Read a mixture.

        Args:
            path (`str` or `Path`): A YAML file, or the name of one in `configuration/recipes/mixtures`.

        Returns:
            [`Mixture`]: The mixture.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a mixture.
        """
        path = mixture_path(path)
        content = read_yaml(path, "The mixture")
        content = _known_fields(cls, content, f"The mixture {path}")
        sources = content.pop("sources", None)
        if not isinstance(sources, list):
            raise ValueError(f"`sources` of the mixture {path} must be a list, got {sources!r}.")
        sources = [MixtureSource(**_known_fields(MixtureSource, entry, f"A source of {path}")) for entry in sources]
        return cls(**{"name": path.stem, **content}, sources=sources)

    def stream(
        self,
        data_root: str | Path = ".",
        *,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        on_error: str = "raise",
    ) -> IterableDataset:
        """
        Read the mixture from its files, each record once.

        The position is `state_dict()` of what is returned; `load_state_dict` goes on from there. The workers of a `DataLoader`
        share the records of their rank.

        Args:
            data_root (`str` or `Path`, defaults to `"."`): Folder of the datasets.
            rank (`int`, defaults to 0): Which process this is.
            world_size (`int`, defaults to 1): Number of processes; together they read each record once.
            epoch (`int`, defaults to 0): Another epoch interleaves the datasets anew.
            on_error (`str`, defaults to `"raise"`): What a malformed row does: `"raise"`, or `"skip"` with a count in the log.

        Returns:
            `IterableDataset`: Records as dicts, see [`Record.to_dict`].

        Raises:
            ValueError: If `rank` is not below `world_size`.
        """
        for name, value in (("rank", rank), ("world_size", world_size), ("epoch", epoch)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be a whole number, got {shown(value)}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must lie in [0, {world_size}), got {rank}.")
        settings = {"seed": self.seed, "suspect_labels": self.suspect_labels, "on_error": on_error}
        streams = [source.stream(data_root, **settings) for source in self.sources]
        return split_dataset_by_node(self._interleaved(streams, epoch), rank=rank, world_size=world_size)

    def load(
        self,
        data_root: str | Path = ".",
        *,
        epoch: int = 0,
        cache_dir: str | Path | None = None,
        on_error: str = "raise",
    ) -> Dataset:
        """
        Read the mixture into memory-mapped Arrow files, or find it there, for training.

        Each dataset is written once; another fraction, seed, option, annotation file or version of its reader writes it
        anew. Media are looked for (`skip_missing_media`) only then. With several processes let the first come first
        (`accelerate.PartialState().main_process_first()`).

        Args:
            data_root (`str` or `Path`, defaults to `"."`): Folder of the datasets.
            epoch (`int`, defaults to 0): Another epoch shuffles and interleaves the datasets anew.
            cache_dir (`str` or `Path`, *optional*): Where the Arrow files go; the default is the `datasets` library's.
            on_error (`str`, defaults to `"raise"`): What a malformed row does: `"raise"`, or `"skip"` with a count in the log.

        Returns:
            `Dataset`: Records as dicts, each once. `Record.from_dict(dataset[0])` is the first.

        Raises:
            ValueError: If a row is malformed.
        """
        settings = {"seed": self.seed, "suspect_labels": self.suspect_labels, "on_error": on_error}
        parts = []
        for number, source in enumerate(self.sources):
            try:
                part = Dataset.from_generator(
                    _iterate,
                    features=RECORD_FEATURES,
                    gen_kwargs={
                        "source": source,
                        "data_root": str(data_root),
                        "settings": settings,
                        "stamp": _stamp(source, source.root(data_root)),
                    },
                    cache_dir=None if cache_dir is None else str(cache_dir),
                )
            except DatasetGenerationError as error:
                raise ValueError(
                    f"The records of {source.reader} cannot be written: {error.__cause__} Correct the row, or pass "
                    "`on_error='skip'`."
                ) from error
            parts.append(part.shuffle(seed=_mixed_seed(self.seed, epoch, number), load_from_cache_file=False))
        return self._interleaved(parts, epoch)

    def _interleaved(self, parts: list, epoch: int):
        if len(parts) == 1:
            return parts[0]
        total = sum(source.weight for source in self.sources)
        return interleave_datasets(
            parts,
            probabilities=[source.weight / total for source in self.sources],
            seed=_mixed_seed(self.seed, epoch, len(parts)),
            stopping_strategy="all_exhausted_without_replacement",
        )


def mixture_path(path: str | Path) -> Path:
    """
    Find a mixture's file.

    Args:
        path (`str` or `Path`): A file, or the name of one in `configuration/recipes/mixtures` without its ending.

    Returns:
        `Path`: The file.

    Raises:
        FileNotFoundError: If there is none.
    """
    checked_path("path", path)
    shipped = Path(str(importlib.resources.files("geode.configuration"))) / "recipes" / "mixtures"
    for candidate in (Path(path), shipped / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(file.stem for file in shipped.glob("*.yaml"))
    raise FileNotFoundError(f"There is no mixture at {path}. Give a YAML file, or one of {names}.")


def _known_fields(kind: type, content, what: str) -> dict:
    names = [entry.name for entry in fields(kind)]
    if not isinstance(content, dict):
        raise ValueError(f"{what} must have the keys {names}, got {shown(content)}.")
    unknown = sorted(str(key) for key in content if key not in names)
    if unknown:
        raise ValueError(f"{what} must have the keys {names}, got also {unknown}.")
    required = {entry.name for entry in fields(kind) if entry.default is entry.default_factory is MISSING}
    missing = sorted(required - content.keys() - {"name"})
    if missing:
        raise ValueError(f"{what} must have the keys {sorted(required)}, and it lacks {missing}.")
    return dict(content)


def _is_taken(record: dict, *, seed: int, fraction: float, drops_suspect: bool) -> bool:
    if drops_suspect and record["label_suspect"]:
        return False
    return _is_drawn(record["uid"], fraction, key=str(seed))


def _bare(record: dict, *, seed: int, fraction: float) -> dict:
    # Another key than that of the share of rows, or the rows of a small share would all be bare.
    is_bare = _is_drawn(record["uid"], fraction, key=f"bare {seed}")
    return {**record, "prompt": schemas.bare_prompt(record["prompt"])} if is_bare else record


def _reworded(record: dict, *, seed: int, fraction: float) -> dict:
    is_reworded = _is_drawn(record["uid"], fraction, key=f"reworded {seed}")
    return wordings.reworded(record, seed=seed) if is_reworded else record


def _is_drawn(uid: str, fraction: float, *, key: str) -> bool:
    digest = hashlib.blake2b(uid.encode(), digest_size=8, key=key.encode()).digest()
    return int.from_bytes(digest, "big") < fraction * _HASH_SPAN


def _trusted(record: dict) -> dict:
    return {**record, "label_suspect": False}


def _iterate(source: MixtureSource, data_root: str, settings: dict, stamp: str):
    """Yield the records of one dataset; `stamp` only makes the cache notice changed files."""
    yield from source.stream(data_root, **settings)


class _ExistingMedia:
    """Keeps the records whose medium exists, and counts the others in the log: the first, tenth, hundredth, ..."""

    def __init__(self, reader: str, folder: Path):
        self.reader, self.folder = reader, folder
        self.known: dict[str, bool] = {}
        self.num_skipped = 0

    def __call__(self, record: dict) -> bool:
        media = record["media"]
        if media not in self.known:
            self.known[media] = (self.folder / media).exists()
        if not self.known[media]:
            self.num_skipped += 1
            if self.num_skipped == 10 ** (len(str(self.num_skipped)) - 1):
                logger.warning(
                    "%s: skipped %d rows without their video or image; %s is not in %s.",
                    self.reader,
                    self.num_skipped,
                    media,
                    self.folder,
                )
        return self.known[media]


def _stamp(source: MixtureSource, root: Path) -> str:
    """Return what changes with the files and with the code that reads them; text, since a list would be taken for shards."""
    others = (root / file for file in getattr(READERS[source.reader], "OTHER_FILES", ()))
    files = [root / file for file in list_files(source.reader, root, source.data_files)]
    files += [file for file in others if file.is_file()]
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    code = sorted(
        [
            *(Path(part.__file__) for part in (schemas, wordings, answers_geode)),
            *Path(_readers.__file__).parent.glob("*.py"),
        ]
    )
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in code)).hexdigest()
    return json.dumps([digest, stamps])


def _mixed_seed(*parts: int) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


__all__ = ["SUSPECT_LABELS", "Mixture", "MixtureSource", "mixture_path"]
