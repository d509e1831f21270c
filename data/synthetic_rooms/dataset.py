# SPDX-License-Identifier: Apache-2.0
"""
Make a data set of furnished rooms: videos, geometry, depth and questions, in the layout of a Hub repository.

    geode data rooms --scenes 2000 --out rooms

The files depend on the options in `world.json` alone: neither on the number of processes nor on how often the work was
interrupted. Whatever kills it, the same call goes on with the scenes that are missing.

Convention:
    - A scene is whole when each of its files has the digest that is in `SHA256SUMS`, which is written after they were moved to
      their place.
    - One process writes at a time. It holds a lock that the system frees with the process.
    - Scenes belong to a split by their number, see `SPLIT_OF_TEN`.
"""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from tqdm import tqdm

from geode.data.synthetic_rooms.balance import draw_candidates, select_evenly
from geode.data.synthetic_rooms.baselines import blind_baselines
from geode.data.synthetic_rooms.build import FPS, write_frames, write_geometry, write_video
from geode.data.synthetic_rooms.checksums import CHECKSUMS, Checksums
from geode.data.synthetic_rooms.dataset_card import write_card
from geode.data.synthetic_rooms.questions import QUESTION_TYPES, Question, scene_questions
from geode.data.synthetic_rooms.rationales import write_rationale
from geode.data.synthetic_rooms.render import render_walk
from geode.data.synthetic_rooms.scene import GENERATOR_VERSION, describe_scene
from geode.data.synthetic_rooms.sheet import draw_contact_sheet
from geode.data.synthetic_rooms.tables import BENCHMARK_SCHEMA, QUESTION_SCHEMA, SCENE_SCHEMA, question_row, scene_row
from geode.data.synthetic_rooms.tables import write_table as write_parquet
from geode.data.synthetic_rooms.varied_rooms import COUNTS, make_varied_room
from geode.data.synthetic_rooms.whole_media import is_whole
from geode.data.whole_files import write_whole, writing


FORMAT_VERSION = 1
DATASET = "rooms"  # VSI-Bench's loaders look for {root}/{dataset}/{scene_name}.mp4
SPLITS = ("train", "validation", "test")
SPLIT_OF_TEN = ("train", "validation", "test", *("train",) * 7)  # by the last digit of a scene's number
WORK_FOLDER = ".work"
LOCK_FILE = ".lock"
ORPHAN_TIMEOUT_S = 60.0
MAX_SCENE_ATTEMPTS = 40
FOV_DEG = (74.0, 92.0)
COUNT_VIEW_SHARE = 0.003
MAX_CANDIDATES = 48
TRAIN_QUESTIONS = {
    "object_counting": 3,
    "object_abs_distance": 24,
    "object_size_estimation": 8,
    "room_size_estimation": 1,
    "object_rel_distance": 16,
    "object_rel_direction_easy": 12,
    "object_rel_direction_medium": 12,
    "object_rel_direction_hard": 12,
    "route_planning": 12,
    "obj_appearance_order": 6,
    "object_localization": 16,
}
HELD_OUT_QUESTIONS = {
    "object_counting": 3,
    "object_abs_distance": 5,
    "object_size_estimation": 4,
    "room_size_estimation": 1,
    "object_rel_distance": 4,
    "object_rel_direction_easy": 2,
    "object_rel_direction_medium": 2,
    "object_rel_direction_hard": 2,
    "route_planning": 3,
    "obj_appearance_order": 3,
    "object_localization": 4,
}


def split_of(index: int) -> str:
    """
    Return the split of a scene.

    Args:
        index (`int`): Its number.

    Returns:
        `str`: One of `SPLITS`: of ten scenes eight, one and one.
    """
    return SPLIT_OF_TEN[index % 10]


def scene_name_of(index: int) -> str:
    """
    Return the name of a scene.

    Args:
        index (`int`): Its number.

    Returns:
        `str`: The name, as in `room_000017`.
    """
    return f"room_{index:06d}"


def _describe(index: int, attempt: int, options: dict) -> tuple | None:
    """Furnish and film one attempt at a scene; `None` if the furniture found no place."""
    room_seed = int(np.random.SeedSequence([options["seed"], index, attempt]).generate_state(1)[0])
    try:
        room = make_varied_room(room_seed)
    except RuntimeError:
        return None
    fov_deg = float(np.random.default_rng([room_seed, 5_000_011]).uniform(*FOV_DEG))
    walk = render_walk(
        room,
        image_size=tuple(options["image_size"]),
        num_frames=options["num_frames"],
        fov_deg=fov_deg,
        supersampling=options["supersampling"],
    )
    record = describe_scene(room, walk, fps=FPS)
    return room, walk, record | {"dataset": DATASET, "scene_name": scene_name_of(index)}


def scene_files(index: int) -> list[str]:
    """
    Return the files of a scene.

    Args:
        index (`int`): Its number.

    Returns:
        `list[str]`: Paths below the data set's folder.
    """
    name = scene_name_of(index)
    geometry = [f"geometry/{name}/{file}" for file in ("geometry.json", "geometry.safetensors")]
    return [f"depth/{name}.safetensors", *geometry, f"rooms/{name}.mp4"]


def make_scene(out: Path, index: int, options: dict) -> list[str]:
    """
    Make one scene and move it to its place.

    Args:
        out (`Path`): The data set's folder.
        index (`int`): The scene's number.
        options (`dict`): What `world.json` holds.

    Returns:
        `list[str]`: Its files.

    Raises:
        OSError: If something cannot be written.
        RuntimeError: If none of the attempts gave a furnished room whose floor can be found.
    """
    name = scene_name_of(index)
    work = out / WORK_FOLDER / name
    for attempt in range(MAX_SCENE_ATTEMPTS):
        made = _describe(index, attempt, options)
        if made is None:
            continue
        room, walk, record = made
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        header = {"scene": json.dumps(record)}
        with writing(work):
            write_video(work / "room.mp4", walk.frames)
            views = write_frames(
                work / "depth.safetensors", room, walk, depth_size=tuple(options["depth_size"]), metadata=header
            )
            try:
                write_geometry(work / "geometry", walk, views, max_points=options["max_points"])
            except ValueError:  # the film shows too little of the floor: the next attempt draws another room
                continue
            shutil.rmtree(out / "geometry" / name, ignore_errors=True)
            os.replace(work / "room.mp4", out / "rooms" / f"{name}.mp4")
            os.replace(work / "geometry", out / "geometry" / name)
            os.replace(work / "depth.safetensors", out / "depth" / f"{name}.safetensors")
            work.rmdir()
        return scene_files(index)
    raise RuntimeError(
        f"`make_scene` must find a room for scene {index} of `seed` {options['seed']}, but all of {MAX_SCENE_ATTEMPTS} "
        "attempts failed. Choose another `seed`."
    )


def read_record(out: Path, index: int) -> dict:
    """
    Read the record of a scene from the header of its depth file.

    Args:
        out (`Path`): The data set's folder.
        index (`int`): The scene's number.

    Returns:
        `dict`: See `describe_scene`.
    """
    with safe_open(str(out / "depth" / f"{scene_name_of(index)}.safetensors"), "np") as stored:
        return json.loads(stored.metadata()["scene"])


def list_candidates(out: Path, index: int, options: dict) -> dict[str, list[Question]]:
    """
    Ask about a scene, and keep some of the questions of each type.

    Args:
        out (`Path`): The data set's folder.
        index (`int`): The scene's number.
        options (`dict`): What `world.json` holds.

    Returns:
        `dict[str, list[Question]]`: At most 48 of each type, rare answers among them.
    """
    return ask(read_record(out, index), index=index, seed=options["seed"])


def ask(record: dict, *, index: int, seed: int) -> dict[str, list[Question]]:
    """
    Ask about a record, and keep some of the questions of each type.

    Args:
        record (`dict`): See `describe_scene`.
        index (`int`): The scene's number, which decides the lots together with `seed`.
        seed (`int`): The data set's seed.

    Returns:
        `dict[str, list[Question]]`: At most 48 of each type, rare answers among them.
    """
    lots = int(np.random.SeedSequence([seed, index, 6_000_011]).generate_state(1)[0])
    questions = scene_questions(record, seed=lots, max_count=COUNTS[1], count_view_share=COUNT_VIEW_SHARE)
    return {
        name: draw_candidates(
            [question for question in questions if question.question_type == name],
            limit=MAX_CANDIDATES,
            seed=[lots, number],
        )
        for number, name in enumerate(QUESTION_TYPES)
    }


def select_split(candidates: list[dict[str, list[Question]]], split: str, *, seed: int) -> list[list[Question]]:
    """
    Choose the questions of a split, evenly over all of its scenes.

    Args:
        candidates (`list[dict[str, list[Question]]]`): What `ask` gave for each scene.
        split (`str`): One of `SPLITS`.
        seed (`int`): The data set's seed.

    Returns:
        `list[list[Question]]`: The questions of each scene, in the order of `QUESTION_TYPES`.
    """
    limits = TRAIN_QUESTIONS if split == "train" else HELD_OUT_QUESTIONS
    chosen: list[list[Question]] = [[] for _ in candidates]
    for number, name in enumerate(QUESTION_TYPES):
        pools = [scene[name] for scene in candidates]
        lots = [seed, SPLITS.index(split), number]
        for questions, more in zip(chosen, select_evenly(pools, per_scene=limits[name], seed=lots), strict=True):
            questions.extend(more)
    return chosen


def _start_worker(locks: Path) -> None:
    """Leave Ctrl-C to the main process, end with it however it ends, keep to one thread, and hold a lock while alive."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lock = FileLock(locks / f"{os.getpid()}.lock")
    lock.acquire()
    torch.set_num_threads(1)
    parent = parent_process()

    def end_with_parent(_: FileLock) -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    # A worker whose parent was killed would wait for work for ever.
    threading.Thread(target=end_with_parent, args=(lock,), daemon=True).start()


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _open_pool(num_workers: int, locks: Path) -> Iterator[ProcessPoolExecutor | None]:
    """Give a pool of processes, or `None` for one; its processes start with the first task and end with the block."""
    if num_workers == 1:
        with _one_thread():
            yield None
        return
    context = get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker, initargs=(locks,))
    try:
        yield pool
    finally:
        # After Ctrl-C or an error the scenes under way are finished, those not begun are dropped.
        pool.shutdown(wait=True, cancel_futures=True)


def _run(
    function: Callable,
    tasks: list[tuple],
    *,
    pool: ProcessPoolExecutor | None,
    bar: tqdm,
    note: Callable[[Any], None] | None = None,
) -> list[Any]:
    """Call `function` once per task; return the results in the order of the tasks. Each is noted at once."""
    results: list[Any] = [None] * len(tasks)
    for number, result in _results(function, tasks, pool):
        results[number] = result
        if note is not None:
            note(result)
        bar.update()
    return results


def _results(function: Callable, tasks: list[tuple], pool: ProcessPoolExecutor | None) -> Iterator[tuple[int, Any]]:
    """The number of each task and its result, as they come."""
    if pool is None:
        for number, task in enumerate(tasks):
            yield number, function(*task)
        return
    numbers = {pool.submit(function, *task): number for number, task in enumerate(tasks)}
    try:
        for future in as_completed(numbers):
            yield numbers[future], future.result()
    except BrokenProcessPool as error:
        raise OSError(
            "A worker process was killed, perhaps because memory ran out. Run the same again, which goes on; fewer `workers` need "
            "less memory."
        ) from error


def _check_options(options: dict) -> None:
    if options["num_scenes"] < 3:
        raise ValueError(
            f"`num_scenes` must be at least 3, so that each split has a scene, got {options['num_scenes']}. Ask for more."
        )
    for name in ("image_size", "depth_size"):
        if min(options[name]) < 8 or any(side % 2 for side in options[name]):
            raise ValueError(f"`{name}` must be even and at least 8 on both sides, got {options[name]}. Round it.")
    if options["num_frames"] < 8:
        raise ValueError(
            f"`num_frames` must be at least 8: fewer frames do not show a room, got {options['num_frames']}. Ask for more."
        )
    for name in ("seed", "supersampling", "max_points"):
        least = 0 if name == "seed" else 1
        if options[name] < least:
            raise ValueError(f"`{name}` must be at least {least}, got {options[name]}. Raise it.")


def _open_world(out: Path, options: dict) -> None:
    """Write `world.json`, or see that the one there holds the same options."""
    path = out / "world.json"
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="ascii"))
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged, so that nobody can say what the rooms beside it are: {error}. Write into it what "
                f"`world.json` of a world of the same options holds, or choose another folder."
            ) from error
        if found != options:
            names = sorted(name for name in {*found, *options} if found.get(name) != options.get(name))
            differences = ", ".join(
                f"`{name}` {found.get(name)} there and {options.get(name)} asked for" for name in names
            )
            raise ValueError(
                f"{out} holds a world of other options: {differences}. Go on with its own options, or choose another folder."
            )
        return
    foreign = sorted(
        {entry.name for entry in out.iterdir()} - {WORK_FOLDER, LOCK_FILE, CHECKSUMS, f".{CHECKSUMS}.tmp"}
    )
    if foreign:
        raise ValueError(
            f"`out` must be empty or hold a `world.json`, but {out} holds {foreign[:3]}. Choose another folder."
        )
    # First, as a world without it is one of an earlier version.
    write_whole(out / CHECKSUMS, "")
    _write_text(out, "world.json", json.dumps(options, indent=1) + "\n")


def _write_text(out: Path, name: str, text: str) -> None:
    work = out / WORK_FOLDER / name
    work.parent.mkdir(parents=True, exist_ok=True)
    with writing(out / name):
        work.write_text(text, encoding="ascii")
        os.replace(work, out / name)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other processes out of the folder. The lock's file is gone afterwards; one that a kill left does not matter."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"One process at a time may write a world, and another one is writing {out}. Wait for it, or choose another folder."
        ) from error
    try:
        yield
    finally:
        if os.name == "posix":
            (out / LOCK_FILE).unlink(missing_ok=True)  # while it is held: nobody may take a file that then disappears
        lock.release()
        if os.name != "posix":
            with suppress(OSError):  # of a process that has taken it since
                (out / LOCK_FILE).unlink(missing_ok=True)


def _await_orphans(out: Path) -> None:
    """Wait until the workers of a main process that was killed have ended, and clear away what they were at."""
    for path in (out / WORK_FOLDER).glob("*.lock"):
        try:
            FileLock(path).acquire(timeout=ORPHAN_TIMEOUT_S)
        except Timeout as error:
            raise ValueError(
                f"Process {path.stem} of an interrupted run still writes to {out} after {ORPHAN_TIMEOUT_S:.0f} s. End it."
            ) from error
    shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)


def _check_scenes(out: Path, sums: Checksums, num_scenes: int) -> list[int]:
    """Return the numbers of the scenes that are to be made, and keep the lines of the others alone."""
    groups = [scene_files(index) for index in range(num_scenes)]
    if sums.is_absent:  # of a world of an earlier version: its files are taken as they are, once
        found = [group for group in [*groups, _table_files()] if all(is_whole(out / name) for name in group)]
        sums.write([name for group in found for name in group])
    missing = [index for index, group in enumerate(groups) if not all(map(sums.is_right, group))]
    if missing:
        sums.write([name for index, group in enumerate(groups) if index not in set(missing) for name in group])
    return missing


def _table_files() -> list[str]:
    """Everything that is made from the scenes, but for the card, which its owner may change."""
    files = [f"{folder}/{split}.parquet" for folder in ("questions", "scenes") for split in SPLITS]
    files += [f"benchmark/{split}.parquet" for split in SPLITS if split != "train"]
    return [*files, "rooms.png", "baselines.json"]


def _has_tables(out: Path, sums: Checksums) -> bool:
    """Tell whether everything is there that is made from the scenes."""
    return all(sums.is_right(name) for name in _table_files()) and is_whole(out / "README.md")


def _write_split(out: Path, split: str, indices: list[int], candidates: list[dict], seed: int) -> list[dict]:
    """Write the three tables of a split; return the rows of its questions."""
    chosen = select_split(candidates, split, seed=seed)
    records = [read_record(out, index) for index in indices]
    pairs = [(question, record) for questions, record in zip(chosen, records, strict=True) for question in questions]
    # The benchmark's own types come first, so that its table is the head of the other and shares its numbers.
    pairs.sort(key=lambda pair: pair[0].question_type == "object_localization")
    rows = [
        question_row(number, question, record, rationale=write_rationale(question, record))
        for number, (question, record) in enumerate(pairs)
    ]
    benchmark = [row for row in rows if row["question_type"] != "object_localization"]
    tables = {
        "questions": (QUESTION_SCHEMA, rows),
        "scenes": (SCENE_SCHEMA, [scene_row(out, record, split) for record in records]),
    }
    if split != "train":
        tables["benchmark"] = (BENCHMARK_SCHEMA, benchmark)
    for folder, (schema, content) in tables.items():
        write_parquet(content, schema, out / WORK_FOLDER / f"{split}.parquet", out / folder / f"{split}.parquet")
    return rows


def _write_tables(
    out: Path, options: dict, sums: Checksums, *, pool: ProcessPoolExecutor | None, show_progress: bool
) -> None:
    indices = list(range(options["num_scenes"]))
    tasks = [(out, index, options) for index in indices]
    with tqdm(total=len(tasks), desc="Questions", unit="scene", disable=not show_progress) as bar:
        candidates = _run(list_candidates, tasks, pool=pool, bar=bar)
    rows = {}
    for split in SPLITS:
        own = [index for index in indices if split_of(index) == split]
        rows[split] = _write_split(out, split, own, [candidates[index] for index in own], options["seed"])
    with writing(out / "rooms.png"):
        draw_contact_sheet(out, out / WORK_FOLDER / "rooms.png")
        os.replace(out / WORK_FOLDER / "rooms.png", out / "rooms.png")
    baselines = blind_baselines(rows["train"], rows["test"])
    _write_text(out, "baselines.json", json.dumps(baselines, indent=1) + "\n")
    names = [*(name for index in indices for name in scene_files(index)), *_table_files()]
    for name in _table_files():
        sums.known.pop(name, None)
    sums.write(names)
    # Last, since its presence says that all of the rest is there.
    _write_text(out, "README.md", write_card(out, options, baselines))


def summarise_dataset(out: Path) -> dict:
    """
    Count what a finished data set holds.

    Args:
        out (`Path`): Its folder.

    Returns:
        `dict`: `scenes` and `questions` per split, `megabytes`, and `baselines` as `blind_baselines` gave them.
    """
    out = Path(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {
        "scenes": {split: pq.read_metadata(out / "scenes" / f"{split}.parquet").num_rows for split in SPLITS},
        "questions": {split: pq.read_metadata(out / "questions" / f"{split}.parquet").num_rows for split in SPLITS},
        "megabytes": round(size / 1e6, 1),
        "baselines": json.loads((out / "baselines.json").read_text(encoding="ascii")),
    }


def build_dataset(
    out: str | os.PathLike,
    *,
    num_scenes: int,
    seed: int = 0,
    num_workers: int | None = None,
    image_size: tuple[int, int] = (120, 160),
    num_frames: int = 16,
    supersampling: int = 1,
    depth_size: tuple[int, int] = (36, 48),
    max_points: int = 4096,
    show_progress: bool = True,
) -> dict:
    """
    Make a data set of rooms, or go on with one that was interrupted.

    With more than one process the caller's main module must be importable (`if __name__ == "__main__":`), as for
    everything that starts processes.

    Args:
        out (`str` or `os.PathLike`): Folder of the data set: new, empty, or begun with the same options.
        num_scenes (`int`): Number of rooms, at least 3: of each ten, eight are for training, one for validation and
            one for testing.
        seed (`int`, defaults to 0): Decides everything.
        num_workers (`int`, *optional*): Number of processes; `None` takes one per processor. It does not change a byte.
        image_size (`tuple[int, int]`, defaults to `(120, 160)`): `(height, width)` of the videos, even.
        num_frames (`int`, defaults to 16): Frames per video, at least 8.
        supersampling (`int`, defaults to 1): Samples per pixel along each axis.
        depth_size (`tuple[int, int]`, defaults to `(36, 48)`): `(height, width)` of the depth maps.
        max_points (`int`, defaults to 4,096): Largest number of points of a scene's geometry.
        show_progress (`bool`, defaults to `True`): Show progress bars.

    Returns:
        `dict`: See `summarise_dataset`.

    Raises:
        ImportError: If `embreex` or PyAV is missing.
        ValueError: If an option is out of range, if `out` holds a data set of other options or other files, or if another
            process is writing there.
    """
    out = Path(out)
    options = {
        "format_version": FORMAT_VERSION,
        "generator_version": GENERATOR_VERSION,
        "num_scenes": int(num_scenes),
        "seed": int(seed),
        "image_size": [int(side) for side in image_size],
        "num_frames": int(num_frames),
        "supersampling": int(supersampling),
        "depth_size": [int(side) for side in depth_size],
        "max_points": int(max_points),
    }
    _check_options(options)
    workers = (os.cpu_count() or 1) if num_workers is None else num_workers
    if workers < 1:
        raise ValueError(
            f"`num_workers` must be at least 1 or `None`, got {num_workers}. Take 1 to stay in one process."
        )
    with _locked(out):
        _open_world(out, options)
        _complete_world(out, options, workers=workers, show_progress=show_progress)
    return summarise_dataset(out)


def _complete_world(out: Path, options: dict, *, workers: int, show_progress: bool) -> None:
    """Make what is missing."""
    num_scenes = options["num_scenes"]
    _await_orphans(out)
    sums = Checksums(out)
    missing = _check_scenes(out, sums, num_scenes)
    if missing or not _has_tables(out, sums):
        (out / "README.md").unlink(missing_ok=True)
        for folder in ("rooms", "geometry", "depth", "scenes", "questions", "benchmark", WORK_FOLDER):
            (out / folder).mkdir(parents=True, exist_ok=True)
        tasks = [(out, index, options) for index in missing]
        done = num_scenes - len(missing)
        with _open_pool(workers, out / WORK_FOLDER) as pool:
            with tqdm(total=num_scenes, initial=done, desc="Rooms", unit="scene", disable=not show_progress) as bar:
                _run(make_scene, tasks, pool=pool, bar=bar, note=sums.add)
            _write_tables(out, options, sums, pool=pool, show_progress=show_progress)
    shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
