"""The speculative vocabulary: what the set follows, that its logits are the full head's, and that they are never of old weights."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_osd.drafting.context import DraftLogits
from hf_osd.models.draft_vocab import DraftVocab, LowRank, LowRankHead

from ..served import in_threads

NO_PROMPT = torch.tensor([], dtype=torch.long)


def linear(rows=64, d=16, bias=False, seed=0) -> nn.Linear:
    random = torch.Generator().manual_seed(seed)
    head = nn.Linear(d, rows, bias=bias).requires_grad_(False)
    for p in head.parameters():
        p.copy_(torch.randn(p.shape, generator=random))
    return head


def states(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_is_part(head, full, hidden):
    """Its logits are the full head's, exactly but for the order of additions, which BLAS chooses by shape."""
    torch.testing.assert_close(head(hidden), full(hidden)[..., head.ids], rtol=1e-5, atol=1e-5)


# The set


def test_before_traffic_the_set_is_the_lowest_ids():
    assert DraftVocab(64, 5).ids.tolist() == [0, 1, 2, 3, 4]


def test_the_set_is_the_frequent_tokens_and_ties_go_to_the_lower_id():
    vocabulary = DraftVocab(64, 4, decay=1.0)
    vocabulary.observe([50] * 3 + [40, 41] * 2 + [30, 31, 32])
    assert vocabulary.ids.tolist() == [30, 40, 41, 50]


@given(st.lists(st.integers(0, 15), max_size=60), st.integers(1, 16))
def test_without_decay_the_set_is_the_most_common(tokens, size):
    vocabulary = DraftVocab(16, size, decay=1.0)
    vocabulary.observe(tokens)
    common = sorted(range(16), key=lambda token: (-tokens.count(token), token))
    assert vocabulary.ids.tolist() == sorted(common[:size])


@given(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=20), min_size=1, max_size=8), st.floats(0.01, 1.0))
def test_a_count_fades_with_each_token_after_it(requests, decay):
    vocabulary = DraftVocab(8, 3, decay)
    counts = torch.zeros(8, dtype=torch.float64)
    for tokens in requests:
        vocabulary.observe(tokens)
        for token in tokens:
            counts *= decay
            counts[token] += 1
    torch.testing.assert_close(vocabulary._counts / vocabulary._unit, counts)


def test_the_set_follows_a_shift():
    vocabulary = DraftVocab(64, 4, decay=0.99)
    vocabulary.observe([10, 11, 12, 13] * 500)
    assert vocabulary.ids.tolist() == [10, 11, 12, 13]
    vocabulary.observe([20, 21, 22, 23] * 50)
    assert vocabulary.ids.tolist() == [20, 21, 22, 23]


def test_weights_stay_finite_over_a_long_life():
    vocabulary = DraftVocab(8, 2, decay=0.5)
    for start in range(6):
        vocabulary.observe([start, start + 1] * 1000)
    assert torch.isfinite(vocabulary._counts).all()
    assert vocabulary.ids.tolist() == [5, 6]


def test_prompt_tokens_can_count_less():
    vocabulary = DraftVocab(64, 1)
    vocabulary.observe([30] * 5, weight=0.1)
    vocabulary.observe([40])
    assert vocabulary.ids.tolist() == [40]
    vocabulary.observe([50] * 100, weight=0)
    assert vocabulary.ids.tolist() == [40]


def test_a_little_traffic_leaves_the_set_as_it_is():
    vocabulary = DraftVocab(64, 2, decay=1.0)
    vocabulary.observe([10, 11] * 500)
    chosen = vocabulary.ids
    vocabulary.observe([12] * 10)
    assert vocabulary.ids is chosen


def test_tokens_without_a_row_are_skipped():
    vocabulary = DraftVocab(64, 1)
    vocabulary.observe(torch.tensor([[-1, 64, 1000, 7]]))
    vocabulary.observe([])
    assert vocabulary.ids.tolist() == [7]


@pytest.mark.parametrize("size", [64, 1000])
def test_a_set_of_all_rows(size):
    vocabulary, full = DraftVocab(64, size), linear()
    vocabulary.observe([50] * 10)
    head = vocabulary.head(full, torch.tensor([50]))
    assert vocabulary.ids.tolist() == head.ids.tolist() == list(range(64))
    assert 63 in head
    assert 64 not in head
    hidden = states(3, 16)
    assert torch.equal(head(hidden), full(hidden))


def test_refusals():
    vocabulary = DraftVocab(32, 8)
    with pytest.raises(ValueError, match=r"`weight` is -1; choose"):
        vocabulary.observe([1], weight=-1)
    with pytest.raises(ValueError, match=r"`rows` is 32 and the head has 64; make"):
        vocabulary.head(linear(), NO_PROMPT)
    with pytest.raises(ValueError, match=r"`moment` is \(3, 3\) and the head has 16 columns; pass"):
        LowRank(linear(), 4, torch.eye(3))
    with pytest.raises(ValueError, match=r"another shape; make a LowRank"):
        LowRankHead(linear(), LowRank(linear(rows=32), 4), 8)


def test_threads_observe_and_take_heads():
    vocabulary, full, hidden = DraftVocab(64, 8, decay=1.0), linear(), states(2, 16)

    def work(first):
        for _ in range(50):
            vocabulary.observe([first, first + 1])
            assert_is_part(vocabulary.head(full, torch.tensor([63])), full, hidden)

    assert in_threads(*(partial(work, first) for first in (10, 20, 30, 40))) == []
    counts = vocabulary._counts / vocabulary._unit
    assert counts.sum() == 400
    assert vocabulary.ids.tolist() == [10, 11, 20, 21, 30, 31, 40, 41]


# The head of a call


@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_the_full_heads(bias):
    vocabulary, full = DraftVocab(64, 8), linear(bias=bias)
    vocabulary.observe([60, 61, 5])
    head = vocabulary.head(full, torch.tensor([40, 61, 40, 30, 99, -1]))
    assert head.ids.tolist() == [0, 1, 2, 3, 4, 5, 60, 61, 40, 30]
    for shape in ((16,), (3, 16), (1, 2, 16)):
        hidden = states(*shape)
        assert_is_part(head, full, hidden)
        assert head.hidden is hidden
    assert torch.equal(head.full(hidden[0]), full(hidden[0]))


def test_scores_are_minus_infinity_outside_the_rows():
    full = linear()
    head = DraftVocab(64, 8).head(full, torch.tensor([40]))
    logits = head(states(3, 16))
    scores = DraftLogits(logits, head.ids).dense(64)
    outside = [token for token in range(64) if token not in head]
    assert scores.shape == (3, 64)
    assert len(outside) == 55
    assert (scores[:, outside] == -torch.inf).all()
    assert torch.equal(scores[:, head.ids], logits)


@pytest.mark.parametrize("bias", [False, True])
@given(pieces=st.lists(st.lists(st.integers(0, 299), max_size=90), max_size=4))
def test_added_rows_are_right_and_leave_the_others(bias, pieces):
    full, hidden = linear(rows=300, bias=bias), states(2, 16)
    vocabulary = DraftVocab(300, 8)
    head, other = vocabulary.head(full, torch.tensor([100])), vocabulary.head(full, NO_PROMPT)
    for tokens in pieces:
        before = head.ids.tolist()
        head.add(tokens)
        assert head.ids.tolist() == [*before, *dict.fromkeys(t for t in tokens if t not in before)]
        assert all(token in head for token in tokens)
        assert_is_part(head, full, hidden)
    assert other.ids.tolist() == list(range(8))
    assert_is_part(other, full, hidden)


def test_a_token_that_has_no_row_leaves_the_head_as_it_was():
    full = linear()
    head = DraftVocab(64, 8).head(full, torch.tensor([40]))
    with pytest.raises(IndexError):
        head.add([50, 64])
    assert head.ids.tolist() == [*range(8), 40]
    assert 50 not in head
    assert_is_part(head, full, states(2, 16))


def test_a_head_made_under_inference_mode_works_outside_it():
    vocabulary, full = DraftVocab(64, 8), linear()
    with torch.inference_mode():
        head = vocabulary.head(full, torch.tensor([40]))
    head.add([50])
    with torch.inference_mode():
        head.add(range(64))
        assert_is_part(head, full, states(2, 16))
    assert_is_part(vocabulary.head(full, torch.tensor([41])), full, states(2, 16))


# Packed rows


def test_calls_in_a_row_share_the_packed_rows():
    vocabulary, full = DraftVocab(64, 8), linear()
    first = vocabulary.head(full, NO_PROMPT)._packed
    assert vocabulary.head(full, torch.tensor([40]))._packed is first
    vocabulary.observe([1, 2, 3])  # which are in the set
    assert vocabulary.head(full, NO_PROMPT)._packed is first
    vocabulary.observe([60])
    assert 60 in vocabulary.head(full, NO_PROMPT)


def _written(full):
    with torch.no_grad():
        full.weight.mul_(-1)


def _written_under_inference_mode(full):
    with torch.inference_mode():
        full.weight.copy_(-full.weight)


def _bias_written(full):
    full.bias.add_(1)


def _loaded(full):
    full.load_state_dict({name: p + 1 for name, p in full.state_dict().items()})


def _replaced(full):
    full.weight = nn.Parameter(full.weight + 1, requires_grad=False)


def _data_replaced(full):
    full.weight.data = full.weight.data + 1


def _stepped(full):
    full.requires_grad_(True)
    full(states(1, 16)).sum().backward()
    torch.optim.AdamW(full.parameters(), lr=0.1).step()
    full.requires_grad_(False)


@pytest.mark.parametrize(
    "write",
    [_written, _written_under_inference_mode, _bias_written, _loaded, _replaced, _data_replaced, _stepped],
)
def test_written_weights_are_never_served_stale(write):
    vocabulary, full, hidden = DraftVocab(64, 8), linear(bias=True), states(2, 16)
    old = vocabulary.head(full, NO_PROMPT)(hidden)
    write(full)
    head = vocabulary.head(full, NO_PROMPT)
    assert not torch.allclose(head(hidden), old)
    assert_is_part(head, full, hidden)


def test_weights_without_a_version_are_never_served_stale():
    with torch.inference_mode():
        full = linear()
        vocabulary, hidden = DraftVocab(64, 8), states(2, 16)
        vocabulary.head(full, NO_PROMPT)
        full.weight.mul_(-1)
        assert_is_part(vocabulary.head(full, NO_PROMPT), full, hidden)


def test_two_heads_are_told_apart():
    vocabulary, hidden = DraftVocab(64, 8), states(2, 16)
    for seed in range(4):
        full = linear(seed=seed)
        assert_is_part(vocabulary.head(full, NO_PROMPT), full, hidden)
        del full


# Low rank


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [1, 3, 30])
@pytest.mark.parametrize("weighted", [False, True])
def test_at_full_rank_the_true_top_rows_are_chosen(bias, n, weighted):
    full, hidden = linear(rows=200, bias=bias), states(1, n, 16)
    moment = torch.cov(states(16, 50, seed=2)) if weighted else None
    head = LowRankHead(full, LowRank(full, 16, moment), size=20)
    logits, true = head(hidden), full(hidden)[0]
    assert logits.shape == (1, n, 20)
    assert head.hidden is hidden
    assert head.ids.sort(-1).values.tolist() == true.topk(20).indices.sort(-1).values.tolist()
    torch.testing.assert_close(logits[0], true.gather(-1, head.ids), rtol=1e-5, atol=1e-5)
    rows = DraftLogits(logits[0], head.ids)
    assert rows.likeliest().tolist() == true.argmax(-1).tolist()
    scores = rows.dense(200)
    assert (scores > -torch.inf).sum(-1).tolist() == [20] * n
    assert torch.equal(scores.gather(-1, head.ids), logits[0])
    assert torch.equal(rows[-1:].dense(200), scores[-1:])
    assert torch.equal(head.full(hidden[0]), true)


def test_at_low_rank_the_logits_are_still_the_full_heads():
    full, hidden = linear(rows=200), states(2, 16)
    head = LowRankHead(full, LowRank(full, 2), size=20)
    torch.testing.assert_close(head(hidden), full(hidden).gather(-1, head.ids), rtol=1e-5, atol=1e-5)
    head.add([7])
    assert 199 in head
    assert 200 not in head
    assert head(states(0, 16)).shape == (0, 20)
    assert LowRankHead(full, LowRank(full, 2), size=500)(hidden).shape == (2, 200)


def test_the_moment_fits_the_factors_to_the_hidden_states():
    full = linear(rows=200)
    hidden = (
        states(100, 16) * torch.logspace(0, -2, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    )

    def error(projection):
        return (projection(hidden) - (full(hidden) - full(hidden).mean(-1, keepdim=True))).square().mean()

    assert error(LowRank(full, 4, hidden.T @ hidden / 100)) < 0.5 * error(LowRank(full, 4))
