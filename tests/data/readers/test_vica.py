# SPDX-License-Identifier: Apache-2.0
import pytest

from geode.data.readers.vica import record_from_row


def read(file, *texts, video="scannetpp/0123456789.mp4"):
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return record_from_row({"video": video, "conversations": turns}, file=file, index=2)


@pytest.mark.parametrize(
    ("task", "answer", "unit", "value_si"),
    [
        ("object_abs_distance", "1.6", "m", 1.6),
        ("room_size", "35.18", "m2", 35.18),
        ("object_size_estimation", "142", "cm", 1.42),
        ("object_count", "4", "count", 4.0),
    ],
)
def test_base_number_takes_the_unit_of_its_task(task, answer, unit, value_si):
    record = read(f"scannetpp/base/{task}.json", "<image>\nState it.", answer)
    assert (record.kind, record.unit, record.value_si) == ("number", unit, value_si)
    assert (record.question_type, record.subset, record.scene) == (task, "base", "0123456789")
    assert record.prompt == "State it."
    assert record.uid == f"ViCA-322K:scannetpp/base/{task}.json:2"


@pytest.mark.parametrize("task", ["object_relative_distance", "obj_appearance_order"])
def test_base_choice_keeps_letter_and_text(task):
    record = read(f"scannet/base/{task}.json", "<image>\nWhich?\nA. cup\nC. chair, table", "C. chair, table")
    assert (record.kind, record.letter, record.answer_text) == ("choice", "C", "C. chair, table")


@pytest.mark.parametrize(
    "file",
    [
        "arkitscenes/base/triangular_positional_relationship.json",
        "scannet/complex/usage.json",
        "a/complex/conversation.json",
    ],
)
@pytest.mark.parametrize("answer", ["Sides are 1.2 m and 2 m.", "4", "B", "B. usage"])
def test_sentence_tasks_are_text_whatever_their_form(file, answer):
    record = read(file, "<image>\nDescribe it, in meters.", answer)
    assert (record.kind, record.answer_text, record.value, record.letter) == ("text", answer, None, None)


def test_conversation_keeps_every_turn():
    record = read(
        "scannetpp/complex/conversation.json", "<image>\nWhat room?", "A study.", "How many lamps?", "2", "Why?", "So."
    )
    assert (record.kind, record.turns, record.subset) == ("text", 3, "complex")
    assert record.conversation == [["What room?", "A study."], ["How many lamps?", "2"], ["Why?", "So."]]


def test_folder_may_lie_deeper():
    assert read("data/scannet/base/object_count.json", "How many?", "2").question_type == "object_count"


def test_path_must_say_the_subset():
    with pytest.raises(ValueError, match=r"base,complex.*got 'object_count\.json'"):
        read("object_count.json", "How many?", "2")
