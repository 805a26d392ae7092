"""Sampling is exact: over a vocabulary so small that every answer can be counted, answers come as often as the target alone would give
them, by χ². Seeds are fixed, so a passing test passes again; what it would fail on is planted in test_mutations.py.
"""

from collections import Counter

import pytest
import torch

from .checks import assistant_of, check_sampled, check_sampling, serve
from .models import InMidCall, one_layer, retrained, with_logits
from .reference import exact_distribution, p_value

VOCAB = 5
CALLS = 320


@pytest.fixture(scope="module")
def target():
    return one_layer(VOCAB)


@pytest.fixture(scope="module")
def draft(target, noised_copy):
    return noised_copy(target, 1.0, seed=1)


def never_says(model, *tokens):
    """`model` with no mass at all on `tokens`: a draft of a smaller vocabulary."""

    def change(logits, positions):
        return logits.index_fill(-1, torch.tensor(tokens), -torch.inf)

    return with_logits(model, change)


def test_the_test_itself_counts_right(target):
    """The enumeration sums to 1 and follows plain sampling; and another temperature is noticed."""
    prompt = torch.tensor([[1, 2, 3]])
    for eos, kwargs in [((), {}), ((4,), {"min_new_tokens": 2}), ((), {"top_k": 3, "repetition_penalty": 1.5})]:
        exact = exact_distribution(target, prompt, 3, eos, do_sample=True, **{"top_k": 0, **kwargs})
        assert sum(exact.values()) == pytest.approx(1)
    exact, warm = (exact_distribution(target, prompt, 2, do_sample=True, top_k=0, temperature=t) for t in (1.0, 2.0))
    random = torch.Generator().manual_seed(0)
    draws = torch.multinomial(torch.tensor(list(exact.values())), CALLS, True, generator=random)
    counts = Counter(list(exact)[i] for i in draws.tolist())
    assert p_value(counts, exact) > 1e-2
    assert p_value(counts, warm) < 1e-4


@pytest.mark.parametrize(("temperature", "gamma"), [(0.5, 1), (1.0, 2), (1.0, 4), (1.6, 3)])
def test_at_temperatures(target, draft, temperature, gamma):
    check_sampling(target, draft, 3, CALLS, gamma, temperature=temperature)


@pytest.mark.parametrize(
    ("gamma", "kwargs"),
    [
        (4, {"top_k": 3}),
        (2, {"top_p": 0.8, "temperature": 1.3}),
        (2, {"repetition_penalty": 1.7, "temperature": 0.8}),
        (3, {"top_k": 4, "top_p": 0.9, "repetition_penalty": 0.7}),
    ],
)
def test_through_processors(target, draft, gamma, kwargs):
    check_sampling(target, draft, 3, CALLS, gamma, **kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"top_k": 2}])
def test_of_a_draft_that_never_says_some_tokens(target, noised_copy, kwargs):
    """q is 0 there, and all of p is the residual's; with top_k, what both may say can have nothing in common."""
    draft = never_says(noised_copy(target, 0.5, seed=1), 0, 3)
    assert any(
        {0, 3} & set(answer)
        for answer in exact_distribution(target, torch.tensor([[1, 2, 3]]), 3, do_sample=True, top_k=2)
    )
    check_sampling(target, draft, 3, CALLS, 3, **kwargs)


@pytest.mark.parametrize("kwargs", [{"eos": (0, 4)}, {"eos": (4,), "min_new_tokens": 2}])
def test_of_answers_that_end(target, draft, kwargs):
    """Drafts stop at their own EOS; blocks are cut at the target's."""
    check_sampling(target, draft, 4, CALLS, 3, **kwargs)


def test_of_a_llama(tiny_llama, noised_copy):
    llama = tiny_llama(
        layers=1, vocab=VOCAB, initializer_range=0.15, bos_token_id=None, eos_token_id=None, pad_token_id=0
    )
    check_sampling(llama, noised_copy(llama, 1.0), 3, CALLS // 2, 2)


@pytest.mark.parametrize("policy", ["heuristic", "cost"])
def test_with_a_length_chosen_by_what_was_observed(target, draft, policy):
    """γ may depend on the past, not on what is about to be sampled."""
    config = {"lookahead": policy, "draft_cost": 0.05, "verify_cost": 0.02}
    check_sampling(target, draft, 3, CALLS, 3, config=config)


# While it learns.


def test_while_weights_are_swapped_between_calls(target, draft):
    def swap(assistant, i):
        assistant.refresh(retrained(draft, 1.0, seed=i))

    assistant = check_sampling(target, draft, 3, CALLS, 2, between=swap)
    assert assistant.stats.draft_version == CALLS


def test_while_weights_are_swapped_in_mid_call(target, draft):
    versions = [retrained(draft, 2.0, seed) for seed in range(8)]

    def streamer(assistant):
        return InMidCall(lambda: assistant.refresh(versions[assistant.stats.draft_version % 8]))

    assistant = check_sampling(target, draft, 3, CALLS, 2, streamer=streamer)
    assert assistant.stats.draft_version > CALLS  # most calls have more than one round


@pytest.mark.parametrize("elsewhere", [False, True])
def test_while_it_learns(target, draft, elsewhere):
    """Updates by what was just sampled, between calls or from another thread in mid-call; the draft must have changed by them."""
    updates, every = [], CALLS // 8

    def between(assistant, i):
        if i % every == 0 and i and not elsewhere:
            updates.append(assistant.flush())

    def streamer(assistant):
        due = assistant.stats.total.requests % every == every - 1
        return InMidCall(lambda: updates.append(assistant.flush()), rounds=int(due))

    config = {"learn": True, "learning_rate": 3e-2, "warmup_steps": 0, "replay_ratio": 0.0, "seed": 0}
    before = {name: p.clone() for name, p in draft.named_parameters()}
    assistant = check_sampling(
        target, draft, 3, CALLS, 2, between=between, streamer=streamer if elsewhere else None, config=config
    )
    assert len(updates) >= 7
    assert all(updates)
    assert assistant.stats.failed_updates == 0
    assert any(not torch.allclose(p, before[name], atol=1e-2) for name, p in assistant.serving.weights())


# What is said of it.


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize(
    "kwargs", [{"temperature": 0.7}, {}, {"temperature": 1.5, "top_k": 4, "repetition_penalty": 1.2}]
)
def test_alpha_is_the_overlap_of_what_both_were_sampled_from(target, noised_copy, kwargs, restricted):
    draft = noised_copy(target, 0.7, seed=2)
    if restricted:
        never_says(draft, 1)
    torch.manual_seed(3)
    served = check_sampled(target, draft, torch.tensor([[1, 2, 3]]), 40, config={"num_assistant_tokens": 3}, **kwargs)
    assert 0.05 < served.stats.alpha < 0.95


def test_acceptance_in_serving_is_the_alpha_that_is_said(target, draft):
    """Σ (accepted - overlap) over the tested positions is a martingale: within 4 standard deviations of 0."""
    assistant, difference, variance = assistant_of(draft, num_assistant_tokens=4), 0.0, 0.0
    torch.manual_seed(0)
    for _ in range(10):
        served = serve(target, assistant, torch.tensor([[1, 2, 3]]), max_new_tokens=60, do_sample=True, top_k=0)
        tested = served.feedback.drafted >= 0
        overlap = served.feedback.overlap[tested]
        difference += float((served.feedback.outcome[tested] == 1).sum() - overlap.sum())
        variance += float((overlap * (1 - overlap)).sum())
    assert variance > 50
    assert abs(difference) < 4 * variance**0.5
