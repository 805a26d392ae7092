"""`Sidecar` joins proxy, learner and engines: what answers teach goes to the learner, and the weights that its gate lets through go to the engines."""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_osd.engines.sidecar.answers import to_feedback, token_ids
from hf_osd.engines.sidecar.asking import Asked
from hf_osd.engines.sidecar.rereading import AnswerReader, Served
from hf_osd.feedback.feedback import Feedback
from hf_osd.models.properties import reads_states
from hf_osd.saving.drafts import save_draft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_osd.assistant import OnlineAssistant
    from hf_osd.engines.pusher import DraftPusher
    from hf_osd.engines.servers import EngineServer

logger = logging.getLogger(__name__)

# Answers that may wait to be made feedback of. Where learning does not keep up, more are dropped: nobody's request waits for it.
_MOST_WAITING = 256
# Answers that are read at once, at most.
_AT_ONCE = 16
# Seconds between two looks at the weights.
_LOOK = 0.5
# Seconds that closing waits for the thread, which may be learning.
_PATIENCE = 30.0


class Sidecar:
    """Teaches the draft of serving engines from their answers.

    Everything but `share_in` and `teach` runs in a thread of its own. Whatever fails in it, requests go on.

    Args:
        assistant (`OnlineAssistant`): holds the draft that the engines serve, and learns it: buffer, holdout, gate and rollback are its own. Never called by a
            `generate`; with `learn="process"` learning disturbs the proxy least.
        servers (`Sequence[EngineServer]`): the engines.
        pusher (`DraftPusher`, *optional*): brings weights into them; without it the draft learns, they stay as they are, and their counters are not read.
        top_k (`int`): log-probs a position to ask the engines for, at most; no more than all of them allow and than the assistant's `top_k`.
        share (`float`): share of the requests that teach, drawn at random.
        seed (`int`, *optional*): of this draw.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): written beside the weights.
        pushes_first (`bool`): push what the assistant begins with: the engines may serve another draft.
        reader (`AnswerReader`, *optional*): reads answers once more; engines are then asked for token ids alone.
        layout (`str`): the form in which engines read the draft, see [`hf_osd.save_feature_draft`].

    Raises:
        ValueError: if the assistant has no draft, or its draft reads the target's hidden states, which engines do not hand out, and there is no `reader`.
    """

    def __init__(
        self,
        assistant: OnlineAssistant,
        servers: Sequence[EngineServer],
        pusher: DraftPusher | None = None,
        *,
        top_k: int = 20,
        share: float = 1.0,
        seed: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pushes_first: bool = False,
        reader: AnswerReader | None = None,
        layout: str = "osd",
    ):
        if not assistant.lookahead.has_draft:
            raise ValueError(
                "The assistant has no draft, so there is nothing to teach. Make it with the draft that the engines serve."
            )
        if reads_states(assistant.serving.active) and reader is None:
            raise ValueError(
                "The draft reads the target's hidden states, which an engine does not hand out while it speculates. Let the sidecar read answers once more with its "
                "own copy of the target (--reread 0.25), or give a draft that is a whole model, such as hf-osd grow --kind layers makes."
            )
        if not 0 < share <= 1:
            raise ValueError(f"`share` is {share}; give a share of the requests above 0 up to 1.")
        self.assistant, self.servers, self.pusher = assistant, list(servers), pusher
        # The same number for all engines: what is learnt together has as many columns.
        limits = [server.max_logprobs for server in self.servers]
        self.top_k = min(top_k, assistant.osd_config.top_k, *(n for n in limits if n is not None and n >= 0))
        self.models = {server.url: server.model for server in self.servers}
        if reader is not None:
            self.top_k = 0
        elif self.top_k < 1:
            logger.warning(
                "An engine gives no log-probs (`--max-logprobs 0`): nothing can be learnt. Start it with 20, its default."
            )
        self.share = share
        self.counts: Counter[str] = Counter()
        self._tokenizer, self._random = tokenizer, random.Random(seed)
        self._reader, self._layout = reader, layout
        self._dtype = getattr(torch, assistant.osd_config.feedback_dtype)
        self._waiting: queue.Queue[tuple | None] = queue.Queue(_MOST_WAITING)
        self._offered = assistant.serving.version - pushes_first
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None
        self._began = time.monotonic()

    # What the proxy calls, in its event loop.

    def share_in(self) -> bool:
        """Draw whether the next request is to teach."""
        if self.assistant.learner is None or (self.top_k < 1 and self._reader is None):
            return False
        return self.share == 1 or self._random.random() < self.share

    def teach(self, values: Sequence[Mapping[str, Any]], asked: Asked, tenant: str | None = None):
        """Hand over what an answer teaches; returns at once.

        Args:
            values (`Sequence[Mapping]`): see [`hf_osd.engines.sidecar.answers.to_feedback`].
            asked (`Asked`): the request.
            tenant (`str`, *optional*): whose request it is. All tenants teach the one draft, as in `generate`; it is the label of `assistant.on_feedback`.
        """
        try:
            self._waiting.put_nowait((values, asked.sampled, tenant))
        except queue.Full:
            self.counts["dropped"] += 1

    # The thread.

    def start(self):
        """Begin to learn."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hf_osd sidecar", daemon=True)
            self._thread.start()

    def close(self):
        """Stop learning and pushing; the engines serve on with the draft they have. Closing again does nothing."""
        if self._ends.is_set():
            return
        self._ends.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE)
        if self.pusher is not None:
            self.pusher.close()
        self.assistant.close()

    def _run(self):
        while not self._ends.is_set():
            self._guarded(self._learn, self._next_answers())
            self._guarded(self._offer)

    def _next_answers(self) -> list[tuple]:
        """Wait a moment for an answer; return it and others that wait, or none."""
        if self._reader is not None and self._reader.rest:
            self._ends.wait(min(self._reader.rest, _LOOK))
            return []
        answers = []
        with suppress(queue.Empty):
            answers.append(self._waiting.get(timeout=_LOOK))
            while len(answers) < _AT_ONCE:
                answers.append(self._waiting.get_nowait())
        return answers

    def _guarded(self, step, *args):
        try:
            step(*args)
        except Exception as error:
            # Its message, or a local variable of a debugger's traceback, might show tokens.
            frame = error.__traceback__
            while frame is not None and frame.tb_next is not None:
                frame = frame.tb_next
            where = "" if frame is None else f" ({Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno})"
            self.counts["errors"] += 1
            logger.error(
                "The sidecar's %s failed: %s%s. Requests go on.", step.__name__.strip("_"), type(error).__name__, where
            )

    def _learn(self, answers: list[tuple]):
        assistant = self.assistant
        for feedback, tenant in self._read(answers):
            if feedback is None or not assistant.reach.covers(feedback):
                self.counts["unreadable"] += 1
                continue
            self.counts["taught"] += 1
            self.counts["taught_tokens"] += len(feedback)
            self.counts["feedback_bytes"] += feedback.nbytes
            if assistant.on_feedback is not None:
                assistant.on_feedback(feedback, tenant)
            assistant.learner.add(feedback)
        assistant.update()

    def _read(self, answers: list[tuple]) -> Iterator[tuple[Feedback | None, str | None]]:
        """Make the feedback of answers, with their tenants; `None` of those that cannot be read."""
        width = self.assistant.reach.width
        if self._reader is None:
            for values, sampled, tenant in answers:
                yield to_feedback(values, sampled, self.top_k, width, self._dtype), tenant
            return
        by_tenant: dict[str | None, list[Served]] = {}
        for values, sampled, tenant in answers:
            if (ids := token_ids(values, width)) is None:
                yield None, tenant
            else:
                by_tenant.setdefault(tenant, []).append(Served(*ids, sampled))
        for tenant, served in by_tenant.items():
            for feedback in self._reader.read(served):
                yield feedback, tenant

    def _offer(self):
        version = self.assistant.serving.version
        if version != self._offered and self.pusher is not None:
            self._offered = version
            self.pusher.offer(self._save)

    def _save(self, folder: Path):
        """Write the draft that may serve now, as engines read it."""
        serving = self.assistant.serving
        draft = serving.lease()
        try:
            save_draft(draft, folder, merge=True, layout=self._layout)
        finally:
            serving.release(draft)
        self.assistant.osd_config.save_pretrained(folder)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)

    def taken_back(self):
        """Count weights that the engines accepted fewer tokens of, and that the pusher has taken back. The learner goes on from them, and its next ones are pushed."""
        self.counts["taken_back"] += 1

    # To see.

    def figures(self) -> dict:
        """Collect the sidecar's own figures and those of learning; none tells of a request's text."""
        stats = self.assistant.stats
        estimate = stats.estimate
        return {
            "seconds": time.monotonic() - self._began,
            "counts": dict(self.counts),
            "waiting": self._waiting.qsize(),
            "rereading_seconds": 0.0 if self._reader is None else self._reader.seconds,
            "learning": {
                name: getattr(stats, name)
                for name in (
                    "updates",
                    "failed_updates",
                    "accepted_updates",
                    "rejected_updates",
                    "learned_tokens",
                    "learning_seconds",
                    "learner_restarts",
                    "buffer_requests",
                    "buffer_bytes",
                    "regret_vs_static",
                    "learning_over",
                    "trouble",
                )
            },
            "alpha": None if estimate is None else estimate.alpha,
            "alpha_initial": None if estimate is None else estimate.gain.before,
            "draft_version": stats.draft_version,
            "acceptance": {} if self.pusher is None else self.pusher.acceptance(),
            "pushes": {} if self.pusher is None else self.pusher.status(),
        }
