"""Whether a draft learns with all weights, in an adapter, or not at all is decided by the memory there is."""

import logging

import pytest
import torch

from hf_osd import OnlineAssistant, OnlineConfig, grow_draft
from hf_osd.learning import memory
from hf_osd.models.copies import embedding_names
from hf_osd.models.lora import adaptable

from ...served import GREEDY, PROMPTS, serve
from .adapters import LORA, learning, same, snapshot


def warnings_of(caplog):
    return [
        record
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name == "hf_osd.remote.teachable"
    ]


def test_the_rank_comes_down_to_what_fits(target, draft):
    asked = learning(draft, lora=8)
    assert asked.adapter.rank == 8
    small = learning(draft, lora=8, memory_budget=memory.learning_bytes(_facts(draft), 2))
    assert small.adapter.rank == 2
    assert "rank 2" in small.learning_choice
    assert "rank 8" in small.learning_choice
    serve(target, small, PROMPTS[:3])
    assert small.stats.updates == 1


def _facts(draft):
    trainable = {name for name, p in draft.named_parameters() if p.requires_grad} - embedding_names(draft)
    return memory.LearningFacts.of(draft, trainable, adaptable(draft, trainable), OnlineConfig(**LORA))


@pytest.mark.parametrize("adapter", ["auto", "lora", "off"])
def test_what_does_not_fit_is_off_with_one_line_and_the_draft_serves_whole(target, draft, adapter, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        assistant = learning(draft, adapter=adapter, memory_budget=1000)
    [line] = warnings_of(caplog)
    assert line.getMessage() == assistant.learning_choice
    assert "Raise memory_budget" in assistant.learning_choice
    assert assistant.learner is None
    assert same(assistant.serving.active, snapshot(draft))
    for a, p in zip(serve(target, assistant, PROMPTS[:4]), PROMPTS, strict=False):
        assert torch.equal(a, target.generate(p, **GREEDY))
    assert not assistant.flush()
    assert assistant.stats.total.tested > 0


def test_a_small_draft_learns_with_all_weights_by_itself(draft):
    assistant = OnlineAssistant(draft)
    assert assistant.adapter is None
    assert "All weights learn" in assistant.learning_choice
    assert "lora" not in str(assistant.serving.trainable)


def test_a_draft_too_large_for_what_is_free_learns_in_an_adapter_by_itself(target, draft, monkeypatch):
    needed = memory.learning_bytes(_facts(draft))
    monkeypatch.setattr("hf_osd.learning.memory.available", lambda device: 4 * needed)
    assistant = OnlineAssistant(draft, seed=0)
    assert assistant.adapter.rank == 16
    assert all("lora_" in name for name in assistant.serving.trainable)


def test_learning_off_is_no_choice(draft):
    assert OnlineAssistant(draft, learn=False).learning_choice == "Nothing learns, as asked."
    assert OnlineAssistant().learning_choice == "Nothing learns: there is no draft."


def test_an_adapter_of_the_drafts_own_stays_what_learns(target):
    from peft import LoraConfig, get_peft_model

    own = get_peft_model(grow_draft(target), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assistant = learning(own)
    assert assistant.adapter is None
    assert "came with" in assistant.learning_choice
    assert all(name.startswith("base_model.") for name in assistant.serving.trainable)
