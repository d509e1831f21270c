# SPDX-License-Identifier: Apache-2.0
"""The tables' variants differ in what they say they do, and figures come out as the runs gave them."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks.paper_tables import (
    DIRECTIONS,
    TABLES,
    TASKS,
    VARIANTS,
    ExchangedGeometry,
    columns,
    draw,
    number_token_loss,
    overrides_of,
    summarise,
    write_table,
)
from geode.configuration.configuration_geode import GeodeConfig
from geode.data.feature_store import FeatureStore
from geode.trainers.collator import GeodeDataCollator
from geode.trainers.precompute import VideoItem, precompute
from geode.trainers.training_setup import load_model
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    processor = make_processor()
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    make_model(processor, value_feedback=False).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_show_and_ask_what_the_table_says(stored, checkpoint, name):
    root, _, _, folder = stored
    variant = VARIANTS[name]
    store = ExchangedGeometry(folder) if variant.is_exchanged else FeatureStore(folder)
    world = SimpleNamespace(records=make_records(count=6))
    overrides = overrides_of(variant, world, GeodeConfig.from_pretrained(checkpoint))
    model, processor = load_model(str(checkpoint), overrides=overrides), make_processor()
    processor.control_tokens = model.config.control_tokens
    collator = GeodeDataCollator(
        processor=processor,
        media_root=root,
        feature_store=store,
        use_geometry=variant.use_geometry,
        with_values=variant.with_values,
        num_rationale_tokens=variant.num_rationale_tokens,
    )
    batch = collator(make_records(count=4))
    assert ("point_tokens" in batch) == variant.use_geometry
    shown = int((batch["input_ids"] == processor.rationale_token_id).sum(dim=1)[0])
    most = variant.num_rationale_tokens or processor.num_rationale_tokens
    assert shown == (most if variant.use_geometry else 0)
    assert bool(batch["regression_targets"].isfinite().any()) == variant.with_values
    with torch.no_grad():
        assert model(**batch).loss.isfinite()


def test_overrides_change_what_their_names_say(checkpoint):
    world = SimpleNamespace(records=make_records(count=6))
    config = GeodeConfig.from_pretrained(checkpoint)

    def loaded(name: str):
        return load_model(str(checkpoint), overrides=overrides_of(VARIANTS[name], world, config))

    assert loaded("state before the token").drh.hidden_position == "previous"
    assert loaded("L1").drh.loss_name == "l1"
    assert loaded("rationale tokens alone").model.feature_injection is None
    assert loaded("GEODE").drh.feedback is None
    assert {name.split(".")[0] for name, _ in loaded("value feedback").drh.feedback.named_parameters()} == {
        "REG",
        "3DBBOX",
    }
    codec = loaded("log").config.control_tokens["<REG>"]["codec"]
    logs = [math.log(record.value_si) for record in world.records if record.value_si is not None]
    assert codec["transform"] == "log"
    assert codec["mean"] == pytest.approx([sum(logs) / len(logs)])


def test_tables_hold_known_variants_and_geode():
    assert {name for names in TABLES.values() for name in names} == set(VARIANTS)
    assert all("GEODE" in names for names in TABLES.values())


def test_number_loss_is_the_distance_of_the_mean_digit():
    logits, labels = torch.full((1, 3, 12), -30.0), torch.tensor([[-100, 5, 11]])
    logits[0, 0, 3] = logits[0, 0, 4] = 30.0  # digits 1 and 2 alike; the truth is digit 3
    logits[0, 1, 2] = 30.0  # no digit is learned there
    digits = range(2, 12)
    assert number_token_loss(logits, torch.tensor([[-100, 5, -100]]), digits) == pytest.approx(2.25)
    # The second label is digit 9, of which digit 0 is expected: 81 beside 2.25.
    assert number_token_loss(logits, labels, digits) == pytest.approx(0.5 * (2.25 + 81.0))
    assert number_token_loss(logits, torch.full((1, 3), -100), digits) == 0.0


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
