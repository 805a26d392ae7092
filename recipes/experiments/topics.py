"""Measures how well `TopicRouter` finds the domains of prompts, by their input embeddings alone; nothing is generated, and nothing learns.

python -m recipes.experiments.topics --stream sql.jsonl,maths.jsonl,code.jsonl --requests 400 --seeds 0,1,2,3,4
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

from hf_osd import OnlineConfig
from hf_osd.policy.routing import TopicRouter, prompt_features
from hf_osd.system.bounds import option, switch, whole
from recipes.common.command import numbers_of, run_command
from recipes.common.models import TargetArguments, encode_rows, load_target, shuffled, use_threads
from recipes.common.options import string

WINDOW = 100  # requests over which purity is measured
COMMON = 8  # requests of them that make a topic count


@dataclass
class TopicsArguments(TargetArguments):
    """Which prompts to route. Of the target only tokenizer and input embeddings matter."""

    stream: str = option(
        "stdlib,word_problems", string(), "Streams with ',' between, a domain each; see docs/recipes.md."
    )
    requests: int = option(400, whole(WINDOW), "Requests in all, of all domains equally.")
    seeds: str = option("0,1,2,3,4", string(), "Seeds of their order, with ',' between.")
    in_turn: bool = option(False, switch(), "One domain after the other, in random order, rather than mixed.")
    max_routes: int = option(8, whole(1), "As of `TopicRouter`.")
    own_from: int = option(
        8, whole(1), "As of `TopicRouter`, whose default waits longer: here the routes are to show the topics."
    )


def main(argv: list[str] | None = None) -> int:
    """Route the streams with each seed, and print a table; returns the exit status."""
    return run_command(TopicsArguments, measure, argv)


def measure(args: TopicsArguments, config: OnlineConfig):
    """Print a line for each seed, and their mean."""
    from recipes.common.prompts import load_streams

    use_threads(args.threads)
    target, tokenizer = load_target(args.target, args.dtype, args.device)
    embeddings = target.get_input_embeddings().weight
    streams = []
    for name, rows in load_streams(args.stream):
        streams.append((name, encode_rows(target, tokenizer, name, rows, max_new_tokens=1)[0]))
    each = args.requests // len(streams)
    if short := [name for name, rows in streams if len(rows) < each]:
        raise ValueError(
            f"`requests` {args.requests} asks for {each} prompts of {short[0]}, which has fewer; lower it."
        )
    lines = []
    for seed in numbers_of(args.seeds, "seeds", least=0):
        parts = [[(name, row["ids"]) for row in shuffled(rows, seed)[:each]] for name, rows in streams]
        parts = shuffled(parts, seed)
        rows = [pair for part in parts for pair in part]
        rows = rows if args.in_turn else shuffled(rows, seed)
        router, topics, routes, milliseconds = TopicRouter(args.max_routes, seed, args.own_from), [], [], []
        for _, ids in rows:
            began = time.perf_counter()
            choice = router.route(prompt_features(embeddings, ids))
            milliseconds.append(1000 * (time.perf_counter() - began))
            topics.append(choice.topic)
            routes.append(choice.route)
        domains = [name for name, _ in rows]
        late = slice(-WINDOW, None)
        lines.append(
            [
                purity(topics[WINDOW // 2 : WINDOW], domains[WINDOW // 2 : WINDOW]),
                purity(topics, domains),
                purity(topics[late], domains[late]),
                purity(domains[late], topics[late]),
                sum(n >= COMMON for n in Counter(topics[late]).values()),
                len(router.routes),
                purity(routes[late], domains[late]),
                statistics.median(milliseconds),
            ]
        )
        print(f"| seed {seed} | {_cells(lines[-1])} |", flush=True)
    print(
        f"\n| {', '.join(name for name, _ in streams)} | purity of requests {WINDOW // 2 + 1}-{WINDOW} | of all | of the last {WINDOW} | in one topic | topics | routes | purity of routes | ms |"
    )
    print("|" + "---|" * 9)
    print(f"| mean | {_cells([statistics.fmean(column) for column in zip(*lines, strict=True)])} |")


def purity(clusters: list[Hashable], classes: list[Hashable]) -> float:
    """Compute the share of items whose class is the commonest in their cluster."""
    most = Counter()
    for (cluster, _), n in Counter(zip(clusters, classes, strict=True)).items():
        most[cluster] = max(most[cluster], n)
    return most.total() / len(classes)


def _cells(values: list[float]) -> str:
    return " | ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    sys.exit(main())
