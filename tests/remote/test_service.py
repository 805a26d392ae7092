"""`LearnerService` and `RemoteLearner` face to face: what one asks the other answers, for a learner of its own and for one that others share."""

from types import SimpleNamespace

import pytest
import torch

from hf_osd import FeedbackBuffer, OnlineConfig
from hf_osd.feedback.trace import pack
from hf_osd.models.hot_swap import HotSwapDraft
from hf_osd.remote.frames import BadFrame, from_bytes, to_bytes
from hf_osd.remote.learner import RemoteLearner
from hf_osd.remote.roles import LearningRank
from hf_osd.remote.service import LearnerService

from .processes import FIGURES


class Direct:
    """A transport to a service of this process: each frame is written, read and answered at once."""

    over, restarts, is_starting, outlook = None, 0, False, "It is not replaced."

    def __init__(self, service, shared: bool):
        self.service, self.shared, self.sent, self.full = service, shared, [], False

    def listen(self, on_frame, on_death):
        self.deliver = on_frame

    def connect(self, requests=0):
        return self

    def send(self, kind, tensors=None, values=None, feedback=()):
        self.sent.append((kind, len(feedback)))
        frame = from_bytes(to_bytes(kind, pack(feedback) if feedback else tensors, values))
        answer = self.service.handle(*frame)
        if answer is not None:
            tensors, values = answer
            self.deliver("answer", tensors, values | self.service.report())

    def has_room(self, buffer):
        return not self.full

    def watch(self):
        return lambda: True

    def close(self):
        pass


class Elsewhere:
    """A learner that learns nothing, and gives what it was given."""

    def __init__(self):
        self.buffer, self.loaded = FeedbackBuffer(), None
        self.add, self.metrics = self.buffer.add, lambda: FIGURES

    def replay(self, requests):
        for one in requests:
            self.buffer.add(one)
        self.buffer.mark_seen(requests)

    def update(self):
        self.buffer.mark_seen(self.buffer.new())
        return True

    def load_weights(self, weights, base):
        self.taken = weights, base

    def state(self):
        return {"x": torch.ones(2)}, {"n": 1}

    def load_state(self, tensors, values):
        if values != {"n": 1}:
            raise ValueError("that of another draft")
        self.loaded = tensors

    def serve(self):
        pass


@pytest.fixture
def made(tiny_llama):
    """`made(shared)`: a remote learner, and the one that learns."""

    def make(shared):
        elsewhere = Elsewhere()
        transport = Direct(LearnerService(elsewhere, elsewhere.update), shared)
        draft = tiny_llama(layers=1)
        serving = HotSwapDraft(draft, {name for name, _ in draft.named_parameters()})
        return RemoteLearner(transport, serving, FeedbackBuffer(), OnlineConfig(update_interval=2)), elsewhere

    return make


def test_requests_of_a_shared_learner_go_in_batches_and_leave_the_buffer(made, make_feedback):
    learner, elsewhere = made(shared=True)
    learner.add(make_feedback(seed=1))
    assert (learner.is_due(), learner.transport.sent) == (False, [])
    learner.add(make_feedback(seed=2))
    learner.transport.full = True
    assert not learner.is_due(), "the batches before are still on their way"
    learner.transport.full = False
    assert learner.is_due()
    assert not learner.update(wait=False)
    assert (learner.transport.sent, len(learner.buffer), len(elsewhere.buffer.new())) == ([("feedback", 2)], 0, 2)
    learner.add(make_feedback(seed=3))
    assert learner.update(wait=True), "part of a batch too, where somebody waits"
    assert (learner.transport.sent[1:], elsewhere.buffer.new()) == ([("feedback", 1), ("flush", 0)], [])
    assert learner.metrics()["updates"] == FIGURES["updates"]


def test_weights_and_state_of_a_shared_learner_are_its_own(made):
    learner, _ = made(shared=True)
    with pytest.raises(RuntimeError, match="refresh it there"):
        learner.load_weights({})
    for refused in (learner.state, lambda: learner.load_state({}, {})):
        with pytest.raises(RuntimeError, match="on another rank; save the draft itself"):
            refused()
    assert learner.transport.sent == []


def test_a_learner_of_its_own_is_sent_each_request_and_asked_for_its_state(made, make_feedback):
    learner, elsewhere = made(shared=False)
    learner.buffer.add(make_feedback(seed=1))
    learner.buffer.mark_seen(learner.buffer.new())
    learner.add(make_feedback(seed=2))
    assert learner.transport.sent == [("replay", 1), ("feedback", 1)]
    assert (len(elsewhere.buffer), len(elsewhere.buffer.new()), len(learner.buffer)) == (2, 1, 2)
    tensors, state = learner.state()
    learner.load_state(tensors, state)
    assert elsewhere.loaded["x"].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="that of another draft"):
        learner.load_state(tensors, {"n": 2})
    weights = dict(learner._serving.active.named_parameters())
    learner.load_weights(weights, {"norm": torch.zeros(3)})
    assert elsewhere.taken[0].keys() >= weights.keys()
    assert elsewhere.taken[1]["norm"].tolist() == [0.0, 0.0, 0.0]
    assert elsewhere.buffer.new()
    assert learner.update(wait=True)


def test_frames_of_another_version_are_refused(made, make_feedback):
    service = made(shared=True)[0].transport.service
    with pytest.raises(BadFrame, match="kind 'judge' came; both ends must run one version"):
        service.handle("judge", {}, {})
    tensors = pack([make_feedback()])
    tensors.pop(next(iter(tensors)))
    with pytest.raises(BadFrame, match="no feedback"):
        service.handle("feedback", tensors, {})


def test_a_learning_rank_goes_on_without_them(caplog):
    rank = LearningRank.__new__(LearningRank)
    elsewhere = Elsewhere()
    rank._service = LearnerService(elsewhere, elsewhere.update)
    rank.channels, rank._send_weights = {1: SimpleNamespace(send=lambda *frame: sent.append(frame))}, lambda: None
    sent = []
    rank._handle(1, "judge", {}, {})
    rank._handle(1, "feedback", {"nonsense": torch.zeros(1)}, {})
    assert caplog.text.count("Learning goes on without it") == 2
    rank._handle(1, "flush", {}, {"asked": 7})
    [(kind, _, values)] = sent
    assert (kind, values["asked"], values["refreshed"]) == ("answer", 7, True)
