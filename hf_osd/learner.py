"""`Learner`: decides when to learn, on what, and what is to serve of it. Between it and the serving draft lies one refresh; whatever goes wrong
here leaves that draft as it was."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.buffer import FeedbackBuffer
from hf_osd.config import OnlineConfig
from hf_osd.distributed import Ranks, RanksParted, check_job
from hf_osd.ensemble import Ensemble
from hf_osd.feedback import Feedback
from hf_osd.gate import Gate, Rejected
from hf_osd.held_back import Estimate, HeldBack
from hf_osd.random_state import isolated_random_state
from hf_osd.scoring import learners_autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# After n updates in a row that came to nothing the next one waits for 2ⁿ times as many requests, at most for this many times.
_LONGEST_WAIT = 64
# An update whose mean loss is above this many times the largest of the last few has exploded.
_EXPLODED, _LAST_LOSSES = 4.0, 8
_COUNTS = ("updates", "failed", "rejected", "misses", "learned_tokens", "seconds")  # of a restart


class Learner:
    """Trains a draft on a buffer, in the caller's thread.

    What is learnt serves if the [`Gate`] lets it. An update that fails, explodes or is rejected leaves no trace but its count: learning goes back to
    where it was, forgets the requests that it broke on, and waits longer, the more often in a row that happens.

    In a job of several processes all learn one draft, each from its own buffer, and at the same moments alone: no update falls due by itself, and
    `update` and `update_together` are to be called on all ranks. What an update learns, says and is judged by is then of all ranks together.

    Args:
        draft (`PreTrainedModel`): the draft to start from; it is copied, and what does not train is shared with it.
        trainable (`set[str]`): names of the parameters that train. They are float32 here, whatever the draft serves in.
        buffer (`FeedbackBuffer`): where feedback comes from.
        config (`OnlineConfig`): when to learn, and how.
        serve (`Callable[[Mapping[str, Tensor]], None]`): takes the weights that are to serve, by name, after each update.
        after_step (`Callable[[], None]`, *optional*): called after each optimizer step and each judging, where learning is to pause.
        alone (`bool`, defaults to `True`): no other thread draws random numbers while this one learns, so that it gives back the process's random
            state as it was. In the background that would repeat what others have drawn; nothing there draws from it but dropout.

    Raises:
        ValueError: if this is one of several processes that cannot learn like that.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        trainable: set[str],
        buffer: FeedbackBuffer,
        config: OnlineConfig,
        serve: Callable[[Mapping[str, Tensor]], None],
        after_step: Callable[[], None] | None = None,
        alone: bool = True,
    ):
        self.buffer, self.config, self.trainable = buffer, config, trainable
        self._serve, self._after_step, self._alone = serve, after_step, alone
        self.ranks = Ranks.of_job()
        if self.ranks.size > 1:
            check_job(self.ranks, alone)
        self._begun_together = False  # whether all ranks are known to have the same draft
        # Updates that serve, that raised, and that the gate turned away.
        self.updates = self.failed = self.rejected = self.learned_tokens = 0
        self.misses = 0  # of the last two, in a row
        self.seconds = 0.0
        self.ensemble = Ensemble(draft, trainable, buffer, config, self, after_step, self.ranks)
        self.held = HeldBack(config.held_back_share, seed=config.seed)
        self.estimate: Estimate | None = None  # the last one
        self.gate: Gate | None = None
        if config.held_back_share:
            # Before any learning, in the dtype they came in, which holds them exactly.
            self._static = {name: p.detach().clone() for name, p in draft.named_parameters() if name in trainable}
            self.gate = Gate(self.held, config.gate_tolerance, self._scores, self._scores_of_static, self.ranks)
        self._checked = self.ensemble.snapshot() if self.gate else []  # at the last full check
        self._since_check: list[Feedback] = []  # new requests learnt since
        self._checks_failed = 0  # in a row
        self._update_rows = 0  # of the update that runs
        self._last_losses: deque[float] = deque(maxlen=_LAST_LOSSES)
        self._generator = torch.Generator()
        if config.seed is None:
            self._generator.seed()  # its own: `torch.seed` would set the process's
        else:
            self._generator.manual_seed(config.seed + self.ranks.rank)
        self._lock = threading.Lock()

    def due(self) -> bool:
        """Whether enough requests or tokens wait, or one has waited long enough. Never in a job of several processes: one of them must not begin."""
        return self.ranks.size == 1 and self._due()

    def _due(self) -> bool:
        new, config = self.buffer.new(), self.config
        if not new:
            return False
        wait = self._wait
        return (
            len(new) >= config.update_interval * wait
            or (config.update_tokens is not None and sum(map(len, new)) >= config.update_tokens * wait)
            or (config.update_age is not None and time.monotonic() - new[0].created >= config.update_age * wait)
        )

    @property
    def _wait(self) -> int:
        """How many times as much as usual must wait for the next update."""
        return min(2**self.misses, _LONGEST_WAIT)

    def update(self, wait: bool = True, most: int | None = None) -> bool:
        """One update on what is new and its replay. `True` if the serving draft was refreshed.

        Never raises for what happens inside learning: a failed update is logged and counted, the learner goes back to the weights that
        it had, with new optimizers. An interrupt passes through.

        In a job of several processes all ranks call this, and learn if there is anything new on one of them.

        Args:
            wait (`bool`): while another thread learns, wait for it; else leave the learning to it.
            most (`int`, *optional*): requests to learn at once, replay included. Of what is new the oldest are then left to later replay, and a learner
                that falls behind its traffic serves what it learns as often as ever.
        """
        if self.ranks.parted or not self._lock.acquire(blocking=wait):
            return False
        start = time.perf_counter()
        try:
            new = self.buffer.new()
            return self.ranks.any(bool(new)) and self._update(new, most)
        except RanksParted as error:
            return self._parted(error)
        finally:
            self.seconds += time.perf_counter() - start
            self._lock.release()

    def update_together(self, force: bool = False) -> bool:
        """[`hf_osd.distributed.update_together`], of calls that have been taken in."""
        try:
            return not self.ranks.parted and self.ranks.any(force or self._due()) and self.update()
        except RanksParted as error:
            return self._parted(error)

    def judge(self, feedback: list[Feedback], wait: bool = True) -> list[tuple[Tensor, Tensor]] | None:
        """Expected acceptance and confidence on `feedback` of what is to serve, see [`hf_osd.scoring.judge`]; `None` if another thread
        learns and `wait` is not set."""
        if not self._lock.acquire(blocking=wait):
            return None
        try:
            return self.ensemble.judge(feedback)
        finally:
            self._lock.release()

    def offer(self, feedback: Feedback) -> bool:
        """Put a request into the buffer, or hold it back from learning, to judge by. Whether it is to be learnt."""
        held = self.held.take(feedback, self._as_judged)
        if not held:
            self.buffer.add(feedback)
        return not held

    def figures(self) -> dict:
        """What [`hf_osd.stats.Stats`] says of learning, by its names there."""
        return {
            "updates": self.updates,
            "failed_updates": self.failed,
            "rejected_updates": self.rejected,
            "learned_tokens": self.learned_tokens,
            "learning_seconds": self.seconds,
            "held_back": len(self.held),
            "estimate": self.estimate,
        }

    def refresh(self, model: nn.Module | None = None):
        """Serve what has been learnt, if it may. [`RefreshAssistantCallback`] calls this when the last member has been trained.

        Raises:
            Rejected: if the gate turns it away.
            ArithmeticError: if the loss of this update is not finite, or has exploded.
        """
        self.ranks.agree_on(
            next((member.failure for member in self.ensemble.members if member.failure is not None), None)
        )
        self._check_losses()
        estimate = None
        if self.gate is not None:
            estimate = self.gate.check(self.learned_tokens + self._update_rows, self._update_rows)
        with self.ranks.together():
            self.serve()
        if estimate is not None:
            self.estimate = estimate
            self._checked = self.ensemble.snapshot()
            self._since_check, self._checks_failed = [], 0

    def serve(self):
        """Serve what has been learnt, whatever the gate would say."""
        self._serve(self.ensemble.serving_weights())

    def take(self, weights: Mapping[str, Tensor]):
        """Go on learning from weights that were trained elsewhere."""
        with self._lock:
            self.ensemble.set_weights(weights)
            self._trust()
            self._begun_together = False

    def close(self):
        """Forget what is held back; learning has ended."""
        self.held.clear()

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """What a restart needs: tensors, by member and name, and plain values. Between two updates: one that runs is waited for."""
        with self._lock:
            tensors, values = self.ensemble.state()
            return tensors | {"draws": self._generator.get_state()}, {
                **{name: getattr(self, name) for name in _COUNTS},
                "offered": self.held.seen,
                "judged_rows": self.held.judged_rows,
                **values,
            }

    def load_state(self, tensors: Mapping[str, Tensor], values: dict):
        """Go on from `state()`.

        Raises:
            ValueError: if the state is that of another draft, or of another number of members.
        """
        with self._lock, isolated_random_state():  # a Trainer seeds the process's
            self.ensemble.load_state(tensors, values)
            self._generator.set_state(tensors["draws"].cpu())
            for name in _COUNTS:
                setattr(self, name, values[name])
            # Without what was held: it is traffic, and saved only where that is asked for.
            self.held.seen, self.held.judged_rows = values["offered"], values["judged_rows"]
            self._trust()
            self._begun_together = False

    def _parted(self, error: RanksParted) -> bool:
        logger.error("This rank learns no more, and its draft serves on as it is. %s", error)
        return False

    def _update(self, new: list[Feedback], most: int | None) -> bool:
        config = self.config
        self.buffer.mark_seen(new)  # also if learning fails: what broke it once must not break it for ever
        count = round(config.replay * len(new))
        if most is not None:
            new = new[-most:]
            count = min(count, most - len(new))
        # After a miss without replay: what broke the update may be in it, and would break every other one.
        replayed = self.buffer.sample(0 if self.misses else count, self._generator, config.replay_by)
        requests = [*new, *replayed]
        if not self._begun_together and not self.ranks.same(self.ensemble.members[0].weights()):
            raise ValueError(
                "The ranks began with different drafts. Load the same one on each of them, and seed whatever of it is random the same."
            )
        self._begun_together = True
        rows = sum(request.lessons(config.positions) for request in requests)
        self._update_rows = int(self.ranks.sum(rows)[0])
        if not self._update_rows:
            return False  # nothing but accepted drafts, where errors alone teach
        before, losses = self.ensemble.snapshot(), list(self.ensemble.losses)
        if self.gate is not None:
            self._since_check += new
        try:
            with self._apart():
                self.ensemble.count_losses(new)
                for member in self.ensemble.members:
                    member.learn(requests)
        except Exception as error:
            self.ensemble.losses = losses
            self._undo(error, new, before)
            return False
        except BaseException:  # an interrupt: what is saved after it must not be learnt by halves
            self.ensemble.losses = losses
            self.ensemble.go_back(before)
            raise
        self.updates += 1
        self.misses = 0
        self.learned_tokens += self._update_rows
        if config.clear_after_update:
            self.buffer.clear()
        return True

    def _undo(self, error: Exception, new: list[Feedback], before: list[tuple]):
        """Be as before an update that must not serve, and wait longer for the next."""
        self.misses += 1
        wait = f"The next update waits for {self._wait} times as many requests."
        whole_check = isinstance(error, Rejected) and error.since_check
        self.buffer.discard(self._since_check if whole_check else new)
        self.ensemble.go_back(self._checked if whole_check else before)
        if not isinstance(error, Rejected):
            self.failed += 1
            if self.ranks.size > 1:
                self.serve()  # it may have been another rank that could not take the new weights
            logger.error(
                "An update failed; the serving draft is as it was, and learning goes on from it. %s",
                wait,
                exc_info=error,
            )
            return
        self.rejected += 1
        if not whole_check:
            logger.warning("An update may not serve, and is undone: %s. %s", error, wait)
            return
        # What serves has been let through since the last check, and may be no better.
        self._checks_failed += 1
        self._since_check = []
        # Of a domain that was forgotten, and came again, the static draft may know more, and of all the others nothing.
        to_static = self._checks_failed > 1 and not self.gate.static_is_worse
        to = "the static draft" if to_static else "the draft of the last check"
        if to_static:
            self.ensemble.set_weights(self._static)
            self.ensemble.forget_optimizers()
            self._trust()
        self.serve()
        logger.warning("What was learnt may not serve, and %s serves again: %s. %s", to, error, wait)
        try:
            with self._apart():
                self.gate.went_back(to_static)
        except RanksParted:
            raise
        except Exception:
            logger.exception("The draft that serves again could not be judged on what came since its check.")

    def _trust(self):
        """Take what is learnt so far for what a failed check goes back to."""
        if self.gate is not None:
            self._checked = self.ensemble.snapshot()
        self._since_check, self._checks_failed = [], 0
        self._last_losses.clear()

    def _check_losses(self):
        sums = self.ranks.sum(*itertools.chain.from_iterable(member.last_losses for member in self.ensemble.members))
        losses = [total / rows if rows else math.nan for total, rows in zip(sums[::2], sums[1::2], strict=True)]
        loss = max(losses, key=lambda loss: loss if loss == loss else math.inf)
        if not math.isfinite(loss):
            raise ArithmeticError(f"The loss of this update is {loss}. Lower the learning rate if that comes again.")
        if len(self._last_losses) >= 3 and loss > _EXPLODED * max(self._last_losses):
            raise ArithmeticError(
                f"The loss of this update is {loss:.2f}, over {_EXPLODED:.0f} times the largest of the last ones, {max(self._last_losses):.2f}. Lower the "
                "learning rate if that comes again."
            )
        self._last_losses.append(loss)

    def _as_judged(self, feedback: Feedback) -> Feedback:
        """With α as this learner's own judging has it now, to which what it says later can be compared."""
        try:
            judged = self.judge([feedback], wait=False)
        except Exception:
            logger.exception("A request that is held back could not be judged as it came.")
            judged = None
        if judged is None:
            return feedback
        self.held.note_judged(int(feedback.teaches("all").sum()))
        return replace(feedback, overlap=judged[0][0])

    def _scores(self, requests: Sequence[Feedback]) -> list[Tensor]:
        """What is to serve, on requests held back."""
        return self._paused([overlap for overlap, _ in self.ensemble.judge(list(requests))])

    def _scores_of_static(self, requests: Sequence[Feedback]) -> list[Tensor]:
        return self._paused([overlap for overlap, _ in self.ensemble.judge(list(requests), self._static)])

    def _paused(self, scores: list[Tensor]) -> list[Tensor]:
        if self._after_step is not None:
            self._after_step()
        return scores

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Learning as if nobody were around it: generate runs under no_grad, users under inference_mode or autocast; and Trainer seeds the
        process's random state."""
        with (
            isolated_random_state() if self._alone else contextlib.nullcontext(),
            torch.inference_mode(False),
            torch.enable_grad(),
            learners_autocast(self.ensemble.members[0].module.device.type, None),
            torch.autocast("cpu", enabled=False),  # feedback lies there, wherever the draft does
        ):
            yield
