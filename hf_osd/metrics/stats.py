"""`Stats` counts what happens while serving: in the last call, in the last 50 calls, and in all. Figures have their names of docs/figures.md."""

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
    """Counts one generate call, or the sum of several.

    `accepted_by_position[i]` and `tested_by_position[i]` count the (i+1)-th drafted token of a block; a token is tested if all
    before it in its block were accepted. `drafted_by`, `tested_by` and `accepted_by` count the same tokens by their source, `"draft"` or
    `"cache"`; `verified_lengths[n]` counts rounds that verified n tokens. `overlap_sum / overlap_count` is `alpha`.

    `head_*` count calls with a reduced draft vocabulary: `head_tokens` verified tokens; of these, `head_lacked` missing from it; of these, `head_missed` that
    the full head would have predicted. `refed_tokens` were verified and then read again by a target with recurrent states, at the beginning of its next verification,
    or, where a cache outlives the call, after the last one, in a forward more (`completing_forwards`). `plain_requests` got no drafts, since the target cannot verify a block; `verification_forwards` are the
    target's forwards that found out whether it can, not counted in rounds.
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
    refed_tokens: int = 0
    completing_forwards: int = 0
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
        """Sum the seconds of the call, prompts included."""
        beside = self.lookup_seconds + self.capture_seconds + self.verification_seconds
        return self.draft_seconds + self.target_seconds + beside

    @property
    def alpha(self) -> float:
        """Compute expected acceptance over all positions of the target's trajectory, teacher-forced; NaN if the draft predicted none."""
        return self.overlap_sum / self.overlap_count if self.overlap_count else math.nan

    @property
    def alpha_live(self) -> float:
        """Divide accepted by tested positions in serving; NaN if none was tested."""
        return self.accepted / self.tested if self.tested else math.nan

    @property
    def tokens_per_round(self) -> float:
        """Compute new tokens per target forward, the bonus token included; NaN without rounds."""
        return self.new_tokens / self.rounds if self.rounds else math.nan

    @property
    def head_coverage(self) -> float:
        """Compute the share of verified tokens that the draft's head had rows for; NaN if the head was never reduced."""
        return 1 - self.head_lacked / self.head_tokens if self.head_tokens else math.nan

    @property
    def head_alpha_loss(self) -> float:
        """Compute how much `alpha` the rows missing from the head cost, greedy; NaN if the head was never reduced."""
        return self.head_missed / self.overlap_count if self.head_tokens and self.overlap_count else math.nan

    def observe_round(
        self,
        drafted: int,
        tested: int,
        accepted: int,
        new_tokens: int,
        from_draft: int | None = None,
        steps: int | None = None,
    ):
        """Count one round. The first `from_draft` of the `drafted` tokens came from the draft model, in `steps` of its forwards, and the others from the suffix
        cache; left out, all came from the draft model, in one forward each."""
        from_draft = drafted if from_draft is None else from_draft
        self.rounds += 1
        self.drafted += drafted
        self.tested += tested
        self.accepted += accepted
        self.new_tokens += new_tokens
        self.verified_lengths[drafted + 1] += 1
        self.draft_steps += from_draft if steps is None else steps
        for i in range(tested):
            self.tested_by_position[i] += 1
            self.accepted_by_position[i] += i < accepted
        for counts, n in ((self.drafted_by, drafted), (self.tested_by, tested), (self.accepted_by, accepted)):
            counts["draft"] += min(n, from_draft)
            counts["cache"] += max(n - from_draft, 0)

    def add(self, other: CallStats):
        """Add the counts of another call."""
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def to_dict(self) -> dict:
        """Return counts and figures by name, as JSON values but for NaN."""
        counts = {name: value for name, value in vars(self).items() if not isinstance(value, Counter)}
        longest = max(self.tested_by_position, default=-1) + 1
        by_position = [self.accepted_by_position[i] / self.tested_by_position[i] for i in range(longest)]
        names = ("alpha", "alpha_live", "tokens_per_round", "head_coverage", "head_alpha_loss")
        figures = {name: getattr(self, name) for name in names} | {"acceptance_by_position": by_position}
        by_source = {name: dict(getattr(self, name)) for name in ("drafted_by", "tested_by", "accepted_by")}
        by_source["verified_lengths"] = {str(n): count for n, count in sorted(self.verified_lengths.items())}
        return counts | figures | by_source

    def state(self) -> dict:
        """Return all counts as JSON values, for `from_state`; unlike `to_dict`, without figures."""
        # Pairs, for JSON would turn the positions, which are keys, into strings.
        return {n: list(v.items()) if isinstance(v, Counter) else v for n, v in vars(self).items()}

    @classmethod
    def from_state(cls, values: dict) -> CallStats:
        """Restore what `state` returned; `TypeError` for a count that this version does not know."""
        return cls(**{n: Counter(dict(v)) if isinstance(v, list) else v for n, v in values.items()})


@dataclass
class Stats:
    """Holds the statistics of an [`OnlineAssistant`]: of the `last` call, `rolling` over the last 50 calls, and `total`; and the learner's counts."""

    last: CallStats = field(default_factory=CallStats)
    total: CallStats = field(default_factory=CallStats)
    updates: int = 0
    failed_updates: int = 0
    rejected_updates: int = 0  # updates whose candidate the gate dropped
    accepted_updates: int = 0  # updates whose candidate the gate let through
    learner_restarts: int = 0  # of a learner's dead thread or process
    learning_seconds: float = 0.0
    learned_tokens: int = 0
    buffer_requests: int = 0
    buffer_bytes: int = 0
    buffer_capacity: int = 0
    draft_version: int = 0
    suffix_cache_bytes: int = 0
    longest_update: float = 0.0  # seconds
    longest_wait: float = 0.0  # seconds that a call waited, before its first token, for learning from earlier calls
    learning_rate: float | None = None  # in the next update
    learning_rate_reason: str = ""
    too_slow: str | None = None  # why nothing is learnt
    learning_over: str | None = None  # why learning has ended for good
    trouble: str | None = None  # why learning has no effect
    serves_static: bool = False  # the draft before any learning serves again, since it does better on new requests
    regret_vs_static: float = 0.0
    estimate: Estimate | None = None  # α on the last requests, each scored before it was learnt
    recent: deque[CallStats] = field(default_factory=lambda: deque(maxlen=ROLLING), repr=False)

    @property
    def rolling(self) -> CallStats:
        """Sum the last 50 calls."""
        total = CallStats()
        for call in self.recent:
            total.add(call)
        return total

    def observe_call(self, call: CallStats):
        """Count a call that has ended."""
        self.last = call
        self.recent.append(call)
        self.total.add(call)

    def state(self) -> dict:
        """Return the sums and the recent calls as JSON values, for `from_state`. The learner saves its own counts."""
        return {"total": self.total.state(), "recent": [call.state() for call in self.recent]}

    @classmethod
    def from_state(cls, values: dict) -> Stats:
        """Restore what `state` returned; `LookupError` or `TypeError` if another version wrote it."""
        stats = cls(total=CallStats.from_state(values["total"]))
        stats.recent.extend(map(CallStats.from_state, values["recent"]))
        if stats.recent:
            stats.last = stats.recent[-1]
        return stats

    def to_dict(self) -> dict:
        """Return counts and figures by name, those of calls under `last`, `rolling` and `total`."""
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
            ("alpha", lambda s: figure_text(s.alpha)),
            ("alpha_live", lambda s: figure_text(s.alpha_live)),
            ("tokens a round", lambda s: figure_text(s.tokens_per_round)),
            ("by position", lambda s: " ".join(f"{a:.2f}" for a in s.to_dict()["acceptance_by_position"]) or "-"),
            ("head covers / costs α", lambda s: f"{figure_text(s.head_coverage)} / {figure_text(s.head_alpha_loss)}"),
            ("draft s / target s", lambda s: f"{s.draft_seconds:.2f} / {s.target_seconds:.2f}"),
        ]
        table = [["", *calls]] + [[name, *(cell(call) for call in calls.values())] for name, cell in rows]
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        mib = 2**20
        lines += [
            f"learning: {self.updates} updates ({self.failed_updates} failed), candidates {self.accepted_updates} accepted and {self.rejected_updates} "
            f"dropped, {self.learned_tokens} tokens, {self.learning_seconds:.1f} s",
            f"before it was learnt: {self.estimate or '-'}; regret_vs_static {self.regret_vs_static:+.4f}",
            f"buffer: {self.buffer_requests} requests, {self.buffer_bytes / mib:.1f} of {self.buffer_capacity / mib:.0f} MiB",
            f"suffix cache: {self.suffix_cache_bytes / mib:.1f} MiB",
        ]
        return "\n".join(lines)


def is_figure(value: object) -> bool:
    """Tell whether a value is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def figure_text(value: float | None) -> str:
    """Write a figure with three decimals; "-" if it is unknown or not finite."""
    return f"{value:.3f}" if is_figure(value) else "-"
