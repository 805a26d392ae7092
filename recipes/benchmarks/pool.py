"""What a further topic takes in memory, and how long changing to another takes, for the drafts that a `RoutedAssistant` can route to.

python -m recipes.benchmarks.pool --target embedded --dtype bfloat16 --threads 1
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hf_osd import Feedback, OnlineAssistant, OnlineConfig, RoutedAssistant, record_answers
from hf_osd.learning.gate import Verdict
from hf_osd.models.pool import route_bytes
from hf_osd.system.bounds import option, whole
from recipes.common.command import run_command
from recipes.common.models import TargetArguments, load_draft, load_target, use_threads
from recipes.common.options import optional_string, string

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.models.hot_swap import HotSwapDraft


@dataclass
class PoolArguments(TargetArguments):
    """What to measure. The flags of `OnlineConfig` are those of each route."""

    drafts: str = option("grow:0,1;feature", string(), "Drafts as --draft names them, with ';' between.")
    requests: int = option(8, whole(2), "Requests that each of two routes learns before.")
    switches: int = option(200, whole(3), "Switches between routes in memory that are timed.")
    steps: int = option(100, whole(3), "Draft steps that are timed, merged and unmerged.")
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
                "learning_budget": 1.0,
                "learn": "inline",
                "gate": True,
            }
            assistant = RoutedAssistant(draft, config, **settings)
            for route in "ab":
                before = live_bytes()
                serving = teach(assistant.pool.get(route), answers)
                whole = live_bytes() - before
            seconds = []
            for i in range(args.switches):
                began = time.perf_counter()
                changed_to = assistant.pool.get("ab"[i % 2]).serving
                changed_to.release(changed_to.lease())
                seconds.append(time.perf_counter() - began)
            merged, ready, estimated = serving.active, serving.own_bytes(), route_bytes(assistant.pool.peek("b"))
            slower = ratio_of_steps(serving.active, merged, args.steps) if serving.rest() else None
            rows.append(
                {
                    "draft": name,
                    "learns": "adapter" if adapter == "lora" else "all weights",
                    "draft_bytes": sum(p.nbytes for p in draft.parameters()),
                    "unmerged_bytes": serving.own_bytes(),
                    "serving_bytes": ready,
                    "whole_bytes": whole,
                    "estimated_bytes": estimated,
                    "switch_seconds": statistics.median(seconds),
                    "unmerged_step": slower,
                }
            )
            assistant.close()
    print(
        "| draft | learns | its bytes | a route that serves, of these | merged | learning beside it | switch | a draft step unmerged |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        of = row["draft_bytes"]
        cells = [row["draft"], row["learns"], f"{of / 2**20:.0f} MiB", f"{row['unmerged_bytes'] / of:.1%}"]
        cells += ["-" if row["unmerged_step"] is None else f"{row['serving_bytes'] / of:.1%}"]
        cells += [f"{(row['whole_bytes'] - row['serving_bytes']) / of:.1%}", f"{1e3 * row['switch_seconds']:.3f} ms"]
        cells += ["-" if row["unmerged_step"] is None else f"{row['unmerged_step'] - 1:+.1%}"]
        print("| " + " | ".join(cells) + " |")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


def teach(member: OnlineAssistant, answers: list[Feedback]) -> HotSwapDraft:
    """Let a route learn, its gate accept what was learnt, and learn on beside it, as it does for most of its life; returns what serves."""
    gate = member.learner.contenders.gate
    for _ in range(3):
        for answer in answers:
            member.learner.add(dataclasses.replace(answer))
        member.flush()
        gate.observe, gate.regresses = lambda *scores: Verdict.ACCEPT, lambda *scores: False
    member.buffer.clear()
    return member.serving


def live_bytes() -> int:
    """Count the bytes of all tensors that Python holds, storage that several share once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # Those of an exported program (FakeTensor), which may lie about, hold no data.
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def ratio_of_steps(one: PreTrainedModel, other: PreTrainedModel, steps: int) -> float:
    """Time steps of two drafts in turn, after 64 tokens; returns the ratio of medians."""
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        text = torch.arange(64, device=one.device)[None]
        caches = [model(text, use_cache=True).past_key_values for model in (one, other)]
        for _ in range(steps):
            for model, cache, taken in zip((one, other), caches, seconds, strict=True):
                began = time.perf_counter()
                model(text[:, :1], past_key_values=cache, use_cache=True).logits.argmax(-1).item()
                taken.append(time.perf_counter() - began)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


if __name__ == "__main__":
    sys.exit(main())
