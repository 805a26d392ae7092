"""`Gate`, on scores made up for it: what it lets through, drops and replaces, and when the static draft serves."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.distill.ranks import RankGroup
from hf_osd.learning.evidence import Evidence
from hf_osd.learning.gate import BACK, ODDS, WINDOW, Gate, Looks, Verdict

N = 45  # positions of a request
NAN = math.nan


def of(right: int, count: int = 1) -> list[torch.Tensor]:
    """Requests on which a draft has so many of 45 positions right, evenly spread."""
    places = torch.arange(N + 1) * right // N
    return [places.diff().float()] * count


def until_decided(gate: Gate, static: int, accepted: int, candidate: int, most: int = 64) -> tuple[Verdict, int]:
    """One request at a time: the verdict and how many requests it took."""
    for count in range(1, most + 1):
        verdict = gate.observe(of(static), of(accepted), of(candidate))
        if verdict is not Verdict.WAIT:
            return verdict, count
    return Verdict.WAIT, most


def undecided(gate: Gate, looks: int) -> list[Verdict]:
    """Requests on which the candidate is far better and far worse by turns."""
    return [gate.observe(of(20), of(20), of((40, 0)[i % 2])) for i in range(looks)]


def accept_one(gate: Gate, static: int = 20, right: int = 25, requests: int = 24):
    """A candidate is judged on so many requests, and accepted."""
    for _ in range(requests):
        verdict = gate.observe(of(static), of(static), of(right))
    assert verdict is Verdict.ACCEPT
    gate.accept()


def test_with_a_tolerance_of_1_all_passes_that_is_not_found_to_be_worse():
    """One request says too little of any smaller one."""
    assert Gate(0.9).observe(of(20), of(20), of(20)) is Verdict.WAIT
    assert Gate(1.0).observe(of(20), of(20), of(20)) is Verdict.ACCEPT
    assert Gate(1.0).observe([], [], []) is Verdict.WAIT
    assert Gate(1.0).observe(of(40, 8), of(40, 8), of(0, 8)) is Verdict.DROP


class Twice(RankGroup):
    """Two ranks that see the same."""

    def __init__(self):
        super().__init__(size=2)

    def sum(self, *numbers):
        return [2 * number for number in numbers]

    def any(self, flag):
        return flag


@pytest.fixture
def gate():
    return Gate(0.01)


@pytest.mark.parametrize(("right", "gained"), [(20, False), (25, True)])
def test_what_is_no_worse_is_accepted_and_what_is_better_is_a_gain(gate, right, gained):
    verdict, count = until_decided(gate, 20, 20, right)
    assert verdict is Verdict.ACCEPT
    assert 4 <= count <= 24
    assert gate.accept() is gained


def test_what_is_worse_is_dropped(gate):
    verdict, count = until_decided(gate, 20, 20, 16)
    assert verdict is Verdict.DROP
    assert count <= 24


def test_what_is_worse_than_the_accepted_draft_is_dropped_though_it_is_better_than_the_static_one(gate):
    assert until_decided(gate, 10, 30, 24)[0] is Verdict.DROP


def test_what_is_worse_than_the_static_draft_is_not_accepted_though_it_is_better_than_the_accepted_one(gate):
    assert until_decided(gate, 20, 12, 17)[0] is Verdict.WAIT
    gate.begin()
    assert until_decided(gate, 20, 12, 25)[0] is Verdict.ACCEPT


def test_to_be_far_better_than_the_static_draft_is_no_sign_of_being_as_good_as_the_accepted_one():
    """Between two that were learnt lesser odds are enough; of one that is worse they do not come."""
    as_good = until_decided(Gate(0.01), 5, 20, 20)
    assert as_good[0] is Verdict.ACCEPT
    assert until_decided(Gate(0.01), 5, 5, 20)[1] < as_good[1] < until_decided(Gate(0.01), 20, 20, 20)[1]
    assert until_decided(Gate(0.01), 5, 20, 16)[0] is Verdict.DROP


@pytest.mark.parametrize(("tolerance", "expected"), [(0.01, Verdict.DROP), (0.1, Verdict.ACCEPT)])
def test_what_may_be_lost_is_the_tolerance(tolerance, expected):
    """A token in 45, one after another: .022."""
    gate = Gate(tolerance)
    for lost in of(20)[0].nonzero():
        less = of(20)[0]
        less[lost] = 0.0
        verdict = gate.observe(of(20), of(20), [less])
        if verdict is not Verdict.WAIT:
            break
    assert verdict is expected


@pytest.mark.parametrize("right", [16, 20, 25])
def test_the_best_of_several_takes_so_many_times_the_odds(right):
    """Of a gate that decides at 20 to 1, one for the best of nine decides at 180 to 1, and so later."""
    counts = []
    for choices in (1, 9):
        gate = Gate(0.01)
        gate.begin(choices)
        verdict, count = until_decided(gate, 20, 20, right)
        seen = Evidence.of(of(right, count), of(20, count))
        before = Evidence.of(of(right, count - 1), of(20, count - 1))
        odds = Evidence.worse if verdict is Verdict.DROP else lambda one: one.better(-0.01)
        assert odds(before) < ODDS * choices <= odds(seen)
        counts.append(count)
    assert counts[0] < counts[1]


def test_the_next_candidate_takes_the_usual_odds_again(gate):
    gate.begin(choices=10**6)
    assert until_decided(gate, 20, 20, 20, most=24)[0] is Verdict.WAIT
    gate.begin()
    assert until_decided(gate, 20, 20, 20, most=24)[0] is Verdict.ACCEPT


def test_where_requests_contradict_each_other_everything_waits(gate):
    assert set(undecided(gate, 40)) == {Verdict.WAIT}


def test_what_had_been_learnt_before_speaks_for_what_is_learnt_from_it(gate):
    """Each look at another candidate, none of which would be accepted by its own."""
    verdicts = []
    for right in (22, 23, 24, 25, 26, 27, 28, 29):
        alone = Gate(0.01)
        assert alone.observe(of(20), of(20), of(right)) is Verdict.WAIT
        verdicts.append(gate.observe(of(20), of(20), of(right)))
    assert Verdict.ACCEPT in verdicts
    assert Verdict.DROP not in verdicts


@pytest.mark.parametrize("other", ["accepted", "static"])
def test_but_the_requests_that_judged_this_very_candidate_must_not_speak_against_it(other):
    gate = Gate(0.01)
    gate.begin(choices=10**200)
    for _ in range(30):
        assert gate.observe(of(20), of(20), of(25)) is Verdict.WAIT
    gate._choices = 1
    worse = {"accepted": (of(5, 8), of(20, 8)), "static": (of(20, 8), of(5, 8))}[other]
    assert gate.observe(*worse, of(10, 8)) is Verdict.WAIT
    assert gate._against_accepted.total.better(-0.01) >= ODDS
    for _ in range(3):
        verdict = gate.observe(of(20, 8), of(20, 8), of(25, 8))
        if verdict is not Verdict.WAIT:
            break
    assert verdict is Verdict.ACCEPT


def test_a_new_candidate_is_judged_by_what_comes_after_it(gate):
    for _ in range(3):
        gate.observe(of(20, 2), of(20, 2), of(5, 2))
    gate.begin()
    assert until_decided(gate, 20, 20, 25)[0] is Verdict.ACCEPT


def test_a_candidate_that_diverged_is_dropped(gate):
    verdicts = [gate.observe(of(20), of(20), [torch.full((N,), NAN)]) for _ in range(4)]
    assert Verdict.DROP in verdicts


@pytest.mark.parametrize("none", [[], [torch.zeros(0)], [torch.full((N,), NAN)] * 3])
def test_where_nothing_could_be_judged_everything_waits(gate, none):
    """However often that comes."""
    state = gate.state()
    assert {gate.observe(none, none, none) for _ in range(12)} == {Verdict.WAIT}
    assert {gate.observe(none, none, None) for _ in range(3)} == {Verdict.WAIT}
    assert gate.state() == state


def test_without_a_candidate_there_is_nothing_to_decide(gate):
    assert {gate.observe(of(20, 2), of(25, 2), None) for _ in range(12)} == {Verdict.WAIT}


def test_the_static_draft_serves_soon_after_traffic_has_changed_and_no_longer_than_it_is_better(gate):
    """After a long good record, which counts for nothing on what comes now."""
    accept_one(gate)
    for _ in range(200):
        gate.observe(of(20), of(25), None)
    assert not gate.serves_static
    fell = 0
    while not gate.serves_static and fell < WINDOW:
        gate.observe(of(20), of(12), None)
        fell += 1
    assert gate.serves_static
    assert fell <= WINDOW
    rose = 0
    while gate.serves_static and rose < 4 * WINDOW:
        gate.observe(of(20), of(25), None)
        rose += 1
    assert not gate.serves_static
    assert rose > 3, "that takes more than a request or two"


def test_the_static_draft_serves_at_lesser_odds_than_the_accepted_one_comes_back_at():
    def looks_until(gate, accepted: int, serves_static: bool) -> int:
        for count in range(1, WINDOW):
            gate.observe(of(20), of(accepted), None)
            if gate.serves_static is serves_static:
                return count
        raise AssertionError("nothing was decided")

    def looks_needed(accepted: int, odds: float, e_value) -> int:
        pairs = ((n, Evidence.of(of(accepted, n), of(20, n))) for n in range(1, WINDOW))
        return next(n for n, evidence in pairs if e_value(evidence) >= odds)

    assert looks_until(Gate(0.01), 17, True) == looks_needed(17, BACK, Evidence.worse)
    gate = Gate(0.01)
    gate.serves_static = True
    assert looks_until(gate, 22, False) == looks_needed(22, ODDS, lambda evidence: evidence.better(-0.01))


def test_it_returns_within_the_window_however_long_the_static_draft_was_better(gate):
    accept_one(gate)
    for _ in range(200):
        gate.observe(of(20), of(12), None)
    assert gate.serves_static
    for _ in range(WINDOW):
        gate.observe(of(20), of(25), None)
    assert not gate.serves_static


def test_what_was_good_before_traffic_changed_does_not_bring_the_accepted_draft_back(gate):
    """It is slightly worse on what comes now, in 3% of the positions better and in 5% worse."""
    accept_one(gate)
    for _ in range(200):
        gate.observe(of(20), of(25), None)
    random, served = torch.Generator().manual_seed(0), []
    for _ in range(300):
        draws = torch.rand(N, generator=random)
        gate.observe([torch.ones(N)], [1.0 + (draws < 0.03).float() - (draws > 0.95).float()], None)
        served.append(gate.serves_static)
    assert served[-1]
    assert sum(one is not other for one, other in itertools.pairwise(served)) <= 3


def test_a_slow_loss_that_no_window_shows_brings_the_static_draft_back_too(gate):
    """A token in two requests, at changing places: .011."""
    accept_one(gate, right=20, requests=24)
    gate._since_accepted = Looks()
    random = torch.Generator().manual_seed(0)
    shown = []
    for i in range(400):
        one = (torch.rand(N, generator=random) < 0.5).float()
        worse = one.clone()
        hit, miss = one.nonzero().flatten(), (one == 0).nonzero().flatten()
        worse[hit[torch.randint(len(hit), (2 + i % 2,), generator=random)]] = 0.0
        worse[miss[torch.randint(len(miss), (2,), generator=random)]] = 1.0
        gate.observe([one], [worse], None)
        shown.append(gate._since_accepted.recent().worse())
        if gate.serves_static:
            break
    assert gate.serves_static
    assert max(shown) < BACK


def test_a_draft_that_is_as_good_as_the_static_one_serves(gate):
    accept_one(gate, right=20)
    for _ in range(100):
        gate.observe(of(20), of(20), None)
        assert not gate.serves_static


def test_what_a_candidate_was_judged_by_speaks_for_it_once_it_is_accepted(gate):
    """The static draft serves until something is accepted that was seen to be better than it."""
    accept_one(gate)
    for _ in range(WINDOW):
        gate.observe(of(20), of(12), None)
    assert gate.serves_static
    for _ in range(16):
        verdict = gate.observe(of(20), of(12), of(25))
    assert (verdict, gate.serves_static) == (Verdict.ACCEPT, True)
    assert gate.accept()
    assert not gate.serves_static


def test_reset_begins_with_another_static_draft(gate):
    accept_one(gate)
    for _ in range(WINDOW):
        gate.observe(of(20), of(12), of(12))
    gate.reset()
    assert gate.state() == Gate(0.01).state()
    assert until_decided(gate, 20, 20, 20)[0] is Verdict.ACCEPT


def test_what_unlearnt_the_oldest_requests_breaks_however_much_was_gained_on_newer_ones(gate):
    old, new = of(30, 8), of(10, 24)
    assert gate.regresses([*old, *new], [*of(10, 8), *of(40, 24)])
    assert not gate.regresses([*old, *new], [*old, *of(40, 24)])


@pytest.mark.parametrize(
    ("old", "new", "may"), [(3, 3, False), (4, 4, False), (30, 0, True), (0, 30, True), (0, 2, False), (9, 0, True)]
)
def test_what_was_hardly_known_in_any_run_of_the_oldest_requests_cannot_be_unlearnt(gate, old, new, may):
    """Tokens in 45: 4 are .09, 9 are .2."""
    assert gate.can_regress([*of(old, 8), *of(new, 24)]) is may
    assert not gate.can_regress([])


def test_what_was_lost_on_newer_requests_may_be_paid_for_by_older_ones(gate):
    assert not gate.regresses([*of(10, 24), *of(30, 8)], [*of(30, 24), *of(20, 8)])


def test_a_little_lost_on_requests_of_before_breaks_nothing(gate):
    """A token in 45, which is .02: chance, or near it. Four are .09."""
    assert not gate.regresses(of(30, 32), of(29, 32))
    assert gate.regresses(of(30, 32), of(26, 32))
    assert not gate.regresses([], [])
    assert not gate.regresses(of(30), of(26)), "one request says little"


def test_ranks_decide_by_what_all_have_seen():
    alone, two = Gate(0.01), Gate(0.01, Twice())
    (verdict, count), (same, fewer) = (until_decided(gate, 20, 20, 20) for gate in (alone, two))
    assert (verdict, same) == (Verdict.ACCEPT, Verdict.ACCEPT)
    assert fewer == math.ceil(count / 2)
    # The last 16 requests are 8 looks of two ranks.
    for _ in range(WINDOW):
        two.observe(of(20), of(20), None)
    assert two._since_accepted.recent().positions == WINDOW * N


def test_one_rank_on_which_much_was_unlearnt_is_enough_but_takes_as_many_times_the_odds():
    """Each of several has a chance to err."""
    alone, two = Gate(0.01), Gate(0.01, Twice())
    found = [(alone.regresses(of(30, n), of(26, n)), two.regresses(of(30, n), of(26, n))) for n in range(1, 33)]
    assert found[-1] == (True, True)
    assert (True, False) in found
    assert (False, True) not in found


@given(before=st.integers(0, 40), after=st.integers(1, 30), seed=st.integers(0, 30))
def test_a_restored_gate_goes_on_as_the_first_would(before, after, seed):
    """A candidate that was waiting is begun anew in both."""
    random = torch.Generator().manual_seed(seed)
    gate = Gate(0.01)

    def looks(count):
        for _ in range(count):
            numbers = torch.randint(8, 38, (3,), generator=random).tolist()
            yield [of(number, 1 + numbers[0] % 5) for number in numbers]

    def go_on(one, look):
        verdict = one.observe(*look)
        if verdict is Verdict.ACCEPT:
            one.accept()
        elif verdict is not Verdict.WAIT:
            one.begin()
        return verdict, one.serves_static

    for look in looks(before):
        go_on(gate, look)
    saved = json.loads(json.dumps(gate.state(), allow_nan=False))
    gate.begin()
    restored = Gate(0.01)
    restored.load_state(saved)
    for look in looks(after):
        assert go_on(restored, look) == go_on(gate, look)
    assert restored.state() == gate.state()


@given(sizes=st.lists(st.integers(0, 40), max_size=30))
def test_the_recent_looks_are_as_few_as_cover_the_window(sizes):
    looks = Looks()
    for i, size in enumerate(sizes):
        looks.add(size, Evidence(size, float(i)))
    count = looks.recent().positions
    assert looks.total.positions == sum(sizes)
    assert count == min(sum(sizes), count)
    if sum(sizes) >= WINDOW:
        assert count >= WINDOW
        fewest = next(sum(sizes[i:]) for i in reversed(range(len(sizes))) if sum(sizes[i:]) >= WINDOW)
        assert count == fewest, "whole looks, and one less would be too few"
    else:
        assert count == sum(sizes)
    assert Looks.of_state(json.loads(json.dumps(looks.state()))).recent() == looks.recent()
