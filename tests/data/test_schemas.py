# SPDX-License-Identifier: Apache-2.0
import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geode.data.schemas import (
    DEFAULT_UNITS,
    Record,
    answer_fields,
    bare_prompt,
    benchmark_prompt,
    conversation_fields,
    default_unit,
    fill_path,
    media_path,
    number_fields,
    number_unit,
    paired_turns,
    strip_media_tokens,
)


def turns(*texts):
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


def a_record(**changes):
    base = {"uid": "s:f:0", "source": "s", "media_type": "video", "media": "a.mp4", "prompt": "Q?"}
    return Record(**{**base, "kind": "text", "answer_text": "A.", **changes})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nWhat room is it?", "What room is it?"),
        ("<video>\nWhat room is it?", "What room is it?"),
        ("What room is it?\n<image>", "What room is it?"),
        ("<image>\n<image>\nWhat room is it?", "What room is it?"),
        ("<image>\r\nWhat room is it? ", "What room is it?"),
        ("Is <image> a room?", "Is  a room?"),
        ("<ima<image>ge>\nQ", "Q"),
        ("Is a < b and b > c?", "Is a < b and b > c?"),
        ("<image>", ""),
    ],
)
def test_strip_media_tokens_leaves_the_text_alone(text, expected):
    assert strip_media_tokens(text) == expected


@given(
    st.lists(st.sampled_from(["<image>", "<video>", "<", "ima", "ge>", "\n", "q", "<ima", "vid", "eo>"]), max_size=12)
)
def test_strip_media_tokens_leaves_no_token(pieces):
    assert re.search("<(image|video)>", strip_media_tokens("".join(pieces))) is None


@pytest.mark.parametrize("options", [None, ["A. left", "B. right"]])
def test_bare_prompt_keeps_question_and_options(options):
    expected = "\n".join(["Where is it?", *(["Options:", *options] if options else [])])
    prompt = benchmark_prompt("Where is it?", options)
    assert bare_prompt(prompt) == bare_prompt(expected) == expected != prompt


@pytest.mark.parametrize(
    ("question", "question_type", "unit", "value_si"),
    [
        # Two of each unit times the published factor: 0.01, 0.0254, 0.3048, 0.09290304.
        ("How far is it in meters?", "absolute_distance_object", "m", 2.0),
        ("How far is it in METERS?", "absolute_distance_object", "m", 2.0),
        ("What is the gap (in centimeters)?", "absolute_distance_object", "cm", 0.02),
        ("What is the gap, in inches?", "absolute_distance_object", "in", 0.0508),
        ("What is the distance in feet between them?", "absolute_distance_object", "ft", 0.6096),
        ("How many feet apart are they?", "absolute_distance_object", "ft", 0.6096),
        ("How many inches long is the desk?", "absolute_size_object", "in", 0.0508),
        ("How big is this room, in square meters?", "absolute_size_room", "m2", 2.0),
        ("How big is this room, in square feet?", "absolute_size_room", "ft2", 0.1858061),
        ("Give the size in Square Feet.", "absolute_size_room", "ft2", 0.1858061),
        ("Give the meters separating lamp and sink.", "object_abs_distance", "m", 2.0),
        ("Give the feet separating lamp and sink.", "object_abs_distance", "ft", 0.6096),
        ("Using feet as the unit, how far is it?", "absolute_distance_object", "ft", 0.6096),
        ("What is the number of feet between them?", "absolute_distance_object", "ft", 0.6096),
        ("Report it as square feet.", "absolute_size_room", "ft2", 0.1858061),
        ("Report it as sq. ft.", "absolute_size_room", "ft2", 0.1858061),
        ("Give the ft separating lamp and sink.", "object_abs_distance", "ft", 0.6096),
        ("What is the number of cm between them?", "object_abs_distance", "cm", 0.02),
        ("How wide is the 3-foot shelf?", "object_size_estimation", "cm", 0.02),
        # No unit in the question: the task's.
        ("How far is it?", "object_abs_distance", "m", 2.0),
        ("How far is it?", "absolute_distance_object", "m", 2.0),
        ("How long is the desk?", "object_size_estimation", "cm", 0.02),
        ("How long is the desk?", "absolute_size_object", "cm", 0.02),
        ("How big is it?", "room_size", "m2", 2.0),
        ("How big is it?", "room_size_estimation", "m2", 2.0),
        ("How far does the camera move?", "camera_displacement", "m", 2.0),
        ("How many stools are there?", "absolute_count", "count", 2.0),
        ("How many stools are there?", "object_counting", "count", 2.0),
        ("How many stools are there?", None, "count", 2.0),
        # Words that hold a unit and are none.
        ("How many metal footstools are there?", "absolute_count", "count", 2.0),
        ("State the total of lamps, not their distance in meters.", "absolute_count", "count", 2.0),
        ("How many lamps are within 3 meters?", "object_count", "count", 2.0),
        ("How far is the bench at the foot of the bed?", "object_abs_distance", "m", 2.0),
        ("How high is the 2 meters shelf?", "object_size_estimation", "cm", 0.02),
        ("Answer.", None, None, None),
        ("By how many degrees must I turn?", "absolute_direction_object", "deg?", None),
    ],
)
def test_number_fields_reads_the_asked_unit(question, question_type, unit, value_si):
    prompt = benchmark_prompt(question)
    fields = number_fields("2", prompt, question_type)
    assert (fields["unit"], fields["value_si"]) == (unit, value_si)
    assert (fields["value"], fields["decimals"]) == (2.0, 0)


def test_number_fields_keeps_seven_digits():
    # 215.3 * 0.09290304 = 20.002024512
    assert number_fields("215.3", "How many square feet?")["value_si"] == 20.00202
    assert number_fields("5.67", "How many feet?")["value_si"] == 1.728216


@pytest.mark.parametrize(("answer", "decimals"), [("3", 0), ("3.0", 1), ("-0.25", 2), (" 12.50\n", 2)])
def test_number_fields_counts_decimals(answer, decimals):
    assert number_fields(answer, "How far, in meters?")["decimals"] == decimals


@pytest.mark.parametrize("answer", ["3.", ".5", "1,200", "1e3", "+3", "3 m", "three", "", "\u0663", "3-4", "nan"])
def test_number_fields_takes_only_plain_decimals(answer):
    assert number_fields(answer, "How far, in meters?") is None


@pytest.mark.parametrize(
    ("answer", "kind", "letter"),
    [
        ("A", "choice", "A"),
        ("B.", "choice", "B"),
        ("B. mat, cup", "choice", "B"),
        (" C. chair \n", "choice", "C"),
        ("Z", "choice", "Z"),
        ("a", "text", None),
        ("AB", "text", None),
        ("A) mat", "text", None),
        ("B.mat", "text", None),
        ("A mat", "text", None),
        ("A study.", "text", None),
        ("Sides are 1.20 m.", "text", None),
    ],
)
def test_answer_fields_tells_letters_from_text(answer, kind, letter):
    fields = answer_fields(answer, "Which?")
    assert (fields["kind"], fields.get("letter"), fields["answer_text"]) == (kind, letter, answer.strip())


def test_answer_fields_never_goes_by_the_type_name():
    assert answer_fields("about 2", "How far, in meters?", "absolute_distance_object")["kind"] == "text"
    assert answer_fields("B", "How many?\nA. 1\nB. 2", "absolute_count")["kind"] == "choice"
    assert answer_fields("2", "Which is bigger?", "relative_size_object")["kind"] == "number"


@given(st.decimals(min_value=-1000, max_value=1000, places=2))
def test_answer_fields_reads_any_decimal(number):
    fields = answer_fields(str(number), "How far is it, in centimeters?")
    assert fields["value"] == float(number)
    assert fields["value_si"] == pytest.approx(float(number) / 100, rel=5e-7)


def test_default_units_are_those_of_the_tasks():
    assert default_unit(None) is None
    assert default_unit("route_planning") is None
    assert number_unit("How far?", "route_planning") is None
    assert set(DEFAULT_UNITS.values()) == {"m", "cm", "m2", "count"}


@pytest.mark.parametrize(
    ("path", "clean"),
    [
        ("./sam/1.jpg", "sam/1.jpg"),
        ("sam/./1.jpg", "sam/1.jpg"),
        ("sam\\1.jpg", "sam/1.jpg"),
        ("a b/c d.mp4", "a b/c d.mp4"),
        ("scannet/scene0191_00.mp4", "scannet/scene0191_00.mp4"),
        (".hidden/a.mp4", ".hidden/a.mp4"),
    ],
)
def test_media_path_is_normal(path, clean):
    assert media_path(path) == clean


@pytest.mark.parametrize(
    "path", ["", ".", "/etc/passwd", "../a.mp4", "a/../../b.mp4", "C:\\a.mp4", "a\0b", None, 3, ["a"]]
)
def test_media_path_stays_below_its_root(path):
    with pytest.raises(ValueError, match="path of a medium"):
        media_path(path)


def test_fill_path_trusts_the_pattern_and_not_what_stands_for_its_names():
    names = {"scene": "room_1", "parent": ".", "source": None}
    assert fill_path("../{parent}/geometry/{scene}.d", names) == ".././geometry/room_1.d"
    assert fill_path("one", names) == "one"
    for hostile in ("..", "../..", "/etc", "a/../../b", "", None):
        with pytest.raises(ValueError, match="path of a medium must"):
            fill_path("geometry/{scene}", {**names, "scene": hostile})
    for pattern in ("{name}", "{}", "{scene.__class__}", "{scene[0]}", "{scene"):
        with pytest.raises(ValueError, match=r"no other names in braces than \['parent', 'scene', 'source'\]"):
            fill_path(pattern, names)


def test_conversation_of_several_turns_is_text():
    fields = conversation_fields(turns("<image>\nWhat room?", "4", "How many?<image>", " 5 "), "object_count")
    assert fields["kind"] == "text"
    assert fields["turns"] == 2
    assert fields["conversation"] == [["What room?", "4"], ["How many?", "5"]]
    assert (fields["prompt"], fields["answer_text"]) == ("What room?", "4")


def test_paired_turns_takes_names_of_roles_of_other_formats():
    assert paired_turns([{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]) == [["Q", "A"]]


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        (None, "in pairs, got None"),
        ([], r"in pairs, got \[\]"),
        (turns("Q"), "in pairs"),
        (turns("Q", "A", "Q"), "in pairs"),
        (turns("Q", "A")[::-1], "in turn"),
        ([{"from": "human", "value": "Q"}, {"from": "gpt", "value": 3}], "in turn"),
        ([{"from": "human"}, {"from": "gpt", "value": "A"}], "in turn"),
        ([{"from": ["human"], "value": "Q"}, {"from": "gpt", "value": "A"}], "in turn"),
        (["Q", "A"], "in turn"),
        (turns("<image>", "A"), "must have text, got '' and 'A'"),
        (turns("Q", " "), "must have text, got 'Q' and ''"),
    ],
)
def test_paired_turns_refuses_malformed_conversations(conversations, message):
    with pytest.raises(ValueError, match=message):
        paired_turns(conversations)


def test_record_round_trips_through_plain_types():
    record = a_record(box=[1.0] * 7, conversation=[["Q?", "A."]], turns=1)
    assert record.to_dict() == dataclasses.asdict(record)
    assert Record.from_dict(record.to_dict()) == record


def test_record_from_dict_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"unknown \['answer'\], missing \['answer_text'\]"):
        Record.from_dict({**{k: v for k, v in a_record().to_dict().items() if k != "answer_text"}, "answer": "A."})


def test_record_is_regressed_with_a_target():
    assert not a_record(value=2.0, unit="deg?").is_regressed
    assert a_record(value=2.0, unit="m", value_si=2.0).is_regressed
    assert a_record(box=[1.0] * 7).is_regressed
