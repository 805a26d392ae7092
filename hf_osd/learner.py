"""`Learner`: decides when to learn, on what, and what is to serve of it. Between it and the serving draft lies one refresh; whatever goes wrong
here leaves that draft as it was."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.buffer import FeedbackBuffer
from hf_osd.config import OnlineConfig
from hf_osd.feedback import Feedback
from hf_osd.held_back import Estimate, HeldBack
from hf_osd.member import Member, mixture, swap_weights
from hf_osd.scoring import judge, learners_autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class Learner:
    """Trains a draft on a buffer, in the caller's thread.

    With `config.ensemble` several copies of the draft train, at several rates, and the average of their weights serves, a member's share falling
    exponentially with the loss it has had on new requests so far (OnlineSPEC, arXiv 2603.12617).

    Args:
        draft (`PreTrainedModel`): the draft to start from; it is copied, and what does not train is shared with it.
        trainable (`set[str]`): names of the parameters that train. They are float32 here, whatever the draft serves in.
        buffer (`FeedbackBuffer`): where feedback comes from.
        config (`OnlineConfig`): when to learn, and how.
        serve (`Callable[[Mapping[str, Tensor]], None]`): takes the weights that are to serve, by name, after each update.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        trainable: set[str],
        buffer: FeedbackBuffer,
        config: OnlineConfig,
        serve: Callable[[Mapping[str, Tensor]], None],
    ):
        self.buffer, self.config, self.trainable = buffer, config, trainable
        self._serve = serve
        self.updates = self.failed = self.learned_tokens = 0
        self.seconds = 0.0
        self.autocast_dtype = _autocast_dtype(config, draft)
        factors = config.ensemble or [1.0]
        self.members = [
            Member(
                draft,
                trainable,
                buffer,
                config,
                learning_rate=factor * config.learning_rate,
                autocast_dtype=self.autocast_dtype,
                refreshes=self if i == len(factors) - 1 else None,  # once all have learnt
            )
            for i, factor in enumerate(factors)
        ]
        # Of each member, summed over updates: the mean rejection rate on new requests of what it would have served.
        self.losses = [0.0] * len(self.members)
        self.held = HeldBack(config.held_back_share, seed=config.seed)
        self.estimate: Estimate | None = None  # the last one
        self._generator = torch.Generator()
        if config.seed is None:
            self._generator.seed()  # its own: `torch.seed` would set the process's
        else:
            self._generator.manual_seed(config.seed)
        self._lock = threading.Lock()

    @property
    def module(self) -> PreTrainedModel:
        """The module that trains; the first of an ensemble."""
        return self.members[0].module

    def due(self) -> bool:
        """Whether enough requests or tokens wait, or one has waited long enough."""
        new, config = self.buffer.new(), self.config
        if not new:
            return False
        return (
            len(new) >= config.update_interval
            or (config.update_tokens is not None and sum(map(len, new)) >= config.update_tokens)
            or (config.update_age is not None and time.monotonic() - new[0].created >= config.update_age)
        )

    def update(self, wait: bool = True) -> bool:
        """One update on what is new and its replay. `True` if the serving draft was refreshed.

        Never raises for what happens inside learning: a failed update is logged and counted, the learner goes back to the weights that
        it had, with new optimizers. An interrupt passes through.

        Args:
            wait (`bool`): while another thread learns, wait for it; else leave the learning to it.
        """
        if not self._lock.acquire(blocking=wait):
            return False
        start = time.perf_counter()
        try:
            new = self.buffer.new()
            return bool(new) and self._update(new)
        finally:
            self.seconds += time.perf_counter() - start
            self._lock.release()

    def judge(self, feedback: list[Feedback], wait: bool = True) -> list[tuple[Tensor, Tensor]] | None:
        """Expected acceptance and confidence on `feedback` of what is to serve, see [`hf_osd.scoring.judge`]; `None` if another thread
        learns and `wait` is not set."""
        if not self._lock.acquire(blocking=wait):
            return None
        try:
            return self._judge_served(feedback)
        finally:
            self._lock.release()

    def offer(self, feedback: Feedback):
        """Put a request into the buffer, or hold it back from learning, to judge by."""
        if not self.held.take(feedback, self._as_judged):
            self.buffer.add(feedback)

    @property
    def shares(self) -> list[float]:
        """The weight of each member in what serves: ∝ exp(-sharpness · its loss so far)."""
        least = min(self.losses)
        raw = [math.exp(-self.config.ensemble_sharpness * (loss - least)) for loss in self.losses]
        return [weight / sum(raw) for weight in raw]

    def serving_weights(self) -> dict[str, Tensor]:
        """What is to serve, by name, float32. To read, not to write."""
        with torch.inference_mode(False), torch.no_grad():
            return mixture(self.members, self.shares)

    def refresh(self, model: nn.Module | None = None):
        """Serve what has been learnt. [`RefreshAssistantCallback`] calls this when the last member has been trained."""
        self._serve(self.serving_weights())

    def take(self, weights: Mapping[str, Tensor]):
        """Go on learning from weights that were trained elsewhere."""
        with self._lock:
            for member in self.members:
                member.set_weights(weights)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """What a restart needs: tensors, by member and name, and plain values."""
        tensors, members = {}, []
        for i, member in enumerate(self.members):
            own, values = member.state()
            tensors |= {f"{i}.{name}": tensor for name, tensor in own.items()}
            members.append(values)
        return tensors, {
            "updates": self.updates,
            "failed": self.failed,
            "learned_tokens": self.learned_tokens,
            "seconds": self.seconds,
            "losses": self.losses,
            "offered": self.held.seen,
            "judged_rows": self.held.judged_rows,
            "members": members,
        }

    def load_state(self, tensors: Mapping[str, Tensor], values: dict):
        """Go on from `state()`.

        Raises:
            ValueError: if the state is that of another draft, or of another number of members.
        """
        if len(values["members"]) != len(self.members):
            raise ValueError(
                f"The saved learner has {len(values['members'])} members and this one {len(self.members)}; resume with the `ensemble` it was "
                "started with, or start afresh."
            )
        with isolated_random_state():  # a Trainer seeds the process's
            for i, (member, own) in enumerate(zip(self.members, values["members"], strict=True)):
                prefix = f"{i}."
                member.load_state({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, own)
        self.updates, self.failed, self.losses = values["updates"], values["failed"], values["losses"]
        self.learned_tokens, self.seconds = values["learned_tokens"], values["seconds"]
        # Without what was held: it is traffic, and saved only where that is asked for.
        self.held.seen, self.held.judged_rows = values["offered"], values["judged_rows"]

    def _update(self, new: list[Feedback]) -> bool:
        config = self.config
        replayed = self.buffer.sample(round(config.replay * len(new)), self._generator, config.replay_by)
        self.buffer.mark_seen(new)  # also if learning fails: what broke it once must not break it for ever
        if not any(request.teaches(config.positions).any() for request in (*new, *replayed)):
            return False  # nothing but accepted drafts, where errors alone teach
        before = [member.snapshot() for member in self.members]
        losses = list(self.losses)
        try:
            with self._apart():
                if len(self.members) > 1:
                    self._count_losses(new)
                for member in self.members:
                    member.learn([*new, *replayed])
        except Exception:
            self.failed += 1
            logger.exception("An update failed; the serving draft is as it was, and learning goes on from it.")
            self.losses = losses
            for member, snapshot in zip(self.members, before, strict=True):
                member.go_back(snapshot)
            return False
        self.updates += 1
        self.learned_tokens += sum(int(r.teaches(config.positions).sum()) for r in (*new, *replayed))
        if self.held.due(self.learned_tokens):
            try:
                self._estimate()
            except Exception:
                logger.exception("The draft could not be judged by what is held back; the update stands.")
        if config.clear_after_update:
            self.buffer.clear()
        return True

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

    def _estimate(self):
        """Judge what serves now by all that is held back."""
        requests = self.held.requests()
        scores = [overlap for overlap, _ in self._judge_served(requests)]
        self.held.note_judged(sum(int((~score.isnan()).sum()) for score in scores))
        self.estimate = Estimate.of(requests, scores)

    def _judge_served(self, feedback: list[Feedback]) -> list[tuple[Tensor, Tensor]]:
        alone = len(self.members) == 1 and self.members[0].serves_as_is
        return self._judge(self.members[0], feedback, None if alone else self.serving_weights())

    def _count_losses(self, new: list[Feedback]):
        """One verification says of every member how it would have done: nothing has to be tried out to choose among them."""
        for i, member in enumerate(self.members):
            weights = None if member.serves_as_is else member.serving_weights()
            overlap = torch.cat([overlap for overlap, _ in self._judge(member, new, weights)])
            overlap = overlap[~overlap.isnan()]
            if len(overlap):
                self.losses[i] += 1.0 - float(overlap.mean())

    def _judge(
        self, member: Member, feedback: list[Feedback], weights: Mapping[str, Tensor] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """What a member's module says; of `weights`, if given, which it then holds for as long as this takes."""
        kept = None if weights is None else swap_weights(member.module, weights)
        try:
            # Frozen weights are shared in the serving dtype, so that only under autocast all of the module's dtypes meet.
            with learners_autocast(member.module.device.type, self.autocast_dtype):
                return judge(member.module, feedback)
        finally:
            if kept is not None:
                swap_weights(member.module, kept)

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Learning as if nobody were around it: generate runs under no_grad, users under inference_mode or autocast; and Trainer seeds the
        process's random state."""
        with (
            isolated_random_state(),
            torch.inference_mode(False),
            torch.enable_grad(),
            learners_autocast(self.module.device.type, None),
            torch.autocast("cpu", enabled=False),  # feedback lies there, wherever the draft does
        ):
            yield


@contextlib.contextmanager
def isolated_random_state() -> Iterator[None]:
    """Give back Python's, NumPy's and torch's random states as they were: learning must not change what a user samples."""
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _autocast_dtype(config: OnlineConfig, draft: PreTrainedModel) -> torch.dtype | None:
    """bfloat16 if learning is to run under autocast, `None` for float32 throughout."""
    if config.learner_dtype == "bfloat16":
        return torch.bfloat16
    if config.learner_dtype == "float32" or draft.dtype == torch.float32:
        return None
    if draft.device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif draft.device.type == "cpu":
        # Emulated bfloat16 is several times slower than float32 there.
        native = any(torch.cpu.get_capabilities().get(feature) for feature in ("avx512_bf16", "amx_bf16"))
    else:
        native = False
    return torch.bfloat16 if native else None
