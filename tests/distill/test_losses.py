"""The sparse divergences against dense ones: trl's at k = V, and as a lower bound below it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.config import DIVERGENCES
from hf_osd.distill.losses import (
    _LogProbsAt,
    divergence,
    draft_buckets,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    target_buckets,
    total_variation,
)
from hf_osd.feedback.feedback import SparseLogits

# At k = V the stored tail is exp(-16) = 1.1e-7 and the draft's 1e-6 of mass where dense ones are 0: at most 16·1e-6 of loss. The rest
# is float32 over terms of up to about 30.
DENSE = {"atol": 5e-5, "rtol": 1e-4}

problems = st.fixed_dictionaries(
    {
        "vocab": st.integers(2, 40),
        "target_scale": st.floats(0.0, 4.0),
        "draft_scale": st.floats(0.0, 4.0),
        "seed": st.integers(0, 10**6),
    }
)


def logits_of(vocab, target_scale, draft_scale, seed, rows=4):
    random = torch.Generator().manual_seed(seed)
    target, draft = (s * torch.randn(rows, vocab, generator=random) for s in (target_scale, draft_scale))
    return target, draft


def buckets(target, draft, k, dtype=torch.float32):
    rows = SparseLogits.from_logits(target, k, dtype)
    return target_buckets(rows.top_logps, rows.tail_logp), draft_buckets(draft, rows.top_ids)


def dense(kind, target, draft, beta=0.5):
    """Each row's dense divergence, by trl where trl has it."""
    from trl.experimental.gkd import GKDTrainer

    if kind == "total_variation":
        return 0.5 * (target.softmax(-1) - draft.softmax(-1)).abs().sum(-1)
    beta = {"forward_kl": 0, "reverse_kl": 1, "jsd": beta}[kind]
    return GKDTrainer.generalized_jsd_loss(draft, target, beta=beta, reduction="none").sum(-1)


@given(problem=problems, kind=st.sampled_from(DIVERGENCES), beta=st.floats(0.05, 0.95))
def test_with_the_whole_vocabulary_each_divergence_is_the_dense_one(problem, kind, beta):
    """p and q exchanged, beta the other way round, or a mean for a sum would differ from trl."""
    target, draft = logits_of(**problem)
    p, q = buckets(target, draft, k=problem["vocab"])
    torch.testing.assert_close(divergence(p, q, kind, beta), dense(kind, target, draft, beta), **DENSE)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_generalized_jsd_is_trls_at_every_beta(beta):
    from trl.experimental.gkd import GKDTrainer

    target, draft = logits_of(vocab=50, target_scale=2.0, draft_scale=2.0, seed=0, rows=20)
    p, q = buckets(target, draft, k=50)
    ours = generalized_jsd(p, q, beta)
    assert ours.shape == (20,)
    theirs = GKDTrainer.generalized_jsd_loss(draft[None], target[None], beta=beta, reduction="none")
    torch.testing.assert_close(ours, theirs[0].sum(-1), **DENSE)


@given(problem=problems, kind=st.sampled_from(DIVERGENCES), beta=st.floats(0.05, 0.95), share=st.floats(0.0, 1.0))
def test_with_a_tail_each_divergence_is_at_most_the_dense_one(problem, kind, beta, share):
    """Data-processing inequality. A tail left out of the sum, or not paired with the draft's, breaks it either way."""
    target, draft = logits_of(**problem)
    k = 1 + int(share * (problem["vocab"] - 2))
    p, q = buckets(target, draft, k)
    sparse = divergence(p, q, kind, beta)
    assert (sparse <= dense(kind, target, draft, beta) + 5e-5).all()
    assert (sparse >= -5e-5).all()


@given(problem=problems, kind=st.sampled_from(DIVERGENCES), k=st.integers(1, 40))
def test_a_draft_that_is_the_target_loses_nothing(problem, kind, k):
    target, _ = logits_of(**problem)
    p, q = buckets(target, target, k)
    # As above: floors of 1e-7 and 1e-6 of mass against each other, 2.4e-6 of loss at most, and float32.
    torch.testing.assert_close(divergence(p, q, kind), torch.zeros(4), atol=2e-5, rtol=0)


@given(problem=problems, k=st.integers(1, 40))
def test_the_drafts_buckets_hold_all_of_its_mass(problem, k):
    target, draft = logits_of(**problem)
    _, q = buckets(target, draft, k)
    # The draft's tail is at least 1e-6.
    torch.testing.assert_close(q.exp().sum(-1), torch.ones(4), atol=1e-5, rtol=0)
    ids = target.topk(min(k, problem["vocab"])).indices
    torch.testing.assert_close(q[:, :-1], draft.log_softmax(-1).gather(-1, ids), atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("on_support", [40.0, 0.0, -40.0], ids=["all mass", "some mass", "no mass"])
@pytest.mark.parametrize("k", [8, 30])
def test_gradients_are_finite_wherever_the_drafts_mass_is(kind, on_support, k):
    """log(1 - 1) in the draft's tail, or log 0 on the target's support, would make NaN of every weight."""
    target, draft = logits_of(vocab=30, target_scale=2.0, draft_scale=1.0, seed=3)
    draft.scatter_add_(-1, target.topk(8).indices, torch.full((4, 8), on_support))
    draft.requires_grad_()
    p, q = buckets(target, draft, k)
    loss = divergence(p, q, kind, total_variation_weight=1.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(draft.grad).all()
    assert draft.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("k", [1, 8, 30])
def test_following_the_gradient_leads_to_the_target(kind, k):
    target, draft = logits_of(vocab=30, target_scale=1.0, draft_scale=1.0, seed=4)
    draft.requires_grad_()
    optimizer = torch.optim.Adam([draft], lr=0.05)
    p, first = buckets(target, draft, k)
    first = divergence(p, first, kind).mean().item()
    for _ in range(200):
        rows = SparseLogits.from_logits(target, k, torch.float32)
        loss = divergence(p, draft_buckets(draft, rows.top_ids), kind).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Adam with a constant step of 0.05 keeps moving by about that in each logit.
    assert loss.item() < 0.05 * first + 0.01


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tokens_the_target_rules_out_do_not_make_nan(kind, dtype):
    """Logits after a top_k processor: -inf outside 4 tokens, and 8 are kept. 0·log 0 is NaN unless it is held off."""
    target, draft = logits_of(vocab=20, target_scale=1.0, draft_scale=1.0, seed=5)
    target = target.masked_fill(target < target.topk(4).values[:, -1:], -torch.inf)
    draft.requires_grad_()
    p, q = buckets(target, draft, 8, dtype)
    loss = divergence(p, q, kind)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(draft.grad).all()
    if kind == "forward_kl":
        expected = (target.softmax(-1) * (target.log_softmax(-1).clamp_min(-1e4) - draft.log_softmax(-1))).sum(-1)
        # Log-probs of up to 3 rounded to dtype: eps/2·3 each.
        torch.testing.assert_close(loss, expected, atol=5e-5 + 4 * torch.finfo(dtype).eps, rtol=0)


def test_half_precision_targets_are_computed_with_in_float32():
    target, draft = logits_of(vocab=30, target_scale=2.0, draft_scale=1.0, seed=6)
    p, q = buckets(target, draft.to(torch.bfloat16), 8, torch.float16)
    assert p.dtype == q.dtype == torch.float32


def test_total_variation_is_the_probability_of_rejection():
    target, draft = logits_of(vocab=30, target_scale=2.0, draft_scale=2.0, seed=7)
    p, q = buckets(target, draft, 30)
    accepted = torch.minimum(target.softmax(-1), draft.softmax(-1)).sum(-1)
    torch.testing.assert_close(total_variation(p, q), 1 - accepted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_total_variation_term_is_added_with_its_weight(kind):
    p, q = buckets(*logits_of(vocab=30, target_scale=2.0, draft_scale=2.0, seed=8), 8)
    with_term = divergence(p, q, kind, beta=0.3, total_variation_weight=0.7)
    torch.testing.assert_close(with_term, divergence(p, q, kind, beta=0.3) + 0.7 * total_variation(p, q))


def test_total_variation_is_not_added_to_itself():
    p, q = buckets(*logits_of(vocab=30, target_scale=2.0, draft_scale=2.0, seed=8), 8)
    assert torch.equal(divergence(p, q, "total_variation", total_variation_weight=3.0), total_variation(p, q))


def test_each_kind_is_the_divergence_of_its_name():
    p, q = buckets(*logits_of(vocab=30, target_scale=2.0, draft_scale=2.0, seed=9), 8)
    assert torch.equal(divergence(p, q, "forward_kl"), forward_kl(p, q))
    assert torch.equal(divergence(p, q, "reverse_kl"), reverse_kl(p, q))
    assert torch.equal(divergence(p, q, "jsd", beta=0.2), generalized_jsd(p, q, 0.2))
    assert not torch.allclose(forward_kl(p, q), reverse_kl(p, q))


def test_an_unknown_divergence_is_refused():
    p, q = buckets(*logits_of(vocab=5, target_scale=1.0, draft_scale=1.0, seed=0), 2)
    with pytest.raises(ValueError, match="`divergence` is 'hinge'; choose one of 'forward_kl'"):
        divergence(p, q, "hinge")


def test_log_probs_at_equals_the_plain_expression_and_so_does_its_gradient():
    """The fast path against its readable reference, in double precision; a token named twice counts twice."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 9, dtype=torch.float64, generator=random, requires_grad=True)
    ids = torch.tensor([[0, 3, 8], [1, 1, 2], [7, 6, 5], [4, 0, 4]])
    torch.testing.assert_close(_LogProbsAt.apply(logits, ids), logits.log_softmax(-1).gather(-1, ids))
    for _ in range(20):
        direction = torch.randn(4, 3, dtype=torch.float64, generator=random)
        found, expected = (
            torch.autograd.grad(made, logits, direction)
            for made in (_LogProbsAt.apply(logits, ids), logits.log_softmax(-1).gather(-1, ids))
        )
        torch.testing.assert_close(found, expected)
