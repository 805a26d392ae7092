"""`BackgroundLearner`: runs a [`Learner`] in a thread of its own, which takes no more than its share of the time while somebody is served."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from hf_osd.feedback.feedback import Feedback
from hf_osd.learning.learner import Learner
from hf_osd.learning.throttle import Stopped, Throttle
from hf_osd.system.default_device import default_device
from hf_osd.system.forks import importing
from hf_osd.system.random_state import isolated_random_state
from hf_osd.system.threads import start_thread

logger = logging.getLogger(__name__)

# Threads that are started in place of dead ones, with no update that ended well in between.
_MOST_RESTARTS = 5
# Seconds that `close` waits for the thread, which ends at its next step.
_PATIENCE = 60.0


class BackgroundLearner:
    """Runs a [`Learner`] beside serving: `add` and `update` return at once, and a thread learns when an update is due.

    A thread that ends for whatever reason is made anew at the next call of `update`, and counted in `restarts`; it waits longer then, as after an update
    that failed, and after some deaths in a row learning is over. The thread ends with `close`, with the process, and when nobody holds this
    object any more. Everything else that a learner has is the attribute `learner`'s.

    Args:
        learner (`Learner`): made with `alone=False`; what it calls is called from the thread.
        busy (`Callable[[], bool]`): tells whether somebody is served.
        after_update (`Callable[[], None]`, *optional*): called from the thread after each update, whatever came of it.
        clock (`Callable[[], float]`, *optional*): measures the work that the budget is for; wall time by default, which counts the waiting for cores too.

    Raises:
        ValueError: if the learner takes itself to be alone.
    """

    def __init__(
        self,
        learner: Learner,
        busy: Callable[[], bool],
        after_update: Callable[[], None] | None = None,
        clock: Callable[[], float] | None = None,
    ):
        if learner.alone:
            raise ValueError("The learner takes itself to be alone; make it with Learner(..., alone=False).")
        self.learner, self._after_update = learner, after_update
        self._most = learner.config.requests_an_update
        self.throttle = Throttle(learner.config.share_of_time(learner.config.learn), busy, clock)
        learner.pause_by(self.throttle.pause, self.throttle.begin)
        self.restarts, self._prepared = 0, False
        self._deaths = self._updates_then = 0  # in a row without an update between; updates at the last one
        self._over: str | None = None  # why no thread is started any more
        self._wake, self._imported = threading.Event(), threading.Event()
        self._starting, self._preparing = threading.Lock(), threading.Lock()
        self._thread: threading.Thread | None = None
        # Garbage collection comes anywhere, under any lock, so it waits for nothing.
        self._end = weakref.finalize(self, _stop, self.throttle, self._wake)

    def add(self, feedback: Feedback):
        """Put a request into the buffer, and learn from it when that is due."""
        self.learner.add(feedback)
        if self.is_due():
            self.update(wait=False)

    def rehearse(self, answer: Feedback):
        self.learner.rehearse(answer)

    def replay(self, requests: list[Feedback]):
        self.learner.replay(requests)

    def is_due(self) -> bool:
        return self.learner.is_due()

    def update(self, wait: bool = True) -> bool:
        """Wake the thread; with `wait`, learn from all that is new, here and now, as fast as it goes. `True` if other weights serve than before."""
        if wait or self._imported.is_set():
            try:
                self.prepare()
            except Exception:  # in the middle of somebody's call, maybe
                self.learner.failed += 1
                self.learner.schedule.failed()
                # Else an update stays due, and this is tried again at the next call.
                self.learner.buffer.mark_seen(self.learner.buffer.new())
                logger.exception(
                    "The trainer could not be made; the serving draft is as it was, and it is tried again after more requests."
                )
                return False
        if not wait:
            self._start()
            self._wake.set()
            return False
        with self._unthrottled(), contextlib.suppress(Stopped):  # closed meanwhile
            return self.learner.update(wait=True)
        return False

    def load_weights(self, weights: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None):
        with self._unthrottled():
            self.learner.load_weights(weights, base)

    def note_served(self, seconds: float):
        self.learner.note_served(seconds)

    def trouble(self) -> str | None:
        return self.learner.trouble()

    def serve(self):
        self.learner.serve()

    def state(self) -> tuple[dict[str, Tensor], dict]:
        with self._unthrottled():
            return self.learner.state()

    def load_state(self, tensors: Mapping[str, Tensor], values: dict):
        with self._unthrottled():
            self.learner.load_state(tensors, values)

    def close(self):
        """End the thread, in the middle of an update if there is one."""
        self._end()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_PATIENCE)
            if thread.is_alive():
                logger.warning("The learner's thread has not stopped within %d s, and is left to itself.", _PATIENCE)
        self.learner.close()

    def metrics(self) -> dict:
        return self.learner.metrics() | {"learner_restarts": self.restarts, "learning_over": self._over}

    def after_fork(self) -> str | None:
        """Explain, in a forked child, why this cannot learn there; `None` if it can."""
        if self._thread is None and not self._preparing.locked():
            return self.learner.after_fork()
        self._end.detach()  # else the end of the child would wake a thread that is not there
        return "its thread is not in this process"

    def prepare(self):
        """Make the trainers here and now. The thread imports their modules, which takes seconds; but it must not make them: Trainer then seeds the
        process's random state, and restoring that from another thread would repeat numbers that this one has drawn meanwhile."""
        with self._preparing:
            if self._prepared:
                return
            with isolated_random_state(), default_device("cpu"):
                self.learner.student.prepare()
            self._prepared = True

    @contextlib.contextmanager
    def _unthrottled(self) -> Iterator[None]:
        """Let the update that runs, if one does, finish without pauses: somebody waits for it."""
        self.throttle.unthrottle()
        try:
            yield
        finally:
            self.throttle.unthrottle(False)

    def _start(self):
        with self._starting:
            if self.throttle.stopped or self._over or (self._thread is not None and self._thread.is_alive()):
                return
            if self._thread is not None and not self._may_restart():
                return
            self._thread = start_thread(
                _run,
                (weakref.ref(self), self.throttle, self._wake, self._imported),
                functools.partial(_stop, self.throttle, self._wake),
            )

    def _may_restart(self) -> bool:
        self._deaths = self._deaths + 1 if self.learner.updates == self._updates_then else 1
        self._updates_then = self.learner.updates
        if self._deaths > _MOST_RESTARTS:
            self._over = f"the learner's thread has died {self._deaths} times in a row"
            logger.error("The draft serves as it is and learns no more: %s; what it died of is on stderr.", self._over)
            return False
        self.restarts += 1
        self.learner.schedule.failed()
        logger.error("The learner's thread was dead; another one takes over, and the serving draft is as it was.")
        return True

    def _learn(self):
        """Learn for as long as updates are due; the thread does this each time it is woken."""
        while self._prepared and self.is_due():
            self.throttle.begin()
            self.learner.update(wait=True, most=self._most)
            if self._after_update is not None:
                self._after_update()
            self.throttle.pause()  # for what came after the last step


def _run(owner: weakref.ref, throttle: Throttle, wake: threading.Event, imported: threading.Event):
    """Run the thread, which holds its owner only while it learns."""
    try:
        with importing():
            import hf_osd.distill.callbacks
            import hf_osd.distill.trainer  # noqa: F401
    except Exception:
        if throttle.stopped or not threading.main_thread().is_alive():
            return  # the process ends, and lets nothing be imported any more
        raise
    imported.set()
    while True:
        wake.wait()
        wake.clear()
        learner = owner()
        if learner is None or throttle.stopped:
            return
        try:
            learner._learn()
        except Stopped:
            return
        del learner


def _stop(throttle: Throttle, wake: threading.Event):
    throttle.stop()
    wake.set()
