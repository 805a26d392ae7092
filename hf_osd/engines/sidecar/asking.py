"""`ask` adds to a client's request what makes its answer teach: log-probs and token ids. `cut` takes them out of the answer again, out of its text, so that all
other bytes are the engine's own.

The formats are those of vLLM 0.32 (`vllm/entrypoints/openai`). There a field that was not asked for is null in the answer, streamed or not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
# Of a request, fields whose answer cannot be read, or with which the engine would answer otherwise: several answers, beams, the prompt again, log-probs that the
# client wants itself, tools, prompts that are no tokens, another engine's cache.
_UNREAD = (
    "best_of",
    "echo",
    "use_beam_search",
    "suffix",
    "prompt_embeds",
    "top_logprobs",
    "prompt_logprobs",
    "logprob_token_ids",
    "tools",
    "functions",
    "function_call",
    "documents",
    "kv_transfer_params",
    "ec_transfer_params",
)
_NOTHING = (None, False, "", [], {})
# In JSON a quote inside a string is escaped: what this matches is a key, or follows the end of a string, and no string's text.
_KEY = re.compile(r'[{,]\s*"(logprobs|token_ids|prompt_token_ids)"\s*:\s*')
_decode = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class Asked:
    """Holds a request that was extended.

    Args:
        body (`bytes`): the request with what teaches.
        cuts (`frozenset[str]`): the fields that were added to its answer.
        kind (`str`): names this kind of asking: path, streamed or not. An engine may refuse one and take another.
        chat (`bool`), stream (`bool`): the format of the answer.
        sampled (`bool`): whether the answer is sampled rather than greedy.
    """

    body: bytes
    cuts: frozenset[str]
    kind: str
    chat: bool
    stream: bool
    sampled: bool


def ask(path: str, body: bytes, top_k: int, model: str | None = None) -> Asked | None:
    """Extend a request; `None` if its answer could not be read, and the request is to pass as it is.

    Args:
        path (`str`): where it goes, such as `/v1/completions`.
        body (`bytes`): as the client sent it.
        top_k (`int`): log-probs to ask for at each position; with 0 for token ids alone.
        model (`str`, *optional*): the model whose draft learns: requests to another, such as a LoRA adapter beside it, are not read.
    """
    if path not in (COMPLETIONS, CHAT):
        return None
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):  # the engine says what is wrong with it
        return None
    chat = path == CHAT
    if not isinstance(request, dict) or not _is_read(request, chat, model):
        return None
    own_ids = bool(request.get("return_token_ids"))
    more: dict[str, Any] = {"return_token_ids": True}
    if top_k:
        more |= {"return_tokens_as_token_ids": True, "logprobs": True if chat else top_k}
        more |= {"top_logprobs": top_k} if chat else {}
    stream = bool(request.get("stream"))
    return Asked(
        # Escaped as needed: half of a surrogate pair has no UTF-8.
        body=json.dumps({**request, **more}, separators=(",", ":")).encode(),
        cuts=frozenset({"logprobs"} if own_ids else {"logprobs", "token_ids", "prompt_token_ids"}),
        kind=f"{path}{' streamed' if stream else ''}",
        chat=chat,
        stream=stream,
        sampled=_is_sampled(request),
    )


def _is_read(request: dict, chat: bool, model: str | None) -> bool:
    """Tell whether the answer to a request can be read, and the engine answers the same with log-probs as without."""
    if any(request.get(name) not in _NOTHING for name in _UNREAD):
        return False
    logprobs = request.get("logprobs")
    if logprobs if chat else logprobs is not None:  # of completions 0 asks for those of the tokens themselves
        return False
    if request.get("n") not in (None, 1) or (model is not None and request.get("model") not in (None, model)):
        return False
    if not chat:
        prompt = request.get("prompt")
        return isinstance(prompt, str) or (
            isinstance(prompt, list) and bool(prompt) and all(type(t) is int for t in prompt)
        )
    messages = request.get("messages")
    return isinstance(messages, list) and all(isinstance(one, dict) and _is_text(one) for one in messages)


def _is_text(message: dict) -> bool:
    """Tell whether a message has nothing but text: no image, no call of a tool."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if message.get("tool_calls") or message.get("role") == "tool":
        return False
    return isinstance(content, str) or (
        isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in parts)
    )


def _is_sampled(request: dict) -> bool:
    """Tell whether an answer is sampled. vLLM takes a temperature below 1e-5 for greedy, and 1 where none is given."""
    temperature = request.get("temperature")
    greedy = isinstance(temperature, (int, float)) and temperature < 1e-5
    return not greedy and request.get("top_k") != 1


def cut(text: str, names: frozenset[str]) -> tuple[str, dict[str, Any]]:
    """Take fields out of a JSON text: their values become null, and no other character changes.

    Args:
        text (`str`): an answer, or a chunk of one.
        names (`frozenset[str]`): the fields to take out, some of `logprobs`, `token_ids` and `prompt_token_ids`.

    Returns:
        `tuple[str, dict]`: the text, and the values of all three fields, by name, as far as it had any.

    Raises:
        ValueError: if the text is no JSON there.
    """
    pieces, values, done = [], {}, 0
    at = 0
    while (key := _KEY.search(text, at)) is not None:
        value, at = _decode(text, key.end())
        if value is None:
            continue
        values[key[1]] = value
        if key[1] in names:
            pieces += [text[done : key.end()], "null"]
            done = at
    return "".join([*pieces, text[done:]]), values


class StreamCutter:
    """Cuts a stream of server-sent events. It passes them on one by one, as they come, and collects the values.

    Attributes:
        values (`list[dict]`): the values of each event that had any, see [`cut`].
        finished (`bool`): whether the answer came to its end.
        failed (`bool`): whether the engine sent an error in the stream.
    """

    def __init__(self, asked: Asked):
        self._asked, self._rest = asked, b""
        self.values: list[Mapping[str, Any]] = []
        self.finished = self.failed = False

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes from the engine; return what the client gets of them, whole events."""
        *events, self._rest = _EVENT_END.split(self._rest + data)
        return b"".join(
            self._cut(event) + end
            for event, end in zip(events[::2], events[1::2], strict=True)
            if not self._is_ours(event)
        )

    def rest(self) -> bytes:
        """Return what is left of a stream that ended amid an event."""
        return self._cut(self._rest)

    def _cut(self, event: bytes) -> bytes:
        if not event.startswith(b"data:"):
            return event  # a comment that keeps the connection, or nothing
        if event[5:].strip() == b"[DONE]":
            self.finished = not self.failed
            return event
        if event[5:].lstrip().startswith(b'{"error"'):
            self.failed = True
            return event
        try:
            text, values = cut(event.decode("utf-8", "surrogateescape"), self._asked.cuts)
        except (ValueError, RecursionError):  # no JSON
            return event
        if values:
            self.values.append(values)
        return text.encode("utf-8", "surrogateescape")

    def _is_ours(self, event: bytes) -> bool:
        """Tell whether the engine sent a chunk for what we asked alone: one without a word, where a parser of chats holds text back. Its values are collected."""
        if not self._asked.chat or b'"delta":{}' not in event or b'"finish_reason":null' not in event:
            return False
        if "token_ids" not in self._asked.cuts:  # the client asked for such chunks itself
            return False
        self._cut(event)
        return True


_EVENT_END = re.compile(rb"(\r?\n\r?\n)")
