"""What a call borrows goes back, however the call ends; and what it leaves behind goes where it may."""

import contextlib
import gc
import sys
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


class Interrupted:
    """Within the block, `KeyboardInterrupt` comes before the n-th line that is run of the files of some classes; `came` tells whether there was one."""

    def __init__(self, n, *classes):
        self.left, self.came = n, False
        self.files = {sys.modules[one.__module__].__file__ for one in classes}

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename not in self.files or self.came:
            return None
        if event == "line":
            self.left -= 1
            if self.left < 0:
                self.came = True
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)


def test_an_interrupt_anywhere_in_a_call_leaves_a_text_that_teaches(target, assistant):
    """Signals come between any two lines. What was verified by then is whole, and the assistant goes on."""
    texts, plain = set(), target.generate(PROMPT, **GREEDY)
    for n in range(0, 10**6, 11):  # no multiple of the lines of a round: in one round or another every line is met
        interrupt = Interrupted(n, OnlineCandidateGenerator, CallRecorder)
        with contextlib.suppress(KeyboardInterrupt), interrupt:
            generate(target, assistant)
        assistant.collect()
        for feedback in assistant.buffer.new():
            texts.add(tuple(feedback.tokens.tolist()))
            assert len(feedback.overlap) == len(feedback.outcome) == len(feedback.top_ids) == len(feedback.tokens) - 6
        assistant.buffer.mark_seen(assistant.buffer.new())
        if not interrupt.came:
            break
    assert n > 500
    assert len(texts) > 3, "interrupted in several rounds"
    assert all(text == tuple(plain[0, : len(text)].tolist()) for text in texts)
