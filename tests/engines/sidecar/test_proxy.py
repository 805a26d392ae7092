"""Answers through the sidecar are the engine's own, byte for byte, whatever is asked of it besides."""

import json
import logging
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from hf_osd.engines.sidecar.app import make_app
from hf_osd.engines.sidecar.status import progress_line

from .conftest import FakePusher, requests_to
from .fake_engine import FakeEngine, ids_of, text_of

PROMPT = text_of([9, 8, 7, 60, 33])
COMPLETION = ("/v1/completions", {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 0})
IDS = ("/v1/completions", {"model": "tiny", "prompt": ids_of(PROMPT), "max_tokens": 6})
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6})
PARTS = (
    "/v1/chat/completions",
    {"messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}], "max_tokens": 2},
)
OWN = [
    {},
    {"return_token_ids": True},
    {"logprobs": 1},
    {"logprobs": True, "top_logprobs": 2},
    {"stream_options": {"include_usage": True}},
]


def without_ids(response) -> bytes:
    return re.sub(rb"cmpl-\d+", b"cmpl-N", response.content)


def waiting(sidecar) -> list:
    return [] if sidecar._waiting.empty() else [sidecar._waiting.get_nowait(), *waiting(sidecar)]


@pytest.mark.parametrize("parser", [False, True], ids=["", "parser"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("own", OWN, ids=[next(iter(one), "nothing") for one in OWN])
@pytest.mark.parametrize(("path", "body"), [COMPLETION, IDS, CHAT, PARTS], ids=["completion", "ids", "chat", "parts"])
def test_the_same_bytes(target, through, make_sidecar, path, body, own, stream, parser):
    engine, sidecar = FakeEngine(target, parser=parser, pieces=2), make_sidecar()
    body = {**body, **own, "stream": stream}
    if path != CHAT[0] and own.get("logprobs") is True:
        body = {**body, "logprobs": 2}
    direct = requests_to(engine.app)("POST", path, json=body)
    answer = through(engine, sidecar)("POST", path, json=body)
    assert direct.status_code == answer.status_code == 200
    assert without_ids(answer) == without_ids(direct)
    assert answer.headers.get("content-type") == direct.headers.get("content-type")
    learnt = waiting(sidecar)
    if own.get("logprobs"):
        assert engine.seen[1][2] == body, "the client's own request"
        assert not learnt
    else:
        assert engine.seen[1][2]["return_token_ids"] is True
        assert len(learnt) == 1


def test_all_else_passes_through(target, through):
    engine = FakeEngine(target)
    answer = through(engine)(
        "PUT", "/v1/anything?a=1&b=%20x", content=b"body", headers={"x-own": "2", "authorization": "Bearer t"}
    )
    assert (answer.status_code, answer.text) == (207, "PUT a=1&b=%20x body")
    assert answer.headers["x-own"] == "1"
    _, headers, _ = engine.seen[0]
    assert (headers["x-own"], headers["authorization"]) == ("2", "Bearer t")
    assert through(engine)("GET", "/v1/models").json()["data"][0]["id"] == "tiny"
    assert through(engine)("GET", "/v1/none").status_code == 404


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff\xfe", b'{"prompt": 3}'])
def test_malformed_requests_get_the_engines_answer(target, through, body):
    engine = FakeEngine(target, refuses="prompt")
    send = through(engine)
    if body.startswith(b'{"'):
        answer = send("POST", "/v1/completions", content=body)
        assert answer.status_code == 400
        return
    with pytest.raises(Exception):  # noqa: B017, PT011 (the fake engine fails on it, and did get it)
        send("POST", "/v1/completions", content=body)


def test_a_private_request_is_asked_for_nothing_more_and_teaches_nothing(target, through, make_sidecar):
    engine, sidecar = FakeEngine(target), make_sidecar()
    send = through(engine, sidecar)
    path, body = COMPLETION
    send("POST", path, json=body, headers={"X-OSD-Private": "1", "X-OSD-Tenant": "acme"})
    _, headers, seen = engine.seen[0]
    assert seen == body
    assert not {name for name in headers if name.startswith("x-osd")}
    assert not waiting(sidecar)
    assert sidecar.counts["private"] == 1
    send("POST", path, json=body, headers={"X-OSD-Private": "0"})
    assert len(waiting(sidecar)) == 1


def test_tenants_and_sampling_come_with_the_feedback(target, through, make_sidecar):
    sidecar, seen = make_sidecar(update_interval=1000), []
    sidecar.assistant.on_feedback = lambda feedback, label: seen.append((feedback.sampled, label))
    send = through(FakeEngine(target), sidecar)
    path, body = COMPLETION
    send("POST", path, json=body, headers={"X-OSD-Tenant": "acme"})
    send("POST", path, json={**body, "temperature": 1.0})
    for answer in waiting(sidecar):
        sidecar._learn([answer])
    assert seen == [(False, "acme"), (True, None)]
    [greedy, _] = sidecar.assistant.buffer.requests()
    assert greedy.tokens[: greedy.prompt_length].tolist() == ids_of(PROMPT)


@pytest.mark.parametrize(("path", "body"), [COMPLETION, CHAT], ids=["completion", "chat"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_refuses_is_sent_the_clients_own_and_not_asked_again(
    target, through, make_sidecar, path, body, stream, caplog
):
    engine, sidecar = FakeEngine(target, refuses="return_token_ids"), make_sidecar()
    send, body = through(engine, sidecar), {**body, "stream": stream}
    direct = requests_to(engine.app)("POST", path, json=body)
    for _ in range(3):
        answer = send("POST", path, json=body)
        assert (answer.status_code, without_ids(answer)) == (200, without_ids(direct))
    assert len(engine.seen) == 1 + 2 + 1 + 1
    assert not waiting(sidecar)
    assert sum("refuses requests" in record.message for record in caplog.records) == 1
    other = {**body, "stream": not stream}
    send("POST", path, json=other)
    assert len(engine.seen) == 7, "another kind is asked for itself"


def test_a_request_that_is_wrong_itself_gives_nothing_up(target, through, make_sidecar):
    engine, sidecar = FakeEngine(target, refuses="bad"), make_sidecar()
    send, (path, body) = through(engine, sidecar), COMPLETION
    answer = send("POST", path, json={**body, "bad": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "no bad"
    send("POST", path, json=body)
    assert len(waiting(sidecar)) == 1


def test_an_error_amid_a_stream_passes_and_teaches_nothing(target, through, make_sidecar):
    engine, sidecar = FakeEngine(target, errs_after=2), make_sidecar()
    path, body = COMPLETION
    body = {**body, "stream": True}
    direct = requests_to(engine.app)("POST", path, json=body)
    assert b'"error"' in direct.content
    assert without_ids(through(engine, sidecar)("POST", path, json=body)) == without_ids(direct)
    assert not waiting(sidecar)
    assert len(engine.seen) == 2, "what has begun is not sent again"


def test_a_refusal_within_a_stream_is_one_too(target, through, make_sidecar):
    engine, sidecar = FakeEngine(target, errs_after=0, errs_on="logprobs"), make_sidecar()
    path, body = COMPLETION
    body = {**body, "stream": True}
    direct = requests_to(engine.app)("POST", path, json=body)
    assert b'"error"' not in direct.content
    send = through(engine, sidecar)
    for _ in range(2):
        assert without_ids(send("POST", path, json=body)) == without_ids(direct)
    assert len(engine.seen) == 1 + 2 + 1
    assert sidecar.counts["refused"] == 1


def test_a_share_of_the_requests_teaches(target, through, make_sidecar):
    sidecar = make_sidecar(options={"share": 0.5, "seed": 0})
    send, (path, body) = through(FakeEngine(target), sidecar), COMPLETION
    for _ in range(20):
        send("POST", path, json={**body, "max_tokens": 1})
    assert 4 <= len(waiting(sidecar)) <= 16


def test_a_queue_that_is_full_drops_answers_and_no_request(target, through, make_sidecar, monkeypatch):
    monkeypatch.setattr("hf_osd.engines.sidecar.sidecar._MOST_WAITING", 2)
    sidecar = make_sidecar()
    send, (path, body) = through(FakeEngine(target), sidecar), COMPLETION
    assert [send("POST", path, json={**body, "max_tokens": 1}).status_code for _ in range(4)] == [200] * 4
    assert sidecar.counts["dropped"] == 2


def broken_off(url: str, body: dict) -> bytes:
    """What comes of a stream whose connection is closed before its end."""
    got = []
    with httpx.Client() as client, client.stream("POST", url, json=body) as answer:
        assert answer.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            got.extend(answer.iter_bytes())
    return b"".join(got)


def test_an_engine_that_dies_in_mid_stream_closes_the_connection_as_it_would(target, serve, make_sidecar, caplog):
    engine = FakeEngine(target, dies_after=3)
    path, body = COMPLETION
    body = {**body, "stream": True}
    with serve(engine.app) as url, serve(make_app(sidecar := make_sidecar([url]))) as proxy:
        got = {at: broken_off(at + path, body) for at in (url, proxy)}
        ours, own = (re.sub(rb"cmpl-\d+", b"N", got[at]) for at in (proxy, url))
        assert own.startswith(ours)
        assert ours.count(b"data: {") == 3
        engine.dies_after = None
        assert httpx.post(proxy + path, json=body).status_code == 200
    assert sidecar.counts["failed"] == 1
    assert sidecar.counts["read"] == 1, "half an answer teaches nothing"


class Stalls(BaseHTTPRequestHandler):
    """Answers one request a connection, and closes it when it has read another: as a server does whose timer for idle connections was late."""

    protocol_version, answers = "HTTP/1.1", True

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.server.seen.append(self.path)
        if self.answers:
            self.answers = False  # of this connection
            self.send_response(200)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")
        else:
            self.close_connection = True
            if self.server.dies:
                self.server.socket.close()

    def log_message(self, *args):
        pass


@pytest.fixture
def stalling():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stalls)
    server.daemon_threads, server.seen, server.dies = True, [], False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join(20)
    server.server_close()


def test_a_request_on_a_connection_that_an_engine_was_about_to_close_is_sent_again(stalling, serve, make_sidecar):
    url = f"http://127.0.0.1:{stalling.server_address[1]}"
    with serve(make_app(sidecar := make_sidecar([url]))) as proxy, httpx.Client() as client:
        for _ in range(3):
            assert client.post(proxy + COMPLETION[0], json=COMPLETION[1]).status_code == 200
        assert len(stalling.seen) == 5, "the second and the third are sent twice"
        assert client.post(proxy + "/v1/responses", json={}).status_code == 502, "it may keep something"
        assert len(stalling.seen) == 6
    assert sidecar.counts["failed"] == 1


def test_a_request_that_an_engine_may_have_died_of_is_sent_to_no_other(stalling, target, serve, make_sidecar):
    other = FakeEngine(target)
    with serve(other.app) as second:
        urls = [f"http://127.0.0.1:{stalling.server_address[1]}", second]
        with serve(make_app(make_sidecar(urls))) as proxy, httpx.Client() as client:
            for _ in range(2):
                assert client.post(proxy + COMPLETION[0], json=COMPLETION[1]).status_code == 200
            stalling.dies, before = True, len(other.seen)
            assert client.post(proxy + COMPLETION[0], json=COMPLETION[1]).status_code == 502
            assert len(other.seen) == before
            assert client.post(proxy + COMPLETION[0], json=COMPLETION[1]).status_code == 200


def test_an_engine_that_is_down_is_passed_by_and_comes_back(target, serve, make_sidecar):
    one, two = FakeEngine(target), FakeEngine(target)
    path, body = COMPLETION
    with (
        serve(one.app) as first,
        serve(two.app) as second,
        serve(make_app(make_sidecar([first, second]))) as proxy,
        httpx.Client() as client,
    ):
        for _ in range(4):
            assert client.post(proxy + path, json=body).status_code == 200
        assert (len(one.seen), len(two.seen)) == (2, 2), "by turns"
    with serve(two.app) as second, serve(make_app(make_sidecar([first, second]))) as proxy, httpx.Client() as client:
        for _ in range(4):
            assert client.post(proxy + path, json=body).status_code == 200
        assert (len(one.seen), len(two.seen)) == (2, 6)


def test_without_any_engine_a_request_is_told_so(serve, make_sidecar, target):
    with serve(FakeEngine(target).app) as gone:
        pass
    with serve(make_app(make_sidecar([gone]))) as proxy:
        answer = httpx.post(proxy + COMPLETION[0], json=COMPLETION[1])
        assert answer.status_code == 503
        assert "No engine answers" in answer.json()["error"]["message"]


def test_a_client_that_leaves_ends_the_engines_work(target, serve, make_sidecar):
    engine = FakeEngine(target)
    left, over = threading.Event(), threading.Event()

    async def endless(scope, receive, send):
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        )
        await send({"type": "http.response.body", "body": b": here\n\n", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        over.set()

    with serve(endless) as url, serve(make_app(make_sidecar([url]))) as proxy:
        with (
            httpx.Client() as client,
            client.stream("POST", proxy + CHAT[0], json={**CHAT[1], "stream": True}) as answer,
        ):
            next(answer.iter_raw())
            left.set()
        assert over.wait(20)
    assert not engine.seen


def test_the_dashboard_shows_figures_that_there_are(target, through, make_sidecar, tmp_path):
    sidecar = make_sidecar(pusher=FakePusher(tmp_path))
    text = through(FakeEngine(target), sidecar)("GET", "/metrics").text
    shown = json.loads((Path(__file__).parents[3] / "docs/grafana.json").read_text(encoding="utf-8"))
    named = {
        n for panel in shown["panels"] for one in panel["targets"] for n in re.findall(r"hf_osd_\w+", one["expr"])
    }
    assert len(named) > 15
    assert not [name for name in named if f"\n# TYPE {name} " not in text]
    assert 'hf_osd_engine_accepted_at_total{engine="http://engine",position="1"} 6.0' in text


def test_the_status_has_the_counters_that_the_pusher_read(target, through, make_sidecar, tmp_path):
    sidecar = make_sidecar(pusher=FakePusher(tmp_path))
    send = through(FakeEngine(target), sidecar)
    text = send("GET", "/status").text
    assert re.search(r"http://engine: 10 rounds, mean acceptance length 2.50*, by position 0.90 0.60", text)
    assert "http://down: no counters" in text
    told = send("GET", "/status", headers={"accept": "application/json"}).json()["acceptance"]
    assert (told["http://engine"]["accepted"], told["http://down"]) == (15, None)
    assert "mean acceptance length 2.5" in progress_line(sidecar.figures())


def test_no_prompt_is_in_logs_metrics_or_status(target, through, make_sidecar, tmp_path, caplog):
    sidecar = make_sidecar()
    send = through(FakeEngine(target), sidecar)
    with caplog.at_level(logging.DEBUG):
        for path, body in (COMPLETION, IDS, CHAT):
            send("POST", path, json={**body, "stream": True})
        for answer in waiting(sidecar):
            sidecar._guarded(sidecar._learn, [answer])
        sidecar._guarded(sidecar._learn, [("broken " + PROMPT, False, None)])
        shown = [
            send("GET", "/metrics"),
            send("GET", "/status"),
            send("GET", "/status", headers={"accept": "application/json"}),
        ]
    assert [one.status_code for one in shown] == [200] * 3
    texts = [caplog.text, *(one.text for one in shown)]
    secrets = [PROMPT, json.dumps(PROMPT), ", ".join(map(str, ids_of(PROMPT)))]
    assert not [secret for secret in secrets for text in texts if secret in text]
    assert "hf_osd_taught_total 3.0" in shown[0].text
    assert "3 requests" in shown[1].text
    assert shown[2].json()["counts"]["taught"] == 3
