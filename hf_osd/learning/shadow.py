"""`Shadow`: compares the draft that serves with the one before any learning, on requests that neither has learnt; and `Reservoir`: keeps a sample of requests that
have been learnt, to see that they are not unlearnt. They are given scores and requests, and know neither models nor clocks."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from hf_osd.distill.ranks import RankGroup
from hf_osd.feedback.feedback import Feedback
from hf_osd.metrics.intervals import Estimate

# The estimate of α is over the last requests, so many.
RECENT = 64
_SUMS = ("requests", "positions", "static", "served")


class Shadow:
    """Adds up scores over all requests so far, and keeps those of the last `RECENT`.

    Args:
        ranks (`RankGroup`, *optional*): sum over all their requests.

    Attributes:
        requests (`int`), positions (`int`): scored.
        static (`float`), served (`float`): expected accepted tokens at these positions, with the draft before any learning, and with the one that served.
    """

    def __init__(self, ranks: RankGroup | None = None):
        self._ranks = ranks or RankGroup()
        self.requests = self.positions = 0
        self.static = self.served = 0.0
        self._recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=RECENT)
        self._estimate: Estimate | None = None  # of these, made once: statistics are asked for at each request

    def observe(self, static: Sequence[Tensor], served: Sequence[Tensor]):
        """Add the scores of both on new requests, float `(N,)` each, NaN without a target."""
        sums = [0, 0, 0.0, 0.0]
        for a, b in zip(static, served, strict=True):
            known = ~a.isnan()
            if known.any():
                one = (
                    1,
                    int(known.sum()),
                    float(a[known].double().sum()),
                    float(b[known].nan_to_num(0.0).double().sum()),
                )
                sums = [total + number for total, number in zip(sums, one, strict=True)]
        requests, positions, before, after = self._ranks.sum(*sums)
        self.requests, self.positions = self.requests + int(requests), self.positions + int(positions)
        self.static, self.served = self.static + before, self.served + after
        pairs = zip(self._ranks.gather(static), self._ranks.gather(served), strict=True)
        self._recent.extend(pair for pair in pairs if not pair[0].isnan().all())
        self._estimate = None

    @property
    def regret(self) -> float:
        """`regret_vs_static`: net accepted tokens that the draft before any learning would have had and the one that served had not, as a share of the latter's.
        Below 0 where learning has gained."""
        return (self.static - self.served) / max(self.served, 1.0)

    def estimate(self) -> Estimate | None:
        """Estimate α over the last requests; `None` before there are two."""
        if self._estimate is None and len(self._recent) > 1:
            self._estimate = Estimate.from_scores(*zip(*self._recent, strict=True))
        return self._estimate

    def state(self) -> dict:
        """Collect what a restart needs, as JSON has it: the sums."""
        return {name: getattr(self, name) for name in _SUMS}

    def load_state(self, values: dict):
        """Go on from `state()`; the estimate begins anew."""
        for name in _SUMS:
            setattr(self, name, values[name])
        self._recent.clear()
        self._estimate = None


class Reservoir:
    """Keeps a sample of all requests ever offered, each equally likely to be in it (algorithm R, Vitter 1985).

    Args:
        size (`int`): requests, at most.
        seed (`int`, *optional*): seeds the draws.
    """

    def __init__(self, size: int, seed: int | None = None):
        self.size, self.seen = size, 0
        self._random = random.Random(seed)
        self._held: list[tuple[int, Feedback]] = []  # with the number it came as

    def __len__(self) -> int:
        return len(self._held)

    def offer(self, feedback: Feedback):
        """Keep a request, or not; one without a position that teaches is not kept, and does not count."""
        if not feedback.teaching_mask("all").any():
            return
        self.seen += 1
        if len(self._held) < self.size:
            self._held.append((self.seen, feedback))
        elif (slot := self._random.randrange(self.seen)) < self.size:
            self._held[slot] = (self.seen, feedback)

    def requests(self) -> list[Feedback]:
        """List the requests that are kept, oldest first."""
        return [feedback for _, feedback in sorted(self._held, key=lambda item: item[0])]

    def discard(self, feedback: Sequence[Feedback]):
        """Forget these requests."""
        gone = set(map(id, feedback))
        self._held = [item for item in self._held if id(item[1]) not in gone]

    def clear(self):
        """Forget all."""
        self._held, self.seen = [], 0
