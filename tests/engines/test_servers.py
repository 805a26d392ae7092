"""Servers of engines over HTTP: how weights get in, what is read of their counters, and how an engine is found out."""

import json

import httpx
import pytest

from hf_osd.engines import servers
from hf_osd.engines.counters import Counted
from hf_osd.engines.servers import PushFailed, SglangServer, VllmServer, connect

METRICS = """\
# TYPE vllm:spec_decode_num_drafts counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="tiny"} 10.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="tiny"} 1.7e+09
# TYPE vllm:spec_decode_num_draft_tokens counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="tiny"} 30.0
# TYPE vllm:spec_decode_num_accepted_tokens counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="tiny"} 15.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="0"} 9.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="1"} 6.0
# TYPE vllm:request_success counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"} 2.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"} 1.0
"""
OWN = ("/start_draft_weight_update", "/update_weights", "/finish_weight_update")
DEV = ("/pause", "/collective_rpc", "/resume")
PUSH = ["/collective_rpc", *DEV]  # would the workers take it?


class Engine:
    """Answers as vLLM does; `fails` maps routes to a status, or to one for each time (`None`: the connection is reset), `down` breaks connections, `wrong` is what its workers have against a draft."""

    def __init__(self, routes=(*OWN, *DEV), kind="/version", most=20):
        self.routes, self.kind, self.most = routes, kind, most
        self.fails, self.asked, self.down, self.metrics = {}, [], False, METRICS
        self.wrong, self.paused, self.kept, self.says = [], False, 0, "what went wrong"

    def __call__(self, request):
        route = request.url.path
        if self.down:
            raise httpx.ConnectError("refused")
        if route in (self.kind, "/health"):
            return httpx.Response(200, json={})
        if route == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        if route == "/v1/completions":
            return httpx.Response(200 if json.loads(request.content)["logprobs"] <= self.most else 400)
        if route == "/metrics":
            return httpx.Response(200, text=self.metrics)
        if route == "/openapi.json":
            return httpx.Response(200, json={"paths": {one: {} for one in self.routes}})
        if route not in self.routes:
            return httpx.Response(404)
        body = json.loads(request.content or "null")
        self.asked.append((route, body, dict(request.url.params)))
        self.kept += request.headers["connection"] != "close"
        status = self.fails.get(route, 200)
        if isinstance(status, list):
            status = status.pop(0) if status else 200
        if status is None:
            raise httpx.ReadError("reset by peer")
        if route == "/pause" or (route == "/resume" and status == 200):
            self.paused = route == "/pause"
        if status == 200 and (body or {}).get("method") == "check_draft":
            return httpx.Response(200, json={"results": [self.wrong, self.wrong]})  # of two workers
        return httpx.Response(status, text=self.says)

    def connected(self):
        return connect("http://engine:8000/", httpx.Client(transport=httpx.MockTransport(self)))

    @property
    def order(self):
        return [route for route, *_ in self.asked]


def test_an_engine_that_takes_a_path_updates_its_draft_itself(tmp_path):
    engine = Engine()
    server = engine.connected()
    assert isinstance(server, VllmServer)
    assert (server.url, server.model, server.max_logprobs) == ("http://engine:8000", "tiny", 20)
    server.push(tmp_path)
    assert engine.order == list(OWN)
    assert engine.asked[1][1] == {"update_info": {"path": str(tmp_path)}}


@pytest.mark.parametrize("broken", OWN[:2])
def test_one_that_takes_none_has_the_extension_asked_between_pause_and_resume(tmp_path, broken):
    engine = Engine()
    engine.fails = {broken: 500}
    server = engine.connected()
    server.push(tmp_path)
    assert engine.order[-4:] == PUSH
    assert engine.asked[-4][1] == {"method": "check_draft", "args": [str(tmp_path)]}
    assert engine.asked[-3][2] == {"mode": "wait"}
    assert engine.asked[-2][1] == {"method": "refresh_draft", "args": [str(tmp_path)]}
    before = len(engine.asked)
    server.push(tmp_path)
    assert engine.order[before:] == PUSH, "what it takes is known now"


def test_another_draft_is_refused_before_the_engine_pauses(tmp_path):
    engine = Engine(DEV)
    engine.wrong = ["`hidden_size` is 32 in the folder and 64 in the engine."]
    with pytest.raises(PushFailed, match=r"`hidden_size` is 32 .* 64 in the engine\. Start the engine with") as failed:
        engine.connected().push(tmp_path)
    assert engine.order == ["/collective_rpc"]
    assert failed.value.refused
    assert str(failed.value).count("hidden_size") == 1, "of all workers once"


@pytest.mark.parametrize(("answer", "says"), [(500, "500: what went wrong"), (None, "gave no results")])
def test_a_check_that_fails_is_tried_again_later(tmp_path, answer, says):
    engine = Engine(DEV)
    engine.fails = {"/collective_rpc": 500} if answer else {}
    engine.wrong = [] if answer else None
    with pytest.raises(PushFailed, match=says) as failed:
        engine.connected().push(tmp_path)
    assert engine.order == ["/collective_rpc"]
    assert not failed.value.refused


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited, which no test does."""
    waited = []
    monkeypatch.setattr(servers.time, "sleep", waited.append)
    return waited


def test_a_failed_refresh_lets_the_waiting_requests_go_on(tmp_path):
    engine = Engine(DEV)
    engine.fails = {"/collective_rpc": [200, 500]}
    with pytest.raises(PushFailed, match="500: what went wrong") as failed:
        engine.connected().push(tmp_path)
    assert engine.order == PUSH
    assert not engine.kept, "vLLM's server resets the connection, after a while"
    assert not failed.value.refused


def test_a_pause_whose_answer_is_lost_does_not_last(tmp_path):
    engine = Engine(DEV)
    engine.fails = {"/pause": 500}
    with pytest.raises(PushFailed, match="/pause answered 500"):
        engine.connected().push(tmp_path)
    assert engine.order == ["/collective_rpc", "/pause", "/resume"]


@pytest.mark.parametrize("refresh", [200, 500])
def test_a_resume_that_fails_is_tried_again_soon(tmp_path, waits, refresh):
    engine = Engine(DEV)
    engine.fails = {"/collective_rpc": [200, refresh], "/resume": [None, 503, 500]}
    server = engine.connected()
    if refresh == 200:
        server.push(tmp_path)
    else:
        with pytest.raises(PushFailed, match="/collective_rpc answered 500"):
            server.push(tmp_path)
    assert engine.order == [*PUSH, *["/resume"] * 3]
    assert not engine.paused
    assert 0 < sum(waits) < 5
    server.resume()
    assert engine.order == [*PUSH, *["/resume"] * 3], "it is known to run"


def test_an_engine_that_stays_paused_is_named_and_resumed_first_by_the_next_push(tmp_path, waits):
    engine = Engine(DEV)
    engine.fails = {"/resume": 500}
    server = engine.connected()
    with pytest.raises(PushFailed, match=r"paused still.*POST http://engine:8000/resume") as failed:
        server.push(tmp_path)
    assert not failed.value.refused
    assert sum(waits) < 10
    engine.fails, engine.asked, engine.wrong = {}, [], ["It is another."]
    with pytest.raises(PushFailed, match="It is another"):
        server.push(tmp_path)
    assert engine.order == ["/resume", "/collective_rpc"]
    assert not engine.paused


def test_one_that_is_resumed_while_it_pauses_is_not_refreshed(tmp_path):
    """As closing does, which waits for no push."""
    engine = Engine(DEV)
    server = engine.connected()
    post = server._post

    def during(route, **kwargs):
        answer = post(route, **kwargs)
        if route == "/pause":
            server.resume()
        return answer

    server._post = during
    with pytest.raises(PushFailed, match="before it had the weights"):
        server.push(tmp_path)
    assert engine.order == ["/collective_rpc", "/pause", "/resume"]


def test_one_that_has_taken_a_path_and_fails_once_is_not_given_up(tmp_path):
    engine = Engine()
    server = engine.connected()
    server.push(tmp_path)
    engine.fails, engine.asked = {"/update_weights": 503}, []
    with pytest.raises(PushFailed, match="503"):
        server.push(tmp_path)
    assert engine.order == list(OWN), "the update that was begun is ended"
    engine.fails = {}
    server.push(tmp_path)
    assert engine.order == list(OWN) * 2


def test_one_without_any_way_in_is_told_how_it_must_be_started(tmp_path):
    with pytest.raises(PushFailed, match="VLLM_SERVER_DEV_MODE=1") as failed:
        Engine(()).connected().push(tmp_path)
    assert failed.value.refused


def test_so_is_one_whose_workers_are_without_the_extension_before_it_pauses(tmp_path):
    engine = Engine(DEV)
    engine.fails = {"/collective_rpc": 500}
    engine.says = "Worker failed with error ''CPUWorker' object has no attribute 'check_draft''"
    with pytest.raises(PushFailed, match="--worker-extension-cls") as failed:
        engine.connected().push(tmp_path)
    assert failed.value.refused
    assert engine.order == ["/collective_rpc"]


def test_one_that_is_down_has_no_counters_and_takes_nothing(tmp_path):
    engine = Engine()
    server = engine.connected()
    assert server.is_up()
    engine.down = True
    assert not server.is_up()
    assert server.acceptance() is None
    with pytest.raises(PushFailed, match="cannot be reached") as failed:
        server.push(tmp_path)
    assert not failed.value.refused


def test_counters_are_read_and_compared():
    engine = Engine()
    server = engine.connected()
    counted = server.acceptance()
    assert counted == Counted(10, 30, 15, (9, 6), 3, 1.7e9)
    assert counted.mean_length == 2.5
    assert counted.since(Counted(4, 10, 5, (5,), 1)) == Counted(6, 20, 10, (4, 6), 2)
    assert counted.since(Counted(11, 33, 20, (12, 8))) == counted, "it has begun anew since"
    assert counted.since(Counted(4, 10, 5, (5,), 1, 1.6e9)) == counted, "it has begun anew, and passed the old ones"
    assert counted.since(None) == counted
    assert (counted + counted).answers == 6
    assert (counted + Counted()).answers is None
    line = 'vllm:spec_decode_num_drafts_created{engine="1",model_name="tiny"} 1.8e+09\n'
    engine.metrics = METRICS + line
    assert server.acceptance().created == 1.7e9, "an engine that is added is no restart"
    engine.metrics = METRICS.replace("_created", "_other").replace("request_success", "other")
    assert server.acceptance() == Counted(10, 30, 15, (9, 6)), "as a server of several processes tells it"
    engine.metrics = "# nothing of speculation\n"
    assert server.acceptance() is None


@pytest.mark.parametrize(("most", "found"), [(20, 20), (12, 10), (3, 1), (0, 0)])
def test_log_probs_are_as_many_as_it_gives(most, found):
    assert Engine(most=most).connected().max_logprobs == found


def test_sglang_is_told_apart_and_takes_no_draft(tmp_path):
    server = Engine((), kind="/get_model_info").connected()
    assert isinstance(server, SglangServer)
    assert server.acceptance() is None
    with pytest.raises(PushFailed, match="SGLang") as failed:
        server.push(tmp_path)
    assert failed.value.refused


def test_what_is_no_engine_or_not_there_is_said():
    with pytest.raises(ValueError, match="neither vLLM nor SGLang"):
        Engine(kind="/none").connected()
    engine = Engine()
    engine.down = True
    with pytest.raises(OSError, match="start the engine first"):
        engine.connected()
