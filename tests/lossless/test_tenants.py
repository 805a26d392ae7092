"""Tenants of one assistant: none is proposed another's text, and all share the draft, its learner and the statistics, threads or not."""

from collections import Counter
from functools import partial

import pytest
import torch

from hf_osd import RoutedAssistant

from ..served import in_threads
from .checks import assistant_of
from .models import InMidCall, one_layer
from .reference import exact_distribution, p_value
from .sources import BOTH, FEW, GREEDY, PROMPTS, alone, answer_to, check_tenants, proposals_seen


def test_no_text_of_one_tenant_is_proposed_to_another(target):
    check_tenants(target)


def test_a_closed_assistant_has_forgotten_all_text(target, draft):
    """In mid-call, too: that call's text is not kept either."""
    assistant = assistant_of(draft, **BOTH)
    views = (assistant, assistant.tenant("a"))
    for view in views:
        answer_to(target, view, PROMPTS[0])
    assistant.collect()
    assert assistant.stats.suffix_cache_bytes > 0
    answer_to(target, assistant, PROMPTS[0], streamer=None)
    closing = InMidCall(assistant.close, rounds=1)
    output = target.generate(PROMPTS[1], assistant_model=views[1], streamer=closing, **GREEDY)
    assert closing.results
    assert torch.equal(output, target.generate(PROMPTS[1], **GREEDY))
    assistant.collect()
    before = assistant.stats.total.accepted_by["draft"]
    for view in views:
        for prompt in PROMPTS[:2]:
            with proposals_seen() as seen:
                answer_to(target, view, prompt)
            assistant.collect()
            assert not seen
            assert assistant.stats.last.drafted_by["cache"] == 0
    assert assistant.stats.total.accepted_by["draft"] > before
    assert assistant.stats.suffix_cache_bytes == 0


def test_tenants_share_draft_learner_and_statistics(target, draft, tokenizer):
    from transformers import pipeline

    assistant = assistant_of(draft, **BOTH, update_interval=2, learning_rate=5e-3, seed=0)
    views = [assistant.tenant(name) for name in "ab"]
    for view in views:
        for name in ("config", "generation_config", "device", "dtype", "osd_config", "serving", "stats"):
            assert getattr(view, name) == getattr(assistant, name)
    for prompt in PROMPTS:
        for view in views:
            answer_to(target, view, prompt)
    assert (assistant.stats.updates, assistant.stats.failed_updates) == (3, 0)
    assert assistant.stats.draft_version == 3
    kwargs = {"return_tensors": True, "max_new_tokens": 24, "do_sample": False}
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)
    assisted = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=views[0])
    text = tokenizer.decode(PROMPTS[0, 0])
    assert plain(text, **kwargs) == assisted(text, **kwargs)
    assistant.collect()
    assert assistant.stats.total.requests == 9
    assert assistant.stats.last.accepted_by["cache"] > 0


@pytest.mark.parametrize("with_draft", [False, True])
def test_tenants_in_several_threads(target, draft, with_draft):
    """One assistant, two tenants and a call without one, at the same time, while the draft learns."""
    assistant = alone()
    if with_draft:
        assistant = assistant_of(draft, **BOTH, **FEW, update_interval=4, learning_rate=5e-3, seed=0)
    plain = [target.generate(prompt, **GREEDY) for prompt in PROMPTS]

    def work(view, shift):
        for i in range(2 * len(PROMPTS)):
            at = (i + shift) % len(PROMPTS)
            assert torch.equal(target.generate(PROMPTS[at], assistant_model=view, **GREEDY), plain[at])

    views = [assistant, assistant.tenant("a"), assistant.tenant("b"), assistant.tenant("a")]
    assert in_threads(*(partial(work, view, shift) for shift, view in enumerate(views))) == []
    assistant.flush()
    total = assistant.stats.total
    assert (total.requests, total.new_tokens) == (8 * len(PROMPTS), 8 * len(PROMPTS) * 24)
    assert total.accepted_by["cache"] > 0
    assert assistant.stats.failed_updates == 0
    assert (assistant.stats.updates > 2) == with_draft


def test_samples_of_routes_have_the_targets_distribution(noised_copy):
    """Two drafts in turn, each of which learns its own calls: answers come as often as the target alone would give them."""
    target, prompt, asked = one_layer(5), torch.tensor([[1, 2, 3]]), {"do_sample": True, "top_k": 0}
    exact = exact_distribution(target, prompt, 3, (), **asked)
    settings = {"lookahead": "constant", "num_assistant_tokens": 3, "update_interval": 8, "learning_rate": 1e-2}
    settings |= {"gate": False, "learning_budget": 1.0, "seed": 0}
    assistant = RoutedAssistant(noised_copy(target, 1.0, seed=1), routes="named", **settings)
    counts = Counter()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for i in range(320):
            view = assistant.route("ab"[i % 2])
            output = target.generate(
                prompt, max_new_tokens=3, assistant_model=view, pad_token_id=0, eos_token_id=None, **asked
            )
            counts[tuple(output[0, 3:].tolist())] += 1
    assert counts.keys() <= exact.keys()
    assert p_value(counts, exact) > 1e-4
    stats = assistant.stats
    assert 0 < stats.total.accepted < stats.total.tested
    assert all(stats.by_route[name].updates > 10 for name in "ab")
