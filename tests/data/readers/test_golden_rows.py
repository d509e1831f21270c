# SPDX-License-Identifier: Apache-2.0
"""Invented rows with the public schemas, and the records that the description of the datasets expects of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from geode.data.readers import READERS, record_from_row
from geode.data.schemas import Record


ROWS = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "fixtures" / "dataset_rows.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_row_gives_exactly_its_expected_record(number):
    case = ROWS[number]
    record = record_from_row(case["dataset"], case["row"], file=case["file"], index=7)
    found = {"media": [record.media_type, record.media]}
    found.update({name: getattr(record, name) for name in case["expected"] if name != "media"})
    assert found == case["expected"]
    assert record.source == READERS[case["dataset"]].NAME
    assert Record.from_dict(record.to_dict()) == record


def test_every_dataset_of_the_fixture_is_there():
    assert len(ROWS) == 19
    assert {case["dataset"] for case in ROWS} == {
        "VSI-Bench", "VSI-590K", "ViCA-322K", "ViCA-thinking-2.68k", "VLM-3R-DATA", "Cambrian-Alignment", "S-MiT", "SSR-CoT",
    }  # fmt: skip


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_row_with_empty_columns_gives_the_same_record(number):
    # A table has every column in every row.
    case = ROWS[number]
    reader = READERS[case["dataset"]]
    row = {**dict.fromkeys(reader.FEATURES), **case["row"]}
    settings = {"file": case["file"], "index": 7}
    assert reader.record_from_row(row, **settings) == reader.record_from_row(case["row"], **settings)


@pytest.mark.parametrize("name", READERS)
def test_reader_says_where_its_rows_come_from(name):
    reader = READERS[name]
    assert reader.LICENSE in (None, "apache-2.0")
    assert reader.REPO_ID is None or reader.REPO_ID.count("/") == 1
    assert reader.DATA_FILES
    assert all(not Path(pattern).is_absolute() for pattern in reader.DATA_FILES)
    assert READERS[reader.NAME] is reader
    assert reader.NAME in READERS


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "row", [{}, None, [], "text", {"conversations": [{}, {}], "video": 3}, {"video": "a", "image": "b"}]
)
def test_reader_names_file_and_row_of_what_it_cannot_read(name, row):
    with pytest.raises(ValueError, match=r"^Row 41 of part/some_file\.json cannot be read: "):
        record_from_row(name, row, file="part/some_file.json", index=41)


def test_importing_the_readers_loads_no_library():
    code = "import sys, geode.data.readers; print([name for name in ('datasets', 'torch', 'pyarrow') if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_readers_name_those_there_are():
    with pytest.raises(KeyError, match=r"no reader 'vsi'.*vsi_590k"):
        READERS["vsi"]
    assert "vsi" not in READERS
    assert None not in READERS
