"""`Stats`: what serving observed, of the last call, over the last calls and in all. Figures are named as docs/figures.md has them."""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_osd.metrics.intervals import Estimate

ROLLING = 50  # requests; the paper's moving average


@dataclass
class CallStats:
    """One generate call, or the sum of several.

    `accepted_by_position[i]` and `tested_by_position[i]` count the (i+1)-th drafted token of a block; a token is tested if all
    before it in its block were accepted. `drafted_by`, `tested_by` and `accepted_by` count the same tokens by their source, `"draft"` or
    `"cache"`; `verified_lengths[n]` counts rounds that verified n tokens. `overlap_sum / overlap_count` is `alpha`. `head_*` are of calls whose draft computes some rows of its LM head alone: verified
    tokens, those that it lacked, and those among these that the whole head would have said. `plain_requests` were not drafted for,
    since the target cannot verify a block; `verification_forwards` of the target went into finding out whether it can, beside those of rounds.
    """

    requests: int = 0
    rounds: int = 0
    new_tokens: int = 0
    drafted: int = 0
    tested: int = 0
    accepted: int = 0
    overlap_sum: float = 0.0
    overlap_count: int = 0
    tested_by_position: Counter = field(default_factory=Counter)
    accepted_by_position: Counter = field(default_factory=Counter)
    drafted_by: Counter = field(default_factory=Counter)
    tested_by: Counter = field(default_factory=Counter)
    accepted_by: Counter = field(default_factory=Counter)
    verified_lengths: Counter = field(default_factory=Counter)
    draft_steps: int = 0
    head_tokens: int = 0
    head_lacked: int = 0
    head_missed: int = 0
    draft_seconds: float = 0.0
    target_seconds: float = 0.0
    lookup_seconds: float = 0.0
    capture_seconds: float = 0.0
    plain_requests: int = 0
    verification_forwards: int = 0
    verification_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """What the call took of the time, prompts included."""
        beside = self.lookup_seconds + self.capture_seconds + self.verification_seconds
        return self.draft_seconds + self.target_seconds + beside

    @property
    def alpha(self) -> float:
        """Expected acceptance at every position of the trajectory, teacher-forced; NaN if the draft predicted none."""
        return self.overlap_sum / self.overlap_count if self.overlap_count else math.nan

    @property
    def alpha_live(self) -> float:
        """Accepted over tested positions in serving; NaN if none was tested."""
        return self.accepted / self.tested if self.tested else math.nan

    @property
    def tokens_per_round(self) -> float:
        """New tokens a target forward, the bonus token included."""
        return self.new_tokens / self.rounds if self.rounds else math.nan

    @property
    def head_coverage(self) -> float:
        """Share of verified tokens that the draft's head could say; NaN where it was whole throughout."""
        return 1 - self.head_lacked / self.head_tokens if self.head_tokens else math.nan

    @property
    def head_alpha_loss(self) -> float:
        """What `alpha` lost to the rows that the head lacked, greedy; NaN where it was whole throughout."""
        return self.head_missed / self.overlap_count if self.head_tokens and self.overlap_count else math.nan

    def observe_round(
        self,
        drafted: int,
        tested: int,
        accepted: int,
        new_tokens: int,
        own: int | None = None,
        steps: int | None = None,
    ):
        """Of `drafted` tokens the first `own` are the draft's, all if left out, in `steps` forwards; the others are the suffix cache's."""
        own = drafted if own is None else own
        self.rounds += 1
        self.drafted += drafted
        self.tested += tested
        self.accepted += accepted
        self.new_tokens += new_tokens
        self.verified_lengths[drafted + 1] += 1
        self.draft_steps += own if steps is None else steps
        for i in range(tested):
            self.tested_by_position[i] += 1
            self.accepted_by_position[i] += i < accepted
        for counts, n in ((self.drafted_by, drafted), (self.tested_by, tested), (self.accepted_by, accepted)):
            counts["draft"] += min(n, own)
            counts["cache"] += max(n - own, 0)

    def add(self, other: CallStats):
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def to_dict(self) -> dict:
        counts = {name: value for name, value in vars(self).items() if not isinstance(value, Counter)}
        most = max(self.tested_by_position, default=-1) + 1
        by_position = [self.accepted_by_position[i] / self.tested_by_position[i] for i in range(most)]
        names = ("alpha", "alpha_live", "tokens_per_round", "head_coverage", "head_alpha_loss")
        figures = {name: getattr(self, name) for name in names} | {"acceptance_by_position": by_position}
        by_source = {name: dict(getattr(self, name)) for name in ("drafted_by", "tested_by", "accepted_by")}
        by_source["verified_lengths"] = {str(n): count for n, count in sorted(self.verified_lengths.items())}
        return counts | figures | by_source

    def state(self) -> dict:
        """All counts as JSON has them, for `of_state`; `to_dict` has figures."""
        # Pairs: JSON would make the positions that some are counted by into strings.
        return {n: list(v.items()) if isinstance(v, Counter) else v for n, v in vars(self).items()}

    @classmethod
    def of_state(cls, values: dict) -> CallStats:
        """What gave `state()`; `TypeError` for a count that this version does not know."""
        return cls(**{n: Counter(dict(v)) if isinstance(v, list) else v for n, v in values.items()})


@dataclass
class Stats:
    """Statistics of an [`OnlineAssistant`]: `last` call, `rolling` over the last 50, `total`; and the learner's counts."""

    last: CallStats = field(default_factory=CallStats)
    total: CallStats = field(default_factory=CallStats)
    updates: int = 0
    failed_updates: int = 0
    rejected_updates: int = 0  # whose candidate the gate dropped
    accepted_updates: int = 0  # whose candidate it let through
    learner_restarts: int = 0  # of a thread or process that was dead
    learning_seconds: float = 0.0
    learned_tokens: int = 0
    buffer_requests: int = 0
    buffer_bytes: int = 0
    buffer_capacity: int = 0
    draft_version: int = 0
    suffix_cache_bytes: int = 0
    longest_update: float = 0.0  # seconds
    longest_wait: float = 0.0  # seconds that a call waited at its beginning for what calls before it had to teach
    learning_rate: float | None = None  # of the next update
    learning_rate_reason: str = ""
    too_slow: str | None = None  # why nothing is learnt
    learning_over: str | None = None  # why nothing will be learnt any more
    trouble: str | None = None  # why what is learnt changes nothing
    serves_static: bool = False  # the draft before any learning serves, for it is better on what comes
    regret_vs_static: float = 0.0
    estimate: Estimate | None = None  # α on the last requests, before they were learnt
    recent: deque[CallStats] = field(default_factory=lambda: deque(maxlen=ROLLING), repr=False)

    @property
    def rolling(self) -> CallStats:
        total = CallStats()
        for call in self.recent:
            total.add(call)
        return total

    def observe_call(self, call: CallStats):
        self.last = call
        self.recent.append(call)
        self.total.add(call)

    def state(self) -> dict:
        """What a restart needs, as JSON has it: the sums and the recent calls. The learner's counts are the learner's to keep."""
        return {"total": self.total.state(), "recent": [call.state() for call in self.recent]}

    @classmethod
    def of_state(cls, values: dict) -> Stats:
        """Go on from `state()`; `LookupError` or `TypeError` for that of another version."""
        stats = cls(total=CallStats.of_state(values["total"]))
        stats.recent.extend(map(CallStats.of_state, values["recent"]))
        if stats.recent:
            stats.last = stats.recent[-1]
        return stats

    def to_dict(self) -> dict:
        counts = {name: value for name, value in vars(self).items() if isinstance(value, (int, float))}
        if self.estimate is not None:
            counts |= {"alpha_prequential": self.estimate.alpha, "alpha_static": self.estimate.gain.before}
            counts |= {f"alpha_prequential_{end}": getattr(self.estimate, end) for end in ("low", "high")}
        return counts | {name: getattr(self, name).to_dict() for name in ("last", "rolling", "total")}

    def __str__(self) -> str:
        calls = {"last call": self.last, f"last {len(self.recent)}": self.rolling, "all": self.total}
        rows = [
            ("requests", lambda s: f"{s.requests}"),
            ("new tokens", lambda s: f"{s.new_tokens}"),
            ("rounds", lambda s: f"{s.rounds}"),
            ("drafted / accepted", lambda s: f"{s.drafted} / {s.accepted}"),
            ("  by the draft", lambda s: f"{s.drafted_by['draft']} / {s.accepted_by['draft']}"),
            ("  by the cache", lambda s: f"{s.drafted_by['cache']} / {s.accepted_by['cache']}"),
            ("alpha", lambda s: _figure(s.alpha)),
            ("alpha_live", lambda s: _figure(s.alpha_live)),
            ("tokens a round", lambda s: _figure(s.tokens_per_round)),
            ("by position", lambda s: " ".join(f"{a:.2f}" for a in s.to_dict()["acceptance_by_position"]) or "-"),
            ("head covers / costs α", lambda s: f"{_figure(s.head_coverage)} / {_figure(s.head_alpha_loss)}"),
            ("draft s / target s", lambda s: f"{s.draft_seconds:.2f} / {s.target_seconds:.2f}"),
        ]
        table = [["", *calls]] + [[name, *(cell(call) for call in calls.values())] for name, cell in rows]
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        mib = 2**20
        lines += [
            f"learning: {self.updates} updates ({self.failed_updates} failed), candidates {self.accepted_updates} accepted and {self.rejected_updates} dropped, {self.learned_tokens} tokens, {self.learning_seconds:.1f} s",
            f"before it was learnt: {self.estimate or '-'}; regret_vs_static {self.regret_vs_static:+.4f}",
            f"buffer: {self.buffer_requests} requests, {self.buffer_bytes / mib:.1f} of {self.buffer_capacity / mib:.0f} MiB",
            f"suffix cache: {self.suffix_cache_bytes / mib:.1f} MiB",
        ]
        return "\n".join(lines)


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
