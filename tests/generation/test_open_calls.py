"""Which generate calls run: known from their generators' end, which may come anywhere, late, or under a lock."""

import gc
import threading

import pytest

from hf_osd.generation.open_calls import OpenCalls


class Call:
    def __init__(self, thread=0, running=None):
        self.thread, self.running = thread, running


class Generator:
    """Stands for a candidate generator: what matters of it is its end."""


@pytest.fixture
def told():
    return []


@pytest.fixture
def calls(told):
    return OpenCalls(told.append)


def test_calls_run_from_their_beginning_to_the_end_of_their_generator(calls, told):
    one, two, first, second = Generator(), Generator(), Call(), Call()
    assert not calls.any()
    calls.add(first, one)
    calls.add(second, two)
    assert calls.any()
    assert calls.pop_finished() == []
    del one
    assert calls.any()
    assert told == [True, True], "one still runs"
    del two
    assert not calls.any()
    assert told == [True, True, False]
    assert set(calls.pop_finished()) == {first, second}
    assert calls.pop_finished() == []


def test_an_end_takes_no_lock(calls):
    """A finalizer may run while the same thread is in the middle of anything."""
    held = [Generator()]
    calls.add(Call(), held[0])
    done = threading.Event()

    def end():
        with calls._lock:
            held.clear()
        done.set()

    threading.Thread(target=end, daemon=True).start()
    assert done.wait(60)
    assert not calls.any()


def test_so_may_garbage_collection(calls):
    generator = Generator()
    generator.itself = generator
    calls.add(Call(), generator)
    del generator
    assert calls.any()
    gc.collect()
    assert not calls.any()


def test_calls_of_this_thread_that_have_come_back_are_over_though_something_holds_them(calls, monkeypatch):
    here, running = threading.get_ident(), object()
    monkeypatch.setattr("hf_osd.generation.open_calls.running_calls", lambda: [running])
    back, runs, elsewhere = Call(here, object()), Call(here, running), Call(here + 1, object())
    generators = [Generator() for _ in range(3)]
    for call, generator in zip((back, runs, elsewhere), generators, strict=True):
        calls.add(call, generator)
    assert calls.pop_finished() == []
    assert calls.pop_finished(this_thread=True) == [back]
    assert calls.any()


def test_the_late_end_of_a_call_taken_in_already_hides_none_that_runs(calls, monkeypatch):
    """A traceback held its generator."""
    monkeypatch.setattr("hf_osd.generation.open_calls.running_calls", list)
    late, generator = Generator(), Generator()
    calls.add(Call(threading.get_ident(), object()), late)
    assert len(calls.pop_finished(this_thread=True)) == 1
    calls.add(Call(), generator)
    del late
    assert calls.any()
    assert calls.pop_finished() == []


def test_a_call_that_begins_while_another_ends_is_not_missed():
    """It has said so before the other one says that none runs."""
    told, generators = [], [Generator()]

    def tell(busy):
        if not busy and generators:
            generators.clear()
            generators_of_next.append(Generator())
            calls.add(Call(), generators_of_next[0])
        told.append(busy)

    generators_of_next = []
    calls = OpenCalls(tell)
    calls.add(Call(), generators[0])
    last = generators.pop()
    generators.append(None)
    del last
    assert calls.any()
    assert told[-1] is True
