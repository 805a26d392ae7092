"""`OnlineCandidateGenerator`: proposes tokens in each round of one generate call, from the draft or the suffix cache, and tells a `CallRecorder`
what the target said of them.

It lives as long as the call, and knows nothing of training. A round (Algorithm 1 of arXiv 2211.17192, with the number of drafts chosen and what is verified kept):

1. `get_candidates`: the policy says how many tokens are worth drafting, and whether the draft model or the suffix cache is to propose them (`_fill`);
2. the block is cut where the text must end: at its limit, with an EOS, before a stop string (`_cut`);
3. generate has the target read the block in one forward, and accepts or rejects token by token;
4. `update_candidate_strategy`: what the target said of each verified position goes to the record, from which the draft will learn;
5. the draft takes back what it had read of rejected tokens, and the policy hears what was accepted and what it cost.

Symbols of a round: L tokens stand; n are drafted, d_0..d_{n-1}; the target's row j is its distribution of the token at absolute
position L+j; m+1 positions are verified, of which the first ones are accepted drafts. V are the target's tokens, W the draft's.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from hf_osd.drafting.context import DraftContext, encoder_source
from hf_osd.drafting.draft_model import Block, DraftModelProposer, HeadUsage
from hf_osd.drafting.processors import VerifiedProcessors
from hf_osd.drafting.stopping import DraftStops
from hf_osd.models.hot_swap import NullDraft

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from hf_osd.drafting.reach import Reach
    from hf_osd.drafting.suffix_cache import CallSuffixes, Continuation
    from hf_osd.drafting.vocab_mapping import VocabMapping
    from hf_osd.generation.recorder import CallRecorder
    from hf_osd.generation.request import GenerateRequest
    from hf_osd.generation.verification import Verification
    from hf_osd.policy.lookahead import DraftPolicy


class OnlineCandidateGenerator(AssistedCandidateGenerator):
    """Drafts with direct forwards on a cache of its own, in place of one `assistant.generate` a round, or from a suffix cache.

    Args:
        request (`GenerateRequest`): what generate asks for. The processors in its `logits_processor` are put behind one that keeps the
            target's raw logits, if there are any.
        assistant_model (`PreTrainedModel`): the leased draft, or a [`NullDraft`].
        prompt (`Tensor` int64 `(L',)`): the prompt as the draft reads it.
        mapping (`VocabMapping`): between the target's tokens and the draft's.
        record (`CallRecorder`): where observations go.
        lookahead (`DraftPolicy`): chooses source and γ.
        text (`CallSuffixes`, *optional*): the text so far and those before it, as the suffix cache has them.
        make_head (`Callable`, *optional*): see [`DraftModelProposer`].
        verification (`Verification`, *optional*): whether the target can verify a block; taken for granted if left out.
        reach (`Reach`, *optional*): what the draft can read, where there is one. Beyond it, and where the draft fails, this call goes on without it.
        see_width (`Callable`, *optional*): told how many logits the target gives, where that is not known yet; nothing is drafted in such a call.
        warn (`Callable`, *optional*): see [`VerifiedProcessors`].
    """

    def __init__(
        self,
        request: GenerateRequest,
        assistant_model: PreTrainedModel,
        prompt: Tensor,
        mapping: VocabMapping,
        record: CallRecorder,
        lookahead: DraftPolicy,
        text: CallSuffixes | None = None,
        make_head: Callable | None = None,
        verification: Verification | None = None,
        reach: Reach | None = None,
        see_width: Callable[[int], None] | None = None,
        warn: Callable[[str], None] | None = None,
    ):
        input_ids, inputs_tensor = request.input_ids, request.inputs_tensor
        model_kwargs, logits_processor = request.model_kwargs, request.logits_processor
        upstreams = functools.partial(
            super().__init__,
            input_ids=input_ids,
            generation_config=request.generation_config,
            model_kwargs=model_kwargs,
            logits_processor=logits_processor,
        )
        # generate writes it back into the draft's generation config when the schedule there is "heuristic": nothing is to change by it.
        tokens = assistant_model.generation_config.num_assistant_tokens
        drafts = lookahead.has_draft
        source = encoder_source(assistant_model, inputs_tensor, model_kwargs.get("attention_mask")) if drafts else None
        if source is not None and len(source) > reach.source:
            drafts = False
        if drafts:
            try:
                upstreams(assistant_model=assistant_model, inputs_tensor=inputs_tensor)  # its encoder reads here
            except Exception as error:
                if not assistant_model.config.is_encoder_decoder:
                    raise
                reach.failed_source(error, None if source is None else len(source))
                drafts = False
        if not drafts:
            assistant_model = NullDraft()
            upstreams(assistant_model=assistant_model)
        self.num_assistant_tokens = tokens
        self.record, self.lookahead, self._mapping, self._text = record, lookahead, mapping, text
        self._sample = request.generation_config.do_sample
        eos = getattr(request.generation_config, "_eos_token_tensor", None)
        self._eos = set() if eos is None else set(eos.flatten().tolist())

        self._verified: VerifiedProcessors | None = None
        if logits_processor:
            self._verified = VerifiedProcessors(
                list(logits_processor), self._sample, self._eos, **({} if warn is None else {"warn": warn})
            )
            logits_processor[:] = [self._verified]  # the list is the call's own: generate made it
        self.stops = DraftStops(request.stopping_criteria, self._sample, self._eos, self.main_model_max_length)
        self._may_draft = self.stops.allow_drafts and see_width is None
        self._see_width = see_width
        # In its first forward the target reads embeddings or images in place of tokens, and generate mistakes drafts for prompt; it also
        # takes the prompt's first hidden states and attentions for those of the drafts.
        states = request.generation_config.output_hidden_states or request.generation_config.output_attentions
        self._first_alone = states or not request.reads_tokens

        self._drafting: DraftModelProposer | None = None  # None without a draft
        self.head_usage: HeadUsage | None = None  # of a head of some rows
        self._reach = reach
        if drafts:
            encoded = self.assistant_kwargs.get("encoder_outputs")
            self._drafting = DraftModelProposer(
                DraftContext(assistant_model, prompt, encoded, model_kwargs.get("attention_mask")),
                mapping,
                lookahead,
                self._verified,
                self.stops,
                self._eos,
                sample=self._sample,
                scores_device=input_ids.device,  # the processors' own tensors are there
                make_head=make_head,
            )
            self.head_usage = self._drafting.head_usage if make_head is not None else None
        self._block = Block()
        self._prefill = True  # the target's: its next forward takes the prompt as well
        self._verification = verification  # None once it is known
        self._draft_seconds = self._lookup_seconds = self._handed_over = self._verification_seconds = 0.0

    def get_candidates(self, input_ids: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Draft for `input_ids` `(1, L)`: `(1, L+n)`, and the scores drafted from, float32 `(1, n, V)`, where generate needs them: when
        sampling, unless all of the block is cached, which has no distribution but the token itself."""
        if self._prefill and self._verification is not None:
            self._verification.begin(self.record)
        start = time.perf_counter()
        self._block = Block()
        room = self.stops.max_length - 1 - input_ids.shape[1]
        processed = self._verified is None or self._verified.allows_drafts
        may_draft = self._may_draft and processed and not (self._prefill and self._first_alone)
        self._fill(input_ids, room if may_draft else 0)
        block = self._block
        candidates, scores = input_ids, None
        if block.n:
            cached = torch.tensor([block.cached], dtype=torch.long, device=input_ids.device) if block.cached else None
            candidates = torch.cat([input_ids, *block.draft_tokens, *(() if cached is None else (cached,))], dim=-1)
            if self._sample and block.draft_tokens:
                scores = self._drafting.dense(block, len(block.draft_tokens))
                if cached is not None:
                    sure = scores.new_full((len(block.cached), scores.shape[-1]), -torch.inf)
                    scores = torch.cat([scores, sure.scatter_(-1, cached.T.to(sure.device), 0.0)])
                scores = scores[None]
            if self._verified is not None and self._verified.in_turn:
                drafted = candidates[0, input_ids.shape[1] :].tolist()
                self._verified.begin_round(drafted, None if scores is None else scores[0])
        self._handed_over = time.perf_counter()
        self._draft_seconds = self._handed_over - start - self._lookup_seconds - self._verification_seconds
        self._verification_seconds = 0.0
        return candidates, scores

    # Feedback is kept in half precision on the CPU, which a user's autocast cannot concatenate.
    @torch.autocast("cpu", enabled=False)
    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int):
        """Record the round: `input_ids` `(1, L+m+1)`, the target's processed scores `(1, n+1, V)`."""
        start = time.perf_counter()
        target_seconds = start - self._handed_over
        block, drafting, m = self._block, self._drafting, int(num_matches)
        said, n = input_ids[:, -(m + 1) :], block.n  # (1, m+1)
        raw = scores[0, : m + 1] if self._verified is None else self._verified.finish_round(m + 1, scores)
        targets = scores[0, : m + 1].softmax(-1) if self._sample else None
        # The one wait for the device in a round: for what was verified, what was drafted, and what the draft thought of it.
        overlap = drafting.acceptance(block, said[0], targets) if block.steps else said.new_empty(0)
        late = block.late_acceptance if block.late_acceptance is not None else said.new_empty(0)
        parts = [said[0], *(token[0] for token in block.draft_tokens), overlap, late]
        known = torch.cat([part.float() for part in parts]).tolist()
        sizes = [m + 1, len(block.draft_tokens), len(overlap), len(late)]
        tokens, own_tokens, overlap, late = (list(part) for part in _split(known, sizes))
        tokens = list(map(int, tokens))
        block.tokens = [*map(int, own_tokens), *block.cached]
        # num_matches undercounts where the block was cut at EOS or the length limit: its last verified token is then the draft's own.
        rejected = m < n and tokens[-1] != block.tokens[m]
        accepted = m if rejected or m == n else m + 1
        tested = accepted + rejected
        own = min(tested, len(block.draft_tokens))  # of the draft's own tokens, those that were tested
        pieces = self._mapping.to_draft_ids(tokens)

        if drafting is not None:
            ids = said
            if not self._mapping.is_identity:
                ids = torch.tensor([[i for piece in pieces for i in piece]], device=said.device)
            late = drafting.accept(block, late, pieces, ids, targets)
        self.record.set_acceptance(late)
        log_q = functools.partial(drafting.log_q, block, own) if own else None
        self.record.add_round(pieces, raw, block, accepted, tested, overlap, log_q)
        if self._text is not None:
            self._text.extend(tokens)

        self.lookahead.observe_round(
            n,
            tested,
            accepted,
            draft_seconds=None if block.caught_up else self._draft_seconds,
            target_seconds=None if self._prefill else target_seconds,
            steps=block.steps,
            cached=len(block.cached),
            confidence=block.confidence[: len(block.draft_tokens)],
            match=block.match,
            agreement=block.agreement,
        )
        self.lookahead.observe_untested(late)
        # Asked for, and not drafted: the likeliest token might have been the target's all the same, and the draft was as sure as it was.
        self.lookahead.observe_untested(overlap[own:], block.confidence[own:])
        if self._prefill and self._see_width is not None:
            self._see_width(scores.shape[-1])
        self._prefill = False
        stats = self.record.stats
        stats.draft_seconds += self._draft_seconds
        stats.target_seconds += target_seconds
        stats.lookup_seconds += self._lookup_seconds
        stats.capture_seconds += time.perf_counter() - start

    def _fill(self, input_ids: Tensor, room: int):
        """Fill the round's block from whichever source is worth more, with at most `room` tokens."""
        continuation = self._look_up(min(room, self.lookahead.max_cached))
        plan = self.lookahead.plan(*((continuation.match, continuation.agreement) if continuation else ()))
        if plan.length and room > 0 and self._verification is not None and not self._can_verify():
            return
        if plan.source == "cache":
            if continuation:
                self._block.append_cached(continuation, plan.length)
        elif plan.length and self._drafting is not None:
            context = self._drafting.context
            length = int(min(plan.length, room, self._reach.window - context.length))
            text = self._text if self.lookahead.wants_cache else None
            try:
                if length > 0:
                    self._block = self._drafting.draft(input_ids, replace(plan, length=length), text)
            except Exception as error:  # plain decoding would have served this call
                self._drafting = None
                self._reach.failed(error, context, length)
        self._cut(input_ids, room)

    def _can_verify(self) -> bool:
        """Whether the target can verify a block: asked before the call's first one."""
        verification, self._verification = self._verification, None
        before = self.record.stats.verification_seconds
        self._may_draft = verification.allows(self.record, self._prefill)
        # It is no part of what drafting takes.
        self._verification_seconds = self.record.stats.verification_seconds - before
        return self._may_draft

    def _cut(self, input_ids: Tensor, room: int):
        """Cut the block's cached tokens where the text must end: at its limit, with an EOS, before a stop string."""
        block = self._block
        kept: list[int] = []
        for token in block.cached[: room - len(block.draft_tokens)]:
            kept.append(token)
            if self.stops.asks:
                cached = torch.tensor([kept], dtype=torch.long, device=input_ids.device)
                if self.stops.end(torch.cat([input_ids, *block.draft_tokens, cached], dim=-1)):
                    kept.pop()
                    break
            if token in self._eos:
                break
        block.cached, block.agreement = kept, block.agreement[: len(kept)]

    def _look_up(self, most: int) -> Continuation | None:
        """What the suffix cache proposes, `None` for nothing."""
        start = time.perf_counter()
        found = None
        if self._text is not None and self.lookahead.wants_cache and most > 0:
            found = self._text.continuation(most)
        self._lookup_seconds = time.perf_counter() - start
        return found


def _split(values: Sequence, sizes: Sequence[int]) -> Iterator[Sequence]:
    """`values` in pieces of these sizes, one after the other."""
    start = 0
    for size in sizes:
        yield values[start : start + size]
        start += size
