"""Processors with state see each verified position once, in order, and never a drafted one that did not come true."""

import weakref

import pytest
import torch
from transformers import LogitsProcessor
from transformers.generation.logits_process import (
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    WhisperNoSpeechDetection,
)

from hf_osd.drafting.processors import VerifiedProcessors


class Noting(LogitsProcessor):
    """Keeps the prefixes it was called with, and adds one to the score of token 0 a call."""

    def __init__(self):
        self.heard = []

    def __call__(self, input_ids, scores):
        self.heard.append(input_ids[0].tolist())
        scores[:, 0] += len(self.heard)
        return scores


class Uncopyable(Noting):
    def __deepcopy__(self, memo):
        raise TypeError("no")


def ask(verified, candidates, says):
    """One round over `candidates` after the token 9, with rows that say `says` for certain, before processing."""
    verified.begin_round(candidates, None)
    rows = []
    for i, token in enumerate(says):
        row = torch.zeros(1, 10)
        row[0, token] = 100.0
        rows.append(verified(torch.tensor([[9, *candidates[:i]]]), row))
    return rows


def test_rows_are_kept_as_they_were_before_processors():
    verified = VerifiedProcessors([Noting()], sampled=False, eos=set())
    ask(verified, [1, 2], [1, 2, 3])
    raw = verified.finish_round(3)
    assert raw.argmax(-1).tolist() == [1, 2, 3]
    assert raw[:, 0].tolist() == [0.0, 0.0, 0.0]


def test_greedy_nothing_is_asked_after_a_rejection():
    noting = Noting()
    verified = VerifiedProcessors([noting], sampled=False, eos=set())
    rows = ask(verified, [1, 2, 3], [1, 5, 3, 4])
    assert noting.heard == [[9], [9, 1]]
    assert rows[2][0, 0] == 0  # as it came
    assert verified.finish_round(2).shape == (2, 10)
    ask(verified, [], [7])
    assert noting.heard[2:] == [[9]]  # the next round is asked about again


def test_greedy_nothing_is_asked_after_the_end_of_sequence():
    noting = Noting()
    ask(VerifiedProcessors([noting], sampled=False, eos={1}), [1, 2], [1, 2, 3])
    assert noting.heard == [[9]]


def test_sampled_nothing_is_asked_after_a_rejection():
    noting = Noting()
    verified = VerifiedProcessors([noting], sampled=True, eos=set())
    ask(verified, [1, 2, 3], [1, 5, 3, 4])
    verified.finish_round(2)
    assert noting.heard == [[9], [9, 1]]
    ask(verified, [1], [1, 2])
    verified.finish_round(2)  # all of them
    assert noting.heard == [[9], [9, 1], [9], [9, 1]]


def test_sampled_a_row_leads_to_what_was_drawn_and_reads_afterwards_as_it_was():
    """Of two candidates drawn from a draft that is surer than the target the first is accepted with p/q = 1/2, and else another token is drawn."""
    torch.manual_seed(0)
    p, q = torch.tensor([0.25, 0.25, 0.5]).log(), torch.tensor([0.5, 0.5, 0.0]).log()
    drawn = []
    for _ in range(400):
        noting = Adding(torch.tensor([0.0, 0.0, 0.0]))
        verified = VerifiedProcessors([noting], sampled=True, eos=set())
        verified.begin_round([0, 1], torch.stack([q, q]))
        rows = [verified(torch.tensor([[9, *drafted]]), p[None].clone()) for drafted in ([], [0], [0, 1])]
        drawn.append(int(rows[0].argmax()))
        assert rows[0].isfinite().sum() == 1
        settled = torch.stack(rows, dim=1)
        verified.finish_round(1, settled)
        assert torch.equal(settled[0, 0], p)
        assert noting.calls == (1 if drawn[-1] != 0 else 2 if int(rows[1].argmax()) != 1 else 3)
    counts = torch.tensor(drawn).bincount(minlength=3)
    assert counts[1] == 0  # the rest of p over q is all of token 2
    assert 160 < counts[0] < 240


class Adding(LogitsProcessor):
    def __init__(self, bias):
        self.bias, self.calls = bias, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores + self.bias


def test_a_draft_works_on_copies():
    noting, stock = Noting(), RepetitionPenaltyLogitsProcessor(1.2)
    verified = VerifiedProcessors([stock, noting], sampled=False, eos=set())
    drafting = verified.for_drafting()
    assert drafting[0] is stock
    drafting(torch.tensor([[9]]), torch.zeros(1, 10))
    assert (noting.heard, drafting[1].heard) == ([], [[9]])


def test_models_and_tokenizers_are_not_copied():
    noting = Noting()
    noting.model = torch.nn.Linear(2, 2)
    verified = VerifiedProcessors([noting], sampled=True, eos=set())
    assert verified.for_drafting()[0].model is noting.model


@pytest.mark.parametrize("sampled", [False, True])
def test_what_cannot_be_copied_is_left_out_of_drafting(sampled):
    stock = RepetitionPenaltyLogitsProcessor(1.2)
    verified = VerifiedProcessors([Uncopyable(), stock], sampled=sampled, eos=set())
    assert not verified.can_be_copied
    assert list(verified.for_drafting()) == [stock]


def test_stock_processors_are_shared_as_they_are():
    stock = RepetitionPenaltyLogitsProcessor(1.2)
    verified = VerifiedProcessors([stock], sampled=True, eos=set())
    assert not verified.has_state
    assert list(verified.for_drafting()) == [stock]


def test_observers_of_the_target_never_see_drafts():
    """Whisper's own reads the first row, and is read after the call. That it has state keeps it from being asked about positions of before as well."""
    stock, watching = RepetitionPenaltyLogitsProcessor(1.2), WhisperNoSpeechDetection(no_speech_token=3, begin_index=1)
    verified = VerifiedProcessors([watching, stock], sampled=False, eos=set())
    assert verified.has_state
    assert list(verified.for_drafting()) == [stock]
    ask(verified, [3], [5, 6])
    assert watching.no_speech_prob < 1e-6


def test_a_function_of_allowed_tokens_has_no_state_and_is_not_asked_about_what_it_has_not_allowed():
    asked = []

    def allowed(batch, tokens):
        asked.append(tokens.tolist())
        return [4]

    stock = PrefixConstrainedLogitsProcessor(allowed, num_beams=1)
    verified = VerifiedProcessors([stock], sampled=False, eos=set())
    ask(verified, [4, 5, 4], [1, 1, 1, 1])
    assert asked == [[9], [9, 4]]
    assert not verified.has_state
    assert list(verified.for_drafting()) == [stock]


def copies_of(processor):
    """Whether the draft has a copy."""
    return VerifiedProcessors([processor], sampled=True, eos=set(), warn=lambda message: None).can_be_copied


def test_a_copy_shares_nothing_that_changes_and_may_share_what_does_not():
    constant = Noting()
    constant.parts = {"add": torch.add, "length": len, "kind": Noting, "plain": copies_of}
    assert copies_of(constant)
    for shared in (lambda: constant, [].append, weakref.ref(constant), (lambda by=[]: by)):
        noting = Noting()
        noting.parts = [{"deep": (shared,)}]
        assert not copies_of(noting)
