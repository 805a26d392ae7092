"""An output folder belongs to one run: other jobs are kept out, and a refused one touches nothing."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_osd.system.files import new_state
from recipes.common.run_folder import RunFolder, folder_name, locked

ROOT = str(Path(__file__).parents[3])


def leave(folder: Path, *names: str):
    """What a run may have left."""
    folder.mkdir(exist_ok=True)
    for name in names:
        if name == "checkpoint":
            with new_state(folder / name) as state:
                (state / "state.json").write_text("{}")
        elif name == "draft":
            (folder / name).mkdir()
            (folder / name / "config.json").write_text("{}")
        else:
            (folder / name).write_text("{}\n")


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    "left", ["metrics.jsonl", "metrics.rank1.jsonl", "lossless.jsonl", "summary.json", "checkpoint", "draft"]
)
def test_a_folder_with_a_run_in_it_is_refused_and_left_as_it_is(tmp_path, left):
    leave(tmp_path, left)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"\({left}\).*--resume.*--overwrite"):
        RunFolder(tmp_path)
    assert contents(tmp_path) == before
    assert not (tmp_path / ".lock").exists(), "not even a lock"


def test_what_is_no_run_does_not_matter(tmp_path):
    leave(tmp_path, "prompts.jsonl", "notes.txt")
    (tmp_path / "metrics.jsonl").touch()  # of a run that never began
    (tmp_path / "checkpoint").mkdir()
    with RunFolder(tmp_path):
        pass


def test_a_run_without_a_checkpoint_is_gone_on_with_only_where_nothing_but_rows_is_lost(tmp_path):
    leave(tmp_path, "metrics.jsonl")
    with RunFolder(tmp_path, resume=True):  # killed before its first checkpoint
        pass
    leave(tmp_path, "draft")
    with pytest.raises(ValueError, match="no checkpoint to go on from"):
        RunFolder(tmp_path, resume=True)


def test_resume_and_overwrite_are_two_things(tmp_path):
    with pytest.raises(ValueError, match="both set"):
        RunFolder(tmp_path, resume=True, overwrite=True)


def test_what_the_run_before_left_goes_when_asked_and_not_a_moment_earlier(tmp_path):
    leave(
        tmp_path,
        "metrics.jsonl",
        "metrics.rank0.jsonl",
        "summary.json",
        "curves.png",
        "checkpoint",
        "draft",
        "mine.txt",
    )
    before = contents(tmp_path)
    with RunFolder(tmp_path, overwrite=True) as folder:
        assert contents(tmp_path) == before
        folder.clear()
        left = {path.name for path in contents(tmp_path)}
    assert left == {"config.json", "mine.txt"}, "the draft stays until another replaces it"


def test_without_being_asked_nothing_is_cleared(tmp_path):
    leave(tmp_path, "metrics.jsonl", "checkpoint")
    before = contents(tmp_path)
    with RunFolder(tmp_path, resume=True) as folder:
        folder.clear()
    assert contents(tmp_path) == before


def test_a_second_job_is_kept_out_while_the_first_is_there(tmp_path):
    second = RunFolder(tmp_path / "out", overwrite=True)
    with RunFolder(tmp_path / "out"), pytest.raises(ValueError, match="in use by another process"), second:
        pass
    with RunFolder(tmp_path / "out"):
        pass


def test_what_a_job_left_that_has_just_ended_is_seen(tmp_path):
    """It was there when the folder was looked at, and its lock is gone now."""
    folder = RunFolder(tmp_path)
    leave(tmp_path, "summary.json")
    with pytest.raises(ValueError, match=r"summary\.json"), folder:
        pass
    with RunFolder(tmp_path, overwrite=True):  # the lock was let go of
        pass


def test_the_lock_is_gone_with_a_job_that_was_killed(tmp_path):
    code = (
        f"import sys, time; sys.path.insert(0, {ROOT!r})\n"
        "from recipes.common.run_folder import RunFolder\n"
        f"with RunFolder({str(tmp_path)!r}): print('in', flush=True); time.sleep(60)"
    )
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match="in use"), RunFolder(tmp_path):
            pass
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
        job.stdout.close()
    with RunFolder(tmp_path):
        pass


def test_a_place_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OSError, match=f"--output_dir {place}"):
            RunFolder(place)


def test_a_lock_that_cannot_be_had_is_no_reason_to_write_beside_another(tmp_path):
    with (
        locked(tmp_path / "lock", "it"),
        pytest.raises(ValueError, match="it is in use"),
        locked(tmp_path / "lock", "it"),
    ):
        pass


# Names that data has.


@pytest.mark.parametrize("name", ["sql", "under_$5_and_over_$10", "日本語", "a b-c.d", "über"])
def test_a_harmless_name_is_a_folders_own(name):
    assert folder_name(name) == name


HOSTILE = [
    "..",
    ".",
    "../x",
    "/etc/x",
    "a/b",
    "a\\b",
    ".hidden",
    "a\0b",
    "a\nb",
    "C:x",
    "x" * 400,
    "é" * 200,
    "x" * 399 + "y",
    "a.",
    "%2E.",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_any_other_is_one_folder_within(tmp_path, name):
    folder = tmp_path / folder_name(name)
    folder.mkdir()
    assert folder.resolve().parent == tmp_path.resolve()
    assert [path.name for path in tmp_path.iterdir()] == [folder_name(name)]


def test_and_no_two_names_are_one():
    assert len({folder_name(name) for name in HOSTILE}) == len(HOSTILE)
    assert folder_name("a/b") != folder_name("a%2Fb")
