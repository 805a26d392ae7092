"""`Learner`: decides when to learn, on what, and what is to serve of it. Between it and the serving draft lies one refresh; whatever goes wrong
here leaves that draft as it was.

An update (Algorithm 1 of arXiv 2310.07177, section 4.2, with what stands between learning and serving):

1. new feedback is due, and none of it has been learnt;
2. the static draft, the accepted one and the candidate are judged on it, teacher-forced;
3. the gate says whether the candidate becomes the accepted draft, waits, or is dropped, and which of accepted and static serves ([`Contenders.decide`]);
4. the student learns from the new requests and replayed ones, as many as fit the time (`_learn`);
5. what has been learnt by then is the candidate.
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
from typing import Any

import torch
from torch import Tensor

from hf_osd.distill.ranks import RankGroup, RanksParted, check_job
from hf_osd.distill.scoring import Judged, learners_autocast
from hf_osd.distill.student import Student
from hf_osd.distill.windows import what_is_read
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.feedback import Feedback
from hf_osd.learning.contenders import Contenders, Point
from hf_osd.learning.gate import Verdict
from hf_osd.learning.rate import Rate, Trial
from hf_osd.learning.schedule import Schedule
from hf_osd.learning.trouble import trouble
from hf_osd.system.default_device import default_device
from hf_osd.system.forks import released
from hf_osd.system.random_state import isolated_random_state

logger = logging.getLogger(__name__)

_COUNTS = ("updates", "failed", "learned_tokens", "seconds")  # of a restart


class Learner:
    """Trains a draft on a buffer, in the caller's thread.

    What is learnt serves if the [`Gate`] lets it. An update that fails leaves no trace but its count: learning goes back to where it was, forgets the requests
    that it broke on, and rests the longer, the more often in a row that happens.

    In a job of several processes all learn one draft, each from its own buffer, and at the same moments alone: no update falls due by itself, and
    `update` and `update_together` are to be called on all ranks. What an update learns, says and is judged by is then of all ranks together.

    Args:
        student (`Student`): what learns, see [`hf_osd.distill.ensemble.make_student`]. Its config says when.
        buffer (`FeedbackBuffer`): where feedback comes from.
        serve (`Callable[[Mapping[str, Tensor]], None]`): takes the weights that are to serve, by name.
        alone (`bool`, defaults to `True`): no other thread draws random numbers while this one learns, so that it gives back the process's random
            state as it was. In the background that would repeat what others have drawn; nothing there draws from it but dropout. Alone, learning holds up
            serving, and keeps to its share of the time itself.

    Raises:
        ValueError: if this is one of several processes that cannot learn like that.
    """

    def __init__(
        self,
        student: Student,
        buffer: FeedbackBuffer,
        serve: Callable[[Mapping[str, Tensor]], None],
        alone: bool = True,
    ):
        self.student, self.buffer, self.config = student, buffer, student.config
        self.alone, config = alone, self.config
        self.ranks = RankGroup.of_job()
        if self.ranks.size > 1:
            check_job(self.ranks, alone)
        self._begun_together = False  # whether all ranks are known to have the same draft
        self.updates = self.failed = self.learned_tokens = 0  # updates that learnt, and that raised
        self.unmoved = 0  # the last ones in a row that learnt and changed nothing
        self.seconds = 0.0
        self.rate = Rate(config.learning_rate, adapter=any(".lora_" in name for name in student.trainable))
        self.schedule = Schedule(config, bounded=alone and self.ranks.size == 1)
        student.set_rate(self.rate.value)
        self.contenders = Contenders(student, self.ranks, serve, self.schedule.note_judging, self.schedule.thinned)
        # New requests learnt since, for as long as the buffer holds them; and what is to be learnt, and not judged by.
        self._since_accepted: weakref.WeakSet[Feedback] = weakref.WeakSet()
        self._rehearsed: weakref.WeakSet[Feedback] = weakref.WeakSet()
        self._drops = 0  # in a row
        self._generator = torch.Generator("cpu")
        if config.seed is None:
            self._generator.seed()  # its own: `torch.seed` would set the process's
        else:
            self._generator.manual_seed(config.seed + self.ranks.rank)
        self._lock = released(threading.Lock())

    def due(self) -> bool:
        """Whether enough requests wait. Never in a job of several processes: one of them must not begin."""
        return self.ranks.size == 1 and self._due()

    def _due(self) -> bool:
        new = self.buffer.new()
        if self.rate.found:
            return self.schedule.due(new)
        # To find a rate takes requests to try it on, and others to judge it by.
        return self.schedule.due([one for one in new if one not in self._rehearsed], times=2)

    def update(self, wait: bool = True, most: int | None = None) -> bool:
        """One update on what is new and its replay. `True` if other weights serve than before.

        Never raises for what happens inside learning: a failed update is logged and counted, the learner goes back to the weights that
        it had, with new optimizers. An interrupt passes through.

        In a job of several processes all ranks call this, and learn if there is anything new on one of them.

        Args:
            wait (`bool`): somebody asked for it: learn all that is new, whatever time that takes, and wait for another thread that learns. Else that is left
                to the other thread, and learning that holds up serving keeps to `learning_budget`.
            most (`int`, *optional*): requests to learn at once, replay included. Of what is new the oldest are then left to later replay, and a learner
                that falls behind its traffic serves what it learns as often as ever.
        """
        if self.ranks.parted or not self._lock.acquire(blocking=wait):
            return False
        start, changes = time.perf_counter(), self.contenders.changes
        self.schedule.begin(bounded=not wait)
        try:
            new = self.buffer.new()
            if self.ranks.any(bool(new)):
                self._update(new, most, bounded=not wait)
            return self.contenders.changes > changes
        except RanksParted as error:
            return self._parted(error)
        finally:
            seconds = time.perf_counter() - start
            self.seconds += seconds
            self.schedule.note_update(seconds)
            self._lock.release()

    def update_together(self, force: bool = False) -> bool:
        """[`hf_osd.OnlineAssistant.update_together`], of calls that have been taken in."""
        try:
            return not self.ranks.parted and self.ranks.any(force or self._due()) and self.update(wait=force)
        except RanksParted as error:
            return self._parted(error)

    def offer(self, feedback: Feedback):
        """Put a request into the buffer, to be judged by and then learnt."""
        self.buffer.add(feedback)

    def rehearse(self, answer: Feedback):
        """Put into the buffer what is to be learnt, and not judged by: its prompt has been learnt already."""
        self._rehearsed.add(answer)
        self.buffer.add(answer)

    def note_served(self, seconds: float):
        """A call took so long: what learning may take follows from that."""
        self.schedule.note_served(seconds)

    def figures(self) -> dict:
        """What [`hf_osd.metrics.stats.Stats`] says of learning, by its names there."""
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
        """What is wrong, if learning goes on and changes nothing."""
        return trouble(self.failed, self.updates, self.unmoved)

    def pause_by(self, pause: Callable[[], None]):
        """Call `pause` after each optimizer step and each judging."""
        self.student.on_step = self.contenders.pause = pause

    def serve(self):
        """Serve what may serve; without a gate what has been learnt."""
        self.contenders.serve()

    def take(self, weights: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None):
        """Go on learning from weights that were trained elsewhere; with `base`, in an adapter over other weights of the plain draft, by its names. They serve
        already, and are what later ones are compared with. An update that runs is waited for."""
        with self._lock:
            if base is not None:
                self.student.set_base(base)
            self.contenders.reset(weights)
            self._since_accepted, self._drops = weakref.WeakSet(), 0
            self._begun_together = False

    def after_fork(self) -> str | None:
        """In a forked child: why this cannot learn there; `None` if it can."""
        return "another thread was in the middle of an update" if self._lock.locked() else None

    def close(self):
        """Forget the requests of before; learning has ended."""
        self.contenders.remembered.clear()

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """What a restart needs: tensors, by member and name, and plain values. Between two updates: one that runs is waited for."""
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
        """Go on from `state()`. A candidate that was waiting is given up, and what has been learnt becomes one after the next update.

        Raises:
            ValueError: if the state is that of another draft, or of another number of members.
        """
        with self._lock, isolated_random_state():  # a Trainer seeds the process's
            accepted = {n.removeprefix("accepted."): t for n, t in tensors.items() if n.startswith("accepted.")}
            members = {n: t for n, t in tensors.items() if not n.startswith("accepted.") and n != "draws"}
            self.student.load_state(members, values)
            self._generator.set_state(tensors["draws"].cpu())
            for name in _COUNTS:
                setattr(self, name, values[name])
            self.schedule.misses = values["misses"]
            self.rate.load_state(values["rate"])
            self.student.set_rate(self.rate.value)
            self.contenders.load_state(accepted, values["contenders"])
            self._since_accepted, self._drops = weakref.WeakSet(), 0
            self._begun_together = False

    def _parted(self, error: RanksParted) -> bool:
        logger.error("This rank learns no more, and its draft serves on as it is. %s", error)
        return False

    # One update.

    def _update(self, new: list[Feedback], most: int | None, bounded: bool):
        """Steps 2 to 5 of an update, see above."""
        self._check_beginning()
        served = [one for one in new if one not in self._rehearsed]
        if not self.rate.found and not self._may_find_rate(served):
            return  # nothing to try a rate on, or to judge it by; it stays new
        self.buffer.mark_seen(new)  # also if learning fails: what broke it once must not break it for ever
        if most is not None:
            new, served = new[-most:], served[-most:]
        if self.rate.found:
            served = self.schedule.within(served, 1.0, bounded)  # three drafts' forwards are as learning once
        before = self.student.snapshot()
        try:
            with self._apart():
                if self.rate.found:
                    self._see_through(*self.contenders.decide(served))
                else:
                    self._find_rate(served, bounded)
        except Exception as error:
            self._undo(error, new, before)
            return
        except BaseException:  # an interrupt: of the rates that were tried nothing is left
            self.student.restore(before)
            self.student.set_rate(self.rate.value)
            raise
        self.contenders.remember(served)
        if not self.schedule.rests():
            self._learn(new, most, bounded)

    def _see_through(self, verdict: Verdict, gained: bool):
        """What becomes of the rate, and of what was learnt, with a candidate."""
        if verdict is Verdict.ACCEPT:
            self._since_accepted, self._drops = weakref.WeakSet(), 0
            if gained:
                self.rate.higher()
        elif verdict is Verdict.DROP:
            self._drops += 1
            self.rate.lower()
            logger.warning(
                "What was learnt made the draft worse on requests that it had not learnt yet, and is dropped; the learning rate is %.1e now.",
                self.rate.value,
            )
            if self._drops > 1:  # a slower rate did not mend it: what was learnt may be what is wrong
                self.buffer.discard(list(self._since_accepted))
            self._since_accepted = weakref.WeakSet()
        self.student.set_rate(self.rate.value)

    def _find_rate(self, new: list[Feedback], bounded: bool):
        """Learn from the first half of `new` at several rates, and go on from what does best on the other half."""
        half = len(new) // 2
        taught, judged = new[:half], self.schedule.within(new[half:], 1.0, bounded)
        start = self.student.snapshot()
        with self.ranks.together():
            static = self.contenders.judge(judged, self.contenders.static)
        before = self._gathered(static)
        rates = self.rate.to_try(before)
        taught = self.schedule.within(taught, rates, bounded)
        if not len(before):
            return  # nobody can be judged by these
        tokens, beside = (rates * self.schedule.tokens(part) for part in (taught, judged))
        most = self.schedule.passes(round(self.config.passes), tokens, bounded, beside)
        trials: list[Trial] = []
        best: tuple[Point, list[Judged]] | None = None
        for rate in self.rate.ladder:
            self.student.restore(start)
            self.student.set_rate(rate)
            done = 0
            for passes in sorted({min(n, most) for n in self.rate.tried_passes}):
                try:
                    self._train(taught * (passes - done))
                    done, point = passes, self.contenders.point()
                except ArithmeticError:  # too fast by far
                    break
                with self.ranks.together():
                    said = self.contenders.judge(judged, point)
                trials.append(Trial(rate, passes, self._gathered(said)))
                if self.rate.prefers(trials[-1], before):
                    best = point, said
            if self.rate.is_enough(before):
                break
        if best is None:
            raise ArithmeticError("The loss was not finite at any learning rate that was tried.")
        self.rate.settle(len(trials), before, most)
        logger.info("Learning rate %.1e: %s.", self.rate.value, self.rate.reason)
        self.student.set_rate(self.rate.value)
        self.student.restore(best[0].snapshot)
        self._since_accepted = weakref.WeakSet(taught)
        self._see_through(*self.contenders.choose(best[0], len(trials), static, best[1]))

    def _may_find_rate(self, new: list[Feedback]) -> bool:
        """Whether there is something to try rates on, and to judge them by, which all ranks answer alike."""
        taught, judged = self.ranks.sum(len(new) // 2, len(new) - len(new) // 2)
        return min(taught, judged) > 0

    def _gathered(self, said: list[Judged]) -> Tensor:
        """Σ min(p, q) at all positions of all ranks that have a target, request by request: `(N,)`."""
        parts = self.ranks.gather([judged.shared[~judged.overlap.isnan()].nan_to_num(0.0) for judged in said])
        return torch.cat([torch.zeros(0, dtype=torch.float32, device="cpu"), *parts])

    def _learn(self, new: list[Feedback], most: int | None, bounded: bool):
        config = self.config
        passes = min(self.rate.passes or config.passes, config.passes)
        count = round((passes - 1) * len(new))
        if most is not None:
            count = min(count, most - len(new))
        # After a failure without replay: what broke the update may be in it, and would break every other one.
        count = 0 if self.schedule.misses else count
        replayed = self.buffer.sample(count, self._generator)
        requests = what_is_read(self.schedule.fitting(new, replayed, bounded), config, self._generator)
        rows = sum(request.num_teaching(config.positions) for request in requests)
        rows = int(self.ranks.sum(rows)[0])
        if not rows:
            return  # nothing but accepted drafts, where errors alone teach; or no time
        before = self.student.snapshot()
        first = not self.updates
        try:
            with self._apart():
                self.student.prepare()
                start = time.perf_counter()
                self.student.count_losses(new, self.ranks)
                self._train(requests)
                if self.contenders.gate is None:
                    with self.ranks.together():
                        self.contenders.serve()
                self.contenders.propose()
        except Exception as error:
            self._undo(error, new, before)
            return
        except BaseException:  # an interrupt: what is saved after it must not be learnt by halves
            self.student.undo(before)
            raise
        self.schedule.note_learned(self.schedule.tokens(requests), time.perf_counter() - start, first)
        self.schedule.succeeded()
        self.updates += 1
        self.unmoved = 0 if self.student.has_moved(before) else self.unmoved + 1
        self.learned_tokens += rows
        self._since_accepted.update(new)

    def _train(self, requests: list[Feedback]):
        """Pass once over `requests`.

        Raises:
            ArithmeticError: if the loss is not finite.
        """
        self.student.learn(what_is_read(requests, self.config, self._generator))
        self.ranks.agree_on(self.student.failure)
        self._check_losses()

    def _undo(self, error: Exception, new: list[Feedback], before: Any):
        """Be as before an update that failed, and rest before the next."""
        if isinstance(error, RanksParted):
            raise error
        self.failed += 1
        rest = self.schedule.failed()
        self.buffer.discard(new)
        self.contenders.remembered.discard(new)
        self.student.undo(before)
        if self.ranks.size > 1:
            self.contenders.serve_again()  # it may have been another rank that could not take the new weights
        logger.error(
            "An update failed; the serving draft is as it was, and learning goes on from it. %s",
            f"The next {rest} updates are left out." if rest else "The next one comes as usual.",
            exc_info=error,
        )

    def _check_beginning(self):
        if not self._begun_together and not self.ranks.same(self.student.weights()):
            raise ValueError(
                "The ranks began with different drafts. Load the same one on each of them, and seed whatever of it is random the same."
            )
        self._begun_together = True

    def _check_losses(self):
        sums = self.ranks.sum(*itertools.chain.from_iterable(self.student.last_losses))
        losses = [total / rows if rows else math.nan for total, rows in zip(sums[::2], sums[1::2], strict=True)]
        if not all(map(math.isfinite, losses)):
            raise ArithmeticError(
                f"The loss of this update is {', '.join(map(str, losses))}. Lower the learning rate if that comes again."
            )

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Learning as if nobody were around it: generate runs under no_grad, users under inference_mode, autocast or a default device; and Trainer seeds the
        process's random state."""
        with (
            isolated_random_state() if self.alone else contextlib.nullcontext(),
            torch.inference_mode(False),
            torch.enable_grad(),
            learners_autocast(self.student.device.type, None),
            torch.autocast("cpu", enabled=False),  # feedback lies there, wherever the draft does
            default_device("cpu"),  # and a Trainer's own tensors
        ):
            yield
