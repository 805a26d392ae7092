"""`FeedbackBuffer`: bounded memory of recent feedback. It is thread-safe and knows nothing of models or training."""

from __future__ import annotations

import os
import threading
import time
from collections import deque

import torch

from hf_osd.feedback import Feedback


class FeedbackBuffer:
    """The most recent [`Feedback`], bounded by bytes and by age; what no update has seen yet is *new*.

    Args:
        max_bytes (`int`): bound on the tensors held; the oldest requests go first.
        max_age (`float`, *optional*): seconds after which a request is dropped.
    """

    def __init__(self, max_bytes: int = 64 * 2**20, max_age: float | None = None):
        self.max_bytes, self.max_age = max_bytes, max_age
        self.nbytes = 0
        self.dropped = 0  # requests that left before any update had seen them
        self._held: deque[Feedback] = deque()  # oldest first
        self._new = 0  # the last `_new` of them are new
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def tokens(self) -> int:
        """Verified positions held."""
        with self._lock:
            return sum(map(len, self._held))

    def add(self, feedback: Feedback):
        """Append one request. A request without a verified position teaches nothing and is left out."""
        if not len(feedback):
            return
        with self._lock:
            self._held.append(feedback)
            self._new += 1
            self.nbytes += feedback.nbytes
            self._keep_bounds()

    def new(self) -> list[Feedback]:
        """The requests no update has seen, oldest first."""
        with self._lock:
            self._keep_bounds()
            return list(self._held)[len(self._held) - self._new :] if self._new else []

    def mark_seen(self, feedback: list[Feedback]):
        """Say that an update has seen these requests. What arrived meanwhile stays new."""
        seen = set(map(id, feedback))
        with self._lock:
            self._new = sum(id(held) not in seen for held in self.new())

    def sample(self, count: int, generator: torch.Generator | None = None) -> list[Feedback]:
        """`count` requests drawn uniformly: without repetition in each pass over the buffer, as many passes as needed."""
        with self._lock:
            self._keep_bounds()
            held = list(self._held)
        drawn: list[Feedback] = []
        while held and len(drawn) < count:
            order = torch.randperm(len(held), generator=generator).tolist()
            drawn += [held[i] for i in order[: count - len(drawn)]]
        return drawn

    def clear(self):
        """Forget everything."""
        with self._lock:
            self._held.clear()
            self._new = self.nbytes = 0

    def save(self, path: str | os.PathLike):
        """Write the buffer to a safetensors file that only its owner may read. It holds the prompts as token ids: whoever
        calls this has asked for that."""
        from safetensors.torch import save

        with self._lock:
            held, new = list(self._held), self._new
        tensors, now = {}, time.monotonic()
        for i, feedback in enumerate(held):
            tensors |= {f"{i}.{name}": tensor.contiguous() for name, tensor in feedback.tensors().items()}
            facts = [feedback.prompt_length, feedback.sampled, now - feedback.created]
            tensors[f"{i}.facts"] = torch.tensor(facts, dtype=torch.float64)
        data = save(tensors, metadata={"requests": str(len(held)), "new": str(new)})
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            os.fchmod(file.fileno(), 0o600)  # a file that was there before keeps its mode otherwise
            file.write(data)

    def restore(self, path: str | os.PathLike):
        """Add what `save` wrote, as old as it was then, before what is held. What was new then is new again, unless requests
        that an update has seen already come after it.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is not a saved buffer.
        """
        from safetensors import SafetensorError, safe_open

        if not os.path.isfile(path):
            raise FileNotFoundError(f"No saved buffer at {path}.")
        restored, now = [], time.monotonic()
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                count, new = int(facts["requests"]), int(facts["new"])
                fields: list[dict] = [{} for _ in range(count)]
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    index, _, name = key.partition(".")
                    fields[int(index)][name] = file.get_tensor(key)
            for own in fields:
                prompt_length, sampled, age = own.pop("facts").tolist()
                restored.append(
                    Feedback(**own, prompt_length=int(prompt_length), sampled=bool(sampled), created=now - age)
                )
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a buffer saved by hf_osd ({error}); delete it to start empty.") from error
        with self._lock:
            if self._new == len(self._held):
                self._new += min(new, len(restored))
            self._held.extendleft(reversed(restored))
            self.nbytes += sum(feedback.nbytes for feedback in restored)
            self._keep_bounds()

    def _drop_oldest(self):
        oldest = self._held.popleft()
        self.nbytes -= oldest.nbytes
        if self._new > len(self._held):
            self._new -= 1
            self.dropped += 1

    def _keep_bounds(self):
        while self.nbytes > self.max_bytes and self._held:
            self._drop_oldest()
        if self.max_age is not None:
            while self._held and time.monotonic() - self._held[0].created > self.max_age:
                self._drop_oldest()
