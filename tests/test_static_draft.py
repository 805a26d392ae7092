"""A static draft of another architecture beside the one that learns: who serves, who learns from it, and that nobody's output changes."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_osd import OnlineAssistant, grow_draft, grow_feature_draft
from hf_osd.policy.draft_choice import LEARNING, STATIC, DraftChoice

LEARNS = {"update_interval": 2, "learning_rate": 5e-3, "gate": False, "learning_budget": 1.0, "lookahead": "constant"}


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=4)


@pytest.fixture
def heavy():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=128, n_embd=16, n_layer=1, n_head=2, eos_token_id=None)
    )


def prompts(count):
    random = torch.Generator().manual_seed(0)
    return [torch.randint(2, 64, (1, 8), generator=random) for _ in range(count)]


def served(assistant, target, count, **kwargs):
    """The drafts that served calls, each compared with plain decoding."""
    names = []
    for prompt in prompts(count):
        before = assistant._choice.calls
        output = target.generate(prompt, assistant_model=assistant, max_new_tokens=12, do_sample=False, **kwargs)
        assert torch.equal(output, target.generate(prompt, max_new_tokens=12, do_sample=False))
        names += [name for name, calls in assistant._choice.calls.items() if calls > before[name]]
    return names


@pytest.mark.parametrize("kind", ["grown", "feature"])
@pytest.mark.parametrize("learn", ["inline", "background"])
def test_both_serve_and_output_is_the_targets(target, heavy, kind, learn):
    draft = grow_feature_draft(target, seed=0) if kind == "feature" else grow_draft(target)
    kept = {name: p.clone() for name, p in heavy.named_parameters()}
    assistant = OnlineAssistant(draft, static_draft=heavy, **LEARNS, learn=learn, seed=0)
    assert set(served(assistant, target, 8)) == {STATIC, LEARNING}
    assistant.flush()
    stats = assistant.stats
    assert (stats.total.requests, stats.failed_updates) == (8, 0)
    assert stats.updates
    taught = assistant.buffer.requests()
    assert len(taught) == (8 if kind == "grown" else assistant._choice.calls[LEARNING]), (
        "states come with its own calls alone"
    )
    assert all(torch.equal(p, kept[name]) for name, p in assistant._static.serving.active.named_parameters())
    assert "Of two drafts" in assistant.report()
    assistant.close()
    assert served(assistant, target, 1)


def test_the_faster_one_serves_and_the_other_is_tried_now_and_then(target, heavy):
    assistant = OnlineAssistant(grow_draft(target), static_draft=heavy, **LEARNS, seed=0)
    for name, seconds in ((STATIC, 1.0), (LEARNING, 4.0)) * 3:
        assistant._choice.choose()
        assistant._choice.observe(name, 100, seconds)
    assert served(assistant, target, 3) == [STATIC] * 3


def test_a_private_call_teaches_nobody(target, heavy):
    assistant = OnlineAssistant(grow_draft(target), static_draft=heavy, **LEARNS, seed=0)
    for prompt in prompts(4):
        target.generate(prompt, assistant_model=assistant.private(), max_new_tokens=4, do_sample=False)
    assert not assistant.flush()
    assert not assistant.stats.buffer_requests


def test_statistics_go_on_after_a_restart(target, heavy, tmp_path):
    assistant = OnlineAssistant(grow_draft(target), static_draft=heavy, **LEARNS, seed=0)
    served(assistant, target, 4)
    assistant.save_state(tmp_path)
    again = OnlineAssistant(grow_draft(target), static_draft=heavy, **LEARNS, seed=0)
    again.load_state(tmp_path)
    served(again, target, 4)
    assert again.stats.total.requests == 8


@pytest.mark.parametrize(("draft", "learn", "says"), [(False, "inline", "no draft"), (True, "process", "process")])
def test_what_it_cannot_stand_beside(target, heavy, draft, learn, says):
    with pytest.raises(ValueError, match=says):
        OnlineAssistant(grow_draft(target) if draft else None, static_draft=heavy, learn=learn)


@pytest.mark.parametrize("faster", [STATIC, LEARNING])
def test_trials_of_the_slower_draft_cost_a_bounded_share(faster):
    choice, spent, calls = DraftChoice(), 0.0, []
    for _ in range(2000):
        name = choice.choose()
        calls.append(name)
        seconds = 1.0 if name == faster else 3.0
        choice.observe(name, 50, seconds)
        spent += seconds
    slow = len([name for name in calls if name != faster])
    assert slow > 2
    assert 2 * slow / spent < 0.015
    for _ in range(400):  # the other becomes the faster one
        name = choice.choose()
        choice.observe(name, 50, 3.0 if name == faster else 1.0)
    assert choice.choose() != faster
