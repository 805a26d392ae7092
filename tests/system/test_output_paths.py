"""No output is an input, by whatever path it is given; and what cannot be written is said before the work."""

import os

import pytest

from hf_osd.system.output_paths import check_apart, check_writable


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    os.link(tmp_path / "prompts.jsonl", tmp_path / "same.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("output", "given", "how"),
    [
        ("model", "model", "is"),
        ("./model/", "model", "is"),
        ("link", "model", "is"),
        ("model", "link/../model", "is"),
        ("link/sub/new", "model", "lies within"),
        ("model/config.json", "model", "lies within"),
        (".", "model", "holds"),
        ("same.jsonl", "prompts.jsonl", "is"),
    ],
)
def test_an_output_that_is_an_input_is_refused(place, output, given, how):
    with pytest.raises(ValueError, match=rf"--out {output} {how} --in {given}, .*choose another place for --out"):
        check_apart({"--out": output}, {"--in": given})
    with pytest.raises(ValueError, match="--out"):
        check_apart({"--out": place / output}, {"--in": given})


@pytest.mark.parametrize(
    ("output", "given"),
    [
        ("models", "model"),
        ("runs/new", "model"),
        (".", "prompts.jsonl"),
        ("model2/model", "model"),
        ("x", "org/name"),
        ("x", ""),
    ],
)
def test_others_are_not(place, output, given):
    check_apart({"--out": output}, {"--in": given})


@pytest.mark.parametrize(
    ("path", "folder", "says"),
    [
        ("model", False, "is a folder; give the path of a file"),
        ("prompts.jsonl", True, "is a file; give the path of a folder"),
        ("prompts.jsonl/new", True, "cannot be made: .*is a file"),
    ],
)
def test_what_cannot_be_written_is_named(place, path, folder, says):
    with pytest.raises(OSError, match=f"--out {path} {says}"):
        check_writable("--out", path, folder)


def test_nothing_is_made_for_the_asking(place):
    check_writable("--out", "a/b/c.json")
    check_writable("--out", "model", folder=True)
    assert not (place / "a").exists()
