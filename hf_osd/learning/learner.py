"""`Learner`: decides when a draft learns, on what, and which weights of it may serve. Between it and the serving draft lies one call of `serve`; whatever goes
wrong here leaves that draft as it was.

An update, with p the target, q the draft, Q the buffer (Algorithm 1 of arXiv 2310.07177, section 4.2, with judging before learning):

1. Wait until Q holds `update_interval` new requests N, with p at each of their positions, as verification has computed it.      `is_due`
2. Score three drafts on N, teacher-forced: static (q before any learning), accepted and candidate. None has learnt N.           `Contenders.decide`
3. The gate accepts the candidate, drops it (q ← accepted), or waits for more; accepted serves, or static where it is better.    `Gate.observe`
4. R ← N and requests sampled from Q for replay, as many as fit the time.                                                        `_with_replay`
5. For each batch B of R: q ← q - η ∇ mean of D(p ‖ q) over the positions of B.                                                  `Student.learn`
6. candidate ← q.                                                                                                                `Contenders.propose`

Until η is known, 2 and 3 are a search for it on the first requests (`RateSearch`). What fails is undone (`Rollback`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from hf_osd.distill.ranks import RankGroup, RanksParted, check_job
from hf_osd.distill.scoring import learning_modes
from hf_osd.distill.student import Student
from hf_osd.distill.windows import cut_to_learn
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.feedback import Feedback
from hf_osd.learning.contenders import Contenders
from hf_osd.learning.rate import Rate
from hf_osd.learning.rate_search import RateSearch
from hf_osd.learning.rollback import Rollback, UpdateFailed
from hf_osd.learning.schedule import Schedule
from hf_osd.learning.trouble import trouble
from hf_osd.system.forks import released
from hf_osd.system.random_state import isolated_random_state

logger = logging.getLogger(__name__)

_COUNTS = ("updates", "failed", "learned_tokens", "seconds")  # of a restart


class Learner:
    """Trains a draft on a buffer, in the caller's thread.

    A draft that was learnt serves if the [`Gate`] lets it. An update that fails leaves no trace but its count: learning goes back to where it was, forgets the
    requests that it failed on, and rests the longer, the more often in a row that happens.

    In a job of several processes all learn one draft, each from its own buffer, and at the same moments: no update falls due by itself, and
    `update` and `update_together` are to be called on all ranks. They sum gradients, losses and evidence, and come to the same decisions.

    Args:
        student (`Student`): the draft that trains, see [`hf_osd.distill.ensemble.make_student`]; it has the config.
        buffer (`FeedbackBuffer`): the requests to learn from.
        serve (`Callable[[Mapping[str, Tensor]], None]`): takes the weights that are to serve, by name.
        alone (`bool`, defaults to `True`): no other thread draws random numbers while this one learns, so that it can restore the process's random
            state. In the background that would repeat numbers that others have drawn; nothing there draws from it but dropout. Alone, learning holds up
            serving, and keeps to its share of the time itself.
        turn (`threading.Lock`, *optional*): held while this learns; shared by learners of which one is to learn at a time.

    Attributes:
        updates (`int`), failed (`int`): updates that learnt, and that raised.
        unmoved (`int`): the last ones in a row that learnt and changed nothing.
        learned_tokens (`int`), seconds (`float`): in all updates.

    Raises:
        ValueError: if this is one of several processes that cannot learn like that.
    """

    def __init__(
        self,
        student: Student,
        buffer: FeedbackBuffer,
        serve: Callable[[Mapping[str, Tensor]], None],
        alone: bool = True,
        turn: threading.Lock | None = None,
    ):
        self.student, self.buffer, self.config = student, buffer, student.config
        self.alone, config = alone, self.config
        self._reads_states = student.reads_states
        self.ranks = RankGroup.of_job()
        if self.ranks.size > 1:
            check_job(self.ranks, alone)
        self._begun_together = False  # whether all ranks are known to have the same draft
        self.updates = self.failed = self.unmoved = self.learned_tokens = 0
        self.seconds = 0.0
        self.rate = Rate(config.learning_rate, adapter=any(".lora_" in name for name in student.trainable))
        self.schedule = Schedule(config, bounded=alone and self.ranks.size == 1)
        student.set_rate(self.rate.value)
        self.contenders = Contenders(student, self.ranks, serve, self.schedule.note_judged, self.schedule.thinned)
        self.rollback = Rollback(self.contenders, buffer, self.rate, self.schedule)
        self.rate_search = RateSearch(self.contenders, self.rollback, self.rate, self.schedule, self._train)
        self._rehearsed: weakref.WeakSet[Feedback] = weakref.WeakSet()  # to be learnt, and not judged by
        self._generator = torch.Generator("cpu")
        if config.seed is None:
            self._generator.seed()  # its own: `torch.seed` would set the process's
        else:
            self._generator.manual_seed(config.seed + self.ranks.rank)
        # Guards what this learner has. Whoever takes the turn as well takes it first.
        self._lock, self._turn = released(threading.Lock()), turn
        self._begun: Callable[[], None] | None = None

    def is_due(self) -> bool:
        """Tell whether enough requests wait. Never in a job of several processes: one of them must not begin alone."""
        return self.ranks.size == 1 and self._is_due()

    def _is_due(self) -> bool:
        new = self.buffer.new()
        if self.rate.found:
            return self.schedule.due(new)
        # A search for the rate takes requests to try it on, and others to score it on.
        return self.schedule.due([one for one in new if one not in self._rehearsed], times=2)

    def update(self, wait: bool = True, most: int | None = None) -> bool:
        """Make one update on new and replayed requests. `True` if other weights serve than before.

        Never raises for what happens inside learning: a failed update is logged and counted, the learner goes back to the weights that
        it had, with new optimizers. An interrupt passes through.

        In a job of several processes all ranks call this, and learn if there is a new request on one of them.

        Args:
            wait (`bool`): somebody asked for it: learn all new requests, whatever time that takes, and wait for another thread that learns. Else leave them
                to the other thread; and learning that holds up serving keeps to `learning_budget`.
            most (`int`, *optional*): requests to learn at once, replay included. The oldest new ones are then left to later replay, and a learner that falls
                behind its traffic updates the draft as often as ever.
        """
        if self.ranks.parted or not self._acquire(wait):
            return False
        start, changes = time.perf_counter(), self.contenders.changes
        try:
            if self._begun is not None:
                self._begun()
            self.schedule.begin(bounded=not wait)
            new = self.buffer.new()
            if self.ranks.any(bool(new)):
                self._update(new, most)
            return self.contenders.changes > changes
        except UpdateFailed:
            self.failed += 1
            return self.contenders.changes > changes
        except RanksParted as error:
            return self._parted(error)
        finally:
            seconds = time.perf_counter() - start
            self.seconds += seconds
            self.schedule.note_update(seconds)
            self._lock.release()
            if self._turn is not None:
                self._turn.release()

    def _acquire(self, wait: bool) -> bool:
        if self._turn is None:
            return self._lock.acquire(blocking=wait)
        if not self._turn.acquire(blocking=wait):
            return False
        taken = False
        try:
            taken = self._lock.acquire(blocking=wait)
        finally:  # also at an interrupt
            if not taken:
                self._turn.release()
        return taken

    def update_together(self, force: bool = False) -> bool:
        """Update with all ranks, as [`hf_osd.OnlineAssistant.update_together`] does, on the calls collected so far."""
        try:
            return not self.ranks.parted and self.ranks.any(force or self._is_due()) and self.update(wait=force)
        except RanksParted as error:
            return self._parted(error)

    def add(self, feedback: Feedback):
        """Put a request into the buffer, to be judged by and then learnt."""
        self.buffer.add(feedback)

    def rehearse(self, answer: Feedback):
        """Put an answer into the buffer to be learnt, and not judged by: its prompt has been learnt already."""
        self._rehearsed.add(answer)
        self.buffer.add(answer)

    def replay(self, requests: list[Feedback]):
        """Put requests into the buffer that were learnt before: they are learnt again beside new ones, and not judged by."""
        for feedback in requests:
            self.buffer.add(feedback)
        self.buffer.mark_seen(requests)

    def note_served(self, seconds: float):
        """Note how long a call took: learning gets a share of it."""
        self.schedule.note_served(seconds)

    def metrics(self) -> dict:
        """Collect the figures of learning, by their names in [`hf_osd.metrics.stats.Stats`]."""
        return {
            "updates": self.updates,
            "failed_updates": self.failed,
            "rejected_updates": self.contenders.dropped,
            "accepted_updates": self.contenders.accepted,
            "learned_tokens": self.learned_tokens,
            "learning_seconds": self.seconds,
            "longest_update": self.schedule.longest,
            "learning_rate": self.rate.value,
            "learning_rate_reason": self.rate.reason,
            "too_slow": self.schedule.too_slow,
            "trouble": self.trouble(),
            "serves_static": self.contenders.serves_static,
            "regret_vs_static": self.contenders.shadow.regret,
            "estimate": self.contenders.shadow.estimate(),
        }

    def trouble(self) -> str | None:
        """Explain what is wrong, if learning goes on and changes nothing."""
        return trouble(self.failed, self.updates, self.unmoved)

    def pause_by(self, pause: Callable[[], None], begun: Callable[[], None] | None = None):
        """Call `pause` after each optimizer step and each judging, and `begun` before the first: waiting for another learner, with which this one may take turns, is no work."""
        self._begun = begun
        self.student.on_step = self.contenders.pause = pause

    def serve(self):
        """Serve the draft that may serve; without a gate the newest."""
        self.contenders.serve()

    def load_weights(self, weights: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None):
        """Go on from weights that were trained elsewhere; with `base`, in an adapter over other weights of the plain draft, by its names. They serve
        already, and later ones are compared with them. Waits for an update that runs."""
        with self._lock:
            if base is not None:
                self.student.set_base(base)
            self.contenders.reset(weights)
            self.rollback.begin()
            self._begun_together = False

    def after_fork(self) -> str | None:
        """Explain, in a forked child, why this cannot learn there; `None` if it can."""
        return "another thread was in the middle of an update" if self._lock.locked() else None

    def close(self):
        """Forget all requests; learning has ended."""
        self.contenders.remembered.clear()

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Copy what a restart needs: tensors, by student and name, and plain values. Waits for an update that runs."""
        with self._lock:
            tensors, values = self.student.state()
            accepted, contenders = self.contenders.state()
            tensors |= {f"accepted.{name}": tensor for name, tensor in accepted.items()}
            return tensors | {"draws": self._generator.get_state()}, {
                **{name: getattr(self, name) for name in _COUNTS},
                "misses": self.schedule.misses,
                "rate": self.rate.state(),
                "contenders": contenders,
                **values,
            }

    def load_state(self, tensors: Mapping[str, Tensor], values: dict):
        """Go on from `state()`. A candidate that was waiting is given up; the next update proposes one.

        Raises:
            ValueError: if the state is that of another draft, or of another number of students.
        """
        # A Trainer seeds the process's random state; while another one learns inline, that is not as it was before.
        turn = self._turn if self.alone and self._turn is not None else contextlib.nullcontext()
        with turn, self._lock, isolated_random_state():
            accepted = {n.removeprefix("accepted."): t for n, t in tensors.items() if n.startswith("accepted.")}
            students = {n: t for n, t in tensors.items() if not n.startswith("accepted.") and n != "draws"}
            self.student.load_state(students, values)
            self._generator.set_state(tensors["draws"].cpu())
            for name in _COUNTS:
                setattr(self, name, values[name])
            self.schedule.misses = values["misses"]
            self.rate.load_state(values["rate"])
            self.student.set_rate(self.rate.value)
            self.contenders.load_state(accepted, values["contenders"])
            self.rollback.begin()
            self._begun_together = False

    def _parted(self, error: RanksParted) -> bool:
        logger.error("This rank learns no more, and its draft serves on as it is. %s", error)
        return False

    # One update.

    def _update(self, new: list[Feedback], most: int | None):
        self._check_beginning()
        judged = [one for one in new if one not in self._rehearsed]
        if self._reads_states:  # requests without states can neither be scored nor learnt by such a draft
            judged = [one for one in judged if one.states is not None]
        if not self.rate.found and not self.rate_search.is_possible(judged):
            return  # it stays new
        self.buffer.mark_seen(new)  # also if learning fails: what broke it once must not break it for ever
        if most is not None:
            new, judged = new[-most:], judged[-most:]
        # 2 and 3.
        if self.rate.found:
            judged = self.schedule.within(judged)  # three drafts' forwards are as learning once
        with self.rollback.attempt(new), self._isolated():
            decide = self.contenders.decide if self.rate.found else self.rate_search.run
            self.rollback.follow(*decide(judged))
        self.contenders.remember(judged)
        # 4 to 6.
        if not self.schedule.rests():
            self._learn(new, most)

    def _learn(self, new: list[Feedback], most: int | None):
        requests = self._with_replay(new, most)
        rows = sum(request.num_teaching(self.config.positions, self._reads_states) for request in requests)
        rows = int(self.ranks.sum(rows)[0])
        if not rows:
            return  # nothing but accepted drafts, where errors alone teach; or no time
        before, first = self.student.snapshot(), not self.updates
        with self.rollback.attempt(new), self._isolated():
            self.student.prepare()
            start = time.perf_counter()
            self.student.count_losses(new, self.ranks)
            self._train(requests)
            if self.contenders.gate is None:
                with self.ranks.together():
                    self.contenders.serve()
            self.contenders.propose()
        self.schedule.note_learned(self.schedule.tokens(requests), time.perf_counter() - start, first)
        self.schedule.succeeded()
        self.updates += 1
        self.unmoved = 0 if self.student.has_moved(before) else self.unmoved + 1
        self.learned_tokens += rows
        self.rollback.note_learnt(new)

    def _with_replay(self, new: list[Feedback], most: int | None) -> list[Feedback]:
        """Choose what an update learns: new requests and a sample of the buffer, as many as there is time for, cut to what is read of them."""
        passes = min(self.rate.passes or self.config.passes, self.config.passes)
        count = round((passes - 1) * len(new))
        if most is not None:
            count = min(count, most - len(new))
        # After a failure without replay: what broke the update may be in it, and would break every other one.
        count = 0 if self.schedule.misses else count
        replayed = self.buffer.sample(count, self._generator)
        return cut_to_learn(self.schedule.fitting(new, replayed), self.config, self._generator)

    def _train(self, requests: list[Feedback]):
        """Pass once over `requests`.

        Raises:
            ArithmeticError: if the loss is not finite.
        """
        self.student.learn(cut_to_learn(requests, self.config, self._generator))
        self.ranks.agree_on(self.student.failure)
        sums = self.ranks.sum(*itertools.chain.from_iterable(self.student.last_losses))
        losses = [total / rows if rows else math.nan for total, rows in zip(sums[::2], sums[1::2], strict=True)]
        if not all(map(math.isfinite, losses)):
            raise ArithmeticError(
                f"The loss of this update is {', '.join(map(str, losses))}. Lower the learning rate if that comes again."
            )

    def _check_beginning(self):
        if not self._begun_together and not self.ranks.same(self.student.weights()):
            raise ValueError(
                "The ranks began with different drafts. Load the same one on each of them, and seed whatever of it is random the same."
            )
        self._begun_together = True

    @contextlib.contextmanager
    def _isolated(self) -> Iterator[None]:
        """Shield learning and its caller from each other: generate runs under no_grad, users under inference_mode, autocast or a default device; and Trainer
        seeds the process's random state."""
        with isolated_random_state() if self.alone else contextlib.nullcontext(), learning_modes(self.student.device):
            yield
