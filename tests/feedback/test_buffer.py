"""`FeedbackBuffer`: its two bounds, what is new, and that it survives threads and the disk."""

import os
import re
import stat
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.trace import write_trace


@pytest.fixture
def clock(monkeypatch):
    """Time stands still until a test moves `clock.now`."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


@given(lengths=st.lists(st.integers(0, 30), max_size=20), max_bytes=st.integers(1, 20_000))
def test_bytes_never_exceed_the_bound_and_the_oldest_go_first(make_feedback, lengths, max_bytes):
    buffer, added = FeedbackBuffer(max_bytes), []
    for i, n in enumerate(lengths):
        feedback = make_feedback(n=n, seed=i)
        buffer.add(feedback)
        if n:
            added.append(feedback)
        held = buffer.sample(len(buffer))
        assert buffer.nbytes == sum(f.nbytes for f in held) <= max_bytes
    kept = []
    for feedback in reversed(added):
        if feedback.nbytes + sum(f.nbytes for f in kept) > max_bytes:
            break
        kept.insert(0, feedback)
    assert buffer.new() == kept
    assert buffer.dropped == len(added) - len(kept)
    assert buffer.tokens == sum(map(len, kept))


def test_it_is_crowded_once_few_requests_fill_it(make_feedback):
    """127 requests of 3 tokens are little to learn from; 127 of 200 are not, nor are 128 of any length."""
    short, long = make_feedback(n=3), make_feedback(n=200)
    for one, room, crowded in ((short, 127, True), (short, 128, False), (long, 127, False), (long, 80, True)):
        buffer = FeedbackBuffer(room * one.nbytes)
        for _ in range(room):
            buffer.add(one)
        assert not buffer.crowded
        buffer.add(one)
        assert buffer.crowded == crowded
    old = FeedbackBuffer(max_age=1e-9)
    for _ in range(3):
        old.add(short)
    assert not old.crowded


def test_a_request_without_a_verified_position_is_left_out(make_feedback):
    buffer = FeedbackBuffer()
    buffer.add(make_feedback(n=0))
    assert len(buffer) == 0
    assert buffer.new() == []


def test_feedback_goes_when_it_is_too_old(make_feedback, clock):
    buffer = FeedbackBuffer(max_age=10.0)
    old, young = make_feedback(created=1000.0), make_feedback(created=1005.0)
    buffer.add(old)
    buffer.add(young)
    clock.now = 1010.0
    assert buffer.new() == [old, young], "exactly the age allowed"
    clock.now = 1012.0
    assert buffer.new() == [young]
    assert (buffer.nbytes, buffer.dropped) == (young.nbytes, 1)


def test_feedback_that_is_too_old_is_not_sampled(make_feedback, clock):
    """A trainer that passes over the buffer asks for a sample alone, and nothing else has looked at the clock."""
    buffer = FeedbackBuffer(max_age=10.0)
    buffer.add(make_feedback(created=1000.0))
    clock.now = 1011.0
    assert buffer.sample(3) == []


def test_what_arrives_during_an_update_stays_new(make_feedback):
    buffer = FeedbackBuffer()
    first, second, late = (make_feedback(seed=i) for i in range(3))
    buffer.add(first)
    buffer.add(second)
    learning = buffer.new()
    buffer.add(late)
    buffer.mark_seen(learning)
    assert buffer.new() == [late]
    assert len(buffer) == 3, "what was seen is kept for replay"
    buffer.mark_seen(buffer.new())
    assert buffer.new() == []


def test_only_requests_dropped_unseen_are_counted(make_feedback):
    one = make_feedback(n=10)
    buffer = FeedbackBuffer(max_bytes=2 * one.nbytes)
    for i in range(2):
        buffer.add(make_feedback(n=10, seed=i))
    buffer.mark_seen(buffer.new())
    for i in range(2, 4):
        buffer.add(make_feedback(n=10, seed=i))
    assert buffer.dropped == 0, "the two that left had been seen"
    buffer.add(make_feedback(n=10, seed=4))
    assert buffer.dropped == 1
    assert len(buffer.new()) == 2


def test_dropped_while_an_update_runs_then_marked_seen(make_feedback):
    """Marking requests that the byte bound has dropped meanwhile must not eat into those that are new."""
    one = make_feedback(n=10)
    buffer = FeedbackBuffer(max_bytes=2 * one.nbytes)
    buffer.add(make_feedback(n=10, seed=1))
    learning = buffer.new()
    late = [make_feedback(n=10, seed=i) for i in (2, 3)]
    for feedback in late:
        buffer.add(feedback)
    buffer.mark_seen(learning)
    assert buffer.new() == late


@given(held=st.integers(1, 6), count=st.integers(0, 20), seed=st.integers(0, 100))
def test_a_sample_repeats_no_request_within_a_pass(make_feedback, held, count, seed):
    buffer = FeedbackBuffer()
    for i in range(held):
        buffer.add(make_feedback(n=2, seed=i))
    drawn = buffer.sample(count, torch.Generator().manual_seed(seed))
    assert len(drawn) == count
    for start in range(0, count, held):
        one_pass = drawn[start : start + held]
        assert len(set(map(id, one_pass))) == len(one_pass)


def test_samples_are_uniform_and_repeat_with_their_seed(make_feedback):
    buffer = FeedbackBuffer()
    for i in range(4):
        buffer.add(make_feedback(n=2, seed=i))
    random = torch.Generator().manual_seed(0)
    firsts = [buffer.sample(1, random)[0] for _ in range(400)]
    counts = [sum(f is held for f in firsts) for held in buffer.new()]
    # 400 draws at 1/4: the standard deviation is 8.7, and the draws are seeded.
    assert all(60 < c < 140 for c in counts)
    again = [buffer.sample(3, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert again[0] == again[1]


def test_an_empty_buffer_gives_an_empty_sample():
    assert FeedbackBuffer().sample(5) == []


def test_clear_forgets_everything_and_counts_nothing_as_dropped(make_feedback):
    buffer = FeedbackBuffer()
    buffer.add(make_feedback())
    buffer.clear()
    assert (len(buffer), buffer.nbytes, buffer.new(), buffer.dropped) == (0, 0, [], 0)


def test_threads_may_add_sample_and_mark_at_once(make_feedback):
    one = make_feedback(n=5)
    buffer, errors = FeedbackBuffer(max_bytes=20 * one.nbytes), []
    requests = [[make_feedback(n=5, seed=100 * t + i) for i in range(60)] for t in range(3)]
    adding = threading.Event()

    def add(mine):
        try:
            for feedback in mine:
                buffer.add(feedback)
        except Exception as error:
            errors.append(error)

    def read():
        try:
            while not adding.is_set():
                assert len(buffer.sample(7)) in (0, 7)
                buffer.mark_seen(buffer.new())
                assert buffer.tokens <= 100
        except Exception as error:
            errors.append(error)

    adders = [threading.Thread(target=add, args=(mine,)) for mine in requests]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in adders + readers:
        thread.start()
    for thread in adders:
        thread.join()
    adding.set()
    for thread in readers:
        thread.join()
    assert not errors
    assert len(buffer) == 20
    assert buffer.nbytes == 20 * one.nbytes == sum(f.nbytes for f in buffer.sample(20))
    buffer.mark_seen(buffer.new())
    assert buffer.new() == []


def test_a_saved_buffer_comes_back_as_old_and_as_new_as_it_was(make_feedback, clock, tmp_path):
    buffer = FeedbackBuffer()
    kept = [
        make_feedback(n=4, seed=1, created=990.0),
        make_feedback(n=9, seed=2, sampled=True, created=995.5),
        make_feedback(n=2, seed=3, dtype=torch.bfloat16, created=999.0),
    ]
    for feedback in kept:
        buffer.add(feedback)
    buffer.mark_seen(kept[:1])
    buffer.save(tmp_path / "buffer")
    clock.now = 50.0  # another process, another clock
    restored = FeedbackBuffer()
    restored.restore(tmp_path / "buffer")
    assert (len(restored), restored.nbytes) == (3, buffer.nbytes)
    assert len(restored.new()) == 2
    for was, now in zip(kept[1:], restored.new(), strict=True):
        assert (now.prompt_length, now.sampled) == (was.prompt_length, was.sampled)
        assert now.created == pytest.approx(was.created - 950.0)
        for name, tensor in was.tensors().items():
            same = getattr(now, name)
            assert same.dtype == tensor.dtype
            assert torch.equal(same.nan_to_num(-7), tensor.nan_to_num(-7)), name


def test_an_empty_buffer_survives_the_disk(tmp_path):
    FeedbackBuffer().save(tmp_path / "buffer")
    restored = FeedbackBuffer()
    restored.restore(tmp_path / "buffer")
    assert len(restored) == 0


def test_a_restored_buffer_holds_no_more_memory_than_it_counts(make_feedback, tmp_path):
    """Requests that were views of the file's tensors would keep all of it until the last of them has gone."""
    buffer = FeedbackBuffer()
    for i in range(3):
        buffer.add(make_feedback(n=10, seed=i))
    buffer.save(tmp_path / "buffer")
    smaller = FeedbackBuffer(max_bytes=make_feedback(n=10).nbytes)
    smaller.restore(tmp_path / "buffer")
    storages = [tensor.untyped_storage().nbytes() for f in smaller.new() for tensor in f.tensors().values()]
    assert sum(storages) == smaller.nbytes > 0


def test_restoring_into_a_smaller_buffer_drops_nothing_unseen(make_feedback, tmp_path):
    """What does not fit had been seen before it was saved: to count it as dropped would alarm for nothing."""
    one, buffer = make_feedback(n=10), FeedbackBuffer()
    for i in range(4):
        buffer.add(make_feedback(n=10, seed=i))
    buffer.mark_seen(buffer.new())
    buffer.save(tmp_path / "buffer")
    smaller = FeedbackBuffer(max_bytes=2 * one.nbytes)
    smaller.restore(tmp_path / "buffer")
    assert (len(smaller), smaller.new(), smaller.dropped) == (2, [], 0)


def test_restored_feedback_is_older_than_what_came_in_meanwhile(make_feedback, clock, tmp_path):
    """Were it added last, it would outlive its age behind younger requests, and push those out in its place."""
    saved, path = FeedbackBuffer(), tmp_path / "buffer"
    for i in range(2):
        saved.add(make_feedback(n=10, seed=i, created=992.0))
    saved.mark_seen(saved.new()[:1])
    saved.save(path)
    young = make_feedback(n=10, seed=2, created=1000.0)
    buffer = FeedbackBuffer(max_bytes=2 * young.nbytes, max_age=10.0)
    buffer.add(young)
    buffer.restore(path)
    assert [f.created for f in buffer.new()] == [992.0, 1000.0]
    clock.now = 1003.0
    assert buffer.new() == [young]


@pytest.mark.parametrize("existed", [False, True])
def test_a_saved_buffer_is_its_owners_alone(make_feedback, tmp_path, existed):
    """It holds prompts. Opening an older, readable file for writing keeps that file's mode."""
    path, mask = tmp_path / "buffer", os.umask(0)
    try:
        if existed:
            path.write_bytes(b"older, and longer than nothing")
            path.chmod(0o644)
        buffer = FeedbackBuffer()
        buffer.add(make_feedback())
        buffer.save(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    FeedbackBuffer().restore(path)


def test_a_missing_file_is_told_from_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="No saved buffer"):
        FeedbackBuffer().restore(tmp_path / "nowhere")


def test_a_damaged_file_is_refused_and_adds_nothing(make_feedback, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    buffer, path = FeedbackBuffer(), tmp_path / "buffer"
    for i in range(2):
        buffer.add(make_feedback(seed=i))
    buffer.save(path)
    whole = path.read_bytes()

    def lacks_a_request():
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata()
        save_file({**tensors, "facts": tensors["facts"][:1].clone()}, path, metadata=metadata)

    def a_trace_of_answers():
        write_trace(path, [make_feedback()])

    def truncated():
        path.write_bytes(whole[:-20])

    def other_bytes():
        path.write_bytes(b"not a buffer")

    def weights_of_a_model():
        save_file({"weight": torch.zeros(3)}, path)

    for damage in (lacks_a_request, truncated, other_bytes, weights_of_a_model, a_trace_of_answers):
        damage()
        restored = FeedbackBuffer()
        message = f"{re.escape(str(path))} is not a buffer saved by hf_osd .*; delete it to start empty"
        with pytest.raises(ValueError, match=message):
            restored.restore(path)
        assert len(restored) == 0, damage.__name__
