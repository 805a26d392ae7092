"""`Rollback`: takes back what a candidate or an update that failed has done to weights, rate and buffer."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterable, Iterator

from hf_osd.distill.ranks import RanksParted
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.feedback import Feedback
from hf_osd.learning.contenders import Contenders
from hf_osd.learning.gate import Verdict
from hf_osd.learning.rate import Rate
from hf_osd.learning.schedule import Schedule

logger = logging.getLogger(__name__)


class UpdateFailed(Exception):
    """An update failed, and everything is as it was before it."""


class Rollback:
    """Follows the verdicts on candidates, and undoes updates that fail.

    1. A candidate that is accepted stays, and the rate rises if it was a gain.
    2. One that is dropped takes its weights with it ([`Contenders.decide`]), and the rate falls. If that happens twice in a row, a slower rate has not mended it,
       and the requests that were learnt since the accepted draft leave the buffer: they may be what is wrong.
    3. An update that fails leaves weights, optimizer and rate as they were, and learning rests. Its requests leave the buffer: what broke it once would break it
       again.

    Args:
        contenders (`Contenders`), buffer (`FeedbackBuffer`), rate (`Rate`), schedule (`Schedule`): the learner's.
    """

    def __init__(
        self,
        contenders: Contenders,
        buffer: FeedbackBuffer,
        rate: Rate,
        schedule: Schedule,
    ):
        self._contenders, self._student, self._ranks = contenders, contenders.student, contenders.ranks
        self._buffer, self._rate, self._schedule = buffer, rate, schedule
        self.begin()

    def begin(self, learnt: Iterable[Feedback] = ()):
        """Start from an accepted draft, since which these requests have been learnt."""
        # For as long as the buffer holds them.
        self._since_accepted = weakref.WeakSet(learnt)
        self._drops = 0  # in a row

    def note_learnt(self, requests: Iterable[Feedback]):
        """Remember requests that have been learnt since the accepted draft."""
        self._since_accepted.update(requests)

    def follow(self, verdict: Verdict, gained: bool):
        """Change rate and buffer by the verdict on a candidate; `gained` if that was better beyond chance."""
        if verdict is Verdict.ACCEPT:
            self.begin()
            if gained:
                self._rate.higher()
        elif verdict is Verdict.DROP:
            self._drops += 1
            self._rate.lower()
            logger.warning(
                "What was learnt made the draft worse on requests that it had not learnt yet, and is dropped; the learning rate is %.1e now.",
                self._rate.value,
            )
            if self._drops > 1:
                self._buffer.discard(list(self._since_accepted))
            self._since_accepted = weakref.WeakSet()
        self._student.set_rate(self._rate.value)

    @contextlib.contextmanager
    def attempt(self, requests: list[Feedback]) -> Iterator[None]:
        """Run a part of an update on `requests`, and undo it if it fails. An interrupt is undone as well, and passes through.

        Raises:
            UpdateFailed: in place of any error, which is logged.
            RanksParted: as it came; there is no going on after it.
        """
        before = self._student.snapshot()
        try:
            yield
        except RanksParted:
            raise
        except Exception as error:
            self._undo(before)
            self._forget(requests, error)
            raise UpdateFailed from error
        except BaseException:  # what is saved after an interrupt must not have been learnt by halves
            self._undo(before)
            raise

    def _undo(self, before):
        self._student.undo(before)
        self._student.set_rate(self._rate.value)  # several may have been tried

    def _forget(self, requests: list[Feedback], error: Exception):
        rest = self._schedule.failed()
        self._buffer.discard(requests)
        self._contenders.remembered.discard(requests)
        if self._ranks.size > 1:
            self._contenders.serve_again()  # it may have been another rank that could not take the new weights
        logger.error(
            "An update failed; the serving draft is as it was, and learning goes on from it. %s",
            f"The next {rest} updates are left out." if rest else "The next one comes as usual.",
            exc_info=error,
        )
