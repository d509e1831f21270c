# SPDX-License-Identifier: Apache-2.0
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geode.data.readers import rows as rows_module
from geode.data.readers.rows import iter_lines, iter_rows, parse_line


JSON_ROWS = st.lists(
    st.dictionaries(
        st.text(max_size=6),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=12), lambda x: st.lists(x, max_size=4), max_leaves=6
        ),
    ),
    max_size=12,
)


def write(tmp_path, text, name="rows.json"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(rows=JSON_ROWS, indent=st.sampled_from([None, 0, 2]), is_ascii=st.booleans(), chunk=st.integers(1, 40))
def test_list_rows_are_those_of_json_for_any_window(tmp_path, rows, indent, is_ascii, chunk):
    path = write(tmp_path, " \n" + json.dumps(rows, indent=indent, ensure_ascii=is_ascii) + " \n")
    whole = rows_module.CHUNK_CHARS
    rows_module.CHUNK_CHARS = chunk
    try:
        assert list(iter_rows(path)) == rows
    finally:
        rows_module.CHUNK_CHARS = whole


@given(rows=JSON_ROWS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
def test_lines_are_those_of_json(tmp_path, rows):
    path = write(tmp_path, "".join(json.dumps(row, ensure_ascii=False) + "\r\n\n" for row in rows), "rows.jsonl")
    assert [parse_line(line) for line in iter_rows(path)] == rows


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_mark_of_utf_8_is_skipped(tmp_path, name):
    text = '{"a": "\u00e9"}' if name.endswith("l") else '[{"a": "\u00e9"}]'
    (row,) = iter_rows(write(tmp_path, b"\xef\xbb\xbf" + text.encode(), name))
    assert (parse_line(row) if isinstance(row, bytes) else row) == {"a": "\u00e9"}


def test_one_object_is_one_row(tmp_path):
    assert list(iter_rows(write(tmp_path, ' {"data": [{"a": 1}]}\n'))) == [{"data": [{"a": 1}]}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a JSON list of objects or one object, it starts with ''"),
        ("3", "it starts with '3'"),
        ('[{"a": 1} {"a": 2}]', "a comma or its end after row 0, got '{'"),
        ('[{"a": 1},]', "row 1 starts with ']'"),
        ('[{"a": 1}, 3]', "row 1 starts with '3'"),
        ('["a"]', "row 0 starts with '\"'"),
        ('[{"a": 1}', "a comma or its end after row 0, got ''"),
        ("[", "row 0 starts with ''"),
        ('[{"a": 1}, {"a": ', "Row 1 of .* is not JSON"),
        ('[{"a": }]', "Row 0 of .* is not JSON"),
        ('[{"a": 1}] x', "must end after its list, and goes on with 'x'"),
        ('[{"a": 1}][{"a": 1}]', "must end after its list"),
    ],
)
def test_list_that_is_broken_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        list(iter_rows(write(tmp_path, text)))


def test_row_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_ROW_CHARS", 1000)
    monkeypatch.setattr(rows_module, "CHUNK_CHARS", 100)
    row = json.dumps({"a": "x" * 5000})
    with pytest.raises(ValueError, match=r"Line 2 of .* is longer than 1000 bytes"):
        list(iter_rows(write(tmp_path, "{}\n" + row, "rows.jsonl")))
    with pytest.raises(ValueError, match=r"Row 1 of .* is not JSON"):
        list(iter_rows(write(tmp_path, "[{}, " + row + "]")))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_memory_is_that_of_a_few_rows(tmp_path, name):
    rows = [{"number": number, "text": "x" * 500} for number in range(20_000)]
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows, indent=1))
    tracemalloc.start()
    try:
        count = sum(1 for _ in iter_rows(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak < 3e6  # the file has 11 MB


def test_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be \.jsonl, \.json or \.parquet, got .*rows\.csv"):
        iter_rows(write(tmp_path, "a,b", "rows.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": ' + "[" * 200_000 + "]" * 200_000 + "}]", "Row 1 of .*rows.json cannot be decoded"),
        ('[{"a": ' + "9" * 5000 + "}]", "Row 0 of .*rows.json cannot be decoded"),
        ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "rows.json must be one JSON object"),
        ('{"a": 1} x', "rows.json must be one JSON object: Extra data"),
    ],
)
def test_json_that_python_cannot_hold_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        list(iter_rows(write(tmp_path, text)))


def test_lines_are_numbered_as_in_the_file(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf\n{"a": "x\xe2\x80\xa8\xc2\x85y"}\r\n  \n{}', "rows.jsonl")
    assert [(number, parse_line(line)) for number, line in iter_lines(path)] == [(2, {"a": "x\u2028\x85y"}), (4, {})]
