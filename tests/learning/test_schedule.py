"""`Schedule`: when an update is due, what fits the time that it may take, and what happens after failures."""

import math
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.config import OnlineConfig
from hf_osd.learning.schedule import Schedule

PROMPT = 5


@pytest.fixture(scope="module")
def request_of(make_feedback):
    """A request of so many tokens, its prompt included."""

    def make(tokens: int = 10):
        return make_feedback(n=tokens - PROMPT, prompt=PROMPT, k=2)

    return make


def schedule(bounded: bool = True, **config) -> Schedule:
    """That learning may take a fifth of the time: a quarter of what calls take."""
    made = Schedule(OnlineConfig(**{"learning_budget": 0.2, **config}), bounded)
    made.is_bounded = True
    return made


def asked_for(made: Schedule) -> Schedule:
    """In an update that somebody has asked for."""
    made.is_bounded = False
    return made


def measured(served: float = 40.0, spent: float = 0.0, seconds: float = 0.1, **config) -> Schedule:
    """Where calls have taken `served` seconds, updates since `spent`, and a token takes `seconds`."""
    made = schedule(**config)
    made.note_served(served)
    made.note_update(spent)
    made.note_learned(10, 10 * seconds, first=True)
    return made


def test_an_update_is_due_after_so_many_requests(request_of):
    made = schedule(update_interval=3)
    assert [made.due([request_of()] * count) for count in range(5)] == [False, False, False, True, True]
    assert [made.due([request_of()] * count, times=2) for count in (3, 5, 6)] == [False, False, True]


def test_without_anything_new_nothing_is_due():
    assert not schedule(update_interval=1).due([])


def test_there_is_room_for_as_many_tokens_as_the_share_of_the_time_pays_for():
    """A fifth of all the time: after 40 seconds of calls 10 of learning, which are 100 tokens."""
    assert measured().room() == pytest.approx(100)
    assert measured(spent=4.0).room() == pytest.approx(60)
    assert measured(spent=11.0).room() == 0.0
    made = measured(spent=11.0)
    made.note_served(8.0)
    assert made.room() == pytest.approx(10)


@pytest.mark.parametrize(
    "made",
    [schedule(), measured(bounded=False), measured(learning_budget=1.0)],
    ids=["nothing known", "another sees to it", "all the time"],
)
def test_room_is_without_bounds_where_nothing_bounds_it(made):
    assert made.room() == math.inf


def test_while_the_speed_or_the_calls_time_is_unknown_there_is_no_bound():
    made = schedule()
    made.note_learned(10, 1.0, first=True)
    assert made.room() == math.inf
    other = schedule()
    other.note_served(40.0)
    assert other.room() == math.inf


def test_what_was_learnt_before_the_first_call_is_not_held_against_those_after_it():
    made = schedule()
    made.note_learned(10, 1.0, first=True)
    made.note_update(1000.0)
    made.note_served(40.0)
    assert made.room() == pytest.approx(100)
    made.note_update(4.0)
    made.note_served(40.0)
    assert made.room() == pytest.approx(160)
    assert (made.spent, made.longest) == (1004.0, 1000.0)


def test_judging_says_what_learning_will_take_until_it_was_measured(request_of):
    """A forward, and a backward of twice that."""
    made = schedule()
    made.note_served(40.0)
    made.note_judged([], 1.0)
    assert made.seconds is None
    made.note_judged([request_of(50)] * 2, 2.0)
    assert made.seconds == pytest.approx(0.06)
    made.note_judged([request_of(50)] * 2, 50.0)
    assert made.seconds == pytest.approx(0.06), "the first says enough"
    made.note_learned(10, 5.0, first=True)
    assert made.seconds == pytest.approx(0.5), "and what is measured says more"
    made.note_judged([request_of(50)] * 2, 2.0)
    assert made.seconds == pytest.approx(0.5)


@given(speeds=st.lists(st.floats(1e-4, 10), min_size=1, max_size=20))
def test_a_speed_lies_between_those_measured_and_nears_the_last_ones(speeds):
    made = schedule()
    for i, speed in enumerate(speeds):
        made.note_learned(7, 7 * speed, first=not i)
        made.note_learned(0, 1e6, first=False)
    assert min(speeds) * (1 - 1e-9) <= made.seconds <= max(speeds) * (1 + 1e-9)
    for _ in range(40):
        made.note_learned(7, 7 * 0.5, first=False)
    assert made.seconds == pytest.approx(0.5, rel=1e-3)


def test_what_is_new_is_learnt_before_what_is_not_and_of_that_the_last(request_of):
    new, replayed = [request_of(30) for _ in range(4)], [request_of(20) for _ in range(3)]
    everything = [*reversed(new), *replayed]
    for seconds, count in ((0.05, 7), (0.06, 6), (0.1, 3), (0.2, 1), (1.0, 0)):
        chosen = measured(seconds=seconds).fitting(new, replayed)
        assert len(chosen) == count
        assert all(one is other for one, other in zip(chosen, everything, strict=False))
    assert len(asked_for(measured(seconds=1.0)).fitting(new, replayed)) == 7


@given(new=st.lists(st.integers(6, 40), max_size=8), replayed=st.lists(st.integers(6, 40), max_size=8))
def test_what_is_chosen_fits_and_one_more_would_not(request_of, new, replayed):
    made = measured()
    requests = [[request_of(tokens) for tokens in lengths] for lengths in (new, replayed)]
    chosen = made.fitting(*requests)
    tokens = [*reversed(new), *replayed]
    assert [len(one.tokens) for one in chosen] == tokens[: len(chosen)]
    assert sum(tokens[: len(chosen)]) <= 100 + 1e-6
    assert len(chosen) == len(tokens) or sum(tokens[: len(chosen) + 1]) > 100 - 1e-6


@pytest.mark.parametrize(
    ("most", "tokens", "passes"), [(7, 10, 7), (7, 14, 7), (7, 15, 6), (7, 40, 2), (7, 101, 1), (1, 10, 1), (7, 0, 7)]
)
def test_as_many_passes_as_fit_and_one_at_least(most, tokens, passes):
    assert measured().passes(most, tokens) == passes
    assert asked_for(measured()).passes(most, tokens) == most
    assert schedule().passes(most, tokens) == most


def test_one_pass_is_made_though_there_is_no_time():
    assert measured(spent=1000.0).passes(7, 5) == 1


def test_a_machine_that_has_no_time_for_a_sixteenth_of_what_comes_says_so(request_of):
    made = measured(seconds=1.0)
    assert made.too_slow is None, "nothing has come"
    made.fitting([request_of(40)] * 4, [])
    assert made.too_slow is not None
    for part in ("1000.0 ms a token", "20%", "0 of the 160"):
        assert part in made.too_slow


def test_a_machine_that_learns_enough_is_not_too_slow(request_of):
    """Replay counts: it is learning too."""
    enough = measured(seconds=1.0)
    enough.fitting([request_of(10)] * 16, [])
    assert enough.too_slow is None, "10 tokens of 160"
    less = measured(seconds=1.0)
    less.fitting([request_of(10)] * 17, [])
    assert less.too_slow is not None
    unbounded = measured(seconds=1.0, bounded=False)
    unbounded.fitting([request_of(40)] * 4, [])
    assert unbounded.too_slow is None


def rested(made: Schedule) -> int:
    """Turns that pass without learning, until one does not."""
    turns = 0
    while made.rests():
        turns += 1
    return turns


def test_after_failures_in_a_row_it_rests_twice_as_long_each_time_up_to_64_turns():
    made, said, found = schedule(), [], []
    for _ in range(9):
        said.append(made.failed())
        found.append(rested(made))
    assert found == said == [1, 3, 7, 15, 31, 63, 63, 63, 63]
    assert made.misses == 9
    made.succeeded()
    assert made.misses == 0
    made.failed()
    assert rested(made) == 1


def test_without_failures_it_does_not_rest():
    made = schedule()
    assert not made.rests()
    made.succeeded()
    assert not made.rests()


# While a call waits.


def test_what_one_update_may_take_is_what_the_calls_between_two_of_them_earn():
    """After a long time without learning a call would pay for all the others."""
    made = schedule(update_interval=2)
    for _ in range(10):
        made.note_served(4.0)
    made.note_learned(10, 1.0, first=True)
    assert made.room() == pytest.approx(40), (
        "a quarter of four calls of 4 seconds, as many as pass before the first update"
    )
    made.note_update(2.0)
    assert made.room() == pytest.approx(20), "of two between two updates"
    made.note_update(7.5)
    assert made.room() == pytest.approx(5), "and no more than is left of all"
    for _ in range(3):
        made.note_served(4.0)
    assert made.room() == pytest.approx(30), "of three since the last one"


def test_what_an_update_has_taken_is_not_there_for_the_rest_of_it(monkeypatch):
    made, clock = measured(), [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    made.begin(bounded=True)
    assert made.room() == pytest.approx(100)
    clock[0] += 4.0
    assert made.room() == pytest.approx(60)
    clock[0] += 40.0
    assert made.room() == 0.0
    made.note_update(0.0)
    assert made.room() == pytest.approx(100)


def test_of_a_long_text_the_window_counts_and_of_an_encoder_all_it_reads(request_of):
    source = torch.arange(70, dtype=torch.int32)
    requests = [request_of(30), request_of(400), replace(request_of(30), source=source)]
    assert schedule(learning_window=100).tokens(requests) == 30 + 100 + 30 + 70
    assert schedule(learning_window=None).tokens(requests) == 530
    chosen = measured(learning_window=50).fitting([request_of(400)] * 3, [])
    assert len(chosen) == 2


def test_the_first_time_a_call_waits_for_learning_not_all_is_learnt(request_of):
    made = schedule()
    made.note_served(4.0)
    long = [request_of(1000)] * 8
    assert len(made.fitting(long, long)) == 4
    assert len(schedule().fitting(long, long)) == 16, "where nobody has been served nobody waits"
    assert len(asked_for(made).fitting(long, long)) == 16


def test_something_is_judged_and_tried_though_there_is_no_time(request_of):
    made = measured(spent=1000.0)
    requests = [request_of(40) for _ in range(30)]
    assert made.within(requests, 1.0) == requests[-12:]
    assert made.within(requests, 3.0) == requests[-4:]
    assert made.within(requests[:1], 100.0) == requests[:1]
    assert asked_for(made).within(requests, 3.0) == requests
    assert made.within([], 1.0) == []


def test_of_requests_of_before_some_of_all_times_are_judged_by(request_of):
    requests = [request_of(900) for _ in range(32)]
    made = measured()
    assert asked_for(made).thinned(requests) == requests
    made.begin(bounded=True)
    assert made.thinned(requests) == requests[::4]
    assert made.thinned(requests[:5]) == requests[:5]
    short = [request_of(20) for _ in range(32)]
    assert made.thinned(short) == short
