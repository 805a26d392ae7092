"""`StudentEnsemble` and `OptimisticStudent`: students for a config that asks for more than one learning rate, or for weights ahead of what was learnt; and
`make_student`, which chooses. An ordinary update passes through none of this."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.config import OnlineConfig
from hf_osd.distill.ranks import RankGroup
from hf_osd.distill.scoring import Judged
from hf_osd.distill.student import Snapshot, Student, copied, load_state_into, state_of
from hf_osd.feedback.feedback import Feedback

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# ε of the shares: how fast a student's falls with its loss.
_SHARPNESS = 10.0


def make_student(
    draft: PreTrainedModel, trainable: set[str], config: OnlineConfig, frozen: dict[str, Tensor] | None = None
) -> Student | StudentEnsemble:
    """Make the student that `config` asks for; arguments as for [`hf_osd.distill.student.Student`]."""
    kind = OptimisticStudent if config.optimism else Student
    if not config.ensemble:
        return kind(draft, trainable, config, frozen)
    frozen = {} if frozen is None else frozen
    return StudentEnsemble([kind(draft, trainable, config, frozen) for _ in config.ensemble], config.ensemble)


class OptimisticStudent(Student):
    """Serves weights that are moved on by `config.optimism` times the last optimizer step (OnlineSPEC, arXiv 2603.12617)."""

    _last_step: dict[str, Tensor] | None = None
    _before_step: dict[str, Tensor] | None = None

    def serving_weights(self) -> dict[str, Tensor]:
        weights = super().serving_weights()
        if self._last_step is None:
            return weights
        return {name: w.add(self._last_step[name], alpha=self.config.optimism) for name, w in weights.items()}

    @property
    def is_averaged(self) -> bool:
        return super().is_averaged or self._last_step is not None

    def snapshot(self) -> Snapshot:
        return replace(super().snapshot(), last_step=self._last_step)

    def _set(self, snapshot: Snapshot):
        super()._set(snapshot)
        self._last_step, self._before_step = snapshot.last_step, None

    def before_step(self, last: bool):
        if last:
            self._before_step = copied(self.weights())

    @torch.no_grad()
    def after_step(self):
        if self._before_step is not None:
            self._last_step = {name: t - self._before_step[name] for name, t in self.weights().items()}
            self._before_step = None
        super().after_step()

    def own_state(self) -> tuple[dict[str, Tensor], dict]:
        tensors, values = super().own_state()
        return tensors | {f"last_step.{name}": tensor for name, tensor in (self._last_step or {}).items()}, values


class StudentEnsemble:
    """Trains several students on the same requests, at several rates. The average of their weights serves, a student's share falling exponentially with the loss
    it has had on new requests so far (OnlineSPEC, arXiv 2603.12617). It answers as a [`Student`] does.

    Args:
        students (`Sequence[Student]`): copies of one draft.
        factors (`Sequence[float]`): multiples of the learning rate, one for each.

    Attributes:
        losses (`list[float]`): of each, summed over updates: the mean rejection rate on new requests of the weights it would have served.
    """

    def __init__(self, students: Sequence[Student], factors: Sequence[float]):
        self.students, self._factors = list(students), list(factors)
        self._first = self.students[0]
        self.losses = [0.0] * len(self.students)
        self.config, self.trainable = self._first.config, self._first.trainable
        self.initial = self._first.initial
        for student in self.students:
            student.initial = self.initial

    @property
    def reads_states(self) -> bool:
        return self._first.reads_states

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def shares(self) -> list[float]:
        """The share of each student in what serves: ∝ exp(-sharpness · its loss so far)."""
        least = min(self.losses)
        raw = [math.exp(-_SHARPNESS * (loss - least)) for loss in self.losses]
        return [weight / sum(raw) for weight in raw]

    def prepare(self):
        for student in self.students:
            student.prepare()

    def set_rate(self, rate: float):
        """Learn at this rate from now on; each student at its multiple of it."""
        for student, factor in zip(self.students, self._factors, strict=True):
            student.set_rate(factor * rate)

    @property
    def on_step(self) -> Callable[[], None] | None:
        return self._first.on_step

    @on_step.setter
    def on_step(self, call: Callable[[], None] | None):
        for student in self.students:
            student.on_step = call

    def learn(self, requests: Sequence[Feedback]):
        for student in self.students:
            student.learn(requests)

    @property
    def last_losses(self) -> list[tuple[float, int]]:
        return [loss for student in self.students for loss in student.last_losses]

    @property
    def failure(self) -> Exception | None:
        return next((student.failure for student in self.students if student.failure is not None), None)

    def count_losses(self, new: Sequence[Feedback], ranks: RankGroup):
        """Add to each student's loss the one that it would have had on `new`. One verification gives the losses of all: nothing has to be tried out to
        choose among them."""
        for i, student in enumerate(self.students if len(self.students) > 1 else []):
            with ranks.together():
                overlap = torch.cat(
                    [
                        torch.zeros(0, dtype=torch.float32, device="cpu"),
                        *(judged.overlap for judged in student.score(new, whole=False)),
                    ]
                )
            overlap = overlap[~overlap.isnan()]
            total, count = ranks.sum(float(overlap.double().sum()), len(overlap))
            if count:
                self.losses[i] += 1.0 - total / count

    def weights(self) -> dict[str, Tensor]:
        """The parameters that train, by the student's number and name: live storage, float32."""
        return {f"{i}.{name}": w for i, student in enumerate(self.students) for name, w in student.weights().items()}

    def serving_weights(self) -> dict[str, Tensor]:
        """The weights that are to serve, by name, float32: the students' serving weights, averaged by `shares`. To read, not to write."""
        with torch.inference_mode(False), torch.no_grad():
            parts = [student.serving_weights() for student in self.students]
            if len(parts) == 1:
                return parts[0]
            shares = self.shares
            return {
                name: sum(share * part[name] for share, part in zip(shares, parts, strict=True)) for name in parts[0]
            }

    def score(
        self, requests: Sequence[Feedback], weights: Mapping[str, Tensor] | None = None, whole: bool = True
    ) -> list[Judged]:
        return self._first.score(requests, self.serving_weights() if weights is None else weights, whole)

    def set_weights(self, weights: Mapping[str, Tensor]):
        """Go on from other weights, all students from the same."""
        for student in self.students:
            student.set_weights(weights)

    def set_base(self, base: Mapping[str, Tensor]):
        for student in self.students:
            student.set_base(base)

    def snapshot(self) -> tuple[list[Snapshot], list[float]]:
        return [student.snapshot() for student in self.students], list(self.losses)

    def snapshot_of(self, weights: Mapping[str, Tensor]) -> tuple[list[Snapshot], list[float]]:
        return [student.snapshot_of(weights) for student in self.students], list(self.losses)

    def restore(self, snapshot: tuple[list[Snapshot], list[float]]):
        """Be as at `snapshot`, with new optimizers; but for the losses, which new requests have shown since."""
        for student, own in zip(self.students, snapshot[0], strict=True):
            student.restore(own)

    def undo(self, snapshot: tuple[list[Snapshot], list[float]]):
        """Be as at `snapshot`, before an update that failed; the losses too."""
        self.restore(snapshot)
        self.losses = list(snapshot[1])

    def has_moved(self, snapshot: tuple[list[Snapshot], list[float]]) -> bool:
        return any(student.has_moved(own) for student, own in zip(self.students, snapshot[0], strict=True))

    def state(self) -> tuple[dict[str, Tensor], dict]:
        return state_of(self.students, self.losses)

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping):
        load_state_into(self.students, tensors, values)
        self.losses = list(values["losses"])
