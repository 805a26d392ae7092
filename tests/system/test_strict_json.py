"""JSON that every reader takes, whatever numbers a run came to."""

import json
import math

import pytest

from hf_osd.system.strict_json import dumps, loads, write_json


def strict(text: str):
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_what_is_no_finite_number_is_null_at_any_depth():
    value = {"a": math.nan, "b": [1.5, (math.inf, {"c": -math.inf})], "d": None, "e": "NaN"}
    assert strict(dumps(value)) == {"a": None, "b": [1.5, [None, {"c": None}]], "d": None, "e": "NaN"}


def test_or_comes_back_as_it_was():
    value = {"a": math.inf, "b": [-math.inf, 2], "e": "Infinity"}
    text = dumps(value, exact=True)
    strict(text)
    assert loads(text) == value
    assert math.isnan(loads(dumps(math.nan, exact=True)))


@pytest.mark.parametrize("text", ['{"a": NaN}', b'\xef\xbb\xbf{"a": NaN}', '\ufeff{"a": NaN}'])
def test_what_others_wrote_is_read(text):
    assert math.isnan(loads(text)["a"])


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new" / "figures.json"
    write_json(path, {"a": math.nan})
    assert strict(path.read_text()) == {"a": None}
    with pytest.raises(TypeError):
        write_json(path, {"a": {1, 2}})
    assert strict(path.read_text()) == {"a": None}
    assert [file.name for file in path.parent.iterdir()] == ["figures.json"]
