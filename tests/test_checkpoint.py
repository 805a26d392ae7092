"""`staged`: files are whole or absent, and what was there before survives whatever goes wrong."""

import errno
import os

import pytest

from hf_osd.checkpoint import staged


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
