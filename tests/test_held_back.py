"""`HeldBack`: what it holds back and keeps, that judging it stays cheap and survives a restart; and what two drafts' scores say, pair by pair."""

import json
import math
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.feedback import Feedback
from hf_osd.held_back import JUDGED_SHARE, HeldBack, compare, interval
from hf_osd.scoring import score

NAN = math.nan


@pytest.fixture(scope="module")
def requests_of(make_feedback):
    """`requests_of(count, n=2)`: as many requests of n positions, that are told apart by identity alone."""

    def make(count: int, n: int = 2) -> list[Feedback]:
        one = make_feedback(n=n, k=2)
        return [replace(one) for _ in range(count)]

    return make


def offered(memory: HeldBack, requests: list[Feedback]) -> list[int]:
    """Which of them were held back."""
    return [i for i, one in enumerate(requests) if memory.take(one)]


def places(memory: HeldBack, requests: list[Feedback], part: str = "all") -> list[int]:
    """Which of `requests` are held in a part, in its order."""
    at = {id(one): i for i, one in enumerate(requests)}
    return [at[id(one)] for one in memory.requests(part)]


def scores_at(means: torch.Tensor, n: int = 20) -> list[torch.Tensor]:
    """A request for each mean, whose n positions all score it."""
    return [torch.full((n,), float(mean)) for mean in means]


def test_a_sixteenth_is_every_sixteenth_and_the_first_comes_early(requests_of):
    assert offered(HeldBack(1 / 16), requests_of(60)) == [7, 23, 39, 55]


@given(share=st.floats(0, 1))
def test_the_share_held_back_is_exact_at_any_time(requests_of, share):
    memory, held = HeldBack(share, 1, 1), 0
    for seen, one in enumerate(requests_of(300), 1):
        held += memory.take(one)
        assert abs(held - share * seen) <= 0.5 + 1e-9
    assert (memory.seen, memory.taken) == (300, held)


def test_shares_of_nothing_and_of_everything(requests_of):
    assert offered(HeldBack(0), requests_of(100)) == []
    assert offered(HeldBack(1), requests_of(100)) == list(range(100))


def test_a_request_that_teaches_nothing_is_not_held_and_does_not_count(make_feedback, requests_of):
    silent = replace(make_feedback(n=3), tail_logp=torch.full((3,), NAN))
    memory, held = HeldBack(1 / 4), []
    for i, one in enumerate(requests_of(12)):
        assert not memory.take(silent)
        assert not memory.take(make_feedback(n=0))
        if memory.take(one):
            held.append(i)
    assert held == offered(HeldBack(1 / 4), requests_of(12))
    assert not HeldBack(1).take(silent)


def test_recent_holds_the_latest_in_order(requests_of):
    memory, requests = HeldBack(1 / 2, reservoir=3, recent=5, seed=0), requests_of(41)
    held = offered(memory, requests)
    assert places(memory, requests, "recent") == held[-5:]


def test_the_reservoir_remembers_an_early_domain_and_recent_does_not(requests_of):
    """After 200 of one domain and 600 of another a quarter of the reservoir is of the first: 12 of 48, with a standard deviation of 3."""
    memory, requests = HeldBack(1, seed=0), requests_of(800)
    offered(memory, requests)
    reservoir = places(memory, requests, "reservoir")
    assert len(reservoir) == 48
    assert 4 <= sum(i < 200 for i in reservoir) <= 20
    assert places(memory, requests, "recent") == list(range(768, 800))


def test_each_request_is_equally_likely_to_stay(requests_of):
    """300 reservoirs of 4 out of 20: each request is expected in 60, with a standard deviation of 7."""
    requests, counts = requests_of(20), [0] * 20
    for seed in range(300):
        memory = HeldBack(1, reservoir=4, recent=1, seed=seed)
        offered(memory, requests)
        for i in places(memory, requests, "reservoir"):
            counts[i] += 1
    assert sum(counts) == 1200
    assert all(32 < count < 88 for count in counts), counts


@given(count=st.integers(0, 40), reservoir=st.integers(1, 8), recent=st.integers(1, 8), seed=st.integers(0, 9))
def test_a_request_in_both_samples_is_held_once(make_feedback, count, reservoir, recent, seed):
    requests = [make_feedback(n=1 + i % 5, k=2) for i in range(count)]
    memory = HeldBack(1, reservoir, recent, seed)
    offered(memory, requests)
    old, new = (places(memory, requests, part) for part in ("reservoir", "recent"))
    assert (len(old), len(new)) == (min(count, reservoir), min(count, recent))
    assert places(memory, requests) == sorted({*old, *new})
    assert len(memory) == len({*old, *new})
    assert memory.nbytes == sum(requests[i].nbytes for i in {*old, *new})
    assert [one.rows for one in memory.held()] == [len(one) for one in memory.requests()]


def test_what_is_held_is_what_the_judge_made_of_it_and_only_that_is_judged(make_feedback):
    memory, judged = HeldBack(0.5), []

    def judge(one):
        judged.append(one)
        return replace(one, overlap=torch.full((4,), 0.5))

    partly = make_feedback(n=4)
    partly = replace(partly, tail_logp=torch.tensor([NAN, -1.0, -1.0, NAN]))
    assert [memory.take(partly, judge) for _ in range(2)] == [True, False]
    [held] = memory.held()
    assert judged == [partly]
    assert held.feedback.overlap.tolist() == [0.5] * 4
    assert held.rows == 2


def test_draws_repeat_with_their_seed_and_leave_others_alone(requests_of):
    requests, random = requests_of(60), torch.get_rng_state()
    kept = []
    for seed in (1, 1, 2, None):
        memory = HeldBack(1, reservoir=10, recent=1, seed=seed)
        offered(memory, requests)
        kept.append(places(memory, requests, "reservoir"))
    assert kept[0] == kept[1] != kept[2]
    compare(scores_at(torch.rand(5, generator=torch.Generator())), scores_at(torch.zeros(5)))
    assert torch.equal(torch.get_rng_state(), random)


def test_clear_forgets_requests_but_not_what_judging_cost(requests_of):
    memory, requests = HeldBack(1 / 4, reservoir=2, recent=2, seed=0), requests_of(50)
    offered(memory, requests)
    memory.note_judged(7)
    memory.clear()
    assert (len(memory), memory.nbytes, memory.requests(), memory.judged_rows) == (0, 0, [], 7)
    assert offered(memory, requests[:8]) == [1, 5], "it begins anew, with an early one"
    assert places(memory, requests, "reservoir") == [1, 5]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("share", -0.1),
        ("share", 1.5),
        ("share", NAN),
        ("share", "all"),
        ("reservoir", 0),
        ("recent", 2.5),
        ("seed", -1),
    ],
)
def test_values_out_of_range_are_named_with_the_mend(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is .*; give"):
        HeldBack(**{"share": 0.5, name: value})


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match=r"`part` is 'old'; choose one of 'all', 'reservoir', 'recent'"):
        HeldBack(1).requests("old")


def test_judging_is_due_when_its_share_of_learning_pays_for_it(requests_of):
    memory = HeldBack(1, seed=0)
    assert not memory.due(10**6), "nothing is held"
    offered(memory, requests_of(3, n=10))
    assert not memory.due(99)
    assert memory.due(100)
    memory.note_judged(30)
    assert not memory.due(199)
    assert memory.due(200)
    with pytest.raises(ValueError, match="`rows` is -1"):
        memory.note_judged(-1)


@given(steps=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3)), min_size=1, max_size=60))
def test_judged_rows_never_exceed_their_share(requests_of, steps):
    memory, learned, judged = HeldBack(1, reservoir=6, recent=4, seed=0), 0, 0
    for rows, arrived in steps:
        offered(memory, requests_of(arrived, n=5))
        learned += rows
        held = sum(one.rows for one in memory.held())
        assert memory.due(learned) == (held > 0 and judged + held <= JUDGED_SHARE * learned)
        if memory.due(learned):
            memory.note_judged(held)
            judged += held
        assert memory.judged_rows == judged <= JUDGED_SHARE * learned


@given(before=st.integers(0, 50), after=st.integers(0, 50), seed=st.sampled_from([None, 0, 3]))
def test_a_restored_memory_goes_on_as_the_first_would(requests_of, before, after, seed):
    requests = requests_of(before + after)
    memory = HeldBack(0.6, reservoir=5, recent=4, seed=seed)
    for one in requests[:before]:
        memory.take(one)
    memory.note_judged(11)
    feedback, values = memory.state()
    restored = HeldBack(0.6, reservoir=5, recent=4)
    restored.load_state(feedback, json.loads(json.dumps(values, allow_nan=False)))
    for one in requests[before:]:
        assert restored.take(one) == memory.take(one)
    for part in ("all", "reservoir", "recent"):
        facts, same = ([(h.feedback, h.rows) for h in m.held(part)] for m in (memory, restored))
        assert facts == same
    assert restored.state() == memory.state()
    assert (restored.seen, restored.taken, restored.judged_rows) == (memory.seen, memory.taken, 11)


def test_a_state_is_a_copy(requests_of):
    memory, requests = HeldBack(1, reservoir=2, recent=2, seed=0), requests_of(40)
    offered(memory, requests[:10])
    feedback, values = memory.state()
    kept, text = list(feedback), json.dumps(values)
    offered(memory, requests[10:])
    assert (feedback, json.dumps(values)) == (kept, text)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(requests_of):
    memory, requests = HeldBack(1, reservoir=4, recent=3, seed=0), requests_of(30)
    offered(memory, requests)
    feedback, values = memory.state()
    lacking = {name: value for name, value in values.items() if name != "reservoir"}
    doubled = {**values, "reservoir": [values["reservoir"][0]] * 4}
    damaged = [
        (feedback[1:], values),
        (feedback, lacking),
        (feedback, doubled),
        (feedback, {**values, "taken": 31}),
        (feedback, {**values, "seen": -1}),
        (feedback, {**values, "held": values["held"][::-1]}),
        (feedback, None),
    ]
    own = HeldBack(1, reservoir=4, recent=3, seed=1)
    offered(own, requests[:9])
    was = own.state()
    for saved in damaged:
        with pytest.raises(ValueError, match="does not fit"):
            own.load_state(*saved)
        assert own.state() == was
    few = HeldBack(1, reservoir=2, recent=3, seed=0)
    offered(few, requests[:3])
    with pytest.raises(ValueError, match="does not fit"):  # one of them in two slots
        few.load_state(few.requests(), {**few.state()[1], "reservoir": [1, 1]})
    for sizes in ((3, 3), (5, 3), (4, 2), (4, 4)):
        with pytest.raises(ValueError, match="does not fit"):
            HeldBack(1, *sizes).load_state(feedback, values)


def test_threads_may_take_and_read_at_once(requests_of):
    class Share(float):
        """Lets the other threads in amid a `take`, which they else hardly ever meet."""

        def __rmul__(self, other):
            time.sleep(0)
            return float(self) * other

    memory, errors = HeldBack(Share(1 / 4), reservoir=6, recent=4, seed=0), []
    requests = requests_of(4 * 100)

    def work(mine):
        try:
            for one in mine:
                memory.take(one)
                held = memory.requests()
                assert len(set(map(id, held))) == len(held) <= 10
                feedback, values = memory.state()
                assert len(feedback) == len(values["held"])
                memory.note_judged(1)
                memory.due(10)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(requests[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (memory.seen, memory.taken, memory.judged_rows) == (400, 100, 400)
    assert len(memory.requests("reservoir")) == 6
    assert len(memory.requests("recent")) == 4


def test_a_comparison_is_over_positions_that_have_a_target():
    before = [torch.tensor([1.0, 0.0, NAN, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([NAN]), torch.tensor([])]
    after = [torch.tensor([1.0, 1.0, NAN, 1.0]), torch.tensor([0.0, 0.5]), torch.tensor([NAN]), torch.tensor([])]
    found = compare(before, after)
    assert found.requests == 2
    assert (found.before, found.after, found.difference) == pytest.approx((2 / 5, 3.5 / 5, 1.5 / 5))
    # Resampled, the gain is that of the first request alone, of the second, or of both.
    assert (found.low, found.high) == pytest.approx((0.5 / 2, 1 / 3))
    back = compare(after, before)
    assert (back.difference, back.low, back.high) == pytest.approx((-found.difference, -found.high, -found.low))


def test_long_requests_weigh_more_and_so_they_do_when_resampled():
    """Two requests: a long one that gains nothing, and a short one that gains all. Half of the resamples have both; a quarter each has one."""
    before, after = [torch.zeros(30), torch.zeros(2)], [torch.zeros(30), torch.ones(2)]
    found = compare(before, after, level=0.4)
    assert (found.difference, found.low, found.high) == (2 / 32, 2 / 32, 2 / 32)


def test_pairing_finds_a_gain_far_smaller_than_requests_differ():
    """α between .2 and .9, and .02 more on each request: paired, the interval holds that alone. The same scores in another order have the
    same α, and say nothing."""
    random = torch.Generator().manual_seed(0)
    means = 0.2 + 0.7 * torch.rand(40, generator=random)
    gains = 0.02 + 0.01 * torch.randn(40, generator=random)
    paired = compare(scores_at(means), scores_at(means + gains))
    assert 0 < paired.low < paired.difference < paired.high < 0.04
    order = torch.randperm(40, generator=random)
    shuffled = compare(scores_at(means), scores_at((means + gains)[order]))
    assert shuffled.difference == pytest.approx(paired.difference)
    assert shuffled.low < -0.02 < 0.06 < shuffled.high
    same = compare(scores_at(means), scores_at(means))
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """200 samples of 40 requests of unequal lengths, gains of +.03 on average: of 90% intervals 180 ± 4 should hold it; percentile
    intervals of 40 are a little narrow."""
    random, held = torch.Generator().manual_seed(0), 0
    for seed in range(200):
        lengths = torch.randint(5, 30, (40,), generator=random).tolist()
        gains = 0.03 + 0.1 * torch.randn(40, generator=random)
        before = [torch.full((n,), 0.5) for n in lengths]
        after = [one + gain for one, gain in zip(before, gains, strict=True)]
        found = compare(before, after, seed=seed)
        held += found.low <= 0.03 <= found.high
    assert 164 <= held <= 192


def test_a_wider_level_is_a_wider_interval_and_a_seed_repeats_it():
    random = torch.Generator().manual_seed(0)
    before, after = (scores_at(torch.rand(20, generator=random)) for _ in range(2))
    assert compare(before, after) == compare(before, after) != compare(before, after, seed=1)
    narrow, wide = compare(before, after, level=0.5), compare(before, after, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    for level in (0, 1, 90):
        with pytest.raises(ValueError, match=f"`level` is {level}; give"):
            compare(before, after, level=level)


def test_fewer_than_two_requests_say_nothing_of_the_spread():
    one = compare([torch.tensor([0.0, 1.0])], [torch.tensor([1.0, 1.0])])
    assert (one.requests, one.difference, one.low, one.high) == (1, 0.5, -math.inf, math.inf)
    for none in ([], [torch.tensor([NAN])]):
        nothing = compare(none, none)
        assert (nothing.requests, nothing.before, nothing.after, nothing.difference) == (0, 0.0, 0.0, 0.0)
        assert (nothing.low, nothing.high) == (-math.inf, math.inf)
        assert not nothing.surely_worse_than(0.0)


def test_surely_worse_is_worse_by_the_estimate_and_by_more_than_chance():
    before, after = scores_at(torch.tensor([0.5, 0.5, 0.75])), scores_at(torch.tensor([0.25, 0.25, 0.5]))
    fell = compare(before, after)
    assert fell.difference == -0.25
    assert fell.surely_worse_than(0.24)
    assert not fell.surely_worse_than(0.25)
    assert not compare(after, before).surely_worse_than(0.0)
    by_chance = compare(before, scores_at(torch.tensor([0.5, 0.5, 0.0])))
    assert (by_chance.difference, by_chance.high) == (-0.25, 0.0)
    assert not by_chance.surely_worse_than(0.0)


def test_a_draft_that_diverged_does_not_pass_by_saying_nan():
    fine, broken = scores_at(torch.tensor([0.5, 0.7])), [torch.full((20,), NAN)] * 2
    found = compare(fine, broken)
    assert (found.after, found.requests) == (0.0, 2)
    assert found.surely_worse_than(0.5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([[1.0, 0.0]], [[1.0]]),
        ([[1.0]], [[1.0], [0.0]]),
        ([[NAN, 1.0]], [[1.0, NAN]]),
    ],
)
def test_scores_of_other_positions_are_refused(before, after):
    with pytest.raises(ValueError, match="score the same requests"):
        compare(*([torch.tensor(one) for one in scores] for scores in (before, after)))


def test_the_interval_of_one_drafts_alpha():
    random = torch.Generator().manual_seed(0)
    scores = [(torch.rand(n, generator=random) < 0.7).float() for n in range(10, 60)]
    alpha, low, high = interval([*scores, torch.tensor([NAN])])
    assert alpha == pytest.approx(float(torch.cat(scores).mean()))
    # 1725 positions, independent here: the standard error is .011.
    assert alpha - 0.04 < low < alpha - 0.01
    assert alpha + 0.01 < high < alpha + 0.04
    assert interval(scores[:1]) == (pytest.approx(float(scores[0].mean())), 0.0, 1.0)
    alpha, low, high = interval([])
    assert math.isnan(alpha)
    assert (low, high) == (0.0, 1.0)


def test_a_better_draft_is_told_from_a_worse_one_on_what_was_held_back(tiny_llama, noised_copy, answer_of):
    """The scores are those that `score` gives: the target drafting for itself against a noised copy of it."""
    target = tiny_llama()
    draft = noised_copy(target, 0.3)
    memory = HeldBack(1, seed=0)
    for seed in range(6):
        prompt = torch.randint(64, (4,), generator=torch.Generator().manual_seed(seed))
        memory.take(answer_of(target, prompt, 6))
    scores = [score(model, memory.requests()) for model in (draft, target)]
    found = compare(*scores)
    assert found.after == 1.0
    assert (found.before, *interval(scores[0])[:1]) == pytest.approx((1 - found.difference,) * 2)
    assert 0 < found.low <= found.difference <= found.high
