"""Output stays the target's own while a thread learns beside the calls, and swaps what it has learnt in at any moment."""

import threading
from functools import partial

import pytest
import torch

from hf_osd.learning import throttle

from ..served import in_threads
from .checks import assistant_of, check_sampling, unpadded
from .models import one_layer

LEARNING = {
    "learn": "background",
    "update_interval": 2,
    "learning_budget": 1.0,
    "learning_rate": 5e-3,
    "replay_ratio": 0.0,
}
LEARNING |= {"warmup_steps": 0, "ema_decay": 0.0, "gate": False, "seed": 0}
PROMPTS = torch.randint(2, 64, (6, 1, 6), generator=torch.Generator().manual_seed(5))
GREEDY = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def assistant(draft):
    with assistant_of(draft, num_assistant_tokens=3, **LEARNING) as assistant:
        yield assistant


def test_greedy_calls_of_several_threads_while_it_learns(target, assistant):
    """Until it has been refreshed several times, in the middle of whatever calls there were."""
    plain = [target.generate(prompt, **unpadded(prompt), **GREEDY) for prompt in PROMPTS]
    outputs, enough = [], 5

    def call(first):
        i = first
        while assistant.serving.version < enough and len(outputs) < 2000:
            prompt = PROMPTS[i % len(PROMPTS)]
            output = target.generate(prompt, assistant_model=assistant, **unpadded(prompt), **GREEDY)
            outputs.append((i % len(PROMPTS), output))
            i += 1

    assert in_threads(*(partial(call, first) for first in range(3))) == []
    assert assistant.serving.version >= enough
    for i, output in outputs:
        assert torch.equal(output, plain[i])
    stats = assistant.stats
    assert stats.total.requests == len(outputs)
    assert (stats.failed_updates, stats.learner_restarts) == (0, 0)


def test_greedy_calls_with_a_step_of_learning_in_their_rounds(target, assistant, monkeypatch):
    """Each optimizer step is held up until the next round of a call: steps lie everywhere in calls."""
    plain = [target.generate(prompt, **unpadded(prompt), **GREEDY) for prompt in PROMPTS]
    rounds = threading.Semaphore(0)

    def pause(pace):
        while not rounds.acquire(timeout=0.1):
            if pace.stopped:
                raise throttle.Stopped

    monkeypatch.setattr(throttle.Throttle, "pause", pause)
    assistant.learner.learner.student.on_step = lambda: pause(assistant.learner.throttle)
    assistant.learner.prepare()
    handle = target.register_forward_pre_hook(lambda *args: rounds.release())
    try:
        for i in range(20 * len(PROMPTS)):
            prompt = PROMPTS[i % len(PROMPTS)]
            output = target.generate(prompt, assistant_model=assistant, **unpadded(prompt), **GREEDY)
            assert torch.equal(output, plain[i % len(PROMPTS)])
            if assistant.serving.version >= 3:
                break
    finally:
        handle.remove()
    assert assistant.serving.version >= 3


def test_samples_have_the_targets_distribution_while_it_learns():
    versions = []

    def between(assistant, i):
        if i == 0:
            assistant.learner.prepare()
        versions.append(assistant.serving.version)

    assistant = check_sampling(
        one_layer(seed=0), one_layer(seed=1), n=3, calls=800, gamma=2, between=between, config=LEARNING
    )
    assistant.close()
    assert len(set(versions)) > 3, "it was refreshed while the calls ran"
