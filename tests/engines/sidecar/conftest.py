"""A fake engine, an assistant that learns its draft, and servers on free ports."""

import asyncio
import contextlib
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import uvicorn

from hf_osd import OnlineAssistant
from hf_osd.engines.counters import Counted
from hf_osd.engines.sidecar.app import make_app
from hf_osd.engines.sidecar.sidecar import Sidecar

from .fake_engine import FakeEngine


@dataclass
class FakeServer:
    """What a sidecar knows of an `EngineServer`."""

    url: str
    max_logprobs: int | None = 20
    model: str | None = "tiny"


@dataclass
class FakePusher:
    """Saves at once what it is offered."""

    folder: Path
    saved: list[Path] = field(default_factory=list)
    closed: bool = False

    def offer(self, save):
        folder = self.folder / f"draft-{len(self.saved) + 1}"
        save(folder)
        self.saved.append(folder)

    def acceptance(self):
        return {"http://engine": Counted(10, 40, 15, (9, 6)), "http://down": None}

    def status(self):
        return {"http://engine": {"pushed": len(self.saved), "failures": 0, "last_error": None}}

    def close(self):
        self.closed = True


class _Server(uvicorn.Server):
    def __init__(self, app):
        super().__init__(
            uvicorn.Config(app, log_level="error", server_header=False, date_header=False, timeout_graceful_shutdown=1)
        )
        self.up = threading.Event()

    async def startup(self, sockets=None):
        await super().startup(sockets)
        self.up.set()


@pytest.fixture
def serve():
    """`serve(app)`: a server of the app on a free port; yields it and its URL. Killed, it drops its connections."""

    @contextlib.contextmanager
    def serve(app):
        listens = socket.create_server(("127.0.0.1", 0))
        server = _Server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listens]}, daemon=True)
        thread.start()
        assert server.up.wait(20)
        try:
            yield f"http://127.0.0.1:{listens.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            listens.close()

    return serve


@pytest.fixture(scope="module")
def engine_model(target):
    return target


@pytest.fixture
def make_sidecar(draft):
    """`make_sidecar(urls, pusher=None, draft=…, **config)`: a sidecar in front of engines; its assistant learns in the sidecar's thread."""
    made = []

    def make(urls=("http://engine",), pusher=None, options=None, draft=draft, **config):
        assistant = OnlineAssistant(
            draft, **{"update_interval": 4, "learning_rate": 1e-3, "seed": 0, "gate": False, **config}
        )
        sidecar = Sidecar(assistant, [FakeServer(url) for url in urls], pusher, **(options or {}))
        made.append(sidecar)
        return sidecar

    yield make
    for sidecar in made:
        sidecar.close()


@pytest.fixture
def through(make_sidecar):
    """`through(engine, sidecar=None)`: a function that sends a request to a fake engine through a sidecar, all in this process."""

    def through(engine: FakeEngine, sidecar: Sidecar | None = None):
        sidecar = make_sidecar() if sidecar is None else sidecar
        app = make_app(sidecar, httpx.AsyncClient(transport=httpx.ASGITransport(engine.app)))
        return requests_to(app)

    return through


def requests_to(app):
    """`send(method, path, **how)`: one request to an application, and its answer."""

    async def one(method, path, **how):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as client:
            return await client.request(method, path, **how)

    return lambda method, path, **how: asyncio.run(one(method, path, **how))
