# SPDX-License-Identifier: Apache-2.0
"""The tables' variants differ in what they say they do, and figures come out as the runs gave them."""

import math

import pytest
import torch
from PIL import Image

from benchmarks.paper_tables import (
    DIRECTIONS,
    TASKS,
    VARIANTS,
    ExchangedGeometry,
    columns,
    draw,
    summarise,
    write_table,
)
from geode.data.feature_store import FeatureStore
from geode.trainers.collator import GeodeDataCollator
from geode.trainers.precompute import VideoItem, precompute
from tests.trainers.common_collator import make_media, make_model, make_processor, make_records
from tests.trainers.common_precompute import make_video


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    root, processor = make_media(tmp_path_factory.mktemp("media")), make_processor()
    make_video(root / "rooms/other.mp4", seed=5)
    items = [VideoItem("rooms/one.mp4", "geometry/one"), VideoItem("rooms/other.mp4", "geometry/two")]
    folder = tmp_path_factory.mktemp("store") / "features"
    model = make_model(processor).eval()
    precompute(model, processor, items, folder, media_root=root, store_vision_features=True, has_progress=False)
    return root, processor, model, folder


def test_exchanged_geometry_is_another_rooms_beside_the_rooms_frames(stored):
    _, _, _, folder = stored
    own, exchanged = FeatureStore(folder), ExchangedGeometry(folder)
    first, second = (own.scene_of(f"rooms/{name}.mp4").tensors() for name in ("one", "other"))
    found = exchanged.scene_of("rooms/one.mp4").tensors()
    assert found.keys() == first.keys()
    assert found["video_features"].equal(first["video_features"])
    assert not found["video_features"].equal(second["video_features"])
    for name in ("point_tokens", "point_token_positions"):
        assert found[name].equal(second[name])
        assert not (found[name].shape == first[name].shape and found[name].equal(first[name]))


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_show_and_ask_what_the_table_says(stored, name):
    root, processor, model, folder = stored
    variant = VARIANTS[name]
    store = ExchangedGeometry(folder) if variant.is_exchanged else FeatureStore(folder)
    collator = GeodeDataCollator(
        processor=processor,
        media_root=root,
        feature_store=store,
        use_geometry=variant.use_geometry,
        with_values=variant.with_values,
    )
    batch = collator(make_records(count=4))
    assert ("point_tokens" in batch) == variant.use_geometry
    assert bool((batch["input_ids"] == processor.rationale_token_id).any()) == variant.use_geometry
    assert bool(batch["regression_targets"].isfinite().any()) == variant.with_values
    with torch.no_grad():
        assert model(**batch).loss.isfinite()


def scores_of(level: float) -> dict:
    scores = {task: {"n": 10, "score": level} for task in TASKS}
    scores[DIRECTIONS[0]] = {"n": 30, "score": level + 10.0}
    scores["object_localization"] = {"n": 10, "median_center_error_m": 100.0 / level, "share_within_1m": 0.25}
    return scores


def test_columns_weigh_directions_by_their_number():
    assert columns(scores_of(40.0)) == {
        "Abs. Dist.": 40.0,
        "Obj. Size": 40.0,
        "Rel. Dir.": pytest.approx(46.0),
        "Box centre, m": 2.5,
        "Box within 1 m": 25.0,
    }


def test_table_says_whether_true_geometry_is_better():
    def runs(level: float) -> list[dict]:
        return [columns(scores_of(level + noise)) for noise in (-1.0, 0.0, 1.0)]

    blind = dict.fromkeys(TASKS, 20.0)
    summary = summarise({"GEODE": runs(40.0), "GEODE, other geometry": runs(30.0)})
    assert summary["GEODE"]["Abs. Dist."] == (40.0, pytest.approx(1.0 / math.sqrt(3.0)))
    table = write_table(summary, blind, num_seeds=3)
    assert "| GEODE | 40.00 +- 0.58 |" in table
    assert "Abs. Dist.: true geometry is +10.00 from another room's, more than 2 x 0.82." in table
    close = summarise({"GEODE": runs(40.0), "GEODE, other geometry": runs(39.0)})
    assert "Rel. Dir.: true geometry is +1.00 from another room's, not more than" in write_table(
        close, blind, num_seeds=3
    )
    alone = summarise({"GEODE": runs(40.0)[:1], "GEODE, other geometry": runs(30.0)[:1]})
    assert "+10.00 from another room's, of one seed, without a standard error." in write_table(
        alone, blind, num_seeds=1
    )


def test_picture_has_a_panel_for_each_column(tmp_path):
    pytest.importorskip("matplotlib")
    runs = {
        name: [columns(scores_of(level + seed)) for seed in range(3)] for name, level in {"a": 30.0, "b": 40.0}.items()
    }
    for number, shown in enumerate((runs, {name: rows[:1] for name, rows in runs.items()})):
        path = tmp_path / f"{number}.png"
        draw(shown, dict.fromkeys(TASKS, 20.0), path)
        with Image.open(path) as picture:
            assert picture.width > 4 * picture.height
            assert len(picture.convert("L").getcolors()) > 10
