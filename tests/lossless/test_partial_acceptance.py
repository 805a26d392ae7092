"""Blocks accepted in part, in whole and not at all, with outcomes known beforehand. Upstream leaves partial acceptance untested: a draft
that is a noised copy of its target has it in most rounds, and one that errs at chosen positions where it is told to."""

import copy
from itertools import pairwise

import pytest
import torch

from hf_osd.feedback.feedback import ACCEPTED, REJECTED, UNTESTED

from .checks import check_greedy
from .models import with_logits

A, R, U = ACCEPTED, REJECTED, UNTESTED
PROMPTS = torch.randint(2, 64, (3, 1, 6), generator=torch.Generator().manual_seed(0))
NEW = 24


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(eos_token_id=None)


def wrong_where(target, wrong):
    """A draft that says the target's token, or its least likely one where `wrong(positions)`, a mask."""

    def change(logits, positions):
        return torch.where(wrong(positions)[:, None], -logits, logits)

    return with_logits(copy.deepcopy(target), change)


@pytest.mark.parametrize("gamma", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("scale", [0.1, 0.3])
def test_a_noised_copy_is_accepted_in_part(target, noised_copy, scale, gamma):
    """The rounds themselves are compared with slow speculative decoding, token by token."""
    draft, accepted, tested, partly = noised_copy(target, scale), 0, 0, 0
    for prompt in PROMPTS:
        served = check_greedy(target, draft, prompt, NEW, config={"num_assistant_tokens": gamma})
        accepted, tested = accepted + served.stats.accepted, tested + served.stats.tested
        outcome = served.feedback.outcome.tolist()
        partly += sum(pair == (A, R) for pair in pairwise(outcome))
    assert 0 < accepted < tested
    if gamma > 1:
        assert partly  # a block of which some was accepted and some was not


@pytest.mark.parametrize("gamma", [1, 2, 3, 5, 8])
def test_the_target_itself_is_accepted_whole(target, gamma):
    served = check_greedy(target, target, PROMPTS[0], NEW, config={"num_assistant_tokens": gamma})
    rest = NEW % (gamma + 1)  # the last block has room for fewer drafts
    assert served.feedback.outcome.tolist() == ([A] * gamma + [U]) * (NEW // (gamma + 1)) + (
        [A] * (rest - 1) + [U]
    ) * (rest > 0)
    rounds, drafted = -(-NEW // (gamma + 1)), NEW - -(-NEW // (gamma + 1))
    stats = served.stats
    assert (stats.rounds, stats.drafted, stats.tested, stats.accepted) == (rounds, drafted, drafted, drafted)
    assert stats.alpha == stats.alpha_live == 1.0


@pytest.mark.parametrize("gamma", [1, 2, 3, 5, 8])
def test_a_draft_that_is_always_wrong_costs_rounds_and_nothing_else(target, gamma):
    draft = wrong_where(target, lambda positions: positions >= 0)
    served = check_greedy(target, draft, PROMPTS[0], NEW, config={"num_assistant_tokens": gamma})
    assert served.feedback.outcome.tolist() == [R] * (NEW - 1) + [U]  # max_length leaves the last round no room
    stats = served.stats
    drafted = sum(min(gamma, left - 1) for left in range(1, NEW + 1))
    assert (stats.rounds, stats.drafted, stats.tested, stats.accepted) == (NEW, drafted, NEW - 1, 0)
    assert (stats.alpha, stats.alpha_live, stats.tokens_per_round) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("gamma", "first", "outcomes"),
    [
        (1, "right", [A, U] * 12),
        (1, "wrong", [R] + [A, U] * 11 + [U]),
        (2, "right", [A, R] * 11 + [A, U]),
        (2, "wrong", [R] + [A, R] * 11 + [U]),
        (5, "right", [A, R] * 11 + [A, U]),
        (5, "wrong", [R] + [A, R] * 11 + [U]),
    ],
)
def test_a_draft_right_on_every_second_token(target, gamma, first, outcomes):
    """With γ=1 the bonus token falls where it would have been wrong, so that α alone shows it: ½ all the same."""
    start = PROMPTS.shape[-1] + (first == "right")
    draft = wrong_where(target, lambda positions: (positions - start) % 2 == 0)
    served = check_greedy(target, draft, PROMPTS[0], NEW, config={"num_assistant_tokens": gamma})
    assert served.feedback.outcome.tolist() == outcomes
    right = torch.tensor([1.0, 0.0] * 12 if first == "right" else [0.0, 1.0] * 12)
    assert torch.equal(served.feedback.overlap[:-1], right[:-1])
    assert served.stats.accepted == outcomes.count(A)
    assert served.stats.rounds == NEW - outcomes.count(A)


@pytest.mark.parametrize("gamma", [2, 3, 8])
def test_a_draft_wrong_at_its_blocks_end_and_at_its_beginning(target, gamma):
    """Runs of 1, 2, … right tokens, a wrong one after each: blocks end by rejection at every place in them, and by a bonus token."""
    ends, run = [], 0
    while sum(ends) + len(ends) < NEW:
        ends.append(run := run + 1)
    wrong = torch.tensor([sum(ends[: i + 1]) + i for i in range(len(ends))]) + PROMPTS.shape[-1]
    draft = wrong_where(target, lambda positions: torch.isin(positions, wrong))
    served = check_greedy(target, draft, PROMPTS[1], NEW, config={"num_assistant_tokens": gamma})
    expected, run = [], []  # of the drafts in the block so far
    for i in range(NEW):
        right, left = i + PROMPTS.shape[-1] not in wrong, NEW - i
        outcome = U if len(run) == gamma or left == 1 else A if right else R
        run = [*run, outcome] if outcome == A else []
        expected.append(outcome)
    assert served.feedback.outcome.tolist() == expected
    assert {A, R, U} == set(expected)
