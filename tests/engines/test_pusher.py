"""`DraftPusher`: what is pushed where, what becomes of failures, and when weights are taken back."""

import json
import logging
import threading
from dataclasses import replace

import pytest

from hf_osd.engines.counters import Counted
from hf_osd.engines.pusher import DraftPusher
from hf_osd.engines.servers import PushFailed


class Engine:
    """An engine in memory: the weights in it, its counters, and what the next pushes come to."""

    def __init__(self, url="http://engine"):
        self.url, self.model, self.max_logprobs = url, "tiny", 20
        self.tried, self.fails = 0, []
        self.resumed = 0
        self.start(0.0)

    def start(self, created):
        """Start with its own weights."""
        self.weights, self.counted = "its own", Counted(answers=0, created=created)

    def push(self, folder):
        self.tried += 1
        if self.fails:
            raise self.fails.pop(0)
        self.weights = (folder / "weights").read_text()

    def acceptance(self):
        return self.counted

    def resume(self):
        self.resumed += 1

    def serve(self, rounds, share):
        """Draft four tokens a round, of which a share is accepted, in answers of two rounds."""
        more = counted(rounds, share)
        self.counted = replace(self.counted + more, created=self.counted.created)


def counted(rounds, share):
    at_each = round(rounds * share)
    return Counted(rounds, 4 * rounds, 4 * at_each, (at_each,) * 4, rounds // 2)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pusher(tmp_path, clock):
    """`pusher(*engines)`, whose steps the test takes."""

    def make(*engines, **kwargs):
        return DraftPusher(
            engines, tmp_path / "drafts", clock=clock, threaded=False, **{"judge_drafts": 100, **kwargs}
        )

    return make


def saves(text):
    return lambda folder: (folder / "weights").write_text(text)


def folders(pusher):
    return sorted(path.name for path in pusher.folder.iterdir())


def test_every_engine_gets_the_newest_weights_and_old_folders_go(pusher):
    one, other = Engine("http://a"), Engine("http://b")
    pushes = pusher(one, other)
    pushes.step()
    assert one.tried == 0
    for text in ("first", "second", "third"):
        pushes.offer(saves("never saved"))
        pushes.offer(saves(text))  # of several that wait the newest
        pushes.step()
        assert one.weights == other.weights == text
    assert folders(pushes) == ["draft-3"]
    assert pushes.status()["http://b"]["draft"] == 3
    json.dumps(pushes.status(), allow_nan=False)


def test_a_push_that_fails_leaves_the_old_weights_and_is_tried_again_later_and_later(pusher, clock, caplog):
    bad, good = Engine("http://bad"), Engine("http://good")
    bad.fails = [PushFailed("cut half-way"), PushFailed("cut half-way"), OSError("broken")]
    pushes = pusher(bad, good)
    pushes.offer(saves("new"))
    waits = []
    with caplog.at_level(logging.WARNING):
        while bad.weights != "new":
            pushes.step()
            assert good.weights == "new"
            tried = bad.tried
            pushes.step()
            assert bad.tried == tried, "not before its time"
            waits.append(pushes._engines[0].next_try - clock.now)
            clock.now += max(waits[-1], 0.0)
    assert bad.tried == 4
    assert 1 <= waits[0] <= 2 <= waits[1] <= 4 <= waits[2] <= 8, "seconds, with some chance in each"
    assert caplog.text.count("cut half-way") == 1
    assert pushes.status()["http://bad"]["failures"] == 3
    assert pushes.status()["http://bad"]["error"] is None


def test_one_that_refuses_is_logged_once_and_left_alone_until_it_begins_anew(pusher, clock, caplog):
    engine = Engine()
    engine.serve(10, 0.5)
    engine.fails = [PushFailed("no such route", refused=True)]
    pushes = pusher(engine)
    for text in ("a", "b"):
        pushes.offer(saves(text))
        for _ in range(5):
            clock.now += 1000.0
            pushes.step()
    assert engine.tried == 1
    assert caplog.text.count("no such route") == 1
    engine.start(1.0)
    clock.now += 1000.0
    pushes.step()
    assert engine.weights == "b"


def test_a_full_disk_is_tried_again_and_leaves_no_half_folder(pusher, clock, caplog):
    engine = Engine()
    pushes = pusher(engine)
    full = [True]

    def save(folder):
        (folder / "weights").write_text("whole")
        if full[0]:
            raise OSError(28, "No space left on device")

    pushes.offer(save)
    pushes.step()
    assert folders(pushes) == []
    assert engine.tried == 0
    assert "No space left" in caplog.text
    assert "No space left" in pushes.status()["http://engine"]["error"]
    full[0] = False
    pushes.step()
    assert engine.tried == 0, "not before its time"
    clock.now += 10.0
    pushes.step()
    assert engine.weights == "whole"


@pytest.mark.parametrize("rounds", [0, 10, 50, 90])
@pytest.mark.parametrize("tells", [True, False])
def test_an_engine_that_begins_anew_gets_the_weights_again(pusher, clock, rounds, tells):
    engine = Engine()
    engine.start(0.0 if tells else None)
    pushes = pusher(engine)
    pushes.offer(saves("learnt"))
    pushes.step()
    engine.serve(50, 0.5)
    clock.now += 10.0
    pushes.step()
    engine.start(1.0 if tells else None)
    engine.serve(rounds, 0.5)  # more than before even, by the next look
    clock.now += 10.0
    pushes.step()
    seen = tells or rounds < 50
    assert engine.weights == ("learnt" if seen else "its own")
    assert engine.tried == 1 + seen


def test_an_engine_that_begins_anew_as_it_is_pushed_to_gets_the_weights_again(pusher, clock):
    engine = Engine()
    pushes, push = pusher(engine), engine.push
    engine.serve(50, 0.5)
    pushes.step()

    def dies(folder):
        push(folder)
        engine.start(1.0)

    engine.push = dies
    pushes.offer(saves("learnt"))
    pushes.step()
    assert pushes.status()["http://engine"]["draft"] is None
    engine.push = push
    pushes.step()
    assert engine.weights == "learnt"


def served(pushes, clock, engine, *shares, rounds=400):
    """Push weights named by the share that will be accepted of them, and serve."""
    for share in shares:
        pushes.offer(saves(str(share)))
        pushes.step()
        clock.now += 10.0
        pushes.step()
        engine.serve(rounds, share)
        clock.now += 10.0
        pushes.step()


def test_weights_of_which_less_is_accepted_are_taken_back_everywhere(pusher, clock):
    engine, other, told = Engine(), Engine("http://other"), []
    pushes = pusher(engine, other)
    pushes.on_taken_back = lambda: told.append(engine.weights)
    served(pushes, clock, engine, 0.4, 0.5)
    assert not told
    served(pushes, clock, engine, 0.2)
    assert told == ["0.2"]
    clock.now += 10.0
    pushes.step()
    assert engine.weights == other.weights == "0.5"
    assert folders(pushes) == ["draft-2"], "a restart must not begin with what was taken back"
    served(pushes, clock, engine, 0.6)
    assert engine.weights == "0.6"
    assert len(told) == 1
    assert folders(pushes)[-1] == "draft-4"


def test_the_first_ones_go_back_to_what_the_engine_was_started_with(pusher, clock, tmp_path):
    (tmp_path / "initial").mkdir()
    (tmp_path / "initial" / "weights").write_text("initial")
    engine = Engine()
    pushes = pusher(engine, initial=tmp_path / "initial")
    engine.serve(400, 0.5)
    served(pushes, clock, engine, 0.1)
    clock.now += 10.0
    pushes.step()
    assert engine.weights == "initial"
    assert folders(pushes) == []


def test_without_anything_to_go_back_to_the_bad_weights_are_pushed_nowhere_again(pusher, clock):
    engine, told = Engine(), []
    pushes = pusher(engine)
    pushes.on_taken_back = lambda: told.append(1)
    engine.serve(400, 0.5)
    served(pushes, clock, engine, 0.1)
    assert told == [1]
    assert folders(pushes) == []
    engine.start(1.0)
    tried = engine.tried
    for _ in range(3):
        clock.now += 1000.0
        pushes.step()
    assert (engine.weights, engine.tried) == ("its own", tried)
    served(pushes, clock, engine, 0.6)
    assert engine.weights == "0.6"
    served(pushes, clock, engine, 0.1)
    clock.now += 10.0
    pushes.step()
    assert engine.weights == "0.6", "there is one to go back to now"


def test_a_bad_draft_is_not_hidden_behind_the_next(pusher, clock):
    engine, told = Engine(), []
    pushes = pusher(engine)
    pushes.on_taken_back = lambda: told.append(1)
    served(pushes, clock, engine, 0.5)
    served(pushes, clock, engine, 0.2, 0.2, rounds=60)  # each of them too short to be judged
    clock.now += 10.0
    pushes.step()
    assert (told, engine.weights) == ([1], "0.5")


def test_a_bad_draft_that_is_replaced_before_it_is_looked_at_is_no_measure_for_the_next(pusher, clock):
    engine = Engine()
    pushes = pusher(engine)
    served(pushes, clock, engine, 0.5)
    for share in (0.2, 0.21):
        pushes.offer(saves(str(share)))
        pushes.step()
        engine.serve(400, share)  # and no look before the next is pushed
    clock.now += 10.0
    pushes.step()
    assert folders(pushes) == ["draft-1"]
    pushes.step()
    assert engine.weights == "0.5"


def test_an_engine_goes_back_to_none_that_another_had_taken_back(pusher, clock):
    engine, other = Engine("http://a"), Engine("http://b")
    pushes = pusher(engine, other)
    for share in (0.5, 0.6):
        pushes.offer(saves(str(share)))
        pushes.step()
        engine.serve(400, 0.5 if share == 0.5 else 0.1)
        other.serve(50 if share == 0.5 else 400, share)  # of the first too little to judge the second by
        clock.now += 10.0
        pushes.step()  # the first engine takes 0.6 back
    pushes.step()
    assert engine.weights == other.weights == "0.5"
    other.serve(400, 0.1)  # less than of 0.6, which is no more
    for _ in range(3):
        clock.now += 10.0
        pushes.step()
    assert engine.weights == other.weights == "0.5"
    assert pushes.status()["http://b"]["taken_back"] == 1
    assert pushes.status()["http://b"]["failures"] == 0


def test_what_a_newer_draft_replaces_anyway_is_not_taken_back(pusher, clock):
    engine, told = Engine(), []
    pushes = pusher(engine)
    pushes.on_taken_back = lambda: told.append(1)
    served(pushes, clock, engine, 0.5)
    served(pushes, clock, engine, 0.1, rounds=90)
    pushes.offer(saves("newer"))
    engine.fails = [PushFailed("cut")]
    pushes.step()
    engine.serve(400, 0.1)
    for _ in range(2):
        clock.now += 10.0
        pushes.step()
    assert (told, engine.weights) == ([], "newer")


def test_what_an_engine_is_started_with_is_no_fall_of_what_it_had(pusher, clock):
    engine, told = Engine(), []
    pushes = pusher(engine)
    pushes.on_taken_back = lambda: told.append(1)
    served(pushes, clock, engine, 0.5)
    pushes.offer(saves("0.5 again"))
    pushes.step()
    engine.start(1.0)
    engine.serve(90, 0.0)
    for _ in range(3):
        clock.now += 10.0
        pushes.step()
        engine.serve(90, 0.5)
    assert (told, engine.weights) == ([], "0.5 again")


def test_chance_takes_nothing_back(pusher, clock):
    engine, told = Engine(), []
    pushes = pusher(engine)
    pushes.on_taken_back = lambda: told.append(1)
    served(pushes, clock, engine, 0.50, 0.48, 0.50, 0.49, rounds=150)
    served(pushes, clock, engine, 0.1, rounds=20)  # too few to tell
    assert not told


def test_closing_leaves_no_engine_paused(pusher):
    engine, other = Engine("http://a"), Engine("http://b")

    def fails():
        raise PushFailed("is down")

    engine.resume = fails
    pusher(engine, other).close()
    assert other.resumed == 1


def test_counters_are_told_as_they_were_last_read(pusher, clock):
    engine = Engine()
    pushes = pusher(engine)
    engine.serve(50, 0.5)
    pushes.step()
    engine.serve(50, 0.5)
    assert pushes.acceptance()["http://engine"].rounds == 50, "read every so often"
    clock.now += 10.0
    engine.acceptance = lambda: None
    pushes.step()
    assert pushes.acceptance() == {"http://engine": None}


def test_it_pushes_in_a_thread_and_closes(tmp_path):
    engine, pushed = Engine(), threading.Event()
    engine.acceptance = pushed.set  # read once weights are in; there are no counters
    pushes = DraftPusher([engine], tmp_path)
    pushed.clear()
    pushes.offer(saves("in the thread"))
    while engine.weights != "in the thread":
        assert pushed.wait(20)
        pushed.clear()
    pushes.close()
    assert not pushes._thread.is_alive()
