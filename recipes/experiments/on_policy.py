"""Compares texts to learn from: the target's answers, or also the draft's own. The draft's text changes as it learns, and the target has to predict each of its
positions, so this cannot be replayed from a trace.

    python -m recipes.experiments.on_policy --trace runs/traces/sql --requests 150 --seeds 0 --log runs/on_policy.jsonl

| arm | an update learns, beside the target's own answers |
|---|---|
| `teacher` | nothing: the default |
| `drafted` | tokens drafted after the first rejection of a block, in up to `--branches` blocks a request, with the target's distribution there, which verification computes anyway |
| `student` | in place of them, the draft's own sampled answers to the same prompts, with the target's distribution at each position (GKD's lmbda = 1) |
| `mixed` | as `student`, for every other request (lmbda = 0.5) |
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf_osd import Feedback, OnlineAssistant, OnlineConfig
from hf_osd.feedback.feedback import ACCEPTED, REJECTED, SparseLogits
from hf_osd.models.heads import contiguous_head
from hf_osd.system.bounds import option, whole
from recipes.common.command import check_learns, numbers_of, run_command
from recipes.common.models import ModelArguments, load_draft, load_target, shuffled, use_threads
from recipes.common.options import optional_string, string
from recipes.common.row_log import RowLog
from recipes.experiments.replay import Traced, hits_of, learning_of, load_trace, table
from recipes.experiments.replaying import as_drafted

ARMS = ("teacher", "drafted", "student", "mixed")


@dataclass
class OnPolicyArguments(ModelArguments):
    """What to learn from. The flags of `OnlineConfig` hold for all arms."""

    trace: str = option("", string(), "A folder made by record.py.")
    arms: str = option(",".join(ARMS), string(), "Arms, with ',' between.")
    requests: int = option(150, whole(1), "Requests to learn from.")
    held_back: int = option(100, whole(1), "Held-back prompts to score on.")
    seeds: str = option("0", string(), "Seeds of request order and learning, with ',' between.")
    branches: int = option(
        4, whole(1), "Blocks of each request of which the arm 'drafted' learns the tokens after the rejection."
    )
    log: str | None = option(None, optional_string(), "Append a row for each run to this JSONL file.")

    def __post_init__(self):
        super().__post_init__()
        unknown = [arm for arm in self.arms.split(",") if arm not in ARMS]
        if unknown:
            raise ValueError(f"`arms` has {unknown[0]!r}; choose among {', '.join(ARMS)}.")


def main(argv: list[str] | None = None) -> int:
    """Learn with each arm and seed; returns the exit status."""
    return run_command(OnPolicyArguments, measure, argv)


def measure(args: OnPolicyArguments, config: OnlineConfig):
    """Do every run, and print the table against the first arm."""
    check_learns(config.learn, "recipes/experiments/on_policy.py")
    seeds, log = numbers_of(args.seeds, "seeds", least=0), RowLog(args.log, ("arm", "seed", "scores"))
    use_threads(args.threads)
    target, _ = load_target(args.target, args.dtype)
    traced = load_trace(Path(args.trace), config.top_k, args.held_back)
    if traced.draft_size is not None:
        raise ValueError(
            f"`trace` {args.trace} is in the tokens of a draft that has {traced.draft_size}; name one recorded without --draft."
        )
    if traced.temperature:
        raise ValueError(
            f"`trace` {args.trace} was sampled, and these arms compare greedy answers; name one recorded without --temperature."
        )
    results = []
    for arm in args.arms.split(","):
        results.append([])
        for seed in seeds:
            row = run(args, config, arm, seed, target, traced)
            results[-1].append(row)
            log.append(row)
            print(
                f"{arm} seed {seed}: {row['learning_seconds']:.0f} s of learning, {row['seconds']:.0f} in all",
                flush=True,
            )
    print(table(results))


def run(args: OnPolicyArguments, config: OnlineConfig, arm: str, seed: int, target, traced: Traced) -> dict:
    """Learn with one arm and one seed; returns a row as `recipes/experiments/replay.py` writes them."""
    began = time.perf_counter()
    config = dataclasses.replace(config, seed=seed, suffix_cache=False)
    assistant = OnlineAssistant(load_draft(args.draft, target), config)
    draws = torch.Generator().manual_seed(seed)
    requests = shuffled(traced.stream, seed)[: args.requests]
    scores = {"0": hits_of(assistant, traced.held_back)}
    for start in range(0, len(requests), config.update_interval):
        chunk = requests[start : start + config.update_interval]
        for i, request, overlap in zip(range(len(chunk)), chunk, assistant.score(chunk), strict=True):
            draft = assistant.serving.active
            if arm == "student" or (arm == "mixed" and i % 2):
                request = answer_of_draft(target, draft, request, traced.max_new_tokens, config.top_k, draws)
            assistant.buffer.add(request)
            if arm == "drafted":
                served = as_drafted(request, overlap, config.num_assistant_tokens, traced.max_new_tokens)
                for branch in branches(target, draft, served, config, args.branches, draws):
                    assistant.buffer.add(branch)
        assistant.flush()  # not when due: what a request adds beside itself would make updates more frequent
    scores[str(args.requests)] = hits_of(assistant, traced.held_back)
    return {
        "arm": arm,
        "seed": seed,
        "requests": args.requests,
        "scores": {traced.name: scores},
        **learning_of(assistant, began),
    }


@torch.no_grad()
def answer_of_draft(
    target, draft, request: Feedback, max_new_tokens: int, top_k: int, draws: torch.Generator
) -> Feedback:
    """Sample the draft's own answer to a request's prompt, at temperature 1, and record the target's distribution at each position."""
    prompt = request.tokens[: request.prompt_length].long()
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=draws)))
        text = draft.generate(
            input_ids=prompt[None].to(draft.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=draft.device),
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        )[0].cpu()
    return _recorded(target, [(text, len(prompt))], top_k)[0]


@torch.no_grad()
def branches(
    target, draft, request: Feedback, config: OnlineConfig, most: int, draws: torch.Generator
) -> list[Feedback]:
    """Record the target's distribution at tokens drafted after the rejected one, as verification had computed it, for up to `most` blocks of a request.

    The blocks are drawn from those with such tokens.
    """
    rejected = (request.outcome == REJECTED).nonzero().squeeze(-1).tolist()
    blocks = []  # where the block's rejected token is in the answer, and how many tokens were drafted from there on
    for at in rejected:
        accepted = 0
        while accepted < at and request.outcome[at - 1 - accepted] == ACCEPTED:
            accepted += 1
        left = config.num_assistant_tokens - accepted
        if left > 1:
            blocks.append((at, left))
    picked = [blocks[i] for i in torch.randperm(len(blocks), generator=draws).tolist()[:most]]
    texts = []
    for at, left in picked:
        prefix = request.tokens[: request.prompt_length + at].long()
        drafted = draft.generate(
            input_ids=prefix[None].to(draft.device),
            attention_mask=torch.ones(1, len(prefix), dtype=torch.long, device=draft.device),
            max_new_tokens=left,
            do_sample=False,
            pad_token_id=0,
        )[0].cpu()
        if len(drafted) > len(prefix) + 1:  # else the block ended with the rejected token
            texts.append((drafted, len(prefix) + 1))
    return _recorded(target, texts, config.top_k)


def _recorded(target, texts: list[tuple[Tensor, int]], top_k: int) -> list[Feedback]:
    """Record the target's distributions over texts by one forward for all; each text comes with the length of its prompt."""
    if not texts:
        return []
    longest = max(len(text) for text, _ in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    for i, (text, _) in enumerate(texts):
        ids[i, : len(text)] = text  # padded right: a causal model needs no mask for that
    keep = longest - min(given for _, given in texts) + 1
    with contiguous_head(target):
        logits = target(input_ids=ids.to(target.device), use_cache=False, logits_to_keep=keep).logits.float()
    first = longest - keep
    return [
        Feedback.from_target(
            text, given, SparseLogits.from_logits(logits[i, given - 1 - first : len(text) - 1 - first], top_k).cpu()
        )
        for i, (text, given) in enumerate(texts)
    ]


if __name__ == "__main__":
    sys.exit(main())
