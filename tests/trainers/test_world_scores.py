# SPDX-License-Identifier: Apache-2.0
"""Scores of answers, the table beside blind baselines, and the card that holds it."""

import dataclasses
import math

import pytest

from geode.modeling_geode.answers_geode import Answer, Box3D, Measurement
from geode.trainers.world import STAGES, STEPS
from geode.trainers.world_card import build_world_card, gate_table
from geode.trainers.world_scores import BOX_TASK, blind_scores, score_answers, score_table
from tests.trainers.common_collator import text_record


SIZE = dataclasses.replace(
    text_record(), kind="number", question_type="object_size_estimation", value=150.0, unit="cm", value_si=1.5
)
BOX = dataclasses.replace(text_record(), kind="box", question_type=BOX_TASK, box=[1.0, 2.0, 0.5, 1.0, 1.0, 1.0, 0.0])
CHOICE = dataclasses.replace(text_record(), kind="choice", question_type="route_planning", letter="B")


def said(text: str, *, si_value: float | None = None, center=None) -> Answer:
    values = [] if si_value is None else [Measurement("<REG>", 100.0 * si_value, "cm", si_value)]
    boxes = [] if center is None else [Box3D.from_values([*center, 1.0, 1.0, 1.0, 0.0])]
    return Answer(text=text, values=values, boxes=boxes)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (said("150.00 cm", si_value=1.5), 100.0),
        (said("194.00 cm", si_value=1.94), 50.0),  # 29.3 % off
        (said("194"), 50.0),  # digits are in the asked unit
        (said("1.94"), 0.0),
        (said("It is large."), 0.0),
    ],
)
def test_numbers_are_scored_as_values_or_as_digits(answer, score):
    found = score_answers([SIZE], [answer])["object_size_estimation"]
    assert found["n"] == 1
    assert found["score"] == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (said("a box", center=(1.0, 2.0, 1.5)), 1.0),
        (said("[1.0, 2.0, -1.5, 1, 1, 1, 0]"), 2.0),
        (said("[1.0, 2.0"), math.inf),
        (said("nothing"), math.inf),
    ],
)
def test_boxes_are_scored_as_values_or_as_digits(answer, error):
    found = score_answers([BOX], [answer])[BOX_TASK]
    assert found["median_center_error_m"] == pytest.approx(error)
    assert found["share_within_1m"] == 0.0


def test_choices_are_scored_by_their_letter_with_a_standard_error():
    answers = [said("B. left"), said(" B"), said("A. right"), said("the B")]
    found = score_answers([CHOICE] * 4, answers)["route_planning"]
    assert found == {"n": 4, "score": 50.0, "error": pytest.approx(100.0 * math.sqrt(1 / 3) / 2)}


SCORES = {
    "object_abs_distance": {"n": 400, "score": 40.0, "error": 2.0},
    "object_counting": {"n": 50, "score": 37.0, "error": 2.0},
    BOX_TASK: {"n": 100, "median_center_error_m": 0.42, "share_within_1m": 0.8},
}
SHUFFLED = {
    "object_abs_distance": {"n": 400, "score": 22.0, "error": 2.0},
    "object_counting": {"n": 50, "score": 33.0, "error": 2.0},
    BOX_TASK: {"n": 100, "median_center_error_m": 2.9, "share_within_1m": 0.1},
}
BLIND = {"object_abs_distance": 25.0, "object_counting": 34.0}


def test_table_says_above_blind_only_beyond_two_standard_errors():
    table = score_table(SCORES, SHUFFLED, BLIND, prior_m=2.3)
    assert "| object_abs_distance | 400 | 40.0 +- 2.0 | 22.0 | 25.0 | yes |" in table
    assert "| object_counting | 50 | 37.0 +- 2.0 | 33.0 | 34.0 | no |" in table
    assert "(80% within 1 m) | 100 | 0.42 m | 2.90 m | 2.30 m | yes |" in table


def test_card_holds_the_facts():
    gate = {"eval_loss/ce": 0.5, "eval_shuffled_loss/ce": 0.9, "eval_loss/drh": 0.2}
    facts = {stage: {"seconds": 60.0} for stage in STAGES[:-1]}
    facts["parts"] |= {"vision_tower": {"object_accuracy": 0.61}, "point_encoder": {"object_accuracy": 0.72}}
    facts["lookup"] |= {"median_center_error_m": 0.9, "patch_median_center_error_m": 0.5}
    facts["stage2"] |= gate
    facts["calibration"] |= {"tokens": {"<REG>": {"scale": 1.5, "num_values": 2345, "num_scenes": 67}}}
    facts["interval_coverage"] = 0.9
    found = {"n": 1111, "coverage": 0.894, "half_width": 0.256}
    intervals = {"types": {"overall": found}, "answered": {"50%": 48.7}}
    facts["scores"] |= {"scores": SCORES, "shuffled": SHUFFLED, "prior_m": 2.3, "num_scenes": 100}
    facts["scores"] |= {"value_intervals": intervals}
    facts |= {"steps": STEPS, "seed": 0, "parameters": 1_700_000, "train_scenes": 800, "cores": 3, "blind": BLIND}
    assert gate_table(facts).endswith("| stage2 | 0.500 | 0.900 | 0.200 |  |")
    card = build_world_card(facts)
    for text in (
        "61%",
        "72%",
        "1,700,000",
        "800 rendered rooms",
        "on 100 rooms",
        "on 3 CPU cores",
        "2345 answers about the 67 rooms",
        "| overall | 1111 | 89.4% | +-26% |",
        "| 50% | 48.7 |",
        score_table(SCORES, SHUFFLED, BLIND, prior_m=2.3),
    ):
        assert text in card
    assert f"({STEPS['stage2']} steps) on all questions" in card
    assert "{" not in card


def test_blind_scores_are_the_best_of_each_task(tmp_path):
    (tmp_path / "baselines.json").write_text('{"object_counting": {"n": 90, "median": 30.5, "best constant": 32.0}}')
    assert blind_scores(tmp_path) == {"object_counting": 32.0}
