"""`Call` is one generate call with all that belongs to it: the leased draft, its text, the recorder of verified rounds and the target's hidden states at the
prompt."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import replace
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

    from hf_osd.drafting.draft_model import HeadUsage
    from hf_osd.feedback.feedback import Feedback
    from hf_osd.generation.parts import Parts
    from hf_osd.generation.request import GenerateRequest
    from hf_osd.generation.running import RunningCall


class Call:
    """Holds one generate call, from `open` to `finish`. It outlives the call's candidate generator and never refers to it: the call is over once the generator is
    garbage-collected.

    Attributes:
        record (`CallRecorder`): what the call observed.
        model (`PreTrainedModel`, *optional*): the draft, while it is leased.
        private (`bool`): `True` if nothing of the call may be kept.
        rehearsable (`bool`): `True` if the call teaches and its prompt is plain token ids of a shared vocabulary: only such feedback can be rehearsed.
        running (`RunningCall`, *optional*): the run of generate's own loop; `None` if another loop runs the call.
        thread (`int`): identifier of the thread that runs it.
        label (`object`): whatever the assistant wants to know again when the call has ended.
    """

    record: CallRecorder

    def __init__(self, parts: Parts, running: RunningCall | None, private: bool):
        self.running, self.private, self.thread = running, private, threading.get_ident()
        self.model: PreTrainedModel | None = None
        self.label: object = None
        self.rehearsable = False
        # Parts are kept one by one, for some refer to the target, which a call must not keep alive.
        self._serving, self._seen_texts = parts.serving, parts.seen_texts
        self._reach, self._warn = parts.reach, parts.warn
        self._text: CallSuffixes | None = None  # indexed for the suffix cache
        self._cache: SuffixCache | None = None  # takes the text when the call is over
        self._prompt_states: PromptStates | None = None
        self._head_usage: HeadUsage | None = None  # with a reduced draft vocabulary

    @classmethod
    def open(
        cls, request: GenerateRequest, parts: Parts, tenant: Hashable = None, private: bool = False
    ) -> tuple[Call, OnlineCandidateGenerator]:
        """Opens a call; returns it and its candidate generator.

        Args:
            request (`GenerateRequest`): generate's arguments, which `check_call` has passed.
            parts (`Parts`): what the assistant lends.
            tenant (`Hashable`, *optional*): the tenant whose earlier texts the call may see.
            private (`bool`): keep nothing of the call but its counts.
        """
        call = cls(parts, request.running, private)
        try:
            return call, call._begin(request, parts, tenant)
        except BaseException:
            call._release()
            raise

    def _begin(self, request: GenerateRequest, parts: Parts, tenant: Hashable) -> OnlineCandidateGenerator:
        config, mapping = parts.config, parts.mapping

        # 1. Lease the draft: its weights do not change while the lease lasts.
        self.model = parts.serving.lease()

        # 2. Prepare the text, in the target's tokens for the suffix cache and in the draft's for the draft.
        tokens = without_padding(request.input_ids, request.mask)
        prompt = mapping.to_draft_prompt(tokens)
        if parts.texts is not None:
            cache = parts.texts.for_tenant(tenant)
            self._text = CallSuffixes(tokens.tolist(), cache)
            self._cache = None if self.private else cache

        # 3. Keep the target's hidden states at the prompt, if the prompt teaches.
        request, source, teaching_mask = self._for_encoder(request, parts)
        if not teaching_mask and parts.learns:
            parts.warn(
                "This draft attends to an encoder's states or to features, of which feedback keeps none: it is served, and learns nothing from "
                "these calls. A draft with an encoder of its own learns where the source is tokens."
            )
        capture = teaching_mask and parts.learns and not self.private
        self.rehearsable = capture and not request.encodes and mapping.has_one_tokenizer and request.reads_tokens
        if self.rehearsable:
            self._prompt_states = PromptStates.for_call(
                request.target, self.model, config.prompt_positions, request.mask, len(tokens)
            )

        # 4. Record the verified rounds of the answer.
        self.record = CallRecorder(
            prompt,
            mapping,
            sampled=request.generation_config.do_sample,
            processed=bool(request.logits_processor),
            capture=capture,
            track_likely=parts.head is not None and not self.private,
            top_k=config.top_k,
            dtype=getattr(torch, config.feedback_dtype),
            source=source,
            prompt_states=self._prompt_states,
            prompt_positions=config.prompt_positions,
            held=request.held_tokens,
        )

        # 5. Make the generator, which generate asks for drafts from now on.
        generator = OnlineCandidateGenerator(
            request,
            self.model,
            parts,
            prompt,
            self.record,
            self._text,
            Verification(request, config.verify_target, parts.warn),
        )
        self._head_usage = generator.head_usage
        if generator.stops.unasked:
            parts.warn(
                f"Nothing is drafted in calls with the stopping criteria {', '.join(generator.stops.unasked)}: generate asks them once a block of "
                "tokens, and would overshoot. Drafts go with EOS ids, length and time limits and, when greedy, with stop_strings."
            )
        return generator

    def _for_encoder(self, request: GenerateRequest, parts: Parts) -> tuple[GenerateRequest, Tensor | None, bool]:
        """Maps the input of the draft's encoder to the draft's tokens. Returns the request with it; these tokens, `(S,)`, or `None` for none and for
        features; and `True` if feedback can hold all that the draft reads."""
        if not (request.encodes and parts.lookahead.has_draft):
            return request, None, True
        if (inputs := request.inputs_tensor) is not None and not inputs.is_floating_point():
            request = replace(request, inputs_tensor=parts.mapping.embeddable(inputs))
        source = encoder_source(self.model, request.inputs_tensor, request.model_kwargs.get("attention_mask"))
        return request, source, source is not None or not encoder_parameters(self.model)

    def finish(self, keep_text: bool = True) -> Feedback | None:
        """Ends the call: adds its text to the suffix cache and gives back the lease, also if an error is raised.

        Args:
            keep_text (`bool`): `False` once the assistant has no suffix cache.

        Returns:
            `Feedback`: what the call teaches; `None` if nothing was verified or captured, or if the draft cannot read all of it.
        """
        states = self._prompt_states
        try:
            if self._cache is not None and keep_text:
                self._cache.add(self._text.tokens)
            shared = self._seen_texts.shared_prefix(self.record.prompt)
            if self._head_usage is not None:
                self._head_usage.finish(self.record.stats)
            feedback = self.record.to_feedback(shared)
        finally:
            self._release()
        if states is not None and states.head_mismatch:
            self._warn(
                "This target changes its logits after its LM head (it scales or caps them, say): prompts teach nothing, answers do."
            )
        if feedback is None:
            return None
        self._seen_texts.add(feedback.tokens)
        # Beyond its reach the draft has no positions for the end of the text.
        return feedback if self._reach is None or self._reach.covers(feedback) else None

    def _release(self):
        """Gives back the lease and drops all of the call but its record."""
        if self._prompt_states is not None:
            self._prompt_states.close()
        if self.model is not None:
            self._serving.release(self.model)
        self.model = self._text = self._cache = self._prompt_states = self._head_usage = None
