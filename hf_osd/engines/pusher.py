"""`DraftPusher` brings a learner's weights into running engines: saved to folders, pushed to each engine by itself, compared by the engine's own counters, taken back where it accepts less."""

from __future__ import annotations

import logging
import random
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_osd.engines.judgement import Judgement
from hf_osd.engines.servers import PushFailed

if TYPE_CHECKING:
    from hf_osd.engines.counters import Counted
    from hf_osd.engines.servers import EngineServer

logger = logging.getLogger(__name__)

# Seconds between two tries after a failure: the first, and the most; each is twice the one before, less up to a half at random, so that many sidecars do not try at once.
_FIRST_WAIT, _LONGEST_WAIT = 2.0, 300.0
# Seconds between two looks at the engines' counters.
_LOOK = 5.0
# Seconds that closing waits for a push.
_PATIENCE = 30.0


@dataclass
class _Engine:
    """What is known of one engine."""

    server: EngineServer
    judgement: Judgement
    pushed: int | None = None  # the number of the draft in it; `None` for the one that it was started with
    failures: int = 0  # in a row
    failed: int = 0
    pushes: int = 0
    taken_back: int = 0
    next_try: float = 0.0
    error: str | None = None
    refuses: bool = False  # whatever is pushed
    counted: Counted | None = None  # as last read
    answers: bool = False  # to that reading


class DraftPusher:
    """Pushes in a thread of its own, and reads the engines' counters. A failed push leaves the engine's draft as it was, and is tried again; nobody's request waits for it but in the engine's own pause.

    Args:
        servers (`Sequence[EngineServer]`): the engines.
        folder (`Path`): where drafts are saved, as `draft-<n>`; the engines must see it under the same path. Older ones are removed.
        judge_drafts (`int`): rounds that an engine must have drafted with each of two drafts before they are compared.
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
        self._engines = [_Engine(server, Judgement(judge_drafts)) for server in servers]
        self._offered: Callable[[Path], None] | None = None
        self._lock, self._work, self._ends = threading.Lock(), threading.Event(), threading.Event()
        self._number = max(saved_drafts(self.folder), default=0)
        self._current: int | None = None  # the draft that all engines should have
        self._initial = initial  # has the number 0
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

    def acceptance(self) -> dict[str, Counted | None]:
        """Return each engine's counters, by its URL, as last read; `None` if it was down, or does not speculate."""
        return {engine.server.url: engine.counted if engine.answers else None for engine in self._engines}

    def status(self) -> dict[str, dict[str, Any]]:
        """Return by engine what was pushed, what failed, and the acceptance with the draft that serves and those before."""
        now = self._clock()
        return {
            engine.server.url: {
                "draft": engine.pushed,
                "pushes": engine.pushes,
                "failures": engine.failed,
                "taken_back": engine.taken_back,
                "next_try_seconds": round(max(engine.next_try - now, 0.0), 1) if engine.failures else None,
                "error": engine.error or self._save_error,
                **_lengths(engine.judgement),
            }
            for engine in self._engines
        }

    def close(self):
        """Stop pushing; waits up to 30 s for a push that runs. No engine is left paused."""
        self._ends.set()
        self._work.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE)
        for engine in self._engines:
            try:
                engine.server.resume()
            except Exception as error:  # whatever it is, the others are resumed
                logger.error("%s", error)

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
        self._current = number
        for engine in self._engines:
            engine.failures, engine.next_try = 0, now  # other weights may be taken
        self._tidy()

    def _tidy(self):
        """Remove folders that no engine serves or may go back to."""
        engines = self._engines
        kept = {self._current, *(one.pushed for one in engines), *(one.judgement.proven for one in engines)}
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
        if not self._read(engine):
            return  # it has begun anew meanwhile, and may have lost them
        engine.judgement.replace(self._number_of(engine), self._current)
        engine.pushed, engine.failures, engine.error = self._current, 0, None
        engine.pushes += 1
        logger.info("Draft %d is in %s.", self._current, engine.server.url)
        self._tidy()

    def _wait(self, failures: int) -> float:
        return min(_FIRST_WAIT * 2 ** min(failures - 1, 20), _LONGEST_WAIT) * self._random.uniform(0.5, 1.0)

    def _number_of(self, engine: _Engine) -> int | None:
        """Return the number of the draft in an engine; `None` if we have not got it."""
        return 0 if engine.pushed is None and self._initial is not None else engine.pushed

    # Judging.

    def _read(self, engine: _Engine) -> bool:
        """Read an engine's counters; `False` if they show that it has begun anew, with the draft that it is started with."""
        before, counted = engine.counted, engine.server.acceptance()
        engine.answers = counted is not None
        if counted is None:
            return True
        engine.counted, began_anew = counted, before is not None and counted.began_after(before)
        if began_anew:
            if engine.pushed is not None:
                logger.warning("%s has begun anew; it gets draft %s again.", engine.server.url, self._current)
            engine.judgement, engine.pushed, engine.refuses = Judgement(self.judge_drafts), None, False
            engine.failures, engine.next_try = 0, self._clock()
        engine.judgement.add(counted.since(before))
        return not began_anew

    def _look(self, engine: _Engine):
        """Read an engine's counters, and take its draft back if it accepts less of it than before."""
        self._read(engine)
        if engine.judgement.has_fallen() and engine.pushed == self._current:
            self._take_back(engine)

    def _take_back(self, engine: _Engine):
        """Go back to the draft before, on all engines; the one taken back is removed, so that a restart does not begin with it."""
        engine.taken_back += 1
        bad, proven = self._current, engine.judgement.proven
        # Another engine may have had that one taken back.
        if proven is None or not (self._initial if proven == 0 else self.folder / f"draft-{proven}").is_dir():
            self._current = None  # none is to be pushed: an engine that begins anew keeps what it is started with
            logger.warning(
                "%s accepts less of draft %d than of what it had before, which the sidecar has not got; the next weights are awaited.",
                engine.server.url,
                bad,
            )
        else:
            self._current = proven
            logger.warning(
                "%s accepts less of draft %d than of draft %d, which comes back.", engine.server.url, bad, proven
            )
        shutil.rmtree(self.folder / f"draft-{bad}", ignore_errors=True)  # or a restart would begin with it
        self._tidy()  # nor with one that was judged with it
        for one in self._engines:
            one.failures, one.next_try = 0, self._clock()
        if self.on_taken_back is not None:
            self.on_taken_back()


def saved_drafts(folder: Path) -> dict[int, Path]:
    """List the drafts that were saved in a folder, by number."""
    numbered = ((path.name.removeprefix("draft-"), path) for path in folder.glob("draft-*"))
    return {int(number): path for number, path in numbered if number.isdigit()}


def _lengths(judgement: Judgement) -> dict[str, float]:
    """Compute the mean acceptance lengths of the drafts that serve and of those before, as far as there are any."""
    now, before = (judgement.before, None) if judgement.after is None else (judgement.after, judgement.before)
    lengths = {"acceptance_length": now, "acceptance_length_before": before}
    return {name: round(one.mean_length, 4) for name, one in lengths.items() if one is not None and one.rounds}
