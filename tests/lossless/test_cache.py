"""The suffix cache alone as a source of drafts: greedy output is the target's own, whatever ends it or processes its scores."""

import math

import pytest
import torch
from transformers import LogitsProcessorList

from hf_osd import OnlineAssistant

from . import checks
from .processors import Biased
from .sources import (
    GREEDY,
    NAMES,
    PROMPTS,
    Counting,
    alone,
    answer_to,
    check_account,
    check_ends,
    last_call,
    rounds_seen,
)


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_alone_drafts_what_was_said_before(tiny_model, serve_as_plain, name):
    """Also in the calls of an encoder-decoder, whose text is the decoder's."""
    target, assistant = tiny_model(name), alone()
    served = serve_as_plain(target, assistant, [*PROMPTS, *PROMPTS[:2]])
    total = served.stats.total
    assert 0 < total.accepted_by["cache"] < total.tested_by["cache"]
    assert (total.drafted_by["draft"], total.draft_steps, total.overlap_count) == (0, 0, 0)
    assert total.new_tokens == 6 * 24
    with rounds_seen() as seen:
        output = answer_to(target, assistant, PROMPTS[0])
    start = 1 if target.config.is_encoder_decoder else PROMPTS.shape[-1]
    check_account(last_call(assistant)[0], None, [block for block, _ in seen], output[0, start:].tolist())
    assert len(seen) < 12  # 24 tokens, said before


@pytest.mark.parametrize("policy", ["heuristic", "constant"])
def test_the_cache_alone_drafts_under_every_policy(target, serve_as_plain, policy):
    served = serve_as_plain(target, OnlineAssistant(lookahead=policy), [*PROMPTS, *PROMPTS[:2]])
    assert 0 < served.stats.total.accepted_by["cache"] < served.stats.total.tested_by["cache"]


@pytest.mark.parametrize("source", ["cache", "draft and cache"])
@pytest.mark.parametrize("kind", ["eos", "length", "a criterion", "stop string"])
def test_ends_inside_a_cached_block(target, draft, tokenizer, kind, source):
    """generate cuts a block at an EOS id and at the length; the others would be noticed at its end."""
    check_ends(target, None if source == "cache" else draft, kind, tokenizer)


def test_an_accepted_eos_at_the_end_of_a_cached_block_is_no_rejection(target):
    """num_matches undercounts there: the EOS is the cache's own, accepted."""
    assistant = alone()
    answer = answer_to(target, assistant, PROMPTS[0])[0, 6:].tolist()
    eos = answer[8]
    with rounds_seen() as seen:
        output = answer_to(target, assistant, PROMPTS[0], eos_token_id=eos)
    stats, _ = last_call(assistant)
    assert (output[0, -1], seen[-1][0].tokens[-1]) == (eos, eos)
    assert stats.accepted == stats.tested
    assert stats.new_tokens == stats.accepted + stats.rounds - 1


@pytest.mark.parametrize(
    ("kwargs", "kinds"),
    [
        ({"repetition_penalty": 1.3}, ()),
        ({}, (Biased,)),
        ({}, (Counting,)),
        ({"repetition_penalty": 0.8}, (Counting, Biased)),
    ],
)
def test_processors_of_the_cache_alone(target, kwargs, kinds):
    """With state too: it must see the verified positions, each once."""
    assistant = alone()
    for prompt in [*PROMPTS[:2], *PROMPTS[:2]]:
        outputs = []
        for extra in ({}, {"assistant_model": assistant}):
            made = LogitsProcessorList(kind() for kind in kinds)
            outputs.append(target.generate(prompt, logits_processor=made, **GREEDY, **kwargs, **extra))
            assert all(getattr(p, "calls", 24) == 24 for p in made)
        assert torch.equal(*outputs)
    assistant.collect()
    assert assistant.stats.total.accepted_by["cache"] > 30


def test_left_padding_is_nothing_to_the_cache(target):
    """Padded or not, a prompt's text is one."""
    assistant = alone()
    for i, padding in enumerate((0, 3, 5)):
        padded = torch.nn.functional.pad(PROMPTS[0], (padding, 0), value=3)
        mask = torch.nn.functional.pad(torch.ones_like(PROMPTS[0]), (padding, 0))
        with rounds_seen() as seen:
            answer_to(target, assistant, padded, attention_mask=mask)
        assistant.collect()
        assert len(assistant.texts.for_tenant(None)) == (i + 1) * (6 + 24)
        if padding:
            assert seen[0][0].cached
            assert assistant.stats.last.accepted_by["cache"] >= 20


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_scores_and_logits_of_cached_blocks_are_plain_decodings(tiny_model, name):
    target, assistant = tiny_model(name), alone()
    asked = {
        **GREEDY,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.1,
    }
    for prompt in [*PROMPTS[:2], PROMPTS[0]]:
        plain = target.generate(prompt, **asked)
        output = target.generate(prompt, assistant_model=assistant, **asked)
        assert torch.equal(plain.sequences, output.sequences)
        for ours, own in ((output.scores, plain.scores), (output.logits, plain.logits)):
            torch.testing.assert_close(torch.cat(ours), torch.cat(own), **checks.CLOSE)
    assistant.collect()
    assert assistant.stats.last.accepted_by["cache"] > 12


def test_without_a_draft_nothing_is_learnt_saved_or_scored(target, tmp_path):
    assistant = alone()
    answer_to(target, assistant, PROMPTS[0])
    assert not assistant.flush()
    assert not assistant.update()
    assert len(assistant.buffer) == assistant.stats.updates == 0
    assert math.isnan(assistant.stats.total.alpha)
    for act in (
        lambda: assistant.save_pretrained(tmp_path),
        lambda: assistant.score([]),
        lambda: assistant.refresh(target),
        lambda: assistant.generate(PROMPTS[0]),
    ):
        with pytest.raises(ValueError, match=r"OnlineAssistant\(draft\)"):
            act()
    with pytest.raises(ValueError, match="suffix_cache"):
        OnlineAssistant(suffix_cache=False)
