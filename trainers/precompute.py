# SPDX-License-Identifier: Apache-2.0
"""
Compute the features of frozen encoders once, for training that reads them.

One process: `geode precompute --model DIR --videos LIST_OR_FOLDER --out DIR`. Several: `accelerate launch
trainers/precompute.py` with the same arguments. Run the same command again after an interruption of any kind: finished
shards are kept, and the folder comes out byte for byte as without the interruption, whatever the number of processes.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import save
from tqdm.auto import tqdm

from geode.data.feature_store import (
    GEOMETRY_FACTS,
    GEOMETRY_TENSORS,
    INDEX_FILE,
    MANIFEST_FILE,
    SHARD_KEY,
    FeatureStore,
    digest_of_json,
    option_differences,
    read_shard_facts,
    shard_name,
    store_options,
)
from geode.data.processes import process_state
from geode.data.readers.rows import iter_lines, parse_line
from geode.data.schemas import media_path
from geode.data.whole_files import write_whole
from geode.modeling_geode.collation_geode import CLOUD_INPUTS, collate_scenes
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.modeling_geode.scene_files_geode import read_sealed, sealed, sha256_of, tensor_checksum, unsealed
from geode.modeling_geode.scene_geode import SceneGeometry
from geode.trainers.precompute_arguments import DTYPE_NAMES, SHARD_SIZE, add_arguments


VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".3gp")
PLAN_SIZE = 256  # videos whose digests are written together
DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}


class VideoItem(NamedTuple):
    """
    One video that is to be stored.

    Args:
        path (`str`): Below the media root, with forward slashes.
        geometry (`str`, *optional*): Folder of its saved [`SceneGeometry`], likewise. Without it the reconstructor runs.
    """

    path: str
    geometry: str | None = None


class PrecomputeReport(NamedTuple):
    """
    What a store holds in the end.

    Args:
        num_scenes (`int`): Scenes.
        num_videos (`int`): Videos; several of the same content are one scene.
        failures (`dict[str, str]`): Why a video has none, by its path.
        num_new_shards (`int`): Shards that this process wrote; the others were there.
    """

    num_scenes: int
    num_videos: int
    failures: dict[str, str]
    num_new_shards: int

    def lines(self) -> list[str]:
        """The report as text."""
        stored = self.num_videos - len(self.failures)
        lines = [f"{self.num_scenes} scenes of {stored} videos are stored, {len(self.failures)} videos failed."]
        return lines + [f"  failed: {path}: {error}" for path, error in sorted(self.failures.items())]


class _Scene(NamedTuple):
    """A distinct scene: its key and the first video that has it."""

    key: str
    item: VideoItem


# ---- what is to be stored ----


def list_items(
    videos: str | os.PathLike, *, media_root: str | os.PathLike | None = None, geometry: str | None = None
) -> tuple[list[VideoItem], Path]:
    """
    List videos.

    Args:
        videos (`str` or `os.PathLike`):
            A folder, which is searched with all its subfolders; a `.jsonl` of records, of which the distinct videos and
            their geometries are taken; or any other text file with a path in each line.
        media_root (`str` or `os.PathLike`, *optional*):
            What paths are relative to; by default the folder, or the folder of the file.
        geometry (`str`, *optional*):
            Where the geometry of each video is, relative to the media root: `{stem}` is the video's name without its
            suffix, `{parent}` its folder, as in `"{parent}/geometry/{stem}"`. Not for records, which name their own.

    Returns:
        `tuple[list[VideoItem], Path]`: The videos in the order of their paths, and the media root.

    Raises:
        FileNotFoundError: If there is nothing at `videos`.
        ValueError: If there is no video, a line is no record, a path leads out of the root, or a video has two geometries.
    """
    videos = Path(videos)
    root = Path(media_root) if media_root is not None else videos if videos.is_dir() else videos.parent
    pairs: list[tuple[str, str | None]]
    if not videos.exists():
        raise FileNotFoundError(f"`videos` must be a folder or a list, and there is nothing at {videos}.")
    if videos.is_dir():
        found = [path for path in videos.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()]
        if not videos.absolute().is_relative_to(root.absolute()):
            raise ValueError(f"The folder `videos` must lie below `media_root`, got {videos} and {root}.")
        pairs = [(path.absolute().relative_to(root.absolute()).as_posix(), None) for path in found]
    elif videos.suffix == ".jsonl":
        if geometry is not None:
            raise ValueError("`geometry` is for folders and plain lists; records name their own. Leave it out.")
        pairs = list(_pairs_of_records(videos))
    else:
        # Other ends of lines, as Python knows them, may stand in a name.
        lines = [line.strip(" \t\r") for line in videos.read_bytes().decode("utf-8-sig").split("\n")]
        pairs = [(line, None) for line in lines if line and not line.startswith("#")]
    items: dict[str, VideoItem] = {}
    for path, given in pairs:
        path = media_path(path)
        if geometry is not None:
            pure = Path(path)
            given = geometry.replace("{stem}", pure.stem).replace("{parent}", pure.parent.as_posix())
        item = VideoItem(path, None if given is None else media_path(given))
        if items.setdefault(path, item) != item:
            raise ValueError(
                f"A video must have one geometry, and {path} has {items[path].geometry!r} and {item.geometry!r}."
            )
    if not items:
        raise ValueError(f"At least one video is needed, and {videos} has none. Known suffixes are {VIDEO_SUFFIXES}.")
    return [items[path] for path in sorted(items)], root


def _pairs_of_records(path: Path) -> Iterator[tuple[str, str | None]]:
    """The videos of records and their geometries."""
    for number, line in iter_lines(path):
        try:
            row = parse_line(line)
            if row.get("media_type", "video") != "video":
                continue
            if not isinstance(row.get("media"), str) or not isinstance(row.get("geometry"), str | None):
                raise ValueError(
                    "A record must have its video's path as `media`, and `geometry` as text if it has any; got "
                    f"{row.get('media')!r:.200} and {row.get('geometry')!r:.200}."
                )
            media_path(row["media"])
        except ValueError as error:
            raise ValueError(f"Line {number} of {path} is no record of a video: {error}") from error
        yield row["media"], row.get("geometry")


# ---- the work ----


def precompute(
    model: GeodeForConditionalGeneration,
    processor: GeodeProcessor,
    items: Sequence[VideoItem],
    out: str | os.PathLike,
    *,
    media_root: str | os.PathLike,
    store_vision_features: bool = False,
    store_geometry: bool = True,
    shard_size: int = SHARD_SIZE,
    dtype: torch.dtype | None = None,
    retry_failed: bool = False,
    has_progress: bool = True,
) -> PrecomputeReport:
    """
    Store the features of videos, or go on where an earlier call was interrupted.

    Every process of a launch calls it with the same arguments. Process `r` of `W` writes shards `r`, `r + W` and so on;
    what is in them depends on the videos alone.

    Args:
        model ([`GeodeForConditionalGeneration`]):
            The model, on the device of this process.
        processor ([`GeodeProcessor`]):
            Its processor.
        items (`Sequence[VideoItem]`):
            The videos, see [`list_items`].
        out (`str` or `os.PathLike`):
            The store: a folder that is new, empty, or a store of the same videos and options.
        media_root (`str` or `os.PathLike`):
            What the paths of `items` are relative to.
        store_vision_features (`bool`, defaults to `False`):
            Also store the vision tower's features, which are large, so that training reads no videos.
        store_geometry (`bool`, defaults to `True`):
            Also store the points and cameras that the reconstructor makes, for boxes and pictures.
        shard_size (`int`, defaults to 16):
            Scenes in a file.
        dtype (`torch.dtype`, *optional*):
            Floating-point type that point tokens and vision features are rounded to; None keeps the model's.
        retry_failed (`bool`, defaults to `False`):
            Try again what could not be read in earlier calls. A store that is complete is otherwise left alone, without a
            look at the videos.
        has_progress (`bool`, defaults to `True`):
            Show how many scenes the first process of this machine has done.

    Returns:
        [`PrecomputeReport`]: Scenes and failures of the whole store.

    Raises:
        ValueError: If the store is of other videos or options, a video without geometry meets a model without
            reconstructor, or no video can be read.
    """
    state, out = process_state(), Path(out)
    items = [VideoItem(*item) for item in items]
    items = [item._replace(path=media_path(item.path)) for item in items]
    items = [item if item.geometry is None else item._replace(geometry=media_path(item.geometry)) for item in items]
    items = sorted(set(items), key=lambda item: item.path)
    manifest = _manifest(model, processor, items, store_vision_features, store_geometry, shard_size, dtype)
    # Each process reads its share of the shards, and all go the same way.
    is_complete = all(gather_object([_check_folder(out, manifest, retry_failed, state)]))
    state.wait_for_everyone()  # nobody looks at the folder any more
    if is_complete:
        return _report(out, 0)
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            (out / INDEX_FILE).unlink()  # of a store that has lost a shard
        _write_json(out / MANIFEST_FILE, sealed(manifest))
    state.wait_for_everyone()
    run = _Run(model, processor, out, Path(media_root).absolute(), manifest["options"])
    run.digest_videos(items, state, has_progress)
    state.wait_for_everyone()
    scenes, paths, failures = run.plan(items)
    if not scenes:
        raise ValueError(
            f"None of the {len(items)} videos can be read below {media_root}: {next(iter(failures.values()))} Check "
            "`media_root`."
        )
    shards = [scenes[start : start + shard_size] for start in range(0, len(scenes), shard_size)]
    with _reproducible(model):
        num_new = run.write_shards(shards, state, retry_failed, has_progress)
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(out, shards, paths, failures)
    state.wait_for_everyone()
    return _report(out, num_new)


@contextmanager
def _reproducible(model) -> Iterator[None]:
    """Evaluation mode and, where torch has them, kernels that add in the same order every time; as before afterwards."""
    was_training, before = model.training, torch.are_deterministic_algorithms_enabled()
    is_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    model.eval()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=is_warning)
        model.train(was_training)


def _manifest(model, processor, items, store_vision_features, store_geometry, shard_size, dtype) -> dict:
    """What a store is of. Two calls may write to the same folder exactly if theirs are equal."""
    if not isinstance(shard_size, int) or shard_size < 1:
        raise ValueError(f"`shard_size` must be a whole number of at least 1, got {shard_size!r}.")
    if not items:
        raise ValueError("`items` must name at least one video, got none.")
    twice = [one.path for one, other in pairwise(items) if one.path == other.path]
    if twice:
        raise ValueError(f"`items` must give a video one geometry at most, got several for {twice[0]}.")
    bare = [item.path for item in items if item.geometry is None]
    if bare and getattr(model, "model", model).reconstructor is None:
        raise ValueError(
            f"{len(bare)} videos have no geometry ({bare[0]} first), and the model has no reconstructor. Give their geometry, "
            "or attach a reconstructor."
        )
    if bare and processor.geometry_frame_size is None:
        raise ValueError("The processor's `geometry_frame_size` must be that of the model's reconstructor, got None.")
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name not in {None, *DTYPES}:
        raise ValueError(f"`dtype` must be one of {sorted(DTYPES)}, got {name!r}.")
    options = store_options(
        model,
        processor,
        has_reconstructions=bool(bare),
        has_video_features=store_vision_features,
        has_geometry=store_geometry,
        dtype=name,
    )
    videos = {"number": len(items), "digest": digest_of_json(items)}
    return {"options": options, "shard_size": shard_size, "videos": videos}


def _check_folder(out: Path, manifest: dict, retry_failed: bool, state: PartialState) -> bool:
    """Return whether nothing is to be done, as far as this process's share tells; raise unless the folder is new, empty or a store of the same."""
    path = out / MANIFEST_FILE
    if not path.is_file():
        # A leading dot marks what was never finished.
        names = [entry.name for entry in out.iterdir()] if out.is_dir() else []
        strangers = [name for name in names if not name.startswith(".")]
        if strangers:
            raise ValueError(f"`out` must be new, empty or a feature store, and {out} holds {sorted(strangers)[:3]}.")
        return False
    found = read_sealed(path, "Remove the folder, and run the same again.")
    differences = option_differences(manifest, found)
    if differences:
        raise ValueError(
            f"The store {out} is of other videos or options: {'; '.join(differences)}. Give them as they were, or another "
            "folder."
        )
    if not (out / INDEX_FILE).is_file():
        return False
    try:
        store = FeatureStore(out)
    except ValueError:  # a damaged index, which can be made again
        return False
    if (retry_failed and store.failures) or _leftovers(out):
        return False
    own = store.shards[state.process_index :: state.num_processes]
    return all(read_shard_facts(out / shard["file"], checks_tensors=True) is not None for shard in own)


class _Run:
    """One process's part of the work."""

    def __init__(self, model, processor, out: Path, root: Path, options: dict):
        self.model, self.processor = model, processor
        self.out, self.root = out, root
        self.options, self.options_digest = options, digest_of_json(options)

    def digest_videos(self, items: list[VideoItem], state: PartialState, has_progress: bool) -> None:
        """Digest the content of this process's groups of videos, unless that is known from before."""
        own = list(enumerate(_groups(items)))[state.process_index :: state.num_processes]
        with _progress(
            "Digesting videos", "video", sum(len(group) for _, group in own), state, has_progress
        ) as progress:
            for number, group in own:
                path = self.out / _plan_name(number)
                known = {row["stamp"]: row for row in _read_plan(path)}
                rows = []
                for item in group:
                    stamp = self._stamp(item)
                    rows.append(known.get(stamp) or sealed({"stamp": stamp, **self._digest(item)}))
                    progress.update()
                _write_json(path, rows)

    def _stamp(self, item: VideoItem) -> str:
        """What changes when a file does, at no cost."""
        stamps = [*item]
        for path in (self.root / item.path, self.root / (item.geometry or item.path) / "geometry.json"):
            with suppress(OSError):
                stat = path.stat()
                stamps += [stat.st_size, stat.st_mtime_ns]
        return digest_of_json(stamps)

    def _digest(self, item: VideoItem) -> dict:
        video, geometry = self.root / item.path, None
        if not video.exists():
            return {"error": "There is no such file."}
        try:
            parts = sorted(path for path in video.iterdir() if path.is_file()) if video.is_dir() else [video]
            content = [[path.name if video.is_dir() else "", sha256_of(path)] for path in parts]
            if item.geometry is not None:
                if not (self.root / item.geometry / "geometry.json").is_file():
                    return {"error": f"There is no geometry at {item.geometry}."}
                # It holds the digest of the tensors beside it.
                geometry = sha256_of(self.root / item.geometry / "geometry.json")
        except OSError as error:
            return {"error": self._plain(error, item)}
        return {"key": digest_of_json([content, geometry, self.options_digest])}

    def plan(self, items: list[VideoItem]) -> tuple[list[_Scene], dict[str, str], dict[str, str]]:
        """Distinct scenes in the order of their first video, the key of each path, and why a path has none."""
        rows = [row for number, _ in enumerate(_groups(items)) for row in _read_plan(self.out / _plan_name(number))]
        scenes: dict[str, _Scene] = {}
        paths, failures = {}, {}
        for item, row in zip(items, rows, strict=True):
            if "error" in row:
                failures[item.path] = row["error"]
            else:
                paths[item.path] = row["key"]
                scenes.setdefault(row["key"], _Scene(row["key"], item))
        return list(scenes.values()), paths, failures

    def write_shards(
        self, shards: list[list[_Scene]], state: PartialState, retry_failed: bool, has_progress: bool
    ) -> int:
        """Write those of this process's shards that are not there, and return how many."""
        own = list(enumerate(shards))[state.process_index :: state.num_processes]
        num_new = 0
        with _progress(
            "Encoding scenes", "scene", sum(len(shard) for _, shard in own), state, has_progress
        ) as progress:
            for number, shard in own:
                path = self.out / shard_name(number)
                facts = _facts_of(path, shard, checks_tensors=True)
                if facts is not None and not (retry_failed and facts["failures"]):
                    progress.update(len(shard))
                    continue
                self._write_shard(path, shard, progress)
                num_new += 1
        return num_new

    def _write_shard(self, path: Path, shard: list[_Scene], progress: tqdm) -> None:
        tensors, scenes, failures = {}, {}, {}
        for scene in shard:
            try:
                found, facts = self._encode(scene.item)
            except (OSError, ValueError) as error:
                failures[scene.key] = self._plain(error, scene.item)
            else:
                tensors |= {f"{scene.key}.{name}": tensor for name, tensor in found.items()}
                scenes[scene.key] = facts
            progress.update()
        facts = sealed({"keys": [scene.key for scene in shard], "scenes": scenes, "failures": failures})
        # One entry of metadata: the writer has no order for several. Its `save_file` would write to a file of a random
        # name, which a kill leaves behind.
        write_whole(path, save(tensors, metadata={SHARD_KEY: json.dumps(facts, sort_keys=True)}))

    @torch.no_grad()
    def _encode(self, item: VideoItem) -> tuple[dict[str, torch.Tensor], dict]:
        """The tensors of one scene and the facts about it, as training on the fly would make them from the same files."""
        base = getattr(self.model, "model", self.model)
        geometry = None if item.geometry is None else _load_geometry(self.root / item.geometry)
        inputs = self.processor.prepare_scene(video=self.root / item.path, geometry=geometry)
        inputs = {name: tensor.to(base.device) for name, tensor in inputs.items()}
        tensors, dtype = {}, DTYPES.get(self.options["dtype"] or "")
        stores_geometry = False
        if geometry is None:
            names = ("geometry_frames", "geometry_frame_mask", "scene_mask", "geometry_content_boxes")
            ((geometry,),) = base.reconstruct_scenes(**{name: inputs[name] for name in names})
            limits = {"max_points": base.config.max_points}
            cloud = geometry.to_model_inputs(base.config.point_config.grid_size, **limits)
            inputs |= {name: tensor.to(base.device) for name, tensor in collate_scenes([[cloud]]).items()}
            stores_geometry = self.options["reconstructor"]["stores_geometry"]
        points = base.get_point_tokens(**{name: inputs[name] for name in (*CLOUD_INPUTS, "point_mask")})
        tensors["point_tokens"] = points["point_tokens"][0, 0].to(dtype or points["point_tokens"].dtype)
        tensors["point_token_positions"] = points["point_token_positions"][0, 0]
        tensors["camera_poses"] = inputs["camera_poses"][inputs["camera_mask"]]
        tensors |= {name: inputs[name][0, 0] for name in ("log_scale", "scale_known")}
        tensors["scene_from_dataset"] = geometry.scene_from_dataset
        facts = {name: getattr(geometry, name) for name in GEOMETRY_FACTS}
        if stores_geometry:
            present = [name for name in GEOMETRY_TENSORS if getattr(geometry, name) is not None]
            tensors |= {name: getattr(geometry, name) for name in present}
        if self.options["vision_tower"]:
            frames = {name: inputs[name] for name in ("pixel_values_videos", "video_frame_mask", "scene_mask")}
            features = base.get_video_features(**frames).last_hidden_state[0, 0]
            tensors["video_features"] = features.to(dtype or features.dtype)
            facts["num_frames"] = len(features)
        # Clones: the writer refuses tensors that share memory.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        checksums = {name: tensor_checksum(tensor) for name, tensor in tensors.items()}
        facts |= {"stores_geometry": stores_geometry, "tensors": sorted(tensors), "checksums": checksums}
        return tensors, facts

    def _plain(self, error: Exception, item: VideoItem) -> str:
        """The text of an error without what depends on the machine or the moment."""
        text = str(error).partition("; last error log:")[0]
        for folder in (item.geometry, item.path):
            text = text.replace(str(self.root / folder), folder) if folder else text
        text = text.replace(f"{self.root}{os.sep}", "").replace(str(Path.cwd()), ".")
        return " ".join(text.split())


def _progress(task: str, unit: str, total: int, state: PartialState, has_progress: bool) -> tqdm:
    """The bar of a machine's first process, for its own share."""
    share = f" (1 of {state.num_processes} shares)" if state.num_processes > 1 else ""
    return tqdm(desc=task + share, unit=unit, total=total, disable=not (has_progress and state.is_local_main_process))


def _load_geometry(folder: Path) -> SceneGeometry:
    try:
        return SceneGeometry.load(folder)
    except TypeError as error:  # of a file whose tensors have other types, which is no mistake of this program
        raise ValueError(f"The geometry in {folder} is damaged: {error}") from error


# ---- files ----


def _groups(items: list[VideoItem]) -> Iterator[list[VideoItem]]:
    for start in range(0, len(items), PLAN_SIZE):
        yield items[start : start + PLAN_SIZE]


def _plan_name(number: int) -> str:
    return f".plan-{number:05d}.json"


def _read_plan(path: Path) -> list[dict]:
    """The rows of a group; none if there is no such file, or it is damaged, since it can be made again."""
    try:
        rows = json.loads(path.read_bytes())
        is_plan = isinstance(rows, list) and all(isinstance(row, dict) and "stamp" in row for row in rows)
        for row in rows if is_plan else ():
            unsealed(row, f"{path} is damaged.")
    except (FileNotFoundError, ValueError):
        return []
    return rows if is_plan and all("key" in row or "error" in row for row in rows) else []


def _leftovers(out: Path) -> list[Path]:
    """What is there only while the work is under way."""
    return [*out.glob(".plan-*.json"), *out.glob(".*.tmp")]


def _facts_of(path: Path, shard: list[_Scene], *, checks_tensors: bool = False) -> dict | None:
    """What a whole shard of just these scenes says about itself; None if there is no such shard."""
    facts = read_shard_facts(path, checks_tensors=checks_tensors)
    return facts if facts is not None and facts["keys"] == [scene.key for scene in shard] else None


def _write_json(path: Path, value) -> None:
    write_whole(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def _finish(out: Path, shards: list[list[_Scene]], paths: dict[str, str], failures: dict[str, str]) -> None:
    """Write the index from what the shards say, and remove what is not part of the store."""
    scenes, files, lost = {}, [], {}
    for number, shard in enumerate(shards):
        path = out / shard_name(number)
        facts = _facts_of(path, shard)
        if facts is None:
            raise ValueError(f"{path} is missing or damaged, though a process has written it. Run the same again.")
        files.append({"file": path.name, "bytes": path.stat().st_size})
        scenes |= {key: {"shard": number, **fact} for key, fact in facts["scenes"].items()}
        lost |= facts["failures"]
    if not scenes:
        for path in (*out.glob("shard-*.safetensors"), *_leftovers(out)):
            path.unlink()  # whatever the mistake was, nothing of it should stay
        raise ValueError(f"No video could be encoded; the first error is: {next(iter(lost.values()))}")
    failures = {**failures, **{path: lost[key] for path, key in paths.items() if key in lost}}
    index = {
        "scenes": scenes,
        "paths": {path: key for path, key in paths.items() if key in scenes},
        "failures": failures,
        "shards": files,
    }
    for path in out.glob("shard-*.safetensors"):
        if path.name not in {file["file"] for file in files}:
            path.unlink()  # of a video that has changed since
    _write_json(out / INDEX_FILE, sealed(index))
    for path in _leftovers(out):
        path.unlink()


def _report(out: Path, num_new: int) -> PrecomputeReport:
    store = FeatureStore(out)
    return PrecomputeReport(len(store), len(store.paths) + len(store.failures), store.failures, num_new)


# ---- command line ----


def run(arguments: argparse.Namespace) -> PrecomputeReport:
    """
    Load a model, precompute, and print the report.

    Args:
        arguments (`argparse.Namespace`):
            What a parser with [`add_arguments`] gave.

    Returns:
        [`PrecomputeReport`]: The report.

    Raises:
        ValueError: As [`precompute`] does, and with `--strict` if a video could not be read.
    """
    items, root = list_items(arguments.videos, media_root=arguments.media_root, geometry=arguments.geometry)
    state = process_state()
    processor = GeodeProcessor.from_pretrained(arguments.model, revision=arguments.revision)
    model = GeodeForConditionalGeneration.from_pretrained(
        arguments.model, revision=arguments.revision, dtype=arguments.dtype or "auto"
    )
    if arguments.reconstructor is not None:
        model.attach_reconstructor(arguments.reconstructor)
        processor.geometry_frame_size = model.config.reconstructor_config.image_size
    model.to(state.device)
    report = precompute(
        model,
        processor,
        items,
        arguments.out,
        media_root=root,
        store_vision_features=arguments.vision_features,
        store_geometry=arguments.store_geometry,
        shard_size=arguments.shard_size,
        dtype=DTYPES.get(arguments.store_dtype),
        retry_failed=arguments.retry_failed,
    )
    if state.is_main_process:
        print("\n".join(report.lines()))  # noqa: T201
    if arguments.strict and report.failures:
        raise ValueError(
            f"{len(report.failures)} of {report.num_videos} videos could not be stored; the others are. Leave out "
            "`--strict` to accept that."
        )
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments without the program's name; `None` is those of the process.

    Returns:
        `int`: The exit code: 0, or 2 after a mistake of the user.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except (OSError, ValueError, ImportError) as error:
        print(f"precompute: error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
