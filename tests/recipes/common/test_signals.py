"""Signals that end a run: what they raise, when they are ignored, and a job whose whole process group gets them."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from recipes import distill
from recipes.common import signals

LONG = 120  # seconds in which anything has happened, on any machine
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

BEGIN = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(signals.__file__).parents[2])!r})
from recipes.common.signals import Ended, check_signals, ended_by_signals, exit_status, hold_signals

def send(name):
    os.kill(os.getpid(), getattr(signal, name))
"""


def said(script):
    done = subprocess.run([sys.executable, "-c", BEGIN + script], capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_each_raises_and_has_its_exit_status():
    script = """
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    before = signal.getsignal(getattr(signal, name))
    try:
        with ended_by_signals():
            send(name)
            print("nothing was raised")
    except KeyboardInterrupt as interrupt:
        print(exit_status(interrupt), signal.getsignal(getattr(signal, name)) is before)
print(exit_status(KeyboardInterrupt()))
"""
    assert said(script) == ["130", "True", "143", "True", "129", "True", "130"]


def test_while_the_work_is_saved_two_more_are_let_pass_and_the_third_ends_it():
    script = """
with ended_by_signals():
    try:
        send("SIGHUP")
    except Ended:
        hold_signals()
    send("SIGHUP")
    send("SIGTERM")
    check_signals()
    print("saved")
    try:
        send("SIGINT")
    except Ended as ended:
        print("insisted", exit_status(ended))
"""
    assert said(script) == ["saved", "insisted", "130"]


def test_a_second_one_does_not_get_past_whoever_saves():
    """It may come while the first one's exception is on its way, in a clean-up or in the line before `hold_signals`."""
    script = """
with ended_by_signals():
    try:
        try:
            send("SIGTERM")
        finally:
            send("SIGTERM")
    except Ended:
        send("SIGHUP")
        hold_signals()
        print("saved")
    print("done")
"""
    assert said(script) == ["saved", "done"]


def test_what_was_ignored_is_so_still():
    """As nohup has it."""
    script = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with ended_by_signals():
    send("SIGHUP")
    print("goes on")
"""
    assert said(script) == ["goes", "on"]


def test_one_that_came_in_a_finalizer_is_not_lost():
    script = """
class Gone:
    def __del__(self):
        send("SIGTERM")  # what this raises Python prints

with ended_by_signals():
    Gone()
    print("goes on")
    try:
        check_signals()
    except Ended as ended:
        print("until it is looked for", exit_status(ended))
"""
    assert said(script)[-1] == "143"


def test_another_thread_and_a_command_within_a_command_leave_them_alone():
    script = """
import threading
def work():
    with ended_by_signals():
        print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
thread = threading.Thread(target=work)
thread.start()
thread.join()
with ended_by_signals():
    outer = signal.getsignal(signal.SIGTERM)
    with ended_by_signals():
        pass
    print(signal.getsignal(signal.SIGTERM) is outer)
"""
    assert said(script) == ["True", "True"]


@pytest.fixture
def job(target_dir, words, tmp_path):
    """`job(*flags) -> (process, out)`: a job of many requests, in a session of its own, that has served a few."""
    rows = [{"prompt": f"{words[i % 61]} {words[i // 61]} {words[i % 7]}"} for i in range(3000)]
    stream = tmp_path / "stream.jsonl"
    stream.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, children = tmp_path / "out", []
    settings = ["--target", target_dir, "--draft", "grow:0,-1", "--stream", stream, "--held_back", "2"]
    settings += ["--parity", "1", "--max_new_tokens", "24", "--update_interval", "3", "--gate", "false"]
    settings += ["--learning_rate", "1e-3", "--threads", "1", "--checkpoint_every", "100000", "--output_dir", out]

    def start(*flags):
        child = os.fork()  # its imports are done
        if not child:
            status = 1
            try:
                os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
                # What pytest captures in the place of these it would keep from the log, and in memory what is logged.
                log = (tmp_path / "log").open("w", buffering=1)
                sys.stdout = sys.stderr = log
                logging.getLogger().handlers = [logging.StreamHandler(log)]
                status = distill.main([str(flag) for flag in (*settings, *flags)])
            finally:
                os._exit(status)
        children.append(child)
        metrics, end = out / "metrics.jsonl", time.monotonic() + LONG
        while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 6:
            assert time.monotonic() < end
            assert not os.waitpid(child, os.WNOHANG)[0], (tmp_path / "log").read_text()
            time.sleep(0.02)
        return psutil.Process(child), out

    yield start
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


@pytest.mark.parametrize(
    ("name", "flags", "status"),
    [
        ("SIGTERM", ["--learn", "background"], 143),
        ("SIGHUP", ["--learn", "inline"], 129),
        ("SIGINT", ["--learn", "process", "--warm_up", "4"], 130),
    ],
)
def test_a_job_saves_what_was_learnt_and_leaves_no_process_behind(job, tmp_path, name, flags, status):
    """Each signal comes to all of the process group, and again while it saves, as launchers and terminals have it."""
    process, out = job(*flags)
    children = process.children(recursive=True)
    assert bool(children) == ("process" in flags)
    served = (out / "metrics.jsonl").read_bytes().count(b"\n")
    os.killpg(process.pid, getattr(signal, name))
    os.killpg(process.pid, getattr(signal, name))
    ended = process.wait(LONG)
    log = (tmp_path / "log").read_text(errors="replace")
    assert ended == status, log
    assert not psutil.wait_procs(children, timeout=LONG)[1]
    assert (out / "draft" / "model.safetensors").is_file()
    states = list((out / "checkpoint").glob("state-*"))
    assert len(states) == 1, log
    [state] = states
    values = json.loads((state / "state.json").read_text())
    assert values["progress"]["rows"] >= served
    if "process" in flags:
        assert values["learner"]["updates"] >= 1, "the warm-up at least, of the learner's own telling"
    assert "Traceback" not in log
    assert "is dead" not in log
