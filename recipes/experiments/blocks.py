"""Counts what blocks of both sources would yield: the draft reads what the suffix cache proposes in one forward, and the block is cut or corrected where it disagrees.

Recordings are walked again by the suffix cache and its policy; nothing is generated, and nothing learns. Each round is counted with the block as the policy makes it and as a rule
would, in tokens less λ times its time, λ being the rate of the former.

python -m recipes.experiments.blocks --draft runs/drafts/sql --trace runs/traces/sql,runs/traces/math --draft_cost 0.045 --verify_cost 0.03 --dtype bfloat16
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.distill.scoring import predictions
from hf_osd.drafting.suffix_cache import CallSuffixes, SuffixCache
from hf_osd.feedback.feedback import Feedback
from hf_osd.policy.lookahead import DraftPolicy
from hf_osd.system.bounds import option, whole
from recipes.common.command import check_trace, run_command
from recipes.common.models import ModelArguments, load_draft, load_target, use_threads
from recipes.common.options import string
from recipes.experiments.replay import load_trace


@dataclass
class BlocksArguments(ModelArguments):
    """Which recordings to walk, with which draft. What its forward and the verification of a token cost is the config's."""

    trace: str = option("", string(), "Folders that `record` has made, with ',' between, a domain each.")
    requests: int = option(100, whole(0), "Requests of each whose answers are in the cache before.")
    held_back: int = option(100, whole(1), "Held-back prompts of each whose answers are walked.")

    def __post_init__(self):
        super().__post_init__()
        check_trace(self.trace)


class Read(NamedTuple):
    """One round in which the cache proposes: the `block` that the policy took of it, with the `agreement` of each token and the length of the `match`; how many of
    its tokens are `right`; and the draft's `tokens` in their place with its `confidence`, as far as they follow verified text."""

    block: list[int]
    agreement: list[float]
    match: int
    right: int
    tokens: list[int]
    confidence: list[float]
    truth: list[int]  # the target's tokens


Rule = Callable[[Read, int], list[int]]  # the block, where the draft disagrees with its j-th token first


def cut(read: Read, j: int) -> list[int]:
    return read.block[:j]


def correct(read: Read, j: int) -> list[int]:
    return [*read.block[:j], read.tokens[j]]


def _sure(rule: Rule) -> Rule:
    """Follow `rule` only where the draft is surer than the cache."""
    return lambda read, j: rule(read, j) if read.confidence[j] > read.agreement[j] else read.block


RULES: dict[str, Rule] = {
    "cut at the first disagreement": cut,
    "correct it": correct,
    "cut where the draft is surer": _sure(cut),
    "correct where the draft is surer": _sure(correct),
}


@dataclass
class Account:
    """Adds up a rule's gains, each a share of all tokens at the end: in `every` round, by `kind` of round, and where earlier rounds of the kind had gained (`known`)."""

    every: float = 0.0
    kind: dict[tuple, float] = field(default_factory=lambda: defaultdict(float))
    known: float = 0.0

    def add(self, kind: tuple, gain: float):
        self.every += gain
        self.known += gain if self.kind[kind] > 0 else 0.0
        self.kind[kind] += gain

    def shares(self, tokens: int) -> tuple[float, float, float]:
        """Return the gain in each round, in the kinds that gained in hindsight, and in those that had gained before."""
        return self.every / tokens, sum(max(one, 0.0) for one in self.kind.values()) / tokens, self.known / tokens


def main(argv: list[str] | None = None) -> int:
    """Walk each recording, and print a table; returns the exit status."""
    return run_command(BlocksArguments, measure, argv)


def measure(args: BlocksArguments, config: OnlineConfig):
    """Print a table for each domain."""
    if config.draft_cost is None:
        raise ValueError(
            "`draft_cost` was not given; pass --draft_cost and --verify_cost, since nothing is timed here."
        )
    use_threads(args.threads)
    target, _ = load_target(args.target, args.dtype, args.device)
    draft = load_draft(args.draft, target)
    for folder in args.trace.split(","):
        traced = load_trace(Path(folder), config.top_k, args.held_back)
        alone = OnlineAssistant(config=config)  # the suffix cache and its policy
        policy, cache = alone.lookahead, alone.texts.for_tenant(None)
        for request in traced.stream[: args.requests]:
            cache.add(request.tokens.tolist())
        walked = []
        for request, (tokens, confidence) in zip(traced.held_back, predictions(draft, traced.held_back), strict=True):
            walked += walk(request, tokens.tolist(), confidence.tolist(), cache, policy)
            cache.add(request.tokens.tolist())
        print(table(traced.name, walked, config.draft_cost, config.verify_cost), flush=True)


def walk(
    request: Feedback,
    tokens: Sequence[int],
    confidence: Sequence[float],
    cache: SuffixCache,
    policy: DraftPolicy,
) -> list[Read]:
    """Walk one answer in the rounds that the cache alone would make, as `policy` has it; it learns from them. `tokens` and `confidence` are the draft's likeliest at each position of
    the answer. Rounds without a block have an empty one."""
    answer, suffixes = request.answer.tolist(), CallSuffixes(request.tokens[: request.prompt_length].tolist(), cache)
    at, rounds = 0, []
    while at < len(answer):
        found = suffixes.continuation(min(policy.max_cached, len(answer) - at - 1)) if at < len(answer) - 1 else None
        match, agreement = (found.match, found.agreement) if found else (0, [])
        length = policy.plan(match, agreement).length
        block = found.tokens[:length] if found else []
        right = next((j for j, token in enumerate(block) if token != answer[at + j]), len(block))
        known = slice(at, at + min(right + 1, len(block)))
        rounds.append(
            Read(block, agreement[:length], match, right, list(tokens[known]), list(confidence[known]), answer[at:])
        )
        policy.observe_round(len(block), min(right + 1, len(block)), right, 0.0, policy.costs.v(len(block) + 1), steps=0, cached=len(block), match=match,
                             agreement=agreement[:length])  # fmt: skip
        suffixes.extend(answer[at : at + right + 1])
        at += right + 1
    return rounds


def yields(read: Read, rule: Rule | None, c: float, slope: float) -> tuple[int, float]:
    """Return a round's tokens and time, with the block of the policy or, after the draft has read it, of a rule.

    Where the draft agrees with the cache's first wrong token nothing is known of what it says to the others: the block ends there, which favours the rule.
    """
    if rule is None:
        return read.right + 1, 1 + slope * len(read.block)
    other = next((j for j, token in enumerate(read.tokens) if token != read.block[j]), None)
    block = read.block[: len(read.tokens)] if other is None else rule(read, other)
    right = next((j for j, token in enumerate(block) if token != read.truth[j]), len(block))
    return right + 1, 1 + slope * len(block) + c


def table(name: str, rounds: list[Read], c: float, slope: float) -> str:
    """Lay out what each rule gains, and who was right where the two disagreed first."""
    served = [yields(read, None, c, slope) for read in rounds]
    tokens, time = (sum(column) for column in zip(*served, strict=True))
    rate, accounts, who = tokens / time, {rule: Account() for rule in RULES}, Counter()
    for read, (count, took) in zip(rounds, served, strict=True):
        if not read.block:
            continue
        kind = (min(read.match, 8), int(4 * read.agreement[0]), int(4 * read.confidence[0]))
        for rule, account in accounts.items():
            other, longer = yields(read, RULES[rule], c, slope)
            account.add(kind, (other - rate * longer) - (count - rate * took))
        for j, token in enumerate(read.tokens):
            if token != read.block[j]:
                of = {read.block[j]: "the cache", token: "the draft"}
                who[of.get(read.truth[j], "neither")] += 1
                break
    lines = [
        f"{name}: {len(rounds)} rounds, in {sum(bool(read.block) for read in rounds)} of them the cache proposes; {rate:.2f} tokens a step with the cache alone. Where the draft disagrees first, "
        + ", ".join(f"{one} is right in {who[one]}" for one in ("the cache", "the draft", "neither")),
        "",
        "| rule | in each round where the cache proposes | in kinds of round that gain in hindsight | in kinds that had gained before |",
        "|---|---|---|---|",
    ]
    for rule, account in accounts.items():
        lines.append(f"| {rule} | {' | '.join(f'{share:+.3f}' for share in account.shares(tokens))} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
