# SPDX-License-Identifier: Apache-2.0
"""Rationales against their answers: each is computed again from the numbers in the text, by other means."""

import cmath
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import geode
from geode.data.synthetic_rooms.boxes import box_distance
from geode.data.synthetic_rooms.questions import QUESTION_TYPES, scene_questions, select_questions, subjects_of
from geode.data.synthetic_rooms.rationales import closest_points, write_rationale


SCENE = json.loads((Path(geode.__file__).parent / "assets" / "embedded_scene" / "scene.json").read_text())
QUESTIONS = select_questions(scene_questions(SCENE, seed=8), dict.fromkeys(QUESTION_TYPES, 40), seed=8)
NUMBER = r"-?\d+\.\d\d"


def points_in(text):
    return [[float(value) for value in re.findall(NUMBER, found)] for found in re.findall(r"\(([-\d., ]+)\)", text)]


def answer_of(text):
    return re.search(r" Answer: (.+)\.$", text)[1]


def plan_points(text, names):
    """Return the places that the text gives to names, as complex numbers."""
    return [complex(*points_in(re.search(rf"the {name} is at \([^)]*\)", text)[0])[0]) for name in names]


def check_counting(text, names):
    assert int(answer_of(text)) == len(points_in(text))


def distances_in(text):
    """Return what follows from each pair of closest points, checked against the distance that stands beside it."""
    found = {}
    pattern = rf"(\([^)]*\)) on the ([a-z ]+) and (\([^)]*\)) on the [a-z ]+: sqrt\([^)]*\) = ({NUMBER}) m"
    for first, name, second, stated in re.findall(pattern, text):
        (a,), (b,) = points_in(first), points_in(second)
        found[name] = math.dist(a, b)
        assert found[name] == pytest.approx(float(stated), abs=0.02)
    return found


def check_distance(text, names):
    assert float(answer_of(text).removesuffix(" meters")) == pytest.approx(distances_in(text)[names[0]], abs=0.02)


def check_nearest(text, names):
    distances = distances_in(text)
    assert sorted(distances) == sorted(names[:-1])
    assert answer_of(text)[3:] == min(distances, key=distances.get)


def check_size(text, names):
    sides = [float(value) for value in re.findall(NUMBER, re.search(r"measures (.*?) m\.", text)[1])]
    assert len(sides) == 3
    assert float(answer_of(text).removesuffix(" centimeters")) == pytest.approx(100 * max(sides), abs=1.0)


def check_room(text, names):
    x, y = np.array(points_in(text)[:4]).T
    area = 0.5 * abs(x @ np.roll(y, -1) - y @ np.roll(x, -1))  # the shoelace formula
    assert float(answer_of(text).removesuffix(" square meters")) == pytest.approx(area, abs=0.15)


def turn_deg(before, here, after):
    return math.degrees(cmath.phase((after - here) / (here - before)))


def check_direction(text, names):
    stand, face, look = plan_points(text, names)
    angle = math.degrees(cmath.phase((look - stand) / (face - stand)))
    stated = re.search(rf"a turn of ({NUMBER}) degrees to the (left|right)\.", text)
    assert float(stated[1]) == pytest.approx(abs(angle), abs=1.0)
    answer = answer_of(text)[3:]
    if answer == "back":
        assert abs(angle) > 135
    else:
        assert answer.split("-")[-1] == ("left" if angle > 0 else "right") == stated[2]
    if "-" in answer:
        assert answer.split("-")[0] == ("front" if abs(angle) < 90 else "back")


def check_route(text, names):
    points = plan_points(text, names)
    turns = []
    for before, here, after in zip(points, points[1:], points[2:], strict=False):
        angle = turn_deg(before, here, after)
        turns.append("Turn Back" if abs(angle) > 135 else "Turn Left" if angle > 0 else "Turn Right")
    assert answer_of(text)[3:] == ", ".join(turns)


def check_order(text, names):
    times = {name: float(re.search(rf"the {name} after ({NUMBER}) s", text)[1]) for name in names}
    assert answer_of(text)[3:] == ", ".join(sorted(names, key=times.get))


def check_box(text, names):
    numbers = [float(value) for value in re.findall(NUMBER, text.split(" Answer: ")[0])]
    box = json.loads(answer_of(text).removeprefix("the box "))
    np.testing.assert_allclose([*numbers[:6], math.radians(numbers[6])], box, atol=0.006)


CHECKS = {
    "object_counting": check_counting,
    "object_abs_distance": check_distance,
    "object_size_estimation": check_size,
    "room_size_estimation": check_room,
    "object_rel_distance": check_nearest,
    "object_rel_direction_easy": check_direction,
    "object_rel_direction_medium": check_direction,
    "object_rel_direction_hard": check_direction,
    "route_planning": check_route,
    "obj_appearance_order": check_order,
    "object_localization": check_box,
}


@pytest.mark.parametrize("question_type", QUESTION_TYPES)
def test_rationale_leads_to_the_answer(question_type):
    questions = [question for question in QUESTIONS if question.question_type == question_type]
    assert questions
    for question in questions:
        text = write_rationale(question, SCENE)
        names = subjects_of(question_type, question.question)
        CHECKS[question_type](text, names)
        answer = answer_of(text)
        truth = question.ground_truth
        assert answer.removeprefix("the box ").startswith(truth), text
        assert text.isascii()
        assert "<" not in text
        assert len(text) < 1200


def test_closest_points_lie_in_their_boxes_and_are_as_far_apart_as_the_boxes():
    rng = np.random.default_rng(0)
    for _ in range(200):
        boxes = [
            np.array([*rng.uniform(-1.5, 1.5, 2), rng.uniform(0.2, 2), *rng.uniform(0.1, 1.5, 3), rng.uniform(-3, 3)])
            for _ in range(2)
        ]
        ends = closest_points(*boxes)
        assert np.linalg.norm(ends[1] - ends[0]) == pytest.approx(box_distance(*boxes), abs=1e-9)
        for end, box in zip(ends, boxes, strict=True):
            cosine, sine = math.cos(box[6]), math.sin(box[6])
            local = np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]]) @ (end - box[:3])
            assert (np.abs(local) <= box[3:6] / 2 + 1e-6).all()


def test_subjects_of_reads_the_stops_of_a_route_and_refuses_other_wording():
    (route,) = [question for question in QUESTIONS if question.question_type == "route_planning"][:1]
    names = subjects_of("route_planning", route.question)
    assert route.question.startswith(f"You are a robot beginning at the {names[0]} and facing the {names[1]}.")
    assert f"navigate to the {names[-1]}." in route.question
    with pytest.raises(ValueError, match=r"'object_counting'.*got 'How many chairs\?'"):
        subjects_of("object_counting", "How many chairs?")
