"""A tenant's view of an assistant: it stands for it wherever transformers looks, and can be copied."""

import copy

import pytest
import torch

import hf_osd
from hf_osd import OnlineAssistant

PROMPT = torch.tensor([[5, 9, 17, 3, 40, 22]])
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def pair(tiny_llama, noised_copy):
    target = tiny_llama(layers=3)
    return target, OnlineAssistant(noised_copy(target, 0.2))


def test_what_transformers_reads_of_an_assistant_the_view_has(pair):
    target, assistant = pair
    view = assistant.tenant("acme")
    for name in ("config", "generation_config", "device", "dtype"):
        assert getattr(view, name) == getattr(assistant, name)
    assert view._supports_logits_to_keep() == assistant._supports_logits_to_keep()


def test_once_the_seam_is_closed_it_drafts_through_stock_like_the_assistant(pair):
    target, assistant = pair
    plain = target.generate(PROMPT, **GREEDY)
    hf_osd.disable()
    try:
        assert torch.equal(plain, target.generate(PROMPT, assistant_model=assistant.tenant("acme"), **GREEDY))
    finally:
        hf_osd.enable()


def test_a_copy_of_a_view_is_a_view_of_the_same_assistant(pair):
    _, assistant = pair
    assert copy.copy(assistant.tenant("acme")).buffer is assistant.buffer
