"""`DraftModelProposer` lets the draft model propose tokens in one generate call, by direct forwards on its own KV cache, and scores it later at verified
positions where it made no prediction. It knows neither the target nor the recorder.

Symbols: n tokens are drafted in a round; V is the size of the target's vocabulary, W of the draft's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.drafting.context import DraftLogits

if TYPE_CHECKING:
    from hf_osd.drafting.context import DraftContext
    from hf_osd.drafting.processors import VerifiedProcessors
    from hf_osd.drafting.stopping import DraftStops
    from hf_osd.drafting.suffix_cache import CallSuffixes, Continuation
    from hf_osd.drafting.vocab_mapping import VocabMapping
    from hf_osd.metrics.stats import CallStats
    from hf_osd.models.draft_vocab import LowRankHead, RowsHead
    from hf_osd.policy.lookahead import DraftPolicy, Plan

# Verified positions without a prediction of the draft that are scored once it catches up, at most; each costs a row of the LM head.
MAX_UNSCORED = 16


class HeadUsage:
    """Counts for one call what a reduced draft vocabulary costs: verified tokens; those missing from the vocabulary; of these, those that the full head
    would have predicted (greedy; 0 when sampling)."""

    def __init__(self):
        self.tokens = self.missing = self.missed = 0
        self.head: RowsHead | LowRankHead | None = None
        # Inputs `(1, d)` for the full head once the call is over, each with the verified token there.
        self._to_check: list[tuple[Tensor, int]] = []

    def observe(self, logits: list[DraftLogits], tokens: list[int], missing: list[bool], late: bool = False):
        """Counts verified tokens and those missing from the head. `logits` are the draft's at the first of them: there `finish` asks the full head. With
        `late` the tokens were counted in their own round."""
        if not late:
            self.tokens += len(tokens)
            self.missing += sum(missing)
        triples = zip(logits, tokens, missing, strict=False)
        self._to_check += [(rows.hidden, token) for rows, token, is_missing in triples if is_missing]

    def finish(self, stats: CallStats):
        """Asks the full head and writes the counts into the call's statistics."""
        if self._to_check:
            hidden, tokens = zip(*self._to_check, strict=True)
            with torch.no_grad():
                predicted = self.head.full(torch.cat(hidden)).argmax(-1).tolist()
            self.missed += sum(a == b for a, b in zip(predicted, tokens, strict=True))
            self._to_check = []
        stats.head_tokens, stats.head_lacked, stats.head_missed = self.tokens, self.missing, self.missed


@dataclass
class Block:
    """Holds the tokens proposed in one round: first the draft model's, then the suffix cache's."""

    # The draft model's tokens, int64 (1, 1) each, in the target's ids.
    draft_tokens: list[Tensor] = field(default_factory=list)
    # The draft's logits at each of them, and one more if it made a step whose token was left out.
    draft_logits: list[DraftLogits] = field(default_factory=list)
    # The same, mapped to V and processed, (1, V) each; empty if tokens are chosen from `draft_logits` directly.
    scores: list[Tensor] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)  # at each of `draft_logits`; empty if it was not read
    cached: list[int] = field(default_factory=list)  # the suffix cache's tokens
    match: int = 0  # of the suffix cache's proposal, see `Continuation`
    agreement: list[float] = field(default_factory=list)  # likewise
    steps: int = 0  # forwards of the draft
    unread: int = 1  # tokens that the first of them read
    read_seconds: float | None = None  # the time of the first; `None` where nobody waited for it
    tokens: list[int] = field(default_factory=list)  # all n on the host, once verified
    # At the last `unscored` verified positions, once the draft has caught up: its expected acceptance `(unscored,)` and its logits.
    late_acceptance: Tensor | None = None
    late_logits: DraftLogits | None = None

    def append_cached(self, continuation: Continuation, length: int):
        """Ends the block with the first `length` tokens of the suffix cache's proposal."""
        self.cached, self.match = continuation.tokens[:length], continuation.match
        self.agreement = continuation.agreement[:length]

    @property
    def n(self) -> int:
        return len(self.draft_tokens) + len(self.cached)


class DraftModelProposer:
    """Proposes the draft model's tokens in one call.

    Args:
        context (`DraftContext`): the verified text and the draft's KV cache.
        mapping (`VocabMapping`): between the target's tokens and the draft's.
        lookahead (`DraftPolicy`): decides after each step of a selective plan if the draft goes on.
        verified (`VerifiedProcessors`, *optional*): the call's logits processors.
        stops (`DraftStops`): criteria before which a draft must end.
        eos (`set[int]`): token ids that end the text.
        sample (`bool`): `True` if the call samples.
        scores_device (`torch.device`): where scores are processed and tokens chosen.
        make_head (`Callable`, *optional*): makes, for a text `(L,)` in the draft's tokens, a head to compute in place of the model's own, and a view of
            the model with it; called at the draft's first step.
    """

    def __init__(
        self,
        context: DraftContext,
        mapping: VocabMapping,
        lookahead: DraftPolicy,
        verified: VerifiedProcessors | None,
        stops: DraftStops,
        eos: set[int],
        sample: bool,
        scores_device: torch.device,
        make_head: Callable | None = None,
    ):
        self.context, self._mapping = context, mapping
        self._lookahead, self._verified, self._stops, self._eos = lookahead, verified, stops, eos
        self._sample, self._scores_device, self._make_head = sample, scores_device, make_head
        # Greedy tokens are chosen from what the head computes; all others from scores over V.
        self._needs_scores = sample or verified is not None or not mapping.is_identity
        # Reading a token's value while drafting waits for the device, which costs nothing on the CPU.
        is_local = context.ids.device.type == scores_device.type == "cpu"
        self._looks = is_local or stops.asks or not mapping.is_identity
        self.head_usage = HeadUsage()
        self._unscored = 0  # last verified positions where the draft made no prediction, at most MAX_UNSCORED
        self._unscored_targets: deque[Tensor] = deque(maxlen=MAX_UNSCORED)  # p there, (1, V) each; when sampling
        # The verified tokens there, in the draft's ids, and which of them were missing from the head.
        self._unscored_tokens: deque[tuple[int, bool]] = deque(maxlen=MAX_UNSCORED)

    def draft(self, input_ids: Tensor, plan: Plan, text: CallSuffixes | None) -> Block:
        """Drafts up to `plan.length` tokens after `input_ids` `(1, L)`. A selective plan may end the block with a proposal of `text`, if given."""
        # 1. Catch up: read all verified text, and score the draft where it had made no prediction.
        start = time.perf_counter()
        if self._make_head is not None:
            self.context.head, self.context.model = self._make_head(self.context.ids[0])
            self.head_usage.head = self.context.head
            self._make_head = None
        block = Block(steps=1, unread=self.context.unread)
        logits = self.context.catch_up(self._unscored)
        if self._unscored:
            block.late_logits = logits[: self._unscored]
            block.late_acceptance = self._score_late(input_ids, block.late_logits)
        logits = logits[len(logits) - 1 :]
        processors = self._verified.for_drafting() if self._verified is not None else None
        if self._verified is not None and not self._verified.allows_drafts:
            return block  # the processors can no longer be copied
        selective, prefix_acceptance, extended, tokens = plan.selective and self._looks, 1.0, input_ids, []
        while True:
            # 2. Score the next token.
            try:
                scores = self._scores(logits, extended, processors) if self._needs_scores else None  # (1, V)
            except Exception:
                if self._verified is None or not self._verified.in_turn:
                    raise
                break  # a user's processor may fail on a draft that the target would never produce
            block.draft_logits.append(logits)
            if scores is not None:
                block.scores.append(scores)
                if not self._mapping.is_identity and not scores.isfinite().any():
                    break  # the draft has none of the tokens that the processors allow here
            if self._looks:
                block.confidence.append(float((logits if scores is None else DraftLogits(scores)).confidence()))
                if block.read_seconds is None:
                    block.read_seconds = time.perf_counter() - start
            # 3. Keep it if that pays. This is decided by the distribution and not by the sampled token, so q stays what it is sampled from.
            if selective:
                confidence = self._lookahead.confidence
                prefix_acceptance *= confidence.acceptance(confidence.bin(block.confidence[-1]))
                instead = 0.0 if block.draft_tokens else plan.cached_gain
                if not self._lookahead.should_keep(len(block.draft_tokens), prefix_acceptance, instead):
                    break
            # 4. Choose it, unless the text must end before it.
            token = self._choose(logits, scores)  # (1, 1)
            if self._needs_scores or self._stops.asks:
                extended = torch.cat([extended, token], dim=-1)
                if self._stops.asks and self._stops.end(extended):
                    break
            block.draft_tokens.append(token)
            if self._looks:
                tokens.append(int(token))
                if tokens[-1] in self._eos:
                    break
            # 5. Go on while that pays.
            if len(block.draft_tokens) == plan.length:
                break
            if selective and text is not None and self._append_cached(block, text, tokens, prefix_acceptance):
                break
            if selective and not self._lookahead.should_step(len(block.draft_tokens), prefix_acceptance):
                break
            logits = self.context.step(self._mapping.shared_to_draft(token))
            block.steps += 1
        return block

    def dense(self, block: Block, n: int) -> Tensor:
        """Returns the scores that the draft's first n tokens were chosen from, float32 `(n, V)`; -inf for tokens that it cannot propose."""
        if self._needs_scores:
            return torch.cat(block.scores[:n])
        size = self._mapping.draft_size
        return torch.cat([logits.dense(size) for logits in block.draft_logits[:n]]).to(self._scores_device)

    def log_q(self, block: Block, n: int, ids: Tensor) -> Tensor:
        """Returns log-probs of `ids` `(n, k)` under the distributions that the draft's first n tokens were chosen from, `(n, k)`."""
        scores = self.dense(block, n)
        # Sums over what the head computed alone: those over -inf as well take a hundred times as long.
        summed = [scores] if self._needs_scores else [one.logits for one in block.draft_logits[:n]]
        total = torch.cat([rows.logsumexp(-1, keepdim=True) for rows in summed])
        return scores.gather(-1, ids.to(scores.device)) - total.to(scores.device)

    def acceptance(self, block: Block, tokens: Tensor, targets: Tensor | None) -> Tensor:
        """Computes expected acceptance at the first verified positions, as far as the draft made predictions: `(min(steps, m+1),)`.

        Args:
            tokens (`Tensor` `(m+1,)`): the verified tokens.
            targets (`Tensor` `(m+1, V)`, *optional*): the target's distributions there, when sampling.
        """
        n = min(len(block.draft_logits), len(tokens))
        if not n:  # a processor stopped the draft at once
            return tokens.new_empty(0)
        if self._needs_scores:
            return self._acceptance(torch.cat(block.scores[:n]), tokens[:n], targets)
        left_out = block.draft_logits[len(block.draft_tokens) :]
        likeliest = [*block.draft_tokens, *(one.likeliest()[None].to(self._scores_device) for one in left_out)]
        return (torch.cat(likeliest[:n], dim=-1)[0] == tokens[:n]).float()

    def accept(
        self, block: Block, late: list[float], pieces: list[list[int]], tokens: Tensor, targets: Tensor | None
    ) -> list[float]:
        """Appends the round's verified text to the context and removes rejected drafts from the KV cache.

        Args:
            block: the round's proposal.
            late: `block.late_acceptance`, on the host.
            pieces: the draft's ids for each of the m+1 verified tokens.
            tokens: all of these ids, `(1, T)`.
            targets (`Tensor` `(m+1, V)`, *optional*): the target's distributions there, when sampling.

        Returns:
            `late`, with 0 where the token was not in the draft's head at that time.
        """
        predicted, head = min(len(block.draft_logits), len(pieces)), self.context.head
        missing = [False] * len(pieces)
        if block.steps:
            if late and head is not None and not self._sample:
                late = self._without_missing(late, block.late_logits)
            self._unscored = 0
            self._unscored_tokens.clear()
            self._unscored_targets.clear()
            self.context.crop(len(pieces) - 1)
        # Of a token that the draft spells in several of its own, it can predict the first.
        first_ids = [piece[0] for piece in pieces]
        if head is not None:
            missing = [token not in head for token in first_ids]
            self.head_usage.observe([] if self._sample else block.draft_logits[:predicted], first_ids, missing)
            head.add([token for token, is_missing in zip(first_ids, missing, strict=True) if is_missing])
        unscored = min(self._unscored + len(pieces) - predicted, MAX_UNSCORED)
        self._unscored_tokens.extend(zip(first_ids[predicted:], missing[predicted:], strict=True))
        if targets is not None:
            self._unscored_targets.extend(targets[j : j + 1] for j in range(predicted, len(pieces)))
        self.context.extend(tokens, list(map(len, pieces)))
        self._unscored = min(unscored, self.context.askable)
        return late

    def _without_missing(self, late: list[float], logits: DraftLogits) -> list[float]:
        """Sets acceptance to 0 at tokens that are in the head now and were missing when the target chose them."""
        tokens, missing = zip(*list(self._unscored_tokens)[-len(late) :], strict=True)
        self.head_usage.observe([logits[[i]] for i in range(len(late))], tokens, missing, late=True)
        return [hit * (not is_missing) for hit, is_missing in zip(late, missing, strict=True)]

    def _scores(self, logits: DraftLogits, input_ids: Tensor, processors) -> Tensor:
        scores = self._mapping.to_target_scores(logits.dense(self._mapping.draft_size)).to(self._scores_device)
        return processors(input_ids, scores) if processors else scores

    def _choose(self, logits: DraftLogits, scores: Tensor | None) -> Tensor:
        if scores is None:
            return logits.likeliest()[:, None].to(self._scores_device)
        return torch.multinomial(scores.softmax(-1), 1) if self._sample else scores.argmax(-1, keepdim=True)

    def _append_cached(self, block: Block, text: CallSuffixes, tokens: list[int], prefix_acceptance: float) -> bool:
        """Ends the block with cached tokens if their gain is larger than that of drafting on; returns `True` if it did."""
        if not (continuation := text.continuation(self._lookahead.max_cached, tokens)):
            return False
        length = self._lookahead.cache_suffix_length(
            len(tokens), prefix_acceptance, continuation.match, continuation.agreement
        )
        if length:
            block.append_cached(continuation, length)
        return bool(length)

    def _score_late(self, input_ids: Tensor, logits: DraftLogits) -> Tensor | None:
        """Computes expected acceptance at the verified positions where the draft had made no prediction, `(unscored,)`."""
        # A processor with state cannot be applied to past positions: acceptance stays unknown there.
        if self._verified is not None and self._verified.has_state:
            return None
        n = len(logits)
        tokens = input_ids[0, -n:]
        if not self._needs_scores:
            return (logits.likeliest().to(tokens.device) == tokens).float()
        scores = self._scores(logits, input_ids, None)  # (n, V)
        if self._verified is not None:
            prefixes = [input_ids[:, : input_ids.shape[1] - n + i] for i in range(n)]
            scores = torch.cat([self._verified.processors(prefixes[i], scores[i : i + 1]) for i in range(n)])
        return self._acceptance(scores, tokens, torch.cat(list(self._unscored_targets)) if self._sample else None)

    def _acceptance(self, scores: Tensor, tokens: Tensor, targets: Tensor | None) -> Tensor:
        """Computes expected acceptance for each row of `scores` `(n, V)`: Σ min(p, q) when sampling, else 1 where its likeliest token is the verified
        one of `tokens` `(n,)`."""
        if self._sample:
            q = scores.softmax(-1).nan_to_num()
            return torch.minimum(targets[: len(q)].to(q.device), q).sum(-1)
        return ((scores.argmax(-1) == tokens) & scores.isfinite().any(-1)).float()
