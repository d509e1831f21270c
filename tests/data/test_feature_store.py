# SPDX-License-Identifier: Apache-2.0
"""Reading stored features: by key and path, by memory map, in workers, and only with the encoders that made them."""

import copy
import json
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset

from geode.data.feature_store import (
    INDEX_FILE,
    MANIFEST_FILE,
    FeatureStore,
    StoredScene,
    collate_stored_scenes,
    frozen_encoder_digest,
    store_options,
)
from geode.modeling_geode.scene_geode import SceneGeometry
from geode.trainers.costs import stored_scene_bytes
from geode.trainers.precompute import VideoItem, precompute
from tests.trainers.common_precompute import load_model, make_rooms


pytestmark = pytest.mark.filterwarnings("ignore")
GIVEN, RECONSTRUCTED, SHORT, MISSING = "rooms/1.mp4", "rooms/0.mp4", "rooms/4.mp4", "rooms/missing.mp4"


@pytest.fixture(scope="module")
def parts():
    return load_model()


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    return root, [VideoItem(*item) for item in make_rooms(root)]


def make_store(parts, media, out, **options) -> FeatureStore:
    precompute(*parts, media[1], out, media_root=media[0], shard_size=2, has_progress=False, **options)
    return FeatureStore(out)


@pytest.fixture(scope="module")
def store(parts, media, tmp_path_factory) -> FeatureStore:
    return make_store(parts, media, tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="module")
def with_frames(parts, media, tmp_path_factory) -> FeatureStore:
    return make_store(parts, media, tmp_path_factory.mktemp("store") / "store", store_vision_features=True)


# ---- bytes ----


def test_bytes_of_a_scene_are_those_that_a_plan_counts(with_frames, parts):
    model, _ = parts
    tensors = with_frames.scene_of(GIVEN).tensors()
    (tokens, width), frames = tensors["point_tokens"].shape, tensors["video_features"]
    counted = stored_scene_bytes(
        point_tokens=tokens,
        point_width=width,
        cameras=len(tensors["camera_poses"]),
        frames=len(frames),
        patches=math.prod(model.config.patch_grid),
        vision_width=model.config.vision_config.hidden_size,
        feature_bytes=4,
    )
    small = sum(tensors[name].nbytes for name in ("log_scale", "scale_known"))
    assert frames.nbytes == counted["vision"]
    assert sum(value.nbytes for value in tensors.values()) == sum(counted.values()) + small
    assert small < 16


# ---- keys ----


def test_store_is_a_mapping_of_keys_that_paths_lead_to(store):
    assert len(store) == len(store.keys()) == 5
    assert set(store) == set(store.keys()) == {store.key_of(f"rooms/{number}.mp4") for number in range(5)}
    key = store.key_of(GIVEN)
    assert key in store
    assert GIVEN not in store
    assert isinstance(store[key], StoredScene)
    assert store[key].key == store.scene_of(GIVEN).key == key


def test_unknown_and_failed_videos_say_why_and_what_to_do(store):
    with pytest.raises(KeyError, match=r"has none of its 6 videos at 'rooms/9.mp4'. Paths are relative"):
        store.key_of("rooms/9.mp4")
    with pytest.raises(KeyError, match=r"'rooms/missing.mp4' could not be stored: There is no such file. Repair it"):
        store.key_of(MISSING)
    with pytest.raises(KeyError, match=r"no scene of key 'abc'; `key_of` gives"):
        store["abc"]


def test_folder_without_a_store_or_with_half_of_one_is_refused(store, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no manifest.json, so it is no feature store. `geode precompute`"):
        FeatureStore(tmp_path)
    manifest = (store.folder / MANIFEST_FILE).read_text()
    (tmp_path / MANIFEST_FILE).write_text(manifest)
    with pytest.raises(FileNotFoundError, match=r"no index.json, so it is not complete. Run the same"):
        FeatureStore(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text(manifest.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ValueError, match=r"must have `format_version` 1, got 2"):
        FeatureStore(tmp_path)


# ---- scenes ----


def test_scene_of_given_geometry_is_what_the_encoder_makes_of_it(store, parts, media):
    model, processor = parts
    geometry = SceneGeometry.load(media[0] / "geometry/1")
    inputs = processor.prepare_scene(video=media[0] / GIVEN, geometry=geometry)
    names = ("point_features", "point_coords", "point_grid_coords", "point_mask")
    with torch.no_grad():
        expected = model.get_point_tokens(**{name: inputs[name] for name in names})
    tensors = store.scene_of(GIVEN).tensors()
    assert sorted(tensors) == ["camera_poses", "log_scale", "point_token_positions", "point_tokens", "scale_known"]
    for name in ("point_tokens", "point_token_positions"):
        torch.testing.assert_close(tensors[name], expected[name][0, 0], atol=1e-5, rtol=1e-5)
    assert torch.equal(tensors["camera_poses"], inputs["camera_poses"][0, 0])
    assert len(tensors["camera_poses"]) == processor.num_geometry_frames == 4  # of six
    assert tensors["scale_known"].item() is True
    assert store.scene_of(GIVEN).geometry is None


def test_scene_of_a_video_alone_keeps_its_reconstruction(store, parts, media):
    model, processor = parts
    inputs = processor.prepare_scene(video=media[0] / RECONSTRUCTED)
    names = ("geometry_frames", "geometry_frame_mask", "scene_mask", "geometry_content_boxes")
    ((expected,),) = model.model.reconstruct_scenes(**{name: inputs[name] for name in names})
    found = store.scene_of(RECONSTRUCTED).geometry
    for name in ("points", "colors", "normals", "world_from_cam", "intrinsics", "scene_from_dataset"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
    assert found.image_size == expected.image_size
    assert found.summary()["scale_source"] == "unknown"
    assert store.scene_of(RECONSTRUCTED).tensors()["scale_known"].item() is False


def test_reconstructions_are_left_out_if_asked(parts, media, tmp_path):
    store = make_store(parts, media, tmp_path / "store", store_geometry=False)
    assert store.scene_of(RECONSTRUCTED).geometry is None
    names = store.scene_of(RECONSTRUCTED).facts["tensors"]
    assert "scene_from_dataset" in names
    assert "points" not in names


def test_boxes_go_where_the_points_went(store, media):
    boxes = torch.tensor([[2.0, 1.5, 1.0, 0.4, 0.6, 0.8, 0.3]])
    expected = SceneGeometry.load(media[0] / "geometry/1").boxes_in_scene(boxes)
    found = store.scene_of(GIVEN).boxes_in_scene(boxes)
    assert torch.equal(found, expected)
    assert not torch.equal(found[:, :3], boxes[:, :3])


def test_part_of_a_chat_is_a_video_or_a_scene(store, with_frames, parts):
    scene = store.scene_of(GIVEN)
    assert scene.as_part("a/b.mp4") == {"type": "video", "path": "a/b.mp4", "geometry": scene}
    scene = with_frames.scene_of(SHORT)
    assert scene.as_part("a/b.mp4") == {"type": "scene", "scene": scene}
    assert scene.num_frames == len(scene.tensors()["video_features"]) == 2
    with pytest.raises(ValueError, match=r"no features of the vision tower.* `as_part`"):
        _ = store.scene_of(SHORT).num_frames


def test_processor_writes_as_many_placeholders_as_for_the_video(with_frames, parts, media):
    _, processor = parts

    def ids(part, **options):
        chat = [{"role": "user", "content": [part, {"type": "text", "text": "How big is it?"}]}]
        return processor.apply_chat_template(chat, tokenize=True, return_dict=True, **options)["input_ids"]

    video = {"type": "video", "path": str(media[0] / SHORT)}
    scene = with_frames.scene_of(SHORT).as_part(media[0] / SHORT)
    assert torch.equal(ids(scene), ids(video))
    assert torch.equal(ids(scene, num_rationale_tokens=3), ids(video, num_rationale_tokens=3))


def test_scene_keeps_the_settings_it_was_made_with(store):
    scene = store.scene_of(GIVEN)
    inputs = scene.to_model_inputs(0.2, max_points=1024, num_cameras=4)
    assert inputs.keys() == scene.tensors().keys()
    with pytest.raises(ValueError, match=r"`grid_size` 0.1 instead of the stored 0.2"):
        scene.to_model_inputs(0.1, max_points=1024, num_cameras=4)
    with pytest.raises(
        ValueError, match=r"`max_points` null instead of the stored 1024.*`num_geometry_frames` 8 inst"
    ):
        scene.to_model_inputs(0.2, num_cameras=8)


def test_geometry_of_a_part_never_brings_features_of_frames(with_frames):
    """The processor reads the frames itself there."""
    scene = with_frames.scene_of(GIVEN)
    assert "video_features" in scene.tensors()
    assert "video_features" not in scene.to_model_inputs(0.2, max_points=1024, num_cameras=4)


def test_collated_scenes_are_padded_and_masked(with_frames):
    a, b, c = (with_frames.scene_of(path) for path in (GIVEN, RECONSTRUCTED, SHORT))
    batch = collate_stored_scenes([[a, c], [], [b]])
    assert batch["scene_mask"].tolist() == [[True, True], [False, False], [True, False]]
    assert batch["video_frame_mask"].sum(dim=2).tolist() == [[4, 2], [0, 0], [4, 0]]
    for (row, column), scene in {(0, 0): a, (0, 1): c, (2, 0): b}.items():
        tensors = scene.tensors()
        for name, mask in (
            ("point_tokens", "point_token_mask"),
            ("point_token_positions", "point_token_mask"),
            ("video_features", "video_frame_mask"),
            ("camera_poses", "camera_mask"),
        ):
            keep = batch[mask][row, column]
            assert torch.equal(batch[name][row, column][keep], tensors[name])
            assert batch[name][row, column][~keep].abs().sum() == 0


# ---- which encoders ----


def test_check_accepts_what_training_changes_and_nothing_else(with_frames, parts):
    model, processor = copy.deepcopy(parts[0]), copy.deepcopy(parts[1])
    with torch.no_grad():
        for name in ("multi_modal_projector", "drm", "language_model"):
            next(getattr(model.model, name).parameters()).add_(1)
    with_frames.check(model.train(), processor)
    stored = with_frames.options["point_encoder"]["digest"]
    with torch.no_grad():
        next(model.model.point_encoder.parameters()).add_(1)
    new = frozen_encoder_digest(model, "point_encoder")
    with pytest.raises(ValueError, match=rf'`point_encoder.digest` "{new}" instead of the stored "{stored}"'):
        with_frames.check(model, processor)


@pytest.mark.parametrize("name", ["vision_tower", "reconstructor"])
def test_check_names_each_encoder_that_differs(with_frames, parts, name):
    model = copy.deepcopy(parts[0])
    with torch.no_grad():
        next(getattr(model.model, name).parameters()).add_(1)
    with pytest.raises(ValueError, match=rf"other encoders or settings than this model's: `{name}.digest` [^;]*$"):
        with_frames.check(model, parts[1])


def test_check_compares_only_what_is_stored(store, parts):
    model, processor = copy.deepcopy(parts[0]), copy.deepcopy(parts[1])
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).add_(1)
    processor.num_frames = 7  # frames are read in training
    model.detach_reconstructor()
    processor.geometry_frame_size = None
    store.check(model, processor)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_geometry_frames", 3, "`point_encoder.num_geometry_frames` 3 instead of the stored 4"),
        ("num_frames", 3, "`vision_tower.num_frames` 3 instead of the stored 4"),
        ("geometry_frame_size", 42, "`reconstructor.geometry_frame_size` 42 instead of the stored 28"),
    ],
)
def test_check_compares_the_processor(with_frames, parts, name, value, message):
    processor = copy.deepcopy(parts[1])
    setattr(processor, name, value)
    with pytest.raises(ValueError, match=message):
        with_frames.check(parts[0], processor)


def test_check_refuses_an_encoder_that_trains(store, parts):
    model = copy.deepcopy(parts[0])
    model.model.point_encoder.requires_grad_(True)
    with pytest.raises(ValueError, match=r"The `point_encoder` would train.*Freeze it"):
        store.check(model, parts[1])


def test_digest_survives_saving_and_is_of_one_encoder(parts, tmp_path):
    model = parts[0]
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    digests = [frozen_encoder_digest(model, name) for name in ("point_encoder", "vision_tower", "reconstructor")]
    assert len(set(digests)) == 3
    for name, digest in zip(("point_encoder", "vision_tower", "reconstructor"), digests, strict=True):
        assert frozen_encoder_digest(loaded, name) == frozen_encoder_digest(model.model, name) == digest
    with pytest.raises(ValueError, match="got 'drm'"):
        frozen_encoder_digest(model, "drm")


def test_options_say_only_what_decides_the_features(parts):
    options = store_options(*parts, has_reconstructions=False, has_video_features=False)
    assert (options["reconstructor"], options["vision_tower"]) == (None, None)
    assert json.loads(json.dumps(options)) == options


# ---- memory ----


class Scenes(Dataset):
    def __init__(self, store: FeatureStore, paths: list[str]):
        self.store, self.paths = store, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> StoredScene:
        return self.store.scene_of(self.paths[index])


def collate(scenes: list[StoredScene]) -> dict[str, torch.Tensor]:
    return collate_stored_scenes([[scene] for scene in scenes])


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_a_store_that_the_parent_has_opened(with_frames, context):
    paths = [GIVEN, RECONSTRUCTED, SHORT, "rooms/3.mp4"]
    with_frames.scene_of(paths[0]).tensors()
    options = {"batch_size": 2, "collate_fn": collate, "multiprocessing_context": context}
    batches = list(DataLoader(Scenes(with_frames, paths), num_workers=2, **options))
    for batch, start in zip(batches, (0, 2), strict=True):
        expected = collate([with_frames.scene_of(path) for path in paths[start : start + 2]])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_pickled_store_is_small_and_opens_its_shards_anew(with_frames):
    with_frames.scene_of(GIVEN).tensors()
    copied = pickle.loads(pickle.dumps(with_frames))
    assert copied._open_shards == {}
    assert torch.equal(
        copied.scene_of(GIVEN).tensors()["point_tokens"], with_frames.scene_of(GIVEN).tensors()["point_tokens"]
    )


def test_a_shard_that_was_cut_is_named(store, tmp_path):
    for path in store.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "shard-00000.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-4])
    cut = FeatureStore(tmp_path)
    key = next(key for key, facts in cut.entries.items() if facts["shard"] == 0)
    with pytest.raises(ValueError, match=rf"must have {size} bytes, got {size - 4}. It is damaged: run the same"):
        cut[key].tensors()


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_shards_lie_in_the_store(store, tmp_path, name):
    folder = Path(shutil.copytree(store.folder, tmp_path / "store"))
    index = json.loads((folder / INDEX_FILE).read_text())
    index["shards"][0]["file"] = name
    del index["crc32"]  # as one would who means harm
    (folder / INDEX_FILE).write_text(json.dumps(index))
    other = FeatureStore(folder)
    with pytest.raises(ValueError, match=f"must lie in it, and {INDEX_FILE} names '{name}'"):
        other[next(key for key, entry in other.entries.items() if entry["shard"] == 0)].tensors()


READ_ONE = """
import sys
from geode.data.feature_store import FeatureStore

def resident() -> int:
    lines = open("/proc/self/status", encoding="ascii").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024

store = FeatureStore(sys.argv[1])
store["small"].tensors()["point_tokens"].sum()
import torch
before = resident()
large = store["large"].tensors()["point_tokens"]
value = float(large[1000].sum())
after_one_row = resident() - before
large.sum()
print(value, large.numel() * 4, after_one_row, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_maps_the_file_and_loads_only_what_is_touched(store, tmp_path):
    """Of a tensor of 128 MiB one row is read: memory grows by some pages, and by the whole only once all is read."""
    tensors = {"small.point_tokens": torch.ones(4), "large.point_tokens": torch.ones(2**15, 2**10)}
    shard = save(tensors)
    (tmp_path / "shard-00000.safetensors").write_bytes(shard)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(store.manifest))
    index = {
        "scenes": {key: {"shard": 0, "tensors": ["point_tokens"]} for key in ("small", "large")},
        "paths": {},
        "failures": {},
        "shards": [{"file": "shard-00000.safetensors", "bytes": len(shard)}],
    }
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    command = [sys.executable, "-W", "ignore", "-c", READ_ONE, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    value, size, one_row, everything = map(float, output.split())
    assert value == 1024
    assert size == 2**27
    assert one_row < 0.05 * size
    assert everything > 0.9 * size
