"""`DraftModelProposer`: the draft's part in one generate call: proposes tokens with direct forwards on a cache of its own, and keeps account of the
positions it has not been asked about. It knows nothing of the target, nor of what is recorded.

Symbols: n tokens are drafted in a round; V are the target's tokens, W the draft's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_osd.drafting.context import DraftContext, DraftLogits
    from hf_osd.drafting.processors import VerifiedProcessors
    from hf_osd.drafting.stopping import DraftStops
    from hf_osd.drafting.suffix_cache import CallSuffixes, Continuation
    from hf_osd.drafting.vocab_mapping import VocabMapping
    from hf_osd.metrics.stats import CallStats
    from hf_osd.models.draft_vocab import LowRankHead, RowsHead
    from hf_osd.policy.lookahead import DraftPolicy, Plan

# Positions the draft was not asked about that are scored once it catches up; each costs a row of the LM head.
MAX_UNSCORED = 16


class HeadUsage:
    """What a head of some rows alone did to one call: verified tokens, those of them that it lacked when they were due, and those among these
    that the whole head would have said (greedy; when sampling that stays 0)."""

    def __init__(self):
        self.tokens = self.lacked = self.missed = 0
        self._head: RowsHead | LowRankHead | None = None
        # What the whole head is asked about once the call is over: its input `(1, d)`, and the token that was due.
        self._due: list[tuple[Tensor, int]] = []

    def observe(self, head: RowsHead | LowRankHead, said: list[DraftLogits], due: list[int], lacked: list[bool]):
        """Verified tokens, which of them the head lacked, and what the draft said at the first ones, where it was asked."""
        self._head = head
        self.tokens += len(due)
        self.lacked += sum(lacked)
        self.ask(head, said, due, lacked)

    def ask(self, head: RowsHead | LowRankHead, said: list[DraftLogits], due: list[int], lacked: list[bool]):
        """Have the whole head asked where this one lacked the token."""
        self._head = head
        triples = zip(said, due, lacked, strict=False)
        self._due += [(rows.hidden, token) for rows, token, missing in triples if missing]

    def settle(self, stats: CallStats):
        """Ask the whole head, and write the figures into the call's statistics."""
        if self._due:
            hidden, tokens = zip(*self._due, strict=True)
            with torch.no_grad():
                said = self._head.full(torch.cat(hidden)).argmax(-1).tolist()
            self.missed += sum(a == b for a, b in zip(said, tokens, strict=True))
            self._due = []
        stats.head_tokens, stats.head_lacked, stats.head_missed = self.tokens, self.lacked, self.missed


@dataclass
class Block:
    """The drafts of one round, the draft's own first and those of the suffix cache after them."""

    own: list[Tensor] = field(default_factory=list)  # the draft's tokens, int64 (1, 1) each, in the target's ids
    said: list[DraftLogits] = field(
        default_factory=list
    )  # what each was taken from, and one more if the next token was asked for
    scores: list[Tensor] = field(
        default_factory=list
    )  # the same, processed and over V, (1, V) each, where that was needed
    confidence: list[float] = field(default_factory=list)  # of each of `said`, where looked at
    cached: list[int] = field(default_factory=list)
    match: int = 0
    agreement: list[float] = field(default_factory=list)
    steps: int = 0  # forwards of the draft
    caught_up: bool = False  # one of them read more than a round's tokens
    tokens: list[int] = field(default_factory=list)  # all n, once they are known
    # Expected acceptance at the last positions that were verified without asking the draft, `(lag,)`, now that it has caught up.
    lag: Tensor | None = None
    lag_said: DraftLogits | None = None  # what the draft says there

    def take(self, continuation: Continuation, length: int):
        """End the block with the first tokens of what the suffix cache proposes."""
        self.cached, self.match = continuation.tokens[:length], continuation.match
        self.agreement = continuation.agreement[:length]

    @property
    def n(self) -> int:
        return len(self.own) + len(self.cached)


class DraftModelProposer:
    """The draft in one call.

    Args:
        context (`DraftContext`): what it has read.
        translation (`VocabMapping`): between the target's tokens and the draft's.
        lookahead (`DraftPolicy`): asked on the way, if the plan is selective.
        verified (`VerifiedProcessors`, *optional*): the call's logits processors.
        stops (`DraftStops`): where a draft must end.
        eos (`set[int]`): token ids that end the text.
        sample (`bool`): whether the call samples.
        home (`torch.device`): where scores are processed and chosen from.
        make_head (`Callable`, *optional*): the head to compute in place of the model's own, and the view of the model with it, for a text `(L,)`
            in the draft's tokens; called when the draft is first asked.
    """

    def __init__(
        self,
        context: DraftContext,
        translation: VocabMapping,
        lookahead: DraftPolicy,
        verified: VerifiedProcessors | None,
        stops: DraftStops,
        eos: set[int],
        sample: bool,
        home: torch.device,
        make_head: Callable | None = None,
    ):
        self.context, self.translation = context, translation
        self._lookahead, self._verified, self._stops, self._eos = lookahead, verified, stops, eos
        self._sample, self._home, self._make_head = sample, home, make_head
        # Whether tokens may be chosen from what the head computes as it is; else from scores over all of V.
        self._needs_scores = sample or verified is not None or not translation.is_identity
        # To look at a token as it is drafted waits for the device. On the CPU that costs nothing.
        is_local = context.ids.device.type == home.type == "cpu"
        self._looks = is_local or stops.asks or not translation.is_identity
        self.usage = HeadUsage()
        self._lag = 0  # last verified positions that the draft was not asked about, at most MAX_UNSCORED
        self._lag_targets: deque[Tensor] = deque(maxlen=MAX_UNSCORED)  # p there, (1, V) each; only when sampling
        # The tokens there, in the draft's ids, and whether the head lacked them.
        self._lag_due: deque[tuple[int, bool]] = deque(maxlen=MAX_UNSCORED)

    def draft(self, input_ids: Tensor, plan: Plan, text: CallSuffixes | None) -> Block:
        """Up to `plan.length` tokens after `input_ids` `(1, L)`. `text`, if given, may end the block."""
        if self._make_head is not None:
            self.context.head, self.context.model = self._make_head(self.context.ids[0])
            self._make_head = None
        block = Block(steps=1, caught_up=self.context.unread > 2)
        said = self.context.catch_up(self._lag)
        if self._lag:
            block.lag_said = said[: self._lag]
            block.lag = self._settle_lag(input_ids, block.lag_said)
        said = said[len(said) - 1 :]
        processors = self._verified.for_drafting() if self._verified is not None else None
        if self._verified is not None and not self._verified.allows_drafts:
            return block  # they cannot be copied any more
        selective, reach, extended, tokens = plan.selective and self._looks, 1.0, input_ids, []
        while True:
            try:
                scores = self._scores(said, extended, processors) if self._needs_scores else None  # (1, V)
            except Exception:
                if self._verified is None or not self._verified.in_turn:
                    raise
                break  # a user's own processor does not know what was drafted, which may never come true
            block.said.append(said)
            if scores is not None:
                block.scores.append(scores)
                if not self.translation.is_identity and not scores.isfinite().any():
                    break  # all that is allowed here are words that the draft does not have
            if self._looks:
                block.confidence.append(_confidence(said if scores is None else scores))
            if selective:
                reach *= self._lookahead.confidence.acceptance(self._lookahead.confidence.bin(block.confidence[-1]))
                # For what the draft thinks, not for what was sampled: q stays what it is sampled from.
                if not self._lookahead.should_keep(len(block.own), reach):
                    break
            token = self._choose(said, scores)  # (1, 1)
            if self._needs_scores or self._stops.asks:
                extended = torch.cat([extended, token], dim=-1)
                if self._stops.asks and self._stops.end(extended):
                    break
            block.own.append(token)
            if self._looks:
                tokens.append(int(token))
                if tokens[-1] in self._eos:
                    break
            if len(block.own) == plan.length:
                break
            if selective and text is not None and self._take_tail(block, text, tokens, reach):
                break
            if selective and not self._lookahead.should_step(len(block.own), reach):
                break
            said = self.context.step(self.translation.token(token))
            block.steps += 1
        return block

    def dense(self, block: Block, n: int) -> Tensor:
        """The scores that the first n of the draft's own tokens were taken from, float32 `(n, V)`: -inf for what could not be said."""
        if self._needs_scores:
            return torch.cat(block.scores[:n])
        return torch.cat([said.dense(self.translation.draft_size) for said in block.said[:n]]).to(self._home)

    def log_q(self, block: Block, n: int, ids: Tensor) -> Tensor:
        """Log-probs of `ids` `(n, k)` under what the first n of the draft's own tokens were taken from, `(n, k)`."""
        scores = self.dense(block, n)
        return scores.gather(-1, ids.to(scores.device)) - scores.logsumexp(-1, keepdim=True)

    def overlap(self, block: Block, tokens: Tensor, targets: Tensor | None) -> Tensor:
        """Expected acceptance where the draft was asked, `(min(steps, m+1),)`, of the verified `tokens` `(m+1,)`.

        Args:
            targets (`Tensor` `(m+1, V)`, *optional*): the target's distributions there, when sampling.
        """
        n = min(len(block.said), len(tokens))
        if not n:  # the draft was stopped before it said anything
            return tokens.new_empty(0)
        if self._needs_scores:
            return self._overlap(torch.cat(block.scores[:n]), tokens[:n], targets)
        said = [*block.own, *(said.likeliest()[None].to(self._home) for said in block.said[len(block.own) :])]
        return (torch.cat(said[:n], dim=-1)[0] == tokens[:n]).float()

    def follow(
        self, block: Block, lag: list[float], pieces: list[list[int]], tokens: Tensor, targets: Tensor | None
    ) -> list[float]:
        """Take in the round's verified text.

        Args:
            block: what was drafted.
            lag: `block.lag`, on the host.
            pieces: the verified tokens, m+1, each as the draft's ids of it.
            tokens: the same in one, `(1, T)`.
            targets (`Tensor` `(m+1, V)`, *optional*): the target's distributions there, when sampling.

        Returns:
            `lag`, without what the draft could not have said when it was due.
        """
        asked, head = min(len(block.said), len(pieces)), self.context.head
        lacked = [False] * len(pieces)
        if block.steps:
            if lag and head is not None and not self._sample:
                lag = self._without_unsayable(lag, block.lag_said)
            self._lag = 0
            self._lag_due.clear()
            self._lag_targets.clear()
            self.context.crop(len(pieces) - 1)
        # Of a word that the draft spells in several of its own, it could be right about the first.
        due = [piece[0] for piece in pieces]
        if head is not None:
            lacked = [token not in head for token in due]
            self.usage.observe(head, [] if self._sample else block.said[:asked], due, lacked)
            head.add([token for token, missing in zip(due, lacked, strict=True) if missing])
        self._lag = min(self._lag + len(pieces) - asked, MAX_UNSCORED)
        self._lag_due.extend(zip(due[asked:], lacked[asked:], strict=True))
        if targets is not None:
            self._lag_targets.extend(targets[j : j + 1] for j in range(asked, len(pieces)))
        self.context.extend(tokens, list(map(len, pieces)))
        return lag

    def _without_unsayable(self, lag: list[float], said: DraftLogits) -> list[float]:
        """`lag` without the hits on tokens that the head has by now, and lacked when they were due."""
        due, lacked = zip(*list(self._lag_due)[-len(lag) :], strict=True)
        self.usage.ask(self.context.head, [said[[i]] for i in range(len(lag))], due, lacked)
        return [hit * (not missing) for hit, missing in zip(lag, lacked, strict=True)]

    def _scores(self, said: DraftLogits, input_ids: Tensor, processors) -> Tensor:
        scores = self.translation.scores(said.dense(self.translation.draft_size)).to(self._home)
        return processors(input_ids, scores) if processors else scores

    def _choose(self, said: DraftLogits, scores: Tensor | None) -> Tensor:
        if scores is None:
            return said.likeliest()[:, None].to(self._home)
        return torch.multinomial(scores.softmax(-1), 1) if self._sample else scores.argmax(-1, keepdim=True)

    def _take_tail(self, block: Block, text: CallSuffixes, tokens: list[int], reach: float) -> bool:
        """End the block with cached tokens, if that is worth more than drafting on."""
        if not (continuation := text.continuation(self._lookahead.max_cached, tokens)):
            return False
        length = self._lookahead.cache_suffix_length(len(tokens), reach, continuation.match, continuation.agreement)
        if length:
            block.take(continuation, length)
        return bool(length)

    def _settle_lag(self, input_ids: Tensor, said: DraftLogits) -> Tensor | None:
        """Score the draft, now that it has caught up, at the positions it had not been asked about, `(lag,)`."""
        # A processor with state cannot be asked about the past: α stays unknown there.
        if self._verified is not None and self._verified.has_state:
            return None
        lag = len(said)
        tokens = input_ids[0, -lag:]
        if not self._needs_scores:
            return (said.likeliest().to(tokens.device) == tokens).float()
        scores = self._scores(said, input_ids, None)  # (lag, V)
        if self._verified is not None:
            prefixes = [input_ids[:, : input_ids.shape[1] - lag + i] for i in range(lag)]
            scores = torch.cat([self._verified.processors(prefixes[i], scores[i : i + 1]) for i in range(lag)])
        return self._overlap(scores, tokens, torch.cat(list(self._lag_targets)) if self._sample else None)

    def _overlap(self, scores: Tensor, tokens: Tensor, targets: Tensor | None) -> Tensor:
        """Σ min(p, q) of each row of `scores` `(n, V)` when sampling, else whether its likeliest token is that of `tokens` `(n,)`."""
        if self._sample:
            q = scores.softmax(-1).nan_to_num()
            return torch.minimum(targets[: len(q)].to(q.device), q).sum(-1)
        return ((scores.argmax(-1) == tokens) & scores.isfinite().any(-1)).float()


def _confidence(scores: DraftLogits | Tensor) -> float:
    """The probability of the likeliest token."""
    if isinstance(scores, Tensor):
        return float((scores.amax(-1) - scores.logsumexp(-1)).exp().nan_to_num())
    return float(scores.confidence())
