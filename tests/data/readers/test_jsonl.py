# SPDX-License-Identifier: Apache-2.0
import pytest

from geode.data.readers.jsonl import record_from_row


def read(row):
    return record_from_row(row, file="mine.jsonl", index=3)


def test_conversation_is_read():
    turns = [{"from": "human", "value": "<image>\nHow far is it, in feet?"}, {"from": "gpt", "value": "5.6"}]
    record = read({"video": "./a.mp4", "conversations": turns, "id": "x", "weather": "fine"})
    assert (record.uid, record.media, record.prompt) == ("jsonl:mine.jsonl:3", "a.mp4", "How far is it, in feet?")
    assert (record.kind, record.unit, record.value_si) == ("number", "ft", 1.70688)


@pytest.mark.parametrize(
    ("answer", "unit", "text", "value_si"),
    [
        (142, "cm", "142", 1.42),
        ("142.0", "centimeters", "142.0", 1.42),
        (1.5, "m", "1.5", 1.5),
        (0.00001, "m", "0.00001", 1e-5),
        (3, "count", "3", 3.0),
    ],
)
def test_number_may_bring_its_unit(answer, unit, text, value_si):
    record = read({"media": "c.MP4", "prompt": "How long?", "answer": answer, "unit": unit})
    assert (record.media_type, record.answer_text, record.value_si) == ("video", text, value_si)
    assert record.unit == {"centimeters": "cm"}.get(unit, unit)


def test_conversation_may_bring_its_unit():
    turns = [{"from": "human", "value": "<image>\nHow far is it?"}, {"from": "gpt", "value": "5.6"}]
    record = read({"video": "a.mp4", "conversations": turns, "unit": "feet"})
    assert (record.unit, record.value_si) == ("ft", 1.70688)
    with pytest.raises(ValueError, match="`unit` must have a number as its answer, got 'far'"):
        read({"video": "a.mp4", "conversations": [turns[0], {"from": "gpt", "value": "far"}], "unit": "feet"})


@pytest.mark.parametrize("answer", ["sofa", "B", "B.", "(B)", "B)", "B. sofa", "B) sofa", "(B) sofa", "B. Sofa."])
@pytest.mark.parametrize("options", [["lamp", "sofa"], ["A. lamp", "B. sofa"], ["A) lamp", "(B) sofa"]])
def test_option_may_be_named_by_its_text(answer, options):
    record = read({"image": "b.jpg", "question": "Which?", "options": options, "answer": answer})
    assert (record.kind, record.letter) == ("choice", "B")
    is_letter = answer in ("sofa", "B", "B.", "(B)", "B)")
    assert record.answer_text == ("B" if is_letter else "B. Sofa." if answer.endswith(".") else "B. sofa")
    assert record.prompt.splitlines()[:4] == ["Which?", "Options:", "A. lamp", "B. sofa"]


@pytest.mark.parametrize("options", [["A", "B", "C"], ["10", "12.5", "(a)"], ["(left)", "B-52", "A. Smith"]])
def test_option_keeps_what_is_not_its_letter(options):
    record = read({"image": "b.jpg", "question": "Which?", "options": options, "answer": "C"})
    assert record.prompt.splitlines()[2:5] == [
        f"{letter}. {option}" for letter, option in zip("ABC", options, strict=True)
    ]


def test_options_that_the_prompt_has_are_not_repeated():
    record = read(
        {"image": "b.jpg", "question": "Which?\nA. lamp\nB. sofa", "options": ["lamp", "sofa"], "answer": "A"}
    )
    assert record.prompt == "Which?\nA. lamp\nB. sofa"


def test_box_and_its_companions_are_read():
    row = {
        "video": "d.mp4",
        "prompt": "Locate the lamp.",
        "box": [1, 2, 0.5, 0.25, 0.5, 1, 0],
        "geometry": "./geometry/d",
    }
    record = read({**row, "rationale": "There.", "scene": "d", "num_frames": 8, "question_type": "find"})
    assert record.box == pytest.approx([1, 2, 0.5, 0.5, 0.25, 1, 1.570796])
    assert (record.kind, record.geometry, record.num_frames) == ("box", "geometry/d", 8)
    assert (record.rationale, record.scene, record.question_type) == ("There.", "d", "find")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "a.mp4", "prompt": "Q"}, "`answer` must be text or a number, got None"),
        ({"video": "a.mp4", "prompt": "Q", "answer": True}, "`answer` must be text or a number, got True"),
        ({"video": "a.mp4", "answer": "A"}, "`conversations`, or one of `prompt` and `question`"),
        ({"video": "a.mp4", "prompt": "Q", "question": "Q", "answer": "A"}, "one of `prompt` and `question`"),
        ({"prompt": "Q", "answer": "A"}, "exactly one of `video`, `image` and `media`"),
        ({"media": "a.xyz", "prompt": "Q", "answer": "A"}, "`media_type` must be one of .* got None"),
        ({"video": "a.mp4", "promt": "Q", "answer": "A"}, "field 'promt'. Rename it to 'prompt'"),
        ({"video": "a.mp4", "prompt": "Q", "answer": "A", "unit": "m"}, "must have a number as its answer"),
        ({"video": "a.mp4", "prompt": "Q", "answer": 3, "unit": "stone"}, "got 'stone'"),
        ({"video": "a.mp4", "prompt": "Q", "answer": "bed", "options": ["lamp"]}, r"one of the options \['A. lamp'\]"),
        ({"video": "a.mp4", "prompt": "Q", "answer": "B", "options": "lamp"}, "`options` must be a list"),
        (
            {"video": "a.mp4", "prompt": "Q", "answer": float("nan")},
            "`answer` must be text or a finite number, got nan",
        ),
        ({"video": "a.mp4", "prompt": "Q", "answer": float("-inf")}, "finite number, got -inf"),
        ({"video": "a.mp4", "prompt": "Q", "answer": 10**400}, "finite number, got 10000"),
        (
            {"video": "a.mp4", "prompt": "Q", "answer": "9" * 400, "unit": "cm"},
            "A number must be one that a float holds, got '999",
        ),
        (
            {"video": "a.mp4", "prompt": "Q", "answer": "B. x", "options": ["A. x", "B. y"]},
            r"letter and the text of `answer` must name the same one of the options \['A. x', 'B. y'\], got 'B. x'",
        ),
        ({"video": "a.mp4", "prompt": "Q", "box": [0, 0, 0, 1, 1, 1, 0], "unit": "cm"}, "has no `unit`; got 'cm'"),
        ({"video": "a.mp4", "prompt": "Q", "box": [10**400, 0, 0, 1, 1, 1, 0]}, "`box` must be cx, cy"),
        ({"video": "a.mp4", "prompt": "Q", "answer": "A", "num_frames": 10**30}, "number from 1 to 10000, got 1000"),
        ({"video": "a.mp4", "prompt": "Q", "box": [1, 2]}, "`box` must be cx, cy"),
        ({"video": "a.mp4", "prompt": "Q", "box": [0, 0, 0, 1, 0, 1, 0]}, "sizes above 0"),
        ({"video": "a.mp4", "prompt": "Q", "box": {"x": 1}}, "`box` must be cx, cy"),
        ({"video": "a.mp4", "prompt": "Q", "answer": "A", "num_frames": 0}, "`num_frames` must be a whole number"),
        ({"video": "a.mp4", "prompt": "Q", "answer": "A", "geometry": "/etc"}, "stay below its root"),
    ],
)
def test_row_that_is_neither_form_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        read(row)
