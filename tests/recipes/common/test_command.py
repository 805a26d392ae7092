"""Flags and config files: an error names the value and how to correct it, before any work."""

import dataclasses
import json
from dataclasses import dataclass

import pytest

from hf_osd.config import REMOVED, OnlineConfig
from hf_osd.system.bounds import check_options, number, option, switch, whole
from recipes.common.command import check_paths, check_repository, numbers_of, run_command
from recipes.common.options import optional_string, sampling_temperature, string


@dataclass
class Arguments:
    output_dir: str = option("out", string(), "Where to write.")
    push_to_hub: str | None = option(None, optional_string(), "A repository.")
    requests: int | None = option(None, whole(1).or_none(), "How many.")
    share: float = option(0.5, number(0), "Of all.")
    flag: bool = option(False, switch(), "Whether.")
    json: str | None = option(None, optional_string(), "A file.")
    overwrite: bool = option(False, switch(), "Whether to replace it.")
    target: str = option("embedded", string(), "A model.")
    stream: str = option("stdlib", string(), "Prompts.")
    again: float = option(0.0, sampling_temperature(), "A temperature.")

    def __post_init__(self):
        check_options(self)


@pytest.mark.parametrize("word", ["false", "False", "no", "off", "none", "null", "", False, None])
def test_an_optional_text_is_left_out_by_false_no_off_and_none(word):
    assert Arguments(push_to_hub=word).push_to_hub is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"push_to_hub": "true"}, "`push_to_hub` is 'true'; give a text, or none"),
        ({"push_to_hub": True}, "`push_to_hub` is True; give"),
        ({"output_dir": None}, "`output_dir` is None; give a text"),
        ({"output_dir": False}, "`output_dir` is False; give a text"),
        ({"requests": "12"}, "`requests` is '12'; give a whole number ≥ 1, or None"),
        ({"requests": 2.5}, "`requests` is 2.5"),
        ({"requests": True}, "`requests` is True"),
        ({"share": "much"}, "`share` is 'much'; give a number"),
        ({"again": float("inf")}, "`again` is inf; give a temperature"),
        ({"again": -1}, "`again` is -1; give a temperature"),
        ({"flag": "perhaps"}, "`flag` is 'perhaps'; choose one of True, False"),
    ],
)
def test_a_value_of_another_kind_is_named(values, says):
    with pytest.raises(ValueError, match=says):
        Arguments(**values)


def test_a_whole_number_is_a_number():
    assert Arguments(share=1).share == 1


@pytest.mark.parametrize("name", ["me/my draft", "a/b/c", "me/", "--x", "me/draft.git"])
def test_a_name_that_no_repository_has_is_refused(name):
    with pytest.raises(ValueError, match=r"`push_to_hub` is .*no repository's name"):
        check_repository(name, "org/target")


def test_no_draft_is_pushed_over_its_target():
    with pytest.raises(ValueError, match="is the target, and would be written over"):
        check_repository("Org/Target", "org/target")
    check_repository("me/target", "org/target")


@pytest.mark.parametrize("values", ["", "1,x", "1,,2", "-1", "1.5"])
def test_numbers_that_cannot_be_read_are_named_by_their_flag(values):
    with pytest.raises(ValueError, match="`seeds` is"):
        numbers_of(values, "seeds", least=0)


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text("{}")
    (tmp_path / "mine.yaml").write_text("flag: true\n")
    (tmp_path / "out" / "draft").mkdir(parents=True)
    (tmp_path / "out" / "summary.json").write_text("{}")
    (tmp_path / "link").symlink_to("out")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("values", "config", "says"),
    [
        ({"target": "model", "output_dir": "model"}, None, "--output_dir model is --target model"),
        ({"target": "model", "output_dir": "model/new"}, None, "lies within --target"),
        ({"target": "out/draft"}, None, "is --target out/draft"),
        ({"target": "link/draft"}, None, "is --target link/draft"),
        ({"stream": "stdlib, out/summary.json"}, None, "is --stream out/summary.json"),
        (
            {"stream": "prompts.jsonl", "json": "prompts.jsonl", "overwrite": True},
            None,
            "--json prompts.jsonl is --stream",
        ),
        ({"target": "model", "json": "model/config.json", "overwrite": True}, None, "lies within --target"),
        ({"json": "mine.yaml", "overwrite": True}, "mine.yaml", "is --config mine.yaml"),
        ({"json": "prompts.jsonl"}, None, "is there already.*--overwrite"),
        ({"json": "model"}, None, "is a folder"),
        ({"json": "prompts.jsonl/x.json"}, None, "cannot be made"),
        ({"output_dir": "prompts.jsonl"}, None, "is a file"),
    ],
)
def test_no_output_is_an_input_or_replaces_what_is_there_unasked(place, values, config, says):
    with pytest.raises((ValueError, OSError), match=says):
        check_paths(Arguments(**values), config)


@pytest.mark.parametrize(
    "values",
    [
        {"stream": "prompts.jsonl", "output_dir": "."},
        {"target": "model"},
        {"json": "new/figures.json"},
        {"json": "/dev/null"},
    ],
)
def test_others_are_not_refused_and_nothing_is_made(place, values):
    check_paths(Arguments(**values))
    assert not (place / "new").exists()


def test_no_name_that_data_has_breaks_off_a_table(monkeypatch, tmp_path):
    """On a terminal that has no such letters."""
    import io
    import sys

    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run_command(Arguments, lambda args, config: print("α日本"), [f"--output_dir={tmp_path / 'out'}"]) == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"\\u03b1\\u65e5\\u672c\n"


def test_false_in_a_config_file_leaves_a_text_out(tmp_path, refused):
    config, seen = tmp_path / "mine.yaml", []
    config.write_text("push_to_hub: false\nrequests: 3\n")
    flags = ["--config", str(config), "--output_dir", str(tmp_path / "out")]
    assert run_command(Arguments, lambda args, config: seen.append(args), flags) == 0
    assert (seen[0].push_to_hub, seen[0].requests) == (None, 3)
    config.write_text(json.dumps({"requests": 2.5}))
    refused(run_command, Arguments, lambda *args: pytest.fail("it ran"), flags, says="`requests` is")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("requests: 3\nflag: [1\n", "line 3: "),
        ("requests: 3\n\tflag: true\n", "line 2: "),
        ("- requests\n", "has no keys"),
        ("", "has no keys"),
        ("requests: \xff\n", "save it as UTF-8"),
    ],
)
def test_a_config_file_that_cannot_be_read_is_named_by_its_line(tmp_path, refused, text, says):
    config = tmp_path / "mine.yaml"
    config.write_bytes(text.encode("latin-1"))
    refused(run_command, Arguments, lambda *args: pytest.fail("it ran"), ["--config", str(config)], says=says)
    refused(run_command, Arguments, lambda *args: pytest.fail("it ran"), ["--config", str(config)], says=str(config))


def test_the_help_of_a_flag_is_that_of_the_field_and_says_its_bound(capsys):
    with pytest.raises(SystemExit, match="0"):
        run_command(Arguments, lambda *args: pytest.fail("it ran"), ["--help"])
    said = "".join(capsys.readouterr().out.split())  # argparse breaks lines, also at hyphens
    for field in dataclasses.fields(OnlineConfig):
        assert f"--{field.name}" in said
        assert "".join(field.metadata["help"].split()) in said


@pytest.mark.parametrize("flags", [["--replay-by=loss"], ["--update_age", "3"], ["--held_back_share", "0.1"]])
def test_a_flag_that_is_gone_is_named_with_what_to_do_in_its_place(tmp_path, refused, flags):
    name, _, value = "=".join(flags).removeprefix("--").replace("-", "_").partition("=")
    says = f"`{name}` is no field any more: {REMOVED[name][1]}"
    refused(run_command, Arguments, lambda *args: pytest.fail("it ran"), flags, says=says)
    config = tmp_path / "mine.yaml"
    config.write_text(f"{name}: {value}\n")
    refused(run_command, Arguments, lambda *args: pytest.fail("it ran"), ["--config", str(config)], says=says)


def test_a_config_file_with_a_byte_order_mark_is_read_and_one_that_is_not_named_is_asked_for(tmp_path, refused):
    config, seen = tmp_path / "mine.yaml", []
    config.write_text(f"requests: 3\noutput_dir: {tmp_path / 'out'}\n", encoding="utf-8-sig")
    assert run_command(Arguments, lambda args, config: seen.append(args), ["--config", str(config)]) == 0
    assert seen[0].requests == 3
    refused(
        run_command, Arguments, lambda *args: pytest.fail("it ran"), ["--config"], says="`--config` is without a file"
    )
