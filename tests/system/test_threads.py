"""Threads that a process has end first, when it ends."""

import subprocess
import sys
import time

import pytest

LONG = 120  # seconds in which anything has happened, on any machine

BEGIN = """
import os, sys, threading, time
from hf_osd.system import threads
from hf_osd.system.threads import start_thread
"""


def ended(script):
    done = subprocess.run([sys.executable, "-c", BEGIN + script], capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done.stderr
    return done


def test_a_thread_is_told_to_stop_and_waited_for():
    done = ended("""
stop = threading.Event()
start_thread(lambda: (stop.wait(), time.sleep(0.1), print("stopped", flush=True)), (), stop.set)
print("the end", flush=True)
""")
    assert done.stdout.split("\n") == ["the end", "stopped", ""]


@pytest.mark.parametrize("patience", ["", "threads.PATIENCE = 0.1"])
def test_one_that_does_not_stop_is_made_to(patience):
    done = ended(f"""
{patience}
made = threading.Event()
start_thread(made.wait, (), lambda: None, made.set, patience=None if threads.PATIENCE < 1 else 0.1)
""")
    assert done.stderr == ""


def test_one_that_nothing_stops_keeps_no_process_and_that_is_said():
    began = time.monotonic()
    done = ended("""
threads.PATIENCE = 0.1
start_thread(threading.Event().wait, (), lambda: None, lambda: None)
""")
    assert "the process ends all the same" in done.stderr
    assert time.monotonic() - began < LONG / 4


def test_a_forked_child_ends_without_a_word_to_a_thread_that_is_not_there():
    done = ended("""
said = threading.Event()
def stop():
    print("stop", os.getpid() == parent, flush=True)
    said.set()
parent = os.getpid()
start_thread(said.wait, (), stop)
child = os.fork()
if not child:
    sys.exit(3)  # by way of all that is registered for an exit
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
""")
    assert done.stdout.split("\n") == ["3", "stop True", ""]
