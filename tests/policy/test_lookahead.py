"""γ: the formulas against closed forms and brute force, and what `DraftPolicy` chooses after what it saw."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.policy.lookahead import (
    PLAIN_EVERY,
    PROBE_EVERY,
    DraftPolicy,
    Plan,
    best_gain,
    best_length,
    break_even,
    expected_tokens,
    heuristic_length,
    ideal_speedup,
)

rates = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8)


@given(a=st.floats(0.0, 0.99), gamma=st.integers(0, 12))
def test_expected_tokens_at_constant_acceptance_is_the_papers_closed_form(a, gamma):
    # Sums of at most 13 terms in float64.
    assert expected_tokens([a] * 12, gamma) == pytest.approx((1 - a ** (gamma + 1)) / (1 - a), rel=1e-12)


@given(acceptance=rates)
def test_expected_tokens_counts_a_position_only_after_all_before_it(acceptance):
    for gamma in range(len(acceptance) + 1):
        expected, prefix_acceptance = 1.0, 1.0
        for j in range(gamma):
            prefix_acceptance *= acceptance[j]
            expected += prefix_acceptance
        assert expected_tokens(acceptance, gamma) == pytest.approx(expected)


def test_ideal_speedup_divides_by_draft_and_verification_time():
    # (1 + .5 + .25) / (2·.25 + v(3)) with v(3) = 1.5
    assert ideal_speedup([0.5, 0.5, 0.9], 2, 0.25, lambda n: 0.5 * n) == pytest.approx(1.75 / 2.0)
    assert ideal_speedup([0.5], 0, 0.25, lambda n: 1.0) == 1.0


@given(acceptance=rates, c=st.floats(0.001, 2.0), slope=st.floats(0.0, 0.5))
def test_best_length_is_the_best_of_all_lengths_and_never_below_plain_decoding(acceptance, c, slope):
    def v(n):
        return 1 + slope * (n - 1)

    gamma, speedup = best_length(acceptance, c, v)
    every = {0: 1.0} | {g: ideal_speedup(acceptance, g, c, v) for g in range(1, len(acceptance) + 1)}
    assert speedup == max(every.values())
    assert every[gamma] == speedup
    assert speedup >= 1.0


@pytest.mark.parametrize(
    ("acceptance", "c", "drafts"),
    [(0.05, 0.2, False), (0.9, 2.0, False), (0.9, 0.2, True), (0.3, 0.05, True)],
)
def test_the_floor_drafts_nothing_where_drafting_does_not_pay(acceptance, c, drafts):
    gamma, _ = best_length([acceptance] * 5, c, lambda n: 1.0)
    assert (gamma > 0) == drafts


@pytest.mark.parametrize(
    ("gamma", "drafted", "accepted", "after"),
    [
        (5, 5, 5, 7),  # all accepted
        (5, 3, 3, 7),  # a block cut short, accepted whole
        (5, 5, 4, 4),
        (1, 1, 0, 1),  # never below 1
        (9, 9, 9, 10),  # never above the most
        (5, 0, 0, 5),  # nothing drafted says nothing
    ],
)
def test_the_heuristic_is_transformers_rule(gamma, drafted, accepted, after):
    assert heuristic_length(gamma, drafted, accepted, max_gamma=10) == after


def test_constant_policy_always_drafts_the_most():
    lookahead = DraftPolicy("constant", 4)
    for _ in range(30):
        lookahead.observe_round(4, 1, 0, 9.0, 1.0)
    assert lookahead.plan().length == 4


def test_heuristic_policy_follows_its_rounds():
    lookahead = DraftPolicy("heuristic", 5)
    lengths = []
    for accepted in (0, 0, 3):
        lookahead.observe_round(drafted := lookahead.plan().length, min(accepted + 1, drafted), accepted, 0.1, 1.0)
        lengths.append(lookahead.plan().length)
    assert lengths == [4, 3, 5]


def test_cost_policy_measures_plain_rounds_then_a_draft_then_drafts_as_many_as_pay():
    lookahead, chosen = DraftPolicy("cost", 5), []
    for _ in range(40):
        gamma = lookahead.plan().length
        chosen.append(gamma)
        lookahead.observe_round(gamma, gamma, gamma, 0.1 * gamma, 1.0)
    assert chosen[:6] == [0, 0, 0, 2, 2, 2]
    assert chosen[-1] == 5
    assert lookahead.costs.c == pytest.approx(0.1)


def test_a_prefill_does_not_measure_verification():
    """The first round forwards the prompt too: counted as a plain round, it would make every draft look cheap."""
    lookahead = DraftPolicy("cost", 5)
    for _ in range(10):
        lookahead.observe_round(0, 0, 0, 0.0, None)
    assert lookahead.plan().length == 0
    assert lookahead.costs.c is None


def test_the_first_drafts_of_a_call_do_not_measure_c_by_their_prefill():
    lookahead = DraftPolicy("cost", 5)
    for _ in range(3):
        lookahead.observe_round(0, 0, 0, 0.0, 1.0)
    lookahead.observe_round(1, 1, 1, 50.0, None)  # a draft's prefill
    assert lookahead.costs.c is None
    lookahead.observe_round(1, 1, 1, 0.2, 1.0)
    assert lookahead.costs.c == pytest.approx(0.2)


def test_c_is_a_median_that_one_slow_round_does_not_move():
    lookahead = DraftPolicy("cost", 5)
    for seconds in (1.0, 1.0, 30.0, 1.0):
        lookahead.observe_round(0, 0, 0, 0.0, seconds)
    for seconds in (0.4, 9.0, 0.4):
        lookahead.observe_round(2, 2, 2, seconds, 1.0)
    assert lookahead.costs.c == pytest.approx(0.2)


def feed(lookahead, drafted, seconds, rounds=3, accepted=0):
    for _ in range(rounds):
        lookahead.observe_round(drafted, min(accepted + 1, drafted), accepted, 0.1 * drafted, seconds)


def test_v_is_measured_and_runs_in_straight_lines_between_and_beyond():
    lookahead = DraftPolicy("cost", 9)
    assert lookahead.costs.v(4) == 1.0, "nothing known yet"
    feed(lookahead, 0, 2.0)
    feed(lookahead, 2, 3.0)  # v(3) = 1.5
    feed(lookahead, 4, 6.0)  # v(5) = 3
    feed(lookahead, 6, 60.0, rounds=2)  # too few rounds to count
    assert lookahead.costs.v(1) == pytest.approx(1.0)
    assert lookahead.costs.v(3) == pytest.approx(1.5)
    assert lookahead.costs.v(2) == pytest.approx(1.25)
    assert lookahead.costs.v(4) == pytest.approx(2.25)
    assert lookahead.costs.v(7) == pytest.approx(4.5)


def test_v_is_never_below_a_plain_step():
    """Noise may measure a block faster than one token: extrapolated, time would become negative."""
    lookahead = DraftPolicy("cost", 9)
    feed(lookahead, 0, 2.0)
    feed(lookahead, 2, 1.0)
    assert lookahead.costs.v(3) == lookahead.costs.v(30) == 1.0


def test_acceptance_is_by_position_and_drawn_to_the_mean_where_little_was_seen():
    lookahead = DraftPolicy("cost", 3)
    for i in range(300):  # position 1 always accepted, position 2 never, position 3 never tested
        lookahead.observe_round(2, 2, 1, 0.1, 1.0 + i % 2)
    first, second, third = lookahead.acceptance()
    assert first > 0.9
    assert second < 0.1
    assert 0.4 < third < 0.6


def test_old_rounds_fade():
    lookahead = DraftPolicy("cost", 1)
    for _ in range(2000):
        lookahead.observe_round(1, 1, 1, 0.1, 1.0)
    for _ in range(600):
        lookahead.observe_round(1, 1, 0, 0.1, 1.0)
    assert lookahead.acceptance()[0] < 0.1


def undrafting() -> DraftPolicy:
    """A cost policy that has found that its draft, at half the target's step time, is always wrong."""
    lookahead = DraftPolicy("cost", 3)
    feed(lookahead, 0, 1.0)
    for _ in range(60):
        lookahead.observe_round(1, 1, 0, 0.5, 1.0)
    return lookahead


def test_a_draft_that_is_always_wrong_is_not_asked():
    assert undrafting().plan().length == 0


def test_it_drafts_again_once_untested_positions_show_that_the_draft_has_learnt():
    lookahead = undrafting()
    lookahead.observe_untested([1.0] * 5)
    assert lookahead.plan().length == 0, "five good positions outweigh sixty bad ones too soon"
    lookahead.observe_untested([1.0] * 1000)
    assert lookahead.plan().length > 0


def test_bad_shadow_evidence_does_not_bring_it_back():
    lookahead = undrafting()
    lookahead.observe_untested([0.0] * 1000)
    assert lookahead.plan().length == 0


def test_it_probes_with_one_token_after_many_idle_rounds():
    lookahead = undrafting()
    for _ in range(PROBE_EVERY - 1):
        lookahead.observe_round(0, 0, 0, 0.0, 1.0)
    assert lookahead.plan().length == 0
    lookahead.observe_round(0, 0, 0, 0.0, 1.0)
    assert lookahead.plan().length == 1
    lookahead.observe_round(1, 1, 0, 0.5, 1.0)
    assert lookahead.plan().length == 0, "the probe starts the count anew"


@given(
    rounds=st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), max_size=40),
    seconds=st.lists(st.floats(1e-4, 100.0), min_size=80, max_size=80),
)
def test_with_a_fixed_cost_no_clock_is_read(rounds, seconds):
    """A γ that depends on wall-clock times changes random draws, and a seeded run would not repeat."""
    fixed = [DraftPolicy("cost", 4, draft_cost=0.2, verify_cost=0.05) for _ in range(2)]
    for i, (accepted, prefill, shadow) in enumerate(rounds):
        gammas = [lookahead.plan().length for lookahead in fixed]
        assert gammas[0] == gammas[1]
        drafted = gammas[0]
        accepted = min(accepted, drafted)
        for lookahead, times in zip(fixed, ((1.0, 1.0), seconds[2 * i : 2 * i + 2]), strict=True):
            target_seconds = None if prefill else times[1]
            lookahead.observe_round(drafted, min(accepted + 1, drafted), accepted, times[0], target_seconds)
            if shadow:
                lookahead.observe_untested([0.5])
    assert fixed[1].costs.c == 0.2
    assert fixed[1].costs.v(5) == pytest.approx(1.2)


def test_with_a_fixed_cost_it_needs_no_measuring_rounds():
    assert DraftPolicy("cost", 4, draft_cost=0.2).plan().length > 0


# Two sources, and when to stop


@given(
    acceptance=st.lists(st.floats(0.0, 1.0), max_size=6),
    slope=st.floats(0.0, 0.5),
    c=st.floats(0.0, 0.5),
    rate=st.floats(1.0, 3.0),
    after=st.integers(0, 3),
)
def test_the_best_gain_is_that_of_all_lengths(acceptance, slope, c, rate, after):
    v = [1 + slope * n for n in range(12)]
    worths = [0.0]
    for m in range(1, len(acceptance) + 1):
        tokens = expected_tokens(acceptance, m) - 1
        worths.append(tokens - rate * (m * c + v[after + m] - v[after]))
    length, worth = best_gain(acceptance, c, v, rate, after)
    assert worth == pytest.approx(max(worths))
    assert worths[length] == pytest.approx(worth)


def test_a_proposal_is_cut_where_nothing_is_known_of_v():
    assert best_gain([1.0] * 9, 0.0, [1.0, 1.0, 1.0], 1.0)[0] == 2
    assert best_gain([1.0] * 9, 0.0, [], 1.0) == (0, 0.0)


@given(c=st.floats(0.01, 1.5), slope=st.floats(0.0, 0.4))
def test_from_the_break_even_on_drafting_pays_and_below_it_does_not(c, slope):
    def v(n):
        return 1 + slope * (n - 1)

    alpha = break_even(c, v, 4)
    if alpha is None:
        assert best_length([1.0] * 4, c, v)[0] == 0
    else:
        assert best_length([alpha] * 4, c, v)[0] > 0
        assert best_length([max(alpha - 2e-3, 0.0)] * 4, c, v)[0] == 0 or alpha < 2e-3


def two_sources(c: float = 0.1) -> DraftPolicy:
    return DraftPolicy("cost", 5, draft_cost=c, verify_cost=0.02, max_cached=8)


def test_a_long_match_is_taken_and_a_poor_one_left_to_the_draft():
    lookahead = two_sources()
    for _ in range(40):
        lookahead.observe_round(3, 3, 2, confidence=[0.9, 0.9, 0.2])
    sure = lookahead.plan(20, [1.0] * 8)
    assert (sure.source, sure.length) == ("cache", 8)
    assert lookahead.plan(1, [0.2]).source == "draft"


def test_what_becomes_of_cached_tokens_changes_what_they_are_worth():
    lookahead = two_sources(c=5.0)  # the draft never pays
    assert lookahead.plan(3, [1.0] * 4).length > 0
    for _ in range(200):
        lookahead.observe_round(4, 1, 0, steps=0, cached=4, match=3, agreement=[1.0] * 4)
    assert lookahead.plan(3, [1.0] * 4).length == 0
    assert lookahead.plan(20, [1.0] * 4).length > 0, "longer matches were not tried"


def test_cached_tokens_say_nothing_of_the_draft_and_the_drafts_nothing_of_them():
    lookahead = two_sources()
    before = lookahead.acceptance()
    for _ in range(50):
        lookahead.observe_round(4, 1, 0, steps=0, cached=4, match=3, agreement=[1.0] * 4)
    assert lookahead.acceptance() == before
    seen = lookahead.matches.seen
    lookahead.observe_round(3, 1, 0)
    assert lookahead.matches.seen == seen


def test_a_block_may_end_in_cached_tokens_where_these_are_worth_more_than_drafting_on():
    lookahead = two_sources()
    lookahead.plan()
    assert lookahead.cache_suffix_length(1, 0.9, 20, [1.0] * 8) == 7, "of a block of at most 8"
    assert lookahead.cache_suffix_length(1, 0.9, 1, [0.1]) == 0
    assert lookahead.cache_suffix_length(1, 0.01, 20, [1.0] * 8) == 0, "what comes before is hardly accepted"
    assert lookahead.cache_suffix_length(1, 0.9, 0, []) == 0


@pytest.mark.parametrize("policy", ["constant", "heuristic"])
def test_other_policies_leave_the_cache_alone_where_there_is_a_draft(policy):
    lookahead = DraftPolicy(policy, 3, max_cached=8)
    assert not lookahead.wants_cache
    assert lookahead.plan(20, [1.0] * 8) == Plan("draft", 3)


@pytest.mark.parametrize("policy", ["constant", "cost"])
def test_without_a_draft_the_cache_drafts(policy):
    lookahead = DraftPolicy(policy, 3, draft_cost=0.1, max_cached=8, has_draft=False)
    assert lookahead.plan(20, [1.0] * 3) == Plan("cache", 3)
    assert lookahead.plan().length == 0


def test_confidence_chooses_once_it_was_seen_to_mean_something():
    lookahead = two_sources()
    assert not lookahead.plan().selective
    for i in range(60):
        sure = i % 2 == 0
        lookahead.observe_round(1, 1, int(sure), confidence=[0.95 if sure else 0.15])
    assert lookahead.plan().selective
    acceptance = lookahead.confidence.acceptance
    assert lookahead.should_keep(0, acceptance(lookahead.confidence.bin(0.95)))
    assert not lookahead.should_keep(0, acceptance(lookahead.confidence.bin(0.15)) * 0.1)


def test_lengths_are_tried_step_by_step_where_v_is_unknown():
    """On some machines v is steep: sixteen cached tokens at once would cost ten plain steps, three times."""
    lookahead, tried = DraftPolicy("cost", 2, max_cached=16, has_draft=False), []
    for _ in range(20):
        plan = lookahead.plan(32, [1.0] * 16)
        tried.append(plan.length + 1)
        lookahead.observe_round(plan.length, plan.length, plan.length, 0.0, 1.0, steps=0, cached=plan.length)
    assert tried[:3] == [1, 1, 1]
    assert all(n <= 2 * max(tried[:i]) for i, n in enumerate(tried) if i)
    assert max(tried) > 8


def test_a_plain_round_is_measured_now_and_then():
    lookahead = DraftPolicy("cost", 3)
    lengths = []
    for _ in range(3 * PLAIN_EVERY):
        lengths.append(lookahead.plan().length)
        lookahead.observe_round(lengths[-1], lengths[-1], lengths[-1], 0.05 * lengths[-1], 1.0)
    assert 1 <= lengths[PLAIN_EVERY // 2 :].count(0) <= 3


@pytest.mark.parametrize("policy", ["cost", "heuristic", "constant"])
def test_where_the_draft_cannot_draft_the_cache_may(policy):
    lookahead = DraftPolicy(policy, 4, draft_cost=0.05, max_cached=8)
    lookahead.observe_untested([1.0] * 1000)
    assert lookahead.plan(3, [1.0, 1.0]).source == "draft"
    cached = lookahead.plan(3, [1.0, 1.0], can_draft=False)
    assert cached == (Plan("cache", 2) if policy == "cost" else Plan("draft", 0))


def served(lookahead, rounds=200, *, right=0.6, cached=0.3, near=0.06, far=0.006, c=0.04, unread=1):
    """Serve rounds whose first draft forward takes longer the more it reads; the cache proposes one token each time. Returns how many tokens each source drafted in the
    last half."""
    random, drafted, behind = Random(0), {"draft": 0, "cache": 0}, unread
    for i in range(rounds):
        plan = lookahead.plan(1, [cached], unread=behind)
        steps = plan.length if plan.source == "draft" else 0
        read = near + far * max(behind - 8, 0)
        seconds = read + (steps - 1) * c if steps else 0.0
        accepted = 0
        while accepted < plan.length and random.random() < (right if steps else cached):
            accepted += 1
        tested = min(accepted + 1, plan.length)
        lookahead.observe_round(
            plan.length,
            tested,
            accepted,
            seconds,
            1 + 0.02 * plan.length,
            steps=steps,
            unread=behind,
            read_seconds=read if steps else None,
            cached=0 if steps else plan.length,
            match=1,
            agreement=[cached] * (0 if steps else plan.length),
        )
        behind = accepted + 1 if steps else behind + accepted + 1
        lookahead.observe_untested([right] * (not steps))
        if i >= rounds // 2:
            drafted[plan.source] += plan.length
    return drafted


def test_reading_what_the_draft_left_out_is_not_taken_for_the_cost_of_a_step():
    """A draft that was not asked for long reads much at once, and then little: it is asked again where it pays."""
    lookahead = DraftPolicy("cost", 5, max_cached=8)
    assert served(lookahead, unread=400)["draft"] > 50
    assert lookahead.costs.c == pytest.approx(0.04)
    assert lookahead.costs.read(1) == pytest.approx(0.06)
    assert lookahead.costs.read(100) > 0.5
    assert served(DraftPolicy("cost", 5, max_cached=8), right=0.02)["draft"] < 20


def test_a_first_forward_that_is_slow_once_does_not_decide():
    lookahead = DraftPolicy("cost", 5, max_cached=8)
    lookahead.costs.observe_draft(1, 5.0, 1, 5.0)
    assert not lookahead.costs.is_sure_of_draft
    assert served(lookahead)["draft"] > 50


def test_tokens_of_the_cache_take_the_place_of_a_token_that_the_draft_is_not_sure_of():
    lookahead = DraftPolicy("cost", 5, draft_cost=0.02, verify_cost=0.02, max_cached=8)
    for i in range(200):  # sure and right, or unsure and wrong
        lookahead.observe_round(1, 1, i % 2, confidence=[0.99 if i % 2 else 0.15])
    for _ in range(300):
        lookahead.observe_round(1, 1, 1, steps=0, cached=1, match=2, agreement=[0.8])
        lookahead.observe_round(1, 1, 0, steps=0, cached=1, match=2, agreement=[0.8])
    plan = lookahead.plan(2, [0.8])
    assert (plan.source, plan.cached) == ("draft", 1)
    assert plan.cached_gain > 0
    sure, unsure = (lookahead.confidence.acceptance(lookahead.confidence.bin(x)) for x in (0.99, 0.15))
    assert lookahead.should_keep(0, sure, plan.cached_gain)
    assert not lookahead.should_keep(0, unsure, plan.cached_gain)


def test_a_draft_that_began_unluckily_is_tried_again_soon():
    """Nothing learns, so nobody scores it but by drafting."""
    policy = DraftPolicy("cost", 5, draft_cost=0.1, verify_cost=0.02)
    for _ in range(6):
        policy.observe_round(1, 1, 0)
    assert policy.plan().length == 0
    rounds = drafted = 0
    while drafted < 20 and rounds < 400:
        rounds += 1
        length = policy.plan().length
        drafted += length
        policy.observe_round(length, min(length, 1), min(length, 1))
    assert drafted >= 20, "it is right, and gets to show it"


def test_a_draft_known_to_be_bad_is_left_alone():
    policy = DraftPolicy("cost", 5, draft_cost=0.1, verify_cost=0.02)
    policy.observe_untested([0.0] * 60)
    asked = 0
    for _ in range(500):
        length = policy.plan().length
        asked += length
        policy.observe_round(length, length, 0)
    assert asked == 0
