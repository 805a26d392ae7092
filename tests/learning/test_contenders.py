"""`Contenders`, over a student of a single number: what is judged, what becomes of it, and what goes out to serve."""

import json
import logging
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hf_osd.config import OnlineConfig
from hf_osd.distill.ranks import RankGroup
from hf_osd.distill.scoring import Judged
from hf_osd.learning import contenders as contenders_module
from hf_osd.learning.contenders import Contenders
from hf_osd.learning.gate import WINDOW, Verdict

N = 45  # positions of a request
STATIC = 0.5
LOOKS = 4  # at a candidate, that decide what is clear


def weights_of(number: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([number])}


class FakeStudent:
    """Learns a number, by being given it, which is α of the draft that has it; unless `alpha` says otherwise, by request and number."""

    def __init__(self, config):
        self.config, self.initial = config, weights_of(STATIC)
        self.number, self.went_back = STATIC, []
        self.judged: list[float] = []  # by which numbers
        self.alpha = lambda request, number: number
        self.dtype = torch.float32

    def serving_weights(self):
        return {"w": torch.tensor([self.number], dtype=self.dtype)}

    def set_weights(self, weights):
        self.number = weights["w"].item()

    def snapshot(self):
        return [(self.number,)]

    def snapshot_of(self, weights):
        return [(weights["w"].item(),)]

    def restore(self, snapshot):
        [(self.number,)] = snapshot
        self.went_back.append(self.number)

    def score(self, requests, weights, whole=True):
        number = round(weights["w"].item(), 4)
        self.judged.append(number)
        alphas = [self.alpha(request, number) for request in requests]
        scores = [(torch.arange(N + 1) * round(N * alpha) // N).diff().float() for alpha in alphas]
        return [Judged(score, score, score) for score in scores]


class Made:
    """Contenders over it, the numbers that went out to serve, and requests."""

    def __init__(self, feedback, **config):
        self.feedback, self.out, self.pauses = feedback, [], []
        self.student, self.fails = FakeStudent(OnlineConfig(**{"seed": 0, **config})), False
        self.contenders = Contenders(self.student, RankGroup(), self.serve)
        self.contenders.pause = lambda: self.pauses.append(1)

    def serve(self, weights):
        if self.fails:
            raise MemoryError("no room for other weights")
        self.out.append(round(weights["w"].item(), 4))

    def requests(self, count: int, age: float = 0.0):
        return [replace(self.feedback, created=time.monotonic() - age) for _ in range(count)]

    def decide(self, requests: int = 8):
        return self.contenders.decide(self.requests(requests))

    def learn(self, number: float):
        """What has been learnt is this, and the candidate, if there is none."""
        self.student.number = number
        self.contenders.propose()

    def learn_and_unlearn(self, number: float):
        """As `learn`; but on requests of before, which are remembered, it is far worse than the static draft."""
        self.old = self.requests(16)
        self.contenders.remember(self.old)
        of_before = set(map(id, self.old))
        self.student.alpha = lambda request, one: 0.1 if id(request) in of_before and one == number else one
        self.learn(number)

    def accept(self, number: float):
        self.learn(number)
        for _ in range(LOOKS):
            verdict, gained = self.decide()
            if verdict is not Verdict.WAIT:
                break
        assert verdict is Verdict.ACCEPT
        return gained

    @property
    def serving(self) -> float:
        return round(self.contenders.serving.weights["w"].item(), 4)


@pytest.fixture
def made(make_feedback):
    return lambda **config: Made(make_feedback(n=N, k=2), **config)


def test_nothing_serves_before_it_was_judged_on_requests_that_came_since(made):
    one = made()
    one.learn(0.9)
    assert one.decide(0) == one.decide(1) == (Verdict.WAIT, False)
    assert (one.out, one.serving, one.contenders.changes) == ([], STATIC, 0)
    assert set(one.student.judged) == {STATIC, 0.9}


def test_what_is_accepted_goes_out_once_as_it_was_judged_and_not_as_it_is_by_then(made):
    one = made()
    one.learn(0.7)
    one.student.number = 0.9  # nobody has judged that
    for _ in range(LOOKS):
        verdict, gained = one.decide()
        if verdict is not Verdict.WAIT:
            break
    assert (verdict, gained) == (Verdict.ACCEPT, True)
    assert (one.out, one.serving, one.contenders.changes, one.contenders.accepted) == ([0.7], 0.7, 1, 1)
    assert (one.student.number, one.student.went_back) == (0.9, []), "learning goes on from where it is"
    for _ in range(6):
        one.decide()
    assert (one.out, one.contenders.changes) == ([0.7], 1)


def test_what_is_no_better_serves_too_but_is_no_gain(made):
    one = made()
    assert one.accept(STATIC) is False
    assert one.out == [STATIC]


@pytest.mark.parametrize("before", [None, 0.8])
def test_what_is_dropped_is_unlearnt_back_to_the_accepted_draft_and_nothing_goes_out(made, before):
    one = made()
    if before:
        one.accept(before)
    out, accepted = list(one.out), before or STATIC
    one.learn(0.3)
    one.student.number = 0.25  # and further down
    for _ in range(LOOKS):
        verdict, _ = one.decide()
        if verdict is not Verdict.WAIT:
            break
    assert verdict is Verdict.DROP
    assert one.student.went_back == [one.student.number] == [pytest.approx(accepted)]
    assert (one.out, one.serving, one.contenders.dropped) == (out, accepted, 1)
    assert one.accept(accepted + 0.1) is True


def test_what_is_learnt_while_nothing_is_decided_is_the_candidate(made):
    """It is far better and far worse by turns, and then good."""
    one, turn = made(), [0]

    def alpha(request, number):
        turn[0] += number == 0.7
        return 0.1 + 0.8 * (turn[0] % 2) if number == 0.7 else number

    one.student.alpha = alpha
    one.learn(0.7)
    assert {one.decide(2)[0] for _ in range(4)} == {Verdict.WAIT}
    one.learn(0.9)
    for _ in range(LOOKS):
        one.decide()
    assert one.out == [0.9]


def test_while_what_is_accepted_is_the_static_draft_it_is_judged_once_and_without_a_candidate_alone(made):
    one = made()
    one.decide()
    assert one.student.judged == [STATIC]
    one.accept(0.7)
    assert one.student.judged[1:] == [STATIC, 0.7] * (len(one.student.judged) // 2)
    one.learn(0.8)
    one.student.judged.clear()
    one.decide(1)
    assert one.student.judged == [STATIC, 0.7, 0.8]
    assert one.pauses


def test_the_static_draft_goes_out_when_traffic_is_such_that_it_is_better_and_the_accepted_one_when_it_is_not(
    made, caplog
):
    one = made()
    one.accept(0.8)
    one.student.alpha = lambda request, number: STATIC if number == STATIC else 0.2
    with caplog.at_level(logging.WARNING):
        for _ in range(WINDOW // 2):
            one.decide(2)
    assert one.out == [0.8, STATIC]
    assert one.contenders.serves_static
    assert caplog.text.count("worse than the draft before any learning") == 1
    del one.student.alpha
    one.student.alpha = lambda request, number: number
    caplog.clear()
    for _ in range(WINDOW):
        one.decide(4)
    assert one.out == [0.8, STATIC, 0.8]
    assert (one.serving, one.contenders.serves_static, one.contenders.changes) == (0.8, False, 3)
    assert not caplog.records


def test_what_is_accepted_while_the_static_draft_serves_serves_at_once(made):
    one = made()
    one.accept(0.8)
    one.student.alpha = lambda request, number: 0.2 if number == 0.8 else number
    for _ in range(WINDOW // 2):
        one.decide(2)
    assert one.serving == STATIC
    one.accept(0.7)
    assert one.out == [0.8, STATIC, 0.7]


def test_the_shadow_is_told_of_what_served_and_not_of_what_is_to(made):
    one = made()
    one.learn(0.8)
    while one.contenders.accepted == 0:
        one.decide()
    assert one.contenders.shadow.regret == 0.0
    one.decide()
    assert one.contenders.shadow.regret < 0
    one.student.alpha = lambda request, number: STATIC if number == STATIC else 0.2
    while not one.contenders.serves_static:
        one.decide(2)
    before = one.contenders.shadow.static - one.contenders.shadow.served
    one.decide()
    assert one.contenders.shadow.static - one.contenders.shadow.served == before, "both are the static draft"


def test_if_the_serving_draft_cannot_take_an_accepted_one_what_serves_stays_and_the_next_one_may(made):
    one = made()
    one.accept(0.7)
    one.fails = True
    with pytest.raises(MemoryError):
        one.accept(0.8)
    assert (one.out, one.serving, one.contenders.changes) == ([0.7], 0.7, 1)
    one.fails = False
    assert one.decide() == (Verdict.WAIT, False), "there is no candidate"
    assert one.out == [0.7]
    one.accept(0.9)
    assert (one.out, one.serving) == ([0.7, 0.9], 0.9)


def test_if_it_cannot_take_the_static_draft_what_serves_is_judged_anew(made):
    one = made()
    one.accept(0.8)
    one.student.alpha = lambda request, number: STATIC if number == STATIC else 0.2
    one.fails = True
    with pytest.raises(MemoryError):
        one.decide(WINDOW)
    assert (one.out, one.serving, one.contenders.serves_static) == ([0.8], 0.8, False)
    one.fails = False
    for _ in range(WINDOW // 2):
        one.decide(2)
    assert one.out == [0.8, STATIC]


def test_a_judge_that_fails_changes_nothing(made):
    one = made()
    one.learn(0.8)

    def breaks(request, number):
        raise MemoryError

    alpha, one.student.alpha = one.student.alpha, breaks
    for _ in range(3):
        with pytest.raises(MemoryError):
            one.decide()
    assert (one.out, one.contenders.shadow.requests) == ([], 0)
    one.student.alpha = alpha
    for _ in range(LOOKS):
        one.decide()
    assert one.out == [0.8]


def test_what_unlearnt_requests_of_before_does_not_serve_though_it_is_better_on_those_that_come(made):
    one = made()
    one.learn_and_unlearn(0.8)
    assert {one.decide()[0] for _ in range(LOOKS - 1)} == {Verdict.WAIT}
    assert one.out == []
    one.contenders.remembered.clear()
    for _ in range(LOOKS):
        one.decide()
    assert one.out == [0.8], "it was that alone"


def test_nor_does_it_keep_what_is_learnt_after_it_from_being_judged(made):
    one = made()
    one.learn_and_unlearn(0.8)
    assert {one.decide()[0] for _ in range(LOOKS)} == {Verdict.WAIT}
    one.learn(0.9)
    for _ in range(LOOKS):
        one.decide()
    assert one.out == [0.9]


def test_requests_of_before_are_remembered_no_longer_than_the_buffer_may_keep_them(made, monkeypatch):
    start, later = time.monotonic(), [0.0]
    monkeypatch.setattr(contenders_module, "time", SimpleNamespace(monotonic=lambda: start + later[0]))
    one, forever = made(buffer_age=60.0), made()
    old, new = one.requests(2, age=50.0), one.requests(3)
    for contenders in (one.contenders, forever.contenders):
        later[0] = 0.0
        contenders.remember(old)
        assert len(contenders.remembered) == 2
        later[0] = 20.0
        contenders.remember(new)
    assert list(map(id, one.contenders.remembered.requests())) == list(map(id, new))
    assert len(forever.contenders.remembered) == 5
    later[0] = 70.0
    for contenders in (one.contenders, forever.contenders):
        contenders.remember([])
    assert (len(one.contenders.remembered), len(forever.contenders.remembered)) == (0, 5)


def test_weights_trained_elsewhere_are_what_all_is_compared_with_from_then_on(made):
    one = made()
    one.accept(0.7)
    one.learn(0.3)
    one.contenders.reset(weights_of(0.9))
    assert (one.out, one.contenders.changes) == ([0.7], 1), "they serve already"
    assert (one.student.number, one.serving) == (pytest.approx(0.9), 0.9)
    one.student.judged.clear()
    assert one.decide() == (Verdict.WAIT, False)
    assert one.student.judged == [0.9], "nothing but them is left to judge"
    one.learn(0.8)  # better than all before
    for _ in range(LOOKS):
        if one.decide()[0] is not Verdict.WAIT:
            break
    assert (one.contenders.dropped, one.out) == (1, [0.7])
    assert one.student.number == pytest.approx(0.9)


def test_the_best_of_several_serves_if_what_chose_it_and_what_comes_say_so(made):
    chances = {}
    for of in (1, 10**6):
        one = made()
        one.student.number = 0.6
        candidate = one.contenders.point()
        requests = one.requests(8)
        static, said = (one.contenders.score(requests, point) for point in (one.contenders.static, candidate))
        chances[of] = one.contenders.choose(candidate, of, static, said)
        assert one.out == ([0.6] if of == 1 else [])
        assert one.contenders.shadow.requests == 8
    assert chances == {1: (Verdict.ACCEPT, True), 10**6: (Verdict.WAIT, False)}
    for _ in range(LOOKS):
        one.decide()
    assert one.out == [0.6]


def test_without_a_gate_what_is_learnt_serves_and_nothing_is_judged_or_remembered(made):
    one = made(gate=False)
    one.learn(0.2)
    assert one.decide() == (Verdict.WAIT, False)
    one.contenders.remember(one.requests(3))
    one.contenders.serve()
    assert (one.out, one.contenders.changes, one.student.judged) == ([0.2], 1, [])
    assert (len(one.contenders.remembered), one.contenders.serves_static) == (0, False)


def test_serve_puts_out_what_may_serve_and_not_what_has_been_learnt(made):
    one = made()
    one.learn(0.9)
    one.contenders.serve()
    assert (one.out, one.contenders.changes) == ([STATIC], 1)


def test_a_point_is_in_the_dtype_that_serves_and_takes_no_memory_if_that_is_the_students(made):
    one = made()
    one.student.dtype = torch.float64
    point = one.contenders.point()
    assert (point.weights["w"].dtype, point.weights["w"].item()) == (torch.float32, STATIC)
    same = weights_of(0.4)
    one.student.serving_weights = lambda: same
    assert one.contenders.point().weights["w"].data_ptr() == same["w"].data_ptr()


def test_after_a_restart_the_accepted_draft_may_serve_and_is_what_a_drop_goes_back_to(made):
    one = made()
    one.accept(0.8)
    one.learn(0.85)
    weights, values = one.contenders.state()
    other = made()
    other.student.number = 0.85  # as the members' own state has it
    other.contenders.load_state(weights, json.loads(json.dumps(values)))
    assert (other.serving, other.student.number) == (0.8, 0.85)
    assert (other.out, other.contenders.changes) == ([], 0), "that is for who resumes"
    assert (other.contenders.accepted, other.contenders.shadow.state()) == (1, one.contenders.shadow.state())
    other.contenders.serve()
    assert other.out == [0.8]
    assert other.decide() == (Verdict.WAIT, False), "a candidate that was waiting is given up"
    other.learn(0.3)
    while other.contenders.dropped == 0:
        other.decide()
    assert other.student.number == pytest.approx(0.8)
    assert other.out == [0.8]


def test_after_a_restart_the_static_draft_serves_on_if_it_did(made):
    one = made()
    one.accept(0.8)
    one.student.alpha = lambda request, number: STATIC if number == STATIC else 0.2
    while not one.contenders.serves_static:
        one.decide(2)
    weights, values = one.contenders.state()
    other = made()
    other.contenders.load_state(weights, json.loads(json.dumps(values)))
    assert (other.serving, other.contenders.serves_static) == (STATIC, True)
    for _ in range(WINDOW):
        other.decide(4)
    assert other.out == [0.8], "until it is not the better one any more"


def test_what_state_says_is_not_touched_by_what_is_learnt_later(made):
    one = made()
    one.accept(0.8)
    weights, values = one.contenders.state()
    text = json.dumps(values)
    one.accept(0.9)
    assert (weights["w"].item(), json.dumps(values)) == (pytest.approx(0.8), text)
    one.contenders.state()[0]["w"].fill_(0.1)
    assert one.serving == 0.9


@pytest.mark.parametrize(("static", "judged"), [(0.04, 0), (0.09, 0), (STATIC, 1)])
def test_where_the_static_draft_knew_next_to_nothing_there_is_nothing_to_unlearn(made, static, judged):
    """A cold draft is spared the judging of requests of before at each candidate; a better one is judged there once."""
    one, of_before = made(), []
    one.contenders.remember(one.requests(16))
    one.student.alpha = lambda request, number: static if number == STATIC else number
    judge = one.student.score

    def judge_and_tell(requests, weights, whole):
        of_before.extend([weights["w"].item()] * (len(requests) == 16))
        return judge(requests, weights, whole)

    one.student.score = judge_and_tell
    for number in (0.8, 0.9):
        one.learn(number)
        for _ in range(LOOKS):
            one.decide()
    assert one.contenders.accepted == 2
    assert of_before.count(STATIC) == 1
    assert len(of_before) - 1 == judged * 2
