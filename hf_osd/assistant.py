"""`OnlineAssistant`: what a user passes as `assistant_model`. It holds the draft in service, its learner and its statistics, and joins
serving to learning; it drafts no tokens and computes no losses itself."""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.config import OnlineConfig
from hf_osd.distill.scoring import judge_served
from hf_osd.drafting.draft_trial import try_draft
from hf_osd.drafting.reach import Reach
from hf_osd.drafting.suffix_cache import SuffixCaches
from hf_osd.drafting.vocab_mapping import VocabMapping, check_vocabularies
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.feedback import Feedback
from hf_osd.feedback.prompt_states import SeenTexts
from hf_osd.generation.call import Call, Parts
from hf_osd.generation.checks import check_call, check_draft
from hf_osd.generation.logit_widths import LogitWidths
from hf_osd.generation.open_calls import OpenCalls
from hf_osd.generation.patch import enable
from hf_osd.generation.verification import plain_warning
from hf_osd.generation.view import AssistantView
from hf_osd.learning.trouble import WAITS
from hf_osd.learning.undrafted import score_undrafted
from hf_osd.metrics.stats import Stats
from hf_osd.models.copies import embedding_names
from hf_osd.models.draft_head import DraftHead
from hf_osd.models.hot_swap import NullHotSwap
from hf_osd.models.lora import Adapter
from hf_osd.models.own_draft import own_draft, unwrapped
from hf_osd.policy.lookahead import DraftPolicy
from hf_osd.policy.report import report
from hf_osd.remote.teachable import TeachableAssistant
from hf_osd.saving.pretrained import SavableAssistant
from hf_osd.system.forks import on_fork, released
from hf_osd.system.warn_once import WarnOnce

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.generation.candidates import OnlineCandidateGenerator
    from hf_osd.generation.request import GenerateRequest

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
        enable()

        self.buffer = FeedbackBuffer(config.buffer_bytes, config.buffer_age)
        self.serving, self.learner, self.head = NullHotSwap(), None, None
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
        self.lookahead = DraftPolicy(
            config.lookahead,
            config.num_assistant_tokens,
            config.draft_cost,
            config.verify_cost,
            most_cached=_MOST_CACHED if config.suffix_cache else 0,
            has_draft=draft is not None,
        )

        self._stats = Stats()
        self._lock = released(threading.RLock())
        self._warn_once = WarnOnce(logger)
        # Feedback whose prompt is plain token ids of a shared vocabulary: it alone can be rehearsed.
        self.rehearsable: weakref.WeakSet[Feedback] = weakref.WeakSet()
        self.seen_texts = SeenTexts()
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

    def tenant(self, name: Hashable) -> AssistantView:
        """This assistant as one tenant sees it: `generate(..., assistant_model=assistant.tenant("acme"))`. Draft, learner and statistics are
        shared; text in the suffix cache never comes to another tenant's calls, nor to those of none."""
        return AssistantView(self, name)

    def private(self) -> AssistantView:
        """This assistant for calls of which nothing is to be kept: `generate(..., assistant_model=assistant.private())`. They are drafted for as others are,
        and counted; nothing is learnt from them, and none of their text goes into a cache. `assistant.tenant(name).private()` is both."""
        return AssistantView(self, private=True)

    def open_call(
        self, request: GenerateRequest, *, tenant: Hashable = None, private: bool = False
    ) -> OnlineCandidateGenerator:
        """The candidate generator of one generate call. Called by the seam; learns first if an update is due.

        Raises:
            ValueError: for what assisted generation, or hf_osd, cannot serve; nothing has run by then.
        """
        check_call(request, self.serving.active)
        target = request.target
        width = self._widths.of(target)
        translation = self._translation(width or self._widths.least(target), request.tokenizers)
        check_vocabularies(target, translation)
        began = time.perf_counter()
        self.update()
        self._stats.longest_wait = max(self._stats.longest_wait, time.perf_counter() - began)
        parts = Parts(
            config=self.osd_config,
            serving=self.serving,
            lookahead=self.lookahead,
            translation=translation,
            seen_texts=self.seen_texts,
            warn=self._warn_once,
            learns=self.learner is not None,
            reach=self.reach,
            head=self.head,
            texts=self.texts,
            see_width=None if width else functools.partial(self._widths.note, target),
        )
        call, generator = Call.open(request, parts, tenant, private)
        self._calls.add(call, generator)
        return generator

    def _translate(self, target_size: int, tokenizers: tuple | None) -> VocabMapping:
        if not self.lookahead.has_draft:  # what was said before is in the target's own tokens
            return VocabMapping.of_sizes(target_size, target_size)
        sizes = {"target_size": target_size, "draft_size": self.reach.width, "rows": self.reach.rows}
        if tokenizers is None:  # transformers lets that through for equal sizes alone
            return VocabMapping.of_sizes(**sizes)
        return VocabMapping.of_tokenizers(*tokenizers, **sizes)

    def decodes_plainly(self, target: PreTrainedModel, why: str):
        """Say once of calls that they are not drafted for."""
        self._warn_once(plain_warning(target, why))

    def update(self, force: bool = False) -> bool:
        """Take in the calls that have ended, and learn if an update is due, or if anything is new and `force` is set.

        Returns:
            `bool`: whether the serving draft was refreshed.
        """
        self.collect()
        if self.learner is None:
            return False
        refreshed = (force or self.learner.is_due()) and self.learner.update(wait=force)
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
        self.collect()
        return self.learner.update_together(force)

    def flush(self) -> bool:
        """Learn from everything that is new, now, whether an update is due or not. `True` if the serving draft was refreshed."""
        refreshed, stats = self.update(force=True), self.stats
        if self.osd_config.gate and stats.updates and not stats.accepted_updates:
            self._warn_once(WAITS)
        return refreshed

    def close(self):
        """Stop learning and let go of learner, feedback and cached text. The draft goes on drafting, frozen; closing again does nothing."""
        self.collect()
        if self.learner is not None:
            self.learner.close()
        self.learner, self.texts, self.closed = None, None, True
        self.lookahead.most_cached = 0
        self.buffer.clear()
        self.seen_texts.replace([])

    def __enter__(self) -> OnlineAssistant:
        return self

    def __exit__(self, *exception):
        self.close()

    @property
    def stats(self) -> Stats:
        """What was observed so far, see [`Stats`]. Calls that have ended are taken in first."""
        self._take_in(self._calls.pop_finished())
        stats = self._stats
        if self.learner is not None:
            for name, value in self.learner.metrics().items():
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
        return [judged.overlap for judged in judge_served(self.serving, feedback)]

    # How calls end.

    def collect(self):
        """Take in the calls that have ended, and those of this thread, without learning."""
        self._take_in(self._calls.pop_finished(here=True))

    @torch.autocast("cpu", enabled=False)
    def _take_in(self, over: list[Call]):
        """Finish calls that are over, and take in their statistics and feedback."""
        for call in over:
            record, feedback = call.record, call.finish(keep_text=self.texts is not None)
            if feedback is not None and self.learner is not None:
                window = self.osd_config.learning_window
                feedback = score_undrafted(feedback, record, self.serving, self.lookahead, self.head, window)
            if self.head is not None and not call.private:
                self.head.observe(record.prompt, record.answer, record.likely())
            with self._lock:
                self._stats.observe_call(record.stats)
            if self.learner is not None:
                self.learner.note_served(record.stats.seconds)
            if feedback is not None and self.learner is not None:
                if call.rehearsable:
                    self.rehearsable.add(feedback)
                self.learner.add(feedback)

    def _needs_draft(self, what: str):
        if not self.lookahead.has_draft:
            raise ValueError(
                f"This assistant has no draft, so there is nothing to {what}. Make it with one: OnlineAssistant(draft), where "
                "hf_osd.grow_draft(target) makes a draft."
            )
