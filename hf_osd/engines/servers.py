"""`EngineServer` is a running serving engine, seen over HTTP: it takes another draft's weights, and tells what it accepts of them. [`connect`] finds out which engine there is."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

try:
    import httpx
except ImportError as error:
    raise ImportError("Speaking to an engine takes the extra `sidecar`: pip install hf-osd[sidecar].") from error

from hf_osd.engines.counters import Counted, read_counters

# Seconds for an answer that is at hand, and for weights, which come once running requests have ended.
_SOON, _PUSH = 10.0, 600.0
# Seconds between tries to resume an engine, which its users wait for.
_RESUME = (0.5, 1.0, 2.0, 4.0)
# vLLM's server resets a connection on which a route has failed, a little after its answer: another request on it would fail too, such as the one that resumes the engine.
_ONCE = {"connection": "close"}
# Log-probs a position to ask for, from the most to the least.
_LOG_PROBS = (20, 10, 5, 1)


class PushFailed(Exception):
    """Raised where an engine has not taken weights; it serves on with those it has.

    Args:
        message (`str`): what failed, and how to mend it.
        refused (`bool`): the engine will refuse them again: trying once more is of no use.
    """

    def __init__(self, message: str, refused: bool = False):
        super().__init__(message)
        self.refused = refused


class EngineServer(Protocol):
    """Describes one engine. Methods block, and may be called from any thread.

    Attributes:
        url (`str`): where it listens, without a slash at the end.
        model (`str`, *optional*): the name of the model that it serves.
        max_logprobs (`int`, *optional*): log-probs a position that it gives; `None` if that is unknown.
    """

    url: str
    model: str | None
    max_logprobs: int | None

    def push(self, folder: Path):
        """Bring the weights of `folder` into the running engine; [`PushFailed`] if they are not in it afterwards."""

    def acceptance(self) -> Counted | None:
        """Read the engine's counters; `None` if it is down or does not speculate."""

    def is_up(self) -> bool:
        """Tell whether it answers."""

    def resume(self):
        """Let requests go on that a push has made wait; [`PushFailed`] if they wait still."""


class _Server:
    """Has what the engines share: the same OpenAI routes."""

    def __init__(self, url: str, client: httpx.Client | None = None):
        self.url = url.rstrip("/")
        self._client = client or httpx.Client(timeout=_SOON)
        self.model = self._model()
        self.max_logprobs = self._most_log_probs()

    def is_up(self) -> bool:
        """Tell whether it answers."""
        with suppress(httpx.HTTPError):
            return self._client.get(f"{self.url}/health").status_code == 200
        return False

    def resume(self):
        """Do nothing: nothing is paused."""

    def _model(self) -> str | None:
        with suppress(httpx.HTTPError, ValueError, LookupError, TypeError):
            return self._client.get(f"{self.url}/v1/models").raise_for_status().json()["data"][0]["id"]
        return None

    def _most_log_probs(self) -> int | None:
        """Ask for one token with fewer and fewer log-probs, until the engine gives them."""
        if self.model is None:
            return None
        with suppress(httpx.HTTPError):
            for n in _LOG_PROBS:
                asked = {"model": self.model, "prompt": "1", "max_tokens": 1, "temperature": 0, "logprobs": n}
                status = self._client.post(f"{self.url}/v1/completions", json=asked, timeout=_PUSH).status_code
                if status == 200:
                    return n
                if status != 400:
                    return None
            return 0
        return None


class VllmServer(_Server):
    """Speaks to a vLLM server (0.32 was run).

    Weights come in by `/start_draft_weight_update`, `/update_weights` with a path and `/finish_weight_update` where the server has these and takes a path; else by the
    worker extension [`hf_osd.engines.vllm.DraftRefresh`], which takes `VLLM_SERVER_DEV_MODE=1` and a pause, in which running requests end and new ones wait.

    Args:
        url (`str`): of the server.
        client (`httpx.Client`, *optional*): to speak through.
    """

    def __init__(self, url: str, client: httpx.Client | None = None):
        super().__init__(url, client)
        self._takes_paths: bool | None = None  # `/update_weights` does; `None` as long as that is unknown
        self._pauses = False  # by us, for all that we know

    def push(self, folder: Path):
        """Bring the weights of `folder`, which the engine's machine must see under the same path, into the draft.

        Raises:
            PushFailed: if the engine has no such route, or refuses, or is down, or `folder` has another draft than the engine's: in other sizes, say.
        """
        self.resume()  # the push before may have ended amid a pause
        routes = self._routes()
        if self._takes_paths is not False and "/start_draft_weight_update" in routes and self._update(folder):
            return
        if "/collective_rpc" not in routes:
            raise self._no_way()
        self._check(folder)
        try:
            self._pauses = True  # also where the answer to the pause is lost
            self._post("/pause", params={"mode": "wait"})
            if not self._pauses:  # we are closing, and requests run again
                raise PushFailed(f"{self.url} was resumed before it had the weights.")
            self._post("/collective_rpc", json={"method": "refresh_draft", "args": [str(folder)]})
        finally:
            self.resume()

    def resume(self):
        """Let requests go on that a push has made wait. It is tried several times, for some 8 s where the engine answers at once.

        Raises:
            PushFailed: if the engine does not take it.
        """
        for wait in (*_RESUME, None):
            if not self._pauses:
                return
            try:
                self._post("/resume", timeout=_SOON)
                self._pauses = False
            except PushFailed as error:
                if wait is None:
                    raise PushFailed(
                        f"{self.url} may be paused still, and its users wait: {error} The next push tries again; by hand it is POST {self.url}/resume."
                    ) from error
                time.sleep(wait)

    def _check(self, folder: Path):
        """Ask the engine's workers, which serve on, whether they would take the draft of `folder`: a push that fails half-way costs more than one that is not begun.

        Raises:
            PushFailed: if not; the engine would refuse all others of that shape.
        """
        try:
            answer = self._post("/collective_rpc", json={"method": "check_draft", "args": [str(folder)]})
        except PushFailed as error:
            if "no attribute 'check_draft'" in str(
                error
            ):  # its workers are without the extension, or have one of before
                raise self._no_way() from error
            raise
        try:
            wrong = list(dict.fromkeys(text for worker in answer.json()["results"] for text in worker))
        except (ValueError, LookupError, TypeError) as error:
            raise PushFailed(f"{self.url}/collective_rpc gave no results ({type(error).__name__}).") from error
        if wrong:
            raise PushFailed(
                f"{self.url} does not serve this draft: {' '.join(wrong)} Start the engine with the draft that the sidecar learns, or the sidecar with the engine's.",
                refused=True,
            )

    def _no_way(self) -> PushFailed:
        return PushFailed(
            f"{self.url} has no way to take a draft's weights: start it with VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls hf_osd.engines.vllm.DraftRefresh "
            "(docs/engines.md).",
            refused=True,
        )

    def acceptance(self) -> Counted | None:
        """Read vLLM's own counters of speculation; `None` if it is down or does not speculate."""
        return read_counters(self._client, self.url)

    def _routes(self) -> set[str]:
        try:
            return set(self._client.get(f"{self.url}/openapi.json").raise_for_status().json()["paths"])
        except httpx.HTTPError as error:
            raise PushFailed(f"{self.url} cannot be reached ({type(error).__name__}).") from error
        except (ValueError, LookupError):
            return {"/collective_rpc"}  # the routes are not shown; that one says itself if it is missing

    def _update(self, folder: Path) -> bool:
        """Update the draft from a path by the server's own routes; `False` if it has no backend that takes one."""
        try:
            self._post("/start_draft_weight_update")
        except PushFailed as error:
            if self._takes_paths or not (error.refused or self.is_up()):
                raise  # it is down, or has taken one before
            self._takes_paths = False
            return False
        try:
            self._post("/update_weights", json={"update_info": {"path": str(folder)}})
        except PushFailed:
            with suppress(PushFailed):
                self._post("/finish_weight_update", json={})
            if self._takes_paths:
                raise
            self._takes_paths = False
            return False
        self._post("/finish_weight_update", json={})
        self._takes_paths = True
        return True

    def _post(self, route: str, timeout: float = _PUSH, **kwargs) -> httpx.Response:
        try:
            answer = self._client.post(f"{self.url}{route}", timeout=timeout, headers=_ONCE, **kwargs)
        except httpx.HTTPError as error:
            raise PushFailed(f"{self.url}{route} was not answered ({type(error).__name__}).") from error
        if answer.status_code >= 400:
            told = " ".join(answer.text.split())[:300]
            raise PushFailed(
                f"{self.url}{route} answered {answer.status_code}: {told}", refused=answer.status_code in (404, 405)
            )
        return answer


class SglangServer(_Server):
    """Speaks to an SGLang server, by its documented routes; the real one was not run.

    It is passed to and learnt from like vLLM. It has no route that takes the draft of a running server from a folder (`/update_weights_from_disk` loads the one folder into
    the target too, and the update of a draft alone takes tensors, see docs/engines.md), and its metrics have means in place of counters.
    """

    def push(self, folder: Path):
        """Refuse: SGLang takes no draft's weights from a folder while it runs.

        Raises:
            PushFailed: always.
        """
        raise PushFailed(
            f"{self.url} is SGLang, which takes no draft from a folder while it runs: start a server with --speculative-draft-model-path {folder} beside it, and let it take over.",
            refused=True,
        )

    def acceptance(self) -> Counted | None:
        """Return `None`: there are no counters."""
        return None


def connect(url: str, client: httpx.Client | None = None) -> VllmServer | SglangServer:
    """Find out by asking which engine listens at `url`.

    Raises:
        OSError: if nothing answers there.
        ValueError: if it is neither vLLM nor SGLang.
    """
    url, client = url.rstrip("/"), client or httpx.Client(timeout=_SOON)
    try:
        if client.get(f"{url}/get_model_info").status_code == 200:
            return SglangServer(url, client)
        if client.get(f"{url}/version").status_code == 200:
            return VllmServer(url, client)
    except httpx.HTTPError as error:
        raise OSError(
            f"Nothing answers at {url} ({type(error).__name__}): start the engine first, or mend --engine."
        ) from error
    raise ValueError(f"What answers at {url} is neither vLLM nor SGLang; give the address of such a server.")
