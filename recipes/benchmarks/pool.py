"""What a further topic takes in memory, and how long changing to another takes, for the drafts that a `RoutedAssistant` can route to.

python -m recipes.benchmarks.pool --target embedded --dtype bfloat16 --threads 1
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from hf_osd import OnlineConfig, RoutedAssistant, record_answers
from hf_osd.system.bounds import option, whole
from recipes.common.command import run_command
from recipes.common.models import TargetArguments, load_draft, load_target, use_threads
from recipes.common.options import optional_string, string


@dataclass
class PoolArguments(TargetArguments):
    """What to measure. The flags of `OnlineConfig` are those of each route."""

    drafts: str = option("grow:0,1;feature", string(), "Drafts as --draft names them, with ';' between.")
    requests: int = option(8, whole(2), "Requests that each of two routes learns before.")
    switches: int = option(200, whole(3), "Switches between routes in memory that are timed.")
    json: str | None = option(None, optional_string(), "Write the figures to this file.")


def main(argv: list[str] | None = None) -> int:
    """Measure each draft, in an adapter and with all weights, and print a table; returns the exit status."""
    return run_command(PoolArguments, measure, argv)


def measure(args: PoolArguments, config: OnlineConfig):
    """Measure bytes and times of routes that have learnt."""
    use_threads(args.threads)
    target, _ = load_target(args.target, args.dtype, args.device)
    random = torch.Generator("cpu").manual_seed(config.seed or 0)
    size = target.config.get_text_config(decoder=True).vocab_size
    texts = [torch.randint(size, (24,), generator=random) for _ in range(args.requests)]
    rows = []
    for name in args.drafts.split(";"):
        draft = load_draft(name, target)
        layers = getattr(draft.config, "recorded_layers", None)
        answers = record_answers(target, texts, 16, states_of=layers)
        for adapter in ("lora", "off") if layers is None else ("off",):
            settings = {
                "routes": "named",
                "adapter": adapter,
                "learning_rate": 1e-4,
                "gate": False,
                "learning_budget": 1.0,
            }
            assistant = RoutedAssistant(draft, config, **settings)
            for route in "ab":
                for answer in answers:
                    assistant.pool.get(route).learner.add(answer)
                assistant.pool.get(route).flush()
            member = assistant.pool.peek("a")
            whole_draft = sum(p.nbytes for p in draft.parameters())
            learnt = sum(weight.nbytes for _, weight in member.serving.weights())
            seconds = []
            for i in range(args.switches):
                began = time.perf_counter()
                serving = assistant.pool.get("ab"[i % 2]).serving
                serving.release(serving.lease())
                seconds.append(time.perf_counter() - began)
            member, wakes = assistant.pool.peek("a").serving, []
            ready = member.own_bytes()
            while len(wakes) < min(args.switches, 20) and member.rest():
                resting, began = member.own_bytes(), time.perf_counter()
                member.release(member.lease())
                wakes.append(time.perf_counter() - began)
            rows.append(
                {
                    "draft": name,
                    "learns": "adapter" if adapter == "lora" else "all weights",
                    "draft_bytes": whole_draft,
                    "learnt_bytes": learnt,
                    "serving_bytes": ready,
                    "switch_seconds": statistics.median(seconds),
                    "resting_bytes": resting if wakes else ready,
                    "wake_seconds": statistics.median(wakes) if wakes else None,
                }
            )
            assistant.close()
    print("| draft | learns | its bytes | a route that rests, of these | one that serves | switch | from rest |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        shares = [f"{row[part] / row['draft_bytes']:.1%}" for part in ("resting_bytes", "serving_bytes")]
        wake = "-" if row["wake_seconds"] is None else f"{1e3 * row['wake_seconds']:.1f} ms"
        print(
            f"| {row['draft']} | {row['learns']} | {row['draft_bytes'] / 2**20:.0f} MiB | {shares[0]} | {shares[1]} | {1e3 * row['switch_seconds']:.3f} ms | {wake} |"
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    sys.exit(main())
