"""From an engine's answers to weights in a folder: what is learnt is what the target says, and whatever becomes of learning, requests are answered."""

import os
import signal

import pytest
import torch

from hf_osd import OnlineAssistant, grow_feature_draft
from hf_osd.engines.sidecar.sidecar import Sidecar
from hf_osd.engines.sidecar.status import progress_line
from hf_osd.saving.drafts import load_draft

from .conftest import FakePusher, FakeServer
from .fake_engine import FakeEngine, ids_of, text_of

RANDOM = torch.Generator().manual_seed(0)
PROMPTS = [text_of(torch.randint(2, 64, (6,), generator=RANDOM)) for _ in range(8)]


def ask(send, prompts=PROMPTS, n=12):
    """Ask for answers, and check that there are some."""
    for prompt in prompts:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": n, "temperature": 0}
        assert send("POST", "/v1/completions", json=body).status_code == 200


def step(sidecar):
    """Do what the sidecar's thread does, until nothing waits."""
    while not sidecar._waiting.empty():
        sidecar._guarded(sidecar._learn, sidecar._next_answers())
    sidecar._guarded(sidecar._learn, [])
    sidecar._guarded(sidecar._offer)


def test_an_answer_teaches_what_the_target_itself_would(target, through, make_sidecar, answer_of):
    sidecar = make_sidecar(update_interval=1000, feedback_dtype="float32")
    ask(through(FakeEngine(target), sidecar), PROMPTS[:2])
    step(sidecar)
    for feedback, prompt in zip(sidecar.assistant.buffer.requests(), PROMPTS, strict=False):
        expected = answer_of(target, torch.tensor(ids_of(prompt)), 12, k=20)
        assert torch.equal(feedback.tokens, expected.tokens)
        assert torch.equal(feedback.top_ids, expected.top_ids)
        torch.testing.assert_close(feedback.top_logps, expected.top_logps)
        torch.testing.assert_close(feedback.tail_logp, expected.tail_logp, atol=1e-3, rtol=1e-3)


def test_weights_that_may_serve_are_pushed_and_are_better(target, draft, through, make_sidecar, tmp_path, answer_of):
    pusher = FakePusher(tmp_path)
    sidecar = make_sidecar(pusher=pusher, learning_rate=1e-2, ema_decay=0)
    send = through(FakeEngine(target), sidecar)
    for _ in range(3):
        ask(send)
        step(sidecar)
    assert pusher.saved
    assert sidecar.counts["errors"] == 0
    assert sidecar.counts["taught"] == 24
    held = [answer_of(target, torch.tensor(ids_of(prompt)), 12) for prompt in PROMPTS]
    learnt = load_draft(pusher.saved[-1])
    before, after = (torch.cat(OnlineAssistant(d, learn=False).score(held)).mean() for d in (draft, learnt))
    assert after > before + 0.2
    count = len(pusher.saved)
    step(sidecar)
    assert len(pusher.saved) == count, "no new weights, no push"


def test_without_learning_nothing_is_pushed_unless_asked_for(make_sidecar, tmp_path):
    step(make_sidecar(pusher=(silent := FakePusher(tmp_path / "a"))))
    assert not silent.saved
    step(make_sidecar(pusher=(first := FakePusher(tmp_path / "b")), options={"pushes_first": True}))
    assert len(first.saved) == 1


def test_a_push_that_fails_at_once_is_logged_and_requests_go_on(target, through, make_sidecar, tmp_path, caplog):
    class Full(FakePusher):
        def offer(self, save):
            raise OSError(28, "No space left on device")

    sidecar = make_sidecar(pusher=Full(tmp_path), options={"pushes_first": True})
    send = through(FakeEngine(target), sidecar)
    step(sidecar)
    ask(send, PROMPTS[:1])
    assert "OSError" in caplog.text
    assert sidecar.counts["errors"] == 1


def test_a_killed_learner_is_replaced_and_nobody_notices(target, through, make_sidecar):
    sidecar = make_sidecar(learn="process", update_interval=1)
    send = through(FakeEngine(target), sidecar)
    ask(send, PROMPTS[:2], 4)
    step(sidecar)
    pipe = sidecar.assistant.learner.transport.pipe
    os.kill(pipe.pid, signal.SIGKILL)
    assert pipe.dead.wait(20)
    ask(send, PROMPTS, 4)
    step(sidecar)
    assert sidecar.assistant.learner.transport.pipe.pid != pipe.pid
    assert sidecar.figures()["learning"]["learner_restarts"] == 1
    assert sidecar.counts["errors"] == 0
    assert sidecar.counts["taught"] == 10


def test_the_thread_learns_by_itself_and_ends(target, through, make_sidecar, tmp_path):
    pusher = FakePusher(tmp_path)
    sidecar = make_sidecar(pusher=pusher, update_interval=2)
    sidecar.start()
    ask(through(FakeEngine(target), sidecar), PROMPTS[:4], 4)
    while sidecar.counts["taught"] < 4:
        assert sidecar._thread.is_alive()
        assert not sidecar.counts["errors"]
    sidecar.close()
    assert not sidecar._thread.is_alive()
    assert pusher.closed
    sidecar.close()


def test_a_closed_sidecar_still_passes_requests(target, through, make_sidecar):
    sidecar = make_sidecar()
    send = through(FakeEngine(target), sidecar)
    sidecar.close()
    ask(send, PROMPTS[:1])
    assert sidecar.counts["read"] == 0


def test_weights_taken_back_are_counted(make_sidecar):
    sidecar = make_sidecar()
    sidecar.taken_back()
    assert sidecar.figures()["counts"]["taken_back"] == 1
    assert "0 requests" in progress_line(sidecar.figures())


@pytest.mark.parametrize(("limits", "asked"), [((20, 20), 20), ((20, 5), 5), ((-1, 50), 20), ((None,), 20), ((0,), 0)])
def test_all_engines_are_asked_for_as_many_log_probs_as_each_allows(draft, limits, asked):
    servers = [FakeServer(f"http://{i}", limit) for i, limit in enumerate(limits)]
    sidecar = Sidecar(OnlineAssistant(draft), servers)
    assert sidecar.top_k == asked
    assert sidecar.share_in() is (asked > 0)


def test_drafts_that_learn_nothing_from_outside_are_refused(target):
    with pytest.raises(ValueError, match=r"hidden states.*--reread"):
        Sidecar(OnlineAssistant(grow_feature_draft(target, [1, 2])), [])
    with pytest.raises(ValueError, match="no draft"):
        Sidecar(OnlineAssistant(), [])


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_a_share_is_a_share(draft, share):
    with pytest.raises(ValueError, match="share"):
        Sidecar(OnlineAssistant(draft), [], share=share)
