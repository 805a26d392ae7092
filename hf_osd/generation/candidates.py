"""`OnlineCandidateGenerator` proposes the tokens of each round of one generate call, and passes the target's verification to a `CallRecorder`. It lives as
long as the call.

A round is Algorithm 1 of arXiv 2211.17192, with γ chosen anew each time, and with p kept:

1. the policy chooses the source, the draft model or the suffix cache, and γ; 0 means a plain step (`get_candidates`, `_fill`);
2. the source proposes d_0..d_{n-1}, n ≤ γ: the draft model samples d_j ~ q_j(x), or takes the argmax in greedy decoding;
3. the block ends where the text must: at a length limit, with an EOS, before a stop string (`_cut`);
4. the target reads prefix and block in one forward, which gives p_0(x)..p_n(x);
5. generate accepts d_0, d_1, … in turn, each with probability min(1, p_j(d_j) / q_j(d_j)) (greedy: if it is the argmax of p_j), up to the first rejection, d_m;
6. generate appends one token more, sampled from norm(max(0, p_m(x) - q_m(x))), or from p_n(x) if all were accepted (greedy: the argmax of p_m);
7. the recorder keeps p_0(x)..p_m(x) and which drafts were accepted: from this the draft learns (`update_candidate_strategy`);
8. the draft's KV cache drops the rejected tokens;
9. the policy observes what was accepted and how long it took.

Symbols of a round: L tokens precede it; n are drafted; p_j is the target's distribution of the token at absolute position L+j, in the code its row j; m+1
positions are verified, where the tokens are accepted drafts and, last, the target's own. V is the size of the target's vocabulary, W of the draft's.
"""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from hf_osd.drafting.context import DraftContext, encoder_source
from hf_osd.drafting.draft_model import Block, DraftModelProposer, HeadUsage
from hf_osd.drafting.feature_context import FeatureContext
from hf_osd.drafting.processors import VerifiedProcessors
from hf_osd.drafting.stopping import DraftStops
from hf_osd.models.feature_draft import FeatureDraft
from hf_osd.models.hot_swap import NullDraft
from hf_osd.policy.lookahead import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

    from hf_osd.drafting.suffix_cache import CallSuffixes, Continuation
    from hf_osd.generation.parts import Parts
    from hf_osd.generation.recorder import CallRecorder
    from hf_osd.generation.request import GenerateRequest
    from hf_osd.generation.verification import Verification


class OnlineCandidateGenerator(AssistedCandidateGenerator):
    """Drafts with direct forwards on a KV cache of its own, instead of one `assistant.generate` per round, or from the suffix cache.

    Args:
        request (`GenerateRequest`): generate's arguments. If its `logits_processor` holds any, they are replaced by a [`VerifiedProcessors`].
        assistant_model (`PreTrainedModel`): the leased draft, or a [`NullDraft`].
        parts (`Parts`): what the assistant lends the call. While its `note_width` is set, nothing is drafted.
        prompt (`Tensor` int64 `(L',)`): the prompt in the draft's tokens.
        record (`CallRecorder`): records the rounds.
        text (`CallSuffixes`, *optional*): the text so far, indexed for the suffix cache.
        verification (`Verification`, *optional*): checks that the target can verify a block; assumed if left out.
    """

    def __init__(
        self,
        request: GenerateRequest,
        assistant_model: PreTrainedModel,
        parts: Parts,
        prompt: Tensor,
        record: CallRecorder,
        text: CallSuffixes | None = None,
        verification: Verification | None = None,
    ):
        input_ids, inputs_tensor = request.input_ids, request.inputs_tensor
        model_kwargs, logits_processor = request.model_kwargs, request.logits_processor
        init_stock = functools.partial(
            super().__init__,
            input_ids=input_ids,
            generation_config=request.generation_config,
            model_kwargs=model_kwargs,
            logits_processor=logits_processor,
        )
        # With the schedule "heuristic" generate writes this back into the draft's generation config, which must not change.
        tokens = assistant_model.generation_config.num_assistant_tokens
        drafts = parts.lookahead.has_draft
        if isinstance(assistant_model, FeatureDraft):
            # States are handed over in each round of a call or in none: in none while neither the draft nor a learner would read them.
            drafts = drafts and (record.captures or parts.lookahead.may_ask_draft)
        source = encoder_source(assistant_model, inputs_tensor, model_kwargs.get("attention_mask")) if drafts else None
        if source is not None and len(source) > parts.reach.source:
            drafts = False
        if drafts:
            try:
                init_stock(assistant_model=assistant_model, inputs_tensor=inputs_tensor)  # runs the draft's encoder
            except Exception as error:
                if not assistant_model.config.is_encoder_decoder:
                    raise
                parts.reach.failed_source(error, None if source is None else len(source))
                drafts = False
        if not drafts:
            assistant_model = NullDraft()
            init_stock(assistant_model=assistant_model)
        self.num_assistant_tokens = tokens
        self.record, self.lookahead, self._mapping, self._text = record, parts.lookahead, parts.mapping, text
        self._sample = request.generation_config.do_sample
        eos = getattr(request.generation_config, "_eos_token_tensor", None)
        self._eos = set() if eos is None else set(eos.flatten().tolist())

        self._verified: VerifiedProcessors | None = None
        if logits_processor:
            self._verified = VerifiedProcessors(list(logits_processor), self._sample, self._eos, parts.warn)
            logits_processor[:] = [self._verified]  # generate made the list for this call
        self.stops = DraftStops(request.stopping_criteria, self._sample, self._eos, self.main_model_max_length)
        self._may_draft = self.stops.allow_drafts and parts.note_width is None
        self._note_width = parts.note_width
        # If the target's first forward reads embeddings or images instead of tokens, generate would take drafts for prompt; it would also return the
        # prompt's first hidden states and attentions as the drafts'.
        states = request.generation_config.output_hidden_states or request.generation_config.output_attentions
        # Before the prompt a recurrent target has no state that it could be taken back to.
        self._rollback = None if request.running is None else request.running.rollback
        self._carried: int | None = None  # tokens that this round's verification reads again
        self._plain_first_round = states or not request.reads_tokens or self._rollback is not None

        self._proposer: DraftModelProposer | None = None
        self.head_usage: HeadUsage | None = None  # with a reduced draft vocabulary
        self._reach = parts.reach
        self._running = request.running
        if self._running is not None:
            self._running.count_completed = self._count_completed
        # bool (L,), until the prompt's states are there, if the draft reads states
        self._not_padding: Tensor | None = None
        self._new_states = 0  # verified columns of the target's last forward whose states are still to be kept
        if drafts:
            encoded = self.assistant_kwargs.get("encoder_outputs")
            if isinstance(assistant_model, FeatureDraft):
                # What the cache holds has no states: the draft reads the text from there on.
                context = FeatureContext(assistant_model, prompt[request.held_tokens :])
                self._ask_for_states(request, assistant_model)
            else:
                context = DraftContext(assistant_model, prompt, encoded, model_kwargs.get("attention_mask"))
            self._proposer = DraftModelProposer(
                context,
                parts.mapping,
                parts.lookahead,
                self._verified,
                self.stops,
                self._eos,
                sample=self._sample,
                scores_device=input_ids.device,  # where the processors' tensors are
                make_head=None if parts.head is None else functools.partial(parts.head.view, assistant_model),
            )
            self.head_usage = self._proposer.head_usage if parts.head is not None else None
        self._block, self._plan, self._continuation = Block(), Plan(), None
        self._first_round = True  # the target's next forward reads the prompt too,
        self._held = request.held  # but for the positions that its cache holds
        self._verification = verification  # None once it has answered
        self._draft_seconds = self._lookup_seconds = self._proposed_at = self._verification_seconds = 0.0

    def _ask_for_states(self, request: GenerateRequest, draft: FeatureDraft):
        """Has generate hand over the states that the draft reads, of each forward of the target; or all of them, if the user asks for these."""
        self.requires_model_outputs = True
        wanted = True if request.generation_config.output_hidden_states else draft.config.recorded_layers
        self.model_kwargs_overrides = {"output_hidden_states": wanted}
        length, mask = request.input_ids.shape[1], request.mask
        self._not_padding = (
            torch.ones(length, dtype=torch.bool, device="cpu")
            if mask is None or not mask.any()  # a prompt of padding alone is read as it is
            else mask[0].bool().cpu()
        )[request.held :]

    def get_candidates(
        self, input_ids: Tensor, model_outputs: ModelOutput | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """Proposes a block after `input_ids` `(1, L)`. For a draft that reads the target's states, generate hands over the outputs of its last forward.

        Returns:
            `tuple[Tensor, Tensor]`: text and block, `(1, L+n)`; and the scores that the block was sampled from, float32 `(1, n, V)`. These are `None` in
            greedy decoding, and if all of the block is from the suffix cache, whose tokens have probability 1.
        """
        if self._first_round and self._verification is not None:
            self._verification.check_first_round(self.record)
        if model_outputs is not None:  # of a target that does not pass them on at the round's end
            self._keep_states(model_outputs)
        start = time.perf_counter()
        self._block = Block()
        room = self.stops.max_length - 1 - input_ids.shape[1]
        processed = self._verified is None or self._verified.allows_drafts
        may_draft = self._may_draft and processed and not (self._first_round and self._plain_first_round)
        self._fill(input_ids, room if may_draft else 0)
        block = self._block
        candidates, scores = input_ids, None
        if block.n:
            cached = torch.tensor([block.cached], dtype=torch.long, device=input_ids.device) if block.cached else None
            candidates = torch.cat([input_ids, *block.draft_tokens, *(() if cached is None else (cached,))], dim=-1)
            if self._sample and block.draft_tokens:
                scores = self._proposer.dense(block, len(block.draft_tokens))
                if cached is not None:
                    sure = scores.new_full((len(block.cached), scores.shape[-1]), -torch.inf)
                    scores = torch.cat([scores, sure.scatter_(-1, cached.T.to(sure.device), 0.0)])
                scores = scores[None]
            if self._verified is not None and self._verified.in_turn:
                drafted = candidates[0, input_ids.shape[1] :].tolist()
                self._verified.begin_round(drafted, None if scores is None else scores[0])
        if self._running is not None:
            self._running.verified = self._held if self._first_round else input_ids.shape[1] - 1
        self._proposed_at = time.perf_counter()
        self._draft_seconds = self._proposed_at - start - self._lookup_seconds - self._verification_seconds
        self._verification_seconds = 0.0
        return candidates, scores

    # Autocast is off, for a user's cannot concatenate the half-precision feedback on the CPU.
    @torch.autocast("cpu", enabled=False)
    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int):
        """Records the verified round.

        Args:
            input_ids (`Tensor` `(1, L+m+1)`): the text with the verified tokens.
            scores (`Tensor` `(1, n+1, V)`): the target's processed scores.
            num_matches (`int`): m, as generate counts it.
        """
        start = time.perf_counter()
        target_seconds = start - self._proposed_at
        block, proposer, m = self._block, self._proposer, int(num_matches)
        verified, n = input_ids[:, -(m + 1) :], block.n  # (1, m+1)
        raw = scores[0, : m + 1] if self._verified is None else self._verified.finish_round(m + 1, scores)
        targets = scores[0, : m + 1].softmax(-1) if self._sample else None
        # All values are read in one transfer, the only wait for the device in a round.
        acceptance = proposer.acceptance(block, verified[0], targets) if block.steps else verified.new_empty(0)
        late = block.late_acceptance if block.late_acceptance is not None else verified.new_empty(0)
        parts = [verified[0], *(token[0] for token in block.draft_tokens), acceptance, late]
        values = torch.cat([part.float() for part in parts]).cpu()
        sizes = [m + 1, len(block.draft_tokens), len(acceptance), len(late)]
        tokens, draft_tokens, acceptance, late = (part.tolist() for part in values.split(sizes))
        tokens = list(map(int, tokens))
        block.tokens = [*map(int, draft_tokens), *block.cached]
        # num_matches is one short if the block ends at EOS or the length limit: its last verified token is then an accepted draft.
        rejected = m < n and tokens[-1] != block.tokens[m]
        accepted = m if rejected or m == n else m + 1
        tested = accepted + rejected
        from_draft = min(tested, len(block.draft_tokens))  # how many of the tested tokens the draft model proposed
        pieces = self._mapping.to_draft_ids(tokens)

        if proposer is not None:
            ids = verified
            if not self._mapping.is_identity:
                ids = torch.tensor([[i for piece in pieces for i in piece]], device=verified.device)
            late = proposer.accept(block, late, pieces, ids, targets)
        self.record.set_acceptance(late)
        log_q = functools.partial(proposer.log_q, block, from_draft) if from_draft else None
        self.record.add_round(pieces, raw, block, accepted, tested, acceptance, log_q)
        if self._text is not None:
            self._text.extend(tokens)

        proposed = self._continuation
        self.lookahead.observe_earnings(
            self._plan,
            tokens,
            proposed.tokens if proposed else [],
            proposed.match if proposed else 0,
            proposed.agreement if proposed else [],
            drafted=n,
            recorded=0 if block.draft_tokens else tested,
            steps=block.steps,
            draft_seconds=self._draft_seconds,
        )
        self.lookahead.observe_round(
            n,
            tested,
            accepted,
            draft_seconds=self._draft_seconds,
            target_seconds=None if self._first_round else target_seconds,
            steps=block.steps,
            unread=block.unread,
            read_seconds=block.read_seconds,
            cached=len(block.cached),
            confidence=block.confidence[: len(block.draft_tokens)],
            match=block.match,
            agreement=block.agreement,
            carried=self._carried or 0,
        )
        self.lookahead.observe_untested(late)
        # The draft made a step here, but its token was left out of the block: still evidence of acceptance at this confidence.
        self.lookahead.observe_untested(acceptance[from_draft:], block.confidence[from_draft:])
        if self._first_round and self._note_width is not None:
            self._note_width(scores.shape[-1])
        self._first_round = False
        stats = self.record.stats
        stats.refed_tokens += self._carried or 0
        stats.draft_seconds += self._draft_seconds
        stats.target_seconds += target_seconds
        stats.lookup_seconds += self._lookup_seconds
        stats.capture_seconds += time.perf_counter() - start
        if self.requires_model_outputs:
            self._new_states = m + 1 if self._not_padding is None else input_ids.shape[1] - 1 - self._held
            if self._running is not None:
                self._running.wait_for_outputs(self._keep_states)

    def _count_completed(self, tokens: int):
        """Counts verified tokens that the target has read again after the call's last round, in one forward more, for a cache that is kept."""
        self.record.stats.refed_tokens += tokens
        self.record.stats.completing_forwards += 1

    @torch.autocast("cpu", enabled=False)
    def _keep_states(self, outputs: ModelOutput):
        """Hands the states of the target's last forward, as far as its tokens are verified, to the draft and to the recorder; once."""
        count, self._new_states = self._new_states, 0
        if not count or self._proposer is None:
            return
        start, context = time.perf_counter(), self._proposer.context
        first, self._not_padding = self._not_padding, None
        try:
            if not outputs.get("hidden_states"):
                raise ValueError(
                    f"the target gives no hidden states, though asked for those of layers {context.model.config.aux_layers}"
                )
            states = context.add_states(outputs.hidden_states, count, first)
            self.record.add_states(states, len(context.model.config.recorded_layers))
        except Exception as error:  # no states, or no memory: the target can go on without the draft
            self._proposer = None
            self._reach.failed(error, context, 0)
        self.record.stats.capture_seconds += time.perf_counter() - start

    def _fill(self, input_ids: Tensor, room: int):
        """Fills the round's block with at most `room` tokens, from the source that the policy chooses."""
        continuation = self._look_up(min(room, self.lookahead.max_cached))
        reach = self._draft_reach(room)
        proposal = (continuation.match, continuation.agreement) if continuation else ()
        unread = self._proposer.context.unread if reach else 1
        self._carried = None if self._rollback is None else self._rollback.carried
        plan = self.lookahead.plan(*proposal, can_draft=reach > 0, unread=unread, carried=self._carried)
        self._plan, self._continuation = plan, continuation
        if plan.length and room > 0 and self._verification is not None and not self._can_verify():
            return
        if plan.source == "cache":
            if continuation:
                self._block.append_cached(continuation, plan.length)
        elif plan.length and reach:
            context, length = self._proposer.context, min(plan.length, reach)
            text = self._text if self.lookahead.wants_cache else None
            try:
                self._block = self._proposer.draft(input_ids, replace(plan, length=length), text)
            except Exception as error:  # the target can go on without the draft
                self._proposer = None
                self._reach.failed(error, context, length)
            if not self._block.n and plan.cached:  # the draft is less sure than the cache
                self._block.append_cached(continuation, plan.cached)
        self._cut(input_ids, room)

    def _draft_reach(self, room: int) -> int:
        """Counts the tokens that the draft model can draft in this round, at most `room`: none if it has failed, or lacks states of the target."""
        if self._proposer is None or not self._proposer.context.is_ready:
            return 0
        return int(max(min(room, self._reach.window - self._proposer.context.length), 0))

    def _can_verify(self) -> bool:
        """Decides, before the call's first block, if the target can verify one."""
        verification, self._verification = self._verification, None
        before = self.record.stats.verification_seconds
        self._may_draft = verification.allows(self.record, self._first_round)
        # This does not count as drafting time.
        self._verification_seconds = self.record.stats.verification_seconds - before
        return self._may_draft

    def _cut(self, input_ids: Tensor, room: int):
        """Cuts the block's cached tokens where the text must end: at its limit, with an EOS, before a stop string."""
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

    def _look_up(self, max_tokens: int) -> Continuation | None:
        """Looks up a proposal of the suffix cache, `None` if there is none."""
        start = time.perf_counter()
        found = None
        if self._text is not None and self.lookahead.wants_cache and max_tokens > 0:
            found = self._text.continuation(max_tokens)
        self._lookup_seconds = time.perf_counter() - start
        return found
