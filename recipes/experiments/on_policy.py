"""Whose text teaches: the target's answers, or also what the draft itself would have said. These arms need the draft's own trajectory as it learns, and
the target to judge it, so they are no replay.

    python -m recipes.experiments.on_policy --trace runs/traces/sql --requests 150 --seeds 0 --log runs/on_policy.jsonl

| arm | beside its share of the target's own answers, an update learns |
|---|---|
| `teacher` | nothing: the default |
| `drafted` | what was drafted after a first rejection in a block, up to `--branches` blocks a request, and what the target says there. Verification computes that anyway |
| `student` | in place of them, the draft's own sampled answers to the same prompts, and what the target says of them (GKD's lmbda = 1) |
| `mixed` | the same for every other request (lmbda = 0.5) |
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hf_osd import Feedback, OnlineAssistant, OnlineConfig
from hf_osd.feedback.feedback import ACCEPTED, REJECTED, SparseLogits
from hf_osd.models.heads import contiguous_head
from recipes.common.command import check_learns, check_numbers, numbers_of, run_command
from recipes.common.models import ModelArguments, load_draft, load_target, shuffled, use_threads
from recipes.common.row_log import RowLog
from recipes.experiments.replay import Traced, hits_of, learning_of, load_trace, table
from recipes.experiments.replaying import as_drafted

ARMS = ("teacher", "drafted", "student", "mixed")


@dataclass
class OnPolicyArguments(ModelArguments):
    """What to learn from. `OnlineConfig`'s own flags are those of all arms."""

    trace: str = field(default="", metadata={"help": "A folder made by record.py."})
    arms: str = field(default=",".join(ARMS), metadata={"help": "Which arms, with ',' between."})
    requests: int = field(default=150, metadata={"help": "Requests to learn from."})
    held_back: int = field(default=100, metadata={"help": "Held-back prompts to score on."})
    seeds: str = field(default="0", metadata={"help": "Of request order and learning, with ',' between."})
    branches: int = field(default=4, metadata={"help": "Blocks a request whose rows after the rejection are learnt."})
    log: str | None = field(default=None, metadata={"help": "Append a row a run to this JSONL file."})

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, {"requests": 1, "held_back": 1, "branches": 1, "threads": 1})
        unknown = [arm for arm in self.arms.split(",") if arm not in ARMS]
        if unknown:
            raise ValueError(f"`arms` has {unknown[0]!r}; choose among {', '.join(ARMS)}.")


def main(argv: list[str] | None = None) -> int:
    """Learn with each arm and seed; the exit status."""
    return run_command(OnPolicyArguments, measure, argv)


def measure(args: OnPolicyArguments, config: OnlineConfig):
    """Every run, and the table against the first arm."""
    check_learns(config.learn, "recipes/experiments/on_policy.py")
    seeds, log = numbers_of(args.seeds, "seeds", least=0), RowLog(args.log, ("arm", "seed", "scores"))
    use_threads(args.threads)
    target, _ = load_target(args.target, args.dtype)
    traced = load_trace(Path(args.trace), config.top_k, args.held_back)
    if traced.draft_size is not None:
        raise ValueError(
            f"`trace` {args.trace} is in the tokens of a draft that has {traced.draft_size}; name one recorded without --draft."
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
    """One arm with one seed, a row as `recipes/experiments/replay.py` writes it."""
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
                request = said_by_draft(target, draft, request, traced.max_new_tokens, config.top_k, draws)
            assistant.buffer.add(request)
            if arm == "drafted":
                served = as_drafted(request, overlap, config.num_assistant_tokens, traced.max_new_tokens)
                for branch in branches(target, draft, served, config, args.branches, draws):
                    assistant.buffer.add(branch)
        assistant.flush()  # what a request adds beside itself must not make updates more frequent
    scores[str(args.requests)] = hits_of(assistant, traced.held_back)
    return {
        "arm": arm,
        "seed": seed,
        "requests": args.requests,
        "scores": {traced.name: scores},
        **learning_of(assistant, began),
    }


@torch.no_grad()
def said_by_draft(target, draft, request: Feedback, most: int, top_k: int, draws: torch.Generator) -> Feedback:
    """The draft's own answer, sampled at temperature 1, to a request's prompt, with what the target says at each of its positions."""
    prompt = request.tokens[: request.prompt_length].long()
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=draws)))
        said = draft.generate(
            input_ids=prompt[None].to(draft.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=draft.device),
            max_new_tokens=most,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        )[0].cpu()
    return _judged(target, [(said, len(prompt))], top_k)[0]


@torch.no_grad()
def branches(
    target, draft, request: Feedback, config: OnlineConfig, most: int, draws: torch.Generator
) -> list[Feedback]:
    """For some blocks of a request: what the draft drafted after the token that was rejected, with what the target says there, which is what
    verification computed of it. The blocks are drawn from those that have such positions."""
    rejected = (request.outcome == REJECTED).nonzero().squeeze(-1).tolist()
    blocks = []  # text before the block's first rejected token, and how many tokens were drafted from there on
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
        if len(drafted) > len(prefix) + 1:  # else it ended with the token that was rejected
            texts.append((drafted, len(prefix) + 1))
    return _judged(target, texts, config.top_k)


def _judged(target, texts: list[tuple[Tensor, int]], top_k: int) -> list[Feedback]:
    """Texts, each with how much of it is given, as feedback: the target's distributions at what follows. One forward for all."""
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
