"""Counts FLOPs and bytes of serving and of learning, from forwards and updates that are really made (the paper's table 5).

    python -m recipes.experiments.paper.costs --trace runs/traces/math --draft grow:0,1 --requests 16 --json costs.json

torch counts the FLOPs of matrix products and attention, and of their gradients; what is element by element is not counted.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hf_osd import Feedback, OnlineAssistant, OnlineConfig
from hf_osd.models.properties import reads_states
from hf_osd.system.bounds import option, switch, whole
from hf_osd.system.strict_json import write_json
from recipes.common.command import check_learns, check_trace, run_command
from recipes.common.figures import markdown
from recipes.common.models import ModelArguments, load_draft, load_target, use_threads
from recipes.common.options import optional_string, string
from recipes.experiments.replay import load_trace
from recipes.experiments.replaying import replay


@dataclass
class CostsArguments(ModelArguments):
    """What to count. The flags of `OnlineConfig` are those of learning."""

    trace: str = option("", string(), "A folder made by record.py.")
    requests: int = option(16, whole(1), "Requests to count over.")
    json: str | None = option(None, optional_string(), "Also write the figures to this file.")
    overwrite: bool = option(False, switch(), "Replace the figures that are there.")

    def __post_init__(self):
        super().__post_init__()
        check_trace(self.trace)


def main(argv: list[str] | None = None) -> int:
    """Count, and print a table; returns the exit status."""
    return run_command(CostsArguments, measure, argv)


def measure(args: CostsArguments, config: OnlineConfig):
    """Count one request's share of each piece of work, as means over requests."""
    check_learns(config.learn, "recipes/experiments/paper/costs.py")
    use_threads(args.threads)
    target, _ = load_target(args.target, args.dtype, args.device)
    draft = load_draft(args.draft, target)
    traced = load_trace(Path(args.trace), config.top_k, 1)
    requests = traced.stream[: args.requests]
    if len(requests) < args.requests:
        raise ValueError(f"`requests` is {args.requests} and {traced.name} has {len(requests)}; lower it.")
    if reads_states(draft) and traced.states is None:
        raise ValueError(
            f"The draft {args.draft} reads the target's hidden states, and {traced.name} has none; record it with --states auto."
        )
    found = {"trace": traced.name, "requests": len(requests), "target": args.target, "draft": args.draft}
    found |= {"dtype": str(target.dtype).removeprefix("torch.")} | counted(target, draft, requests, config)
    if args.json is not None:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.json), found)
    print(markdown([["figure", "value"], *([name, value] for name, value in found.items())]))


def counted(target, draft, requests: list[Feedback], config: OnlineConfig) -> dict[str, float]:
    """Count serving and learning of some requests; FLOPs and bytes are of one request unless a name says otherwise."""
    from torch.utils.flop_counter import FlopCounterMode

    config = dataclasses.replace(config, suffix_cache=False, gate=False, learning_rate=1e-4, learning_budget=1.0)
    count = len(requests)
    with FlopCounterMode(display=False) as target_flops, torch.no_grad():
        for request in requests:
            target(input_ids=request.tokens.long()[None].to(target.device), use_cache=False)
    assistant = OnlineAssistant(draft, config)
    with FlopCounterMode(display=False) as draft_flops:
        assistant.score(requests)
    with FlopCounterMode(display=False) as all_flops:
        for _ in replay(assistant, requests):
            pass
        assistant.flush()
    stats, learnt = assistant.stats, dict(assistant.serving.weights())
    # Each request is scored once before it is learnt.
    update = all_flops.get_total_flops() - draft_flops.get_total_flops()
    size = bytes_of(draft)
    return {
        "answer_tokens": sum(map(len, requests)) / count,
        "tokens_read": sum(len(request.tokens) for request in requests) / count,
        "positions_learnt": stats.learned_tokens / count,
        "target_flops": target_flops.get_total_flops() / count,
        "draft_flops": draft_flops.get_total_flops() / count,
        "learning_flops": update / count,
        "learning_over_target_flops": update / target_flops.get_total_flops(),
        "target_bytes": bytes_of(target),
        "draft_bytes": size,
        "draft_bytes_of_its_own": size - shared_bytes(draft, target),
        "learnt_weights_bytes": sum(
            weight.nbytes for weight in learnt.values()
        ),  # sent by an update that runs elsewhere
        "feedback_bytes": sum(request.nbytes for request in requests) / count,
    }


def bytes_of(model: nn.Module) -> int:
    """Count the bytes of a model's weights."""
    return sum(weight.nbytes for weight in model.parameters())


def shared_bytes(draft: nn.Module, target: nn.Module) -> int:
    """Count the bytes of a draft's weights that are the target's own memory, such as embeddings."""
    known = {weight.data_ptr() for weight in target.parameters()}
    return sum(weight.nbytes for weight in draft.parameters() if weight.data_ptr() in known)


if __name__ == "__main__":
    sys.exit(main())
