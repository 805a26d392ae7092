"""γ: the formulas against closed forms and brute force, and what `Lookahead` chooses after what it saw."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.lookahead import (
    PROBE_EVERY,
    Lookahead,
    best_length,
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
        expected, reach = 1.0, 1.0
        for j in range(gamma):
            reach *= acceptance[j]
            expected += reach
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
    assert heuristic_length(gamma, drafted, accepted, most=10) == after


def test_constant_policy_always_drafts_the_most():
    lookahead = Lookahead("constant", 4)
    for _ in range(30):
        lookahead.observe_round(4, 1, 0, 9.0, 1.0)
    assert lookahead.next_length() == 4


def test_heuristic_policy_follows_its_rounds():
    lookahead = Lookahead("heuristic", 5)
    lengths = []
    for accepted in (0, 0, 3):
        lookahead.observe_round(drafted := lookahead.next_length(), min(accepted + 1, drafted), accepted, 0.1, 1.0)
        lengths.append(lookahead.next_length())
    assert lengths == [4, 3, 5]


def test_cost_policy_measures_plain_rounds_then_one_draft_then_drafts_as_many_as_pay():
    lookahead, chosen = Lookahead("cost", 5), []
    for _ in range(40):
        gamma = lookahead.next_length()
        chosen.append(gamma)
        lookahead.observe_round(gamma, gamma, gamma, 0.1 * gamma, 1.0)
    assert chosen[:4] == [0, 0, 0, 1]
    assert chosen[-1] == 5
    assert lookahead.c == pytest.approx(0.1)


def test_a_prefill_says_nothing_of_verification_times():
    """The first round forwards the prompt too: counted as a plain round, it would make every draft look cheap."""
    lookahead = Lookahead("cost", 5)
    for _ in range(10):
        lookahead.observe_round(0, 0, 0, 0.0, None)
    assert lookahead.next_length() == 0
    assert lookahead.c is None


def test_the_first_drafts_of_a_call_do_not_measure_c_by_their_prefill():
    lookahead = Lookahead("cost", 5)
    for _ in range(3):
        lookahead.observe_round(0, 0, 0, 0.0, 1.0)
    lookahead.observe_round(1, 1, 1, 50.0, None)  # a draft's prefill
    assert lookahead.c is None
    lookahead.observe_round(1, 1, 1, 0.2, 1.0)
    assert lookahead.c == pytest.approx(0.2)


def test_c_is_a_median_that_one_slow_round_does_not_move():
    lookahead = Lookahead("cost", 5)
    for seconds in (1.0, 1.0, 30.0, 1.0):
        lookahead.observe_round(0, 0, 0, 0.0, seconds)
    for seconds in (0.4, 9.0, 0.4):
        lookahead.observe_round(2, 2, 2, seconds, 1.0)
    assert lookahead.c == pytest.approx(0.2)


def feed(lookahead, drafted, seconds, rounds=3, accepted=0):
    for _ in range(rounds):
        lookahead.observe_round(drafted, min(accepted + 1, drafted), accepted, 0.1 * drafted, seconds)


def test_v_is_measured_and_runs_in_straight_lines_between_and_beyond():
    lookahead = Lookahead("cost", 9)
    assert lookahead.v(4) == 1.0, "nothing known yet"
    feed(lookahead, 0, 2.0)
    feed(lookahead, 2, 3.0)  # v(3) = 1.5
    feed(lookahead, 4, 6.0)  # v(5) = 3
    feed(lookahead, 6, 60.0, rounds=2)  # too few rounds to count
    assert lookahead.v(1) == pytest.approx(1.0)
    assert lookahead.v(3) == pytest.approx(1.5)
    assert lookahead.v(2) == pytest.approx(1.25)
    assert lookahead.v(4) == pytest.approx(2.25)
    assert lookahead.v(7) == pytest.approx(4.5)


def test_v_is_never_below_a_plain_step():
    """Noise may measure a block faster than one token: extrapolated, time would become negative."""
    lookahead = Lookahead("cost", 9)
    feed(lookahead, 0, 2.0)
    feed(lookahead, 2, 1.0)
    assert lookahead.v(3) == lookahead.v(30) == 1.0


def test_acceptance_is_by_position_and_drawn_to_the_mean_where_little_was_seen():
    lookahead = Lookahead("cost", 3)
    for i in range(300):  # position 1 always accepted, position 2 never, position 3 never tested
        lookahead.observe_round(2, 2, 1, 0.1, 1.0 + i % 2)
    first, second, third = lookahead.acceptance()
    assert first > 0.9
    assert second < 0.1
    assert 0.4 < third < 0.6


def test_old_rounds_fade():
    lookahead = Lookahead("cost", 1)
    for _ in range(2000):
        lookahead.observe_round(1, 1, 1, 0.1, 1.0)
    for _ in range(600):
        lookahead.observe_round(1, 1, 0, 0.1, 1.0)
    assert lookahead.acceptance()[0] < 0.1


def undrafting() -> Lookahead:
    """A cost policy that has found that its draft, at half the target's step time, is always wrong."""
    lookahead = Lookahead("cost", 3)
    feed(lookahead, 0, 1.0)
    for _ in range(60):
        lookahead.observe_round(1, 1, 0, 0.5, 1.0)
    return lookahead


def test_a_draft_that_is_always_wrong_is_not_asked():
    assert undrafting().next_length() == 0


def test_it_drafts_again_once_shadow_evidence_says_the_draft_has_learnt():
    lookahead = undrafting()
    lookahead.observe_shadow([1.0] * 5)
    assert lookahead.next_length() == 0, "five good positions outweigh sixty bad ones too soon"
    lookahead.observe_shadow([1.0] * 1000)
    assert lookahead.next_length() > 0


def test_bad_shadow_evidence_does_not_bring_it_back():
    lookahead = undrafting()
    lookahead.observe_shadow([0.0] * 1000)
    assert lookahead.next_length() == 0


def test_it_probes_with_one_token_after_many_idle_rounds():
    lookahead = undrafting()
    for _ in range(PROBE_EVERY - 1):
        lookahead.observe_round(0, 0, 0, 0.0, 1.0)
    assert lookahead.next_length() == 0
    lookahead.observe_round(0, 0, 0, 0.0, 1.0)
    assert lookahead.next_length() == 1
    lookahead.observe_round(1, 1, 0, 0.5, 1.0)
    assert lookahead.next_length() == 0, "the probe starts the count anew"


@given(
    rounds=st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), max_size=40),
    seconds=st.lists(st.floats(1e-4, 100.0), min_size=80, max_size=80),
)
def test_with_a_fixed_cost_no_clock_is_read(rounds, seconds):
    """A γ that depends on wall-clock times changes random draws, and a seeded run would not repeat."""
    fixed = [Lookahead("cost", 4, draft_cost=0.2, verify_cost=0.05) for _ in range(2)]
    for i, (accepted, prefill, shadow) in enumerate(rounds):
        gammas = [lookahead.next_length() for lookahead in fixed]
        assert gammas[0] == gammas[1]
        drafted = gammas[0]
        accepted = min(accepted, drafted)
        for lookahead, times in zip(fixed, ((1.0, 1.0), seconds[2 * i : 2 * i + 2]), strict=True):
            target_seconds = None if prefill else times[1]
            lookahead.observe_round(drafted, min(accepted + 1, drafted), accepted, times[0], target_seconds)
            if shadow:
                lookahead.observe_shadow([0.5])
    assert fixed[1].c == 0.2
    assert fixed[1].v(5) == pytest.approx(1.2)


def test_with_a_fixed_cost_it_needs_no_measuring_rounds():
    assert Lookahead("cost", 4, draft_cost=0.2).next_length() == 1
