# SPDX-License-Identifier: Apache-2.0
"""Cambrian-Alignment, S-MiT and SSR-CoT: what they say is text, whatever its form."""

import pytest

from geode.data.readers import cambrian_alignment, smit, ssr_cot


FORMS = ["A red kite.", "4", "2.5", "B", "B.", "B. chair"]


def caption(*texts, **changes):
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    row = {"id": "x", "image": "./sam/sa_1.jpg", "conversations": turns, **changes}
    return cambrian_alignment.record_from_row(row, file="jsons/alignment_2.5m.jsonl", index=1)


@pytest.mark.parametrize("answer", FORMS)
def test_cambrian_alignment_is_text(answer):
    record = caption("Describe it, in meters.\n<image>", answer)
    assert (record.kind, record.answer_text, record.value_si) == ("text", answer, None)
    assert (record.media_type, record.media, record.subset) == ("image", "sam/sa_1.jpg", "sam")
    assert record.prompt == "Describe it, in meters."


def test_cambrian_alignment_asks_where_the_row_does_not():
    assert caption("<image>", "A red kite.").prompt == "Describe the image briefly."


def test_cambrian_alignment_keeps_turns():
    assert caption("<image>\nQ", "A", "Q2", "A2").conversation == [["Q", "A"], ["Q2", "A2"]]


@pytest.mark.parametrize("answer", FORMS)
def test_smit_is_text(answer):
    record = smit.record_from_row({"video": "./smit/1.mp4", "caption": f" {answer}\n"}, file="manifest.jsonl", index=3)
    assert (record.kind, record.answer_text, record.prompt) == ("text", answer, "Describe the video briefly.")
    assert (record.media_type, record.media, record.uid) == ("video", "smit/1.mp4", "S-MiT:manifest.jsonl:3")


@pytest.mark.parametrize("answer", FORMS)
def test_ssr_cot_is_text(answer):
    row = {"question": "<image>\nHow many?", "rationale": "I count.", "answer": answer, "image_path": "./coco/0.jpg"}
    record = ssr_cot.record_from_row({**row, "depth_path": "coco_d/0.png"}, file="ssr-cot.jsonl", index=0)
    assert (record.kind, record.answer_text, record.final, record.rationale) == ("text", answer, answer, "I count.")
    assert (record.media_type, record.media, record.prompt) == ("image", "coco/0.jpg", "How many?")


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (smit, {"video": "a.mp4"}, "`caption` must be text, got None"),
        (smit, {"video": "a.mp4", "caption": ["x"]}, "`caption` must be text"),
        (smit, {"caption": "x"}, "path of a medium must be text, got None"),
        (ssr_cot, {"question": "Q", "image_path": "a.jpg"}, "`answer` must be text, got None"),
        (ssr_cot, {"question": "<image>", "answer": "A", "image_path": "a.jpg"}, "must have text, got ''"),
        (ssr_cot, {"question": "Q", "answer": "A"}, "path of a medium"),
    ],
)
def test_row_without_its_fields_is_refused(reader, row, message):
    with pytest.raises(ValueError, match=message):
        reader.record_from_row(row, file="f.jsonl", index=0)
