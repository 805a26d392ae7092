"""`assistant.private()`: a call that leaves nothing behind but its counts; and what an assistant keeps of the others, where."""

import gc
import logging
import weakref

import pytest
import torch

from hf_osd import OnlineAssistant, grow_draft

PROMPTS = torch.randint(2, 64, (8, 1, 6), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def assistant(target):
    """It keeps all that there is to keep: feedback, requests to judge by, cached text, and which tokens traffic uses."""
    config = {"lookahead": "constant", "num_assistant_tokens": 3, "draft_head": "traffic", "draft_vocab_size": 32}
    config |= {"gate": True, "learning_rate": 1e-3, "update_interval": 10**6, "seed": 0}
    return OnlineAssistant(grow_draft(target, (0, -1)), **config)


def kept(assistant) -> dict[str, int]:
    assistant.collect()
    remembered, texts = assistant.learner.contenders.remembered, assistant.texts
    return {"buffer": len(assistant.buffer), "remembered": len(remembered), "text": texts.nbytes}


@pytest.fixture
def observed(assistant, monkeypatch):
    """The calls whose tokens the draft's head was told."""
    observe, seen = assistant.head.observe, []
    monkeypatch.setattr(assistant.head, "observe", lambda *args: (seen.append(args), observe(*args)))
    return seen


@pytest.mark.parametrize("view", [lambda a: a.private(), lambda a: a.tenant("a").private()], ids=["own", "a tenant's"])
def test_a_private_call_leaves_nothing_behind_but_its_counts(target, assistant, observed, view):
    empty = kept(assistant)
    for p in PROMPTS[:4]:
        output = target.generate(p, assistant_model=view(assistant), **GREEDY)
        assert torch.equal(output, target.generate(p, **GREEDY))
    assert kept(assistant) == empty
    assert empty["buffer"] == 0
    assert not observed
    assistant.flush()
    assert kept(assistant) == empty
    assert assistant.stats.updates == 0, "there is nothing to learn from"
    assert assistant.stats.estimate is None, "nor to judge by"
    total = assistant.stats.total
    assert total.requests == 4
    assert total.new_tokens > 0
    assert total.drafted_by["draft"] > 0, "it drafts like any other call"


def test_what_a_private_call_does_not_leave_another_one_would(target, assistant, observed):
    for p in PROMPTS[:4]:
        target.generate(p, assistant_model=assistant, **GREEDY)
    assistant.flush()
    left = kept(assistant)
    assert left["buffer"] == left["remembered"] == 4
    assert left["text"] > 0
    assert len(observed) == 4
    assert (assistant.stats.updates, assistant.stats.estimate.requests) == (1, 4)


def test_calls_before_and_after_a_private_one_are_learnt_from(target, assistant):
    target.generate(PROMPTS[0], assistant_model=assistant, **GREEDY)
    target.generate(PROMPTS[1], assistant_model=assistant.private(), **GREEDY)
    target.generate(PROMPTS[2], assistant_model=assistant, **GREEDY)
    assert kept(assistant)["buffer"] == 2
    assert [f.tokens[:6].tolist() for f in assistant.buffer.new()] == [PROMPTS[i][0].tolist() for i in (0, 2)]


def test_the_text_of_a_private_call_is_never_drafted_later(target):
    """A second time, the same answer would be the cache's to draft."""
    alone = OnlineAssistant(draft_cost=0.2)  # else whether drafting pays is a matter of clocks
    for view in (alone.private(), alone):
        target.generate(PROMPTS[0], assistant_model=view, **GREEDY)
    first = alone.stats.last
    target.generate(PROMPTS[0], assistant_model=alone, **GREEDY)
    assert alone.stats.last.accepted_by["cache"] > first.accepted_by["cache"]


def test_no_token_is_logged(target, assistant, caplog):
    with caplog.at_level(logging.DEBUG):
        for p in PROMPTS[:4]:
            target.generate(p, assistant_model=assistant, **GREEDY)
        assistant.flush()
        assistant.report()
    for p in PROMPTS[:4]:
        assert ", ".join(map(str, p[0].tolist())) not in caplog.text


def test_a_closed_assistant_keeps_nothing(target, assistant):
    for p in PROMPTS[:4]:
        target.generate(p, assistant_model=assistant, **GREEDY)
    assistant.flush()
    learner = assistant.learner
    assert len(learner.contenders.remembered) == 4
    gone = [weakref.ref(feedback) for feedback in assistant.buffer.requests()]
    assistant.close()
    assert len(assistant.buffer) == len(learner.contenders.remembered) == 0
    del learner
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4
    assert assistant.texts is None
    assert not any(assistant.seen_texts.shared_prefix(p[0]) for p in PROMPTS[:4])
