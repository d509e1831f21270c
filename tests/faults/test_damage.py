# SPDX-License-Identifier: Apache-2.0
"""
Bits that flip, and files that end too early: whatever is read is what was written, or an error names the file.

The bits are new in each run; `FAULTS_SEED` repeats those of a failure, whose output names it. Checkpoints are damaged in
`tests/trainers/test_resume.py`.
"""

import random
import shutil
from pathlib import Path

import pytest
import torch

import geode
from geode.data.feature_store import FeatureStore
from geode.evaluation.prediction_files import read_finished
from geode.modeling_geode.scene_encoding_geode import SceneEncoding
from geode.modeling_geode.scene_geode import SceneGeometry
from tests.faults.common_faults import seeded_generator
from tests.trainers.common_precompute import content_of


NUM_FLIPS = 60


@pytest.fixture
def generator() -> random.Random:
    return seeded_generator()


def flip(path: Path, generator: random.Random, *, within: int | None = None) -> None:
    """Flip a bit of a file, by default anywhere."""
    content = bytearray(path.read_bytes())
    content[generator.randrange(within or len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def assert_seen(read, expected, folder: Path, path: Path, generator: random.Random) -> None:
    """Damage one file of a copy again and again: reading it gives what it held, or an error that names it."""
    content, num_seen = path.read_bytes(), 0
    for number in range(NUM_FLIPS):
        # Every third bit in the header or the first lines, where little of the file is and much depends on it.
        flip(path, generator, within=min(len(content), 400) if number % 3 == 0 else None)
        if number % 10 == 9:
            path.write_bytes(content[: generator.randrange(len(content))])
        damaged = path.read_bytes()
        found, error = expected, None
        try:
            found = read(folder)
        except (ValueError, FileNotFoundError) as raised:
            error, num_seen = str(raised), num_seen + 1
        assert error is None or path.name in error or "index.json" in error, (error, damaged)
        # Nothing is seen of, say, a bit of the name of a checksum.
        assert found == expected, damaged
        path.write_bytes(content)
    assert num_seen > NUM_FLIPS // 2


def same(tensors: dict) -> dict:
    """Tensors as what can be compared."""
    return {name: (str(tensor.dtype), tensor.tolist()) for name, tensor in tensors.items()}


def read_store(folder: Path):
    store = FeatureStore(folder)
    scenes = {key: (facts, same(store.read(key, facts["tensors"]))) for key, facts in store.entries.items()}
    return store.options, store.paths, store.failures, scenes


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "index.json", "manifest.json"])
def test_damaged_feature_store_is_seen(precompute_kills, places, tmp_path, generator, name):
    folder = Path(shutil.copytree(places / "store", tmp_path / "store"))
    assert_seen(read_store, read_store(folder), folder, folder / name, generator)


def test_damaged_store_is_made_again_by_the_same_command(
    precompute_kills, zygote, precompute_arguments, places, tmp_path, generator
):
    folder = Path(shutil.copytree(places / "store", tmp_path / "store"))
    for name in ("shard-00000.safetensors", "shard-00002.safetensors", "index.json"):
        content = bytearray((folder / name).read_bytes())
        content[generator.randrange(len(content) // 2, len(content) - 2)] ^= 4
        (folder / name).write_bytes(content)
    kept = (folder / "shard-00001.safetensors").stat().st_mtime_ns
    assert zygote.run(precompute_arguments(folder), folder).code == 0
    assert content_of(folder) == content_of(places / "store")
    assert (folder / "shard-00001.safetensors").stat().st_mtime_ns == kept


def test_damaged_geometry_is_seen(tmp_path, generator):
    folder = tmp_path / "geometry"
    SceneGeometry.load(geode.embedded_scene() / "geometry").save(folder)

    def read(folder):
        scene = SceneGeometry.load(folder)
        tensors = {name: value for name, value in vars(scene).items() if isinstance(value, torch.Tensor)}
        return same(tensors), {name: value for name, value in vars(scene).items() if name not in tensors}

    for name in ("geometry.json", "geometry.safetensors"):
        assert_seen(read, read(folder), folder, folder / name, generator)


def test_damaged_scene_encoding_is_seen(tmp_path, generator):
    path = tmp_path / "scene.safetensors"
    tokens = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    SceneEncoding(tokens, tokens[0], {"is_metric": True, "num_points": 7}, "0123456789abcdef").save(path)

    def read(_):
        scene = SceneEncoding.load(path)
        tensors = {"visual": scene.visual_tokens, "rationale": scene.rationale_tokens}
        return same(tensors), scene.summary, scene.encoder_digest

    assert_seen(read, read(path), path, path, generator)


def test_damaged_predictions_are_seen(eval_kills, places, tmp_path, generator):
    folder = Path(shutil.copytree(places / "eval", tmp_path / "eval"))
    names = read_finished(folder)[1][0].keys()

    def read(folder):
        # A flipped bit of the name of the checksum leaves a line without it, and with another name.
        run, lines = read_finished(folder)
        return run, [{name: line[name] for name in names} for line in lines]

    assert_seen(read, read(folder), folder, folder / "predictions.jsonl", generator)


@pytest.mark.slow
def test_damaged_rooms_are_made_again_by_the_same_command(
    rooms_kills, zygote, rooms_arguments, places, tmp_path, generator
):
    """A film of which one bit is another can be shown, and shows something else."""
    folder = Path(shutil.copytree(places / "rooms", tmp_path / "rooms"))
    for name in (
        "rooms/room_000000.mp4",
        "depth/room_000001.safetensors",
        "geometry/room_000001/geometry.json",
        "questions/train.parquet",
        "baselines.json",
        "SHA256SUMS",
    ):
        flip(folder / name, generator)
    assert content_of(folder) != content_of(places / "rooms")
    assert zygote.run(rooms_arguments(folder), folder).code == 0
    assert content_of(folder) == content_of(places / "rooms")
