# SPDX-License-Identifier: Apache-2.0
"""A folder of encoded scenes: keyed by content, bounded, shared by processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import geode
from geode.modeling_geode.scene_encoding_geode import SceneEncoding
from geode.modeling_geode.scene_store_geode import SceneStore
from tests.modeling_geode.test_asking_geode import make_model, make_processor


ROOT = Path(__file__).resolve().parents[2]
ROOM = geode.embedded_scene()
GEOMETRY = ROOM / "geometry"
# Writes and reads the scenes of a small store for a while, and reports each that is not what its key says.
WORKER = """
import sys
import torch
from geode.modeling_geode.scene_encoding_geode import SceneEncoding
from geode.modeling_geode.scene_store_geode import SceneStore

folder, seed, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store, wrong, hits = SceneStore(folder, None, max_bytes=int(sys.argv[4])), 0, 0
generator = torch.Generator().manual_seed(seed)
for _ in range(rounds):
    number = int(torch.randint(8, (), generator=generator))
    found = store.get(f"scene{number}")
    if found is None:
        tokens = torch.full((4, 9, 16), float(number))
        store.put(f"scene{number}", SceneEncoding(tokens, tokens[0], {"number": number}, "digest"))
    else:
        hits += 1
        wrong += found.summary != {"number": number} or not bool((found.visual_tokens == number).all())
print(wrong, hits)
"""


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def model(processor):
    return make_model(processor)


def small_scene(number: float, size: int = 4) -> SceneEncoding:
    tokens = torch.full((size, 9, 16), float(number))
    return SceneEncoding(tokens, tokens[0], {"number": number}, "digest")


def count_encodings(model, monkeypatch) -> list:
    calls, encode = [], model.encode_scene
    monkeypatch.setattr(model, "encode_scene", lambda **inputs: calls.append(1) or encode(**inputs))
    return calls


def test_a_scene_is_encoded_once(model, processor, tmp_path, monkeypatch):
    expected = model.encode_scene(**processor.prepare_scene(ROOM / "room.mp4", geometry=GEOMETRY))
    calls = count_encodings(model, monkeypatch)
    store = model.open_scene_store(tmp_path / "store", max_bytes=2**24)
    for _ in range(2):
        scene = store.encode(processor, ROOM / "room.mp4", geometry=GEOMETRY)
        assert torch.equal(scene.visual_tokens, expected.visual_tokens)
        assert torch.equal(scene.rationale_tokens, expected.rationale_tokens)
        assert (scene.summary, scene.encoder_digest) == (expected.summary, expected.encoder_digest)
    assert (len(calls), len(store)) == (1, 1)
    assert store.num_bytes == sum(path.stat().st_size for path in (tmp_path / "store").glob("*.safetensors"))
    # A copy elsewhere is the same scene, and another process or model object finds it.
    shutil.copy(ROOM / "room.mp4", tmp_path / "copy.mp4")
    shutil.copytree(GEOMETRY, tmp_path / "geometry")
    again = SceneStore(tmp_path / "store", model, max_bytes=2**24)
    again.encode(processor, tmp_path / "copy.mp4", geometry=tmp_path / "geometry")
    assert len(calls) == 1


def test_whatever_decides_an_encoding_is_in_its_key(model, processor, tmp_path):
    store, video = model.open_scene_store(tmp_path, max_bytes=2**24), ROOM / "room.mp4"
    keys = [
        store.key_of(processor, video, geometry=GEOMETRY),
        store.key_of(processor, video, geometry=GEOMETRY, num_frames=3),
        store.key_of(processor, video, geometry=GEOMETRY, num_geometry_frames=3),
        store.key_of(processor, video, use_geometry=False),
        store.key_of(processor, video),
    ]
    (tmp_path / "longer.mp4").write_bytes(video.read_bytes() + b"0")
    keys.append(store.key_of(processor, tmp_path / "longer.mp4", geometry=GEOMETRY))
    (tmp_path / "pictures").mkdir()
    for name in ("0.png", "1.png"):
        (tmp_path / "pictures" / name).write_bytes(name.encode())
        keys.append(store.key_of(processor, tmp_path / "pictures", geometry=GEOMETRY))
    shutil.copytree(GEOMETRY, tmp_path / "geometry")
    (tmp_path / "geometry" / "geometry.json").write_text((GEOMETRY / "geometry.json").read_text() + " ")
    keys.append(store.key_of(processor, video, geometry=tmp_path / "geometry"))
    changed = make_processor()
    changed.max_points = 100
    keys.append(store.key_of(changed, video, geometry=GEOMETRY))
    changed = make_processor()
    changed.image_processor.image_mean = [0.1, 0.2, 0.3]
    keys.append(store.key_of(changed, video, geometry=GEOMETRY))
    other = make_model(processor)
    with torch.no_grad():
        other.model.drm.queries.add_(1e-3)
    keys.append(other.open_scene_store(tmp_path, max_bytes=1).key_of(processor, video, geometry=GEOMETRY))
    assert len(set(keys)) == len(keys)
    # What is the processor's own is not another key; what decides nothing neither.
    assert store.key_of(processor, video, geometry=GEOMETRY, num_frames=processor.num_frames) == keys[0]
    assert store.key_of(processor, video, geometry=GEOMETRY, num_frames=None, use_geometry=True) == keys[0]
    assert store.key_of(processor, video, geometry=GEOMETRY, use_geometry=False) == keys[3]
    with pytest.raises(TypeError, match=r"Unknown options \['frames'\]"):
        store.key_of(processor, video, frames=3)
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        store.key_of(processor, tmp_path / "none.mp4")


def test_those_used_longest_ago_go(tmp_path):
    scene = small_scene(0)
    scene.save(tmp_path / "size.safetensors")
    size = (tmp_path / "size.safetensors").stat().st_size
    store = SceneStore(tmp_path / "store", None, max_bytes=3 * size + size // 2)
    for number in range(3):
        store.put(f"scene{number}", small_scene(number))
        # The times of a file system are coarse.
        os.utime(tmp_path / "store" / f"scene{number}.safetensors", ns=(number, number))
    assert store.get("scene0").summary == {"number": 0}  # used just now
    store.put("scene3", small_scene(3))
    assert [f"scene{number}" in store for number in range(4)] == [True, False, True, True]
    assert store.num_bytes <= store.max_bytes
    assert store.get("scene1") is None
    with pytest.raises(ValueError, match=rf"size of one scene, \d+ bytes, got {store.max_bytes}"):
        store.put("large", small_scene(9, size=40))
    assert "large" not in store
    for value in (0, 1.5, True):
        with pytest.raises(ValueError, match="`max_bytes` must be a whole number"):
            SceneStore(tmp_path / "store", None, max_bytes=value)


def test_damaged_and_unfinished_files_are_removed(tmp_path):
    store = SceneStore(tmp_path, None, max_bytes=2**20)
    store.put("whole", small_scene(1))
    data = (tmp_path / "whole.safetensors").read_bytes()
    for name, content in (("short", data[:-10]), ("header", data[:20]), ("other", b"not a scene"), ("empty", b"")):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        assert store.get(name) is None, name
        assert name not in store
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "encoding.safetensors").write_bytes(data)
    store.put("next", small_scene(2))
    assert not (tmp_path / "unfinished").exists()
    assert store.get("whole").summary == {"number": 1}


def test_processes_share_a_store(tmp_path):
    """Real processes write, read and evict at once: no scene is ever half there or another's, and the bound holds."""
    small_scene(0).save(tmp_path / "size.safetensors")
    bound = 4 * (tmp_path / "size.safetensors").stat().st_size
    arguments = [sys.executable, "-c", WORKER, str(tmp_path / "store")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [*arguments, str(seed), "60", str(bound)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        for seed in range(2)
    ]
    for worker in workers:
        printed, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0
        wrong, hits = map(int, printed.split())
        assert wrong == 0
        assert hits > 8
    store = SceneStore(tmp_path / "store", None, max_bytes=bound)
    assert 0 < store.num_bytes <= bound
    others = [path.name for path in (tmp_path / "store").iterdir() if path.suffix != ".safetensors"]
    assert others == [".lock"]
