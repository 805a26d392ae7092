"""Blocks that a draft begins and the cache ends, and sampling from every source: greedy output is the target's own, sampled answers come
as often as its own.
"""

from collections import Counter

import pytest
import torch
from transformers import LogitsProcessorList

from hf_osd import OnlineCandidateGenerator
from hf_osd.models import draft_head

from .checks import assistant_of
from .models import one_layer
from .processors import Biased
from .reference import processors_of
from .sources import (
    BOTH,
    DECODERS,
    PROMPTS,
    answer_to,
    check_account,
    check_mixed,
    check_sampled_sources,
    last_call,
    mixed,
    rounds_seen,
)


@pytest.mark.parametrize("name", [*DECODERS, "T5", "Bart"])
def test_blocks_of_draft_and_cache(tiny_model, noised_copy, name):
    """Overlap off where the draft catches up with cached tokens; sliding windows cropped wrong; tokens counted to the other source."""
    target = tiny_model(name)
    draft = noised_copy(target, 0.1)
    check_mixed(target, draft, assistant_of(draft, **BOTH), [*PROMPTS, *PROMPTS[:2]])


@pytest.mark.parametrize("own", [2, 3])
def test_blocks_of_a_longer_draft_and_the_cache(target, draft, own):
    check_mixed(target, draft, assistant_of(draft, **BOTH), [*PROMPTS, *PROMPTS[:2]], own)


@pytest.mark.parametrize(("kwargs", "extra"), [({"repetition_penalty": 1.2}, ()), ({}, (Biased,))])
def test_blocks_of_draft_and_cache_through_processors(target, draft, kwargs, extra):
    def processors(prompt):
        return processors_of(prompt.shape[1], extra=[kind() for kind in extra], **kwargs)

    asked = kwargs | ({"logits_processor": LogitsProcessorList(kind() for kind in extra)} if extra else {})
    check_mixed(target, draft, assistant_of(draft, **BOTH), [*PROMPTS, *PROMPTS[:2]], 1, processors, **asked)


def test_the_policy_of_cost_takes_both(target, draft):
    assistant, blocks = assistant_of(draft, **BOTH), []
    for prompt in [*PROMPTS, *PROMPTS[:2]]:
        with rounds_seen() as seen:
            output = answer_to(target, assistant, prompt)
        blocks += seen
        check_account(*last_call(assistant), [block for block, _ in seen], output[0, 6:].tolist())
    assert any(block.draft_tokens for block, _ in blocks)
    assert any(block.cached for block, _ in blocks)


def test_the_draft_learns_from_calls_that_the_cache_drafts_in(target, draft):
    assistant = assistant_of(draft, **BOTH, update_interval=2, learning_rate=5e-3, seed=0)
    for prompt in [*PROMPTS, PROMPTS[0]]:
        with mixed(assistant):
            answer_to(target, assistant, prompt)
    assert (assistant.stats.updates, assistant.stats.failed_updates) == (2, 0)
    assert assistant.stats.total.accepted_by["cache"] > 0


# Sampling.


@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0.6}, {"top_k": 3, "repetition_penalty": 1.5}, {"eos": (4,)}])
def test_sampling_from_the_cache_alone(kwargs):
    """That its state changes from call to call, by what was just sampled, must not matter."""
    check_sampled_sources(None, **kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"temperature": 1.5, "top_k": 3}, {"n": 4}, {"eos": (4,)}])
def test_sampling_from_draft_and_cache(noised_copy, kwargs):
    check_sampled_sources(noised_copy(one_layer(5), 1.0, seed=1), mixes=True, sources=("draft", "cache"), **kwargs)


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("kwargs", [{"temperature": 0.7}, {"top_k": 3}])
def test_sampling_from_a_head_of_few_rows(noised_copy, mixes, kwargs):
    """q is 0 outside the rows, which differ from call to call and grow in mid-call."""
    few = {"draft_head": "traffic", "draft_vocab_size": 2, "suffix_cache": mixes}
    few |= {} if mixes else {"lookahead": "constant"}
    draft = noised_copy(one_layer(6), 0.5, seed=1)
    assistant = check_sampled_sources(draft, 6, mixes=mixes, sources=("draft",), config=few, **kwargs)
    assert 0 < assistant.stats.total.head_coverage < 1


@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0.7, "top_k": 5}])
def test_sampling_from_a_low_rank_head(noised_copy, monkeypatch, kwargs):
    """Rows differ from position to position; two of 20 here."""
    monkeypatch.setattr(draft_head, "_STATES", (8, 16))
    monkeypatch.setattr(draft_head, "_RANK", 4)
    low = {"draft_head": "low_rank", "draft_vocab_size": 16, "suffix_cache": False}
    low["lookahead"] = "constant"
    with rounds_seen() as seen:
        assistant = check_sampled_sources(
            noised_copy(one_layer(20), 0.5, seed=1), 20, sources=("draft",), config=low, **kwargs
        )
    assert assistant.head._projection is not None
    assert all(row.logits.shape[-1] == 2 for row in seen[-2][0].draft_logits)


def test_scores_of_cached_tokens_are_point_masses(draft, target):
    """Handed over with the draft's own before them; none at all where all of a block is cached."""
    assistant, seen, original = assistant_of(draft, **BOTH), Counter(), OnlineCandidateGenerator.get_candidates

    def get_candidates(self, input_ids, **kwargs):
        candidates, scores = original(self, input_ids, **kwargs)
        block = self._block
        seen[bool(block.draft_tokens), bool(block.cached)] += 1
        if not block.draft_tokens:
            assert scores is None
            return candidates, scores
        assert scores.shape == (1, block.n, 64)
        for token, row in zip(block.cached, scores[0, len(block.draft_tokens) :].softmax(-1), strict=True):
            assert row.tolist() == [float(i == token) for i in range(64)]
        assert candidates[0, input_ids.shape[1] + len(block.draft_tokens) :].tolist() == block.cached
        return candidates, scores

    OnlineCandidateGenerator.get_candidates = get_candidates
    torch.manual_seed(0)
    try:
        with mixed(assistant):
            for temperature in (1.0, 0.3, 0.3):
                target.generate(
                    PROMPTS[0],
                    assistant_model=assistant,
                    pad_token_id=0,
                    max_new_tokens=40,
                    do_sample=True,
                    temperature=temperature,
                )
    finally:
        OnlineCandidateGenerator.get_candidates = original
    assert seen.keys() >= {(True, True), (False, True)}
