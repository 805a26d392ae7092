"""`EngineServer` is a running serving engine, seen over HTTP: it takes another draft's weights, and tells what it accepts of them. [`connect`] finds out which engine there is."""

from __future__ import annotations

import itertools
import logging
import math
import operator
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

try:
    import httpx
    from prometheus_client.parser import text_string_to_metric_families
except ImportError as error:
    raise ImportError("Speaking to an engine takes the extra `sidecar`: pip install hf-osd[sidecar].") from error

logger = logging.getLogger(__name__)

# Seconds for an answer that is at hand, and for weights, which come once running requests have ended.
_SOON, _PUSH = 10.0, 600.0
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


@dataclass(frozen=True)
class Counted:
    """Holds an engine's own counters since it began: rounds that drafted, their tokens, those accepted, and those by position in the round."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    by_position: tuple[int, ...] = ()

    @property
    def mean_length(self) -> float:
        """Compute vLLM's mean acceptance length, the target's own token included; NaN without rounds."""
        return 1 + self.accepted / self.rounds if self.rounds else math.nan

    def since(self, earlier: Counted | None) -> Counted:
        """Return what was counted after `earlier`; all, if the engine has begun anew since, whose counters are then lower."""
        if earlier is None or self.rounds < earlier.rounds or self.drafted < earlier.drafted:
            return self
        return self._with(earlier, operator.sub)

    def __add__(self, other: Counted) -> Counted:
        return self._with(other, operator.add)

    def _with(self, other: Counted, combine: Callable[[int, int], int]) -> Counted:
        places = itertools.zip_longest(self.by_position, other.by_position, fillvalue=0)
        sums = (combine(getattr(self, name), getattr(other, name)) for name in ("rounds", "drafted", "accepted"))
        return Counted(*sums, tuple(combine(*pair) for pair in places))


def read_counters(client: httpx.Client, url: str) -> Counted | None:
    """Read a vLLM server's counters of speculation, of all its engines together; `None` if it is down or does not speculate."""
    values: dict[tuple[str, str], float] = {}
    try:
        text = client.get(f"{url}/metrics").raise_for_status().text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = sample.name, sample.labels.get("position", "")
                values[key] = values.get(key, 0.0) + sample.value
    except (httpx.HTTPError, ValueError) as error:
        logger.debug("%s has no metrics (%s).", url, type(error).__name__)
        return None
    name = "vllm:spec_decode_num_{}_total".format
    if (name("drafts"), "") not in values:
        return None
    at = {int(position): n for (key, position), n in values.items() if key == name("accepted_tokens_per_pos")}
    return Counted(
        *(int(values.get((name(what), ""), 0)) for what in ("drafts", "draft_tokens", "accepted_tokens")),
        tuple(int(at.get(i, 0)) for i in range(max(at, default=-1) + 1)),
    )


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

    def push(self, folder: Path):
        """Bring the weights of `folder`, which the engine's machine must see under the same path, into the draft.

        Raises:
            PushFailed: if the engine has no such route, or refuses, or is down.
        """
        routes = self._routes()
        if self._takes_paths is not False and "/start_draft_weight_update" in routes and self._update(folder):
            return
        if "/collective_rpc" not in routes:
            raise PushFailed(
                f"{self.url} has no way to take a draft's weights: start it with VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls hf_osd.engines.vllm.DraftRefresh "
                "(docs/engines.md).",
                refused=True,
            )
        try:
            self._post("/pause", params={"mode": "wait"})
            self._post("/collective_rpc", json={"method": "refresh_draft", "args": [str(folder)]})
        except PushFailed:  # also where the answer to the pause was lost: requests that wait must go on
            with suppress(PushFailed):
                self._post("/resume")
            raise
        self._post("/resume")

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

    def _post(self, route: str, **kwargs):
        try:
            answer = self._client.post(f"{self.url}{route}", timeout=_PUSH, **kwargs)
        except httpx.HTTPError as error:
            raise PushFailed(f"{self.url}{route} was not answered ({type(error).__name__}).") from error
        if answer.status_code >= 400:
            told = " ".join(answer.text.split())[:300]
            raise PushFailed(
                f"{self.url}{route} answered {answer.status_code}: {told}", refused=answer.status_code in (404, 405)
            )


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
