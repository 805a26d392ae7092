"""Acceptance by position and by bin: priors where little was seen, what was seen elsewhere, and old observations fade."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.policy.acceptance import BinnedAcceptance, ConfidenceAcceptance, MatchAcceptance, PositionAcceptance


def test_a_position_never_tested_is_taken_for_the_mean():
    positions = PositionAcceptance(3)
    for _ in range(300):
        positions.observe(0, 1.0)
        positions.observe(1, 0.0)
    first, second, third = positions.values()
    assert first > 0.9
    assert second < 0.1
    assert third == pytest.approx(0.5, abs=0.05)


def test_a_bin_begins_with_what_it_leads_to_expect_and_ends_with_what_was_seen():
    bins = BinnedAcceptance([0.2, 0.8])
    assert bins.acceptance(0) == pytest.approx(0.2)
    for _ in range(400):
        bins.observe(0, 1.0)
    assert bins.acceptance(0) > 0.95
    assert bins.acceptance(1) == pytest.approx(0.8, abs=0.01), "the other bin was not seen"


def test_shares_are_of_where_positions_fall():
    bins = BinnedAcceptance([0.5, 0.5])
    for i in range(400):
        bins.observe(int(i % 4 == 0), 1.0)
    (often, _), (seldom, _) = bins.bins()
    assert often == pytest.approx(0.75, abs=0.05)
    assert often + seldom == pytest.approx(1.0)


def test_old_observations_fade():
    bins = BinnedAcceptance([0.5])
    for value in [1.0] * 3000 + [0.0] * 2000:
        bins.observe(0, value)
    assert bins.acceptance(0) < 0.05


@given(st.floats(0, 1))
def test_confidence_is_its_own_prior(confidence):
    by_confidence = ConfidenceAcceptance()
    # Half a bin's width.
    assert by_confidence.acceptance(by_confidence.bin(confidence)) == pytest.approx(confidence, abs=0.051)


def test_a_draft_that_was_never_right_is_not_believed_where_it_was_not_tested():
    by_confidence = ConfidenceAcceptance()
    for _ in range(100):
        by_confidence.observe(by_confidence.bin(0.35), 0.0)
    assert by_confidence.acceptance(by_confidence.bin(0.95)) < 0.1
    for _ in range(400):
        by_confidence.observe(by_confidence.bin(0.35), 1.0)
    assert by_confidence.acceptance(by_confidence.bin(0.95)) > 0.9, "nor is it held against one that became better"


@given(st.integers(1, 32), st.floats(0.01, 1), st.integers(1, 10), st.floats(0, 0.9))
def test_before_anything_was_seen_longer_matches_and_larger_shares_are_worth_more(match, share, longer, less):
    matches = MatchAcceptance()
    value = matches.along(match, [share])[0]
    assert 0 < value < 1
    assert matches.along(match + longer, [share])[0] >= value
    assert matches.along(match, [share * less + 0.001])[0] <= value


def test_a_match_grows_by_the_tokens_that_are_accepted():
    matches = MatchAcceptance()
    assert matches.along(1, [1.0] * 30)[29] == matches.acceptance(matches.bin(30, 1.0))
