"""An engine for tests: it speaks vLLM 0.32's formats of completions and chats, and a causal LM answers. Text is one character a token."""

import asyncio
import itertools
import json

import torch
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

_FIRST = 0x4E00  # so that no prompt of a test is by chance in a log


def text_of(ids) -> str:
    return "".join(chr(_FIRST + int(i)) for i in ids)


def ids_of(text: str) -> list[int]:
    return [(ord(c) - _FIRST) % 64 for c in text]


class FakeEngine:
    """Answers as `model` does.

    Args:
        model: a causal LM.
        limit: log-probs that may be asked for.
        refuses: a field whose requests it refuses with 400.
        parser: chats hold every second token back, as parsers of reasoning do.
        dies_after: chunks after which a stream breaks off.
        errs_after: chunks after which a stream has an error in it; of requests with `errs_on`, if that is given.
    """

    def __init__(
        self, model, limit=20, refuses=None, parser=False, dies_after=None, pieces=1, errs_after=None, errs_on=None
    ):
        self.model, self.limit, self.refuses, self.parser = model, limit, refuses, parser
        self.errs_after, self.errs_on = errs_after, errs_on
        self.dies_after, self.pieces, self.numbers = dies_after, pieces, itertools.count()
        self.seen: list[tuple[str, dict, dict]] = []  # path, headers, body
        self.name, self.cancelled = "tiny", 0
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/anything", self._anything, methods=["GET", "POST", "PUT"]),
            ]
        )

    @torch.no_grad()
    def _answer(self, prompt: list[int], count: int, k: int):
        tokens, out = list(prompt), []
        for _ in range(count):
            logps = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float().log_softmax(-1)
            token = int(logps.argmax())
            ids = dict.fromkeys([token, *logps.topk(k).indices.tolist()])
            out.append((token, {i: float(logps[i]) for i in ids}))
            tokens.append(token)
        return out

    async def _read(self, request):
        body = json.loads(await request.body())
        self.seen.append((request.url.path, dict(request.headers), body))
        if self.refuses is not None and body.get(self.refuses):
            return body, JSONResponse({"error": {"message": f"no {self.refuses}", "code": 400}}, status_code=400)
        asked = body.get("top_logprobs") or body.get("logprobs") or 0
        if asked > self.limit:
            return body, JSONResponse({"error": {"message": "too many logprobs", "code": 400}}, status_code=400)
        return body, None

    async def _completions(self, request):
        body, refused = await self._read(request)
        if refused is not None:
            return refused
        prompt = body["prompt"] if isinstance(body["prompt"], list) else ids_of(body["prompt"])
        wants, as_ids, k = body.get("return_token_ids"), body.get("return_tokens_as_token_ids"), body.get("logprobs")
        answer = self._answer(prompt, body.get("max_tokens", 16), k or 0)

        def logprobs(part):
            if k is None:
                return None
            name = (lambda i: f"token_id:{i}") if as_ids else (lambda i: text_of([i]))
            return {
                "text_offset": list(range(len(part))),
                "token_logprobs": [row[token] for token, row in part],
                "tokens": [name(token) for token, _ in part],
                "top_logprobs": [{name(i): p for i, p in row.items()} for _, row in part],
            }

        def choice(part, first, last):
            return {
                "index": 0,
                "text": text_of(token for token, _ in part),
                "logprobs": logprobs(part),
                "finish_reason": "length" if last else None,
                "stop_reason": None,
                "prompt_token_ids": prompt if wants and first else None,
                "token_ids": [token for token, _ in part] if wants else None,
            }

        head = {"id": f"cmpl-{next(self.numbers)}", "object": "text_completion", "created": 0, "model": self.name}
        if not body.get("stream"):
            usage = {"prompt_tokens": len(prompt), "completion_tokens": len(answer), "metric": 1e-07}
            return JSONResponse({**head, "choices": [choice(answer, True, True)], "usage": usage, "metrics": None})
        return self._stream({**head, "choices": [choice(part, i == 0, last)]} for i, part, last in self._parts(answer))

    async def _chat(self, request):
        body, refused = await self._read(request)
        if refused is not None:
            return refused
        prompt = [2, *itertools.chain.from_iterable(ids_of(str(m["content"])) for m in body["messages"]), 3]
        wants, as_ids = body.get("return_token_ids"), body.get("return_tokens_as_token_ids")
        k = body.get("top_logprobs", 0) if body.get("logprobs") else None
        answer = self._answer(prompt, body.get("max_tokens", 16), k or 0)
        name = (lambda i: f"token_id:{i}") if as_ids else (lambda i: text_of([i]))

        def one(i, logp):
            return {"token": name(i), "logprob": logp, "bytes": list(name(i).encode())}

        def logprobs(part):
            if k is None:
                return None
            return {
                "content": [
                    {**one(token, row[token]), "top_logprobs": [one(i, p) for i, p in list(row.items())[:k]]}
                    for token, row in part
                ]
            }

        head = {"id": f"chatcmpl-{next(self.numbers)}", "object": "chat.completion", "created": 0, "model": self.name}
        if not body.get("stream"):
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": text_of(t for t, _ in answer), "tool_calls": []},
                "logprobs": logprobs(answer),
                "finish_reason": "length",
                "token_ids": [t for t, _ in answer] if wants else None,
            }
            return JSONResponse({**head, "choices": [choice], "prompt_token_ids": prompt if wants else None})

        def chunks():
            delta = {"role": "assistant", "content": ""}
            first = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
            yield {**head, "choices": [first], "prompt_token_ids": prompt if wants else None, "prompt_text": None}
            held = ""
            for i, part, last in self._parts(answer):
                held += text_of(token for token, _ in part)
                keep = self.parser and i % 2 == 0 and not last
                if keep and not wants and k is None:
                    continue
                delta, held = ({}, held) if keep else ({"content": held}, "")
                choice = {"index": 0, "delta": delta, "logprobs": logprobs(part)}
                choice["finish_reason"] = "length" if last else None
                choice["token_ids"] = [token for token, _ in part] if wants else None
                yield {**head, "choices": [choice]}
            if (body.get("stream_options") or {}).get("include_usage"):
                yield {**head, "choices": [], "usage": {"completion_tokens": len(answer)}}

        return self._stream(chunks())

    def _parts(self, answer):
        parts = [answer[i : i + self.pieces] for i in range(0, len(answer), self.pieces)]
        return [(i, part, i == len(parts) - 1) for i, part in enumerate(parts)]

    def _stream(self, chunks):
        async def events():
            try:
                yield b": keep-alive\n\n"
                for i, chunk in enumerate(chunks):
                    if i == self.dies_after:
                        raise ConnectionAbortedError
                    if i == self.errs_after and (self.errs_on is None or self.seen[-1][2].get(self.errs_on)):
                        yield b'data: {"error":{"message":"something","code":500}}\n\n'
                        break
                    # As pydantic writes JSON, which is not as Python does: floats above all.
                    text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).replace("e-0", "e-")
                    yield f"data: {text}\n\n".encode()
                    await asyncio.sleep(0)
                yield b"data: [DONE]\n\n"
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _models(self, request):
        return JSONResponse({"object": "list", "data": [{"id": self.name}]})

    async def _anything(self, request):
        body = await request.body()
        self.seen.append((request.url.path, dict(request.headers), {}))
        return PlainTextResponse(
            f"{request.method} {request.url.query} {body.decode()}", status_code=207, headers={"X-Own": "1"}
        )
