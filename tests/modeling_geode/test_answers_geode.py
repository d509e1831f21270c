# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest

from geode.modeling_geode.answers_geode import (
    Answer,
    Box3D,
    Measurement,
    asked_unit,
    convert_from_si,
    convert_to_si,
    format_number,
    parse_unit,
)


# The first four are the wordings of VSI-Bench's numeric questions; the rest are worded to mislead.
QUESTIONS = [
    ("How many chair(s) are in this room?", "count"),
    (
        "Measuring from the closest point of each object, what is the direct distance between the chair and the bed "
        "(in meters)?",
        "m",
    ),
    (
        "What is the length of the longest dimension (length, width, or height) of the bed, measured in centimeters?",
        "cm",
    ),
    (
        "What is the size of this room (in square meters)? If multiple rooms are shown, estimate the size of the "
        "combined space.",
        "m2",
    ),
    ("How far is the chair from the table, in metres?", "m"),
    ("How high is it (m)?", "m"),
    ("How high is it in m?", "m"),
    ("I'm at the door. How far is the bed?", None),
    ("I\u2019m at the door. How far is the bed?", None),
    ("Width in millimeters?", "mm"),
    ("Give the width in mm.", "mm"),
    ("How many feet are between them?", "ft"),
    ("How many feet does the table have?", "ft"),
    ("How far is the foot of the bed from the door?", None),
    ("How far is the foot of the bed from the door, in feet?", "ft"),
    ("What is its height in inches?", "in"),
    ("What is in the room?", None),
    ("Answer in centimetres: how far are the 2 m shelf and the door apart?", "cm"),
    ("How many chairs stand within 2 meters of the table?", "count"),
    ("How many meters is the room long?", "m"),
    ("How many square meters does the room have?", "m2"),
    ("Area in m2?", "m2"),
    ("Area in m^2?", "m2"),
    ("Area in m\u00b2?", "m2"),
    ("Area in sq. ft?", "ft2"),
    ("Area in sqft?", "ft2"),
    ("Area in square feet?", "ft2"),
    ("Area in square centimeters?", "cm2"),
    ("Area, meters squared?", "m2"),
    ("Volume in cubic meters?", "m3"),
    ("The number of windows?", "count"),
    ("Count the windows.", "count"),
    ("And the chairs, how many?", "count"),
    ("How many degrees must I turn?", None),
    ("By how many degrees is it rotated?", None),
    ("Which is closer, in meters: 30 cm or the door?", "m"),
    ("Is it 3-meter wide?", None),
    ("Estimate the distance. Use meters.", "m"),
    ("Describe the yard.", None),
    ("HOW FAR IN CENTIMETERS?", "cm"),
    ("", None),
]


@pytest.mark.parametrize(("question", "unit"), QUESTIONS)
def test_asked_unit_reads_the_unit_of_the_answer(question, unit):
    assert asked_unit(question) == unit


@pytest.mark.parametrize(
    ("unit", "value", "expected"),
    [
        # By definition 1 ft = 0.3048 m and 1 in = 0.0254 m, so 1 ft2 = 0.09290304 m2.
        ("m", 2.5, 2.5),
        ("cm", 2.5, 250.0),
        ("mm", 0.012, 12.0),
        ("km", 1500.0, 1.5),
        ("ft", 3.048, 10.0),
        ("in", 0.254, 10.0),
        ("yd", 1.8288, 2.0),
        ("m2", 12.0, 12.0),
        ("cm2", 0.5, 5000.0),
        ("ft2", 0.9290304, 10.0),
        ("m3", 2.0, 2.0),
        ("count", 3.6, 4.0),
        ("count", -0.4, 0.0),
        (None, 1.25, 1.25),
    ],
)
def test_convert_from_si_scales_by_the_definition_of_the_unit(unit, value, expected):
    assert convert_from_si(value, unit) == pytest.approx(expected, rel=1e-12)
    if unit != "count":
        assert convert_to_si(expected, unit) == pytest.approx(value, rel=1e-12)


def test_convert_from_si_has_no_negative_zero():
    for unit in ("m", "cm", "count", None):
        assert math.copysign(1.0, convert_from_si(-0.0, unit)) == 1.0


@pytest.mark.parametrize("name", ["square meters", "m^2", "sqm", "sq m", "m2", "Square Metre", "m\u00b2"])
def test_parse_unit_knows_the_names_of_square_metres(name):
    assert parse_unit(name) == "m2"


def test_parse_unit_refuses_an_unknown_unit():
    for name in ("parsec", "", "m4", "m23", "square"):
        with pytest.raises(ValueError, match=f"got '{name}'"):
            parse_unit(name)
    with pytest.raises(ValueError, match="got 'parsec'"):
        parse_unit("parsec")
    with pytest.raises(ValueError, match="got 3"):
        convert_from_si(1.0, 3)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2.314, "m", "2.31"),
        (231.4, "cm", "231.40"),
        (-0.001, "m", "0.00"),
        (-0.0, None, "0.00"),
        (-1.5, "m", "-1.50"),
        (1e9, "m2", "1000000000.00"),
        (1e-9, "m", "0.00"),
        (3.7, "count", "4"),
        (-2.0, "count", "0"),
        (12000.2, "count", "12000"),
    ],
)
def test_format_number_is_plain_decimal(value, unit, text):
    assert format_number(value, unit) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [format_number, convert_from_si, convert_to_si])
def test_numbers_must_be_finite(function, value):
    with pytest.raises(ValueError, match=f"must be a finite number, got {value}"):
        function(value, "m")


def test_answer_joins_text_and_values_in_the_asked_unit():
    answer = Answer.from_segments(
        [" It is ", " and ", ".\n"],
        ["<REG>", "<3DBBOX>"],
        [[0.5], [1.0, 2.0, 0.25, 0.5, 0.75, 1.5, -0.125]],
        kinds={"<REG>": "scalar", "<3DBBOX>": "box3d"},
        unit="cm",
    )
    assert answer.text == ("It is 50.00 and [center (1.00, 2.00, 0.25) m, size (0.50, 0.75, 1.50) m, yaw -0.12 rad].")
    assert answer.values == [Measurement(token="<REG>", value=50.0, unit="cm", si_value=0.5)]
    assert answer.boxes == [Box3D(center=(1.0, 2.0, 0.25), size=(0.5, 0.75, 1.5), yaw=-0.125, frame="scene")]


def test_answer_of_a_vector_keeps_si():
    answer = Answer.from_segments(["", ""], ["<PATH>"], [[1.0, -2.0]], kinds={"<PATH>": "vector"}, unit="cm")
    assert answer.text == "[1.00, -2.00]"
    assert (answer.values[0].unit, answer.values[0].value) == (None, (1.0, -2.0))


def test_answer_survives_json():
    answer = Answer.from_segments(
        ["", " ", ""],
        ["<REG>", "<3DBBOX>"],
        [[2.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 0.5]],
        kinds={"<REG>": "scalar", "<3DBBOX>": "box3d"},
        unit="count",
    )
    assert json.loads(json.dumps(answer.to_dict())) == {
        "text": "2 [center (0.00, 1.00, 2.00) m, size (3.00, 4.00, 5.00) m, yaw 0.50 rad]",
        "values": [
            {
                "token": "<REG>",
                "value": 2.0,
                "unit": "count",
                "si_value": 2.0,
                "kind": "scalar",
                "interval": None,
                "si_interval": None,
                "is_withheld": False,
            }
        ],
        "boxes": [{"center": [0.0, 1.0, 2.0], "size": [3.0, 4.0, 5.0], "yaw": 0.5, "frame": "scene"}],
    }


def test_box_and_scalar_refuse_the_wrong_number_of_values():
    with pytest.raises(ValueError, match="got 6 numbers"):
        Box3D.from_values([0.0] * 6)
    with pytest.raises(ValueError, match="must hold 1 number, got 2 for <REG>"):
        Measurement.from_si("<REG>", [1.0, 2.0], kind="scalar")
    with pytest.raises(ValueError, match="must be a finite number, got nan"):
        Box3D.from_values([math.nan] * 7)
