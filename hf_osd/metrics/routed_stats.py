"""`RoutedStats` sums the statistics of several routes, see [`hf_osd.routed.RoutedAssistant`]."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hf_osd.metrics.stats import CallStats, Stats


@dataclass
class RoutedStats(Stats):
    """Counts several routes together, or what a route counted before and after it was put away. `rolling` sums the last 50 calls of each; the last call and what is no count (the learning rate,
    `estimate`, `regret_vs_static`) are those of the one that has served most.

    Attributes:
        by_route (`dict[str, Stats]`): the statistics of each route.
        routing_seconds (`float`): scoring all routes' drafts on requests, for the router. They are part of the `learning_seconds` of all routes together, and of no route's own.
    """

    routing_seconds: float = 0.0
    by_route: dict[str, Stats] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: list[Stats]) -> RoutedStats:
        """Sum statistics."""
        most = max(parts, key=lambda stats: stats.total.requests)
        total = CallStats()
        for stats in parts:
            total.add(stats.total)
        figures = {name: sum(getattr(stats, name) for stats in parts) for name in _SUMMED}
        figures |= {name: max(getattr(stats, name) for stats in parts) for name in _LARGEST}
        figures |= {name: getattr(most, name) for name in _OF_MOST}
        recent = deque(call for stats in parts for call in stats.recent)
        return cls(total=total, recent=recent, by_route={}, **figures)


_SUMMED = (
    "updates", "failed_updates", "rejected_updates", "accepted_updates", "learner_restarts", "learned_tokens", "learning_seconds", "buffer_requests", "buffer_bytes",
    "buffer_capacity", "draft_version",
)  # fmt: skip
_LARGEST = ("longest_update", "longest_wait", "suffix_cache_bytes")
_OF_MOST = (
    "last",
    "learning_rate",
    "learning_rate_reason",
    "estimate",
    "regret_vs_static",
    "serves_static",
    "trouble",
)
