# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from PIL import Image
from safetensors.numpy import load_file

from geode.data.synthetic_rooms import dataset
from geode.data.synthetic_rooms.baselines import blind_baselines
from geode.data.synthetic_rooms.dataset import SPLITS, build_dataset, scene_name_of, split_of
from geode.data.synthetic_rooms.questions import QUESTION_TYPES
from geode.data.synthetic_rooms.varied_rooms import LENGTHS_M, make_varied_room
from geode.modeling_geode.scene_geode import SceneGeometry


SMALL = dict(image_size=(60, 80), num_frames=8, depth_size=(24, 32), max_points=2048, show_progress=False)
NUM_SCENES = 8
# Ten of the columns' names and types, as `nyu-visionx/VSI-Bench` has them, written down by hand.
VSI_BENCH = [
    ("id", "int64"),
    ("dataset", "string"),
    ("scene_name", "string"),
    ("question_type", "string"),
    ("question", "string"),
    ("ground_truth", "string"),
    ("options", "list<element: string>"),
    ("pruned", "bool"),
]

BUILD = """
import sys
from geode.data.synthetic_rooms.dataset import build_dataset

if __name__ == "__main__":
    build_dataset(sys.argv[1], num_scenes=int(sys.argv[2]), seed=3, num_workers=int(sys.argv[3]), image_size=(60, 80),
                  num_frames=8, depth_size=(24, 32), max_points=2048, show_progress=False)
"""


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    pytest.importorskip("embreex", reason="rendering needs embreex, the extra `world`")
    pytest.importorskip("av", reason="videos need PyAV")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small data set, made in one process, and what `build_dataset` returned."""
    out = tmp_path_factory.mktemp("world") / "rooms"
    return out, build_dataset(out, num_scenes=NUM_SCENES, seed=3, num_workers=1, **SMALL)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_rows(folder: Path, table: str, split: str) -> list[dict]:
    return pq.read_table(folder / table / f"{split}.parquet").to_pylist()


def start_build(tmp_path: Path, out: Path, *, num_scenes: int, num_workers: int) -> subprocess.Popen:
    script = tmp_path / "build.py"
    script.write_text(BUILD, encoding="ascii")
    command = [sys.executable, str(script), str(out), str(num_scenes), str(num_workers)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def kill_when(process: subprocess.Popen, condition, *, whole_group: bool) -> bool:
    """Kill without a chance to tidy up as soon as something holds; tell whether it was in time."""
    while process.poll() is None and not condition():
        time.sleep(0.005)
    if process.poll() is not None:
        return False
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return True


def count(out: Path, pattern: str) -> int:
    return len(list(out.glob(pattern)))


def test_build_dataset_survives_kills_and_gives_the_same_bytes_with_two_processes(world, tmp_path):
    """Killed in a scene, then (the parent alone) between scenes; the resume must equal a run without either."""
    whole, _ = world
    out = tmp_path / "rooms"
    first = start_build(tmp_path, out, num_scenes=NUM_SCENES, num_workers=1)
    assert kill_when(first, lambda: count(out, ".work/*/depth.safetensors") > 0, whole_group=True)
    second = start_build(tmp_path, out, num_scenes=NUM_SCENES, num_workers=2)
    before = count(out, "depth/*")
    assert kill_when(second, lambda: count(out, "depth/*") >= before + 2, whole_group=False)
    assert not (out / "README.md").exists()
    build_dataset(out, num_scenes=NUM_SCENES, seed=3, num_workers=1, **SMALL)
    assert digests(out) == digests(whole)


@pytest.mark.slow
def test_build_dataset_gives_the_same_bytes_after_kills_at_many_moments(tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "killed"
    start_build(tmp_path, plain, num_scenes=40, num_workers=1).wait()
    moments = [
        lambda: (out / ".work").is_dir(),
        lambda: count(out, ".work/*/room.mp4") > 0,
        lambda: count(out, ".work/*/geometry/*") > 0,
        lambda: count(out, "depth/*") >= 9,
        lambda: count(out, "geometry/*") >= 20,
        lambda: count(out, "depth/*") >= 40,
        lambda: (out / "questions" / "train.parquet").is_file(),
        lambda: (out / "rooms.png").is_file(),
    ]
    kills = 0
    for number, moment in enumerate(moments):
        process = start_build(tmp_path, out, num_scenes=40, num_workers=1 + number % 2)
        kills += kill_when(process, moment, whole_group=number % 3 > 0)
        time.sleep(0.5)
    assert kills >= 5
    assert start_build(tmp_path, out, num_scenes=40, num_workers=2).wait() == 0
    assert digests(out) == digests(plain)


def test_build_dataset_of_a_finished_world_changes_nothing(world):
    out, summary = world
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert build_dataset(out, num_scenes=NUM_SCENES, seed=3, num_workers=1, **SMALL) == summary
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "harm",
    [
        ("questions/train.parquet", None),
        ("scenes/test.parquet", 100),
        ("benchmark/validation.parquet", None),
        ("baselines.json", None),
        ("rooms.png", 200),
        ("README.md", None),
        ("rooms/room_000001.mp4", 100),
        ("rooms/room_000001.mp4", -1),
        ("depth/room_000002.safetensors", -1),
        ("geometry/room_000003/geometry.json", 10),
        ("geometry/room_000003/geometry.safetensors", 0),
        ("rooms/room_000001.mp4", "bit"),
        ("SHA256SUMS", 1000),
    ],
    ids=str,
)
def test_build_dataset_makes_again_what_is_missing_or_damaged(world, tmp_path, harm):
    whole, summary = world
    out, (name, size) = tmp_path / "rooms", harm
    shutil.copytree(whole, out)
    if size is None:
        (out / name).unlink()
    elif size == "bit":  # a film that can be shown, and shows something else
        content = bytearray((out / name).read_bytes())
        content[-100] ^= 16
        (out / name).write_bytes(content)
    else:
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[:size])
    assert build_dataset(out, num_scenes=NUM_SCENES, seed=3, num_workers=1, **SMALL) == summary
    assert digests(out) == digests(whole)


def test_build_dataset_takes_a_world_of_an_earlier_version_as_it_is(world, tmp_path):
    whole, summary = world
    out = tmp_path / "rooms"
    shutil.copytree(whole, out)
    (out / "SHA256SUMS").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert build_dataset(out, num_scenes=NUM_SCENES, seed=3, num_workers=1, **SMALL) == summary
    assert digests(out) == digests(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_build_dataset_waits_for_the_workers_of_a_killed_run(tmp_path, monkeypatch):
    """Two of these workers' files would mix with those of the resumed run: each holds a lock for as long as it lives."""
    out = tmp_path / "rooms"
    killed = start_build(tmp_path, out, num_scenes=NUM_SCENES, num_workers=2)
    assert kill_when(killed, lambda: count(out, ".work/*.lock") == 2, whole_group=False)
    (orphan, *_) = (out / ".work").glob("*.lock")
    lock = FileLock(orphan)
    lock.acquire(timeout=60)  # once the orphan has ended
    monkeypatch.setattr(dataset, "ORPHAN_TIMEOUT_S", 0.2)
    with pytest.raises(
        ValueError, match=rf"Process {orphan.stem} of an interrupted run still writes to .*rooms after"
    ):
        build_dataset(out, num_scenes=NUM_SCENES, seed=3, num_workers=1, **SMALL)
    lock.release()


def test_build_dataset_refuses_a_folder_that_another_process_writes(world, tmp_path):
    whole, _ = world
    out = tmp_path / "rooms"
    first = start_build(tmp_path, out, num_scenes=NUM_SCENES, num_workers=1)
    try:
        while first.poll() is None and count(out, ".work/*/room.mp4") == 0:
            time.sleep(0.005)
        with pytest.raises(ValueError, match=r"another one is writing .*rooms\. Wait for it"):
            build_dataset(out, num_scenes=NUM_SCENES, seed=3, num_workers=1, **SMALL)
        assert first.wait() == 0
    finally:
        first.kill()
    assert digests(out) == digests(whole)


def test_build_dataset_refuses_other_options_in_the_same_folder(world):
    out, _ = world
    with pytest.raises(ValueError, match=r"`num_frames` 8 there and 9 asked for, `seed` 3 there and 4 asked for"):
        build_dataset(out, num_scenes=NUM_SCENES, seed=4, num_workers=1, **SMALL | {"num_frames": 9})


def test_build_dataset_refuses_a_folder_of_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"must be empty or hold a `world.json`, but .*thesis\.txt"):
        build_dataset(tmp_path, num_scenes=3)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_scenes", 2, r"`num_scenes` must be at least 3.*got 2"),
        ("image_size", (60, 81), r"`image_size` must be even.*got \[60, 81\]"),
        ("num_frames", 4, r"`num_frames` must be at least 8.*got 4"),
        ("num_workers", 0, r"`num_workers` must be at least 1.*got 0"),
        ("seed", -1, r"`seed` must be at least 0, got -1"),
    ],
)
def test_build_dataset_refuses_options_out_of_range(tmp_path, option, value, message):
    with pytest.raises(ValueError, match=message):
        build_dataset(tmp_path / "rooms", **{"num_scenes": 4, "show_progress": False} | {option: value})
    assert not (tmp_path / "rooms").exists()


def test_dataset_leaves_no_scratch_files_and_has_every_file_of_every_scene(world):
    out, _ = world
    names = [scene_name_of(index) for index in range(NUM_SCENES)]
    expected = {f"rooms/{name}.mp4" for name in names} | {f"depth/{name}.safetensors" for name in names}
    expected |= {f"geometry/{name}/geometry.{end}" for name in names for end in ("json", "safetensors")}
    expected |= {f"{table}/{split}.parquet" for table in ("questions", "scenes") for split in SPLITS}
    expected |= {"benchmark/validation.parquet", "benchmark/test.parquet"}
    assert set(digests(out)) == expected | {"README.md", "SHA256SUMS", "baselines.json", "rooms.png", "world.json"}
    # As `sha256sum -c` reads it: all that is not the owner's to edit, and what the options are read from.
    lines = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text("ascii").splitlines())
    others = ("README.md", "SHA256SUMS", "world.json")
    assert lines == {name: digest for name, digest in digests(out).items() if name not in others}


def test_splits_are_disjoint_and_eight_one_and_one_of_ten(world):
    out, summary = world
    scenes = {split: {row["scene_name"] for row in read_rows(out, "scenes", split)} for split in SPLITS}
    assert sum(len(names) for names in scenes.values()) == len(set().union(*scenes.values())) == NUM_SCENES
    assert {split: len(names) for split, names in scenes.items()} == summary["scenes"]
    for split in SPLITS:
        assert {row["scene_name"] for row in read_rows(out, "questions", split)} <= scenes[split]
    shares = [split_of(index) for index in range(100)]
    assert [shares.count(split) for split in SPLITS] == [80, 10, 10]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_benchmark_has_the_columns_of_vsi_bench_exactly(world, split):
    out, _ = world
    schema = pq.read_schema(out / "benchmark" / f"{split}.parquet")
    assert [(field.name, str(field.type)) for field in schema] == VSI_BENCH
    rows, ours = read_rows(out, "benchmark", split), read_rows(out, "questions", split)
    assert [row["id"] for row in rows] == list(range(len(rows)))
    assert rows == [{name: row[name] for name, _ in VSI_BENCH} for row in ours[: len(rows)]]
    assert {row["question_type"] for row in ours[len(rows) :]} == {"object_localization"}
    for row in rows:
        assert row["dataset"] == "rooms"
        assert row["pruned"] is False
        assert (out / row["dataset"] / f"{row['scene_name']}.mp4").is_file()
        if row["options"] is None:
            assert float(row["ground_truth"]) > 0
        else:
            assert row["ground_truth"] in "ABCD"[: len(row["options"])]


def test_questions_of_every_type_are_there(world):
    out, summary = world
    rows = {split: read_rows(out, "questions", split) for split in SPLITS}
    assert {split: len(own) for split, own in rows.items()} == summary["questions"]
    assert {row["question_type"] for row in rows["train"]} == set(QUESTION_TYPES)
    assert all(row["rationale"] and "<REG>" not in row["rationale"] for own in rows.values() for row in own)
    boxes = [row["box"] for row in rows["train"] if row["question_type"] == "object_localization"]
    assert {len(box) for box in boxes} == {7}


def test_tables_load_with_datasets(world, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra `train`")
    out, summary = world
    files = {split: str(out / "questions" / f"{split}.parquet") for split in SPLITS}
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    assert {split: loaded[split].num_rows for split in SPLITS} == summary["questions"]
    assert loaded["test"][0]["video"] == f"rooms/{loaded['test'][0]['scene_name']}.mp4"


def test_card_describes_the_files(world):
    """The header names files that exist, and the tables hold what one computes again from the rows."""
    out, summary = world
    card = (out / "README.md").read_text(encoding="ascii")
    assert card.startswith("---\nlicense: apache-2.0\n")
    header = card.split("---")[1]
    paths = re.findall(r"path: (\S+)", header)
    assert len(paths) == 8
    assert all((out / path).is_file() for path in paths)
    table = blind_baselines(read_rows(out, "questions", "train"), read_rows(out, "questions", "test"))
    assert json.loads((out / "baselines.json").read_text()) == table == summary["baselines"]
    for name, scores in table.items():
        (line,) = re.findall(rf"^\| `{name}` \| (.*) \|$", card.split("without looking")[1], flags=re.MULTILINE)
        cells = [float(cell) for cell in line.split(" | ")]
        assert cells[0] == scores["n"]
        assert cells[1:-1] == [
            round(value, 1) for value in map(float, (f"{v:.1f}" for v in list(scores.values())[1:]))
        ]
    assert f"| rooms | {summary['scenes']['train']} |" in card
    assert "For development take the `validation` split, not a part of `train`." in card
    assert re.search(rf"--scenes {NUM_SCENES} --seed 3 ", card)


def test_scene_rows_agree_with_the_stored_files(world):
    out, _ = world
    row = read_rows(out, "scenes", "test")[0]
    stored = load_file(out / row["depth"])
    np.testing.assert_array_equal(stored["world_from_cam"], row["world_from_cam"])
    assert stored["depth_mm"].shape == (8, 24, 32)
    assert row["image_size"] == [60, 80]
    corners = np.array(row["floor_polygon"])
    x, y = corners.T
    assert 0.5 * abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) == pytest.approx(row["area_m2"], abs=1e-4)
    geometry = SceneGeometry.load(out / row["geometry"])
    assert geometry.is_metric
    assert geometry.num_points <= 2048
    np.testing.assert_allclose(geometry.world_from_cam.numpy(), row["world_from_cam"], atol=0.03)
    # Points lie on the floor, on walls, or in boxes that the row names.
    points = geometry.points.numpy().astype(np.float64)
    inside = np.zeros(len(points), dtype=bool)
    for item in row["objects"]:
        box = np.array(item["box"])
        cosine, sine = np.cos(box[6]), np.sin(box[6])
        local = (points - box[:3]) @ np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
        inside |= (np.abs(local) <= box[3:6] / 2 + 0.04).all(axis=1)
    edges = np.roll(corners, -1, axis=0) - corners
    inward = np.stack([-edges[:, 1], edges[:, 0]], axis=1) / np.linalg.norm(edges, axis=1)[:, None]
    to_walls = ((points[:, None, :2] - corners) * inward).sum(-1).min(axis=1)
    on_shell = (np.abs(points[:, 2]) < 0.06) | (to_walls < 0.06) | (points[:, 2] > row["size_m"][2] - 0.15)
    assert (inside | on_shell).mean() > 0.995


def test_contact_sheet_shows_rooms(world):
    out, _ = world
    picture = np.asarray(Image.open(out / "rooms.png").convert("L"), dtype=float)
    assert picture.shape[1] > 1500
    cell = picture[24 : 24 + 240, 24 : 24 + 320]
    assert 40 < cell.mean() < 220
    assert cell.std() > 15


def test_varied_rooms_span_the_ranges_and_stay_apart():
    """Areas over a factor of five, shelves over a factor of three, counts to ten, and nothing in anything else."""
    areas, shelves, counts = [], [], []
    for seed in range(24):
        try:
            room = make_varied_room(seed)
        except RuntimeError:
            continue
        areas.append(room.area)
        names = [item.category for item in room.objects]
        counts += [names.count(name) for name in set(names)]
        shelves += [item.parts.size().max() for item in room.objects if item.category in ("bookshelf", "plant")]
        half = np.array(room.size[:2]) / 2
        for item in room.objects:
            assert item.box[2] + item.box[5] / 2 < room.size[2]
            assert (np.abs(item.position[:2]) < half).all()
            assert item.parts.size().max() <= LENGTHS_M[item.category][1] * 1.35
    assert len(areas) >= 20
    assert max(areas) / min(areas) > 5
    assert max(shelves) / min(shelves) > 3
    assert max(counts) >= 10


def test_varied_rooms_repeat_and_refuse_an_unknown_type():
    first, again = make_varied_room(2), make_varied_room(2)
    assert [item.box.tolist() for item in first.objects] == [item.box.tolist() for item in again.objects]
    with pytest.raises(ValueError, match=r"`room_type` must be one of .*got 'attic'"):
        make_varied_room(0, room_type="attic")


def test_parquet_bytes_do_not_name_a_time_or_a_path(world):
    out, _ = world
    metadata = pq.read_schema(out / "questions" / "test.parquet").metadata
    assert metadata is None
    assert isinstance(pq.read_table(out / "scenes" / "test.parquet").schema, pa.Schema)
    assert str(out).encode() not in (out / "questions" / "test.parquet").read_bytes()
