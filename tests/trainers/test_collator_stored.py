# SPDX-License-Identifier: Apache-2.0
"""Batches from a feature store are worth those from video files."""

import shutil

import pytest
import torch

from geode.data.feature_store import FeatureStore
from geode.trainers.collator import GeodeDataCollator
from geode.trainers.precompute import VideoItem, precompute
from tests.trainers.common_collator import (
    GEOMETRY,
    make_media,
    make_model,
    make_processor,
    make_records,
    text_record,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = make_media(tmp_path_factory.mktemp("media"))
    shutil.copy(root / "rooms/one.mp4", root / "rooms/two.mp4")  # with another geometry
    return root


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def model(processor):
    return make_model(processor).eval()


@pytest.fixture(scope="module", params=[True, False], ids=["frames", "clouds"])
def store(request, root, processor, model, tmp_path_factory):
    items = [VideoItem(f"rooms/{name}.mp4", f"geometry/{name}") for name in ("one", "two")]
    folder = tmp_path_factory.mktemp("store") / "features"
    precompute(
        model, processor, items, folder, media_root=root, store_vision_features=request.param, has_progress=False
    )
    return FeatureStore(folder)


def test_stored_batch_gives_the_losses_of_the_files(root, processor, model, store):
    options = {"processor": processor, "media_root": root}
    files, stored = (
        GeodeDataCollator(**options, geometry=GEOMETRY),
        GeodeDataCollator(**options, feature_store=store),
    )
    one, two = make_records(count=3), make_records("rooms/two.mp4", count=2)
    for examples in ([*one, *two], [one, two], [one, two[0]]):
        want, got = files(examples), stored(examples)
        assert "point_tokens" in got
        assert "point_features" not in got
        has_frames = store.options["vision_tower"] is not None
        assert ("video_features" in got) == has_frames
        assert ("pixel_values_videos" in got) != has_frames
        for name in ("input_ids", "labels", "attention_mask"):
            assert got[name].equal(want[name])
        targets = got["regression_targets"], want["regression_targets"]
        torch.testing.assert_close(*targets, rtol=1e-6, atol=1e-6, equal_nan=True)
        with torch.no_grad():
            torch.testing.assert_close(model(**got).loss, model(**want).loss, rtol=1e-5, atol=1e-5)


def test_rationales_are_learned_from_stored_features(root, processor, model, store):
    records = [text_record(rationale="It has a bed."), text_record(prompt="Why?", rationale="It has a lamp.")]
    options = {"processor": processor, "media_root": root, "target": "rationale"}
    want = GeodeDataCollator(**options, geometry=GEOMETRY)([records])
    got = GeodeDataCollator(**options, feature_store=store)([records])
    with torch.no_grad():
        torch.testing.assert_close(model(**got).loss, model(**want).loss, rtol=1e-5, atol=1e-5)


def test_geometry_can_be_left_out_of_stored_scenes(root, processor, model, store):
    records = make_records(count=3)
    options = {"processor": processor, "media_root": root, "use_geometry": False}
    want = GeodeDataCollator(**options, geometry=GEOMETRY)(records)
    got = GeodeDataCollator(**options, feature_store=store)(records)
    assert not [name for name in got if name.startswith(("point", "camera"))]
    with torch.no_grad():
        torch.testing.assert_close(model(**got).loss, model(**want).loss, rtol=1e-5, atol=1e-5)


def test_video_that_is_not_stored_is_named_with_its_record(root, processor, store):
    collator = GeodeDataCollator(processor=processor, media_root=root, feature_store={"rooms": store})
    with pytest.raises(ValueError, match=r"Record 'data:1': The store .* at 'rooms/none\.mp4'"):
        collator([text_record(uid="data:1", media="rooms/none.mp4")])
    with pytest.raises(ValueError, match=r"`feature_store`.*record 'data:2' is of 'other'"):
        collator([text_record(uid="data:2", source="other")])
    if store.options["vision_tower"] is not None:
        with pytest.raises(ValueError, match=r"'data:3' asks about 3 frames, and the store has the features of 4"):
            collator([text_record(uid="data:3", num_frames=3)])
