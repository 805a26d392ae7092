"""`Ensemble`: the copies of the draft that train, and what of them is to serve. It knows weights and what they say; when to learn, on what, and whether
that may serve, is the learner's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.config import OnlineConfig
from hf_osd.distill.ranks import RankGroup
from hf_osd.distill.scoring import Judged, judge, learners_autocast, learners_dtype
from hf_osd.distill.student import Student, swap_weights
from hf_osd.distill.windows import Windows
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.feedback import Feedback
from hf_osd.models.lora import set_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.distill.callbacks import Refreshable

# ε of the shares: how fast a member's falls with its loss.
_SHARPNESS = 10.0


class Ensemble:
    """One copy of a draft that trains, or with `config.ensemble` several, at several rates. The average of their weights serves, a member's share falling
    exponentially with the loss it has had on new requests so far (OnlineSPEC, arXiv 2603.12617).

    Args:
        draft (`PreTrainedModel`), trainable (`set[str]`), buffer (`FeedbackBuffer`), config (`OnlineConfig`): as [`Student`] wants them.
        refreshes (`Refreshable`): told when all have learnt.
        after_step (`Callable[[], None]`, *optional*): called after each optimizer step.
        ranks (`RankGroup`): of the job; losses are of all of them together.

    Attributes:
        members (`list[Student]`): the copies.
        losses (`list[float]`): of each, summed over updates: the mean rejection rate on new requests of what it would have served.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        trainable: set[str],
        buffer: FeedbackBuffer,
        config: OnlineConfig,
        refreshes: Refreshable,
        after_step: Callable[[], None] | None,
        ranks: RankGroup,
    ):
        self.autocast_dtype = learners_dtype(config, draft)
        self._ranks, self._window = ranks, config.learning_window
        factors = config.ensemble or [1.0]
        self.members = [
            Student(
                draft,
                trainable,
                buffer,
                config,
                learning_rate=factor,
                autocast_dtype=self.autocast_dtype,
                after_step=after_step,
                refreshes=refreshes if i == len(factors) - 1 else None,
            )
            for i, factor in enumerate(factors)
        ]
        self.losses, self._factors = [0.0] * len(self.members), factors

    def set_rate(self, rate: float):
        """Learn at this rate from now on; each member at its multiple of it."""
        for member, factor in zip(self.members, self._factors, strict=True):
            member.set_rate(factor * rate)

    @property
    def shares(self) -> list[float]:
        """The weight of each member in what serves: ∝ exp(-sharpness · its loss so far)."""
        least = min(self.losses)
        raw = [math.exp(-_SHARPNESS * (loss - least)) for loss in self.losses]
        return [weight / sum(raw) for weight in raw]

    def serving_weights(self) -> dict[str, Tensor]:
        """What is to serve, by name, float32: the members' serving weights, averaged by `shares`. To read, not to write."""
        with torch.inference_mode(False), torch.no_grad():
            parts = [member.serving_weights() for member in self.members]
            if len(parts) == 1:
                return parts[0]
            shares = self.shares
            return {
                name: sum(share * part[name] for share, part in zip(shares, parts, strict=True)) for name in parts[0]
            }

    def count_losses(self, new: list[Feedback]):
        """One verification says of every member how it would have done: nothing has to be tried out to choose among them."""
        for i, member in enumerate(self.members if len(self.members) > 1 else []):
            weights = None if member.serves_as_is else member.serving_weights()
            with self._ranks.together():
                overlap = torch.cat(
                    [
                        torch.zeros(0, dtype=torch.float32, device="cpu"),
                        *(judged.overlap for judged in self._judge(member, new, weights)),
                    ]
                )
            overlap = overlap[~overlap.isnan()]
            total, count = self._ranks.sum(float(overlap.double().sum()), len(overlap))
            if count:
                self.losses[i] += 1.0 - total / count

    def judge(
        self, feedback: list[Feedback], weights: Mapping[str, Tensor] | None = None, whole: bool = True
    ) -> list[Judged]:
        """What is said of requests, see [`hf_osd.distill.scoring.judge`], of `weights`, or of what is to serve."""
        if weights is None and not (len(self.members) == 1 and self.members[0].serves_as_is):
            weights = self.serving_weights()
        return self._judge(self.members[0], feedback, weights, whole)

    def _judge(
        self, member: Student, feedback: list[Feedback], weights: Mapping[str, Tensor] | None, whole: bool = False
    ) -> list[Judged]:
        """What a member's module says; of `weights`, if given, which it then holds for as long as this takes."""
        kept = None if weights is None else swap_weights(member.module, weights)
        try:
            # Frozen weights are shared in the serving dtype, so that only under autocast all of the module's dtypes meet.
            with learners_autocast(member.module.device.type, self.autocast_dtype):
                windows = Windows(feedback, self._window)
                return windows.spread(judge(member.module, windows.requests, whole=whole))
        finally:
            if kept is not None:
                swap_weights(member.module, kept)

    def set_weights(self, weights: Mapping[str, Tensor]):
        """Go on from other weights, all members from the same."""
        for member in self.members:
            member.set_weights(weights)

    def set_base(self, base: Mapping[str, Tensor]):
        """Go on over other weights of the plain draft, by its names."""
        for member in self.members:
            set_base(member.module, base)

    def snapshot(self) -> list[tuple]:
        """What `restore` needs; without the losses, which are what requests said."""
        return [member.snapshot() for member in self.members]

    def snapshot_of(self, weights: Mapping[str, Tensor]) -> list[tuple]:
        """What `restore` needs to go on from these weights, with nothing known of how they came about."""
        return [(dict(weights), None, None, 0) for _ in self.members]

    def restore(self, snapshot: list[tuple]):
        """Be as at `snapshot`, with new optimizers."""
        for member, own in zip(self.members, snapshot, strict=True):
            member.restore(own)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """What a restart needs: tensors, by member and name, and plain values."""
        tensors, members = {}, []
        for i, member in enumerate(self.members):
            own, values = member.state()
            tensors |= {f"{i}.{name}": tensor.clone() for name, tensor in own.items()}
            members.append(values)
        return tensors, {"losses": list(self.losses), "members": members}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping):
        """Go on from `state()`.

        Raises:
            ValueError: if the state is that of another draft, or of another number of members.
        """
        if len(values["members"]) != len(self.members):
            raise ValueError(
                f"The saved learner has {len(values['members'])} members and this one {len(self.members)}; resume with the `ensemble` it was "
                "started with, or start afresh."
            )
        for i, (member, own) in enumerate(zip(self.members, values["members"], strict=True)):
            prefix = f"{i}."
            member.load_state({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, own)
        self.losses = list(values["losses"])
