# SPDX-License-Identifier: Apache-2.0
"""How much of the questions one answers without the video: the bounds that the embedded world promises."""

import math
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from geode.data.synthetic_rooms.balance import NUMBER_BINS, draw_candidates, select_evenly
from geode.data.synthetic_rooms.baselines import (
    READING,
    TOLERANCES,
    best_blind,
    best_constant,
    blind_baselines,
    mean_relative_accuracy,
)
from geode.data.synthetic_rooms.dataset import ask, select_split
from geode.data.synthetic_rooms.questions import QUESTION_TYPES, SIZE, Question, scene_questions, subjects_of
from geode.data.synthetic_rooms.render import Raycaster, Walk
from geode.data.synthetic_rooms.scene import describe_scene
from geode.data.synthetic_rooms.varied_rooms import make_varied_room
from geode.data.synthetic_rooms.walks import pinhole_intrinsics, plan_walk, scene_from_room


NUM_SCENES = 56
MAX_MRA = {
    "object_counting": 50.0,
    "object_abs_distance": 40.0,
    "object_size_estimation": 40.0,
    "room_size_estimation": 40.0,
}
MAX_GAIN = 3.0


def make_record(seed):
    """The record of a room as a coarse film of it sees it: ids alone, no pictures."""
    size, num_frames = (36, 48), 8
    try:
        room = make_varied_room(seed)
    except RuntimeError:
        return None
    caster, intrinsics = Raycaster(room), pinhole_intrinsics(size, 85.0)
    cameras = plan_walk(room, np.random.default_rng(seed), num_frames=num_frames)
    views = [caster.depth_and_ids(camera, intrinsics, image_size=size) for camera in cameras]
    depth, ids = (np.stack(maps) for maps in zip(*views, strict=True))
    scene = scene_from_room(cameras[0])
    return describe_scene(room, Walk(np.zeros(0), depth, ids, scene @ cameras, intrinsics, scene))


@pytest.fixture(scope="module")
def records():
    pytest.importorskip("embreex", reason="visibility needs embreex, the extra `world`")
    made = [make_record(9_000 + number) for number in range(NUM_SCENES)]
    return [record for record in made if record is not None]


def rows_of(chosen):
    return [question.row(0, {"dataset": "", "scene_name": ""}) for questions in chosen for question in questions]


@pytest.fixture(scope="module")
def candidates(records):
    return [ask(record, index=number, seed=0) for number, record in enumerate(records)]


def both_ways(halves):
    """Fit on either half, score on the other: twice as many questions scored."""
    tables = [blind_baselines(halves[0], halves[1]), blind_baselines(halves[1], halves[0])]
    merged = {}
    for name in tables[0]:
        counts = [table[name]["n"] for table in tables]
        merged[name] = {
            column: sum(table[name][column] * number for table, number in zip(tables, counts, strict=True))
            / sum(counts)
            for column in tables[0][name]
        }
        merged[name]["n"] = sum(counts)
    return merged


def violations(table):
    """Return every bound that a table of baselines breaks, as text."""
    broken = []
    for name, scores in table.items():
        best, reading = best_blind(scores), max(scores[column] for column in READING if column in scores)
        if name in MAX_MRA:
            if best > MAX_MRA[name]:
                broken.append(f"{name}: a constant scores {best:.1f} MRA, n={scores['n']:.0f}")
            if reading > scores["best constant"] + MAX_GAIN:
                broken.append(f"{name}: reading adds {reading - scores['best constant']:.1f}, n={scores['n']:.0f}")
        elif best > scores["chance"] + MAX_GAIN:
            broken.append(f"{name}: {best:.1f} % against a chance of {scores['chance']:.1f}, n={scores['n']:.0f}")
    return broken


def test_blind_baselines_stay_within_the_bounds(candidates):
    half = len(candidates) // 2
    halves = [
        rows_of(select_split(part, "train", seed=seed))
        for seed, part in ((1, candidates[:half]), (2, candidates[half:]))
    ]
    table = both_ways(halves)
    assert set(table) == set(QUESTION_TYPES) - {"object_localization"}
    assert min(scores["n"] for scores in table.values()) >= 20
    assert violations(table) == []


def test_blind_baselines_break_the_bounds_without_the_selection(candidates):
    """The same rooms, and questions as they come: names tell sizes, and turns have favourites."""
    half = len(candidates) // 2
    halves = [
        [row for scene in part for name in QUESTION_TYPES for row in rows_of([scene[name][:16]])]
        for part in (candidates[:half], candidates[half:])
    ]
    broken = violations(both_ways(halves))
    assert any(line.startswith("object_size_estimation: reading adds") for line in broken)
    assert len(broken) >= 3


@pytest.mark.slow
def test_blind_baselines_of_a_built_world_stay_within_the_bounds():
    """Over the data set that `GEODE_WORLD` names, with its own splits."""
    folder = os.environ.get("GEODE_WORLD")
    if folder is None:
        pytest.skip("set GEODE_WORLD to a folder that `geode data rooms` wrote")
    rows = {
        split: pq.read_table(Path(folder) / "questions" / f"{split}.parquet").to_pylist()
        for split in ("train", "validation", "test")
    }
    assert violations(blind_baselines(rows["train"], rows["validation"] + rows["test"])) == []


# The measures themselves.


def test_mean_relative_accuracy_counts_the_ten_thresholds_inclusively():
    # |4 - 5| / 5 = 0.2 lies at 1 - 0.8, which is 0.19999999999999996 in binary: passed are 0.5, 0.45, ..., 0.25.
    assert mean_relative_accuracy(4.0, np.array([5.0]))[0] == pytest.approx(0.6)
    # |3 - 2| / 2 = 0.5 is allowed by the widest threshold alone.
    assert mean_relative_accuracy(3.0, np.array([2.0]))[0] == pytest.approx(0.1)
    assert mean_relative_accuracy(7.0, np.array([7.0]))[0] == 1.0
    assert len(TOLERANCES) == 10
    assert TOLERANCES[0] == 0.5


def test_best_constant_scores_as_derived_on_a_logarithmic_spread():
    """
    For log-uniform answers over a ratio R a constant gets the mean of log((1 + t) / (1 - t)) over the thresholds t, over
    log R: (1.0986 + .9694 + .8473 + .7309 + .6190 + .5108 + .4055 + .3023 + .2007 + .1001) / 10 / log 20 = 0.1931.
    """
    truth = np.exp(np.linspace(0.0, math.log(20.0), 20_001))
    assert mean_relative_accuracy(best_constant(truth), truth).mean() == pytest.approx(0.1931, abs=0.002)


def row(question_type, question, truth, options=None):
    return {"question_type": question_type, "question": question, "ground_truth": truth, "options": options}


def test_blind_baselines_find_planted_leaks():
    """Sizes that follow from the category, and an answer that is always the first letter."""
    sizes = [
        row("object_size_estimation", SIZE.format(name), str(value)) for name, value in (("ball", 40), ("bed", 200))
    ]
    order = "What will be the first-time appearance order of the following categories in the video: a, b, c, d?"
    options = ["A. a, b, c, d", "B. b, a, c, d", "C. d, c, b, a", "D. c, a, b, d"]
    rows = sizes * 20 + [row("obj_appearance_order", order, "A", options)] * 20
    table = blind_baselines(rows, rows)
    assert table["object_size_estimation"]["best constant by name"] == 100.0
    assert table["object_size_estimation"]["best constant"] == 50.0
    assert table["obj_appearance_order"]["majority letter"] == 100.0
    assert table["obj_appearance_order"]["chance"] == 25.0
    assert violations(table) == [
        "object_size_estimation: a constant scores 50.0 MRA, n=40",
        "object_size_estimation: reading adds 50.0, n=40",
        "obj_appearance_order: 100.0 % against a chance of 25.0, n=20",
    ]


# The selection.


def size_question(name, value):
    return Question("object_size_estimation", SIZE.format(name), f"{value:.0f}", None, value, "cm", value / 100)


def test_select_evenly_asks_about_a_category_only_as_widely_as_it_varies():
    """Balls are small in every scene, shelves come in all sizes: of the balls few are asked about."""
    rng = np.random.default_rng(0)
    scenes = [
        [size_question("ball", 50.0), size_question("bookshelf", float(np.exp(rng.uniform(*np.log((36, 220))))))]
        for _ in range(300)
    ]
    chosen = [question for scene in select_evenly(scenes, per_scene=2, seed=[0]) for question in scene]
    names = [subjects_of(question.question_type, question.question)[0] for question in chosen]
    assert names.count("ball") < 20
    assert names.count("bookshelf") > 150
    counts = np.histogram([question.value for question in chosen], NUMBER_BINS["object_size_estimation"])[0]
    assert counts.max() - counts.min() < 0.4 * counts.mean()


def test_select_evenly_never_asks_for_numbers_outside_the_bins():
    assert select_evenly([[size_question("clock", 20.0), size_question("bed", 400.0)]], per_scene=2, seed=[0]) == [[]]


def test_draw_candidates_keeps_rare_answers(records):
    questions = scene_questions(records[0], seed=0)
    medium = [question for question in questions if question.question_type == "object_rel_direction_medium"]
    contents = [question.options["ABC".index(question.ground_truth)][3:] for question in medium]
    kept = draw_candidates(medium, limit=9, seed=[4])
    rare = min(set(contents), key=contents.count)
    answers = [question.options["ABC".index(question.ground_truth)][3:] for question in kept]
    assert len(kept) == 9
    assert answers.count(rare) >= min(3, contents.count(rare))
    assert kept == draw_candidates(medium, limit=9, seed=[4])
