"""`OnlineAssistant`: what a user passes as `assistant_model`. It holds the draft in service, its learner and its statistics, and joins
serving to learning; it drafts no tokens and computes no losses itself."""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_osd.config import OnlineConfig
from hf_osd.distill.scoring import Judged, judge, learners_autocast
from hf_osd.distill.windows import Windows
from hf_osd.drafting.context import encoder_source, without_padding
from hf_osd.drafting.draft_trial import try_draft
from hf_osd.drafting.reach import Reach
from hf_osd.drafting.suffix_cache import CallText, SuffixCaches
from hf_osd.drafting.vocab_mapping import Translation, check_vocabularies
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.feedback import Feedback
from hf_osd.feedback.prompt_states import KnownTexts, Prefill
from hf_osd.generation import patch as integration
from hf_osd.generation.candidates import OnlineCandidateGenerator
from hf_osd.generation.checks import check_call, check_draft
from hf_osd.generation.logit_widths import LogitWidths
from hf_osd.generation.open_calls import OpenCalls
from hf_osd.generation.recorder import CallRecord
from hf_osd.generation.verification import Verification
from hf_osd.generation.view import View
from hf_osd.learning.trouble import WAITS
from hf_osd.metrics.stats import Stats
from hf_osd.models.copies import embedding_names
from hf_osd.models.draft_head import DraftHead
from hf_osd.models.hot_swap import NoServing
from hf_osd.models.lora import Adapter
from hf_osd.models.own_draft import own_draft, unwrapped
from hf_osd.models.properties import encoder_parameters
from hf_osd.policy.lookahead import Lookahead
from hf_osd.policy.report import report
from hf_osd.remote.teachable import TeachableAssistant
from hf_osd.saving.pretrained import SavableAssistant
from hf_osd.system.forks import on_fork, released

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        LogitsProcessorList,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

    from hf_osd.generation.running import RunningCall

logger = logging.getLogger(__name__)

# Tokens of the suffix cache a round, at most.
_MOST_CACHED = 16


class OnlineAssistant(TeachableAssistant, SavableAssistant):
    """A draft model, and a cache of recent text, that learn from the requests they assist.

    ```python
    assistant = OnlineAssistant(draft)
    target.generate(**inputs, assistant_model=assistant)
    ```

    Each call drafts with weights that do not change while it lasts. What the target said of the drafts is kept, and learnt from at the
    start of a later call, in `update()` or in `flush()`. The output is the target's own, whatever the draft has learnt.

    Args:
        draft (`PreTrainedModel`, *optional*): a causal LM, or an encoder-decoder if the target is one. It is copied and never written;
            weights without `requires_grad` are shared with it. Where its vocabulary is not the target's, pass `tokenizer` and
            `assistant_tokenizer` to `generate`, as transformers asks for. Without a draft the suffix cache drafts alone.
        config ([`OnlineConfig`], *optional*): every choice there is; the defaults learn from all verified positions, with replay.
        **overrides: fields of the config, for short: `OnlineAssistant(draft, learn=False)`.

    Raises:
        ValueError: if `draft` is not a decoder with an LM head that can read tokens alone, or is patched, or lacks values; or a field of the config is wrong, or
            there is neither draft nor cache.
        RuntimeError: if the installed transformers has changed what the seam relies on.
    """

    def __init__(self, draft: PreTrainedModel | None = None, config: OnlineConfig | None = None, **overrides):
        if overrides:
            config = OnlineConfig.from_dict({**(config or OnlineConfig()).to_dict(), **overrides})
        self.osd_config = config = config or OnlineConfig()
        if draft is not None:
            draft = unwrapped(draft) if isinstance(draft, torch.nn.Module) else draft
            check_draft(draft)
        elif not config.suffix_cache:
            raise ValueError(
                "There is no draft and `suffix_cache` is False, so nothing could draft. Pass a draft, such as "
                "hf_osd.grow_draft(target), or leave suffix_cache on."
            )
        integration.enable()

        self.buffer = FeedbackBuffer(config.buffer_bytes, config.buffer_age)
        self.serving, self.learner, self.head = NoServing(), None, None
        self.reach: Reach | None = None  # of the draft
        self._widths = LogitWidths()
        self.adapter: Adapter | None = None  # that hf_osd has put on the draft
        self.learning_choice = "Nothing learns: there is no draft."  # what learns, and why
        self._calls = OpenCalls()
        if draft is not None:
            # Made before any trainer exists, and in storage of its own, so that a user's training of `draft` reaches the serving draft by
            # refreshes alone. Whatever serves and learns begins with this storage, and leaves it where it writes.
            own = own_draft(draft)
            reads = try_draft(own, draft)
            self.reach = Reach(own, reads)
            self._widths = LogitWidths(own.config.get_text_config(decoder=True), reads.width)
            fixed = embedding_names(own) if config.freeze_embeddings else set()
            trainable = {name for name, p in own.named_parameters() if p.requires_grad and name not in fixed}
            if config.learns and not trainable and config.adapter != "lora":
                raise ValueError(
                    f"No parameter of the draft ({type(draft).__name__}) requires gradients, so there is nothing to learn with. Call "
                    "draft.requires_grad_(True), or pass learn=False; or adapter='lora', which learns in weights of its own; or freeze_embeddings=False, if what "
                    "does lies on embeddings or LM head."
                )
            self._serve(own, trainable)
            self.head = DraftHead.of(own, config)
        self.texts = SuffixCaches(config.suffix_cache_bytes) if config.suffix_cache else None
        self.lookahead = Lookahead(
            config.lookahead,
            config.num_assistant_tokens,
            config.draft_cost,
            config.verify_cost,
            most_cached=_MOST_CACHED if config.suffix_cache else 0,
            has_draft=draft is not None,
        )

        self._stats = Stats()
        self._lock = released(threading.RLock())
        self._said: set[str] = set()  # warnings given
        # Of what calls taught: where the target read a prompt of tokens that are the draft's too, and nothing else.
        self.of_tokens: weakref.WeakSet[Feedback] = weakref.WeakSet()
        self.known_texts = KnownTexts()
        self._translation = functools.lru_cache(maxsize=4)(self._translate)
        on_fork(self)

    # What transformers reads on an assistant model.

    @property
    def config(self):
        """The draft's own config, which is what transformers reads on an assistant. Ours is `osd_config`."""
        return self.serving.active.config

    @property
    def generation_config(self):
        return self.serving.active.generation_config

    @property
    def device(self) -> torch.device:
        return self.serving.active.device

    @property
    def dtype(self) -> torch.dtype:
        return self.serving.active.dtype

    def _supports_logits_to_keep(self) -> bool:
        return self.serving.active._supports_logits_to_keep()

    def generate(self, *args, **kwargs):
        """The serving draft's own `generate`. Stock candidate generators call it, once the seam is closed: capture is then off."""
        config = kwargs.get("generation_config")
        if config is not None and config.is_assistant:
            self._warn_once(
                "This OnlineAssistant drafts through a stock candidate generator: nothing is captured and nothing learnt. "
                "Call hf_osd.enable(), or pass a plain model as assistant_model."
            )
        self._needs_draft("generate")
        return self.serving.active.generate(*args, **kwargs)

    # Serving.

    def tenant(self, name: Hashable) -> View:
        """This assistant as one tenant sees it: `generate(..., assistant_model=assistant.tenant("acme"))`. Draft, learner and statistics are
        shared; text in the suffix cache never comes to another tenant's calls, nor to those of none."""
        return View(self, name)

    def private(self) -> View:
        """This assistant for calls of which nothing is to be kept: `generate(..., assistant_model=assistant.private())`. They are drafted for as others are,
        and counted; nothing is learnt from them, and none of their text goes into a cache. `assistant.tenant(name).private()` is both."""
        return View(self, private=True)

    def open_call(
        self,
        target: PreTrainedModel,
        *,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        inputs_tensor: Tensor | None,
        logits_processor: LogitsProcessorList,
        tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
        running: RunningCall | None = None,
        tenant: Hashable = None,
        private: bool = False,
    ) -> OnlineCandidateGenerator:
        """The candidate generator of one generate call. Called by the seam; learns first if an update is due.

        Raises:
            ValueError: for what assisted generation, or hf_osd, cannot serve; nothing has run by then.
        """
        check_call(
            target,
            self.serving.active,
            input_ids=input_ids,
            inputs_tensor=inputs_tensor,
            generation_config=generation_config,
            model_kwargs=model_kwargs,
            logits_processor=logits_processor,
        )
        width = self._widths.of(target)
        translation = self._translation(width or self._widths.least(target), tokenizers)
        check_vocabularies(target, translation)
        began = time.perf_counter()
        self.update()
        self._stats.longest_wait = max(self._stats.longest_wait, time.perf_counter() - began)
        config = self.osd_config
        encodes = target.config.is_encoder_decoder
        mask = model_kwargs.get("decoder_attention_mask" if encodes else "attention_mask")
        said = without_padding(input_ids, mask)
        prompt = translation.prompt(said)
        source, teaches = None, True
        if encodes and self.lookahead.has_draft:
            if inputs_tensor is not None and not inputs_tensor.is_floating_point():
                inputs_tensor = translation.shown(inputs_tensor)
            source = encoder_source(self.serving.active, inputs_tensor, model_kwargs.get("attention_mask"))
            teaches = source is not None or not encoder_parameters(self.serving.active)
        if not teaches and self.learner is not None:
            self._warn_once(
                "This draft attends to an encoder's states or to features, of which feedback keeps none: it is served, and learns nothing from "
                "these calls. A draft with an encoder of its own learns where the source is tokens."
            )
        capture = teaches and self.learner is not None and not private
        record = CallRecord(
            prompt,
            translation,
            sampled=generation_config.do_sample,
            processed=bool(logits_processor),
            capture=capture,
            note_likely=self.head is not None and not private,
            top_k=config.top_k,
            dtype=getattr(torch, config.feedback_dtype),
            source=source,
        )
        record.running, record.private = running, private
        if self.texts is not None:
            cache = self.texts.of(tenant)
            record.text = CallText(said.tolist(), cache)
            record.cache = None if private else cache
        record.model = self.serving.lease()
        call = target, input_ids, generation_config, model_kwargs, running
        try:
            generator = OnlineCandidateGenerator(
                input_ids=input_ids,
                assistant_model=record.model,
                generation_config=generation_config,
                model_kwargs=model_kwargs,
                inputs_tensor=inputs_tensor,
                logits_processor=logits_processor,
                prompt=prompt,
                translation=translation,
                record=record,
                lookahead=self.lookahead,
                stopping_criteria=None if running is None else running.stopping_criteria,
                text=record.text,
                make_head=None if self.head is None else functools.partial(self.head.view, record.model),
                verification=Verification(*call, config.verify_target, self.decodes_plainly),
                reach=self.reach,
                see_width=None if width else functools.partial(self._widths.note, target),
                warn=self._warn_once,
            )
        except BaseException:
            self.serving.release(record.model)
            raise
        if generator.stops.unasked:
            self._warn_once(
                f"Nothing is drafted in calls with the stopping criteria {', '.join(generator.stops.unasked)}: generate asks them once a block of "
                "tokens, and would overshoot. Drafts go with EOS ids, length and time limits and, when greedy, with stop_strings."
            )
        record.of_tokens = capture and not encodes and translation.has_one_tokenizer and generator.reads_tokens
        if record.of_tokens:
            record.prefill = Prefill.of_call(target, record.model, config.prompt_positions, mask, len(said))
        self._calls.add(record, generator)
        return generator

    def _translate(self, target_size: int, tokenizers: tuple | None) -> Translation:
        if not self.lookahead.has_draft:  # what was said before is in the target's own tokens
            return Translation.of_sizes(target_size, target_size)
        sizes = {"target_size": target_size, "draft_size": self.reach.width, "rows": self.reach.rows}
        if tokenizers is None:  # transformers lets that through for equal sizes alone
            return Translation.of_sizes(**sizes)
        return Translation.of_tokenizers(*tokenizers, **sizes)

    def decodes_plainly(self, target: PreTrainedModel, why: str):
        """Say once of calls that they are not drafted for."""
        self._warn_once(
            f"{type(target).__name__} decodes plainly, and nothing is drafted for it: it cannot verify a block of drafts, for {why}."
        )

    def _warn_once(self, message: str):
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)

    def update(self, force: bool = False) -> bool:
        """Take in the calls that have ended, and learn if an update is due, or if anything is new and `force` is set.

        Returns:
            `bool`: whether the serving draft was refreshed.
        """
        self.take_in()
        if self.learner is None:
            return False
        refreshed = (force or self.learner.due()) and self.learner.update(wait=force)
        if (trouble := self.learner.trouble()) is not None:
            self._warn_once(trouble)
        return refreshed

    def update_together(self, force: bool = False) -> bool:
        """`update`, with all ranks of the job: if an update is due on any of them, or anything is new anywhere and `force` is set. Every rank calls this at the
        same points: after each request, say, and as often when its own requests have come to an end. In a job of one process it is `update(force)`.

        Between these points nothing is learnt: calls of `generate` start no update in a job of several processes.

        Returns:
            `bool`: whether the serving draft was refreshed, which is the same everywhere. `False` for good once a rank has gone: the draft goes on
            serving as it is.

        Raises:
            ValueError: if the ranks did not begin with the same draft.
        """
        if getattr(self.learner, "ranks", None) is None or self.learner.ranks.size == 1:
            return self.update(force)
        self.take_in()
        return self.learner.update_together(force)

    def flush(self) -> bool:
        """Learn from everything that is new, now, whether an update is due or not. `True` if the serving draft was refreshed."""
        refreshed, stats = self.update(force=True), self.stats
        if self.osd_config.gate and stats.updates and not stats.accepted_updates:
            self._warn_once(WAITS)
        return refreshed

    def close(self):
        """Stop learning and let go of learner, feedback and cached text. The draft goes on drafting, frozen; closing again does nothing."""
        self.take_in()
        if self.learner is not None:
            self.learner.close()
        self.learner, self.texts, self.closed = None, None, True
        self.lookahead.most_cached = 0
        self.buffer.clear()
        self.known_texts.replace([])

    def __enter__(self) -> OnlineAssistant:
        return self

    def __exit__(self, *exception):
        self.close()

    @property
    def stats(self) -> Stats:
        """What was observed so far, see [`Stats`]. Calls that have ended are taken in first."""
        self._take_in(self._calls.take_over())
        stats = self._stats
        if self.learner is not None:
            for name, value in self.learner.figures().items():
                setattr(stats, name, value)
        stats.buffer_requests, stats.buffer_bytes = len(self.buffer), self.buffer.nbytes
        stats.buffer_capacity, stats.draft_version = self.buffer.max_bytes, self.serving.version
        stats.suffix_cache_bytes = self.texts.nbytes if self.texts is not None else 0
        return stats

    def report(self) -> str:
        """Whether drafting pays, by how much, and what to do about it: c, v, α, the best γ, the α from which it pays, and the speed-up that is
        expected and the one observed."""
        return report(self.stats, self.lookahead, self.learning_choice)

    def score(self, feedback: list[Feedback]) -> list[Tensor]:
        """Expected acceptance of the draft at each position of `feedback`, `(N,)` a request, teacher-forced; α is the mean.

        See [`hf_osd.distill.scoring.score`]; `record_answers` makes the feedback of prompts that are to be held back.
        """
        self._needs_draft("score")
        return [judged.overlap for judged in self._judge(feedback)]

    # How calls end.

    def take_in(self):
        """Take in the calls that have ended, and those of this thread, without learning."""
        self._take_in(self._calls.take_over(here=True))

    @torch.autocast("cpu", enabled=False)
    def _take_in(self, over: list[CallRecord]):
        """Release the leases of calls that are over, and take in their statistics and feedback."""
        for record in over:
            if record.cache is not None and self.texts is not None:
                record.cache.add(record.text.tokens)
            record.text = record.cache = None
            try:
                prefill, feedback = record.prefill, record.seal(self.known_texts.shared(record.prompt))
            finally:
                self.serving.release(record.model)
                record.model = None
            if prefill is not None and prefill.differs:
                self._warn_once(
                    "This target does more to its logits than its LM head does (it scales or caps them, say): prompts teach nothing, answers do."
                )
            if feedback is not None:
                self.known_texts.add(feedback.tokens)
            if feedback is not None and self.reach is not None and not self.reach.covers(feedback):
                feedback = None  # the draft has no positions to learn the end of it at
            if feedback is not None and self.learner is not None:
                feedback = self._in_shadow(feedback, record)
            if self.head is not None and not record.private:
                self.head.observe(record.prompt, record.answer, record.likely())
            with self._lock:
                self._stats.observe_call(record.stats)
            if self.learner is not None:
                self.learner.note_served(record.stats.seconds)
            if feedback is not None and self.learner is not None:
                if record.of_tokens:
                    self.of_tokens.add(feedback)
                self.learner.offer(feedback)

    def _in_shadow(self, feedback: Feedback, record: CallRecord) -> Feedback:
        """Where the call drafted nothing for long, ask the draft afterwards what it would have said, before it learns it."""
        unknown = feedback.overlap.isnan() & feedback.teaches("all")
        if int(unknown.sum()) < 2:  # the last token of a call is never put to the draft
            return feedback
        try:
            windows = Windows([feedback], self.osd_config.learning_window)
            [(overlap, confidence, _)] = windows.spread(self._judge(windows.requests))
        except Exception:  # out of memory, say: a figure less, and no reason to break the user's call
            logger.exception("What the draft would have said in a call that it did not draft in could not be judged.")
            return feedback
        if self.head is not None:  # judged was a whole head: the draft as it serves could not have said all that
            overlap *= self.head.could_say(record.prompt, record.answer)
        unknown &= ~overlap.isnan()
        self.lookahead.observe_shadow(overlap[unknown].tolist(), confidence[unknown].tolist())
        # Of sparse rows, at temperature 1, without processors: enough to decide whether to draft again, but then not α.
        if feedback.sampled or record.processed:
            return feedback
        feedback = feedback.with_overlap(overlap)
        known = feedback.overlap[~feedback.overlap.isnan()]
        record.stats.overlap_sum, record.stats.overlap_count = float(known.sum()), len(known)
        return feedback

    def _judge(self, feedback: list[Feedback]) -> list[Judged]:
        """What the draft that serves says, see [`hf_osd.distill.scoring.judge`]."""
        model = self.serving.lease()
        try:
            with learners_autocast(model.device.type, None):
                return judge(model, feedback)
        finally:
            self.serving.release(model)

    def _needs_draft(self, what: str):
        if not self.lookahead.has_draft:
            raise ValueError(
                f"This assistant has no draft, so there is nothing to {what}. Make it with one: OnlineAssistant(draft), where "
                "hf_osd.grow_draft(target) makes a draft."
            )
