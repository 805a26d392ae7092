"""`Feedback` and `SparseLogits`: sparse distributions that are still distributions, also when cut, and what a position costs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.feedback.feedback import ACCEPTED, TAIL_FLOOR, UNTESTED, Feedback, SparseLogits


def logits_of(n: int, vocab: int, scale: float, seed: int) -> torch.Tensor:
    return scale * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed))


@given(vocab=st.integers(2, 80), k=st.integers(1, 80), scale=st.floats(0.0, 8.0), seed=st.integers(0, 10**6))
def test_top_k_and_tail_are_the_dense_distribution(vocab, k, scale, seed):
    """A tail left out, or one taken from the wrong rows, loses mass; k above V has no more than V tokens."""
    logits = logits_of(3, vocab, scale, seed)
    rows = SparseLogits.from_logits(logits, k, torch.float32)
    dense = logits.double().log_softmax(-1)
    top, ids = dense.topk(min(k, vocab))
    assert rows.top_ids.shape == rows.top_logps.shape == (3, min(k, vocab))
    # float32 against float64 at log-probs of up to about 50: some units in the last place of 50 (4e-6).
    torch.testing.assert_close(rows.top_logps.double(), top, atol=2e-5, rtol=0)
    torch.testing.assert_close(dense.gather(-1, rows.top_ids.long()), top, atol=2e-5, rtol=0)
    rest = dense.scatter(-1, ids, -torch.inf).logsumexp(-1).clamp_min(TAIL_FLOOR)
    torch.testing.assert_close(rows.tail_logp.double(), rest, atol=2e-5, rtol=0)
    mass = rows.top_logps.exp().sum(-1) + rows.tail_logp.exp()
    # The floor adds up to exp(-16) = 1.1e-7 of mass; the rest is float32.
    torch.testing.assert_close(mass, torch.ones(3), atol=1e-5, rtol=0)


@given(k=st.integers(1, 80), scale=st.floats(0.0, 30.0), seed=st.integers(0, 10**6), among=st.booleans())
def test_one_pass_over_the_exponentials_gives_what_two_log_sum_exps_would(k, scale, seed, among):
    """To the last bit but for the tail, which is rounded otherwise; with processors' -inf among the logits, and columns that may not be kept."""
    logits = logits_of(3, 80, scale, seed)
    logits[0, ::3], logits[1, :79] = -torch.inf, -torch.inf
    columns = torch.arange(10, 60) if among else None
    rows = SparseLogits.from_logits(logits, k, torch.float32, columns)
    total = logits.logsumexp(-1, keepdim=True)
    ids = rows.top_ids.long()
    assert torch.equal(rows.top_logps, logits.gather(-1, ids) - total)
    tail = (logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - total[:, 0]).clamp_min(TAIL_FLOOR)
    # Each is a sum of 80 exponentials in float32, less a total of up to about 100.
    torch.testing.assert_close(rows.tail_logp, tail, atol=3e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mass_still_sums_to_one_in_half_precision(dtype):
    rows = SparseLogits.from_logits(logits_of(50, 1000, 3.0, 0), 64, dtype)
    assert rows.top_logps.dtype == rows.tail_logp.dtype == dtype
    mass = rows.top_logps.float().exp().sum(-1) + rows.tail_logp.float().exp()
    # A log-prob of magnitude 8 or less is rounded by at most eps/2·8, which is the relative error of its probability.
    torch.testing.assert_close(mass, torch.ones(50), atol=4 * torch.finfo(dtype).eps, rtol=0)


def test_a_small_tail_is_not_lost_to_cancellation():
    """1 - Σ top in float32 is 0 here; the rest, summed itself, is known to all its digits."""
    logits = torch.tensor([[0.0, -20.0, -20.0, -30.0]])
    rows = SparseLogits.from_logits(logits + torch.tensor([[8.0, 8.0, 8.0, 8.0]]), 1, torch.float32)
    assert rows.tail_logp.item() == TAIL_FLOOR
    rows = SparseLogits.from_logits(torch.tensor([[0.0, -15.0, -16.5, -30.0]]), 1, torch.float32)
    expected = torch.tensor([-15.0, -16.5, -30.0]).double().logsumexp(0)  # ln of the rest; the top's ln is -4e-7
    assert rows.tail_logp.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_tail_is_floored_where_nothing_is_left(dtype):
    """k = V, or a top_k processor before the capture: log 0 would make reverse KL infinite."""
    whole = SparseLogits.from_logits(logits_of(2, 5, 1.0, 0), 5, dtype)
    cut = SparseLogits.from_logits(torch.tensor([[1.0, 0.5, -torch.inf, -torch.inf]]), 2, dtype)
    for rows in (whole, cut):
        assert (rows.tail_logp == TAIL_FLOOR).all()


def test_cat_keeps_rows_in_order():
    logits = logits_of(5, 20, 1.0, 0)
    whole = SparseLogits.from_logits(logits, 4)
    parts = SparseLogits.cat([SparseLogits.from_logits(logits[:2], 4), SparseLogits.from_logits(logits[2:], 4)])
    for name in ("top_ids", "top_logps", "tail_logp"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name


@pytest.mark.parametrize("n", [64, 256])
def test_a_position_costs_at_most_a_kilobyte(make_feedback, n):
    """top_k=64, draft's distribution included, with a prompt of 128 tokens."""
    feedback = make_feedback(n=n, prompt=128, vocab=512, k=64)
    stored = [v for v in vars(feedback).values() if isinstance(v, torch.Tensor)]
    assert feedback.nbytes == sum(t.numel() * t.element_size() for t in stored)
    assert feedback.draft_logps.shape == (n, 64)
    assert feedback.nbytes / n <= 1024


def test_length_and_answer_leave_the_prompt_out(make_feedback):
    feedback = make_feedback(n=7, prompt=4)
    assert len(feedback) == 7
    assert torch.equal(feedback.answer, feedback.tokens[4:])


def test_error_positions_are_those_that_end_a_round(make_feedback):
    feedback = make_feedback(n=40, seed=1)
    assert set(feedback.outcome.tolist()) == {0, 1, 2}, "the case has all three outcomes"
    assert torch.equal(feedback.teaching_mask("error"), feedback.outcome != ACCEPTED)
    assert feedback.teaching_mask("all").tolist() == [True] * 40


def test_overlap_is_filled_only_where_it_was_unknown(make_feedback):
    feedback = make_feedback(n=20)
    unknown = feedback.overlap.isnan()
    assert unknown.any()
    assert not unknown.all()
    filled = feedback.with_overlap(torch.full((20,), 0.25))
    assert (filled.overlap[unknown] == 0.25).all()
    assert torch.equal(filled.overlap[~unknown], feedback.overlap[~unknown])
    assert torch.equal(feedback.overlap.isnan(), unknown), "the original is left as it was"
    assert filled.created == feedback.created


def test_feedback_of_the_target_alone_teaches_everywhere():
    rows = SparseLogits.from_logits(logits_of(3, 20, 1.0, 0), 8)
    feedback = Feedback.from_target(torch.arange(5), 2, rows)
    assert feedback.tokens.dtype == torch.int32
    assert len(feedback) == 3
    assert feedback.teaching_mask("error").all()
    assert (feedback.outcome == UNTESTED).all()
    assert (feedback.drafted == -1).all()
    assert feedback.overlap.isnan().all()
    assert feedback.draft_logps.isnan().all()


@given(n=st.integers(0, 6), stored=st.integers(1, 30), k=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_sparser_is_what_a_smaller_k_would_have_stored(n, stored, k, seed):
    logits = logits_of(n, 30, 3.0, seed)
    tokens = torch.arange(2 + n)
    feedback = Feedback.from_target(tokens, 2, SparseLogits.from_logits(logits, stored, torch.float32))
    truncate = feedback.truncate(k)
    expected = SparseLogits.from_logits(logits, min(k, stored), torch.float32)
    assert torch.equal(truncate.top_ids, expected.top_ids)
    assert torch.equal(truncate.top_logps, expected.top_logps)
    # float32; and the floor of a stored tail adds at most exp(-16) = 1.1e-7 of mass to what is left out, which may be as small: a
    # tail above -9, of 1.2e-4, is off by 1e-3 at most.
    close = (truncate.tail_logp - expected.tail_logp).abs() < 1e-3
    assert (close | (expected.tail_logp < -9)).all()
    assert (truncate.tail_logp >= expected.tail_logp - 1e-5).all()
    assert truncate.draft_logps.shape == truncate.top_ids.shape


@given(n=st.integers(1, 6), k=st.integers(1, 64), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparser_loses_no_mass(make_feedback, dtype, n, k, seed):
    truncate = make_feedback(n=n, k=64, seed=seed, dtype=dtype).truncate(k)
    assert truncate.top_logps.dtype == truncate.tail_logp.dtype == truncate.draft_logps.dtype == dtype
    assert truncate.top_logps.shape == (n, k)
    mass = truncate.top_logps.float().exp().sum(-1) + truncate.tail_logp.float().exp()
    # As stored, a log-prob of magnitude 16 or less is off by at most eps/2·16, and so, relatively, is what it says of the mass; the
    # tail is rounded once more.
    torch.testing.assert_close(mass, torch.ones(n), atol=16 * torch.finfo(dtype).eps, rtol=0)


def test_sparser_cuts_the_draft_too_and_leaves_all_else(make_feedback):
    feedback = make_feedback(n=20, k=16)
    before = {name: tensor.clone() for name, tensor in feedback.tensors().items()}
    truncate = feedback.truncate(4)
    for name in ("top_ids", "top_logps", "draft_logps"):
        torch.testing.assert_close(
            getattr(truncate, name), getattr(feedback, name)[:, :4], equal_nan=True, atol=0, rtol=0
        )
    for name in ("tokens", "drafted", "drafted_logp", "outcome", "overlap"):
        assert getattr(truncate, name) is getattr(feedback, name)
    for name in ("prompt_length", "sampled", "created", "source"):
        assert getattr(truncate, name) == getattr(feedback, name)
    for name, tensor in before.items():
        torch.testing.assert_close(getattr(feedback, name), tensor, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("n", [1, 20])
def test_sparser_frees_what_it_cut(make_feedback, n):
    truncate = make_feedback(n=n, k=16).truncate(4)
    for name in ("top_ids", "top_logps", "draft_logps"):
        tensor = getattr(truncate, name)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_what_a_prompt_teaches_is_cut_with_the_rest_and_counted(make_feedback):
    feedback, without = make_feedback(n=4, k=16, prompt=7, prompt_rows=5), make_feedback(n=4, k=16, prompt=7)
    assert feedback.num_teaching("all") == 9
    assert without.num_teaching("all") == 4
    assert feedback.nbytes - without.nbytes == 5 * (16 * (4 + 2) + 2)
    truncate = feedback.truncate(4).prompt_rows
    assert torch.equal(truncate.top_ids, feedback.prompt_rows.top_ids[:, :4])
    mass = truncate.top_logps.float().exp().sum(-1) + truncate.tail_logp.float().exp()
    torch.testing.assert_close(mass, torch.ones(5), atol=16 * torch.finfo(torch.float16).eps, rtol=0)


@pytest.mark.parametrize("most", [0, 1, 4, 5, 9])
def test_the_last_of_a_prompts_rows_are_kept(make_feedback, most):
    feedback = make_feedback(prompt=7, prompt_rows=5)
    cut = feedback.with_prompt_rows(most)
    if not most:
        assert cut.prompt_rows is None
        return
    for name, rows in vars(cut.prompt_rows).items():
        assert torch.equal(rows, getattr(feedback.prompt_rows, name)[-most:]), name
        assert rows.untyped_storage().nbytes() == rows.nbytes, "what was cut is freed"
    assert cut.tokens is feedback.tokens


def test_a_position_without_target_gets_none_by_being_cut():
    rows = SparseLogits.from_logits(logits_of(3, 20, 1.0, 0), 8).scatter([0, 2, 3], 5)
    feedback = Feedback.from_target(torch.arange(7), 2, rows)
    truncate = feedback.truncate(3)
    assert (
        truncate.teaching_mask("all").tolist()
        == feedback.teaching_mask("all").tolist()
        == [True, False, True, True, False]
    )
    assert truncate.tail_logp.isnan().tolist() == [False, True, False, False, True]


def test_what_has_no_probability_adds_none_to_the_tail():
    """A top_k processor before the capture stores -inf."""
    logits = torch.tensor([[1.0, 0.5, -torch.inf, -torch.inf]])
    feedback = Feedback.from_target(torch.arange(3), 2, SparseLogits.from_logits(logits, 4))
    assert feedback.truncate(2).tail_logp.item() == TAIL_FLOOR


@pytest.mark.parametrize("k", [16, 17, 1000])
def test_sparser_is_the_request_itself_where_nothing_is_cut(make_feedback, k):
    feedback = make_feedback(k=16)
    assert feedback.truncate(k) is feedback


@pytest.mark.parametrize("k", [0, -1])
def test_sparser_keeps_at_least_one(make_feedback, k):
    with pytest.raises(ValueError, match=f"`k` is {k}"):
        make_feedback().truncate(k)
