"""`Shadow`: what it says of what served beside the static draft; and `Reservoir`: which requests it remembers."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.distill.ranks import RankGroup
from hf_osd.feedback.feedback import Feedback
from hf_osd.learning.shadow import RECENT, Reservoir, Shadow

NAN = math.nan
N = 20


def scores(*alphas: float, n: int = N) -> list[torch.Tensor]:
    return [torch.full((n,), alpha) for alpha in alphas]


def seen(static: list[torch.Tensor], served: list[torch.Tensor]) -> Shadow:
    shadow = Shadow()
    shadow.observe(static, served)
    return shadow


@pytest.mark.parametrize(
    ("static", "served", "regret"), [(0.5, 0.4, 0.25), (0.5, 0.5, 0.0), (0.25, 0.5, -0.5), (0.0, 0.5, -1.0)]
)
def test_regret_is_what_the_static_draft_would_have_had_more_as_a_share_of_what_was_had(static, served, regret):
    assert seen(scores(static, static), scores(served, served)).regret == pytest.approx(regret)


def test_regret_of_nothing_is_none():
    """And where nothing was accepted it is counted in tokens, not divided by nothing."""
    assert Shadow().regret == 0.0
    assert seen(scores(0.5), scores(0.0)).regret == 10.0


@given(parts=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(0, 30)), max_size=20))
def test_regret_is_of_all_requests_position_by_position(parts):
    static, served = ([torch.full((n,), part[i]) for *part, n in parts] for i in (0, 1))
    at_once, one_by_one = seen(static, served), Shadow()
    for pair in zip(static, served, strict=True):
        one_by_one.observe(*([one] for one in pair))
    before, after = (sum(part[i] * part[2] for part in parts) for i in (0, 1))
    for shadow in (at_once, one_by_one):
        assert shadow.regret == pytest.approx((before - after) / max(after, 1.0), abs=1e-4)
        assert shadow.positions == sum(n for *_, n in parts)
        assert shadow.requests == sum(n > 0 for *_, n in parts)


def test_positions_without_a_target_count_for_neither_and_a_served_draft_that_diverged_has_nothing_accepted():
    static, served = torch.tensor([1.0, NAN, 0.5, 1.0]), torch.tensor([0.5, NAN, 0.5, NAN])
    shadow = seen([static, torch.full((3,), NAN), torch.zeros(0)], [served, torch.full((3,), NAN), torch.zeros(0)])
    assert (shadow.requests, shadow.positions, shadow.static, shadow.served) == (1, 3, 2.5, 1.0)
    assert shadow.regret == 1.5


def test_the_estimate_is_of_what_served_on_the_last_requests():
    shadow = Shadow()
    for static, served in ((0.9, 0.0), (0.25, 0.5)):
        for _ in range(RECENT // 8):
            shadow.observe(scores(*[static] * 8), scores(*[served] * 8))
    estimate = shadow.estimate()
    assert (estimate.alpha, estimate.low, estimate.high, estimate.requests) == (0.5, 0.5, 0.5, RECENT)
    assert (estimate.gain.before, estimate.gain.difference) == (0.25, 0.25)
    assert shadow.requests == 2 * RECENT
    assert shadow.regret > 0, "while regret is of all of them"


def test_there_is_no_estimate_before_there_are_two_requests_with_a_target():
    shadow = Shadow()
    assert shadow.estimate() is None
    shadow.observe([*scores(0.5, NAN), torch.zeros(0)], [*scores(0.5, NAN), torch.zeros(0)])
    assert shadow.estimate() is None
    shadow.observe(scores(1.0), scores(0.5))
    assert (shadow.estimate().requests, shadow.estimate().alpha) == (2, 0.5)


def test_after_a_restart_regret_goes_on_and_the_estimate_begins_anew():
    shadow = seen(scores(0.5, 0.5), scores(0.25, 0.25))
    saved = json.loads(json.dumps(shadow.state()))
    other = seen(scores(0.9, 0.9), scores(0.1, 0.1))
    other.load_state(saved)
    assert other.state() == shadow.state()
    assert other.estimate() is None
    for one in (shadow, other):
        one.observe(scores(0.5), scores(1.0))
    assert other.regret == shadow.regret == pytest.approx((30 - 30) / 30)


def test_ranks_say_the_same_of_what_all_have_seen():
    class Twice(RankGroup):
        """Two ranks that see the same."""

        def __init__(self):
            super().__init__(size=2)

        def sum(self, *numbers):
            return [2 * number for number in numbers]

        def gather(self, parts, dtype=torch.float32):
            return [*parts, *parts]

    shadow = Shadow(Twice())
    shadow.observe(scores(0.5), scores(0.25))
    assert (shadow.requests, shadow.positions, shadow.static, shadow.served) == (2, 2 * N, N, N / 2)
    assert shadow.estimate().requests == 2


@pytest.fixture(scope="module")
def requests_of(make_feedback):
    """As many requests, that are told apart by identity alone."""

    def make(count: int) -> list[Feedback]:
        one = make_feedback(n=2, k=2)
        return [replace(one) for _ in range(count)]

    return make


def places(reservoir: Reservoir, requests: list[Feedback]) -> list[int]:
    """Which of `requests` are held, in its order."""
    at = {id(one): i for i, one in enumerate(requests)}
    return [at[id(one)] for one in reservoir.requests()]


def filled(requests: list[Feedback], size: int, seed: int | None = 0) -> Reservoir:
    reservoir = Reservoir(size, seed)
    for one in requests:
        reservoir.offer(one)
    return reservoir


def test_each_request_is_as_likely_to_be_remembered_as_any_other(requests_of):
    """20 requests, 4 slots, 300 seeds: 60 times each. χ² with 19 degrees of freedom, less for what slots exclude, is below 43.8 in 99.9%."""
    requests, counts = requests_of(20), [0] * 20
    for seed in range(300):
        for i in places(filled(requests, 4, seed), requests):
            counts[i] += 1
    assert sum(counts) == 1200
    assert sum((count - 60) ** 2 / 60 for count in counts) < 43.8, counts


@given(count=st.integers(0, 60), size=st.integers(1, 8), seed=st.integers(0, 99))
def test_as_many_are_remembered_as_there_is_room_for_once_each_and_the_oldest_first(requests_of, count, size, seed):
    requests = requests_of(count)
    reservoir = filled(requests, size, seed)
    held = places(reservoir, requests)
    assert len(reservoir) == len(held) == min(count, size)
    assert held == sorted(set(held))
    assert reservoir.seen == count


def test_an_early_domain_is_remembered_beside_a_later_one(requests_of):
    """After 200 of one and 600 of another a quarter is of the first: 8 of 32, with a standard deviation of 2.4."""
    requests = requests_of(800)
    assert 2 <= sum(i < 200 for i in places(filled(requests, 32), requests)) <= 15


def test_a_request_that_teaches_nothing_is_left_and_does_not_count(make_feedback, requests_of):
    silent = replace(make_feedback(n=3), tail_logp=torch.full((3,), NAN))
    reservoir, requests = Reservoir(4, seed=0), requests_of(40)
    for one in requests:
        for other in (silent, make_feedback(n=0)):
            reservoir.offer(other)
        reservoir.offer(one)
    assert places(reservoir, requests) == places(filled(requests, 4), requests)


def test_draws_repeat_with_their_seed_and_leave_others_alone(requests_of):
    requests, state = requests_of(60), torch.get_rng_state()
    one, same, other = (places(filled(requests, 10, seed), requests) for seed in (1, 1, 2))
    assert one == same != other
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_discarded_is_gone_and_leaves_room_for_what_comes(requests_of):
    requests = requests_of(9)
    reservoir = filled(requests[:8], 8)
    reservoir.discard([requests[3], requests[0], requests[8]])
    assert places(reservoir, requests) == [1, 2, 4, 5, 6, 7]
    reservoir.offer(requests[8])
    assert places(reservoir, requests) == [1, 2, 4, 5, 6, 7, 8]


def test_clear_forgets_all_and_begins_anew(requests_of):
    requests = requests_of(50)
    reservoir = filled(requests, 4)
    reservoir.clear()
    assert (len(reservoir), reservoir.requests(), reservoir.seen) == (0, [], 0)
    for one in requests[:4]:
        reservoir.offer(one)
    assert places(reservoir, requests) == [0, 1, 2, 3]
