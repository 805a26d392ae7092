"""`OnlineCandidateGenerator`: drafts γ tokens a round for one generate call, and records what the target said of them.

It lives as long as the call. What it records goes into a `CallRecord`, which outlives it and becomes [`Feedback`] when sealed. It
knows nothing of training.

Symbols of a round: L tokens stand; n are drafted, d_0..d_{n-1}; the target's row j is its distribution of the token at absolute
position L+j; m+1 positions are verified, of which the first ones are accepted drafts.
"""

from __future__ import annotations

import inspect
import math
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from hf_osd.feedback import ACCEPTED, REJECTED, UNTESTED, Feedback, SparseRows
from hf_osd.stats import CallStats

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from hf_osd.lookahead import Lookahead


# Positions without a draft that are scored once the draft catches up; each costs a row of the LM head.
_MOST_LAG = 8


def draft_window(draft: PreTrainedModel) -> float:
    """The longest text the draft has positions for, in tokens; infinite if its config does not say."""
    return getattr(draft.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf


class RawScores(LogitsProcessor):
    """A pass-through at index 0 of the target's processors: keeps each row of logits before the others change it."""

    def __init__(self):
        self.rows: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.rows.append(scores.clone())  # (1, V)
        return scores

    def take(self, count: int) -> Tensor:
        """The first `count` rows since the last call, `(count, V)`, and forget the rest."""
        rows, self.rows = torch.cat(self.rows[:count]), []
        return rows


class CallRecord:
    """What one generate call observed, round by round; sealed into [`Feedback`] once.

    Args:
        prompt (`Tensor` int64 `(L,)`): the prompt's tokens.
        sampled (`bool`): whether the call samples.
        capture (`bool`): whether to keep the target's distributions; statistics are kept anyway.
        top_k (`int`), dtype (`torch.dtype`): of the distributions kept.
    """

    def __init__(self, prompt: Tensor, sampled: bool, capture: bool, top_k: int, dtype: torch.dtype):
        self.stats = CallStats(requests=1)
        self.thread = threading.get_ident()
        self.model: PreTrainedModel | None = None  # the leased draft
        self.sampled = sampled
        self._capture, self._top_k, self._dtype = capture, top_k, dtype
        self._prompt = prompt.to("cpu", torch.int32)
        self._tokens: list[int] = []
        self._rows: list[SparseRows] = []
        self._draft_rows: list[Tensor] = []  # (m+1, k) each
        self._positions: list[tuple[int, float, int]] = []  # drafted token, its log q, outcome
        self._overlap: list[float] = []

    def add_round(
        self,
        tokens: list[int],
        raw: Tensor,
        draft_scores: Tensor | None,
        drafted: list[int],
        accepted: int,
        overlap: list[float],
    ):
        """One verification.

        Args:
            tokens: the m+1 verified tokens.
            raw: the target's logits there before any processor, float32 `(m+1, V)`.
            draft_scores: the scores the drafts were taken from, float32 `(n, V)`; `None` if n is 0.
            drafted: the n drafted tokens.
            accepted: how many of them were accepted.
            overlap: expected acceptance at the tested positions.
        """
        tested = len(overlap)
        self.stats.observe_round(len(drafted), tested, accepted, len(tokens))
        self._tokens += tokens
        self._overlap += overlap + [torch.nan] * (len(tokens) - tested)
        if not self._capture:
            return
        rows = SparseRows.of_logits(raw, self._top_k, self._dtype)
        self._rows.append(rows)
        draft_rows = torch.full(rows.top_logps.shape, torch.nan, dtype=self._dtype)  # (m+1, k)
        log_q = [torch.nan] * len(tokens)
        if tested:
            q, device = (
                draft_scores[:tested],
                draft_scores.device,
            )  # (tested, V); only what is kept of it leaves the device
            total = q.logsumexp(-1, keepdim=True)
            draft_rows[:tested] = (q.gather(-1, rows.top_ids[:tested].to(device, torch.long)) - total).to(
                "cpu", self._dtype
            )
            ids = torch.tensor(drafted[:tested], device=device)[:, None]
            log_q[:tested] = (q.gather(-1, ids) - total).squeeze(-1).tolist()
        self._draft_rows.append(draft_rows)
        for j in range(len(tokens)):
            outcome = UNTESTED if j >= tested else ACCEPTED if j < accepted else REJECTED
            self._positions.append((drafted[j] if j < tested else -1, log_q[j], outcome))

    def fill_overlap(self, values: list[float]):
        """Expected acceptance at the last positions, which the draft had not been asked about in their own round."""
        start = len(self._overlap) - len(values)
        for i, value in enumerate(values, start):
            if self._overlap[i] != self._overlap[i]:  # NaN: still unknown
                self._overlap[i] = value

    def seal(self) -> Feedback | None:
        """The request's feedback; `None` if nothing was verified or captured. Also settles `alpha` in `stats`."""
        known = [value for value in self._overlap if value == value]
        self.stats.overlap_sum, self.stats.overlap_count = float(sum(known)), len(known)
        if not self._rows:
            return None
        rows = SparseRows.cat(self._rows)
        drafted, log_q, outcome = zip(*self._positions, strict=True)
        return Feedback(
            tokens=torch.cat([self._prompt, torch.tensor(self._tokens, dtype=torch.int32)]),
            prompt_length=len(self._prompt),
            top_ids=rows.top_ids,
            top_logps=rows.top_logps,
            tail_logp=rows.tail_logp,
            draft_logps=torch.cat(self._draft_rows),
            drafted=torch.tensor(drafted, dtype=torch.int32),
            drafted_logp=torch.tensor(log_q).to(self._dtype),
            outcome=torch.tensor(outcome, dtype=torch.int8),
            overlap=torch.tensor(self._overlap),
            sampled=self.sampled,
        )


class OnlineCandidateGenerator(AssistedCandidateGenerator):
    """Drafts with direct forwards on a cache of its own, in place of one `assistant.generate` a round.

    Args:
        input_ids, generation_config, model_kwargs, inputs_tensor, logits_processor: as upstream's
            `AssistedCandidateGenerator` takes them. `logits_processor` gets a pass-through in front when it is not empty, so that
            the target's raw logits are seen.
        assistant_model (`PreTrainedModel`): the leased draft.
        record (`CallRecord`): where observations go.
        lookahead (`Lookahead`): chooses γ.
        confidence_threshold (`float`): stop drafting after a token less likely than this.
    """

    def __init__(
        self,
        input_ids: Tensor,
        assistant_model: PreTrainedModel,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        inputs_tensor: Tensor | None,
        logits_processor: LogitsProcessorList,
        record: CallRecord,
        lookahead: Lookahead,
        confidence_threshold: float = 0.0,
    ):
        super().__init__(
            input_ids=input_ids,
            assistant_model=assistant_model,
            generation_config=generation_config,
            model_kwargs=model_kwargs,
            inputs_tensor=inputs_tensor,
            logits_processor=logits_processor,
        )
        self.record = record
        self.lookahead = lookahead
        self._threshold = confidence_threshold
        self._sample = generation_config.do_sample
        self._processors = LogitsProcessorList(logits_processor)
        self._raw = RawScores() if logits_processor else None
        if self._raw is not None:
            logits_processor.insert(0, self._raw)  # the list is the call's own: generate made it
        eos = getattr(generation_config, "_eos_token_tensor", None)
        self._eos = set() if eos is None else set(eos.flatten().tolist())

        forward = inspect.signature(assistant_model.forward).parameters
        self._keeps_logits = assistant_model._supports_logits_to_keep()
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        device = assistant_model.device
        self._mask = None if mask is None else mask.to(device)
        takes_positions = "position_ids" in forward and positions is not None and positions.dim() == 2
        self._positions = positions.to(device) if takes_positions else None
        self._window = draft_window(assistant_model)
        self._cache = DynamicCache(config=assistant_model.config.get_text_config(decoder=True))
        self._cache.activate_past_recording()

        self._drafted: list[int] = []
        self._draft_scores: Tensor | None = None  # (n, V) float32, processed
        self._lag = 0  # last positions that were verified without being put to the draft, at most _MOST_LAG
        self._lag_targets: deque[Tensor] = deque(maxlen=_MOST_LAG)  # p there, (V,) each; only when sampling
        self._prefill = True  # the target's: its next forward takes the prompt as well
        self._caught_up = False  # the draft's last round took more than the tokens of one round
        self._draft_seconds = 0.0
        self._handed_over = 0.0

    def get_candidates(self, input_ids: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Draft for `input_ids` `(1, L)`: `(1, L+n)` and the scores drafted from, float32 `(1, n, V)`; `(input_ids, None)` if n is 0."""
        start = time.perf_counter()
        input_ids = input_ids.to(self.assistant_model.device)
        room = min(self.main_model_max_length - 1, self._window) - input_ids.shape[1]
        gamma = min(self.lookahead.next_length(), room)
        self._drafted, self._draft_scores = [], None
        if gamma > 0:
            candidates, self._draft_scores = self._draft(input_ids, gamma)
        else:
            candidates = input_ids
        self._handed_over = time.perf_counter()
        self._draft_seconds = self._handed_over - start
        return candidates, None if self._draft_scores is None else self._draft_scores[None]

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int):
        """Record the round: `input_ids` `(1, L+m+1)`, the target's processed scores `(1, n+1, V)`."""
        start = time.perf_counter()
        n, m = len(self._drafted), int(num_matches)
        tokens = input_ids[0, -(m + 1) :].tolist()
        # num_matches undercounts where the block was cut at EOS or the length limit: its last verified token is then the draft's own.
        rejected = m < n and tokens[-1] != self._drafted[m]
        accepted = m if rejected or m == n else m + 1
        tested = accepted + rejected
        raw = self._raw.take(m + 1) if self._raw is not None else scores[0, : m + 1]
        self.record.add_round(
            tokens, raw, self._draft_scores, self._drafted, accepted, self._overlap_of_drafts(scores, tested, accepted)
        )
        untested = len(tokens) - tested  # 1 for a bonus token, else 0
        self._lag = min(self._lag + untested, _MOST_LAG)
        if self._sample and untested:
            self._lag_targets.append(scores[0, m].softmax(-1))

        # Keep of the cache what is verified: the prefix and the accepted drafts that were fed. crop is owed after every round that
        # drafted, also by 0, or sliding windows never shrink.
        if n:
            verified = input_ids.shape[1] - 1
            self._cache.crop(-max(self._cache.get_seq_length() - verified, 0))
        target_seconds = start - self._handed_over
        self.lookahead.observe_round(
            n,
            tested,
            accepted,
            draft_seconds=None if self._caught_up else self._draft_seconds,
            target_seconds=None if self._prefill else target_seconds,
        )
        self._prefill = False
        stats = self.record.stats
        stats.draft_seconds += self._draft_seconds
        stats.target_seconds += target_seconds
        stats.capture_seconds += time.perf_counter() - start

    def _draft(self, input_ids: Tensor, gamma: int) -> tuple[Tensor, Tensor]:
        """Up to γ tokens after `input_ids` `(1, L)`: the sequence `(1, L+n)`, and the scores `(n, V)` they were taken from."""
        fed = self._cache.get_seq_length()
        feed = input_ids[:, fed:]  # all the cache lacks: the prompt at first, else what was verified since
        self._caught_up = feed.shape[1] > 2
        lag = self._lag  # rows of the feed that predict verified tokens the draft was never asked about
        rows = []
        for step in range(gamma):
            logits = self._forward(feed, keep=lag + 1 if step == 0 else 1)
            if step == 0:
                self._settle_lag(input_ids, logits[:lag])
            scores = logits[-1:]  # (1, V)
            if self._processors:
                scores = self._processors(input_ids, scores.clone())
            rows.append(scores)
            probabilities = scores.softmax(-1) if self._sample or self._threshold else None
            token = torch.multinomial(probabilities, 1) if self._sample else scores.argmax(-1, keepdim=True)  # (1, 1)
            input_ids, feed = torch.cat([input_ids, token], dim=-1), token
            self._drafted.append(int(token))
            unsure = self._threshold and float(probabilities[0, self._drafted[-1]]) < self._threshold
            if unsure or self._drafted[-1] in self._eos:
                break
        return input_ids, torch.cat(rows)

    def _forward(self, tokens: Tensor, keep: int) -> Tensor:
        """The draft's logits at the last `keep` of `tokens` `(1, t)`, float32 `(keep, V)`."""
        fed, kwargs = self._cache.get_seq_length(), {}
        total = fed + tokens.shape[1]
        if self._mask is not None:
            kwargs["attention_mask"] = torch.nn.functional.pad(self._mask, (0, total - self._mask.shape[1]), value=1)
        if self._positions is not None:
            known = self._positions.shape[1]
            beyond = self._positions[:, -1:] + torch.arange(1, total - known + 1, device=self._positions.device)
            kwargs["position_ids"] = torch.cat([self._positions, beyond], dim=-1)[:, fed:]
        if self._keeps_logits:
            kwargs["logits_to_keep"] = keep
        outputs = self.assistant_model(input_ids=tokens, past_key_values=self._cache, use_cache=True, **kwargs)
        return outputs.logits[0, -keep:].float()

    def _overlap_of_drafts(self, scores: Tensor, tested: int, accepted: int) -> list[float]:
        """Expected acceptance at the tested positions: 0/1 when greedy, else Σ min(p, q) of what both were sampled from."""
        if not self._sample or not tested:
            return [float(j < accepted) for j in range(tested)]
        p = scores[0, :tested].softmax(-1)
        q = self._draft_scores[:tested].softmax(-1).to(p.device)
        return torch.minimum(p, q).sum(-1).tolist()

    def _settle_lag(self, input_ids: Tensor, logits: Tensor):
        """Score the draft, now that it has caught up, at the `lag` positions it had not been asked about: logits `(lag, V)`."""
        lag = logits.shape[0]
        if lag:
            said = input_ids[0, -lag:]
            prefixes = [input_ids[:, : input_ids.shape[1] - lag + i] for i in range(lag)]
            if self._processors:
                logits = torch.cat([self._processors(prefixes[i], logits[i : i + 1].clone()) for i in range(lag)])
            if self._sample:
                p = torch.stack(list(self._lag_targets)).to(logits.device)  # (lag, V)
                overlap = torch.minimum(p, logits.softmax(-1)).sum(-1).tolist()
            else:
                overlap = (logits.argmax(-1) == said).float().tolist()
            self.record.fill_overlap(overlap)
            self.lookahead.observe_shadow(overlap)
        self._lag = 0
        self._lag_targets.clear()
