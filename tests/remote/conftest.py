"""Learners whose processes are threads, closed when a test is over."""

import weakref

import pytest

from hf_osd import OnlineConfig
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.models.hot_swap import HotSwapDraft
from hf_osd.remote import pipe as pipe_module
from hf_osd.remote.supervisor import learn_in_process

from .processes import INTERVAL, Process


@pytest.fixture
def serving(tiny_llama):
    draft = tiny_llama(layers=1)
    return HotSwapDraft(draft, {name for name, _ in draft.named_parameters() if "layers" in name})


@pytest.fixture
def remote(serving, monkeypatch):
    """`remote(behaviour)`: a learner whose processes behave so; `made.processes` are those that it has started."""
    made, draft = [], serving

    def make(behaviour=None, serving=draft, **fields):
        config = OnlineConfig(**{"learn": "process", "update_interval": INTERVAL, "seed": 0, **fields})
        one = learn_in_process(serving, FeedbackBuffer(), config)
        if behaviour is not None:
            monkeypatch.setattr(Process, "behaviour", staticmethod(behaviour))
            monkeypatch.setattr(Process, "made", [])
            monkeypatch.setattr(pipe_module.subprocess, "Popen", Process)
            one.processes = Process.made
        made.append(weakref.ref(one))
        return one

    monkeypatch.setattr(pipe_module, "EXIT_TIMEOUT", 5.0)
    yield make
    for reference in made:
        if (one := reference()) is not None:
            one.close()
