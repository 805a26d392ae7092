"""`RemoteLearner`: a process that learns, what it is sent and sends back, and its end; once the real one."""

import functools
import gc
import io
import os
import queue
import select
import signal
import subprocess
import sys
import threading

import pytest
import torch

from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.models.hot_swap import HotSwapDraft
from hf_osd.models.lora import Adapter
from hf_osd.remote import pipe as pipe_module
from hf_osd.remote.draft_folder import ADAPTER, BEGIN, DRAFT, write_draft_folder
from hf_osd.remote.frames import FrameWriter, read_frame
from hf_osd.remote.process import LearnerProcess
from hf_osd.remote.shared_flags import BUSY, SharedFlags
from hf_osd.remote.supervisor import learn_in_process
from hf_osd.system.forks import on_fork

from .processes import FIGURES, INTERVAL, LONG, obedient, offer, reads_on, same, wait_for_death, weights_of


def test_requests_are_sent_and_weights_that_come_back_serve(remote, serving, make_feedback):
    made = remote(obedient(serving))
    before = weights_of(serving)
    offer(made, make_feedback(seed=1), make_feedback(seed=2))
    assert made.update(wait=True)
    assert same(weights_of(serving), {name: p + 1 for name, p in before.items()})
    [process] = made.processes
    assert process.laid_out == sorted([BEGIN, BUSY, DRAFT])
    assert [process.seen.get() for _ in range(3)] == [("feedback", 1), ("feedback", 1), ("flush", 0)]
    assert made.metrics() == FIGURES
    assert (len(made.buffer), made.buffer.new()) == (2, []), "kept for a process that has to be started anew"


def test_nothing_is_started_before_there_is_something_to_learn(remote, serving):
    made = remote(obedient(serving))
    assert (made.is_due(), made.update(wait=False), made.processes) == (False, False, [])


def test_its_state_is_asked_for_and_given_back(remote, serving):
    made = remote(obedient(serving))
    tensors, state = made.state()
    assert (tensors["x"].tolist(), state) == ([1.0, 1.0], {"n": 1})
    made.load_state(tensors, state)
    with pytest.raises(ValueError, match="that of another draft"):
        made.load_state(tensors, {"n": 2})


def seen_by(process, count):
    return [process.seen.get(timeout=LONG) for _ in range(count)]


def test_a_flush_sends_what_came_into_the_buffer_otherwise(remote, serving, make_feedback):
    """As requests of elsewhere do, which somebody adds to it."""
    made = remote(obedient(serving))
    for i in range(3):
        made.buffer.add(make_feedback(seed=i))
    assert made.is_due()
    assert made.update(wait=True)
    assert (made.is_due(), made.buffer.new()) == (False, [])
    assert seen_by(made.processes[0], 2) == [("feedback", 3), ("flush", 0)]
    made.buffer.add(make_feedback(seed=3))
    assert not made.update(wait=False), "the process says when"
    assert seen_by(made.processes[0], 1) == [("feedback", 1)]


@pytest.mark.parametrize("served", [0, 1])
def test_a_buffer_that_is_restored_with_a_state_is_sent(remote, serving, make_feedback, tmp_path, served):
    """What was new is to be learnt, unless others were learnt since, the rest for replay; and nothing twice."""
    saved = FeedbackBuffer()
    for i in range(5):
        saved.add(make_feedback(seed=i))
    saved.mark_seen(saved.requests()[:3])
    saved.save(tmp_path / "buffer.safetensors")
    made = remote(obedient(serving))
    offer(made, *(make_feedback(seed=6) for _ in range(served)))
    made.load_state({}, {"n": 1})
    made.buffer.restore(tmp_path / "buffer.safetensors")
    offer(made, make_feedback(seed=5))
    made.update(wait=True)
    restored = (
        [("feedback", 1), ("load", 0), ("replay", 5)] if served else [("load", 0), ("replay", 3), ("feedback", 2)]
    )
    assert seen_by(made.processes[0], 5) == [*restored, ("feedback", 1), ("flush", 0)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_begins_with_a_process_of_its_own_and_leaves_its_parents_alone(remote, serving, make_feedback):
    made = remote(obedient(serving))
    on_fork(made)  # as an assistant has it
    offer(made, make_feedback(seed=1), make_feedback(seed=2))
    assert made.update(wait=True)
    [ours] = made.processes
    seen_by(ours, 3)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            made.transport.note_busy(True)
            offer(made, make_feedback(seed=3))
            flushed = made.update(wait=True)
            seen = seen_by(made.processes[1], 3)
            made.close()
            os.write(writing, repr((flushed, seen, serving.version, made.metrics()["updates"])).encode())
        finally:
            os._exit(0)
    os.close(writing)
    try:
        assert select.select([reading], [], [], LONG)[0], "the child hangs"
        said = os.read(reading, 2**16).decode()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
    assert said == repr((True, [("replay", 2), ("feedback", 1), ("flush", 0)], 2, 2))
    assert (ours.folder / BUSY).read_bytes()[:1] == b"\0", "it serves, not this one"
    assert made.update(wait=True)
    assert seen_by(ours, 1) == [("flush", 0)], "and has told it nothing"


def test_weights_from_elsewhere_are_sent_as_they_were(remote, serving):
    """Whoever trains them goes on at once; what is fixed is not sent."""
    taken = queue.SimpleQueue()

    def behave(process):
        while (frame := process.read()) is not None:
            taken.put(frame[1])

    made = remote(behave)
    weights = {name: p.clone() for name, p in serving.active.named_parameters()}
    name = next(iter(serving.trainable))
    expected = weights[name].clone()
    made._connect().send("state", {"much": torch.zeros(10**6)})  # it is written some time later
    made.load_weights(weights)
    weights[name].zero_()
    taken.get(timeout=LONG)
    sent = taken.get(timeout=LONG)
    assert sent.keys() == serving.trainable
    assert torch.equal(sent[name], expected)


def test_whether_somebody_is_served_is_a_byte_in_its_folder(remote, make_feedback):
    made = remote(reads_on)
    made.transport.note_busy(True)  # there is no process to tell
    offer(made, make_feedback())
    [process] = made.processes
    assert (process.folder / BUSY).read_bytes()[:1] == b"\0"
    made.transport.note_busy(True)
    assert (process.folder / BUSY).read_bytes()[:1] == b"\1"
    made.transport.note_busy(False)
    assert (process.folder / BUSY).read_bytes()[:1] == b"\0"


def test_a_draft_that_another_process_cannot_load_is_refused(tiny_llama):
    class Mine(type(tiny_llama(layers=1))):
        pass

    draft = Mine(tiny_llama(layers=1).config)
    with pytest.raises(ValueError, match=r"Mine is no class of transformers\. Pass learn='background'"):
        learn_in_process(HotSwapDraft(draft, set()), FeedbackBuffer(), OnlineConfig(learn="process"))


# Its end.


def test_close_ends_the_process_and_removes_its_folder(remote, serving, make_feedback):
    made = remote(obedient(serving))
    offer(made, make_feedback())
    [process] = made.processes
    assert seen_by(process, 1) == [("feedback", 1)]
    made.close()
    assert process.wait(0) == 0
    assert not process.folder.exists()
    assert seen_by(process, 1) == [("end", 0)], "its input may be held open by a fork"
    assert made.transport._deaths == 0, "it did not die"
    made.close()
    offer(made, make_feedback(seed=1))
    assert not made.update(wait=True)
    assert len(made.processes) == 1


def test_one_that_does_not_end_is_made_to(remote, make_feedback, monkeypatch):
    def deaf(process):
        reads_on(process)
        process.killed.wait(LONG)

    monkeypatch.setattr(pipe_module, "EXIT_TIMEOUT", 0.1)
    made = remote(deaf)
    offer(made, make_feedback())
    made.close()
    assert made.processes[0].wait(0) == -signal.SIGKILL


def test_the_process_ends_when_nobody_holds_its_learner(remote, make_feedback):
    made = remote(reads_on)
    offer(made, make_feedback())
    [process], reader = made.processes, made.transport.pipe._reader
    del made
    gc.collect()
    reader.join(LONG)
    assert not reader.is_alive()
    assert process.wait(0) == 0
    assert not process.folder.exists()


def test_garbage_collection_does_not_wait_for_it(remote, make_feedback):
    end = threading.Event()

    def slow(process):
        reads_on(process)
        end.wait(LONG)

    made = remote(slow)
    offer(made, make_feedback())
    reader = made.transport.pipe._reader
    del made
    gc.collect()
    assert reader.is_alive()
    end.set()
    reader.join(LONG)
    assert not reader.is_alive()


# The real one.


def test_a_real_process_learns_gives_its_state_takes_it_up_and_may_be_killed(remote, serving, make_feedback):
    """In the middle of an update that at this pace would take a day: the byte says that somebody is served."""
    made = remote(learning_budget=1e-7, gate=False, learning_rate=1e-3, warmup_steps=0, replay_ratio=1.0)
    before = weights_of(serving)
    offer(made, make_feedback(seed=1))
    assert made.update(wait=True)
    learnt = weights_of(serving)
    assert not same(learnt, before)
    figures = made.metrics()
    assert (figures["updates"], figures["failed_updates"]) == (1, 0)
    tensors, state = made.state()
    made.load_weights({name: torch.zeros_like(p) for name, p in serving.active.named_parameters()})
    made.load_state(tensors, state)
    assert same(weights_of(serving), learnt), "what was saved serves again"
    assert serving.version == 2
    with pytest.raises(ValueError, match="that of another draft"):
        made.load_state({}, state)

    # A terminal sends these to all of a process group, and a service's end the last to all of a service: whoever serves still wants the state.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(made.transport.pipe.pid, number)
    assert os.getsid(made.transport.pipe.pid) != os.getsid(0)
    assert made.state()[1] == state

    made.transport.note_busy(True)
    offer(made, *(make_feedback(seed=i) for i in range(2 * INTERVAL)))
    worker = made.transport.pipe
    os.kill(worker.pid, signal.SIGKILL)
    wait_for_death(made)
    assert same(weights_of(serving), learnt)
    assert made.metrics()["updates"] == 1
    assert not made.update(wait=True)
    with pytest.raises(ChildProcessError):
        os.waitpid(worker.pid, 0)


# With an adapter.


@pytest.fixture
def lora_serving(tiny_llama):
    draft = tiny_llama(layers=1)
    return HotSwapDraft(draft, set(), Adapter(draft, 4))


@pytest.fixture
def lora_remote(remote, lora_serving):
    """As `remote`, over a draft that learns in an adapter."""

    return functools.partial(remote, serving=lora_serving)


def test_weights_that_come_and_go_are_the_adapters(lora_remote, lora_serving, make_feedback):
    made = lora_remote(obedient(lora_serving))
    offer(made, make_feedback())
    [process] = made.processes
    assert process.laid_out == sorted([ADAPTER, BEGIN, BUSY, DRAFT])
    before = {name: p.clone() for name, p in lora_serving.active.named_parameters()}
    assert made.update(wait=True)
    assert all("lora_" in name for name, _ in lora_serving.weights())
    changed = {n for n, p in lora_serving.active.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{name}.weight" for name in lora_serving.adapter.modules}


def test_an_adapter_over_weights_that_are_gone_does_not_serve(lora_remote, lora_serving, make_feedback):
    """It is on its way when the weights under it are replaced."""
    read, gone = threading.Event(), threading.Event()

    def behave(process):
        while (frame := process.read()) is not None:
            if frame[0] == "take":
                read.set()
                assert gone.wait(LONG)
                stale = {name: p + 1 for name, p in lora_serving.weights()}
                process.frames.write("weights", stale, {"figures": FIGURES, "base": frame[2]["base"] - 1})
            elif frame[0] == "flush":
                process.frames.write("answer", {}, {"refreshed": False, "asked": frame[2]["asked"]})

    made = lora_remote(behave)
    offer(made, make_feedback())
    base = {"model.norm.weight": torch.full((32,), 2.0)}
    made.load_weights(lora_serving.adapter.weights(), base)
    assert read.wait(LONG)
    lora_serving.rebase(base)
    version = lora_serving.version
    gone.set()
    assert not made.update(wait=True)
    assert lora_serving.version == version
    assert lora_serving.active.model.norm.weight.eq(2).all()


def test_the_process_takes_another_base_under_its_adapter(lora_serving, tmp_path):
    adapter = lora_serving.adapter
    lora_serving.refresh({name: torch.full_like(w, 0.5) for name, w in adapter.weights().items()})
    lay_out(tmp_path, lora_serving)
    written = io.BytesIO()
    process = LearnerProcess(tmp_path, FrameWriter(written))
    member = process.learner.learner.student
    assert all(w.eq(0.5).all() for w in member.weights().values()), "as it has been learnt so far"
    base = {f"{name}.weight": torch.full_like(p.base_layer.weight, 0.25) for name, p in layers_of(adapter)}
    sent = {f"base.{name}": w for name, w in base.items()} | adapter.weights()
    assert process.service.handle("take", sent, {"base": 3}) is None
    assert all(p.base_layer.weight.eq(0.25).all() for _, p in layers_of(adapter, member.module))
    assert all(torch.equal(w, adapter.weights()[name]) for name, w in member.weights().items())
    process._serve(adapter.weights())
    written.seek(0)
    kind, tensors, values = read_frame(written)
    assert (kind, tensors.keys(), values["base"]) == ("weights", adapter.trainable, 3)
    process.learner.close()


def lay_out(folder, serving):
    """All that a process finds there when it begins."""
    write_draft_folder(folder, serving, OnlineConfig(learn="process"))
    SharedFlags.create(folder)


def layers_of(adapter, model=None):
    return [(name, (model or adapter.draft).get_submodule(name)) for name in adapter.modules]


def test_a_real_process_learns_the_same_adapter_and_goes_on_over_another_base(tiny_llama, make_feedback):
    settings = {"learn": "process", "adapter": "lora", "lora": 4, "update_interval": INTERVAL, "gate": False}
    settings |= {"learning_rate": 1e-3}
    with OnlineAssistant(tiny_llama(layers=1), **settings, warmup_steps=0, replay_ratio=1.0) as assistant:
        serving, learner = assistant.serving, assistant.learner
        base = {name: p.clone() for name, p in serving.active.named_parameters()}
        begun = weights_of(serving)
        offer(learner, make_feedback(seed=1))
        assert learner.update(wait=True)
        learnt = weights_of(serving)
        assert learnt.keys() == begun.keys() == assistant.adapter.trainable
        assert not same(learnt, begun)
        tensors, state = learner.state()
        assert {n.removeprefix("0.weights.") for n in tensors if n.startswith("0.weights.")} == learnt.keys()
        with pytest.raises(ValueError, match="that of another draft"):
            learner.load_state({}, state)

        trained = tiny_llama(layers=1)
        with torch.no_grad():
            trained.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        assistant.refresh(trained)
        assert same(weights_of(serving), begun)
        offer(learner, make_feedback(seed=2))
        assert learner.update(wait=True)
        assert not same(weights_of(serving), begun)
        expected = dict(assistant.adapter.merged(dict(serving.weights())))
        up = "model.layers.0.mlp.up_proj.weight"
        served = serving.active.get_parameter(up)
        assert torch.equal(served, expected[up])
        assert (served - trained.get_parameter(up)).abs().max() < (served - base[up]).abs().max(), "over the new base"

        # One that is started anew begins with what was learnt.
        learnt = weights_of(serving)
        os.kill(learner.transport.pipe.pid, signal.SIGKILL)
        wait_for_death(learner)
        learner.transport._deaths = 0
        offer(learner, make_feedback(seed=3))
        tensors, _ = learner.state()
        begun_anew = {n.removeprefix("0.weights."): w for n, w in tensors.items() if n.startswith("0.weights.")}
        assert same(begun_anew, learnt)


def test_a_real_process_that_is_killed_is_replaced_by_one_that_learns_on(tiny_llama, make_feedback):
    """From what the one before has learnt, and with its requests for replay, which are not learnt as new ones."""
    settings = {"learn": "process", "update_interval": INTERVAL, "gate": False, "learning_rate": 1e-3}
    with OnlineAssistant(tiny_llama(layers=1), **settings, warmup_steps=0) as assistant:
        learner = assistant.learner
        offer(learner, make_feedback(seed=1))
        assert learner.update(wait=True)
        learnt = weights_of(assistant.serving)
        os.kill(learner.transport.pipe.pid, signal.SIGKILL)
        wait_for_death(learner)
        offer(learner, *(make_feedback(seed=3 + i) for i in range(2 * INTERVAL)))
        tensors, state = learner.state()
        assert same({n.removeprefix("0.weights."): w for n, w in tensors.items() if "0.weights." in n}, learnt)
        assert learner.update(wait=True)
        assert not same(weights_of(assistant.serving), learnt)
        metrics = learner.metrics()
        assert (metrics["learner_restarts"], metrics["updates"]) == (1, 2)
        assert metrics["rejected_updates"] == 0


PARENT = """
import os, subprocess, sys
from pathlib import Path
child = subprocess.Popen([sys.executable, "-m", "hf_osd.remote.process", sys.argv[1], str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[int(sys.argv[2])])
if not os.fork():  # it has the pipe too, and lives on
    os.close(int(sys.argv[2]))
    sys.stdin.read()
    os._exit(0)
print(child.pid, flush=True)
child.stdout.read()
"""


def test_it_ends_when_whoever_serves_is_killed(serving, tmp_path):
    """Though one that was forked off there lives on; and it leaves no folder."""
    folder = tmp_path / "learner"
    folder.mkdir()
    lay_out(folder, serving)
    ours, theirs = os.pipe()  # the end of it comes when all that have the other one are gone
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), str(theirs)],
        pass_fds=[theirs],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    os.close(theirs)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert select.select([ours], [], [], LONG)[0], f"process {child} lives on"
    assert os.read(ours, 1) == b""
    os.close(ours)
    parent.stdin.close()
    assert not folder.exists()
