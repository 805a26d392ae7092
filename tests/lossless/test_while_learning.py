"""Greedy output stays the target's own while weights are learnt, swapped, or fail to be, between calls and under a running one; a running
call goes on with the weights it began with, bit for bit; and none of it costs the target a forward.
"""

import copy
import threading

import pytest
import torch

from hf_osd import OnlineGKDTrainer

from .checks import assistant_of, check_greedy, check_lease, forwards_of, serve
from .models import InMidCall, retrained

PROMPTS = torch.randint(2, 64, (6, 1, 6), generator=torch.Generator().manual_seed(5))
GREEDY = {"max_new_tokens": 16, "do_sample": False}
CONFIG = {"num_assistant_tokens": 3, "learning_rate": 5e-3, "warmup_steps": 0, "replay_ratio": 0.0, "seed": 0}


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(eos_token_id=None)


@pytest.fixture(scope="module")
def draft(target):
    return retrained(target, 0.2, seed=0)


@pytest.fixture(scope="module")
def plain(target):
    return [target.generate(prompt, pad_token_id=0, **GREEDY) for prompt in PROMPTS]


@pytest.fixture
def assistant(target, draft):
    """One that has something to learn."""
    assistant = assistant_of(draft, **CONFIG)
    serve(target, assistant, PROMPTS[-1], **GREEDY)
    return assistant


def raising(self, *args, **kwargs):
    raise RuntimeError("out of memory")


def diverging(self, *args, **kwargs):
    return compute_loss(self, *args, **kwargs) * torch.nan


compute_loss = OnlineGKDTrainer.compute_loss


def weights_of(assistant):
    return {name: p.clone() for name, p in assistant.serving.weights()}


def same(one, other):
    return all(torch.equal(p, other[name]) for name, p in one.items())


def forwards_in(assistant) -> int:
    """The target's forwards that its statistics tell of: those of rounds, and those that found out whether it can verify."""
    total = assistant.stats.total
    return total.rounds + total.verification_forwards


class Event:
    """What happens to an assistant's draft: `event(assistant)` does it, and makes sure that it did."""

    def __init__(self, name, draft, monkeypatch):
        self.name, self.count = name, 0
        self._draft, self._requests = draft, []
        if name in ("raising", "diverging"):
            monkeypatch.setattr(OnlineGKDTrainer, "compute_loss", globals()[name])

    def __call__(self, assistant):
        self.count += 1
        version, failed, before = assistant.stats.draft_version, assistant.stats.failed_updates, weights_of(assistant)
        if self.name == "swap":
            assistant.refresh(retrained(self._draft, 0.3, seed=self.count))
        else:
            assistant.learner.schedule._rest = 0  # as after turns that learning rested for
            # Learnt from already, and new again; an update that fails forgets its requests.
            self._requests = self._requests or assistant.buffer.sample(1, torch.Generator())
            for feedback in self._requests:
                assistant.buffer.add(copy.copy(feedback))
            assert assistant.flush() == (self.name == "update")
        rolled_back = self.name in ("raising", "diverging")
        assert assistant.stats.failed_updates == failed + rolled_back
        assert assistant.stats.draft_version == version + (not rolled_back)
        assert same(weights_of(assistant), before) == rolled_back


@pytest.fixture(params=["update", "swap", "raising", "diverging"])
def event(request, draft, monkeypatch):
    return Event(request.param, draft, monkeypatch)


def test_between_calls(target, assistant, plain, event):
    before = forwards_in(assistant)
    with forwards_of(target) as forwards:
        for prompt, own in zip(PROMPTS[:4], plain, strict=False):
            event(assistant)
            output = target.generate(prompt, assistant_model=assistant, pad_token_id=0, **GREEDY)
            assert torch.equal(output, own)
    assert event.count == 4
    assistant.update()
    assert len(forwards) == forwards_in(assistant) - before


def test_in_mid_call_from_another_thread(target, draft, assistant, event):
    """Also the q recorded until the end of the call is the one of the weights it began with."""
    streamer = InMidCall(lambda: event(assistant), rounds=3)
    check_lease(target, draft, assistant, PROMPTS[0], 24, streamer)
    assert event.count == 3
    before = forwards_in(assistant)
    with forwards_of(target) as forwards:  # and the calls after it
        serve(target, assistant, PROMPTS[1], **GREEDY)
    assert len(forwards) == forwards_in(assistant) - before


def test_many_swaps_in_one_call(target, draft, assistant):
    """Both copies are written over and over: the leased one must be left out of it, also when it is no longer the active one."""
    swaps = []

    def swap():
        for _ in range(3):
            assistant.refresh(retrained(draft, 0.3, seed=len(swaps)))
            swaps.append(assistant.stats.draft_version)

    served = check_lease(target, draft, assistant, PROMPTS[0], 24, InMidCall(swap))
    assert swaps == list(range(1, 3 * served.stats.rounds + 1))
    # Then the last ones serve.
    check_greedy(target, retrained(draft, 0.3, seed=len(swaps) - 1), PROMPTS[1], 16, assistant=assistant)


def test_two_calls_around_a_swap_use_the_old_weights_and_the_new(target, draft, assistant):
    new = retrained(draft, 0.5, seed=9)
    one = check_greedy(target, draft, PROMPTS[0], 24, assistant=assistant)
    assistant.refresh(new)
    two = check_greedy(target, new, PROMPTS[0], 24, assistant=assistant)
    assert torch.equal(one.output, two.output)
    assert one.feedback.drafted.tolist() != two.feedback.drafted.tolist()


def test_a_call_after_an_update_drafts_with_what_was_learnt(target, draft, assistant):
    assert assistant.flush()
    learnt = copy.deepcopy(assistant.serving.active)
    assert not same(dict(assistant.serving.weights()), dict(draft.named_parameters()))
    check_greedy(target, learnt, PROMPTS[0], 24, assistant=assistant)


def test_while_rates_are_tried_and_candidates_judged(target, draft, plain):
    """As it comes: the rate is found, and what was learnt serves once later requests have said so."""
    assistant = assistant_of(draft, gate=True, learning_rate="auto", update_interval=3, replay_ratio=6.0, seed=0)
    versions = set()
    for _ in range(12):
        for prompt, own in zip(PROMPTS, plain, strict=True):
            output = target.generate(prompt, assistant_model=assistant, pad_token_id=0, **GREEDY)
            assert torch.equal(output, own)
            versions.add(assistant.stats.draft_version)
    stats = assistant.stats
    assert stats.accepted_updates > 0
    assert stats.failed_updates == 0
    assert len(versions) > 1
    active = copy.deepcopy(assistant.serving.active)
    assert not same(weights_of(assistant), weights_of(assistant_of(draft)))
    check_greedy(target, active, PROMPTS[0], 24, assistant=assistant)


def test_a_call_after_a_rollback_drafts_as_before(target, draft, assistant, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(OnlineGKDTrainer, "compute_loss", diverging)
        assert not assistant.flush()
    check_greedy(target, draft, PROMPTS[0], 24, assistant=assistant)
    assert not assistant.flush()  # of that call: learning rests a turn
    check_greedy(target, draft, PROMPTS[1], 24, assistant=assistant)
    assert assistant.flush()  # of that one: it goes on, from weights that are finite
    check_greedy(target, copy.deepcopy(assistant.serving.active), PROMPTS[0], 24, assistant=assistant)


def test_a_call_within_a_call(target, assistant, plain):
    """A streamer may generate, and flush, in the caller's own thread."""
    inner = []

    class Nested(InMidCall):
        def put(self, value):
            if len(inner) < 2:
                inner.append(target.generate(PROMPTS[1], assistant_model=assistant, pad_token_id=0, **GREEDY))
                assistant.flush()

    output = target.generate(PROMPTS[0], assistant_model=assistant, pad_token_id=0, streamer=Nested(None), **GREEDY)
    assert torch.equal(output, plain[0])
    assert all(torch.equal(answer, plain[1]) for answer in inner)


def test_while_several_threads_generate(target, draft, plain):
    """Each thread's calls start updates of their own, and this thread swaps weights all the while."""
    assistant = assistant_of(draft, **{**CONFIG, "update_interval": 4})
    wrong, errors = [], []

    def work(shift):
        try:
            for i in range(2 * len(PROMPTS)):
                at = (i + shift) % len(PROMPTS)
                output = target.generate(PROMPTS[at], assistant_model=assistant, pad_token_id=0, **GREEDY)
                if not torch.equal(output, plain[at]):
                    wrong.append((output, plain[at]))
        except BaseException as error:  # the threads' own: raised below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(shift,)) for shift in range(3)]
    swaps = 0
    with forwards_of(target) as forwards:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and swaps < 60:
            assistant.refresh(retrained(draft, 0.3, seed=swaps))
            swaps += 1
        for thread in threads:
            thread.join()
    assert not errors, errors[0]
    assert not wrong, wrong[0]
    assistant.flush()
    stats = assistant.stats
    assert swaps
    assert stats.updates > 2
    assert stats.failed_updates == 0
    assert stats.draft_version == swaps + stats.updates
    # A thread that has ended leaves its last call to whoever comes next: nothing is lost.
    assert (stats.total.requests, forwards_in(assistant)) == (6 * len(PROMPTS), len(forwards))
