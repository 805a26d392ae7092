"""`OnlineAssistant` is passed to `generate` as `assistant_model`. It owns the serving draft, its learner and the statistics, and connects serving with
learning; proposing tokens and computing losses is done elsewhere."""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.config import OnlineConfig
from hf_osd.distill.scoring import judge_served
from hf_osd.drafting.vocab_mapping import VocabMapping, check_vocabularies
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.feedback import Feedback
from hf_osd.feedback.prompt_states import SeenTexts
from hf_osd.generation.call import Call
from hf_osd.generation.checks import check_call, doubt_of_target
from hf_osd.generation.open_calls import OpenCalls
from hf_osd.generation.parts import Parts
from hf_osd.generation.shared_parts import SharedParts
from hf_osd.generation.verification import plain_warning
from hf_osd.generation.view import AssistantView
from hf_osd.learning.listener import Listener
from hf_osd.learning.memory import buffer_bytes
from hf_osd.learning.trouble import WAITS
from hf_osd.learning.undrafted import score_undrafted
from hf_osd.metrics.stats import Stats
from hf_osd.models.copies import embedding_names
from hf_osd.models.hot_swap import NullHotSwap
from hf_osd.models.lora import Adapter
from hf_osd.models.properties import reads_states
from hf_osd.policy.draft_choice import LEARNING, STATIC, DraftChoice
from hf_osd.policy.lookahead import DraftPolicy
from hf_osd.policy.report import report
from hf_osd.remote.teachable import TeachableAssistant
from hf_osd.saving.pretrained import SavableAssistant
from hf_osd.system.forks import on_fork, released

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.generation.candidates import OnlineCandidateGenerator
    from hf_osd.generation.request import GenerateRequest

logger = logging.getLogger(__name__)

# Largest number of suffix-cache tokens in a round.
_MAX_CACHED = 16


class OnlineAssistant(TeachableAssistant, SavableAssistant):
    """Assists `generate` with a draft model that learns from the requests it serves: online speculative decoding (arXiv 2310.07177).

    ```python
    assistant = OnlineAssistant(draft)
    target.generate(**inputs, assistant_model=assistant)
    ```

    The draft model proposes tokens, and so does a suffix cache, which looks up what followed the same words in recent text. The target verifies all of them:
    greedy output is the target's own and sampled output has its distribution, whatever the draft has learnt. Only the speed changes. (In bf16 and fp16 tied
    logits may change places, as in stock assisted generation.)

    Verification computes the target's distribution at each generated position. It is recorded, and the draft learns from it at the start of a later call, in
    `update()` or in `flush()`; with `learn="background"` or `learn="process"` it learns beside the calls. The learnt weights serve once they have passed the
    gate, and from the next call on: the weights that a call drafts with do not change while it runs. `stats` has all statistics, `report()` a summary.

    Args:
        draft (`PreTrainedModel`, *optional*): a causal LM, or an encoder-decoder if the target is one. It is copied and never written;
            weights without `requires_grad` are shared with it. If its vocabulary differs from the target's, pass `tokenizer` and
            `assistant_tokenizer` to `generate`, as transformers requires. Without a draft only the suffix cache proposes tokens.
        config ([`OnlineConfig`], *optional*): all settings; by default the draft learns from all verified positions, with replay.
        static_draft (`PreTrainedModel`, *optional*): a draft of any other architecture, which stays as it is and serves those calls where it is faster; a heavy one that one had before, say.
            Its calls teach `draft`, unless that one reads the target's hidden states. Both are causal LMs with one tokenizer.
        **overrides: single fields of the config, as in `OnlineAssistant(draft, learn=False)`.

    Raises:
        ValueError: if `draft` is not a model with an LM head that can read tokens alone, or its forward is patched, or weights of it have no values; if a field
            of the config is wrong; if there is neither a draft nor a suffix cache; or if `static_draft` cannot serve beside `draft`.
        RuntimeError: if the installed transformers lacks parameters that hf_osd relies on.
    """

    def __init__(
        self,
        draft: PreTrainedModel | None = None,
        config: OnlineConfig | None = None,
        *,
        static_draft: PreTrainedModel | None = None,
        **overrides,
    ):
        self.osd_config = config = OnlineConfig.of(config, overrides)
        shared = SharedParts.of(draft, config).with_static(static_draft, config)
        if static_draft is None:
            self._begin(shared)
            return
        opened: list[OpenCalls] = []  # held in place of the assistants, which a learner's thread would keep alive
        self._begin(replace(shared, busy=lambda: any(calls.any() for calls in opened)))
        opened += [self._calls, self._static._calls]

    @classmethod
    def of_parts(cls, config: OnlineConfig, shared: SharedParts) -> OnlineAssistant:
        """Makes an assistant that shares parts with others of the same draft, and learns for itself."""
        assistant = object.__new__(cls)
        assistant.osd_config = config
        assistant._begin(shared)
        return assistant

    def _begin(self, shared: SharedParts):
        """Makes the parts that are this assistant's own, beside those that it shares."""
        config, draft = self.osd_config, shared.draft
        self.shared = replace(
            shared, draft=None, static=None
        )  # else the weights that it came with would stay in memory
        self.buffer = FeedbackBuffer(buffer_bytes(draft, config), config.buffer_age)
        self.serving, self.learner, self.head = NullHotSwap(), None, shared.head
        self.reach, self._widths, self.texts = shared.reach, shared.widths, shared.texts
        self.adapter: Adapter | None = None  # the one that hf_osd puts on the draft, if any
        self.learning_choice = "Nothing learns: there is no draft."  # which weights learn, and why
        self._calls = OpenCalls()
        # Called with feedback that is about to teach, and the label of its call.
        self.on_feedback: Callable[[Feedback, object], None] | None = None
        self._static: OnlineAssistant | None = None  # serves a static draft beside this one
        self._choice: DraftChoice | None = None  # of the two; both have it
        self._name = LEARNING  # there
        if draft is not None:
            fixed = embedding_names(draft) if config.freeze_embeddings else set()
            trainable = {name for name, p in draft.named_parameters() if p.requires_grad and name not in fixed}
            if config.learns and not trainable and config.adapter != "lora":
                raise ValueError(
                    f"No parameter of the draft ({type(draft).__name__}) requires gradients, so there is nothing to learn with. Call "
                    "draft.requires_grad_(True), or pass learn=False; or adapter='lora', which learns in weights of its own; or freeze_embeddings=False, if what "
                    "does lies on embeddings or LM head."
                )
            self._serve(draft, trainable)
        self.lookahead = DraftPolicy(
            config.lookahead,
            config.num_assistant_tokens,
            config.draft_cost,
            config.verify_cost,
            max_cached=_MAX_CACHED if config.suffix_cache else 0,
            has_draft=draft is not None,
            beside=shared.lookahead,
        )
        self._stats = Stats()
        self._lock = released(threading.RLock())
        self._warn_once = shared.warn_once
        # Feedback whose prompt is plain token ids of a shared vocabulary: it alone can be rehearsed.
        self.rehearsable: weakref.WeakSet[Feedback] = weakref.WeakSet()
        self.seen_texts = SeenTexts()
        self._mapping = functools.lru_cache(maxsize=4)(self._make_mapping)
        on_fork(self)
        if shared.static is not None:
            self._serve_beside(shared.static)

    def _serve_beside(self, shared: SharedParts):
        """Makes an assistant of a static draft, which shares statistics with this one, and whose calls teach this one's draft."""
        static = OnlineAssistant.of_parts(replace(self.osd_config, learn="off", draft_cost=None), shared)
        static._stats, static._lock = self._stats, self._lock
        if (
            self.learner is not None
            and not reads_states(self.serving.active)
            and static.reach.width == self.reach.width
        ):
            static.learner = Listener(self.learner)
            static.rehearsable, static.seen_texts = self.rehearsable, self.seen_texts
        static._name, static._choice = STATIC, DraftChoice()
        self._static, self._choice = static, static._choice

    # Attributes that transformers reads on an assistant model.

    @property
    def config(self):
        """Returns the draft's config, which transformers reads on an assistant model. The [`OnlineConfig`] is `osd_config`."""
        return self.serving.active.config

    @property
    def generation_config(self):
        """Returns the draft's generation config."""
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
        """Generates with the serving draft alone. Stock candidate generators call it after `hf_osd.disable()`; nothing is then recorded or learnt.

        Raises:
            ValueError: if there is no draft.
        """
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
        """Returns a view of this assistant for one tenant's calls: `generate(..., assistant_model=assistant.tenant("acme"))`. Draft, learner and statistics
        are shared; text in the suffix cache is never proposed to another tenant's calls, nor to calls without a tenant."""
        return AssistantView(self, name)

    def private(self) -> AssistantView:
        """Returns a view of this assistant for calls of which nothing is kept: `generate(..., assistant_model=assistant.private())`. They get drafts like
        others and are counted; nothing is learnt from them, and none of their text goes into a cache. `assistant.tenant(name).private()` is both."""
        return AssistantView(self, private=True)

    def open_call(
        self, request: GenerateRequest, *, tenant: Hashable = None, private: bool = False, label: object = None
    ) -> OnlineCandidateGenerator:
        """Opens one generate call and returns its candidate generator. The seam calls it; if an update is due, it is made first. `label` comes back with the call's
        feedback.

        Raises:
            ValueError: if assisted generation or hf_osd cannot serve the call; nothing has run by then.
        """
        check_call(request, self.serving.active)
        if self._static is not None and self._choice.choose() == STATIC:
            self._update_before_call()
            return self._static.open_call(request, tenant=tenant, private=private, label=label)
        target = request.target
        if (doubt := doubt_of_target(target, self.serving.active)) is not None:
            self._warn_once(doubt)
        width = self._widths.width_of(target)
        mapping = self._mapping(width or self._widths.min_width(target), request.tokenizers)
        check_vocabularies(target, mapping)
        self._update_before_call()
        self.lookahead.note_weights(self.serving.version)
        parts = Parts(
            config=self.osd_config,
            serving=self.serving,
            lookahead=self.lookahead,
            mapping=mapping,
            seen_texts=self.seen_texts,
            warn=self._warn_once,
            learns=self.learner is not None,
            reach=self.reach,
            head=self.head,
            texts=self.texts,
            note_width=None if width else functools.partial(self._widths.note, target),
        )
        call, generator = Call.open(request, parts, tenant, private)
        call.label = label
        self._calls.add(call, generator)
        return generator

    def _update_before_call(self):
        began = time.perf_counter()
        self.update()
        self._stats.longest_wait = max(self._stats.longest_wait, time.perf_counter() - began)

    def _make_mapping(self, target_size: int, tokenizers: tuple | None) -> VocabMapping:
        if not self.lookahead.has_draft:  # the suffix cache has the target's tokens
            return VocabMapping.from_sizes(target_size, target_size)
        sizes = {
            "target_size": target_size,
            "draft_size": self.reach.width,
            "num_embeddings": self.reach.num_embeddings,
        }
        if tokenizers is None:  # transformers accepts that for equal sizes only
            return VocabMapping.from_sizes(**sizes)
        return VocabMapping.from_tokenizers(*tokenizers, **sizes)

    def warn_plain_decoding(self, target: PreTrainedModel, why: str):
        """Warns, once, that calls of `target` get no drafts."""
        self._warn_once(plain_warning(target, why))

    def update(self, force: bool = False) -> bool:
        """Collects the calls that have ended, and learns if an update is due, or, with `force`, if there is any new feedback.

        Returns:
            `bool`: `True` if the serving draft was refreshed.
        """
        self.collect()
        if self.learner is None:
            return False
        refreshed = (force or self.learner.is_due()) and self.learner.update(wait=force)
        if (trouble := self.learner.trouble()) is not None:
            self._warn_once(trouble)
        return refreshed

    def update_together(self, force: bool = False) -> bool:
        """Updates on all ranks of a job together, if an update is due on any of them, or, with `force`, if any has new feedback. Every rank must call it equally
        often and at the same points, for example after each request, also once its own requests are served. In a job of one process it is `update(force)`.

        In a job of several processes calls of `generate` start no update: learning happens here only.

        Returns:
            `bool`: `True` if the serving draft was refreshed; the same on all ranks. Once a rank has gone it is always `False`: the draft goes on
            serving unchanged.

        Raises:
            ValueError: if the ranks did not begin with the same draft.
        """
        if getattr(self.learner, "ranks", None) is None or self.learner.ranks.size == 1:
            return self.update(force)
        self.collect()
        return self.learner.update_together(force)

    def flush(self) -> bool:
        """Learns from all new feedback now, even if no update is due. Returns `True` if the serving draft was refreshed."""
        refreshed, stats = self.update(force=True), self.stats
        if self.osd_config.gate and stats.updates and not stats.accepted_updates:
            self._warn_once(WAITS)
        return refreshed

    def close(self):
        """Stops learning and frees learner, feedback and cached text. The draft goes on drafting with fixed weights; closing again does nothing."""
        self.collect()
        if self._static is not None:
            self._static.close()
        if self.learner is not None:
            self.learner.close()
        self.learner, self.texts, self.closed = None, None, True
        self.lookahead.max_cached = 0
        self.buffer.clear()
        self.seen_texts.replace([])

    def __enter__(self) -> OnlineAssistant:
        return self

    def __exit__(self, *exception):
        self.close()

    @property
    def stats(self) -> Stats:
        """Returns the statistics so far, see [`Stats`]. Calls that have ended are collected first."""
        self._finish(self._calls.pop_finished())
        if self._static is not None:
            self._static._finish(self._static._calls.pop_finished())
        stats = self._stats
        if self.learner is not None:
            for name, value in self.learner.metrics().items():
                setattr(stats, name, value)
        stats.buffer_requests, stats.buffer_bytes = len(self.buffer), self.buffer.nbytes
        stats.buffer_capacity, stats.draft_version = self.buffer.max_bytes, self.serving.version
        stats.suffix_cache_bytes = self.texts.nbytes if self.texts is not None else 0
        return stats

    def report(self) -> str:
        """Describes in a few lines if drafting pays, by how much, and how to improve it.

        It gives c and v(n), the times of a draft step and of verifying n tokens, in one-token target steps; α, the expected acceptance; the best γ, the number
        of drafted tokens; the α from which drafting pays; and the expected and the observed speed-up.
        """
        lines = [report(self.stats, self.lookahead, self.learning_choice)]
        return "\n".join(lines if self._choice is None else [*lines, self._choice.report()])

    def score(self, feedback: list[Feedback]) -> list[Tensor]:
        """Computes the serving draft's expected acceptance at each position of `feedback`, `(N,)` for each request, teacher-forced; α is the mean.

        See [`hf_osd.distill.scoring.score`]; `record_answers` makes feedback of prompts, for example held-out ones.

        Raises:
            ValueError: if there is no draft.
        """
        self._needs_draft("score")
        return [judged.overlap for judged in judge_served(self.serving, feedback)]

    # Ending calls.

    @property
    def serves(self) -> bool:
        """Tells whether it serves a call now, with either draft; takes no lock."""
        return self._calls.any() or (self._static is not None and self._static.serves)

    def tell(self, on_feedback: Callable[[Feedback, object], None]):
        """Calls `on_feedback` with feedback that is about to teach, from calls of either draft, and the label of its call."""
        self.on_feedback = on_feedback
        if self._static is not None:
            self._static.tell(on_feedback)

    def collect(self):
        """Collects statistics and feedback of the calls that have ended, without learning. Calls that this thread has come back from count as ended."""
        self._finish(self._calls.pop_finished(this_thread=True))
        if self._static is not None:
            self._static.collect()

    @torch.autocast("cpu", enabled=False)
    def _finish(self, calls: list[Call]):
        """Finishes calls that have ended, and adds their statistics and feedback."""
        for call in calls:
            record, feedback = call.record, call.finish(keep_text=self.texts is not None)
            if feedback is not None and self.learner is not None:
                window, before = self.osd_config.learning_window, self._stats.total.requests
                feedback = score_undrafted(feedback, record, self.serving, self.lookahead, self.head, window, before)
            if self.head is not None and not call.private:
                self.head.observe(record.prompt, record.answer, record.likely())
            with self._lock:
                self._stats.observe_call(record.stats)
            if self._choice is not None and record.stats.rounds:
                self._choice.observe(self._name, record.stats.new_tokens, record.stats.seconds)
            if self.learner is not None:
                self.learner.note_served(record.stats.seconds)
            if feedback is not None and self.learner is not None:
                if self.on_feedback is not None:
                    self.on_feedback(feedback, call.label)
                if call.rehearsable:
                    self.rehearsable.add(feedback)
                self.learner.add(feedback)
        if self.buffer.crowded:
            self._warn_once(
                f"The feedback buffer (`buffer_bytes`, {self.buffer.max_bytes / 2**20:.0f} MiB) has no room for 128 requests of this size, and the oldest go: that is "
                "little to learn from. Raise `buffer_bytes`; or lower `prompt_positions` or `top_k`, so that a request takes less."
            )

    def _needs_draft(self, what: str):
        if not self.lookahead.has_draft:
            raise ValueError(
                f"This assistant has no draft, so there is nothing to {what}. Make it with one: OnlineAssistant(draft), where "
                "hf_osd.grow_draft(target) makes a draft."
            )
