"""Ratios, their intervals, and the parts of a stream."""

import pytest

from recipes.common.figures import fifths, rate_interval, rate_ratio


def test_a_ratio_of_rates_is_of_sums_and_charges_what_lies_beside():
    pairs = [(10, 1.0, 10, 2.0), (20, 2.0, 10, 2.0)]
    assert rate_ratio(pairs) == pytest.approx((30 / 3) / (20 / 4))
    assert rate_ratio(pairs, beside=0.5) == pytest.approx((30 / 4) / (20 / 4))
    assert rate_ratio([]) is rate_ratio([(3, 0.0, 3, 1.0)]) is rate_ratio([(3, 1.0, 0, 1.0)]) is None


def test_an_interval_of_a_ratio_is_over_requests():
    pairs = [(10, 1.0 + i % 3, 10, 2.0) for i in range(12)]
    low, high = rate_interval(pairs)
    assert 2 / 3 <= low < rate_ratio(pairs) < high <= 2.0
    assert rate_interval(pairs) == [low, high], "the same draws each time"
    assert rate_interval(pairs[:4] * 30)[1] < high
    assert rate_interval([(10, 1.0, 10, 2.0)] * 5) == [2.0, 2.0]
    assert rate_interval(pairs[:1]) is rate_interval([(0, 1.0, 0, 1.0)] * 2) is None


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(36, [7, 7, 7, 8, 7]), (5, [1] * 5), (8, [1, 2, 2, 2, 1]), (2, [1, 0, 0, 0, 1]), (1, [1, 0, 0, 0, 1])],
)
def test_fifths_are_in_order_and_the_first_and_last_have_what_their_names_say(count, sizes):
    parts = fifths(list(range(count)))
    assert [len(part) for part in parts] == sizes
    if count > 1:
        assert [row for part in parts for row in part] == list(range(count))
    assert fifths([]) == [[]] * 5
