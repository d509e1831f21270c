# SPDX-License-Identifier: Apache-2.0
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import geode
from geode.data.readers import read_records
from geode.data.readers.rooms import FEATURES, record_from_row
from geode.data.synthetic_rooms.tables import QUESTION_SCHEMA


def shipped_rows():
    lines = (geode.embedded_scene() / "questions.jsonl").read_text().splitlines()
    rows = [{**json.loads(line), "rationale": "I look around.", "video": "videos/room_000077.mp4"} for line in lines]
    return [{name: row[name] for name in FEATURES} for row in rows]


def test_questions_of_the_shipped_scene_are_read_through_parquet(tmp_path):
    rows = shipped_rows()
    (tmp_path / "questions").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema), tmp_path / "questions" / "train.parquet")
    records = list(read_records("rooms", tmp_path))
    assert len({record["uid"] for record in records}) == len(rows)
    for row, record in zip(rows, records, strict=True):
        assert (record["media_type"], record["media"]) == ("video", "videos/room_000077.mp4")
        assert (record["geometry"], record["rationale"]) == ("geometry/room_000077", "I look around.")
        assert (record["value"], record["unit"], record["value_si"]) == (row["value"], row["unit"], row["value_si"])
        assert record["box"] == row["box"]
        assert record["kind"] == ("box" if row["box"] else "number" if row["value"] is not None else "choice")
        assert record["answer_text"] == row["ground_truth"]
        assert row["question"] in record["prompt"]
    assert {record["kind"] for record in records} == {"box", "number", "choice"}


def test_columns_are_those_that_the_writer_writes():
    assert FEATURES.arrow_schema.names == QUESTION_SCHEMA.names
    assert FEATURES.arrow_schema.types == QUESTION_SCHEMA.types


def test_prompts_are_the_benchmarks_but_for_boxes():
    by_kind = {record.kind: record for record in (record_from_row(row, file="f", index=0) for row in shipped_rows())}
    assert by_kind["number"].prompt.startswith("These are frames of a video.\n")
    assert by_kind["choice"].prompt.endswith("Answer with the option's letter from the given choices directly.")
    assert by_kind["box"].prompt.startswith("Locate the ")


@pytest.mark.parametrize("box", [[1.0, 2.0], "box", [None] * 7])
def test_box_must_have_seven_numbers(box):
    with pytest.raises(ValueError, match="`box` must have 7 numbers"):
        record_from_row({**shipped_rows()[0], "box": box}, file="f", index=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": "3"}, "`value` and `value_si` must be numbers"),
        ({"value": float("inf")}, "Numbers must be finite"),
        ({"value_si": float("nan")}, "Numbers must be finite"),
        ({"unit": 3}, "`unit` must be text, got 3"),
    ],
)
def test_number_must_be_a_finite_one(changes, message):
    row = next(row for row in shipped_rows() if row["value"] is not None)
    with pytest.raises(ValueError, match=message):
        record_from_row({**row, **changes}, file="f", index=0)
