"""`Gate`, on scores made up for it; and the learner, which goes back to where it was when something may not serve, or went wrong."""

import contextlib
import gc
import logging
import math
import weakref

import pytest
import torch

from hf_osd import FeedbackBuffer, OnlineConfig
from hf_osd import gate as gate_module
from hf_osd import learner as learner_module
from hf_osd.distill import trainer as trainer_module
from hf_osd.gate import Gate, Rejected, harm_of
from hf_osd.held_back import HeldBack
from hf_osd.learner import Learner
from hf_osd.serving import ServingDraft

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
    for lost in (0.0, 0.1, 0.2, 0.3, 0.4):
        for request in made.held.requests()[::2]:
            made.judge.of[id(request)] = 0.8 - lost
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


# The learner.


@pytest.fixture
def learner(tiny_llama):
    """A learner whose refreshes go into a real `learner.serving`."""

    def make(**fields):
        draft = tiny_llama(layers=1)
        trainable = {name for name, _ in draft.named_parameters() if "layers" in name}
        settings = {"seed": 0, "warmup_steps": 0, "replay": 0.0, "tail_samples": None, "update_interval": 2}
        serving = ServingDraft(draft, trainable)
        made = Learner(draft, trainable, FeedbackBuffer(), OnlineConfig(**settings | fields), serving.refresh)
        made.serving = serving
        return made

    return make


def learn(learner, *requests) -> bool:
    for request in requests:
        learner.buffer.add(request)
    return learner.update()


def everything(learner):
    """All that an update may change, and its undoing must give back."""
    members = [
        ({name: p.clone() for name, p in member.weights().items()}, member.serving_weights(), member.steps)
        for member in learner.members
    ]
    members = [(weights, {n: p.clone() for n, p in served.items()}, steps) for weights, served, steps in members]
    return {name: p.clone() for name, p in learner.serving.weights()}, members


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def reject(since_check):
    def check(learned_rows, update_rows):
        raise Rejected("it is worse", since_check)

    return check


@pytest.mark.parametrize("fields", [{}, {"averaging": 0.0}, {"ensemble": [1, 3], "optimism": 0.5}])
def test_a_rejected_update_leaves_no_trace_but_its_count(learner, make_feedback, monkeypatch, caplog, fields):
    made = learner(**fields)
    assert learn(made, make_feedback(seed=1), make_feedback(seed=2))
    before, losses = everything(made), list(made.losses)
    monkeypatch.setattr(made.gate, "check", reject(since_check=False))
    new = [make_feedback(seed=3), make_feedback(seed=4)]
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        assert not learn(made, *new)
    assert same(everything(made), before)
    assert (made.updates, made.rejected, made.failed, made.misses) == (1, 1, 0, 1)
    assert made.losses == losses
    assert len(made.buffer) == 2, "what it learnt from is forgotten"
    assert all(member._trainer.optimizer is None for member in made.members)
    assert "it is worse" in caplog.text
    monkeypatch.undo()
    assert learn(made, make_feedback(seed=5))


def test_a_failed_check_goes_back_to_the_last_one_and_a_second_to_the_static_draft(
    learner, make_feedback, monkeypatch, caplog
):
    made, seeds = learner(), iter(range(100))

    def go_on(check):
        monkeypatch.setattr(made.gate, "check", check)
        return learn(made, make_feedback(seed=next(seeds)))

    static = everything(made)[0]
    assert go_on(lambda *rows: "an estimate")
    checked = everything(made)
    assert go_on(lambda *rows: None)
    assert not same(everything(made), checked)
    version = made.serving.version
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        assert not go_on(reject(since_check=True))
    assert same(everything(made), checked)
    assert made.serving.version == version + 1
    assert len(made.buffer) == 1, "what was learnt since the check is forgotten"
    assert "the draft of the last check serves again" in caplog.text
    assert go_on(lambda *rows: None)
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        assert not go_on(reject(since_check=True))
    assert same(everything(made)[0], static)
    assert "the static draft serves again" in caplog.text
    assert made.rejected == 2
    assert go_on(lambda *rows: "an estimate")  # from there
    assert not go_on(reject(since_check=True))
    assert not same(everything(made)[0], static), "a check that was passed counts for the first failure after it"


def test_the_wait_doubles_with_each_miss_and_a_good_update_ends_it(learner, make_feedback, monkeypatch):
    made, check = learner(), Gate.check
    monkeypatch.setattr(Gate, "check", lambda *args: reject(since_check=False)(0, 0))

    def add(count):
        for i in range(count):
            made.buffer.add(make_feedback(n=2, seed=i))

    for waits in (2, 4, 8):
        add(waits - 1)
        assert not made.due()
        add(1)
        assert made.due()
        assert not made.update()
    made.misses = 50
    add(127)
    assert not made.due()
    add(1)
    assert made.due(), "64 times as many is the most"
    monkeypatch.setattr(Gate, "check", check)
    assert made.update()
    assert made.misses == 0
    add(1)
    assert not made.due()
    add(1)
    assert made.due()


def test_after_a_miss_nothing_is_replayed(learner, make_feedback, monkeypatch):
    """What broke the update may be among it."""
    made, learnt = learner(replay=3.0), []
    assert learn(made, make_feedback(seed=1))
    learn_ = made.members[0].learn
    monkeypatch.setattr(made.members[0], "learn", lambda requests: (learnt.append(len(requests)), learn_(requests)))
    with monkeypatch.context() as patch:
        patch.setattr(made.gate, "check", reject(since_check=False))
        assert not learn(made, make_feedback(seed=2))
    assert learn(made, make_feedback(seed=3))
    assert learn(made, make_feedback(seed=4))
    assert learnt == [4, 1, 4]


# Faults, by name: each has an update fail.


@contextlib.contextmanager
def a_loss(times):
    divergence = trainer_module.divergence
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "divergence", lambda *args: times * divergence(*args))
        yield


@contextlib.contextmanager
def an_error(error):
    def raising(*args):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "divergence", raising)
        yield


@contextlib.contextmanager
def weights_of_nan(made):
    member = made.members[0]
    after_step = member.after_step

    def spoil():
        with torch.no_grad():
            next(iter(member.weights().values())).view(-1)[0] = torch.nan
        after_step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(member, "after_step", spoil)
        yield


@contextlib.contextmanager
def a_judge_that_raises(made):
    def raising(*args):
        raise RuntimeError("cannot be judged")

    made.gate._sample = dict.fromkeys(made.held.requests(), torch.zeros(12))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner_module, "judge", raising)
        yield


FAULTS = {
    "a loss that is NaN": (lambda made: a_loss(torch.nan), "loss of this update is nan"),
    "an infinite loss": (lambda made: a_loss(torch.inf), "loss of this update is"),
    "an exploding loss": (lambda made: a_loss(50.0), "over 4 times the largest"),
    "no memory on the device": (lambda made: an_error(torch.OutOfMemoryError("CUDA out of memory")), "CUDA out of"),
    "no memory": (lambda made: an_error(MemoryError("no memory")), "no memory"),
    "any other error": (lambda made: an_error(AssertionError("a bug")), "a bug"),
    "weights that are NaN": (weights_of_nan, "not finite"),
    "a judge that raises": (a_judge_that_raises, "cannot be judged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_the_serving_draft_as_it_was_bit_for_bit(learner, make_feedback, caplog, fault):
    made = learner(averaging=0.0, held_back_share=0.25)
    for i in range(6):
        made.offer(make_feedback(seed=i))
        made.update()
    assert made.updates >= 3
    before, version = everything(made), made.serving.version
    make, words = FAULTS[fault]
    with make(made), caplog.at_level(logging.ERROR, logger="hf_osd"):
        assert not learn(made, make_feedback(seed=7), make_feedback(seed=8))
    assert same(everything(made), before)
    assert (made.serving.version, made.failed, made.rejected) == (version, 1, 0)
    assert made.figures()["failed_updates"] == 1
    assert "An update failed; the serving draft is as it was" in caplog.text
    assert words in caplog.text
    made.gate._sample = {}
    assert learn(made, make_feedback(seed=9)), "and learning goes on"
    assert made.serving.version == version + 1


def test_a_loss_explodes_against_the_largest_of_the_last_ones(learner, make_feedback):
    made = learner(held_back_share=0.0, learning_rate=1e-6)
    request = make_feedback(seed=1)
    with a_loss(4.5):  # there is nothing yet that it could be large against
        assert learn(made, request)
    for _ in range(7):
        assert learn(made, make_feedback(seed=1))
    with a_loss(4.4):
        assert learn(made, make_feedback(seed=1)), "one of the last eight was as large"
    for _ in range(8):
        assert learn(made, make_feedback(seed=1))
    with a_loss(4.4):
        assert not learn(made, make_feedback(seed=1))
    assert made.failed == 1


@pytest.mark.parametrize("share", [0.0, 0.0625])
def test_requests_that_left_the_buffer_are_let_go_of(learner, make_feedback, share):
    """Where nothing is held back no check will come that forgets them."""
    made = learner(held_back_share=share)
    request = make_feedback(seed=1)
    gone = weakref.ref(request)
    assert learn(made, request)
    made.buffer.clear()
    del request
    assert learn(made, make_feedback(seed=2))
    if share:
        made._trust()
    gc.collect()
    assert gone() is None
