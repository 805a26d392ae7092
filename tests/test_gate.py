"""`Gate`, on scores made up for it: what it judges, when, and what may not serve."""

import math

import pytest
import torch

from hf_osd import gate as gate_module
from hf_osd.gate import Gate, Rejected, harm_of, lost
from hf_osd.held_back import HeldBack

ROWS = 20  # of a request
PAID = 10**6  # rows learnt, that pay for any check


class Scores:
    """What a draft scores: α of a request, as so many ones in its `ROWS` positions."""

    def __init__(self, alpha: float):
        self.alpha, self.of = alpha, {}  # the others', and that of some requests, by id
        self.judged = []  # how many requests, each time

    def __call__(self, requests):
        self.judged.append(len(requests))
        return [
            (torch.arange(ROWS) < round(ROWS * self.of.get(id(request), self.alpha))).float() for request in requests
        ]


class Gated:
    """A gate over `count` requests held back, and what it is told."""

    def __init__(self, make_feedback, count: int, static: float = 0.5, tolerance: float = 0.02):
        self.held = HeldBack(1.0, seed=0)
        self.make, self.judge, self.static = make_feedback, Scores(static), Scores(static)
        self.hold(count)
        self.gate = Gate(self.held, tolerance, self.judge, self.static)

    def hold(self, count: int) -> list:
        new = [self.make(n=ROWS, seed=i) for i in range(count)]
        for request in new:
            request.overlap[:] = math.nan  # nobody could judge it as it came
            assert self.held.take(request)
        return new

    def check(self, alpha: float | None = None, rows: int = 100, learned: int = PAID):
        """Of a draft that scores `alpha`; whether it may serve, and if not, whether all since the last check goes."""
        if alpha is not None:
            self.judge.alpha = alpha
        try:
            self.gate.check(learned, rows)
        except Rejected as rejected:
            return "all" if rejected.since_check else "this"
        return "serves"


@pytest.fixture
def gated(make_feedback):
    return lambda *args, **kwargs: Gated(make_feedback, *args, **kwargs)


def test_nothing_is_judged_before_learning_has_paid_for_it(gated):
    made = gated(6)
    assert made.gate.check(6 * ROWS / 0.3 - 1, 100) is None
    assert (made.judge.judged, made.held.judged_rows) == ([], 0)
    estimate = made.gate.check(6 * ROWS / 0.3 + 1, 100)
    assert (estimate.alpha, estimate.requests) == (0.5, 6)
    assert made.judge.judged == made.static.judged == [6]
    assert made.held.judged_rows == 2 * 6 * ROWS, "by both drafts"


def test_the_static_draft_judges_each_request_once(gated):
    made = gated(6)
    assert made.check() == made.check() == "serves"
    made.hold(2)
    assert made.check() == "serves"
    assert made.static.judged == [6, 2]
    assert made.judge.judged == [6, 6, 8]
    assert made.held.judged_rows == (6 + 6 + 8 + 8) * ROWS


@pytest.mark.parametrize(("alpha", "verdict"), [(0.7, "serves"), (0.65, "all"), (math.nan, "all")])
def test_a_full_check_turns_away_what_fell_since_the_last_one(gated, alpha, verdict):
    """By more than the tolerance; one that diverged, and says NaN, has nothing accepted."""
    made = gated(6, static=0.3, tolerance=0.06)
    assert made.check(0.75) == "serves"
    if math.isnan(alpha):
        made.gate._judge = lambda requests: [torch.full((ROWS,), math.nan) for _ in requests]
    assert made.check(alpha) == verdict


def test_what_fell_by_less_than_the_tolerance_serves(gated):
    made = gated(6, static=0.3, tolerance=0.2)
    assert [made.check(alpha) for alpha in (0.75, 0.6)] == ["serves", "serves"]


def test_what_fell_no_more_than_chance_lets_it_serves(gated):
    """One request of six fell from .8 to 0: α by .13, and the other five say nothing of it."""
    made = gated(6, static=0.0, tolerance=0.02)
    assert made.check(0.8) == "serves"
    made.judge.of[id(made.held.requests()[0])] = 0.0
    assert made.check(0.8) == "serves"


def test_fewer_than_five_requests_turn_nothing_away(gated):
    for count, verdict in ((4, "serves"), (5, "all")):
        made = gated(count)
        assert made.check(0.9) == "serves"
        assert made.check(0.0) == verdict


def test_between_full_checks_a_few_requests_are_judged_as_learning_pays_for_it(gated):
    made = gated(40)
    rows = 1200
    assert made.check(0.8, rows) == "serves"
    judged = made.held.judged_rows
    for _ in range(3):
        assert made.check(0.8, rows, learned=0) == "serves"
    looks = made.judge.judged[1:]
    assert len(set(looks)) == 1
    assert 5 <= looks[0] <= rows * 0.1 / ROWS
    assert made.held.judged_rows - judged == 3 * looks[0] * ROWS
    sample = [made.held.requests().index(request) for request in made.gate._sample]
    assert max(sample) - min(sample) > 20, "from all that is held"
    assert made.static.judged == [40]


def test_a_look_turns_away_what_fell_and_that_update_alone(gated):
    made = gated(40)
    assert made.check(0.8, 2000) == "serves"
    assert made.check(0.6, 2000, learned=0) == "this"
    assert made.check(0.8, 2000, learned=0) == "serves", "what serves is as good as it was"
    assert made.check(0.9, 2000, learned=0) == "serves"
    assert made.check(0.8, 2000, learned=0) == "this", "and is now what it is compared with"


def test_where_updates_are_too_small_to_pay_for_a_request_there_is_no_look(gated):
    made = gated(40)
    assert made.check(0.8, rows=100) == "serves"
    assert made.check(0.0, rows=100, learned=0) == "serves"
    assert made.judge.judged == [40]


def test_what_was_easily_learnt_cannot_pay_for_what_broke(gated):
    """α rises, and every other request is worse off than with the static draft."""
    made = gated(20)
    assert made.check(0.5) == "serves"
    for request in made.held.requests()[::2]:
        made.judge.of[id(request)] = 0.2
    assert made.check(1.0) == "all"


def test_nor_for_what_broke_at_another_time(gated):
    """A dozen of nearly 60 requests lost .2: .04 over all, as between drafts of like worth; but they came one after another."""
    made = gated(20)
    assert made.check(0.6) == "serves"
    made.hold(40)
    for request in made.held.requests()[:12]:
        made.judge.of[id(request)] = 0.3
    assert made.check(1.0) == "all"


def test_small_losses_do_not_add_up(gated):
    """Half of the requests lose a little at each check: never more than the tolerance since the last one, and never surely."""
    made, found = gated(8, static=0.8, tolerance=0.06), []
    for less in (0.0, 0.1, 0.2, 0.3, 0.4):
        for request in made.held.requests()[::2]:
            made.judge.of[id(request)] = 0.8 - less
        found.append(made.check(0.8))
    assert found[:2] == ["serves", "serves"]
    assert "all" in found


def test_gains_may_be_given_up_again_if_it_is_not_at_once(gated):
    """What is better than the static draft throughout is no harm."""
    made = gated(20, static=0.3, tolerance=0.06)
    assert {made.check(alpha) for alpha in (0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)} == {"serves"}


def test_a_full_check_is_not_put_off_for_ever(gated, monkeypatch):
    """Where learning never pays for it: much is held back, and little learnt."""
    monkeypatch.setattr(gate_module, "_INTERVAL", 4)
    made = gated(20)
    for _ in range(9):
        assert made.check(0.6, rows=1, learned=0) == "serves"
    assert made.judge.judged == [20, 20]
    nothing = gated(0)
    for _ in range(9):
        assert nothing.check(rows=1, learned=0) == "serves"
    assert nothing.judge.judged == []


def test_after_a_failed_check_each_update_is_checked_in_full_until_several_pass(gated, monkeypatch):
    monkeypatch.setattr(gate_module, "_PROBATION", 3)
    made = gated(20)
    assert made.check(0.8) == "serves"
    assert made.check(0.4) == "all"
    assert [made.check(alpha, rows=1, learned=0) for alpha in (0.8, 0.4)] == ["serves", "all"]
    assert {made.check(0.8, rows=1, learned=0) for _ in range(5)} == {"serves"}
    assert made.judge.judged == [20] * 7


def test_a_judge_that_fails_is_no_verdict(gated):
    made = gated(6)

    def breaks(requests):
        raise MemoryError

    made.gate._judge = breaks
    with pytest.raises(MemoryError):
        made.gate.check(PAID, 100)
    made.gate._judge = made.judge
    assert made.check() == "serves"


def test_harm_counts_losses_alone():
    def scores(*alphas):
        return [torch.full((4,), alpha) for alpha in alphas]

    assert harm_of(scores(0.5, 0.5), scores(0.25, 1.0))[0] == pytest.approx(0.125)
    assert harm_of(scores(0.5, 0.5), scores(1.0, 0.5)) == (0.0, 0.0)
    assert harm_of(scores(0.5), scores(0.25))[1] == -math.inf, "one request does not say how sure it is"
    assert harm_of([], []) == (0.0, -math.inf)
    unknown = [torch.full((4,), math.nan)]
    assert harm_of([*scores(0.5), *unknown], scores(0.25, 0.0))[0] == pytest.approx(0.25)


def test_it_says_whether_the_static_draft_is_worse_on_the_whole(gated):
    """An old domain is far better than static; a new one, of which the static draft knows more, is lost by what is learnt."""
    one = gated(30, static=0.2)
    assert one.check(0.6) == "serves"
    new = one.hold(10)
    for request in new:
        one.static.of[id(request)], one.judge.of[id(request)] = 0.7, 0.3
        request.overlap[:] = (torch.arange(ROWS) < 10).float()
    assert one.check(0.6) == "all"
    assert one.gate.static_is_worse

    other = gated(30, static=0.5)
    assert other.check(0.5) == "serves"
    assert other.check(0.3) == "all"
    assert not other.gate.static_is_worse


def test_a_few_hundredths_in_one_part_are_what_two_drafts_differ_by(gated):
    made = gated(30, static=0.6)
    assert made.check(0.6) == "serves"
    last = made.held.requests()[20:]
    made.judge.of |= {id(request): 0.55 for request in last[::2]}
    assert made.check() == "serves"
    made.judge.of |= {id(request): 0.5 for request in last}
    assert made.check(0.65) == "all"


def came(request, alpha: float):
    """The request, served with that α."""
    request.overlap[:] = (torch.arange(ROWS) < round(ROWS * alpha)).float()


def test_a_domain_that_was_forgotten_may_be_learnt_again(gated):
    """The static draft knows it better than what served when it came again, and learning it wavers: nothing was lost to that."""
    made = gated(30, static=0.2)
    assert made.check(0.6) == "serves"
    new = made.hold(10)
    for request, alpha in zip(new, (0.3, 0.3, 0.35, 0.4, 0.4, 0.45, 0.45, 0.5, 0.5, 0.5), strict=True):
        came(request, alpha)
        made.static.of[id(request)] = 0.65
    for alpha in (0.5, 0.55, 0.5, 0.55):
        made.judge.of |= {id(request): alpha for request in new}
        assert made.check(0.6) == "serves"
    made.judge.of |= {id(request): 0.2 for request in new}
    assert made.check(0.7) == "all", "but not lost once more"


def test_what_served_a_request_well_is_no_floor_above_the_static_draft(gated):
    made = gated(20, static=0.3, tolerance=0.3)
    for request in made.held.requests():
        came(request, 0.9)
    assert [made.check(alpha) for alpha in (0.6, 0.35)] == ["serves", "serves"]


def test_a_draft_below_the_static_one_on_the_whole_may_not_serve_unless_it_is_on_its_way_up(gated):
    made = gated(20, static=0.6)
    for request in made.held.requests():
        came(request, 0.3)
    assert [made.check(alpha) for alpha in (0.35, 0.4, 0.4)] == ["serves", "serves", "all"]


def test_what_serves_again_is_what_later_drafts_are_compared_with(gated):
    """Not one that is no more: a draft above what serves would else be turned away for ever."""
    to_static = gated(20, static=0.2)
    assert to_static.check(0.8) == "serves"
    assert to_static.check(0.4) == "all"
    to_static.gate.went_back(True)
    assert to_static.check(0.4) == "serves"

    to_last = gated(20, static=0.5)
    assert to_last.check(0.5) == "serves"
    new = to_last.hold(20)
    for request in new:
        came(request, 0.9)
        to_last.static.of[id(request)] = 0.8
    to_last.judge.of |= {id(request): 0.6 for request in new}
    assert to_last.check(0.5) == "all"
    to_last.judge.of |= {id(request): 0.3 for request in new}
    to_last.gate.went_back(False)
    assert to_last.judge.judged[-1] == 20, "those alone that came since"
    to_last.judge.of |= {id(request): 0.5 for request in new}
    assert to_last.check(0.6) == "serves"


def test_to_be_back_where_the_static_draft_is_pays_for_no_other(gated):
    made = gated(20, static=0.6)
    assert made.check(0.9) == "serves"
    for request in made.hold(5):
        came(request, 0.2)
        made.judge.of[id(request)] = 0.6
    assert made.check() == "serves"
    made.judge.of |= {id(request): 0.35 for request in made.hold(5)}
    assert made.check() == "all", "though those beside them are .4 above what served them"


def test_what_is_lost_is_of_positions_known_of_both():
    score = torch.tensor([0.5, 0.7, math.nan])
    assert lost(score, torch.tensor([0.4, 0.5, 0.0])) == pytest.approx(0.15)
    assert lost(score, torch.tensor([math.nan, 0.6, 0.0])) == pytest.approx(0.1)
    assert lost(score, torch.full((3,), 0.9)) == lost(score, torch.full((3,), math.nan)) == 0.0
