"""`Call`: one generate call, and what is its own: the draft that it leases, its text, the record of what the target said, and what the target makes of the
prompt. `Parts`: what an assistant lends it for that."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.drafting.context import encoder_source, without_padding
from hf_osd.drafting.suffix_cache import CallSuffixes, SuffixCache
from hf_osd.feedback.prompt_states import PromptStates
from hf_osd.generation.candidates import OnlineCandidateGenerator
from hf_osd.generation.recorder import CallRecorder
from hf_osd.generation.verification import Verification
from hf_osd.models.properties import encoder_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.config import OnlineConfig
    from hf_osd.drafting.draft_model import HeadUsage
    from hf_osd.drafting.reach import Reach
    from hf_osd.drafting.suffix_cache import SuffixCaches
    from hf_osd.drafting.vocab_mapping import VocabMapping
    from hf_osd.feedback.feedback import Feedback
    from hf_osd.feedback.prompt_states import SeenTexts
    from hf_osd.generation.request import GenerateRequest
    from hf_osd.generation.running import RunningCall
    from hf_osd.models.draft_head import DraftHead
    from hf_osd.models.hot_swap import HotSwapDraft, NullHotSwap
    from hf_osd.policy.lookahead import DraftPolicy


@dataclass(frozen=True, eq=False)
class Parts:
    """What an assistant lends a call, as it is when the call opens.

    Args:
        config (`OnlineConfig`): every choice there is.
        serving (`HotSwapDraft`): whose draft is leased.
        lookahead (`DraftPolicy`): chooses source and γ.
        mapping (`VocabMapping`): between the target's tokens and the draft's.
        seen_texts (`SeenTexts`): by which to tell what of a prompt is new.
        warn (`Callable[[str], None]`): gives a warning, once.
        learns (`bool`): whether anything learns from calls.
        reach (`Reach`, *optional*): what the draft can read, where there is one.
        head (`DraftHead`, *optional*): of a draft that computes some rows of its LM head alone.
        texts (`SuffixCaches`, *optional*): recent texts, where the suffix cache drafts.
        see_width (`Callable[[int], None]`, *optional*): see [`OnlineCandidateGenerator`].
    """

    config: OnlineConfig
    serving: HotSwapDraft | NullHotSwap
    lookahead: DraftPolicy
    mapping: VocabMapping
    seen_texts: SeenTexts
    warn: Callable[[str], None]
    learns: bool = False
    reach: Reach | None = None
    head: DraftHead | None = None
    texts: SuffixCaches | None = None
    see_width: Callable[[int], None] | None = None


class Call:
    """One generate call, from `open` to `finish`. It outlives the call's candidate generator and never holds it, for that the generator is gone is how the
    call's end is noticed.

    Attributes:
        record (`CallRecorder`): what it observed.
        model (`PreTrainedModel`, *optional*): the draft, while it is leased.
        private (`bool`): whether nothing of it is to be kept.
        rehearsable (`bool`): whether it teaches, and the target reads a prompt of tokens that are the draft's too, and nothing else.
        running (`RunningCall`, *optional*), thread (`int`): what runs it, `None` if generate's own loop does not; and where.
    """

    record: CallRecorder

    def __init__(self, parts: Parts, running: RunningCall | None, private: bool):
        self.running, self.private, self.thread = running, private, threading.get_ident()
        self.model: PreTrainedModel | None = None
        self.rehearsable = False
        # Not all parts: the target is among what they hold on to.
        self._serving, self._seen_texts = parts.serving, parts.seen_texts
        self._reach, self._warn = parts.reach, parts.warn
        self._text: CallSuffixes | None = None  # as the suffix cache has it,
        self._cache: SuffixCache | None = None  # and where it goes when the call is over
        self._prompt_states: PromptStates | None = None
        self._head_usage: HeadUsage | None = None  # of a head of some rows

    @classmethod
    def open(
        cls, request: GenerateRequest, parts: Parts, tenant: Hashable = None, private: bool = False
    ) -> tuple[Call, OnlineCandidateGenerator]:
        """Begin a call: it, and its candidate generator.

        Args:
            request (`GenerateRequest`): what generate asks for; checked already (`check_call`).
            parts (`Parts`): what the assistant lends.
            tenant (`Hashable`, *optional*): whose earlier texts it may see.
            private (`bool`): keep nothing of it but its counts.
        """
        call = cls(parts, request.running, private)
        try:
            return call, call._begin(request, parts, tenant)
        except BaseException:
            call._let_go()
            raise

    def _begin(self, request: GenerateRequest, parts: Parts, tenant: Hashable) -> OnlineCandidateGenerator:
        config, mapping, head = parts.config, parts.mapping, parts.head

        # 1. The lease: no weight of the draft changes while it lasts.
        self.model = parts.serving.lease()

        # 2. The text: as the target has it, by which the suffix cache looks it up, and as the draft reads it.
        tokens = without_padding(request.input_ids, request.mask)
        prompt = mapping.to_draft_prompt(tokens)
        if parts.texts is not None:
            cache = parts.texts.for_tenant(tenant)
            self._text = CallSuffixes(tokens.tolist(), cache)
            self._cache = None if self.private else cache

        # 3. What the target makes of the prompt, where that is to teach.
        request, source, teaching_mask = self._for_encoder(request, parts)
        if not teaching_mask and parts.learns:
            parts.warn(
                "This draft attends to an encoder's states or to features, of which feedback keeps none: it is served, and learns nothing from "
                "these calls. A draft with an encoder of its own learns where the source is tokens."
            )
        capture = teaching_mask and parts.learns and not self.private
        self.rehearsable = capture and not request.encodes and mapping.has_one_tokenizer and request.reads_tokens
        if self.rehearsable:
            self._prompt_states = PromptStates.of_call(
                request.target, self.model, config.prompt_positions, request.mask, len(tokens)
            )

        # 4. The record of what it says of the answer.
        self.record = CallRecorder(
            prompt,
            mapping,
            sampled=request.generation_config.do_sample,
            processed=bool(request.logits_processor),
            capture=capture,
            track_likely=head is not None and not self.private,
            top_k=config.top_k,
            dtype=getattr(torch, config.feedback_dtype),
            source=source,
            prompt_states=self._prompt_states,
        )

        # 5. The generator, which generate asks for drafts from now on.
        generator = OnlineCandidateGenerator(
            request,
            self.model,
            prompt=prompt,
            mapping=mapping,
            record=self.record,
            lookahead=parts.lookahead,
            text=self._text,
            make_head=None if head is None else functools.partial(head.view, self.model),
            verification=Verification(request, config.verify_target, parts.warn),
            reach=parts.reach,
            see_width=parts.see_width,
            warn=parts.warn,
        )
        self._head_usage = generator.head_usage
        if generator.stops.unasked:
            parts.warn(
                f"Nothing is drafted in calls with the stopping criteria {', '.join(generator.stops.unasked)}: generate asks them once a block of "
                "tokens, and would overshoot. Drafts go with EOS ids, length and time limits and, when greedy, with stop_strings."
            )
        return generator

    def _for_encoder(self, request: GenerateRequest, parts: Parts) -> tuple[GenerateRequest, Tensor | None, bool]:
        """What an encoder of the draft's reads: the request with it in the draft's tokens; these, `(S,)`, if they are tokens; and whether feedback could
        keep all that the draft reads."""
        if not (request.encodes and parts.lookahead.has_draft):
            return request, None, True
        if (inputs := request.inputs_tensor) is not None and not inputs.is_floating_point():
            request = replace(request, inputs_tensor=parts.mapping.embeddable(inputs))
        source = encoder_source(self.model, request.inputs_tensor, request.model_kwargs.get("attention_mask"))
        return request, source, source is not None or not encoder_parameters(self.model)

    def finish(self, keep_text: bool = True) -> Feedback | None:
        """End the call. Its text goes into the suffix cache, and the lease back, whatever happens.

        Args:
            keep_text (`bool`): whether there is a cache still.

        Returns:
            `Feedback`: what it teaches; `None` if nothing was verified or captured, or if the draft cannot read all of it.
        """
        states = self._prompt_states
        try:
            if self._cache is not None and keep_text:
                self._cache.add(self._text.tokens)
            shared = self._seen_texts.shared(self.record.prompt)
            if self._head_usage is not None:
                self._head_usage.finish(self.record.stats)
            feedback = self.record.to_feedback(shared)
        finally:
            self._let_go()
        if states is not None and states.differs:
            self._warn(
                "This target does more to its logits than its LM head does (it scales or caps them, say): prompts teach nothing, answers do."
            )
        if feedback is None:
            return None
        self._seen_texts.add(feedback.tokens)
        # Beyond its reach the draft has no positions to learn the end of it at.
        return feedback if self._reach is None or self._reach.covers(feedback) else None

    def _let_go(self):
        """Give back what was lent, and let go of what is the call's own but its record."""
        if self._prompt_states is not None:
            self._prompt_states.close()
        if self.model is not None:
            self._serving.release(self.model)
        self.model = self._text = self._cache = self._prompt_states = self._head_usage = None
