"""The sidecar's check: what it counts, and that it would see an answer that is another."""

import sys

import httpx
import psutil
import pytest

from hf_osd.engines.counters import read_counters
from hf_osd.engines.sidecar.app import make_app
from recipes.checks import sidecar_traffic
from recipes.checks.sidecar import SidecarCheckArguments
from recipes.checks.sidecar_programs import Programs, free_port
from recipes.checks.sidecar_traffic import answers_alike, figures_of, live, seconds_a_token, settled, together

from ...engines.sidecar.conftest import make_sidecar, serve  # noqa: F401
from ...engines.sidecar.fake_engine import FakeEngine

PROMPTS = [[5, 6, 7], [9, 8]]
BODY = {"model": "tiny", "max_tokens": 3, "temperature": 0}
METRICS = """# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="target"} 10.0
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="target"} 40.0
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="target"} 15.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 9.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 6.0
# TYPE vllm:spec_decode_num_accepted_tokens_created gauge
vllm:spec_decode_num_accepted_tokens_created{engine="0"} 1.7e+09
"""


def test_the_engines_counters_are_read():
    with httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(200, text=METRICS))) as client:
        counted = read_counters(client, "http://engine")
    figures = figures_of(counted)
    assert (figures["rounds"], figures["drafted"], figures["accepted"]) == (10, 40, 15)
    assert figures["mean_acceptance_length"] == 2.5
    assert figures["by_position"] == [0.9, 0.6]
    assert figures_of(counted.since(counted))["mean_acceptance_length"] == 1
    assert (counted + counted).rounds == 20


@pytest.fixture
def engine_and_sidecar(target, serve, make_sidecar):  # noqa: F811
    engine = FakeEngine(target)
    with serve(engine.app) as url, serve(make_app(make_sidecar([url]))) as proxy, httpx.Client() as client:
        yield client, url, proxy, engine


def test_answers_through_the_sidecar_are_compared(engine_and_sidecar):
    client, engine, sidecar, _ = engine_and_sidecar
    found = answers_alike(client, engine, sidecar, PROMPTS, BODY, 8)
    assert found["same_bytes"] == 8
    assert (found["different"], found["failed"], found["first_different"]) == (0, 0, None)


def test_another_answer_would_be_seen(engine_and_sidecar, target, serve):  # noqa: F811
    client, engine, _, _ = engine_and_sidecar
    other = FakeEngine(target)
    other._answer = lambda prompt, count, k: [(7, {7: -0.5}) for _ in range(count)]
    with serve(other.app) as url:
        found = answers_alike(client, engine, url, PROMPTS, BODY, 8)
    assert found["different"] == 8
    assert found["first_different"]["path"] == "/v1/completions"


def test_streams_that_are_cut_elsewhere_hold_the_same():
    one = 'data: {"choices":[{"text":"a"}]}\n\ndata: {"choices":[{"text":"b","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    two = 'data: {"choices":[{"text":"ab","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    assert together(one) == together(two)
    assert together(one) != together(two.replace("ab", "ba"))


def test_live_requests_are_counted_and_timed(engine_and_sidecar, monkeypatch):
    client, engine, sidecar, fake = engine_and_sidecar
    assert live(client, sidecar, PROMPTS, BODY, 2) == {"requests": 2, "failed": 0, "failures": {}}
    assert seconds_a_token(client, sidecar, {}, {**BODY, "prompt": [5], "stream": True}) > 0
    monkeypatch.setattr(sidecar_traffic, "_QUIET", 0.0)
    assert settled(client, sidecar, 20.0)["rests"]
    fake.dies_after = 1
    assert live(client, sidecar, PROMPTS, BODY, 1)["failed"] == 1


def test_what_is_to_happen_does_while_requests_are_live(engine_and_sidecar):
    """And a request that finds nobody is sent again until somebody listens."""
    client, _, sidecar, fake = engine_and_sidecar
    happened, tries = [], []

    def down(request):
        tries.append(request)
        if len(tries) == 1:
            raise httpx.ConnectError("refused")
        return client.send(
            httpx.Request(request.method, request.url, content=request.content, headers=request.headers)
        )

    with httpx.Client(transport=httpx.MockTransport(down)) as flaky:
        found = live(flaky, sidecar, PROMPTS, BODY, 1, {1: lambda: happened.append(len(tries))}, 20.0)
        assert (found["failed"], happened, len(tries)) == (0, [2], 3)
        tries.clear()
        assert live(flaky, sidecar, PROMPTS, BODY, 1)["failures"] == {"ConnectError": 1}


PARENT = """
import http.server, subprocess, sys, threading
child = subprocess.Popen([sys.executable, "-c", "input()", "a child"], stdin=subprocess.PIPE)
threading.Thread(target=child.wait, daemon=True).start()
http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind="127.0.0.1")
"""


def test_programs_are_killed_with_their_children_and_started_again(tmp_path):
    port = free_port()
    with Programs(tmp_path, 20.0) as programs:
        programs.start("parent", [sys.executable, "-c", PARENT, str(port)])
        programs.wait_for(f"http://127.0.0.1:{port}")
        [child] = psutil.Process(programs._running["parent"].pid).children()
        programs.kill_child("a child", "parent")
        child.wait(20)  # raises if it lives
        with pytest.raises(LookupError, match="no child with a child"):
            programs.kill_child("a child", "parent")
        programs.kill("parent")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}")
        programs.start_again("parent")
        programs.wait_for(f"http://127.0.0.1:{port}")
        assert programs.ended("parent") == 0


def test_a_program_that_ends_is_told_with_its_log(tmp_path):
    with Programs(tmp_path, 20.0) as programs:
        programs.start("short", [sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)"])
        with pytest.raises(OSError, match=r"status 3:\nwhat went wrong"):
            programs.wait_for("http://127.0.0.1:9/health")
        assert programs.ended("short") == 1


def test_its_flags_are_checked():
    with pytest.raises(ValueError, match="requests"):
        SidecarCheckArguments(requests=0)
