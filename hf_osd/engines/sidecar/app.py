"""The proxy: a Starlette application that passes requests to engines, and answers back. Its rule: nobody's request fails because of what we add to it."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import httpx
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from hf_osd.engines.sidecar.asking import Asked, StreamCutter, ask, cut
from hf_osd.engines.sidecar.sidecar import Sidecar
from hf_osd.engines.sidecar.status import metrics_text, status_text, status_values
from hf_osd.system.strict_json import dumps
from hf_osd.system.warn_once import WarnOnce

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

# Of a connection and not of what it carries (RFC 9110, 7.6.1); and what each connection's own library writes.
_HOP = {
    *(
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
    ),
    *(b"transfer-encoding", b"upgrade", b"host", b"content-length", b"expect"),
}
_PRIVATE, _TENANT = b"x-osd-private", b"x-osd-tenant"
# Answers that have nothing to do with the fields of a request.
_UNRELATED = {401, 403, 404, 408, 409, 429, 502, 503, 504}
# Requests that may be sent again: they change nothing, and these compute an answer and keep none.
_SAFE, _COMPUTED = ("GET", "HEAD", "OPTIONS"), ("/completions", "/embeddings", "/tokenize", "/detokenize")
# Seconds for which an engine that refused a connection is asked last.
_REST = 1.0
# vLLM's server drops a connection that was idle for 5 s: before that we do, so that hardly a request is sent into a closing one.
_IDLE = 2.0


class Engine:
    """Holds what the proxy knows of one engine.

    Attributes:
        refused (`set[str]`): kinds of asking that it has refused.
    """

    def __init__(self, url: str, model: str | None = None):
        self.url, self.model = httpx.URL(url), model
        self.refused: set[str] = set()
        self.down_until = 0.0


class NoEngine(Exception):
    """Raised where no engine takes a connection."""


class Proxy:
    """An ASGI application that answers each request from one of several engines, by turns.

    A refused connection goes on to the next engine; a request that was sent is never sent to another, for it may be what an engine has died of. Where a connection that
    was in use before ends without an answer, which an engine that stalls lets happen, the request goes to the same engine once more. An engine that refuses the extended request
    gets the client's own, and is not asked that way again.

    Args:
        sidecar ([`Sidecar`]): learns.
        client (`httpx.AsyncClient`, *optional*): reaches the engines.
    """

    def __init__(self, sidecar: Sidecar, client: httpx.AsyncClient | None = None):
        self.sidecar = sidecar
        self.engines = [Engine(url, model) for url, model in sidecar.models.items()]
        self.client = client or httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=5.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=1000, keepalive_expiry=_IDLE),
            trust_env=False,
        )
        self._turns = itertools.count()
        self._warn_once = WarnOnce(logger)

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003, "reason": "hf_osd's sidecar passes HTTP alone"})
            return
        request = Request(scope, receive)
        try:
            body = await request.body()
        except ClientDisconnect:
            return
        async with anyio.create_task_group() as group:

            async def watch():
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()  # and so the engine's work on it

            group.start_soon(watch)
            await self._answer(request, body, send)
            group.cancel_scope.cancel()

    async def _answer(self, request: Request, body: bytes, send: Send):
        counts, headers = self.sidecar.counts, request.scope["headers"]
        counts["requests"] += 1
        begun = Begun(send)
        try:
            engines = self._in_turn()
            private = _is_set(headers, _PRIVATE)
            counts["private"] += private
            teaches = request.method == "POST" and not private and self.sidecar.share_in()
            asked = ask(request.url.path, body, self.sidecar.top_k, engines[0].model) if teaches else None
            await self._relay(request, body, asked, engines, begun)
        except NoEngine:
            counts["failed"] += 1
            self._warn_once("No engine took a connection; requests are answered with 503 meanwhile.")
            await begun.respond(_error(503, "No engine answers. Try again later."), request)
        except httpx.HTTPError as error:  # the engine has died, or closed the connection
            counts["failed"] += 1
            logger.warning("An engine broke off a request: %s.", type(error).__name__)
            # An answer that has begun stays without an end, which the server turns into a closed connection: the client sees what it would have seen.
            await begun.respond(_error(502, "The engine broke off the request."), request)

    def _in_turn(self) -> list[Engine]:
        """List the engines in the order in which to try them: by turns, those that are down last."""
        start, now = next(self._turns) % len(self.engines), time.monotonic()
        turn = self.engines[start:] + self.engines[:start]
        return sorted(turn, key=lambda engine: engine.down_until > now)

    async def _relay(self, request: Request, body: bytes, asked: Asked | None, engines: list[Engine], begun: Begun):
        engine, response, extended = await self._send(request, body, asked, engines)
        if not extended:
            asked = None
        try:
            if asked is not None and response.status_code >= 400 and response.status_code not in _UNRELATED:
                response = await self._send_own(request, body, asked, engine, response)
                asked = None
            if asked is None or response.status_code != 200:
                self.sidecar.counts["passed"] += 1
                await begun.stream(response, response.aiter_raw())
            elif asked.stream:
                await self._relay_stream(request, body, asked, engine, response, begun)
            else:
                await self._relay_whole(request, asked, response, begun)
        finally:
            await _close(response)

    async def _send(
        self, request: Request, body: bytes, asked: Asked | None, engines: Iterable[Engine]
    ) -> tuple[Engine, httpx.Response, bool]:
        """Send a request to the first engine that takes a connection: the extended one, unless that engine refuses this kind. Returns engine, answer, and whether the
        extended one was sent.

        Raises:
            NoEngine: if none takes one.
            httpx.HTTPError: if one did, and broke off.
        """
        for engine in engines:
            extended = asked is not None and asked.kind not in engine.refused
            try:
                return (
                    engine,
                    await self._send_to(engine, request, asked.body if extended else body, extended),
                    extended,
                )
            except (httpx.ConnectError, httpx.ConnectTimeout):
                engine.down_until = time.monotonic() + _REST
        raise NoEngine

    async def _send_to(self, engine: Engine, request: Request, body: bytes, plain: bool) -> httpx.Response:
        """Send to one engine; `plain` asks for an answer without compression, which can be read."""
        left_out = _HOP | {_PRIVATE, _TENANT} | ({b"accept-encoding"} if plain else set())
        headers = [(name, value) for name, value in request.scope["headers"] if name.lower() not in left_out]
        raw = request.scope.get("raw_path") or request.url.path.encode()
        query = request.scope["query_string"]
        path = engine.url.raw_path.rstrip(b"/") + raw.split(b"?")[0] + (b"?" + query if query else b"")
        has_body = body or request.method in ("POST", "PUT", "PATCH")
        outgoing = httpx.Request(
            request.method, engine.url.copy_with(raw_path=path), headers=headers, content=body if has_body else None
        )
        return await self._send_again(outgoing)

    async def _send_again(self, outgoing: httpx.Request) -> httpx.Response:
        """Send a request; again, while the connections that it is sent on were used before and end without an answer: an engine that stalls closes idle ones late, with a request
        on them. No answer's first byte is lost so, and computing one changes nothing (RFC 9110, 9.2.2)."""
        broken, is_new = None, False

        async def trace(event: str, info: dict):
            nonlocal is_new
            is_new |= event.startswith("connection.connect")

        outgoing.extensions["trace"] = trace
        while True:
            try:
                return await self.client.send(outgoing, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if broken is not None:  # it has died, maybe of this request
                    raise broken from None
                raise
            except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
                if is_new or not (outgoing.method in _SAFE or outgoing.url.path.endswith(_COMPUTED)):
                    raise
                broken = error

    async def _send_own(
        self, request: Request, body: bytes, asked: Asked, engine: Engine, refusal: httpx.Response
    ) -> httpx.Response:
        """Send the client's own request after the extended one was refused. If that is taken, this kind of asking is given up."""
        await refusal.aclose()
        response = await self._send_to(engine, request, body, False)
        if response.status_code < 400:
            engine.refused.add(asked.kind)
            self.sidecar.counts["refused"] += 1
            self._warn_once(
                f"The engine {engine.url} refuses requests to {asked.kind} that ask for log-probs and token ids (status {refusal.status_code}): these are passed on as they come "
                "from now on, and teach nothing."
            )
        return response

    async def _relay_whole(self, request: Request, asked: Asked, response: httpx.Response, begun: Begun):
        data = await response.aread()
        try:
            text, values = cut(data.decode("utf-8", "surrogateescape"), asked.cuts)
        except (ValueError, RecursionError):  # no JSON
            text, values = None, {}
        if text is not None:
            data = text.encode("utf-8", "surrogateescape")
        headers = [*_end_to_end(response, decoded=True), (b"content-length", str(len(data)).encode())]
        await begun.start(response.status_code, headers)
        await begun.body(data, more=False)
        self._teach(request, asked, [values])

    async def _relay_stream(
        self, request: Request, body: bytes, asked: Asked, engine: Engine, response: httpx.Response, begun: Begun
    ):
        cutter = StreamCutter(asked)
        headers = _end_to_end(response, decoded=True)
        async for data in response.aiter_bytes():
            data = cutter.feed(data)
            if cutter.failed and not (begun.has_body or cutter.values):  # refused, and said so in the stream
                own = await self._send_own(request, body, asked, engine, response)
                try:
                    await begun.stream(own, own.aiter_raw())
                finally:
                    await _close(own)
                return
            if data:
                await begun.start(response.status_code, headers)
                await begun.body(data, more=True)
        await begun.start(response.status_code, headers)
        await begun.body(cutter.rest(), more=False)
        if cutter.finished:
            self._teach(request, asked, cutter.values)

    def _teach(self, request: Request, asked: Asked, values: list):
        self.sidecar.counts["read"] += 1
        tenant = dict(request.scope["headers"]).get(_TENANT)
        self.sidecar.teach(values, asked, None if tenant is None else tenant.decode("latin-1"))


class Begun:
    """Sends an answer, and knows how far it is."""

    def __init__(self, send: Send):
        self._send = send
        self.has_begun = self.has_body = False

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]):
        """Send status and headers, unless they are sent."""
        if not self.has_begun:
            self.has_begun = True
            await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, data: bytes, more: bool):
        self.has_body = True
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def stream(self, response: httpx.Response, data: AsyncIterator[bytes]):
        """Send an engine's answer as it is."""
        length = [(b"content-length", v) for k, v in response.headers.raw if k.lower() == b"content-length"]
        await self.start(response.status_code, _end_to_end(response) + length)
        async for piece in data:
            await self.body(piece, more=True)
        await self.body(b"", more=False)

    async def respond(self, response: Response, request: Request):
        """Send an answer of our own, unless another has begun."""
        if not self.has_begun:
            self.has_begun = True
            await response(request.scope, request.receive, self._send)


def make_app(sidecar: Sidecar, client: httpx.AsyncClient | None = None) -> Starlette:
    """Make the application: the proxy, and `/metrics` and `/status` of our own. It starts the sidecar, and closes it."""
    proxy = Proxy(sidecar, client)

    @asynccontextmanager
    async def lifespan(app: Starlette):
        sidecar.start()
        try:
            yield
        finally:
            await proxy.client.aclose()
            await run_in_threadpool(sidecar.close)

    async def metrics(request: Request) -> Response:
        text, media_type = await run_in_threadpool(metrics_text, sidecar)
        return Response(text, media_type=None, headers={"content-type": media_type})

    async def status(request: Request) -> Response:
        if "application/json" in request.headers.get("accept", ""):
            return Response(dumps(await run_in_threadpool(status_values, sidecar)), media_type="application/json")
        return PlainTextResponse(await run_in_threadpool(status_text, sidecar))

    return Starlette(
        routes=[Route("/metrics", metrics), Route("/status", status), Mount("/", proxy)],
        lifespan=lifespan,
    )


async def _close(response: httpx.Response):
    """Close an engine's answer, also where the client has left."""
    with anyio.CancelScope(shield=True):
        await response.aclose()


def _end_to_end(response: httpx.Response, decoded: bool = False) -> list[tuple[bytes, bytes]]:
    """List the headers of an engine's answer that are for the client; of a body that was `decoded` without its encoding."""
    left_out = _HOP | {b"content-encoding"} if decoded else _HOP
    return [(name.lower(), value) for name, value in response.headers.raw if name.lower() not in left_out]


def _is_set(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bool:
    """Tell whether a header switches something on."""
    return any(
        key.lower() == name and value.strip().lower() not in (b"", b"0", b"false", b"no") for key, value in headers
    )


def _error(status: int, message: str) -> JSONResponse:
    """Make an error in OpenAI's form."""
    return JSONResponse(
        {"error": {"message": message, "type": "engine_unavailable", "param": None, "code": status}}, status
    )
