"""Measures precision and recall of the target's most frequent tokens, of a draft before and after it has learnt (figure 7 of the paper).

    python -m recipes.experiments.paper.top_tokens --trace runs/traces/sql --drafts grow:0+1,runs/sql/0-0 --json tokens.json

The draft predicts each token of the held-back answers, the tokens before being the target's. Of a token, precision is how often the draft was right where it predicted
it, and recall how often it predicted it where it was due.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_osd import Feedback, OnlineConfig
from hf_osd.distill.collator import FeedbackCollator
from hf_osd.distill.feature_collator import FeatureCollator
from hf_osd.distill.scoring import answer_logits
from hf_osd.models.properties import reads_states
from hf_osd.system.bounds import option, switch, whole
from hf_osd.system.strict_json import write_json
from recipes.common.command import check_trace, run_command
from recipes.common.figures import cell, markdown, ratio
from recipes.common.models import TargetArguments, load_draft, load_target, use_threads
from recipes.common.options import optional_string, string
from recipes.experiments.replay import load_trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class TopTokensArguments(TargetArguments):
    """What to measure. Of `OnlineConfig` nothing matters here."""

    trace: str = option("", string(), "A folder made by record.py.")
    drafts: str = option(
        "grow:0+1", string(), "Drafts with ',' between, as `--draft` has them, but with '+' between layers."
    )
    top: int = option(100, whole(1), "Most frequent tokens of the target's answers, each of which counts the same.")
    held_back: int = option(100, whole(1), "Held-back prompts to measure on.")
    json: str | None = option(None, optional_string(), "Also write the figures to this file.")
    overwrite: bool = option(False, switch(), "Replace the figures that are there.")

    def __post_init__(self):
        super().__post_init__()
        check_trace(self.trace)


def main(argv: list[str] | None = None) -> int:
    """Measure each draft and print a table; returns the exit status."""
    return run_command(TopTokensArguments, measure, argv)


def measure(args: TopTokensArguments, config: OnlineConfig):
    """Measure each draft on the trace's held-back answers."""
    use_threads(args.threads)
    target, _ = load_target(args.target, args.dtype, args.device)
    traced = load_trace(Path(args.trace), 1, args.held_back, stream=False)
    drafts = []
    for name in (part.strip().replace("+", ",") for part in args.drafts.split(",")):
        pairs = predictions(load_draft(name, target), traced.held_back)
        drafts.append({"draft": name, **figures_of(pairs, args.top)})
    found = {
        "trace": traced.name,
        "prompts": len(traced.held_back),
        "top": args.top,
        "target": args.target,
        "drafts": drafts,
    }
    if args.json is not None:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.json), found)
    lines = [["draft", "precision", "recall", "α"]]
    lines += [[one["draft"], *(cell(one[name]) for name in ("precision", "recall", "alpha"))] for one in drafts]
    print(markdown(lines))


@torch.no_grad()
def predictions(draft: PreTrainedModel, held_back: list[Feedback]) -> list[tuple[int, int]]:
    """Pair each token of the answers with the draft's likeliest one there: `[(due, predicted), …]`."""
    states, pairs = reads_states(draft), []
    collate = FeatureCollator(draft.config.states_size, prompts=False) if states else FeedbackCollator(prompts=False)
    for feedback in held_back:
        batch = collate([feedback])
        batch = {
            key: value.to(draft.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()
        }
        likeliest = answer_logits(draft, batch).argmax(-1).tolist()
        due = feedback.answer[feedback.teaching_mask("all", states)].tolist()
        pairs += zip(due, likeliest, strict=True)
    return pairs


def figures_of(pairs: list[tuple[int, int]], top: int) -> dict:
    """Compute precision and recall of the most frequent tokens, by rank and their means, and α of all positions.

    A token that the draft never predicted has no precision, and is left out of that mean.
    """
    due, said = (Counter(pair[i] for pair in pairs) for i in (0, 1))
    right = Counter(token for token, other in pairs if token == other)
    tokens = sorted(due, key=lambda token: (-due[token], token))[:top]
    precision = [ratio(right[token], said[token]) for token in tokens]
    recall = [right[token] / due[token] for token in tokens]
    known = [value for value in precision if value is not None]
    return {
        "precision": sum(known) / len(known) if known else None,
        "recall": sum(recall) / len(recall),
        "alpha": sum(right.values()) / len(pairs),
        "precision_by_rank": precision,
        "recall_by_rank": recall,
    }


if __name__ == "__main__":
    sys.exit(main())
