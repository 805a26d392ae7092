"""`HeldBack`: a memory of feedback that is not learnt from, and what drafts would have said on it. It is given scores, and knows neither
models nor clocks. α of a request has a standard deviation near .17, so drafts are compared on the same requests, pair by pair."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from hf_osd.feedback import Feedback

# Judged rows for each learnt one, at most. Judging a row costs about a third of learning it: this is a tenth of learning's time.
JUDGED_SHARE = 0.3
_COUNTS = ("seed", "seen", "taken", "judged_rows")


@dataclass(frozen=True, eq=False)
class Held:
    """One request held back, and `rows`, how many of its positions have a target."""

    feedback: Feedback
    rows: int


class HeldBack:
    """The `recent` last requests held back, and a `reservoir` in which each one ever held back is equally likely to be, so that it spans all
    domains. A request in both is held once. Thread-safe.

    Args:
        share (`float`): the share of requests to hold back, evenly: at 1/16 each 16th, the first after 8. 0 holds none.
        reservoir (`int`), recent (`int`): requests in each.
        seed (`int`, *optional*): seeds the reservoir's draws.

    Raises:
        ValueError: for a value out of range, naming it and the mend.
    """

    def __init__(self, share: float, reservoir: int = 48, recent: int = 32, seed: int | None = None):
        if not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f"`share` is {share!r}; give a number from 0 to 1.")
        self.share, self.judged_rows = share, 0
        self._size, self._last = _whole("reservoir", reservoir, 1), _whole("recent", recent, 1)
        self.seed = random.SystemRandom().getrandbits(48) if seed is None else _whole("seed", seed, 0)
        self.seen = self.taken = 0  # requests offered, and held back, ever
        self._held: dict[int, Held] = {}  # by number: how many were held back before it; in that order
        self._reservoir: list[int] = []  # numbers, by slot; the recent are the last numbers
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(feedback.nbytes for feedback in self.requests())

    def take(self, feedback: Feedback, judge: Callable[[Feedback], Feedback] | None = None) -> bool:
        """Whether this request is held back, and so not to be learnt from. One without a position that teaches neither is nor counts.
        `judge` gives what is then held in its place: the same request with the `overlap` by which a later draft is to be compared."""
        rows = int(feedback.teaches("all").sum())
        if not rows:
            return False
        with self._lock:
            self.seen += 1
            # Counted, not drawn, so that a run repeats; and from the total, so that no rounding adds up. The half brings the first one
            # early: until there is one, there is nothing to judge by.
            if int(self.seen * self.share + 0.5) == int((self.seen - 1) * self.share + 0.5):
                return False
            number, self.taken = self.taken, self.taken + 1
            self._held[number] = Held(feedback if judge is None else judge(feedback), rows)
            # Algorithm R (Vitter 1985). Each draw has a seed of its own: a restart needs no generator's state.
            slot = random.Random(f"{self.seed}/{number}").randrange(number + 1) if number >= self._size else number
            if slot < self._size:
                self._reservoir[slot : slot + 1] = [number]
            kept = sorted({*self._reservoir, *list(self._held)[-self._last :]})
            self._held = {number: self._held[number] for number in kept}
            return True

    def held(self, part: str = "all") -> list[Held]:
        """What is held, in the order held: the `"reservoir"`, what is `"recent"`, or `"all"`; `ValueError` for another part."""
        with self._lock:
            parts = {"all": self._held, "reservoir": set(self._reservoir), "recent": list(self._held)[-self._last :]}
            if part not in parts:
                raise ValueError(f"`part` is {part!r}; choose one of {', '.join(map(repr, parts))}.")
            return [held for number, held in self._held.items() if number in parts[part]]

    def requests(self, part: str = "all") -> list[Feedback]:
        """The feedback of `held(part)`."""
        return [held.feedback for held in self.held(part)]

    def clear(self):
        """Forget all requests and begin anew. What judging has cost stays counted."""
        with self._lock:
            self._held, self._reservoir = {}, []
            self.seen = self.taken = 0

    def due(self, learned_rows: int) -> bool:
        """Whether all that is held may be judged once: the rows judged so far, with it, are at most `JUDGED_SHARE` of `learned_rows`, the rows
        learnt so far. `False` when nothing is held."""
        with self._lock:
            return 0 < sum(held.rows for held in self.held()) <= JUDGED_SHARE * learned_rows - self.judged_rows

    def note_judged(self, rows: int):
        """Count rows as judged; `ValueError` below 0. A row that two drafts judge is two."""
        with self._lock:
            self.judged_rows += _whole("rows", rows, 0)

    def state(self) -> tuple[list[Feedback], dict]:
        """What a restart needs: `requests()`, and plain values as JSON has them."""
        with self._lock:
            samples = {"sizes": [self._size, self._last], "held": list(self._held), "reservoir": list(self._reservoir)}
            return self.requests(), samples | {name: getattr(self, name) for name in _COUNTS}

    def load_state(self, feedback: Sequence[Feedback], values: dict):
        """Go on from `state()`, in place of what is held, as the memory that gave it would have: by its seed, at this one's share.

        Raises:
            ValueError: if the state is damaged, or of a memory of other sizes; nothing is changed then.
        """
        try:
            counts = {name: _whole(name, values[name], 0) for name in _COUNTS}
            held, reservoir, taken = {}, list(values["reservoir"]), counts["taken"]
            for number, one in zip(values["held"], feedback, strict=True):
                held[number] = Held(one, int(one.teaches("all").sum()))
            wanted = sorted({*reservoir, *range(max(0, taken - self._last), taken)})
            whole = len(set(reservoir)) == min(self._size, taken) and list(held) == wanted
            if values["sizes"] != [self._size, self._last] or not whole:
                raise ValueError(f"sizes {values['sizes']}, not {[self._size, self._last]}, or requests are lacking")
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"The state does not fit ({error}); keep the sizes it had, or start empty.") from error
        with self._lock:
            vars(self).update(counts, _held=held, _reservoir=reservoir)


@dataclass(frozen=True)
class Comparison:
    """Two drafts on the same `requests`, those with a target: α `before` and `after`, means over all their positions; the `difference`, after
    less before; and its interval over requests, `low` to `high`, infinite with fewer than two, which tell nothing of its spread."""

    requests: int
    before: float
    after: float
    difference: float
    low: float
    high: float

    def surely_worse_than(self, tolerance: float) -> bool:
        """Whether α fell by more than `tolerance`, and by more than chance lets it: one request, or none, does not say so."""
        return self.difference < -tolerance and self.high < 0


def compare(before: Sequence[Tensor], after: Sequence[Tensor], level: float = 0.9, seed: int = 0) -> Comparison:
    """Pair two drafts' scores, float `(N,)` a request, NaN without a target (see [`hf_osd.scoring.score`]), and resample requests.
    A NaN of `after` alone is a draft that diverged: nothing accepted. `ValueError` where the two are not of the same positions."""
    same = [len(b) for b in before] == [len(a) for a in after]
    if not same or any((b.isnan() & ~a.isnan()).any() for b, a in zip(before, after, strict=True)):
        raise ValueError(f"{len(before)} and {len(after)} scores, not of the same positions; score the same requests.")
    after = [torch.where(b.isnan(), b, a.nan_to_num(0.0)) for b, a in zip(before, after, strict=True)]
    requests, *gain = bootstrap([a - b for b, a in zip(before, after, strict=True)], level, seed)
    was, now = (float(torch.cat(scores).double().nanmean()) if requests else 0.0 for scores in (list(before), after))
    return Comparison(requests, was, now, *gain)


def interval(scores: Sequence[Tensor], level: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """α of one draft's scores, and its interval, as in `compare`: 0 to 1 with fewer than two requests; α is NaN with none."""
    requests, alpha, low, high = bootstrap(scores, level, seed)
    return alpha if requests else math.nan, max(low, 0.0), min(high, 1.0)


@dataclass(frozen=True)
class Estimate:
    """α of what serves on requests that nobody learnt from: `alpha`, with its 95% interval `low` to `high` over `requests`; and `since`, the same requests
    before, as the draft of their time would have served them, and now."""

    alpha: float
    low: float
    high: float
    requests: int
    since: Comparison

    def __str__(self) -> str:
        then = f"; {self.since.before:.3f} when they came" if self.since.requests else ""
        return f"alpha {self.alpha:.3f} ({self.low:.3f} to {self.high:.3f}) on {self.requests} of them{then}"

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Estimate:
        return cls(**{**values, "since": Comparison(**values["since"])})

    @classmethod
    def of(cls, requests: Sequence[Feedback], scores: Sequence[Tensor]) -> Estimate:
        """From what was held, with the `overlap` of its time, and its scores now, `(N,)` a request."""
        then = [request.overlap for request in requests]
        # Where nobody could judge a request when it came, only the positions are known at which it was drafted for.
        now = [torch.where(before.isnan(), before, after) for before, after in zip(then, scores, strict=True)]
        return cls(*interval(scores), len(requests), compare(then, now))


def figures_to_json(figures: dict) -> dict:
    """A learner's `figures()` for another process, with the `estimate` among them as JSON has it."""
    estimate = figures["estimate"]
    return figures | {"estimate": None if estimate is None else estimate.to_dict()}


def figures_from_json(figures: dict) -> dict:
    """What `figures_to_json` was given."""
    estimate = figures["estimate"]
    return figures | {"estimate": None if estimate is None else Estimate.from_dict(estimate)}


def bootstrap(scores: Sequence[Tensor], level: float, seed: int) -> tuple[int, float, float, float]:
    """For numbers `(N,)` a request: requests with a number, the mean of all numbers (0 without any), and its percentiles over 1000 resamples of requests."""
    if not 0 < level < 1:
        raise ValueError(f"`level` is {level!r}; give a number between 0 and 1, such as 0.9.")
    counted = [numbers.double() for one in scores if len(numbers := one[~one.isnan()])]
    if len(counted) < 2:
        return len(counted), float(counted[0].mean()) if counted else 0.0, -math.inf, math.inf
    sums = torch.stack([numbers.sum() for numbers in counted])  # (R,)
    positions = torch.tensor([len(numbers) for numbers in counted])  # (R,)
    drawn = torch.randint(len(sums), (1000, len(sums)), generator=torch.Generator().manual_seed(seed))
    means = sums[drawn].sum(1) / positions[drawn].sum(1)  # (resamples,)
    low, high = means.quantile(means.new_tensor([0.5 - level / 2, 0.5 + level / 2])).tolist()
    return len(counted), float(sums.sum() / positions.sum()), low, high


def _whole(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` is {value!r}; give a whole number ≥ {least}.")
    return value
