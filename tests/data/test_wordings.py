# SPDX-License-Identifier: Apache-2.0
"""Other wordings of the benchmark's questions: the number that is regressed stays, and its unit is the one that is read."""

import itertools

import pytest

from geode.data.schemas import benchmark_prompt, number_unit
from geode.data.synthetic_rooms.questions import COUNTING, DISTANCE, EASY, LOCATE, ROOM_SIZE, SIZE
from geode.data.wordings import WORDINGS, reworded
from geode.modeling_geode.answers_geode import asked_unit


FORMS = {
    "object_abs_distance": DISTANCE.format("trash bin", "tv stand"),
    "object_size_estimation": SIZE.format("trash bin"),
    "room_size_estimation": ROOM_SIZE,
    "object_counting": COUNTING.format("chair"),
    "object_localization": LOCATE.format("trash bin"),
}


def record_of(question_type: str, uid: str = "0", **changes) -> dict:
    fields = {"uid": uid, "question_type": question_type, "prompt": benchmark_prompt(FORMS[question_type])}
    return {
        **fields,
        "value": 254.0,
        "unit": "cm",
        "value_si": 2.54,
        "rationale": "So 254.",
        "final": "254",
        **changes,
    }


@pytest.mark.parametrize("question_type", WORDINGS)
def test_every_wording_and_unit_is_used_and_names_what_the_question_names(question_type):
    units, wordings = WORDINGS[question_type]
    prompts = {reworded(record_of(question_type, str(uid)))["prompt"] for uid in range(300)}
    asked = {"object_abs_distance": ("trash bin", "tv stand"), "object_counting": ("chair",)}
    names = asked.get(question_type, ("trash bin",))
    expected = {
        wording.format(*names, unit=unit)
        for wording, unit in itertools.product(wordings, units)
        if "{unit}" in wording or unit == next(iter(units))
    }
    assert prompts == expected


@pytest.mark.parametrize("question_type", ["object_abs_distance", "object_size_estimation", "room_size_estimation"])
def test_the_units_read_from_a_wording_are_those_of_its_number(question_type):
    seen = set()
    for uid in range(100):
        changed = reworded(record_of(question_type, str(uid)))
        read = asked_unit(changed["prompt"])
        # Where none is named, the answer is given in SI.
        assert changed["unit"] == (read or next(iter(WORDINGS[question_type][0].values())))
        assert read is None or read == number_unit(changed["prompt"], question_type)
        assert changed["value_si"] == 2.54
        seen.add(changed["unit"])
    expected = {"m2", "ft2"} if question_type == "room_size_estimation" else {"m", "cm", "ft", "in"}
    assert seen == expected


def test_a_value_is_converted_and_a_rationale_in_the_old_unit_is_dropped():
    changed = next(
        found
        for found in (reworded(record_of("object_abs_distance", str(uid))) for uid in range(100))
        if found["unit"] == "in"
    )
    # Hand-derived: 2.54 m are 100 inches.
    assert (changed["value"], changed["answer_text"]) == (100.0, "100.00")
    assert changed["rationale"] is None
    assert changed["final"] is None


def test_boxes_and_counts_keep_their_answers():
    box = [1.0, 2.0, 0.5, 1.0, 1.0, 1.0, 0.0]
    record = record_of("object_localization", value=None, unit=None, value_si=None, box=box, answer_text="a box")
    changed = reworded(record)
    assert changed["prompt"] != record["prompt"]
    assert all(changed[name] == record[name] for name in ("box", "value", "unit", "value_si", "answer_text"))
    count = reworded(record_of("object_counting", value=3.0, unit="count", value_si=3.0))
    assert (count["value"], count["unit"], count["answer_text"]) == (3.0, "count", "3")


def test_what_is_not_known_stays():
    choice = record_of("object_abs_distance", prompt=EASY.format("bed", "door", "lamp", "door"))
    choice["question_type"] = "object_rel_direction_easy"
    assert reworded(choice) == choice
    other = record_of("object_abs_distance", prompt="How far is it to the moon?")
    assert reworded(other) == other


def test_the_seed_decides():
    prompts = {reworded(record_of("object_abs_distance"), seed=seed)["prompt"] for seed in range(30)}
    assert len(prompts) > 5
    assert reworded(record_of("object_abs_distance")) == reworded(record_of("object_abs_distance"))
