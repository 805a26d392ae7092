"""Files and states are whole or absent, and what was there before survives whatever goes wrong. Kills are in test_crash.py."""

import errno
import logging
import os

import pytest
from safetensors import SafetensorError

from hf_osd.system.files import discard_states, new_state, newest_state, staged, states


@pytest.fixture
def saved(tmp_path):
    """A directory with an older checkpoint in it."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "weights").write_text("old")
    (directory / "notes").write_text("mine")
    return directory


def contents(directory):
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


def save(directory, then=lambda: None):
    with staged(directory) as staging:
        for name in ("notes", "weights"):
            (staging / name).write_text("half")
        then()


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_files_are_replaced_and_others_stay(saved):
    with staged(saved) as staging:
        (staging / "weights").write_text("new")
        (staging / "part").mkdir()
        (staging / "part" / "more").write_text("new too")
        assert contents(saved)["weights"] == "old", "nothing is in place before all is written"
    assert contents(saved) == {"weights": "new", "notes": "mine", os.path.join("part", "more"): "new too"}
    assert sorted(p.name for p in saved.iterdir()) == ["notes", "part", "weights"], "no staging folder is left"


def test_who_reads_the_old_file_meanwhile_reads_it_whole(saved):
    """A server that maps the old weights: written over in place, they would change under it."""
    with open(saved / "weights") as old:
        save(saved)
        assert old.read() == "old"
    assert contents(saved)["weights"] == "half"


def test_folders_are_made_where_there_are_none(tmp_path):
    with staged(tmp_path / "a" / "b") as staging:
        (staging / "weights").write_text("new")
    assert contents(tmp_path / "a" / "b") == {"weights": "new"}


def test_a_folder_that_is_there_already_takes_new_files(saved):
    (saved / "part").mkdir()
    (saved / "part" / "kept").write_text("mine")
    with staged(saved) as staging:
        (staging / "part").mkdir()
        (staging / "part" / "more").write_text("new")
    assert contents(saved / "part") == {"kept": "mine", "more": "new"}


def test_a_full_disk_leaves_the_old_checkpoint(saved):
    with pytest.raises(OSError, match="unchanged; free space") as error:
        save(saved, full)
    assert error.value.errno == errno.ENOSPC
    assert str(saved) in str(error.value)
    assert "No space left" in str(error.value)
    assert contents(saved) == {"weights": "old", "notes": "mine"}
    assert sorted(p.name for p in saved.iterdir()) == ["notes", "weights"]


def test_a_disk_that_fills_up_only_when_written_through_leaves_the_old_checkpoint(saved, monkeypatch):
    """Some file systems say so at fsync, after every write went well."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: full())
    with pytest.raises(OSError, match="unchanged"):
        save(saved)
    assert contents(saved) == {"weights": "old", "notes": "mine"}
    assert len(list(saved.iterdir())) == 2


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, ValueError])
def test_anything_else_passes_through_and_leaves_the_old_checkpoint(saved, stop):

    def stopped():
        raise stop

    with pytest.raises(stop):
        save(saved, stopped)
    assert contents(saved) == {"weights": "old", "notes": "mine"}
    assert len(list(saved.iterdir())) == 2


@pytest.mark.parametrize("below", ["", "checkpoint"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, below):
    """A file in the way stops root too, unlike a mode."""
    (tmp_path / "file").write_text("in the way")
    place = tmp_path / "file" / below if below else tmp_path / "file"
    with pytest.raises(OSError, match="Cannot save to") as error:
        save(place)
    assert str(place) in str(error.value)
    assert (tmp_path / "file").read_text() == "in the way"


def test_what_killed_saves_left_goes_at_the_next_one(saved):
    for name in (".staged-abc", ".staged-def"):
        (saved / name).mkdir()
        (saved / name / "weights").write_text("half")
    save(saved)
    assert sorted(p.name for p in saved.iterdir()) == ["notes", "weights"]


def test_a_save_within_another_leaves_its_files_alone(saved):
    with staged(saved) as outer:
        (outer / "weights").write_text("new")
        with staged(saved) as inner:
            (inner / "notes").write_text("new too")
    assert contents(saved) == {"weights": "new", "notes": "new too"}


def test_a_file_system_without_locks_is_written_all_the_same(saved, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (saved / ".staged-abc").mkdir()
    monkeypatch.setattr("fcntl.flock", refuse)
    save(saved)
    assert contents(saved) == {"weights": "half", "notes": "half"}
    assert [p.name for p in saved.glob(".*")] == [".staged-abc"], "it may be a living save's"


def test_what_was_replaced_before_an_error_is_said(saved):
    (saved / "weights").unlink()
    (saved / "weights").mkdir()  # which no file replaces
    with pytest.raises(OSError, match=r"New are notes; the rest is unchanged"):
        save(saved)
    assert contents(saved) == {"notes": "half"}


# States.


def state(directory, text, keep=2, then=lambda: None):
    with new_state(directory, keep=keep) as folder:
        for name in ("learner", "position"):
            (folder / name).write_text(text)
        then()


def test_states_are_numbered_and_the_last_two_stay(tmp_path):
    for text in ("first", "second", "third"):
        state(tmp_path, text)
    assert [p.name for p in states(tmp_path)] == ["state-00000003", "state-00000002"]
    assert (newest_state(tmp_path) / "learner").read_text() == "third"
    state(tmp_path, "fourth", keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["state-00000004"]
    discard_states(tmp_path)
    assert not states(tmp_path)


def test_states_are_ordered_by_number_and_other_folders_are_none(tmp_path):
    state(tmp_path, "first")
    (tmp_path / "state-00000001").rename(tmp_path / "state-99999999")
    (tmp_path / "state-of-the-art").mkdir()
    state(tmp_path, "second")
    assert (newest_state(tmp_path) / "learner").read_text() == "second"
    assert len(states(tmp_path)) == 2


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path, stop):
    def stopped():
        raise stop

    state(tmp_path, "first")
    with pytest.raises(type(stop)):
        state(tmp_path, "second", then=stopped)
    assert [p.name for p in tmp_path.iterdir()] == ["state-00000001"]
    assert (newest_state(tmp_path) / "learner").read_text() == "first"


def test_a_full_disk_in_safetensors_own_words_is_an_os_error(tmp_path):
    def full():
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left") as error:
        state(tmp_path, "first", then=full)
    assert error.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def harmed(how, folder):
    path = folder / "learner"
    if how == "truncated":
        path.write_text("sec")
    elif how == "flipped":
        path.write_text("secoNd")
    elif how == "lost":
        path.unlink()
    elif how == "no manifest":
        path = folder / "manifest.json"
        path.unlink()
    else:
        path = folder / "manifest.json"
        path.write_text(how)
    return path


@pytest.mark.parametrize("how", ["truncated", "flipped", "lost", "no manifest", "{", "[1]", '{"learner": 1}'])
def test_damage_is_named_and_the_state_before_it_is_whole(tmp_path, caplog, how):
    state(tmp_path, "second")
    path = harmed(how, newest_state(tmp_path))
    with pytest.raises(ValueError, match="start afresh") as error:
        newest_state(tmp_path)
    assert f"{path} is damaged" in str(error.value)
    discard_states(tmp_path)
    state(tmp_path, "first")
    state(tmp_path, "second")
    path = harmed(how, newest_state(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert (newest_state(tmp_path) / "learner").read_text() == "first"
    assert f"{path} is damaged" in caplog.text


def test_missing_state_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved state"):
        newest_state(tmp_path / "nowhere")
