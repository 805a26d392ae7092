"""Rows that runs append to a file: an incomplete row is dropped, a foreign line is named, and concurrent runs do not mix."""

import json
from functools import partial

import pytest

from recipes.common.row_log import RowLog

from ...served import in_threads

FIELDS = ("key", "value")


def row(i):
    return {"key": str(i), "value": i}


def test_what_was_added_is_read_again(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    log = RowLog(str(path), FIELDS)
    assert log.rows == []
    for i in range(3):
        log.append(row(i))
    assert RowLog(str(path), FIELDS).rows == [row(0), row(1), row(2)]


def test_without_a_file_nothing_is_kept():
    log = RowLog(None, FIELDS)
    log.append(row(0))
    assert log.rows == []


@pytest.mark.parametrize("torn", ['{"key": "1", "va', "{", '"x'])
def test_half_a_row_of_a_killed_run_is_left_out_and_written_over(tmp_path, torn, caplog):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(row(0)) + "\n" + torn)
    log = RowLog(str(path), FIELDS)
    assert log.rows == [row(0)]
    assert "line 2: half a row" in caplog.text
    log.append(row(1))
    assert RowLog(str(path), FIELDS).rows == [row(0), row(1)]


def test_a_last_row_without_its_end_of_line_stays(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(row(0)))
    RowLog(str(path), FIELDS).append(row(1))
    assert RowLog(str(path), FIELDS).rows == [row(0), row(1)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"key": "0", "value": 0}\nnot a row\n{"key": "1", "value": 1}\n', "line 2: no JSON object"),
        ('{"key": "0", "value": 0}\n[1]\n', "line 2: no JSON object"),
        ('\n{"prompt": "of somebody"}\n', "line 2: a row without `key`"),
    ],
)
def test_a_file_of_something_else_is_named_by_its_line_and_left(tmp_path, text, says):
    path = tmp_path / "runs.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"--log {path}, {says}") as error:
        RowLog(str(path), FIELDS)
    assert "of somebody" not in str(error.value)
    assert path.read_text() == text


def test_a_byte_order_mark_is_read_over_and_what_json_has_not_is_null(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(row(0)) + "\n", encoding="utf-8-sig")
    log = RowLog(str(path), FIELDS)
    log.append({"key": "1", "value": float("nan")})
    assert RowLog(str(path), FIELDS).rows == [row(0), {"key": "1", "value": None}]


def test_several_add_at_once(tmp_path):
    path = str(tmp_path / "runs.jsonl")

    def add(start):
        log = RowLog(path, FIELDS)
        for i in range(start, start + 20):
            log.append(row(i))

    assert in_threads(*(partial(add, start) for start in (0, 20, 40))) == []
    assert sorted(one["value"] for one in RowLog(path, FIELDS).rows) == list(range(60))


def test_a_folder_in_the_way_is_named(tmp_path):
    with pytest.raises(OSError, match="is a folder"):
        RowLog(str(tmp_path), FIELDS)
