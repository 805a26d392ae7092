"""The lean loop drafts what a whole `assistant.generate` a round would, in fewer steps of Python, and waits for the device once a round."""

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from hf_osd import OnlineAssistant, OnlineCandidateGenerator
from hf_osd.drafting.draft_model import DraftModelProposer

PROMPT = torch.tensor([[5, 9, 17, 3, 40, 22]])
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=3, bos_token_id=None, eos_token_id=None, pad_token_id=0)


def candidates_of(kind, target, assistant, monkeypatch, **kwargs) -> list[list[int]]:
    """What a generator of `kind` drafted in each round of one call."""
    drafted, original = [], kind.__dict__["get_candidates"]

    def get_candidates(self, input_ids, **rest):
        candidates, scores = original(self, input_ids, **rest)
        drafted.append(candidates[0, input_ids.shape[1] :].tolist())
        return candidates, scores

    with monkeypatch.context() as patch:
        patch.setattr(kind, "get_candidates", get_candidates)
        target.generate(PROMPT, assistant_model=assistant, **{**GREEDY, **kwargs})
    return drafted


@pytest.mark.parametrize("gamma", [1, 3, 5])
@pytest.mark.parametrize("kwargs", [{}, {"repetition_penalty": 1.3}, {"min_new_tokens": 20, "eos_token_id": 7}])
def test_it_drafts_the_same_tokens_as_stock(target, noised_copy, monkeypatch, gamma, kwargs):
    draft = noised_copy(target, 0.3)
    online = OnlineAssistant(draft, lookahead="constant", num_assistant_tokens=gamma)
    ours = candidates_of(OnlineCandidateGenerator, target, online, monkeypatch, **kwargs)
    config = draft.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = gamma, "constant"
    config.assistant_confidence_threshold = 0.0
    assert ours == candidates_of(AssistedCandidateGenerator, target, draft, monkeypatch, **kwargs)
    assert gamma == 1 or sum(map(len, ours)) > len(ours), "rounds with several drafts"


def test_the_draft_reads_each_token_once(target, noised_copy):
    """No more forwards than drafts, and none over tokens that the cache has."""
    draft = noised_copy(target, 0.2)
    assistant = OnlineAssistant(draft, lookahead="constant", num_assistant_tokens=3)
    read = []
    body = assistant.serving.active.model
    handle = body.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        target.generate(PROMPT, assistant_model=assistant, **GREEDY)
    finally:
        handle.remove()
    stats = assistant.stats.last
    assert len(read) == stats.draft_steps == stats.drafted
    assert read[0] == PROMPT.shape[1]
    assert max(read[1:]) <= 2, "a rejected token's successor, or a bonus token and the draft before it"


@pytest.mark.parametrize("do_sample", [False, True])
def test_where_looking_at_a_token_means_waiting_it_is_not_looked_at(target, noised_copy, monkeypatch, do_sample):
    """As on an accelerator: output as before, and no value of a drafted token is asked for before the round is verified."""
    draft, asked = noised_copy(target, 0.2), []
    prepare = DraftModelProposer.__init__

    def blind(self, *args, **kwargs):
        prepare(self, *args, **kwargs)
        self._looks = False

    original = DraftModelProposer.draft

    def watched(self, *args):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__int__", "__float__", "__bool__"):
                patch.setattr(torch.Tensor, name, lambda tensor, name=name: asked.append(name))
            return original(self, *args)

    monkeypatch.setattr(DraftModelProposer, "__init__", blind)
    monkeypatch.setattr(DraftModelProposer, "draft", watched)
    assistant = OnlineAssistant(draft, lookahead="constant", num_assistant_tokens=3, top_k=64)
    torch.manual_seed(0)
    output = target.generate(PROMPT, assistant_model=assistant, **{**GREEDY, "do_sample": do_sample})
    assert not asked
    assert assistant.stats.last.accepted > 0
    if not do_sample:
        assert torch.equal(output, target.generate(PROMPT, **GREEDY))
    [feedback] = assistant.buffer.new()
    with torch.no_grad():
        predicted = draft(output).logits[0, PROMPT.shape[1] - 1 : -1].argmax(-1)
    known = ~feedback.overlap.isnan()
    assert known[:-1].all()
    if not do_sample:
        assert torch.equal(feedback.overlap[known], (predicted == feedback.answer)[known].float())


def test_greedy_drafts_hand_over_no_scores_and_sampled_ones_do(target, noised_copy, monkeypatch):
    """generate reads them only when it samples; to gather a row of the vocabulary for each draft would be for nothing."""
    handed, original = [], OnlineCandidateGenerator.get_candidates

    def get_candidates(self, input_ids, **kwargs):
        candidates, scores = original(self, input_ids, **kwargs)
        handed.append(None if scores is None else tuple(scores.shape))
        return candidates, scores

    monkeypatch.setattr(OnlineCandidateGenerator, "get_candidates", get_candidates)
    assistant = OnlineAssistant(noised_copy(target, 0.2), lookahead="constant", num_assistant_tokens=2)
    target.generate(PROMPT, assistant_model=assistant, **GREEDY)
    assert set(handed) == {None}
    handed.clear()
    torch.manual_seed(0)
    target.generate(PROMPT, assistant_model=assistant, **{**GREEDY, "do_sample": True})
    assert (1, 2, 64) in handed


def test_an_unsure_draft_is_dropped_and_still_known_at_its_position(target, noised_copy):
    """Asked for and not put into the block: α is known there all the same."""
    draft = noised_copy(target, 0.1)
    assistant = OnlineAssistant(
        draft, draft_cost=0.05, verify_cost=0.3, update_interval=10**6, suffix_cache=False, top_k=64
    )
    for seed in range(12):
        prompt = torch.randint(2, 64, (1, 6), generator=torch.Generator().manual_seed(seed))
        plain = target.generate(prompt, **GREEDY)
        assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **GREEDY))
    stats = assistant.stats.total
    assert 0 < stats.drafted < stats.draft_steps
    for feedback in assistant.buffer.new():
        with torch.no_grad():
            predicted = draft(feedback.tokens[None].long()).logits[0, feedback.prompt_length - 1 : -1].argmax(-1)
        known = ~feedback.overlap.isnan()
        assert torch.equal(feedback.overlap[known], (predicted == feedback.answer)[known].float())


def test_logits_processors_are_asked_only_where_there_are_some(target, noised_copy):
    assistant = OnlineAssistant(noised_copy(target, 0.2), lookahead="constant")
    processors = LogitsProcessorList()
    target.generate(PROMPT, assistant_model=assistant, logits_processor=processors, **GREEDY)
    assert len(processors) == 0


def test_log_probs_under_a_part_of_the_head_are_those_over_all_tokens(target, noised_copy):
    """The rest of the vocabulary has probability 0 there: with and without it, q sums to 1."""
    assistant = OnlineAssistant(
        noised_copy(target, 0.2),
        lookahead="constant",
        num_assistant_tokens=3,
        draft_head="traffic",
        draft_vocab_size=8,
    )
    seen, original = [], DraftModelProposer.log_q

    def log_q(self, block, n, ids):
        found, dense = original(self, block, n, ids), self.dense(block, n)
        seen.append((found, dense.log_softmax(-1).gather(-1, ids), bool(dense.isinf().any())))
        return found

    DraftModelProposer.log_q = log_q
    try:
        target.generate(PROMPT, assistant_model=assistant, **GREEDY)
    finally:
        DraftModelProposer.log_q = original
    assert seen
    assert all(partial for *_, partial in seen)
    for found, expected, _ in seen:
        torch.testing.assert_close(found, expected)
