"""`CallRecorder` records the verified rounds of one generate call and makes [`Feedback`] of them. It outlives the call's generator."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.drafting.vocab_mapping import starts
from hf_osd.feedback.feedback import ACCEPTED, REJECTED, UNTESTED, Feedback, SparseLogits
from hf_osd.feedback.target_states import TargetStates
from hf_osd.feedback.top_tokens import top_tokens
from hf_osd.metrics.stats import CallStats

if TYPE_CHECKING:
    from hf_osd.drafting.draft_model import Block
    from hf_osd.drafting.vocab_mapping import VocabMapping
    from hf_osd.feedback.prompt_states import PromptStates

logger = logging.getLogger(__name__)

# Likeliest tokens recorded per position if no distributions are kept.
_LIKELY = 16


@dataclass(frozen=True, eq=False)
class _Round:
    """One verified round: m+1 of the target's tokens, N of the draft's ids. `rows`, `draft_logps` `(N, k)`, `drafted_logp` `(N,)` and `positions` only where
    the target's distributions are kept, `likely` only where its likeliest tokens are, `(m+1, 16)` each."""

    tokens: list[int]  # N
    at: list[int]  # index in these of each of the target's tokens
    acceptance: list[float]  # N, NaN where unknown
    positions: list[tuple[int, int]]  # drafted token and outcome; N
    rows: SparseLogits | None = None
    draft_logps: Tensor | None = None  # log q of the kept tokens
    drafted_logp: Tensor | None = None
    likely: tuple[Tensor, Tensor] | None = None  # ids and probabilities


class CallRecorder:
    """Records one call.

    Args:
        prompt (`Tensor` int64 `(L,)`): the prompt in the draft's tokens.
        mapping (`VocabMapping`): maps rounds from the target's tokens to the draft's, in which they are kept.
        sampled (`bool`): `True` if the call samples.
        processed (`bool`): `True` if logits processors changed the distributions that tokens were chosen from.
        capture (`bool`): keep the target's distributions; statistics are always kept.
        track_likely (`bool`): if distributions are not kept, record the target's likeliest tokens all the same.
        top_k (`int`), dtype (`torch.dtype`): size and type of the distributions.
        source (`Tensor` int64 `(S,)`, *optional*): tokens that the draft's encoder reads, if it has one.
        prompt_states (`PromptStates`, *optional*): the target's hidden states at the prompt, if the prompt teaches.
        prompt_positions (`int`): how many of the prompt's last tokens keep the states that a feature-level draft reads.
        held (`int`): how many of the prompt's first tokens the target does not read, for its cache holds them.
    """

    def __init__(
        self,
        prompt: Tensor,
        mapping: VocabMapping,
        sampled: bool,
        processed: bool,
        capture: bool,
        track_likely: bool,
        top_k: int,
        dtype: torch.dtype,
        source: Tensor | None = None,
        prompt_states: PromptStates | None = None,
        prompt_positions: int = 0,
        held: int = 0,
    ):
        self.stats = CallStats(requests=1)
        self.sampled, self.processed, self.prompt_states = sampled, processed, prompt_states
        self._mapping = mapping
        self._capture, self._track_likely, self._top_k, self._dtype = capture, track_likely, top_k, dtype
        self.prompt = prompt.to("cpu", torch.int32)  # (L,)
        self._source = None if source is None else source.to("cpu", torch.int32)
        self._rounds: list[_Round] = []
        self._collected: SparseLogits | None = None  # the rows of all rounds
        self._states: list[Tensor] = []  # the target's at the tokens that it reads, (S', F) each
        self._state_layers, self._prompt_positions, self._held = 0, prompt_positions, held
        self._stream: torch.cuda.Stream | None = None

    @property
    def captures(self) -> bool:
        """Is `True` if the target's distributions and states are kept."""
        return self._capture

    @property
    def answer(self) -> list[int]:
        """Lists the verified tokens so far, N of the draft's ids."""
        return [token for one in self._rounds for token in one.tokens]

    def add_round(
        self,
        pieces: list[list[int]],
        raw: Tensor,
        block: Block,
        accepted: int,
        tested: int,
        acceptance: list[float],
        log_q: Callable[[Tensor], Tensor] | None,
    ):
        """Records one verified round, or, where an exception such as an interrupt comes in the midst of it, nothing of it but statistics.

        Args:
            pieces: the draft's ids for each of the m+1 verified tokens.
            raw: the target's logits there before any processor, float32 `(m+1, V)`.
            block: the proposal.
            accepted, tested: how many of its n tokens were accepted, and how many tested.
            acceptance: the draft's expected acceptance at the first verified positions, as far as it made predictions.
            log_q: computes log-probs of ids `(t, k)`, `(t, k)`, under the distributions that the draft model's t tested tokens were chosen from; `None` if
                t is 0.
        """
        from_draft = min(tested, len(block.draft_tokens))
        self.stats.observe_round(block.n, tested, accepted, len(pieces), len(block.draft_tokens), block.steps)
        tokens = [token for piece in pieces for token in piece]
        at = starts(pieces)
        overlaps = _spread(acceptance, at, len(tokens), torch.nan)
        if not self._capture:
            likely = None
            if self._track_likely:
                with self._on_side_stream(raw):
                    top, ids = top_tokens(raw, min(_LIKELY, raw.shape[-1]))  # (m+1, k)
                    likely = ids, (top - raw.logsumexp(-1, keepdim=True)).exp()
            self._rounds.append(_Round(tokens, at, overlaps, [], likely=likely))
            return
        if self.prompt_states is not None and not self._rounds:
            self.prompt_states.finish_prefill(block.n, raw[0])
        # Feedback is about the draft model: where the suffix cache proposed, the draft counts as untested.
        drafted = block.tokens[:from_draft]
        with self._on_side_stream(raw, *block.scores, *(one.logits for one in block.draft_logits)):
            columns = self._mapping.shared_columns(raw.device)
            rows = SparseLogits.from_logits(raw, self._top_k, self._dtype, columns)  # in the target's ids
            draft_logps = torch.full_like(rows.top_logps, torch.nan)  # (m+1, k)
            drafted_logp = torch.full_like(rows.tail_logp, torch.nan)  # (m+1,)
            if log_q is not None:
                ids = torch.tensor(drafted, device=raw.device)[:, None]
                logps = log_q(torch.cat([rows.top_ids[:from_draft].long(), ids], dim=-1)).to(raw.device, self._dtype)
                draft_logps[:from_draft], drafted_logp[:from_draft] = logps[:, :-1], logps[:, -1]
            rows = self._mapping.to_draft_rows(rows, pieces)
            if not self._mapping.is_identity:
                drafted = [self._mapping.to_draft_ids([token])[0][0] for token in drafted]
            if len(tokens) > len(pieces):
                wide = [x.new_full((len(tokens), *x.shape[1:]), torch.nan) for x in (draft_logps, drafted_logp)]
                wide[0][at], wide[1][at] = draft_logps, drafted_logp
                draft_logps, drafted_logp = wide
        seen = [(drafted[j], ACCEPTED if j < accepted else REJECTED) for j in range(from_draft)]
        positions = _spread(seen, at, len(tokens), (-1, UNTESTED))
        self._rounds.append(_Round(tokens, at, overlaps, positions, rows, draft_logps, drafted_logp))

    def add_states(self, states: Tensor, layers: int):
        """Keeps the target's hidden states `(S', F)`, of so many layers, at the next tokens that it has read."""
        if self._capture:
            self._states.append(states)
            self._state_layers = layers

    @contextlib.contextmanager
    def _on_side_stream(self, raw: Tensor, *others: Tensor):
        """Runs the block on a CUDA stream of its own, beside what the device does next; on other devices in place. Pass the tensors that it reads. What it
        makes stays on the device until the call ends, so that no round waits for it."""
        if raw.device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(raw.device)
        self._stream.wait_stream(torch.cuda.current_stream(raw.device))
        with torch.cuda.stream(self._stream):
            yield
        for tensor in (raw, *others):  # their memory must not be reused before this stream has read them
            if tensor.device == raw.device:
                tensor.record_stream(self._stream)

    def set_acceptance(self, values: list[float]):
        """Sets expected acceptance at the target's last tokens, which the draft has predicted only after their round."""
        places = ((one.acceptance, i) for one in reversed(self._rounds) for i in reversed(one.at))
        for value, (acceptance, i) in zip(reversed(values), places, strict=False):
            if acceptance[i] != acceptance[i]:  # NaN: still unknown
                acceptance[i] = value

    def likely(self) -> tuple[Tensor, Tensor] | None:
        """Lists tokens that the target found likely at the verified positions, in the draft's ids, and their probabilities, `(N,)` each; `None` if they
        were not recorded."""
        if self._capture and self._rounds:
            rows = self._collected_rows()
            return rows.top_ids.flatten(), rows.top_logps.flatten().float().exp().nan_to_num()
        recorded = [one.likely for one in self._rounds if one.likely is not None]
        if not recorded or not self._mapping.is_identity:
            return None
        if self._stream is not None:
            self._stream.synchronize()
        ids, probabilities = (torch.cat(parts).flatten().cpu() for parts in zip(*recorded, strict=True))
        return ids, probabilities

    def _collected_rows(self) -> SparseLogits:
        if self._collected is None:
            if self._stream is not None:
                self._stream.synchronize()
            self._collected = SparseLogits.cat([one.rows for one in self._rounds]).cpu()
        return self._collected

    def to_feedback(self, shared: int = 0) -> Feedback | None:
        """Makes the request's feedback, `None` if nothing was verified or captured, and completes `stats`.

        Args:
            shared (`int`): how many of the prompt's first tokens do not teach, since an earlier text has them.
        """
        overlaps = [value for one in self._rounds for value in one.acceptance]
        known = [value for value in overlaps if value == value]
        self.stats.overlap_sum, self.stats.overlap_count = float(sum(known)), len(known)
        states, self.prompt_states = self.prompt_states, None
        if states is not None:
            states.close()
        if not self._capture or not self._rounds:
            return None
        rows = self._collected_rows()
        drafted, outcome = zip(*(position for one in self._rounds for position in one.positions), strict=True)
        return Feedback(
            tokens=torch.cat([self.prompt, torch.tensor(self.answer, dtype=torch.int32, device="cpu")]),
            prompt_length=len(self.prompt),
            top_ids=rows.top_ids,
            top_logps=rows.top_logps,
            tail_logp=rows.tail_logp,
            draft_logps=torch.cat([one.draft_logps for one in self._rounds]).cpu(),
            drafted=torch.tensor(drafted, dtype=torch.int32, device="cpu"),
            drafted_logp=torch.cat([one.drafted_logp for one in self._rounds]).cpu(),
            outcome=torch.tensor(outcome, dtype=torch.int8, device="cpu"),
            overlap=torch.tensor(overlaps, dtype=torch.float32, device="cpu"),
            sampled=self.sampled,
            source=self._source,
            prompt_rows=None if states is None else self._prompt_rows(states, shared),
            states=self._kept_states(),
        )

    def _kept_states(self) -> TargetStates | None:
        """Packs the target's states at the prompt's last tokens and at the answer's, but for its last token, which the target has not read."""
        if not self._states:
            return None
        start = max(len(self.prompt) - self._prompt_positions - 2, self._held)  # the state at j-2 predicts token j
        began = time.perf_counter()
        try:
            states, self._states = torch.cat(self._states), []
            return TargetStates.from_states(states[start - self._held :], self._state_layers, start)
        except ValueError as error:  # not finite
            _warn_of_states(str(error))
            return None
        except Exception:  # out of memory, say: the request teaches less, and the user's call goes on
            logger.exception(
                "The target's hidden states could not be kept; a feature-level draft learns nothing from this request."
            )
            return None
        finally:
            self.stats.capture_seconds += time.perf_counter() - began

    def _prompt_rows(self, states: PromptStates, shared: int) -> SparseLogits | None:
        start = time.perf_counter()
        try:
            # Its first token has no prediction.
            count = len(self.prompt) - max(shared, 1)
            return states.rows(count, self._top_k, self._dtype, columns=self._mapping.shared_columns)
        except Exception:  # out of memory, say: no reason to break the user's call
            logger.exception(
                "The target's distributions at a prompt could not be computed; this request teaches by its answer alone."
            )
            return None
        finally:
            self.stats.capture_seconds += time.perf_counter() - start


@functools.cache
def _warn_of_states(error: str):
    logger.warning("A feature-level draft learns nothing from some requests, whose states were not kept: %s", error)


def _spread(values: list, at: list[int], n: int, fill) -> list:
    """Makes a list of n values: the given ones at the first of the indices `at`, `fill` at all others."""
    spread = [fill] * n
    for i, value in zip(at, values, strict=False):
        spread[i] = value
    return spread
