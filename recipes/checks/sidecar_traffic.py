"""Sends requests to an engine and through a sidecar, and compares what comes."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import httpx

from hf_osd.engines.counters import Counted

# What may differ between two answers to one request.
_IDS = re.compile(r'"(id|created)":\s*("[^"]*"|\d+)')
# Seconds without a new update or push after which learning has come to rest.
_QUIET = 20.0


def figures_of(counted: Counted) -> dict:
    """Return an engine's counters, the mean acceptance length, and the share of rounds that accepted each position."""
    rounds = counted.rounds or 1
    return {
        "rounds": counted.rounds,
        "drafted": counted.drafted,
        "accepted": counted.accepted,
        "mean_acceptance_length": 1 + counted.accepted / rounds,
        "by_position": [accepted / rounds for accepted in counted.by_position],
    }


def live(
    client: httpx.Client,
    sidecar: str,
    prompts: list[list[int]],
    body: dict,
    at_once: int,
    events: Mapping[int, Callable[[], None]] | None = None,
    patience: float = 0.0,
) -> dict:
    """Send prompts through the sidecar, every other one streamed; count those that fail.

    Args:
        events: what is to happen when the request of this number is due, while those before it are under way.
        patience: seconds for which a request that finds nobody listening is sent again.
    """

    def one(numbered: tuple[int, list[int]]) -> str | None:
        number, prompt = numbered
        (events or {}).get(number, lambda: None)()
        request, until = {**body, "prompt": prompt, "stream": bool(number % 2)}, time.monotonic() + patience
        while True:
            try:
                answer = client.post(f"{sidecar}/v1/completions", json=request)
            except httpx.HTTPError as error:
                if isinstance(error, httpx.ConnectError) and time.monotonic() < until:
                    time.sleep(0.5)
                    continue
                return type(error).__name__
            whole = answer.text.rstrip().endswith("data: [DONE]") if number % 2 else answer.status_code == 200
            return None if answer.status_code == 200 and whole else f"status {answer.status_code}"

    with ThreadPoolExecutor(at_once) as threads:
        failures = Counter(filter(None, threads.map(one, enumerate(prompts))))
    return {"requests": len(prompts), "failed": sum(failures.values()), "failures": dict(failures)}


def settled(client: httpx.Client, sidecar: str, patience: float) -> dict:
    """Wait until learning and pushing rest, and tell for how long that took."""
    began = changed = time.monotonic()
    before = None
    while time.monotonic() - began < patience:
        status = client.get(f"{sidecar}/status", headers={"accept": "application/json"}).json()
        now = (status["waiting"], status["learning"]["updates"], status["draft_version"], status["pushes"])
        if now != before:
            before, changed = now, time.monotonic()
        elif time.monotonic() - changed >= _QUIET:
            break
        time.sleep(1.0)
    return {"seconds": time.monotonic() - began, "rests": time.monotonic() - changed >= _QUIET}


def answers_alike(
    client: httpx.Client, engine: str, sidecar: str, prompts: list[list[int]], body: dict, count: int
) -> dict:
    """Compare answers through the sidecar with the engine's own, in turn as completions and chats, whole and streamed, with and without log-probs of the client's.

    Each request goes to the engine, through the sidecar and to the engine again: the answer must be one of the engine's two, which differ where it differs with
    itself. Chunks of a stream may be cut elsewhere, by the clock; what they hold together may not.

    Returns:
        `dict`: `same_bytes`; `same_events`, the streams whose chunks were cut elsewhere; `different`; `engine_differs`, how often the engine's own two answers differ;
            `failed`; and `first_different`, the kind of request, without any text.
    """
    seen: Counter[str] = Counter(same_bytes=0, same_events=0, different=0, engine_differs=0, failed=0)
    first = None
    for number in range(count):
        path, request = _kind(number, prompts[number % len(prompts)], body)
        try:
            own, through, again = (client.post(f"{at}{path}", json=request) for at in (engine, sidecar, engine))
        except httpx.HTTPError:
            seen["failed"] += 1
            continue
        seen["failed"] += through.status_code != own.status_code
        ours, *theirs = [_IDS.sub(r'"\1":0', one.text) for one in (through, own, again)]
        seen["engine_differs"] += theirs[0] != theirs[1]
        if ours in theirs:
            seen["same_bytes"] += 1
        elif request.get("stream") and together(ours) in map(together, theirs):
            seen["same_events"] += 1
        else:
            seen["different"] += 1
            first = first or {"path": path, **{k: request.get(k) for k in ("stream", "logprobs", "top_logprobs")}}
    return {"requests": count, **seen, "first_different": first}


def _kind(number: int, prompt: list[int], body: dict) -> tuple[str, dict]:
    """Make the number-th request to compare. Of chats the prompt is only some text: words made of ids."""
    chat, stream, own = number % 2, number // 2 % 2, number // 4 % 2
    if chat:
        words = " ".join(f"word{i % 97}" for i in prompt[:16])
        request = {**body, "messages": [{"role": "user", "content": words}]}
        more = {"logprobs": True, "top_logprobs": 3}
    else:
        request, more = {**body, "prompt": prompt}, {"logprobs": 3}
    if stream:
        request |= {"stream": True, "stream_options": {"include_usage": True}}
    return ("/v1/chat/completions" if chat else "/v1/completions"), {**request, **(more if own else {})}


def together(stream: str) -> str:
    """Join what the chunks of a stream hold: text, log-probs, ends and usage."""
    text, logprobs, rest = [], [], []
    for event in stream.split("\n\n"):
        data = event.removeprefix("data: ")
        if not data.startswith("{"):
            continue
        chunk = json.loads(data)
        for choice in chunk.get("choices", ()):
            text.append(choice.get("text") or (choice.get("delta") or {}).get("content") or "")
            given = choice.get("logprobs") or {}
            logprobs += given.get("content") or list(
                zip(given.get("tokens", ()), given.get("top_logprobs", ()), strict=False)
            )
            rest.append(choice.get("finish_reason"))
        rest.append(chunk.get("usage"))
    return json.dumps(["".join(text), logprobs, [one for one in rest if one]])


def seconds_a_token(client: httpx.Client, url: str, headers: dict, request: dict) -> float:
    """Stream an answer of `max_tokens` tokens; return the seconds a token after the first chunk."""
    with client.stream("POST", f"{url}/v1/completions", json=request, headers=headers) as answer:
        answer.raise_for_status()
        times = [time.perf_counter() for line in answer.iter_lines() if line.startswith("data: {")]
    return (times[-1] - times[0]) / max(request["max_tokens"] - 1, 1)
