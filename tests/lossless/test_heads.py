"""Draft heads of some rows: greedy output is the target's own, and what is recorded is what the draft says among those rows."""

import copy
from itertools import pairwise

import pytest
import torch

from hf_osd.models import draft_head

from .checks import assistant_of
from .sources import (
    BOTH,
    FEW,
    GREEDY,
    PROMPTS,
    answer_to,
    check_account,
    check_few_rows,
    last_call,
    mixed,
    rounds_seen,
)
from .test_vocabularies import WORDS, renamed, tokenizer_of


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3"])
@pytest.mark.parametrize("scale", [0.0, 0.1])
def test_a_head_of_few_rows_drafts_what_the_draft_says_among_them(tiny_model, noised_copy, name, scale):
    """Rows of other tokens, rows or tokens off by one, and the whole draft's overlap, would show; so would rows that never come."""
    target = tiny_model(name)
    draft = noised_copy(target, scale)
    assistant, grown, lacked = assistant_of(draft, **FEW), 0, 0
    for prompt in PROMPTS:
        stats, heads, drafted = check_few_rows(target, draft, assistant, prompt)
        assert all(one <= other for one, other in pairwise(heads))
        grown += len(set(drafted) & (heads[-1] - heads[0]))
        lacked += stats.head_lacked
    assert grown  # what the target said first, the draft said later in the call
    assert lacked
    assert assistant.stats.total.accepted > 0


def test_no_rows_are_stale_while_the_head_learns(target, draft):
    assistant = assistant_of(
        draft, **FEW, freeze_embeddings=False, learning_rate=5e-3, warmup_steps=0, replay_ratio=0.0, seed=0
    )
    heads = []
    for prompt in PROMPTS:
        active = copy.deepcopy(assistant.serving.active)
        heads.append(active.get_output_embeddings().weight)
        check_few_rows(target, active, assistant, prompt)
        assert assistant.flush()
    assert not any(torch.equal(one, other) for one, other in pairwise(heads))


def test_a_low_rank_head_of_full_rank_drafts_as_the_whole_one(target, draft, monkeypatch):
    """Of all rank there is, the rows it chooses are the likeliest."""
    monkeypatch.setattr(draft_head, "_STATES", (8, 16))
    monkeypatch.setattr(draft_head, "_RANK", 32)
    low = assistant_of(draft, draft_head="low_rank", draft_vocab_size=56)
    whole = assistant_of(draft)
    for i, prompt in enumerate(PROMPTS):
        with rounds_seen() as seen:
            answer_to(target, low, prompt)
        answer_to(target, whole, prompt)
        if i < 2:
            continue
        assert any(block.draft_logits and block.draft_logits[0].logits.shape[-1] == 7 for block, _ in seen)
        stats, ours = last_call(low)
        own = last_call(whole)[1]
        assert ours.drafted.tolist() == own.drafted.tolist()
        assert ours.outcome.tolist() == own.outcome.tolist()
        assert torch.equal(ours.overlap.nan_to_num(9), own.overlap.nan_to_num(9))
        assert (stats.head_coverage, stats.head_missed) == (1.0, 0)


def test_a_head_of_few_rows_and_the_cache_together(target, draft):
    assistant = assistant_of(draft, **BOTH, **FEW)
    for prompt in [*PROMPTS, *PROMPTS[:2]]:
        with mixed(assistant), rounds_seen() as seen:
            output = answer_to(target, assistant, prompt)
        check_account(*last_call(assistant), [block for block, _ in seen], output[0, 6:].tolist())
    total = assistant.stats.total
    assert min(total.accepted_by.values()) > 0
    assert 0 < total.head_coverage < 1
    assert total.head_tokens <= total.new_tokens
    assert total.head_missed <= total.head_lacked


@pytest.mark.parametrize("kwargs", [{}, {"repetition_penalty": 1.2}])
def test_a_head_of_few_rows_in_an_encoder_decoder(tiny_model, noised_copy, serve_as_plain, kwargs):
    target = tiny_model("T5")
    served = serve_as_plain(
        target, noised_copy(target, 0.05), [*PROMPTS, *PROMPTS[:2]], {**FEW, "suffix_cache": False}, **kwargs
    )
    assert 0 < served.stats.total.accepted < served.stats.total.tested
    assert 0 < served.stats.total.head_coverage < 1


@pytest.mark.parametrize("kind", ["fewer rows", "another tokenizer"])
@pytest.mark.parametrize("head", ["traffic", "low_rank"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_head_of_few_rows_with_another_vocabulary(tiny_llama, noised_copy, monkeypatch, kind, head, do_sample):
    """The head has rows of the draft's tokens, not of the target's: an id of one is another word of the other, or none."""
    monkeypatch.setattr(draft_head, "_STATES", (8, 16))
    target = tiny_llama(vocab=72 if kind == "fewer rows" else 64, eos_token_id=None)
    order = torch.randperm(62, generator=torch.Generator().manual_seed(1)).add(2).tolist()
    kept = list(range(64)) if kind == "fewer rows" else [1, 0, *order[:50]]
    tokenizers = {
        "tokenizer": tokenizer_of(WORDS),
        "assistant_tokenizer": tokenizer_of(WORDS if kind == "fewer rows" else [WORDS[i] for i in kept]),
    }
    config = {"draft_head": head, "draft_vocab_size": 8 if head == "traffic" else 40, "update_interval": 2}
    assistant = assistant_of(noised_copy(renamed(target, kept), 0.05), **config, num_assistant_tokens=3)
    torch.manual_seed(0)
    for prompt in [*PROMPTS, *PROMPTS[:2]]:
        if do_sample:
            target.generate(
                prompt, assistant_model=assistant, pad_token_id=0, max_new_tokens=24, do_sample=True, **tokenizers
            )
        else:
            plain = target.generate(prompt, **GREEDY)
            assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **GREEDY, **tokenizers))
    stats = assistant.stats
    assert (stats.updates, stats.failed_updates) == (2, 0)
    assert 0 < stats.total.accepted < stats.total.tested
    assert stats.total.head_tokens == stats.total.new_tokens
    if (
        head == "traffic"
    ):  # once the tokens of an answer have rows, the same answer lacks none that both vocabularies have
        assert 0 < stats.total.head_coverage < 1
