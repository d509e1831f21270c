# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from geode.data.readers.vica_thinking import record_from_row, split_answer


def read(*texts):
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return record_from_row({"video": "scannet/a.mp4", "conversations": turns}, file="train.json", index=0)


FULL = "<|im_start|>think\nI see two.\n\nYes.\n<|im_start|>response\nThere are two.\n<|im_start|>final\n\\[\n\\boxed{%s}\n\\]"


@pytest.mark.parametrize(
    ("boxed", "final"),
    [
        (r"\text{2}", "2"),
        ("2", "2"),
        (r"\text{B. chair}", "B. chair"),
        (r"\text{ 2.5 }", "2.5"),
        (r"\textbf{\text{left}}", "left"),
        (r"\text{a set \{x\}}", r"a set \{x\}"),
        (r"\text{2} \text{m}", r"\text{2} \text{m}"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
    ],
)
def test_answer_is_taken_apart(boxed, final):
    record = read("<image>\nHow many lamps?", FULL % boxed)
    assert record.kind == "text"
    assert record.prompt == "How many lamps?"
    assert record.rationale == "I see two.\n\nYes."
    assert record.answer_text == "There are two."
    assert record.final == final


@pytest.mark.parametrize(
    ("answer", "rationale", "text", "final"),
    [
        ("There are two.", None, "There are two.", None),
        ("There are two. \\[\\boxed{\\text{2}}\\]", None, "There are two.", "2"),
        ("<|im_start|>think\nHm.\n<|im_start|>response\nTwo.", "Hm.", "Two.", None),
        ("<|im_start|>think\nHm.\n<|im_start|>final\n\\boxed{2}", "Hm.", "2", "2"),
        ("<|im_start|>response\nTwo.\n<|im_start|>final\n2", None, "Two.", "2"),
        ("<|im_start|>response\nTwo.<|im_end|>", None, "Two.", None),
        ("<|im_start|>think Hm. <|im_start|>response Two. <|im_start|>final \\boxed{\\text{2}", "Hm.", "Two.", "2"),
    ],
)
def test_parts_may_be_absent(answer, rationale, text, final):
    record = read("How many?", answer)
    assert (record.rationale, record.answer_text, record.final) == (rationale, text, final)


def test_answer_without_words_is_refused():
    with pytest.raises(ValueError, match="must have a response or a final part"):
        read("How many?", "<|im_start|>think\nHm.")


def test_number_is_no_number_here():
    record = read("How many?", "<|im_start|>response\n2")
    assert (record.kind, record.value_si) == ("text", None)


def test_several_turns_are_all_taken_apart():
    record = read("Q1", FULL % "1", "Q2", FULL % "2")
    assert record.conversation == [["Q1", "There are two."], ["Q2", "There are two."]]
    assert record.rationale == "I see two.\n\nYes.\nI see two.\n\nYes."
    assert (record.turns, record.final) == (2, "2")


PIECES = [
    "<|im_start|>",
    "<|im_end|>",
    "think",
    "response",
    "final",
    "<|im_",
    "start|>",
    "end|>",
    "\n",
    "x",
    "\\boxed{",
    "}",
    "\\[",
]


@given(st.lists(st.sampled_from(PIECES), max_size=16))
@example(["<|im_", "\\[", "start|>", "\\boxed{"])  # what is taken out joins a mark
def test_no_mark_stays(pieces):
    parts = split_answer("".join(pieces))
    assert "<|im_start|>" not in json.dumps(parts)
    assert "<|im_end|>" not in json.dumps(parts)
    assert "<|im_" not in read("Q<|im_<|im_end|>start|>", "x").prompt
