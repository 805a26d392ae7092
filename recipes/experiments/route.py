"""Compares one draft for all traffic with several that are routed, on answers that `recipes/experiments/record.py` has recorded, mixed in random order.

    python -m recipes.experiments.route --trace runs/traces/sql,runs/traces/maths --requests 120 --seeds 0,1,2

Arms with a fixed assignment of domains to drafts: `shared`, one draft; `fixed`, one for each trace; `sql+maths/code`, one for two of them and one for the third; and `assignments`, all there
are. A draft learns from its own domains alone, so each is run once, for all the assignments that have it. Arms with the router of `RoutedAssistant`: `routed`, a draft for each topic that it
finds, each new one from the draft to begin with; and `forked`, as the product does it, where a new one starts from the weights of the draft that served its topic until then. All learn from the
same requests in the same order, each draft after so many of its own: in all they make equally many updates. Each router is compared with the fixed assignment that has turned out best.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hf_osd import Feedback, OnlineAssistant, OnlineConfig, RoutedAssistant
from hf_osd.policy.routing import OWN_FROM, prompt_features
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
ROUTED = ("routed", "forked")
_VERSION = 3  # of a row: 2 was of all drafts of a fixed assignment, 1 had no `by_draft`


@dataclass
class RouteArguments(ModelArguments):
    """What to serve, and how. The flags of `OnlineConfig` are those of each draft."""

    trace: str = option("", string(), "Folders made by record.py, with ',' between: a domain each.")
    arms: str = option(
        ",".join(ARMS),
        string(),
        "Which to run, with ',' between; the first is what others are compared with. 'assignments' is every fixed one.",
    )
    requests: int = option(120, whole(1), "Requests of each trace.")
    held_back: int = option(40, whole(1), "Held-back prompts of each trace to score on.")
    seeds: str = option("0", string(), "Seeds of request order and learning, with ',' between; a run for each.")
    max_routes: int = option(8, whole(1), "Drafts at one time, at most, where they are routed.")
    topic_requests: int = option(
        OWN_FROM, whole(1), "Requests of a topic from which the router may open a draft for it."
    )
    observe_every: int = option(2, whole(1), "Requests between two on which all routed drafts are scored.")
    log: str | None = option(
        None, optional_string(), "Append a row for each run to this JSONL file; runs it already has are not run again."
    )

    def __post_init__(self):
        super().__post_init__()
        check_trace(self.trace)
        for arm in expanded(self.arms, names := [Path(folder).name for folder in self.trace.split(",")]):
            if arm not in ROUTED and sorted(name for name, _ in assignment(arm, names)) != sorted(names):
                raise ValueError(
                    f"`arms` has {arm!r}; choose from {', '.join(ARMS)}, or give each of {', '.join(names)} once, with '+' between those of one draft and '/' between drafts."
                )


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
    for arm in expanded(args.arms, experiment.names):
        results.append([])
        for seed in numbers_of(args.seeds, "seeds", least=0):
            rows = []
            for run in runs_of(arm, experiment.names):
                key = experiment.key(run, seed)
                if key not in done:
                    done[key] = {"key": key} | experiment.run(run, seed)
                    log.append(done[key])
                rows.append(done[key])
            results[-1].append(rows[0] if arm in ROUTED else joined(arm, rows, experiment.names))
            print(_line(results[-1][-1]), flush=True)
    print(table(results))
    print(hindsight(results))


def expanded(arms: str, names: Sequence[str]) -> list[str]:
    """List the arms, 'assignments' as every way to share drafts among domains, each once."""
    listed = []
    for arm in arms.split(","):
        listed += [_named(groups, names) for groups in _partitions(names)] if arm == "assignments" else [arm]
    return list(dict.fromkeys(listed))


def assignment(arm: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """Pair each domain with its route in an arm with a fixed assignment."""
    arm = {"shared": "+".join(names), "fixed": "/".join(names)}.get(arm, arm)
    return [(name, group) for group in arm.split("/") for name in group.split("+")]


def runs_of(arm: str, names: Sequence[str]) -> list[str]:
    """List the runs of which an arm is made: one that is routed, or one for each draft, which is named by its domains in the order of `names`."""
    if arm in ROUTED:
        return [arm]
    groups = dict.fromkeys(group for _, group in assignment(arm, names))
    return ["+".join(sorted(group.split("+"), key=names.index)) for group in groups]


def joined(arm: str, rows: Sequence[dict], names: Sequence[str]) -> dict:
    """Join the runs of the drafts of a fixed assignment to the row that serving all of `names` with them gives."""
    served = sorted((at, i, j) for i, row in enumerate(rows) for j, at in enumerate(row["served"]))
    row = {
        "arm": arm,
        "seed": rows[0]["seed"],
        "scores": {name: row["scores"][name] for name in names for row in rows if name in row["scores"]},
        "by_draft": {name: scores for row in rows for name, scores in row["by_draft"].items()},
        "drafts": len(rows),
        "purity": None,
    }
    row |= {key: [rows[i][key][j] for _, i, j in served] for key in ("prequential", "choices")}
    return row | {key: sum(row[key] for row in rows) for key in ("updates", "learning_seconds", "seconds")}


def _partitions(names: Sequence[str]) -> Iterator[list[list[str]]]:
    """Yield every way to part names into groups, from one group to one for each."""
    if not names:
        yield []
        return
    for groups in _partitions(names[:-1]):
        for i in range(len(groups)):
            yield [group + [names[-1]] * (i == j) for j, group in enumerate(groups)]
        yield [*groups, [names[-1]]]


def _named(groups: list[list[str]], names: Sequence[str]) -> str:
    plain = {1: "shared", len(names): "fixed"}
    return plain.get(len(groups)) or "/".join("+".join(group) for group in groups)


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
        self.names = [traced.name for traced in self.traces]
        self.limit = max(traced.max_new_tokens for traced in self.traces)

    def key(self, run: str, seed: int) -> str:
        """Digest what makes two runs the same run."""
        args = self.args
        facts = [_VERSION, run, seed, args.target, args.dtype, args.draft, args.requests, args.held_back]
        facts += [{**self.config.to_dict(), "seed": None}, [(traced.name, traced.digest) for traced in self.traces]]
        facts += [args.max_routes, args.topic_requests, args.observe_every] if run in ROUTED else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def run(self, run: str, seed: int) -> dict:
        """Serve all traces, mixed, with routed drafts, or those of some domains with one draft (`runs_of`): α of each request before it was learnt, and of the
        held-back prompts at the end."""
        began = time.perf_counter()
        args, config = self.args, dataclasses.replace(self.config, seed=seed, suffix_cache=False)
        routed = run in ROUTED
        own = self.names if routed else run.split("+")
        assistant = RoutedAssistant(
            read_arm("base", config, args.draft).draft(self.target),
            config,
            routes="topics" if routed else "named",
            max_routes=args.max_routes,
            topic_requests=args.topic_requests,
        )
        rows = [(traced.name, one) for traced in self.traces for one in shuffled(traced.stream, seed)[: args.requests]]
        served, prequential, choices, routing = [], [], [], 0.0
        for at, (domain, request) in enumerate(shuffled(rows, seed)):
            if domain not in own:
                continue  # of another draft
            request = kept(assistant, request)
            if routed:
                start = time.perf_counter()
                choice = assistant.choose(self.features(request))
                routing += time.perf_counter() - start
                topic, route = choice.topic, choice.route
                member = assistant.member(route, choice.parent if run == "forked" else None)
                if at % args.observe_every == 0 and (scores := assistant.score_routes(request)):
                    assistant.router.observe(topic, scores, len(request))
            else:
                topic, route = None, run
                member = assistant.member(route)
            prequential.append(_serve(member, request, self.limit))
            choices.append((domain, topic, route))
            served.append(at)
        held_back = {traced.name: traced.held_back for traced in self.traces if traced.name in own}
        drafts = {name: one for name, one in assistant.pool.items() if name == run or name in assistant.router.routes}
        by_draft = {
            name: {domain: hits_of(member, requests) for domain, requests in held_back.items()}
            for name, member in drafts.items()
        }
        scores = {}
        for domain, requests in held_back.items():
            serving = [self._routed(assistant, one) if routed else run for one in requests]
            scores[domain] = [by_draft[name][domain][i] for i, name in enumerate(serving)]
        stats = assistant.stats
        assistant.close()
        return {
            "arm": run,
            "seed": seed,
            "served": served,
            "prequential": prequential,
            "choices": choices,
            "scores": scores,
            "by_draft": by_draft,
            "updates": stats.updates,
            "drafts": len(drafts),
            "purity": purity(*_late(choices)) if routed else None,
            "routing_ms": round(1000 * routing / len(served), 3),
            "learning_seconds": round(stats.learning_seconds, 1),
            "seconds": round(time.perf_counter() - began, 1),
        }

    def features(self, request: Feedback) -> Tensor:
        """Compute a recorded prompt's features."""
        return prompt_features(self.target.get_input_embeddings().weight, request.tokens[: request.prompt_length])

    def _routed(self, assistant: RoutedAssistant, request: Feedback) -> str:
        """Name the draft that would serve a held-back prompt, by a copy of the router, which learns nothing from it."""
        route = copy.deepcopy(assistant.router).route(self.features(request)).route
        return route if route in assistant.pool else next(name for name, _ in assistant.pool.items())  # not opened now


def _serve(member: OnlineAssistant, request: Feedback, limit: int) -> tuple[int, int]:
    """Predict a request, then let the route's draft learn it; counts accepted and all positions."""
    [overlap] = member.score([request])
    serve(member, request, overlap, member.seen_texts, limit)
    member.update()
    return int(overlap.nansum()), int((~overlap.isnan()).sum())


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


def hindsight(results: list[list[dict]]) -> str:
    """Write a Markdown table that compares each router with the best fixed assignment in hindsight, of those that were run: the one with the highest α over all seeds, chosen for each
    figure by itself. The last line of a router compares it with its own drafts, each domain's held-back prompts on the draft that is best for them: what is lost by choosing alone."""
    fixed = [rows for rows in results if rows[0]["arm"] not in ROUTED]
    figures = {
        "all requests, before learning": lambda row: row["prequential"],
        "the last quarter, before learning": lambda row: row["prequential"][-len(row["prequential"]) // 4 :],
        "held back": lambda row: [pair for pairs in row["scores"].values() for pair in pairs],
    }
    lines = [
        f"\nThe router less the best of {len(fixed)} fixed assignments in hindsight",
        "| router | α of | the best | its α | the router's | less (95%) |",
        "|---|---|---|---|---|---|",
    ]
    for rows in results:
        if rows[0]["arm"] not in ROUTED:
            continue
        for name, of in figures.items():
            routed, others = [of(row) for row in rows], [[of(row) for row in other] for other in fixed]
            if others:
                best = max(range(len(fixed)), key=lambda i: statistics.fmean(map(alpha_of, others[i])))
                lines.append(_against(rows[0]["arm"], name, fixed[best][0]["arm"], others[best], routed))
        own = [[pair for domain in row["scores"] for pair in _best_draft(row, domain)] for row in rows]
        lines.append(
            _against(
                rows[0]["arm"], "held back", "of its own drafts", own, [figures["held back"](row) for row in rows]
            )
        )
    return "\n".join(lines) if len(lines) > 3 else ""


def _best_draft(row: dict, domain: str) -> list[list[int]]:
    return max((scores[domain] for scores in row["by_draft"].values()), key=alpha_of)


def _against(arm: str, figure: str, name: str, best: list, routed: list) -> str:
    alphas = [f"{statistics.fmean(map(alpha_of, runs)):.3f}" for runs in (best, routed)]
    return "| " + " | ".join([arm, figure, name, *alphas, str(intervals(best, routed))]) + " |"


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
