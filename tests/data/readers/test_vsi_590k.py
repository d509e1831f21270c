# SPDX-License-Identifier: Apache-2.0
import pytest

from geode.data.readers.vsi_590k import record_from_row


VIDEO_PRE = "These are frames of a video.\n"
NUMBER_POST = "\nPlease answer the question using a single word or phrase."
CHOICE_POST = "\nAnswer with the option's letter from the given choices directly."


def read(question, answer, question_type, **medium):
    row = {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        "question_type": question_type,
        **(medium or {"video": "adt/a1.mp4"}),
    }
    return record_from_row(row, file="vsi_590k.jsonl", index=5)


@pytest.mark.parametrize(
    ("question", "answer", "question_type", "unit", "value_si"),
    [
        ("How tall is the sofa in inches?", "31.5", "absolute_size_object", "in", 0.8001),
        ("How tall is the sofa in centimeters?", "80.0", "absolute_size_object", "cm", 0.8),
        ("How tall is the sofa in feet?", "2.6", "absolute_size_object", "ft", 0.79248),
        ("How tall is the sofa in meters?", "0.8", "absolute_size_object", "m", 0.8),
        ("How large is the room in square meters?", "20.0", "absolute_size_room", "m2", 20.0),
        ("How many instances of lamp are there?", "3", "absolute_count", "count", 3.0),
    ],
)
def test_number_is_regressed_in_si(question, answer, question_type, unit, value_si):
    record = read(f"<image>\n{VIDEO_PRE}{question}{NUMBER_POST}", answer, question_type)
    assert (record.kind, record.value, record.unit) == ("number", float(answer), unit)
    assert record.value_si == pytest.approx(value_si, rel=1e-6)
    assert record.prompt == f"{VIDEO_PRE}{question}{NUMBER_POST}"
    assert record.answer_text == answer
    assert record.is_regressed


def test_direction_in_unknown_unit_stays_text():
    record = read(
        f"<image>\n{VIDEO_PRE}By how many degrees is it to the right?{NUMBER_POST}",
        "-37.5",
        "absolute_direction_object",
    )
    assert (record.kind, record.value, record.unit, record.value_si) == ("number", -37.5, "deg?", None)
    assert not record.is_regressed


@pytest.mark.parametrize("head", ["\nOptions:\n", "\n"])
@pytest.mark.parametrize("question_type", ["relative_direction_object", "relative_distance_camera", "relative_count"])
def test_choice_needs_no_options_line(head, question_type):
    question = f"Which is nearer?{head}A. lamp\nB. sofa{CHOICE_POST}"
    record = read(f"<image>\n{VIDEO_PRE}{question}", "B", question_type)
    assert (record.kind, record.letter, record.answer_text) == ("choice", "B", "B")
    assert record.prompt == VIDEO_PRE + question
    assert not record.is_regressed


def test_appearance_order_keeps_the_full_answer():
    record = read(
        f"<image>\n{VIDEO_PRE}In what order?\nA. cup, mat\nB. mat, cup{CHOICE_POST}", "B. mat, cup", "appearance_order"
    )
    assert (record.kind, record.letter, record.answer_text) == ("choice", "B", "B. mat, cup")


@pytest.mark.parametrize("place", ["<image>\n{}", "{}\n<image>", "<image>\n<image>\n{}", "<image>{}<image>"])
def test_media_token_is_removed_wherever_it_stands(place):
    assert read(place.format("How many?"), "3", "absolute_count", image="hypersim/a.jpg").prompt == "How many?"


def test_uid_scene_and_subset_come_from_file_and_path():
    record = read("<image>\nHow many?", "3", "absolute_count", video="scannet/scene0191_00.mp4")
    assert (record.uid, record.subset, record.scene) == ("VSI-590K:vsi_590k.jsonl:5", "scannet", "scene0191_00")
    record = read("<image>\nHow many?", "3", "absolute_count", image="robotics/agibot_1.jpg")
    assert (record.media_type, record.subset, record.scene) == ("image", "robotics", None)


def test_row_without_type_is_read():
    record = read("<image>\nHow many lamps?", "3", None)
    assert (record.question_type, record.unit) == (None, "count")


@pytest.mark.parametrize(
    ("medium", "message"),
    [
        ({"video": "a.mp4", "image": "b.jpg"}, "exactly one of `video` and `image`"),
        ({"video": None}, "exactly one of `video` and `image`"),
        ({"video": "../a.mp4"}, "stay below its root"),
    ],
)
def test_row_must_have_one_medium(medium, message):
    with pytest.raises(ValueError, match=message):
        read("<image>\nHow many?", "3", "absolute_count", **medium)
