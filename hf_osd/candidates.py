"""`OnlineCandidateGenerator`: drafts γ tokens a round for one generate call, and tells a `CallRecord` what the target said of them.

It lives as long as the call, and knows nothing of training.

Symbols of a round: L tokens stand; n are drafted, d_0..d_{n-1}; the target's row j is its distribution of the token at absolute
position L+j; m+1 positions are verified, of which the first ones are accepted drafts. V are the target's tokens, W the draft's.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from hf_osd.draft_context import DraftContext, draft_window
from hf_osd.processors import VerifiedProcessors
from hf_osd.stopping import DraftStops

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

    from hf_osd.call_record import CallRecord
    from hf_osd.lookahead import Lookahead
    from hf_osd.translation import Translation


# Positions without a draft that are scored once the draft catches up; each costs a row of the LM head.
_MOST_LAG = 8


class OnlineCandidateGenerator(AssistedCandidateGenerator):
    """Drafts with direct forwards on a cache of its own, in place of one `assistant.generate` a round.

    Args:
        input_ids, generation_config, model_kwargs, inputs_tensor, logits_processor: as upstream's
            `AssistedCandidateGenerator` takes them. The processors in `logits_processor` are put behind one that keeps the target's raw
            logits, if there are any.
        assistant_model (`PreTrainedModel`): the leased draft.
        prompt (`Tensor` int64 `(L',)`): the prompt as the draft reads it.
        translation (`Translation`): between the target's tokens and the draft's.
        record (`CallRecord`): where observations go.
        lookahead (`Lookahead`): chooses γ.
        confidence_threshold (`float`): stop drafting after a token less likely than this.
        stopping_criteria (`StoppingCriteriaList`, *optional*): the call's, if known.
    """

    def __init__(
        self,
        input_ids: Tensor,
        assistant_model: PreTrainedModel,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        inputs_tensor: Tensor | None,
        logits_processor: LogitsProcessorList,
        prompt: Tensor,
        translation: Translation,
        record: CallRecord,
        lookahead: Lookahead,
        confidence_threshold: float = 0.0,
        stopping_criteria: StoppingCriteriaList | None = None,
    ):
        super().__init__(
            input_ids=input_ids,
            assistant_model=assistant_model,
            generation_config=generation_config,
            model_kwargs=model_kwargs,
            inputs_tensor=inputs_tensor,
            logits_processor=logits_processor,
        )
        # generate writes it back into the draft's generation config when the schedule there is "heuristic": nothing is to change by it.
        self.num_assistant_tokens = assistant_model.generation_config.num_assistant_tokens
        self.record, self.lookahead, self._translation = record, lookahead, translation
        self._threshold = confidence_threshold
        self._sample = generation_config.do_sample
        eos = getattr(generation_config, "_eos_token_tensor", None)
        self._eos = set() if eos is None else set(eos.flatten().tolist())
        # Where scores are processed and chosen from: the processors' own tensors are there.
        self._home = input_ids.device

        self._verified: VerifiedProcessors | None = None
        if logits_processor:
            self._verified = VerifiedProcessors(list(logits_processor), self._sample, self._eos)
            logits_processor[:] = [self._verified]  # the list is the call's own: generate made it
        self.stops = DraftStops(stopping_criteria or [], self._sample, self._eos, self.main_model_max_length)
        # What cannot be put back must not be asked about tokens that may not come true; greedy, that is known in time.
        copied = self._verified is None or self._verified.can_be_copied or not self._sample
        self._may_draft = self.stops.allow_drafts and copied
        # In its first forward the target reads embeddings or images in place of tokens, and generate mistakes drafts for prompt; it also
        # takes the prompt's first hidden states and attentions for those of the drafts.
        states = generation_config.output_hidden_states or generation_config.output_attentions
        self._first_alone = states or _has_other_inputs(model_kwargs)

        encoded = self.assistant_kwargs.get("encoder_outputs")
        self._context = DraftContext(assistant_model, prompt, encoded, model_kwargs.get("attention_mask"))
        self._window = draft_window(assistant_model)

        self._drafted: list[int] = []
        self._draft_scores: Tensor | None = None  # (n, V) float32, processed
        # (1, V), of the token after the drafts, if the draft was asked for it as well.
        self._next_scores: Tensor | None = None
        self._lag = 0  # last positions that were verified without being put to the draft, at most _MOST_LAG
        self._lag_targets: deque[Tensor] = deque(maxlen=_MOST_LAG)  # p there, (1, V) each; only when sampling
        self._prefill = True  # the target's: its next forward takes the prompt as well
        self._caught_up = False  # the draft's last round took more than the tokens of one round
        self._draft_seconds = 0.0
        self._handed_over = 0.0

    def get_candidates(self, input_ids: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Draft for `input_ids` `(1, L)`: `(1, L+n)` and the scores drafted from, float32 `(1, n, V)`; `(input_ids, None)` if n is 0."""
        start = time.perf_counter()
        room = min(self.stops.max_length - 1 - input_ids.shape[1], self._window - self._context.length)
        gamma = min(self.lookahead.next_length(), room)
        if not self._may_draft or (self._prefill and self._first_alone):
            gamma = 0
        self._drafted, self._draft_scores, self._next_scores = [], None, None
        candidates = self._draft(input_ids, gamma) if gamma > 0 else input_ids
        self._handed_over = time.perf_counter()
        self._draft_seconds = self._handed_over - start
        return candidates, None if self._draft_scores is None else self._draft_scores[None]

    # Feedback is kept in half precision on the CPU, which a user's autocast cannot concatenate.
    @torch.autocast("cpu", enabled=False)
    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int):
        """Record the round: `input_ids` `(1, L+m+1)`, the target's processed scores `(1, n+1, V)`."""
        start = time.perf_counter()
        n, m = len(self._drafted), int(num_matches)
        tokens = input_ids[0, -(m + 1) :].tolist()
        # num_matches undercounts where the block was cut at EOS or the length limit: its last verified token is then the draft's own.
        rejected = m < n and tokens[-1] != self._drafted[m]
        accepted = m if rejected or m == n else m + 1
        tested = accepted + rejected
        raw = scores[0, : m + 1] if self._verified is None else self._verified.settle(m + 1)
        pieces = self._translation.tokens(tokens)
        self.record.add_round(
            pieces, raw, self._draft_scores, self._drafted, accepted, self._overlap_of_drafts(scores, tested, accepted)
        )
        if tested < len(tokens):  # a bonus token
            p = scores[:, m].softmax(-1) if self._sample else None
            if self._next_scores is not None:
                self._settle(self._next_scores, p, input_ids[0, -1:])
            else:
                self._lag = min(self._lag + 1, _MOST_LAG)
                if p is not None:
                    self._lag_targets.append(p)
        self._context.crop(m)
        self._context.extend(pieces)

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

    def _draft(self, input_ids: Tensor, gamma: int) -> Tensor:
        """Up to γ tokens after `input_ids` `(1, L)`: the sequence `(1, L+n)`. Sets what was drafted, and from which scores."""
        self._caught_up = self._context.unread > 2
        logits = self._context.catch_up(self._lag)
        self._settle_lag(input_ids, logits[:-1])
        processors = self._verified.for_drafting() if self._verified is not None else None
        rows: list[Tensor] = []  # (1, V) each
        while True:
            scores = self._translation.scores(logits[-1:]).to(self._home)
            if processors:
                scores = processors(input_ids, scores)
            if not self._translation.is_identity and not scores.isfinite().any():
                self._next_scores = scores
                break  # all that is allowed here are words that the draft does not have
            probabilities = scores.softmax(-1) if self._sample or self._threshold else None
            token = torch.multinomial(probabilities, 1) if self._sample else scores.argmax(-1, keepdim=True)  # (1, 1)
            extended = torch.cat([input_ids, token], dim=-1)
            if self.stops.end(extended):
                self._next_scores = scores
                break
            input_ids = extended
            rows.append(scores)
            self._drafted.append(int(token))
            unsure = self._threshold and float(probabilities[0, self._drafted[-1]]) < self._threshold
            if unsure or self._drafted[-1] in self._eos or len(rows) == gamma:
                break
            logits = self._context.step(self._translation.token(token))
        self._draft_scores = torch.cat(rows) if rows else None
        return input_ids

    def _overlap_of_drafts(self, scores: Tensor, tested: int, accepted: int) -> list[float]:
        """Expected acceptance at the tested positions: 0/1 when greedy, else Σ min(p, q) of what both were sampled from."""
        if not self._sample or not tested:
            return [float(j < accepted) for j in range(tested)]
        p = scores[0, :tested].softmax(-1)
        q = self._draft_scores[:tested].softmax(-1).to(p.device)
        return torch.minimum(p, q).sum(-1).tolist()

    def _settle_lag(self, input_ids: Tensor, logits: Tensor):
        """Score the draft, now that it has caught up, at the positions it had not been asked about: logits `(lag, W)`."""
        lag = logits.shape[0]
        # A processor with state cannot be asked about the past: α stays unknown there.
        if lag and not (self._verified is not None and self._verified.has_state):
            scores = self._translation.scores(logits).to(self._home)  # (lag, V)
            if self._verified is not None:
                prefixes = [input_ids[:, : input_ids.shape[1] - lag + i] for i in range(lag)]
                processed = [self._verified.processors(prefixes[i], scores[i : i + 1]) for i in range(lag)]
                scores = torch.cat(processed)
            targets = torch.cat(list(self._lag_targets)) if self._sample else None
            self._settle(scores, targets, input_ids[0, -lag:])
        self._lag = 0
        self._lag_targets.clear()

    def _settle(self, scores: Tensor, targets: Tensor | None, said: Tensor):
        """Record the draft's expected acceptance at the last r verified tokens: its scores `(r, V)`, p `(r, V)`, the tokens `(r,)`."""
        if self._sample:
            overlap = torch.minimum(targets.to(scores.device), scores.softmax(-1).nan_to_num()).sum(-1)
        else:
            overlap = (scores.argmax(-1) == said).float() * scores.isfinite().any(-1)
        self.record.fill_overlap(overlap.tolist())
        self.lookahead.observe_shadow(overlap.tolist())


def _has_other_inputs(model_kwargs: dict) -> bool:
    """Whether the target reads more than tokens: embeddings, or images encoded already or not."""
    floating = any(isinstance(value, Tensor) and value.is_floating_point() for value in model_kwargs.values())
    return floating or model_kwargs.get("mm_encoder_outputs") is not None
