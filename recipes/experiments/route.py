"""Compares one draft for all traffic with several that are routed, on answers that `recipes/experiments/record.py` has recorded, mixed in random order.

    python -m recipes.experiments.route --trace runs/traces/sql,runs/traces/maths --requests 120 --seeds 0,1,2

Arms: `shared`, one draft; `fixed`, one for each trace, which is the best assignment in hindsight if each trace is a domain; `routed`, one for each topic that
`TopicRouter` finds, each new one from the draft to begin with; and `forked`, where a new one starts from the weights of the draft that served its topic until then. All learn from the same
requests in the same order, each draft after so many of its own: in all they make equally many updates.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import statistics
import sys
import time
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from hf_osd import Feedback, OnlineAssistant, OnlineConfig
from hf_osd.feedback.prompt_states import SeenTexts
from hf_osd.policy.routing import TopicRouter, prompt_features
from hf_osd.system.bounds import option, whole
from recipes.common.command import check_learns, check_trace, numbers_of, run_command
from recipes.common.models import ModelArguments, load_target, shuffled, use_threads
from recipes.common.options import optional_string, string
from recipes.common.row_log import RowLog
from recipes.experiments.arms import intervals, read_arm
from recipes.experiments.replay import alpha_of, hits_of, load_trace
from recipes.experiments.replaying import kept, serve
from recipes.experiments.topics import purity

logger = logging.getLogger("hf_osd.recipes.route")

ARMS = ("shared", "fixed", "routed", "forked")


@dataclass
class RouteArguments(ModelArguments):
    """What to serve, and how. The flags of `OnlineConfig` are those of each draft."""

    trace: str = option("", string(), "Folders made by record.py, with ',' between: a domain each.")
    arms: str = option(
        ",".join(ARMS), string(), "Which to run, with ',' between; the first is what others are compared with."
    )
    requests: int = option(120, whole(1), "Requests of each trace.")
    held_back: int = option(40, whole(1), "Held-back prompts of each trace to score on.")
    seeds: str = option("0", string(), "Seeds of request order and learning, with ',' between; a run for each.")
    max_routes: int = option(8, whole(1), "Drafts at one time, at most, where they are routed.")
    observe_every: int = option(2, whole(1), "Requests between two on which all routed drafts are scored.")
    log: str | None = option(
        None, optional_string(), "Append a row for each run to this JSONL file; runs it already has are not run again."
    )

    def __post_init__(self):
        super().__post_init__()
        check_trace(self.trace)
        if unknown := [arm for arm in self.arms.split(",") if arm not in ARMS]:
            raise ValueError(f"`arms` has {unknown}; choose from {', '.join(ARMS)}.")


def main(argv: list[str] | None = None) -> int:
    """Run each arm with each seed, print a line for each and a table at the end; returns the exit status."""
    return run_command(RouteArguments, measure, argv)


def measure(args: RouteArguments, config: OnlineConfig):
    """Do every run that the log does not have, and print the table of all arms against the first."""
    check_learns(config.learn, "recipes/experiments/route.py")
    use_threads(args.threads)
    log = RowLog(args.log, ("key", "arm", "seed", "prequential"))
    done = {row["key"]: row for row in log.rows}
    experiment = Experiment(args, config)
    results = []
    for name in args.arms.split(","):
        results.append([])
        for seed in numbers_of(args.seeds, "seeds", least=0):
            key = experiment.key(name, seed)
            if (row := done.get(key)) is None:
                row = {"key": key} | experiment.run(name, seed)
                log.append(row)
            results[-1].append(row)
            print(_line(row), flush=True)
    print(table(results))


class Drafts:
    """The drafts of one run, by route.

    Args:
        new: makes the draft that they start from.
    """

    def __init__(self, new, config: OnlineConfig):
        self._new, self._config = new, config
        self.assistants: dict[Hashable, OnlineAssistant] = {}
        self._known: dict[Hashable, SeenTexts] = {}
        self.updates, self._made = 0, 0

    def open(self, route: Hashable, parent: Hashable | None = None):
        """Make a route's draft, if there is none: from what all start from, or the weights that `parent` serves."""
        if route in self.assistants:
            return
        if parent in self.assistants:
            draft = copy.deepcopy(self.assistants[parent].serving.active).requires_grad_(True)
        else:
            draft = self._new()
        self.assistants[route], self._known[route] = OnlineAssistant(draft, self._config), SeenTexts()

    def keep(self, routes: tuple[Hashable, ...]):
        """Drop the drafts of all other routes."""
        for route in self.assistants.keys() - set(routes):
            self.updates += self.assistants.pop(route).stats.updates
            del self._known[route]

    def score(self, route: Hashable, request: Feedback) -> tuple[float, int]:
        """Count accepted and all positions of a request that has not been learnt."""
        assistant = self.assistants[route]
        [[hits, positions]] = hits_of(assistant, [kept(assistant, request)])
        return hits, positions

    def serve(self, route: Hashable, request: Feedback, limit: int) -> tuple[int, int]:
        """Predict a request, then let the route's draft learn it; counts accepted and all positions."""
        assistant = self.assistants[route]
        request = kept(assistant, request)
        [overlap] = assistant.score([request])
        serve(assistant, request, overlap, self._known[route], limit)
        assistant.update()
        return int(overlap.nansum()), int((~overlap.isnan()).sum())


class Experiment:
    """Shared by all runs: target, traces, and the prompts' features."""

    def __init__(self, args: RouteArguments, config: OnlineConfig):
        self.args, self.config = args, config
        self.target, _ = load_target(args.target, args.dtype, args.device)
        self.traces = [load_trace(Path(folder), config.top_k, args.held_back) for folder in args.trace.split(",")]
        if any(traced.draft_size is not None for traced in self.traces):
            raise ValueError("A trace is in the tokens of another vocabulary; record it without --draft.")
        for traced in self.traces:
            if len(traced.stream) < args.requests:
                raise ValueError(
                    f"{traced.name} has {len(traced.stream)} recorded requests and `requests` asks for {args.requests}; record more, or lower it."
                )
        self.limit = max(traced.max_new_tokens for traced in self.traces)

    def key(self, arm: str, seed: int) -> str:
        """Digest what makes two runs the same run."""
        args = self.args
        facts = [arm, seed, args.target, args.dtype, args.draft, args.requests, args.held_back]
        facts += [{**self.config.to_dict(), "seed": None}, [(traced.name, traced.digest) for traced in self.traces]]
        facts += [args.max_routes, args.observe_every] if arm in ("routed", "forked") else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def run(self, arm: str, seed: int) -> dict:
        """Serve all traces, mixed, with one arm: α of each request before it was learnt, and of the held-back prompts at the end."""
        began = time.perf_counter()
        args, config = self.args, dataclasses.replace(self.config, seed=seed, suffix_cache=False)
        base = read_arm("base", config, args.draft)
        drafts = Drafts(lambda: base.draft(self.target), config)
        router = TopicRouter(args.max_routes, seed=seed) if arm in ("routed", "forked") else None
        rows = [(traced.name, one) for traced in self.traces for one in shuffled(traced.stream, seed)[: args.requests]]
        prequential, choices, routing = [], [], 0.0
        for served, (domain, request) in enumerate(shuffled(rows, seed)):
            topic, route, parent = None, {"shared": "shared", "fixed": domain}.get(arm), None
            if router is not None:
                start = time.perf_counter()
                choice = router.route(self.features(request))
                routing += time.perf_counter() - start
                topic, route, parent = choice.topic, choice.route, choice.parent if arm == "forked" else None
            drafts.open(route, parent)
            if router is not None and served % args.observe_every == 0:
                counts = {name: drafts.score(name, request) for name in router.routes if name in drafts.assistants}
                if (positions := counts[route][1]) > 0:
                    router.observe(topic, {name: hits / positions for name, (hits, _) in counts.items()}, positions)
            prequential.append(drafts.serve(route, request, self.limit))
            choices.append((domain, topic, route))
            if router is not None:
                drafts.keep(router.routes)
        drafts.updates += sum(assistant.stats.updates for assistant in drafts.assistants.values())
        learning = sum(assistant.stats.learning_seconds for assistant in drafts.assistants.values())
        scores = {traced.name: self._score(arm, drafts, router, traced) for traced in self.traces}
        return {
            "arm": arm,
            "seed": seed,
            "prequential": prequential,
            "choices": choices,
            "scores": scores,
            "updates": drafts.updates,
            "drafts": len(drafts.assistants),
            "purity": None if router is None else purity(*_late(choices)),
            "routing_ms": round(1000 * routing / len(rows), 3),
            "learning_seconds": round(learning, 1),
            "seconds": round(time.perf_counter() - began, 1),
        }

    def features(self, request: Feedback):
        """Compute a recorded prompt's features."""
        return prompt_features(self.target.get_input_embeddings().weight, request.tokens[: request.prompt_length])

    def _score(self, arm: str, drafts: Drafts, router: TopicRouter | None, traced) -> list[tuple[int, int]]:
        """Count `[accepted, positions]` of a domain's held-back prompts; where they are routed, each by a copy of the router, which learns nothing from them."""
        counts = []
        for request in traced.held_back:
            route = {"shared": "shared", "fixed": traced.name}.get(arm)
            if router is not None:
                route = copy.deepcopy(router).route(self.features(request)).route
                if route not in drafts.assistants:  # it would have opened now
                    route = next(iter(drafts.assistants))
            counts.append(drafts.score(route, request))
        return counts


def _late(choices: list[tuple]) -> tuple[list, list]:
    """Return topics and domains of the last quarter of the requests."""
    late = choices[-len(choices) // 4 :]
    return [topic for _, topic, _ in late], [domain for domain, _, _ in late]


def table(results: list[list[dict]]) -> str:
    """Write a Markdown table with a line for each arm: α of the last quarter of the requests, each before it was learnt, and of the held-back prompts, with
    paired differences to the first arm."""
    names = list(results[0][0]["scores"])
    lines = [
        f"\n{len(results[0][0]['prequential'])} requests of {', '.join(names)}, {len(results[0])} seeds",
        "| arm | drafts | updates | α of the last quarter, before learning | against the first arm (95%) | α held back | "
        + " | ".join(names)
        + " | against the first arm (95%) | purity |",
        "|" + "---|" * (8 + len(names)),
    ]
    quarters = [[row["prequential"][-len(row["prequential"]) // 4 :] for row in rows] for rows in results]
    held = [[[pair for name in names for pair in row["scores"][name]] for row in rows] for rows in results]
    for rows, quarter, scores in zip(results, quarters, held, strict=True):
        cells = [rows[0]["arm"], _mean(row["drafts"] for row in rows), _mean(row["updates"] for row in rows)]
        first = rows is results[0]
        cells += [
            f"{statistics.fmean(map(alpha_of, quarter)):.3f}",
            "" if first else str(intervals(quarters[0], quarter)),
        ]
        cells += [f"{statistics.fmean(map(alpha_of, scores)):.3f}"]
        cells += [f"{statistics.fmean(alpha_of(row['scores'][name]) for row in rows):.3f}" for name in names]
        cells += ["" if first else str(intervals(held[0], scores))]
        purities = [row["purity"] for row in rows if row["purity"] is not None]
        cells += [f"{statistics.fmean(purities):.2f}" if purities else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values) -> str:
    return f"{statistics.fmean(values):.3g}"


def _line(row: dict) -> str:
    quarter = row["prequential"][-len(row["prequential"]) // 4 :]
    held = "; ".join(f"{name} {alpha_of(pairs):.3f}" for name, pairs in row["scores"].items())
    return (
        f"{row['arm']:<8} seed {row['seed']} α of the last quarter {alpha_of(quarter):.3f}, held back {held}  "
        f"({row['drafts']} drafts, {row['updates']} updates, {row['seconds']:.0f} s)"
    )


if __name__ == "__main__":
    sys.exit(main())
