"""`kill -9` in the middle of a save, at every file operation there is in it, and what a process that comes after it finds.

A child process kills itself: no `finally` and no handler runs in it. `recipes/checks/kill.py` kills a service that learns, from outside.
"""

import json
import subprocess
import sys

import pytest

# Saves twice, and is killed at the n-th file operation of the second time; for every n, each in a fork of its own.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from hf_osd.system.files import new_state, newest_state, staged, states

kind, place = sys.argv[1], Path(sys.argv[2])
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "fcntl.flock", "shutil.rmtree", "os.scandir"}
countdown = None

def hook(event, args):
    global countdown
    if countdown is not None and event in EVENTS:
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def save(directory, text):
    with (new_state if kind == "state" else staged)(directory) as folder:
        for name in ("learner", "position"):
            (folder / name).write_text(text * 1000)

sys.addaudithook(hook)
found = []
for n in range(1, 1000):
    directory = place / str(n)
    save(directory, "a")
    save(directory, "b")
    child = os.fork()
    if child == 0:
        countdown = n
        save(directory, "c")
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    where = newest_state(directory) if kind == "state" else directory
    texts = [(where / name).read_text() for name in ("learner", "position")]
    left = len(list(directory.glob(".staged-*")))
    save(directory, "d")
    after = sorted(path.name for path in directory.iterdir())
    found.append({"killed": killed, "texts": [sorted(set(t)) for t in texts], "whole": [len(t) for t in texts], "left": left, "after": after})
    if not killed:
        break
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module", params=["state", "staged"])
def kills(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, request.param, str(place)], capture_output=True, text=True, check=True
    )
    assert "damaged" not in done.stderr, "the newest state was never passed over"
    return request.param, json.loads(done.stdout)


def test_a_save_is_killed_at_each_of_its_steps(kills):
    _, found = kills
    assert len(found) > 12
    assert [one["killed"] for one in found] == [True] * (len(found) - 1) + [False]
    assert any(one["left"] for one in found), "some of the kills were in the midst of it"


def test_every_file_is_whole_after_any_kill(kills):
    kind, found = kills
    for one in found:
        assert one["whole"] == [1000, 1000]
        for text in one["texts"]:
            assert text in (["b"], ["c"])
        if kind == "state":
            assert one["texts"][0] == one["texts"][1], "two files of one state are never of two moments"
    assert found[0]["texts"] == [["b"], ["b"]]
    assert found[-1]["texts"] == [["c"], ["c"]]


def test_files_that_stand_for_themselves_may_be_of_two_moments(kills):
    """What `staged` says it does not promise: this test would fail if the one above could not."""
    kind, found = kills
    mixed = [one for one in found if one["texts"][0] != one["texts"][1]]
    assert bool(mixed) == (kind == "staged")


def test_the_next_save_leaves_nothing_of_the_killed_one(kills):
    kind, found = kills
    for one in found:
        if kind == "staged":
            assert one["after"] == ["learner", "position"]
        else:
            assert len(one["after"]) == 2
            assert all(name.startswith("state-") for name in one["after"])
