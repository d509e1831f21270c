# SPDX-License-Identifier: Apache-2.0
"""VSI-Bench's score agrees with what the original scorers gave, case by case, and its intervals are those of scenes."""

import json
from pathlib import Path

import evaluate
import numpy as np
import pytest

from geode.evaluation.vsi_bench import vsi_bench
from geode.evaluation.vsi_bench.vsi_bench import (
    CHOICE_TYPES,
    DIRECTION,
    FREQUENCY,
    NUMBER_TYPES,
    RANDOM,
    TASKS,
    aggregate,
    bootstrap,
    first_number,
    guarded_score,
    mean_relative_accuracy,
    score,
    summarise,
)


GOLDEN = json.loads((Path(__file__).parents[1] / "fixtures/vsi_bench/golden.json").read_text("utf-8"))
CASES = GOLDEN["cases"] + GOLDEN["gt_edge_cases"]
FIELDS = {"official": "score_official", "lmms_eval": "score_lmms_eval_0_7_3"}


@pytest.mark.parametrize("scorer", FIELDS)
def test_every_golden_case_scores_or_raises_as_the_original_did(scorer):
    different = []
    for case in CASES:
        want = case[FIELDS[scorer]]
        try:
            got = score(case["question_type"], case["prediction"], case["ground_truth"], scorer)
        except (ArithmeticError, AttributeError) as error:
            got = {"raises": type(error).__name__}
        if got != want and not (isinstance(got, float) and abs(got - want) <= 1e-9):
            different.append((case, got))
    assert len(CASES) > 500
    assert different == []


@pytest.mark.parametrize("scorer", FIELDS)
def test_guarded_score_differs_only_where_truth_or_answer_is_no_measure(scorer):
    num_others = 0
    for case in CASES:
        want = case[FIELDS[scorer]]
        got = guarded_score(case["question_type"], case["prediction"], case["ground_truth"], scorer)
        truth = str(case["ground_truth"])
        if isinstance(want, dict) or truth.startswith("-") or truth.strip("0.") == "":
            num_others += 1
            assert got == 0.0
        else:
            assert got == pytest.approx(want, abs=1e-9)
    assert num_others >= 8


@pytest.mark.parametrize("run", GOLDEN["aggregate_runs"], ids=lambda run: run["name"])
def test_golden_runs_aggregate_as_the_original_did(run):
    types = [document["question_type"] for document in run["docs"]]
    scores = [
        score(*(document[name] for name in ("question_type", "prediction", "ground_truth")))
        for document in run["docs"]
    ]
    assert summarise(types, scores)["is_official"] == ("raises" not in run["official"])
    if "raises" in run["official"]:
        with pytest.raises(KeyError, match="object_rel_direction_medium"):
            aggregate(types, scores)
        apart = summarise(types, scores, types)
        assert {"object_rel_direction_easy", "object_rel_direction_hard"} < set(apart["tasks"])
        assert apart["intervals"].keys() == apart["tasks"].keys()
        return
    got = aggregate(types, scores)
    known = {
        name.removesuffix("_accuracy").removesuffix("_MRA:.5:.95:.05"): value
        for name, value in run["official"].items()
        if not name.startswith("tabulated")
    }
    assert {name: got[name] for name in known} == pytest.approx(known, abs=1e-9)
    summary = summarise(types, scores)
    for name, entry in run["per_question_type"].items():
        assert summary["types"][name] == pytest.approx(100 * entry["mean"], abs=1e-9)
        assert summary["n"][name] == entry["n"]
    assert summary["micro"] == pytest.approx(100 * np.mean(scores), abs=1e-9)


# What lmms-eval 0.7.3 was seen to read.
NUMBERS = {
    "three hundred and twenty-one": 321,
    "one thousand two hundred": 1200,
    "two hundred thousand and five": 200005,
    "one hundred one hundred": 10100,
    "a hundred": 100,
    "thousand and one": 1001,
    "seven eight": 15,
    "one and two": 3,
    "five or six": 5,
    "one apple, room 2": 1,
    "room 2 one": 2,
    "- 3": 3,
    "--3": -3,
    "1,200": 1,
    ".5": 5,
    "1e3": 1,
    "negative three": 3,
    "x3y": 3,
    "a dozen": None,
    "someone": None,
    "tenth": None,
    "": None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_first_number_is_the_first_in_digits_or_words(text):
    assert first_number(text) == NUMBERS[text]
    assert first_number(text.upper()) == NUMBERS[text]


def test_relative_accuracy_is_the_share_of_tolerances_that_are_kept():
    # Errors of 0, 7.5, 30, 50 and 100 percent; one that equals a tolerance keeps it.
    assert [mean_relative_accuracy(value, 2.0) for value in (2.0, 2.15, 1.4, 3.0, 4.0)] == [1.0, 0.9, 0.5, 0.1, 0.0]


def test_unknown_types_and_scorers_are_named():
    with pytest.raises(ValueError, match=r"route_planning.*got 'route'"):
        score("route", "A", "A")
    with pytest.raises(ValueError, match=r"lmms_eval.*got 'vlmevalkit'"):
        score("route_planning", "A", "A", "vlmevalkit")
    with pytest.raises(ValueError, match="got none"):
        aggregate([], [])


def test_metric_loads_from_its_folder_and_gives_the_same_figures(tmp_path):
    metric = evaluate.load(str(Path(vsi_bench.__file__).parent), cache_dir=str(tmp_path))
    documents = GOLDEN["aggregate_runs"][0]["docs"]
    inputs = {
        "predictions": [document["prediction"] for document in documents],
        "references": [document["ground_truth"] for document in documents],
        "question_types": [document["question_type"] for document in documents],
    }
    scenes = [f"scene {number % 40}" for number in range(len(documents))]
    found = metric.compute(**inputs, scenes=scenes)
    assert found["tasks"]["overall"] == pytest.approx(GOLDEN["aggregate_runs"][0]["official"]["overall"], abs=1e-9)
    other = metric.compute(**inputs, scorer="lmms_eval")
    want = GOLDEN["aggregate_runs"][0]["lmms_eval_0_7_3"]["overall"]
    assert other["tasks"]["overall"] == pytest.approx(100 * want, abs=1e-4)  # it rounds its parts to six digits
    assert found["tasks"].keys() == found["intervals"].keys()
    assert "intervals" not in other


def make_samples(num_scenes: int, per_scene: int, *, generator: np.random.Generator) -> tuple[list, list, list]:
    """Questions of a scene are all right or all wrong."""
    is_right = generator.random(num_scenes) < 0.6
    scenes = [f"{scene}" for scene in range(num_scenes) for _ in range(per_scene)]
    return ["route_planning"] * len(scenes), is_right.repeat(per_scene).astype(float).tolist(), scenes


def test_intervals_are_those_of_scenes_not_of_questions():
    types, scores, scenes = make_samples(60, 10, generator=np.random.default_rng(0))
    low, high = bootstrap(types, scores, scenes)["overall"]
    # Sixty draws of 0 or 100 have a standard error of sqrt(0.6 * 0.4 / 60), 6.3 percent; six hundred would have 2.
    assert 3.0 * 6.3 < high - low < 5.0 * 6.3
    assert low < aggregate(types, scores)["overall"] < high
    alone_low, alone_high = bootstrap(types, scores, [str(number) for number in range(600)])["overall"]
    assert alone_high - alone_low < 0.45 * (high - low)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator, hits = np.random.default_rng(1), 0
    for _ in range(200):
        low, high = bootstrap(*make_samples(50, 2, generator=generator), num_resamples=300, confidence=0.9)["overall"]
        hits += low <= 60.0 <= high
    assert 0.83 * 200 <= hits <= 0.96 * 200


def test_draws_without_a_task_count_for_the_others():
    types = ["route_planning"] * 5 + ["object_counting"]
    found = bootstrap(types, [1.0, 0.0, 1.0, 0.0, 1.0, 0.3], list("abcdef"))
    assert found["object_counting"] == pytest.approx((30.0, 30.0))
    assert np.isfinite(found["overall"]).all()


def test_directions_are_averaged_by_type():
    types = [*CHOICE_TYPES, *NUMBER_TYPES, "object_rel_direction_easy"]
    scores = [float(name == "object_rel_direction_easy") for name in types]
    assert aggregate(types, scores)[DIRECTION] == pytest.approx(100 / 3)
    assert set(aggregate(types, scores)) == {*TASKS, "overall"}


def test_chance_rows_are_those_of_the_paper():
    assert set(FREQUENCY) == set(TASKS)
    assert sum(FREQUENCY.values()) / 8 == pytest.approx(35.4625)
    assert set(RANDOM) < set(TASKS)
