"""`Run`: the calls of one method in one repeat, and the figures of a method's runs: medians over its repeats, ratios to other methods' runs of the same repeats."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_osd.metrics.stats import CallStats
from recipes.benchmarks.workload import Call
from recipes.common.figures import or_none, rate_interval, spread

if TYPE_CHECKING:
    from hf_osd.policy.costs import Costs

GAIN = ("gain_of_learning", "gain_of_learning_interval", "gain_of_learning_end_to_end")

# v(1)..v(8) are reported.
_V = 8


@dataclass
class Run:
    """The calls of one method in one repeat, and its assistant's statistics of them."""

    calls: list[Call] = field(default_factory=list)
    stats: CallStats | None = None
    updates: int = 0
    costs: Costs | None = None
    regret: float | None = None  # regret_vs_static

    def sum(self, name: str) -> float:
        """Add up a field of all calls."""
        return sum(getattr(call, name) for call in self.calls)

    @property
    def rate(self) -> float:
        """New tokens a second."""
        return self.sum("new") / self.sum("seconds")

    @property
    def rate_with_learning(self) -> float:
        """New tokens a second of serving and learning together."""
        return self.sum("new") / (self.sum("seconds") + self.sum("learn_seconds"))

    @property
    def decode_rate(self) -> float | None:
        """New tokens a second after each request's first round, which includes the prompt; `None` if no request had another round."""
        tokens, seconds = self.sum("new") - self.sum("first"), self.sum("seconds") - self.sum("first_seconds")
        return tokens / seconds if tokens and seconds else None

    @property
    def ideal_speedup(self) -> float:
        """New tokens over Σ of the rounds' (draft steps · c + v(tokens verified)), with c and v as measured while serving.

        With a fixed γ this is `ideal_speedup` of docs/figures.md, (1 + Σ_j Π_{i≤j} a_i) / (γ·c + v(γ+1)): numerator and denominator are means over the
        rounds.
        """
        lengths = self.stats.verified_lengths
        v = self.costs.v_upto(max(lengths))
        time = self.stats.draft_steps * (self.costs.c or 0.0) + sum(n * v[length - 1] for length, n in lengths.items())
        return self.stats.new_tokens / time


def figures_of(runs: list[Run], plain: list[Run] | None) -> dict:
    """Compute a method's figures: medians over its repeats, and counts of the first one.

    Args:
        runs: the method's, one for each repeat.
        plain: plain decoding's of the same repeats, for speed-ups.
    """
    first, medians = runs[0], statistics.median
    figures = {
        "tokens_per_second": medians(run.rate for run in runs),
        "wall_s": medians(run.sum("seconds") for run in runs),
        "new_tokens": first.sum("new"),
        "tokens_per_round": first.sum("new") / first.sum("target_forwards"),
        "target_forwards": first.sum("target_forwards"),
        "draft_forwards": first.sum("draft_forwards"),
        "prefill_s": medians(run.sum("first_seconds") for run in runs),
        "speedup_vs_plain": None,
        "speedup_decode_only": None,
    }
    # Ratios of rates, not of seconds: sampled outputs differ in length.
    decode_only = None
    if plain is not None:
        figures["speedup_vs_plain"] = spread([run.rate / base.rate for run, base in zip(runs, plain, strict=True)])
        if all(run.decode_rate for run in (*runs, *plain)):
            decode_only = [run.decode_rate / base.decode_rate for run, base in zip(runs, plain, strict=True)]
            figures["speedup_decode_only"] = spread(decode_only)
    names = ("alpha", "alpha_live", "c", "v", "ideal_speedup", "share_of_ideal", "drafted_by", "accepted_by")
    figures |= dict.fromkeys(
        (*names, "head_coverage", "head_alpha_loss", "round_ms", "learn_s", "updates", "regret_vs_static")
    )
    if first.stats is None:
        return figures
    total = CallStats()
    for run in runs:
        total.add(run.stats)
    for name in ("alpha", "alpha_live", "head_coverage", "head_alpha_loss"):
        figures[name] = or_none(getattr(total, name))
    for name in ("drafted_by", "accepted_by"):
        figures[name] = {source: getattr(first.stats, name)[source] for source in ("draft", "cache")}
    known = [run.costs.c for run in runs if run.costs.c is not None]
    heights = zip(*(run.costs.v_upto(_V) for run in runs), strict=True)
    ideal = [run.ideal_speedup for run in runs]
    figures |= {
        "c": medians(known) if known else None,
        "v": {str(n): medians(height) for n, height in enumerate(heights, 1)},
        "ideal_speedup": medians(ideal),
        "round_ms": {part: medians(round_ms(run)[part] for run in runs) for part in round_ms(first)},
        "learn_s": medians(run.sum("learn_seconds") for run in runs),
        "updates": first.updates,
        "regret_vs_static": first.regret,
    }
    if decode_only is not None:
        figures["share_of_ideal"] = medians(speed / most for speed, most in zip(decode_only, ideal, strict=True))
    return figures


def gain_of(runs: list[Run], cache: list[Run], learns: bool) -> dict:
    """Compute what a method's draft earns beside the suffix cache: its tokens a second over those of the cache alone.

    Args:
        runs: the method's, one for each repeat.
        cache: those of the method `cache` in the same repeats, on the same requests.
        learns: whether the method learns between its requests, so that its seconds of learning are to be counted too.
    """
    pairs = list(zip(runs, cache, strict=True))
    requests = [
        (one.new, one.seconds, other.new, other.seconds)
        for run, base in pairs
        for one, other in zip(run.calls, base.calls, strict=True)
    ]
    count = len(runs[0].calls)
    # A request's repeats belong together: they are drawn together.
    summed = [tuple(map(sum, zip(*requests[i::count], strict=True))) for i in range(count)]
    end_to_end = spread([run.rate_with_learning / base.rate for run, base in pairs]) if learns else None
    return {
        "gain_of_learning": spread([run.rate / base.rate for run, base in pairs]),
        "gain_of_learning_interval": rate_interval(summed),
        "gain_of_learning_end_to_end": end_to_end,
    }


def round_ms(run: Run) -> dict[str, float]:
    """Split the milliseconds of a round, prompts' forwards included; `python` is the remainder, mostly generate's own loop."""
    parts = {name: getattr(run.stats, f"{name}_seconds") for name in ("draft", "target", "lookup", "capture")}
    parts["python"] = run.sum("seconds") - sum(parts.values())
    return {name: 1e3 * seconds / run.stats.rounds for name, seconds in parts.items()}


def difference(after: CallStats, before: CallStats) -> CallStats:
    """Subtract statistics: those of the calls between two moments."""
    found = CallStats()
    for name, value in vars(after).items():
        base = getattr(before, name)
        setattr(found, name, Counter(value - base) if isinstance(value, Counter) else value - base)
    return found
