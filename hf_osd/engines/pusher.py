"""`DraftPusher` brings a learner's weights into running engines: saved to folders, pushed to each engine by itself, compared by the engine's own counters, taken back where it accepts less."""

from __future__ import annotations

import logging
import math
import random
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_osd.engines.servers import Counted, PushFailed

if TYPE_CHECKING:
    from hf_osd.engines.servers import EngineServer

logger = logging.getLogger(__name__)

# Seconds between two tries after a failure: the first, and the most; each is twice the one before, less up to a half at random, so that many sidecars do not try at once.
_FIRST_WAIT, _LONGEST_WAIT = 2.0, 300.0
# Seconds between two looks at the engines' counters.
_LOOK = 5.0
# Seconds that closing waits for a push.
_PATIENCE = 30.0
# Standard deviations from which a fall of acceptance is no chance: one in 1,500 looks, one-sided.
_SURE = 3.2
# Times as much as for independent tokens that shares of accepted tokens vary: those of one answer are alike.
_ALIKE = 4.0


@dataclass
class _Engine:
    """What is known of one engine."""

    server: EngineServer
    pushed: int | None = None  # the number of the draft in it; `None` for the one that it was started with
    failures: int = 0  # in a row
    failed: int = 0
    pushes: int = 0
    taken_back: int = 0
    next_try: float = 0.0
    error: str | None = None
    refuses: bool = False  # whatever is pushed
    last: Counted | None = None  # as last read
    start: Counted | None = None  # when the draft that serves came
    before: Counted | None = None  # what was counted with the one before
    judged: bool = True
    seen: dict[str, float] = field(default_factory=dict)


class DraftPusher:
    """Pushes in a thread of its own. A failed push leaves the engine's draft as it was, and is tried again; nobody's request waits for it but in the engine's own pause.

    Args:
        servers (`Sequence[EngineServer]`): the engines.
        folder (`Path`): where drafts are saved, as `draft-<n>`; the engines must see it under the same path. Older ones are removed.
        judge_drafts (`int`): rounds that an engine must have drafted with each of two drafts before they are compared; 0 never compares.
        initial (`Path`, *optional*): the draft that the engines were started with, to go back to.
        clock (`Callable`): the time in seconds.
        threaded (`bool`): without a thread the caller calls `step`.

    Attributes:
        on_taken_back (`Callable[[], None]`, *optional*): called when weights have been taken back.
    """

    def __init__(
        self,
        servers: Sequence[EngineServer],
        folder: Path,
        *,
        judge_drafts: int = 500,
        initial: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        threaded: bool = True,
    ):
        self.folder, self.judge_drafts, self.on_taken_back = Path(folder), judge_drafts, None
        self._clock, self._random = clock, random.Random()
        self._engines = [_Engine(server) for server in servers]
        self._offered: Callable[[Path], None] | None = None
        self._lock, self._work, self._ends = threading.Lock(), threading.Event(), threading.Event()
        self._number = max(saved_drafts(self.folder), default=0)
        self._current: int | None = None  # the draft that all engines should have
        self._initial = initial  # has the number 0
        self._previous: int | None = None if initial is None else 0  # the one before, to go back to
        self._save_failures, self._save_next, self._save_error = 0, 0.0, None
        self._next_look = 0.0
        self._thread = threading.Thread(target=self._run, name="hf_osd pusher", daemon=True) if threaded else None
        if self._thread is not None:
            self._thread.start()

    def offer(self, save: Callable[[Path], None]):
        """Ask for newer weights to be pushed; returns at once. Of several that wait only the newest are saved.

        Args:
            save (`Callable`): writes them into a folder; called from the pusher's thread.
        """
        with self._lock:
            self._offered = save
        self._work.set()

    def status(self) -> dict[str, dict[str, Any]]:
        """Return by engine what was pushed, what failed, and the acceptance with the draft that serves and the one before."""
        now = self._clock()
        return {
            engine.server.url: {
                "draft": engine.pushed,
                "pushes": engine.pushes,
                "failures": engine.failed,
                "taken_back": engine.taken_back,
                "next_try_seconds": round(max(engine.next_try - now, 0.0), 1) if engine.failures else None,
                "error": engine.error or self._save_error,
                **engine.seen,
            }
            for engine in self._engines
        }

    def close(self):
        """Stop pushing; waits up to 30 s for a push that runs."""
        self._ends.set()
        self._work.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE)

    def _run(self):
        while not self._ends.is_set():
            self._work.wait(1.0)
            self._work.clear()
            if self._ends.is_set():
                return
            try:
                self.step()
            except Exception as error:  # whatever it is, the engines serve on
                logger.error("Pushing failed (%s: %s); it goes on.", type(error).__name__, error)

    def step(self):
        """Do all that is due: save what was offered, push it where it is lacking, look at the counters."""
        now = self._clock()
        if now >= self._save_next:
            self._save(now)
        looks = now >= self._next_look
        if looks:
            self._next_look = now + _LOOK
        for engine in self._engines:
            if self._ends.is_set():
                return
            if looks:
                self._look(engine)
            due = self._current is not None and engine.pushed != self._current
            if due and not engine.refuses and now >= engine.next_try:
                self._push(engine, now)

    # Saving.

    def _save(self, now: float):
        with self._lock:
            save, self._offered = self._offered, None
        if save is None:
            return
        number = self._number + 1
        partial, path = self.folder / f".draft-{number}.partial", self.folder / f"draft-{number}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save(partial)
            partial.rename(path)  # a sidecar that starts again sees whole folders alone
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            with self._lock:
                self._offered = self._offered or save
            self._save_failures += 1
            wait = self._wait(self._save_failures)
            self._save_next, self._save_error = now + wait, f"saving failed: {error}"
            logger.error(
                "The draft cannot be saved to %s (%s); tried again in %.0f s. The engines serve on with theirs.",
                self.folder,
                error,
                wait,
            )
            return
        self._number, self._save_failures, self._save_error = number, 0, None
        if self._current is not None:
            self._previous = self._current
        self._current = number
        for engine in self._engines:
            engine.failures, engine.next_try = 0, now  # other weights may be taken
        self._tidy()

    def _tidy(self):
        """Remove folders that no engine serves or may go back to."""
        kept = {self._current, self._previous, *(engine.pushed for engine in self._engines)}
        for number, path in saved_drafts(self.folder).items():
            if number not in kept:
                shutil.rmtree(path, ignore_errors=True)

    # Pushing.

    def _push(self, engine: _Engine, now: float):
        try:
            engine.server.push(self._initial if self._current == 0 else self.folder / f"draft-{self._current}")
        except Exception as error:  # whatever it is, the others get theirs
            known = engine.error == str(error)  # and need not be logged again
            engine.failures += 1
            engine.failed += 1
            engine.error, engine.refuses = str(error), isinstance(error, PushFailed) and error.refused
            if engine.refuses:
                logger.error("No weights are pushed to %s: %s", engine.server.url, error)
                return
            wait = self._wait(engine.failures)
            engine.next_try = now + wait
            if not known:
                logger.warning("A push failed, and is tried again in %.0f s, and so on: %s", wait, error)
            return
        counted = self._count(engine)
        since = None if counted is None else counted.since(engine.start)
        # Else there is too little of the one before: the one before that stays what is compared with.
        if since is not None and (
            engine.before is None or since.rounds >= min(self.judge_drafts, engine.before.rounds)
        ):
            engine.before = since
        engine.start, engine.judged = counted, False
        engine.pushed, engine.failures, engine.error = self._current, 0, None
        engine.pushes += 1
        logger.info("Draft %d is in %s.", self._current, engine.server.url)
        self._tidy()

    def _wait(self, failures: int) -> float:
        return min(_FIRST_WAIT * 2 ** min(failures - 1, 20), _LONGEST_WAIT) * self._random.uniform(0.5, 1.0)

    # Judging.

    def _count(self, engine: _Engine) -> Counted | None:
        counted = engine.server.acceptance()
        if counted is not None:
            engine.last = counted
        return counted

    def _look(self, engine: _Engine):
        """Read an engine's counters: has it begun anew, and does it accept less than before?"""
        before, counted = engine.last, self._count(engine)
        if counted is None:
            return
        # It has begun anew, with the draft that it is started with.
        if before is not None and counted.rounds < before.rounds:
            if engine.pushed is not None:
                logger.warning("%s has begun anew; it gets draft %s again.", engine.server.url, self._current)
            engine.pushed, engine.start, engine.before, engine.judged, engine.refuses = None, None, None, True, False
            engine.failures, engine.next_try = 0, self._clock()
            return
        now = counted.since(engine.start)
        lengths = {"acceptance_length": now, "acceptance_length_before": engine.before}
        engine.seen = {
            name: round(one.mean_length, 4) for name, one in lengths.items() if one is not None and one.rounds
        }
        if engine.judged or engine.before is None or not self.judge_drafts:
            return
        if min(now.rounds, engine.before.rounds) < self.judge_drafts:
            return
        engine.judged = True
        if fell(engine.before, now) and engine.pushed == self._current:
            self._take_back(engine)

    def _take_back(self, engine: _Engine):
        """Go back to the draft before, on all engines; the one taken back is removed, so that a restart does not begin with it."""
        engine.taken_back += 1
        bad = self._current
        if self._previous is None:
            self._current = None  # none is to be pushed: an engine that begins anew keeps what it is started with
            logger.warning(
                "%s accepts less of draft %d than of what it was started with, which the sidecar has not got; the next weights are awaited.",
                engine.server.url,
                bad,
            )
        else:
            self._current, self._previous = self._previous, None
            logger.warning(
                "%s accepts less of draft %d than of draft %d, which comes back.",
                engine.server.url,
                bad,
                self._current,
            )
        shutil.rmtree(self.folder / f"draft-{bad}", ignore_errors=True)  # or a restart would begin with it
        for one in self._engines:
            one.failures, one.next_try = 0, self._clock()
        if self.on_taken_back is not None:
            self.on_taken_back()


def saved_drafts(folder: Path) -> dict[int, Path]:
    """List the drafts that were saved in a folder, by number."""
    numbered = ((path.name.removeprefix("draft-"), path) for path in folder.glob("draft-*"))
    return {int(number): path for number, path in numbered if number.isdigit()}


def fell(before: Counted, after: Counted) -> bool:
    """Tell whether the share of drafted tokens that were accepted fell beyond chance: a two-proportion test, with the variance raised for tokens of one answer, which are alike."""
    if not before.drafted or not after.drafted:
        return False
    a, b = before.accepted / before.drafted, after.accepted / after.drafted
    pooled = (before.accepted + after.accepted) / (before.drafted + after.drafted)
    spread = math.sqrt(_ALIKE * pooled * (1 - pooled) * (1 / before.drafted + 1 / after.drafted))
    return spread > 0 and (a - b) / spread > _SURE
