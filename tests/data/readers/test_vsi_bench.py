# SPDX-License-Identifier: Apache-2.0
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geode.data.readers import read_records
from geode.data.readers.vsi_bench import CHOICE_TYPES, NUMBER_TYPES, record_from_row


def a_row(question_type="object_counting", **changes):
    row = {"id": 12, "dataset": "scannetpp", "scene_name": "0a1b2c3d4e", "question_type": question_type}
    return {**row, "question": "How many chair(s)?", "ground_truth": "4", "options": None, "pruned": True, **changes}


def read(row):
    return record_from_row(row, file="test", index=0)


@pytest.mark.parametrize(
    ("question_type", "unit", "value_si"),
    [
        ("object_counting", "count", 4),
        ("object_abs_distance", "m", 4),
        ("object_size_estimation", "cm", 0.04),
        ("room_size_estimation", "m2", 4),
    ],
)
def test_number_has_the_unit_of_its_task(question_type, unit, value_si):
    record = read(a_row(question_type, question="How much?"))
    assert (record.kind, record.value, record.unit, record.value_si) == ("number", 4.0, unit, value_si)
    assert record.uid == "VSI-Bench:12"
    assert (record.subset, record.scene) == ("pruned", "0a1b2c3d4e")


@pytest.mark.parametrize("question_type", CHOICE_TYPES)
def test_choice_has_its_options_in_the_prompt(question_type):
    record = read(a_row(question_type, ground_truth="A", options=["A. left", "B. right"], pruned=False))
    assert (record.kind, record.letter, record.subset) == ("choice", "A", None)
    assert record.prompt.splitlines()[2:] == [
        "Options:", "A. left", "B. right", "Answer with the option's letter from the given choices directly.",
    ]  # fmt: skip


def test_types_are_the_benchmarks_ten():
    assert len({*NUMBER_TYPES, *CHOICE_TYPES}) == 10


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (a_row("object_localization"), "must be one of .* got 'object_localization'"),
        (a_row("route_planning", ground_truth="A"), "`options` of route_planning must be a list of texts, got None"),
        (a_row("route_planning", options=["A. x"]), "must be a choice, got '4'"),
        (a_row(ground_truth="A"), "must be a number, got 'A'"),
        (a_row(scene_name="../../a"), "stay below its root"),
    ],
)
def test_row_that_is_not_the_benchmarks_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        read(row)


def test_parquet_is_streamed(tmp_path):
    rows = [a_row(id=number) for number in range(3000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test-00000-of-00001.parquet", row_group_size=700)
    records = list(read_records("vsi_bench", tmp_path))
    assert [record["uid"] for record in records] == [f"VSI-Bench:{number}" for number in range(3000)]
    assert records[7] == read(rows[7]).to_dict()
