"""What a call borrows goes back, however the call ends; and what it leaves behind goes where it may."""

import gc
import weakref

import pytest
import torch

from hf_osd import OnlineAssistant, OnlineCandidateGenerator
from hf_osd.generation.call import Call
from hf_osd.generation.recorder import CallRecorder

PROMPT = torch.tensor([[5, 9, 17, 3, 40, 22]])
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def assistant(draft):
    return OnlineAssistant(draft, lookahead="constant", num_assistant_tokens=3, update_interval=10**6)


@pytest.fixture
def opened(monkeypatch):
    """The calls that were opened."""
    calls, begin = [], Call._begin

    def beginning(self, *args):
        calls.append(self)
        return begin(self, *args)

    monkeypatch.setattr(Call, "_begin", beginning)
    return calls


def borrowed(target, assistant) -> tuple[int, int]:
    return len(assistant.serving._leases), len(target.base_model._forward_hooks)


def generate(target, assistant, **kwargs):
    return target.generate(PROMPT, assistant_model=assistant, **GREEDY, **kwargs)


def fails(*args, **kwargs):
    raise RuntimeError("out of memory")


def test_a_call_holds_its_draft_and_listens_until_it_is_finished(target, assistant, opened, monkeypatch):
    during, get_candidates = [], OnlineCandidateGenerator.get_candidates

    def looking(self, input_ids, **kwargs):
        during.append(borrowed(target, assistant))
        return get_candidates(self, input_ids, **kwargs)

    monkeypatch.setattr(OnlineCandidateGenerator, "get_candidates", looking)
    generate(target, assistant)
    assert during[0] == (1, 1)
    assert opened[0].model is not None
    assistant.collect()
    assert borrowed(target, assistant) == (0, 0)
    assert opened[0].model is None


@pytest.mark.parametrize(
    ("owner", "name"),
    [(OnlineCandidateGenerator, "__init__"), (CallRecorder, "__init__")],
    ids=["generator", "record"],
)
def test_a_call_that_cannot_open_gives_back_what_it_borrowed(target, assistant, monkeypatch, owner, name):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(target, assistant)
    assert borrowed(target, assistant) == (0, 0)
    generate(target, assistant)
    assert assistant.stats.total.requests == 1


def test_so_does_one_whose_record_cannot_be_made_feedback(target, assistant, monkeypatch):
    generate(target, assistant)
    with monkeypatch.context() as patch:
        patch.setattr(CallRecorder, "to_feedback", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            assistant.collect()
    assert borrowed(target, assistant) == (0, 0)


def test_it_does_not_keep_its_generator_whose_end_is_its_own(target, assistant, monkeypatch):
    generators, begin = [], Call._begin

    def beginning(self, *args):
        generators.append(weakref.ref(generator := begin(self, *args)))
        return generator

    monkeypatch.setattr(Call, "_begin", beginning)
    generate(target, assistant)
    gc.collect()
    assert [generator() for generator in generators] == [None]
    assert len(assistant._calls.pop_finished()) == 1


@pytest.mark.parametrize("keep", [True, False])
def test_its_text_goes_into_the_cache_while_there_is_one(target, assistant, opened, keep):
    output = generate(target, assistant)
    [call] = assistant._calls.pop_finished()
    assert call is opened[0]
    before = assistant.texts.nbytes
    assert torch.equal(call.finish(keep_text=keep).tokens.long(), output[0])
    assert (assistant.texts.nbytes > before) == keep
