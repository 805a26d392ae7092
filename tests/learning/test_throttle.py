"""`Throttle`: its share of the time, by a clock of its own."""

from types import SimpleNamespace

import pytest

from hf_osd.learning import throttle as throttle_module
from hf_osd.learning.throttle import Stopped, Throttle


class Clock:
    """Time passes when somebody works or waits."""

    def __init__(self):
        self.now = self.waited = 0.0

    def work(self, seconds):
        self.now += seconds

    def wait(self, seconds):
        self.now += seconds
        self.waited += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throttle_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def throttle(clock):
    """`throttle(share, busy=...)`, whose waits are the clock's."""

    def make(share, busy=lambda: True):
        made = Throttle(share, busy)
        made._unthrottled.wait = clock.wait
        return made

    return make


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5, 1.0])
def test_the_share_of_the_time_holds(clock, throttle, share):
    made = throttle(share)
    made.begin()
    for seconds in (0.3, 0.001, 2.0, 0.04):
        clock.work(seconds)
        made.pause()
    assert (clock.now - clock.waited) / clock.now == pytest.approx(share)


def test_while_nobody_is_served_there_is_no_waiting(clock, throttle):
    made = throttle(0.1, busy=lambda: False)
    clock.work(5.0)
    made.pause()
    assert clock.waited == 0


def test_the_wait_ends_soon_after_the_last_call(clock, throttle):
    made = throttle(0.1, busy=lambda: clock.now < 6.0)
    clock.work(5.0)
    made.pause()
    assert 6.0 <= clock.now < 6.0 + 2 * throttle_module._LOOK


def test_time_between_two_updates_is_no_work(clock, throttle):
    made = throttle(0.5)
    clock.work(1000.0)
    made.begin()
    clock.work(1.0)
    made.pause()
    assert clock.waited == pytest.approx(1.0)


def test_who_waits_for_the_work_hurries_it_until_the_last_of_them_has_it(clock, throttle):
    made = throttle(0.5)
    made.unthrottle()
    made.unthrottle()
    made.unthrottle(False)
    clock.work(1.0)
    made.pause()
    assert clock.waited == 0
    made.unthrottle(False)
    clock.work(1.0)
    made.pause()
    assert clock.waited == pytest.approx(1.0)


def test_a_stop_ends_the_next_pause_and_no_unthrottled_is_over_after_it(throttle):
    made = throttle(0.5)
    made.unthrottle()
    made.stop()
    made.unthrottle(False)
    for _ in range(2):
        with pytest.raises(Stopped):
            made.pause()
