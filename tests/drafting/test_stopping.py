"""Where drafts end for a stopping criterion, and when there must be none."""

import pytest
import torch
from transformers import MaxLengthCriteria, MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria

from hf_osd.drafting.stopping import DraftStops


class Own(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(1, dtype=torch.bool)


def stops(*criteria, sampled=False):
    return DraftStops(StoppingCriteriaList(criteria), sampled, eos={1}, max_length=20)


def test_what_generate_cuts_at_itself_is_not_asked():
    handled = stops(MaxLengthCriteria(20), EosTokenCriteria([1]), MaxTimeCriteria(60.0))
    assert handled.allow_drafts
    assert handled.max_length == 20
    assert not handled.end(torch.tensor([[3, 1]]))


def test_an_end_of_sequence_of_the_users_own_ends_a_greedy_draft():
    criterion = EosTokenCriteria([1, 5])
    assert stops(criterion).end(torch.tensor([[3, 5]]))
    assert not stops(criterion).end(torch.tensor([[5, 3]]))


@pytest.mark.parametrize("sampled", [False, True])
def test_a_nearer_length_limit_holds(sampled):
    nearer = stops(MaxLengthCriteria(12), sampled=sampled)
    assert nearer.allow_drafts
    assert nearer.max_length == 12


def test_sampled_drafts_are_not_cut_for_what_was_sampled():
    """q would not be what was sampled from: a draft that is taken back for its value is no draw from q."""
    assert stops(EosTokenCriteria([5]), sampled=True).unasked == ["EosTokenCriteria"]


@pytest.mark.parametrize("sampled", [False, True])
def test_a_users_own_criterion_is_not_asked_about_drafts(sampled):
    own = stops(Own(), MaxLengthCriteria(20), sampled=sampled)
    assert not own.allow_drafts
    assert own.unasked == ["Own"]
