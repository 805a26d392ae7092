"""Writes a sidecar's figures: for Prometheus, for people, and as one line of progress."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from hf_osd.metrics.stats import figure_text, is_figure

if TYPE_CHECKING:
    from prometheus_client import Metric

    from hf_osd.engines.sidecar.sidecar import Sidecar

# Counters of the sidecar, by their names in `Sidecar.counts`.
_COUNTS = {
    "requests": "Requests that came",
    "read": "Answers that were read to learn from",
    "passed": "Answers passed on as they came",
    "private": "Requests marked private",
    "refused": "Kinds of extended requests that an engine refused",
    "failed": "Requests that no engine answered, or that one broke off",
    "dropped": "Answers not learnt from, since learning did not keep up",
    "unreadable": "Answers that could not be made feedback of",
    "taught": "Answers that taught",
    "taught_tokens": "Tokens of these",
    "feedback_bytes": "Bytes of the feedback made of these",
    "taken_back": "Weights taken back, since an engine accepted fewer of their tokens",
    "errors": "Failures in the sidecar itself",
}
_LEARNING_COUNTS = {
    "updates": "Updates that learnt",
    "failed_updates": "Updates that failed",
    "accepted_updates": "Candidates that the gate let through",
    "rejected_updates": "Candidates that the gate dropped",
    "learned_tokens": "Tokens learnt",
    "learning_seconds": "Seconds of learning",
    "learner_restarts": "Learners started in place of dead ones",
}
_GAUGES = {"buffer_requests": "Requests in the buffer", "buffer_bytes": "Their bytes"}


class _Collector:
    """Collects figures when they are asked for."""

    def __init__(self, sidecar: Sidecar):
        self._sidecar = sidecar

    def collect(self) -> Iterator[Metric]:
        figures = self._sidecar.figures()
        for name, text in _COUNTS.items():
            yield CounterMetricFamily(f"hf_osd_{name}", f"{text}.", value=figures["counts"].get(name, 0))
        for name, text in _LEARNING_COUNTS.items():
            yield CounterMetricFamily(f"hf_osd_{name}", f"{text}.", value=figures["learning"][name] or 0)
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"hf_osd_{name}", f"{text}.", value=figures["learning"][name])
        yield CounterMetricFamily(
            "hf_osd_rereading_seconds",
            "Seconds of reading answers once more.",
            value=figures["rereading_seconds"],
        )
        yield GaugeMetricFamily(
            "hf_osd_waiting", "Answers that wait to be made feedback of.", value=figures["waiting"]
        )
        yield GaugeMetricFamily(
            "hf_osd_draft_version", "Times that the weights changed.", value=figures["draft_version"]
        )
        alpha = GaugeMetricFamily(
            "hf_osd_alpha",
            "Expected acceptance on the last requests, before they were learnt, of the draft that serves and of the one that learning began with.",
            labels=["draft"],
        )
        for draft, name in (("serving", "alpha"), ("initial", "alpha_initial")):
            if is_figure(figures[name]):
                alpha.add_metric([draft], figures[name])
        yield alpha
        yield from _of_engines(figures["acceptance"])
        yield from _of_pushes(figures["pushes"])


def _of_engines(acceptance: Mapping[str, Any]) -> Iterator[Metric]:
    """Make the engines' own counters; an engine that is not reached has none."""
    counters = {
        "rounds": CounterMetricFamily("hf_osd_engine_rounds", "Rounds that drafted.", labels=["engine"]),
        "drafted": CounterMetricFamily("hf_osd_engine_drafted", "Drafted tokens.", labels=["engine"]),
        "accepted": CounterMetricFamily("hf_osd_engine_accepted", "Drafted tokens accepted.", labels=["engine"]),
    }
    by_position = CounterMetricFamily(
        "hf_osd_engine_accepted_at",
        "Drafted tokens accepted, by position in the round.",
        labels=["engine", "position"],
    )
    for engine, counted in acceptance.items():
        if counted is None:
            continue
        for name, counter in counters.items():
            counter.add_metric([engine], getattr(counted, name))
        for position, count in enumerate(counted.by_position):
            by_position.add_metric([engine, str(position)], count)
    yield from counters.values()
    yield by_position


def _of_pushes(pushes: Mapping[str, Any]) -> Iterator[Metric]:
    """Make gauges of the numbers that a pusher tells of each engine."""
    families: dict[str, GaugeMetricFamily] = {}
    for engine, told in pushes.items():
        if not isinstance(told, Mapping):
            continue
        for name, value in told.items():
            if is_figure(value):
                family = GaugeMetricFamily(
                    f"hf_osd_push_{name}", f"Of pushes to an engine: {name.replace('_', ' ')}.", labels=["engine"]
                )
                families.setdefault(name, family).add_metric([engine], value)
    yield from families.values()


def metrics_text(sidecar: Sidecar) -> tuple[bytes, str]:
    """Write the figures as Prometheus reads them; return them and their media type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(sidecar))
    return generate_latest(registry), CONTENT_TYPE_LATEST


def status_values(sidecar: Sidecar) -> dict:
    """Return the figures as JSON values."""
    figures = sidecar.figures()
    counted = {engine: None if one is None else asdict(one) for engine, one in figures["acceptance"].items()}
    return {**figures, "acceptance": counted}


def status_text(sidecar: Sidecar) -> str:
    """Write the figures for people."""
    figures = sidecar.figures()
    counts, learning = figures["counts"], figures["learning"]

    def number(name: str) -> int:
        return counts.get(name, 0)

    lines = [
        f"up {figures['seconds'] / 60:.0f} min, {number('requests')} requests: {number('read')} read, {number('passed')} passed on as they came, "
        f"{number('private')} private, {number('failed')} failed",
        f"learnt from: {number('taught')} answers, {number('taught_tokens')} tokens, {number('feedback_bytes') / 2**20:.1f} MiB; {number('dropped')} dropped, "
        f"{number('unreadable')} unreadable, {figures['waiting']} wait; {figures['rereading_seconds']:.1f} s of reading them once more",
        f"learning: {learning['updates']} updates ({learning['failed_updates']} failed), candidates {learning['accepted_updates']} accepted and "
        f"{learning['rejected_updates']} dropped, {learning['learned_tokens']} tokens, {learning['learning_seconds']:.1f} s",
        f"alpha {figure_text(figures['alpha'])}, {figure_text(figures['alpha_initial'])} as learning began; draft version {figures['draft_version']}, "
        f"{number('taken_back')} taken back",
    ]
    lines += [f"{name.replace('_', ' ')}: {learning[name]}" for name in ("learning_over", "trouble") if learning[name]]
    for engine, counted in figures["acceptance"].items():
        lines.append(f"{engine}: {_acceptance(counted)}")
    for engine, told in figures["pushes"].items():
        told = ", ".join(f"{name} {value}" for name, value in told.items()) if isinstance(told, Mapping) else told
        lines.append(f"pushed to {engine}: {told}")
    return "\n".join(lines) + "\n"


def progress_line(figures: Mapping[str, Any]) -> str:
    """Write a line of progress."""
    counts, learning = figures["counts"], figures["learning"]
    lengths = [c.mean_length for c in figures["acceptance"].values() if c is not None and is_figure(c.mean_length)]
    return (
        f"{counts.get('requests', 0)} requests, {counts.get('taught', 0)} learnt from, {counts.get('failed', 0)} failed; alpha {figure_text(figures['alpha'])} "
        f"({figure_text(figures['alpha_initial'])} as learning began); {learning['updates']} updates, {learning['accepted_updates']} let through; "
        f"mean acceptance length {', '.join(figure_text(x) for x in lengths) or '-'}"
    )


def _acceptance(counted: Any) -> str:
    if counted is None:
        return "no counters: it is down, or does not speculate"
    shares = " ".join(f"{count / counted.rounds:.2f}" for count in counted.by_position) if counted.rounds else "-"
    return f"{counted.rounds} rounds, mean acceptance length {figure_text(counted.mean_length)}, by position {shares}"
