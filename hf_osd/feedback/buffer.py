"""`FeedbackBuffer` holds recent feedback in bounded memory. It is thread-safe and knows nothing of models or training."""

from __future__ import annotations

import os
import threading
import time
from collections import deque

import torch

from hf_osd.feedback.feedback import Feedback
from hf_osd.feedback.trace import read_trace, write_trace
from hf_osd.system.forks import released

# Fewer requests than these that teach no more tokens than those are little to learn from: an update replays some fifty.
_FEW_REQUESTS, _FEW_TOKENS = 128, 16_384


class FeedbackBuffer:
    """Holds the most recent [`Feedback`], bounded by bytes and by age. Requests that no update has used yet are *new*. Thread-safe.

    Args:
        max_bytes (`int`): bound on the bytes of the tensors held; the oldest requests go first.
        max_age (`float`, *optional*): seconds after which a request is dropped; `None` keeps it.

    Attributes:
        nbytes (`int`): bytes held.
        dropped (`int`): how many requests went before any update had used them.
        crowded (`bool`): `True` once a request has gone for its bytes where few were held, fewer than learning wants to draw from.
    """

    def __init__(self, max_bytes: int = 64 * 2**20, max_age: float | None = None):
        self.max_bytes, self.max_age = max_bytes, max_age
        self.nbytes = 0
        self.dropped = 0
        self.crowded = False
        self._held: deque[Feedback] = deque()  # oldest first
        self._new = 0  # how many of them, the last ones, are new
        self._lock = released(threading.RLock())

    def __len__(self) -> int:
        return len(self._held)

    @property
    def tokens(self) -> int:
        """Count the verified positions held."""
        with self._lock:
            return sum(map(len, self._held))

    def add(self, feedback: Feedback):
        """Append one request as new. A request without a verified position is ignored."""
        if not len(feedback):
            return
        with self._lock:
            self._held.append(feedback)
            self._new += 1
            self.nbytes += feedback.nbytes
            self._keep_bounds()

    def requests(self) -> list[Feedback]:
        """List all requests held, oldest first."""
        with self._lock:
            return list(self._held)

    def new(self) -> list[Feedback]:
        """List the requests that no update has used, oldest first."""
        with self._lock:
            self._keep_bounds()
            return list(self._held)[len(self._held) - self._new :] if self._new else []

    def mark_seen(self, feedback: list[Feedback]):
        """Mark these requests as used by an update. Requests that arrived meanwhile stay new."""
        seen = set(map(id, feedback))
        with self._lock:
            self._new = sum(id(held) not in seen for held in self.new())

    def discard(self, feedback: list[Feedback]):
        """Remove these requests, new or not."""
        gone = set(map(id, feedback))
        with self._lock:
            new = self.new()
            self._new = sum(id(held) not in gone for held in new)
            self._held = deque(held for held in self._held if id(held) not in gone)
            self.nbytes = sum(held.nbytes for held in self._held)

    def sample(self, count: int, generator: torch.Generator | None = None) -> list[Feedback]:
        """Draw `count` requests uniformly: without repetition in each pass over the buffer, with as many passes as needed; none if it is empty.

        Args:
            count (`int`): how many.
            generator (`torch.Generator`, *optional*): a CPU generator for the draws.
        """
        with self._lock:
            self._keep_bounds()
            held = list(self._held)
        drawn: list[Feedback] = []
        while held and len(drawn) < count:
            times = torch.empty(len(held), dtype=torch.float32, device="cpu").exponential_(generator=generator)
            drawn += [held[i] for i in times.argsort()[: count - len(drawn)].tolist()]
        return drawn

    def clear(self):
        """Remove all requests."""
        with self._lock:
            self._held.clear()
            self._new = self.nbytes = 0

    def save(self, path: str | os.PathLike):
        """Write the buffer to a trace that only its owner may read (see [`hf_osd.feedback.trace.write_trace`]). The file holds prompts as token ids:
        call this only where users have asked for it.

        Raises:
            OSError: if the file cannot be written.
        """
        with self._lock:
            held, new = list(self._held), self._new
        write_trace(path, held, {"new": str(new)})

    def restore(self, path: str | os.PathLike):
        """Put the requests that `save` wrote in front of those held, each as old as it was when saved. Requests that were new then are new again, unless some of
        those held have been used by an update already.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is not a saved buffer.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"No saved buffer at {path}.")
        try:
            restored, facts = read_trace(path)
            new = int(facts["new"])
        except (LookupError, ValueError) as error:
            reason = error.__cause__ or error
            raise ValueError(
                f"{path} is not a buffer saved by hf_osd ({reason}); delete it to start empty."
            ) from error
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
            few = len(self._held) < _FEW_REQUESTS
            self.crowded = self.crowded or (few and sum(map(len, self._held)) < _FEW_TOKENS)
        if self.max_age is not None:
            while self._held and time.monotonic() - self._held[0].created > self.max_age:
                self._drop_oldest()
