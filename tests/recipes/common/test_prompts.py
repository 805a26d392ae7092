"""Streams: what a file may contain, errors for one that does not, and the two streams that need no file."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from recipes.common import prompts
from recipes.common.prompts import load_streams, read_stream, split_held_back, stdlib_prompts, word_problems

needs_reasoning_gym = pytest.mark.skipif(
    find_spec("reasoning_gym") is None, reason="pip install --no-deps reasoning-gym==0.1.25"
)


@pytest.fixture
def write(tmp_path):
    def write(name, *lines):
        path = tmp_path / name
        path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines), encoding="utf-8")
        return path

    return write


# Files


def test_rows_keep_their_order_and_get_domain_and_id(write):
    path = write(
        "sql.jsonl", {"prompt": "a", "unknown": 1}, "", {"prompt": "b", "domain": "code", "id": 7, "group": "g"}
    )
    assert read_stream(path) == [
        {"prompt": "a", "domain": "sql", "id": "1"},
        {"prompt": "b", "domain": "code", "id": "7", "group": "g"},
    ]


def test_prompts_seen_before_are_dropped_and_the_first_is_kept(write):
    path = write("s.jsonl", {"prompt": "a", "id": "first"}, {"prompt": "b"}, {"prompt": "a", "id": "again"})
    assert [row["id"] for row in read_stream(path)] == ["first", "2"]


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a"',
        '["a"]',
        "null",
        "{}",
        {"prompt": ""},
        {"prompt": " \t"},
        {"prompt": 3},
        {"prompt": None},
        {"prompt": "a", "domain": ""},
        {"prompt": "a", "domain": 3},
    ],
    ids=str,
)
def test_a_malformed_line_is_named_by_file_and_number(write, line):
    path = write("bad.jsonl", {"prompt": "good"}, "", line)
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3"):
        read_stream(path)


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "a"}\n{"prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 2"):
        read_stream(path)


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_an_empty_file_is_a_value_error(write, lines):
    with pytest.raises(ValueError, match=r"empty\.jsonl: no prompts"):
        read_stream(write("empty.jsonl", *lines))


def test_a_missing_file_is_an_os_error_that_says_what_can_be_given(tmp_path):
    with pytest.raises(OSError, match=r"none\.jsonl.*stdlib, word_problems, or hub:"):
        read_stream(tmp_path / "none.jsonl")


# load_streams


def test_streams_come_in_the_order_of_the_spec_and_domains_in_that_of_the_file(write):
    mixed = write(
        "mixed.jsonl", {"prompt": "1", "domain": "x"}, {"prompt": "2", "domain": "y"}, {"prompt": "3", "domain": "x"}
    )
    other = write("other.jsonl", {"prompt": "4"})
    streams = load_streams(f" {other}, {mixed}")
    assert [(name, [row["prompt"] for row in rows]) for name, rows in streams] == [
        ("other", ["4"]),
        ("x", ["1", "3"]),
        ("y", ["2"]),
    ]


@pytest.mark.parametrize("spec", ["", " , "])
def test_no_stream_is_a_value_error(spec):
    with pytest.raises(ValueError, match="`stream` is"):
        load_streams(spec)


def test_two_streams_of_one_domain_are_refused(write):
    path = write("a.jsonl", {"prompt": "1"})
    with pytest.raises(ValueError, match="domain 'a' twice"):
        load_streams(f"{path},{path}")


# The Hub


@pytest.fixture
def hub(monkeypatch):
    """`datasets.load_dataset` without a hub: remembers what was asked for."""
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return Dataset.from_dict({"question": ["a", "b", "a", "c"], "prompt": ["p", "q", "r", ""]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("spec", "args", "split"),
    [
        ("hub:o/n:test:question", ("o/n",), "test"),
        ("hub:o/n/main:train:question", ("o/n", "main"), "train"),
    ],
)
def test_a_dataset_of_the_hub_by_config_split_and_field(hub, spec, args, split):
    [(name, rows)] = load_streams(spec)
    assert (name, [row["prompt"] for row in rows]) == ("n", ["a", "b", "c"])
    assert hub == [(args, {"split": split})]


def test_a_dataset_is_read_no_further_than_asked(hub):
    [(_, rows)] = load_streams("hub:o/n", count=2)  # the fourth row is empty
    assert [row["prompt"] for row in rows] == ["p", "q"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hub:n", "hub:owner/name"),
        ("hub:o/", "hub:owner/name"),
        ("hub:o/n:train:prompt:more", "hub:owner/name"),
        ("hub:o/n:train:answer", r"no field 'answer'.*question"),
        ("hub:o/n", "row 3"),
    ],
)
def test_a_bad_dataset_is_named(hub, spec, message):
    with pytest.raises(ValueError, match=message):
        load_streams(spec)


# Encodings

ROWS = [{"prompt": "für α"}, {"prompt": "b"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_is_skipped_and_gives_the_encoding(tmp_path, encoding, end):
    path = tmp_path / "s.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row in ROWS)
    mark = "\ufeff" if encoding.endswith("e") else ""  # of these two Python writes none
    path.write_bytes((mark + text).encode(encoding))
    assert [row["prompt"] for row in read_stream(path)] == ["für α", "b"]
    assert [row["id"] for row in read_stream(path)] == ["1", "2"]


def test_marks_within_files_that_were_put_together_are_read_over(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_bytes(b"".join((json.dumps(row) + "\n").encode("utf-8-sig") for row in ROWS))
    assert [row["prompt"] for row in read_stream(path)] == ["für α", "b"]


def test_what_is_not_in_the_encoding_of_its_mark_is_named(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_bytes("{}".encode("utf-16") + b"x")
    with pytest.raises(ValueError, match=rf"{path}: .*save it as UTF-8"):
        read_stream(path)


@pytest.mark.parametrize("field", ["prompt", "domain", "id", "group"])
@pytest.mark.parametrize("half", [r"\ud83d", r"\ude00"])
def test_half_a_character_is_named_by_its_line_and_place_and_not_quoted(write, field, half):
    whole = json.dumps({"prompt": "secret words"} | {field: "secret"})
    path = write("s.jsonl", {"prompt": "a"}, "", whole.replace('secret"', f'secret{half}"'))
    with pytest.raises(
        ValueError, match=re.escape(f"{path}, line 3: `{field}` has half a character, {half}, at its 7. place")
    ) as error:
        read_stream(path)
    assert "secret" not in str(error.value)
    str(error.value).encode()  # it can be printed


def test_a_whole_pair_is_a_character(write):
    assert read_stream(write("s.jsonl", '{"prompt": "\\ud83d\\ude00"}'))[0]["prompt"] == "\N{GRINNING FACE}"


def test_a_file_whose_name_is_no_text_has_a_domain_that_is(tmp_path):
    name = os.fsencode(str(tmp_path)) + b"/s\xff.jsonl"
    with open(name, "w") as file:
        file.write('{"prompt": "a"}')
    assert read_stream(os.fsdecode(name))[0]["domain"] == "s?"


def test_a_line_that_is_nested_too_deep_is_named(write):
    with pytest.raises(ValueError, match="line 1"):
        read_stream(write("s.jsonl", '{"prompt": ' + "[" * 100_000))


# Held back


@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=30), st.integers(0, 8), st.integers(0, 3))
def test_what_is_held_back_shares_no_group_with_the_rest(groups, count, seed):
    rows = [{"prompt": str(i), "group": group} for i, group in enumerate(groups)]
    refused = None
    try:
        held, rest = split_held_back(rows, count, seed, "s")
    except ValueError as error:
        refused = str(error)
    if refused is not None:
        assert "too few" in refused
        assert count >= 1  # nothing to hold back is always possible
        return
    assert len(held) == count
    assert rest
    assert {row["group"] for row in held}.isdisjoint(row["group"] for row in rest)
    assert rest == [row for row in rows if row in rest]  # in the stream's order
    assert (held, rest) == split_held_back(rows, count, seed, "s")


def test_few_large_groups_are_held_back_whole_and_many_small_ones_by_a_row_each():
    """Questions about 20 databases: 100 can be held back. Variants of 90 texts: 24 come from 24 texts."""
    databases = [{"prompt": str(i), "group": i % 20} for i in range(1000)]
    held, rest = split_held_back(databases, 100, 0, "s")
    assert len({row["group"] for row in held}) == 6
    assert len(rest) == 700
    variants = [{"prompt": str(i), "group": i % 90} for i in range(900)]
    held, rest = split_held_back(variants, 24, 0, "s")
    assert len({row["group"] for row in held}) == 24
    assert len(rest) == 660


def test_rows_without_a_group_all_stay():
    rows = [{"prompt": str(i)} for i in range(10)]
    held, rest = split_held_back(rows, 4, 0, "s")
    assert sorted(row["prompt"] for row in held + rest) == [row["prompt"] for row in rows]


# Built in


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of two modules; importing or running either of them fails."""
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "hidden.py").write_text(
        'def hidden():\n    """A function of the tests, which nobody asks for."""\n'
    )
    (tmp_path / "broken.py").write_text("def :\n")
    (tmp_path / "shapes.py").write_text(
        'raise SystemExit("a module was run")\n'
        "def area(width, height=1):\n"
        '    """Return the area of a rectangle\n    of these sides.\n\n    More of it.\n    """\n'
        'def _private():\n    """A private function that has a long docstring."""\n'
        'def short():\n    """Too short."""\n'
    )
    (tmp_path / "twin.py").write_text('def area(a):\n    """Return the area of a rectangle of these sides."""\n')
    monkeypatch.setattr(prompts.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_stdlib_prompts_are_read_from_sources_that_are_not_run(library):
    assert stdlib_prompts(10, 0) == [
        {
            "prompt": "Write a Python function `area(width, height=1)`. Return the area of a rectangle of these sides.",
            "domain": "stdlib",
            "id": "shapes.area",
        }
    ]


def test_a_python_without_sources_is_an_os_error(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(OSError, match=r"no \.py sources"):
        stdlib_prompts(10, 0)


def test_the_real_library_has_enough_short_and_distinct_prompts():
    rows = stdlib_prompts(10_000, 0)
    assert len(rows) > 300
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert max(len(row["prompt"].split()) for row in rows) < 100
    assert rows[:50] == stdlib_prompts(50, 0) != stdlib_prompts(50, 1)


@needs_reasoning_gym
def test_word_problems_are_short_distinct_and_leave_no_package_half_imported():
    rows = word_problems(400, 0)
    assert len({row["prompt"] for row in rows}) == len(rows) == 400
    assert max(len(row["prompt"].split()) for row in rows) <= 80
    assert not any("Do not include units" in row["prompt"] for row in rows)
    assert len({row["group"] for row in rows}) > 50
    assert rows[:50] == word_problems(50, 0)
    assert not {row["prompt"] for row in word_problems(50, 1)} & {row["prompt"] for row in rows}
    assert not [name for name in sys.modules if name.startswith("reasoning_gym")]


@needs_reasoning_gym
def test_word_problems_do_not_hang_on_the_order_of_sets():
    code = "import sys; sys.path.insert(0, sys.argv[1]); from recipes.common import prompts; print(prompts.word_problems(300, 0))"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code, Path(prompts.__file__).parents[2]],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]


def test_without_reasoning_gym_the_mend_is_named(monkeypatch):
    monkeypatch.setattr(prompts, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="pip install --no-deps reasoning-gym"):
        word_problems(1, 0)
