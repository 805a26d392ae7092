"""`Student`: the copy of the draft that trains, at one learning rate, and the weights of it that are to serve. It knows weights and a trainer; when to learn, and
on what, is the learner's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.config import OnlineConfig
from hf_osd.distill.loss_head import LossHead
from hf_osd.distill.ranks import RankGroup
from hf_osd.distill.scoring import Judged, judge, learners_autocast, learners_dtype
from hf_osd.distill.windows import Windows
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.feedback import Feedback
from hf_osd.models.copies import copy_draft
from hf_osd.models.lora import set_base
from hf_osd.models.properties import reads_states
from hf_osd.system.forks import importing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.distill.trainer import OnlineGKDTrainer

# The average of the first steps is over few of them: its decay at step t is at most (1 + t) / (10 + t), or it would long stay near where
# the draft began.
_AVERAGE_WARM_UP = 10
# What AdamW keeps of a parameter.
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


@dataclass(frozen=True)
class Snapshot:
    """A student at one moment: all that `restore` needs.

    Args:
        weights (`dict[str, Tensor]`): what trains, by name, float32.
        average (`dict[str, Tensor]`, *optional*): of the weights over steps.
        last_step (`dict[str, Tensor]`, *optional*): what the last optimizer step added to them.
        steps (`int`): optimizer steps so far.
    """

    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None = None
    last_step: dict[str, Tensor] | None = None
    steps: int = 0


class Student:
    """Trains a copy of a draft on requests.

    [`hf_osd.distill.ensemble.StudentEnsemble`] is asked the same things.

    Args:
        draft (`PreTrainedModel`): the draft to start from; it is copied, and what does not train is shared with it.
        trainable (`set[str]`): names of the parameters that train. They are float32 here, whatever the draft serves in.
        config (`OnlineConfig`): how to learn.
        frozen (`dict[str, Tensor]`, *optional*): what does not train as students of one draft read it, by name; it is filled by the first of them, and they have one copy between them
            where they read it in another dtype or on another device than it serves. The draft is then one that nobody writes.

    Attributes:
        initial (`dict[str, Tensor]`): the weights before any learning, in the dtypes they serve in.
        learning_rate (`float`, *optional*): of the next update; the config's until the trainer is made or `set_rate` is called.
        on_step (`Callable[[], None]`, *optional*): called after each optimizer step.
    """

    # As an ensemble of one has them.
    shares, losses = (1.0,), (0.0,)

    def __init__(
        self,
        draft: PreTrainedModel,
        trainable: set[str],
        config: OnlineConfig,
        frozen: dict[str, Tensor] | None = None,
    ):
        self.config, self.trainable = config, trainable
        self.autocast_dtype = learners_dtype(config, draft)
        self.module = copy_draft(draft, {name for name, _ in draft.named_parameters()} - trainable)
        with torch.inference_mode(False):
            if frozen is not None:
                share_frozen(self.module, trainable, frozen, widen=self.autocast_dtype is None)
            if self.autocast_dtype is None:
                self.module.float()  # shared weights that are not float32 get a copy for the learner alone
            for name, parameter in self.module.named_parameters():
                parameter.requires_grad_(name in trainable)
                if name in trainable:
                    parameter.data = parameter.data.float()
        LossHead.install(self.module)
        # In the dtypes they came in, which hold them exactly.
        initial = {name: p.detach() for name, p in draft.named_parameters() if name in trainable}
        self.initial = copied(initial) if frozen is None else initial
        self.learning_rate: float | None = None
        self.on_step: Callable[[], None] | None = None
        self.steps = 0
        self._average: dict[str, Tensor] | None = None  # of the weights over steps, where the config asks for it
        self._snapshot: Snapshot | None = None  # of now, if there is one
        self._trainer: OnlineGKDTrainer | None = None

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def reads_states(self) -> bool:
        """Tell whether the draft reads the target's hidden states."""
        return reads_states(self.module)

    @property
    def trainer(self) -> OnlineGKDTrainer:
        """The trainer; made when first needed, for trl takes seconds to import."""
        if self._trainer is None:
            with importing():
                from hf_osd.distill.callbacks import FollowStepsCallback
                from hf_osd.distill.trainer import OnlineGKDTrainer

            self._trainer = OnlineGKDTrainer(
                self.module,
                FeedbackBuffer(),  # requests are given to `learn`
                self.config,
                learning_rate=self.learning_rate,
                autocast_dtype=self.autocast_dtype,
                callbacks=[FollowStepsCallback(self)],
            )
            self.learning_rate = self._trainer.args.learning_rate
        return self._trainer

    def prepare(self):
        """Make the trainer, which takes seconds the first time."""
        self.trainer  # noqa: B018 (made when first asked for)

    def set_rate(self, rate: float):
        """Learn at this rate from now on, with the optimizer as it is."""
        if self._trainer is not None and rate != self.learning_rate:
            self._trainer.scale_rate(rate / self.learning_rate)
        self.learning_rate = rate

    def learn(self, requests: Sequence[Feedback]):
        """Pass once over `requests`."""
        self._snapshot = None
        self._part_from_snapshots()
        self.module.train()
        self.trainer.learn(requests)

    @property
    def last_losses(self) -> list[tuple[float, int]]:
        """The loss of the last update on this rank, as far as it has come: its sum, and over how many rows."""
        return [self._trainer.losses if self._trainer is not None else (0.0, 0)]

    @property
    def failure(self) -> Exception | None:
        """The error of the last update on this rank, where the other ranks went on."""
        return self._trainer.failure if self._trainer is not None else None

    def count_losses(self, new: Sequence[Feedback], ranks: RankGroup):
        """Do nothing: only several students have shares, which losses on new requests decide."""

    def weights(self) -> dict[str, Tensor]:
        """The parameters that train, by name, float32. To read, not to write: snapshots share them until the next `learn`."""
        return {name: p.detach() for name, p in self.module.named_parameters() if name in self.trainable}

    def serving_weights(self) -> dict[str, Tensor]:
        """The weights that are to serve, by name, float32: those that train, or their average over steps. To read, not to write."""
        return self.weights() if self._average is None else self._average

    @property
    def is_averaged(self) -> bool:
        """`serving_weights` are others than those that train."""
        return self._average is not None

    def score(
        self, requests: Sequence[Feedback], weights: Mapping[str, Tensor] | None = None, whole: bool = True
    ) -> list[Judged]:
        """Score drafts on requests, teacher-forced, see [`hf_osd.distill.scoring.judge`]: the one with these `weights`, or the one that is to serve.

        The module holds `weights` for as long as this takes.
        """
        if weights is None and self.is_averaged:
            weights = self.serving_weights()
        kept = self.weights()
        self._hold(weights or {})
        try:
            # Frozen weights are shared in the serving dtype, so that only under autocast all of the module's dtypes meet.
            with learners_autocast(self.device.type, self.autocast_dtype):
                windows = Windows(requests, self.config.learning_window)
                return windows.spread(judge(self.module, windows.requests, whole=whole))
        finally:
            self._hold(kept)

    def set_weights(self, weights: Mapping[str, Tensor]):
        """Go on from other weights, with no steps behind them."""
        self._set(Snapshot(dict(weights)))

    def set_base(self, base: Mapping[str, Tensor]):
        """Go on over other weights of the plain draft under an adapter, by its names."""
        set_base(self.module, base)

    def snapshot(self) -> Snapshot:
        """Return all that `restore` needs. To read, not to write; it takes no memory before the next `learn`, which leaves it as it is."""
        if self._snapshot is None:
            self._snapshot = Snapshot(self.weights(), self._average, steps=self.steps)
        return self._snapshot

    def snapshot_of(self, weights: Mapping[str, Tensor]) -> Snapshot:
        """Make a snapshot of these weights, with no steps behind them."""
        return Snapshot(dict(weights))

    def restore(self, snapshot: Snapshot):
        """Be as at `snapshot`, with a new optimizer: it is what may have gone wrong."""
        self._set(snapshot)
        self.reset_optimizer()

    def undo(self, snapshot: Snapshot):
        """Be as at `snapshot`, before an update that failed."""
        self.restore(snapshot)

    def has_moved(self, snapshot: Snapshot) -> bool:
        """Tell whether a weight is another than in `snapshot`."""
        return any(not torch.equal(weight, snapshot.weights[name]) for name, weight in self.weights().items())

    def reset_optimizer(self):
        """Go on with a new optimizer, its warm-up included."""
        if self._trainer is not None:
            self._trainer.optimizer = self._trainer.lr_scheduler = None

    def _set(self, snapshot: Snapshot):
        self._snapshot = None
        self._hold(copied(snapshot.weights))  # they may be somebody's who writes them
        self._average, self.steps = copied(snapshot.average), snapshot.steps

    def _hold(self, weights: Mapping[str, Tensor]):
        """Put these weights into the module, in place of those that it has, which stay as they are."""
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if name in weights:
                    parameter.data = weights[name].detach().to(parameter.device, parameter.dtype)

    def _part_from_snapshots(self):
        """Go on with copies of what trains, for steps are about to write it, and snapshots have it too."""
        self._hold(copied(self.weights()))
        self._average = copied(self._average)

    # Called by the trainer.

    def before_step(self, last: bool):
        """An optimizer step is due; `last` if it is the last one of an update."""

    @torch.no_grad()
    def after_step(self):
        """An optimizer step has been taken."""
        self._snapshot = None
        self.steps += 1
        if self.config.ema_decay:
            decay = min(self.config.ema_decay, (1 + self.steps) / (_AVERAGE_WARM_UP + self.steps))
            weights = self.weights()
            if self._average is None:
                self._average = copied(weights)
            for name, average in self._average.items():
                average.lerp_(weights[name], 1 - decay)
        if self.on_step is not None:
            self.on_step()

    # What a restart needs.

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Copy what a restart needs: tensors (weights, their average, the optimizer's moments), by number and name, and plain values."""
        return state_of([self], self.losses)

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping):
        """Go on from `state()`.

        Raises:
            ValueError: if the state is that of another draft or optimizer, or of several students.
        """
        load_state_into([self], tensors, values)

    def own_state(self) -> tuple[dict[str, Tensor], dict]:
        """Collect what a restart needs of this one student: tensors, by name, and plain values."""
        tensors = {f"weights.{name}": tensor for name, tensor in self.weights().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in (self._average or {}).items()}
        optimizer = self._trainer.optimizer if self._trainer is not None else None
        if optimizer is not None:
            for index, entries in optimizer.state_dict()["state"].items():
                tensors |= {
                    f"optimizer.{index}.{name}": value for name, value in entries.items() if isinstance(value, Tensor)
                }
        if self._trainer is not None:
            tensors["draws.state"] = self._trainer.draws.get_state()
        scheduler = self._trainer.lr_scheduler if self._trainer is not None else None
        return tensors, {
            "steps": self.steps,
            "learning_rate_steps": scheduler.last_epoch if scheduler is not None else 0,
        }

    def load_own_state(self, tensors: Mapping[str, Tensor], values: Mapping):
        """Go on from `own_state()`."""
        kinds: dict[str, dict[str, Tensor]] = {
            name: {} for name in ("weights", "average", "last_step", "optimizer", "draws")
        }
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            kinds[kind][rest] = tensor
        if {n: t.shape for n, t in kinds["weights"].items()} != {n: t.shape for n, t in self.weights().items()}:
            raise ValueError(
                "The saved learner is that of another draft; resume with the --draft it was started with, or start afresh."
            )
        if other := sorted({name.split(".", 1)[1] for name in kinds["optimizer"]} - _MOMENTS):
            raise ValueError(
                f"The saved learner's optimizer is not AdamW, for it has {', '.join(other)}, and there is no other any more (such as Muon); start afresh "
                "from the draft that was saved with it."
            )
        # One that this config does not keep up would serve for ever.
        average, last_step = (
            {name: t.to(self.device) for name, t in kinds[kind].items()} or None if is_kept else None
            for kind, is_kept in (("average", self.config.ema_decay), ("last_step", self.config.optimism))
        )
        self.restore(Snapshot(kinds["weights"], average, last_step, values["steps"]))
        if kinds["draws"]:
            self.trainer.draws.set_state(kinds["draws"]["state"].cpu())
        state: dict[int, dict] = {}
        for name, tensor in kinds["optimizer"].items():
            index, entry = name.split(".", 1)
            state.setdefault(int(index), {})[entry] = tensor
        if state:
            trainer = self.trainer
            trainer.create_optimizer()
            trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": state})
            trainer.create_scheduler(0)
            with warnings.catch_warnings():
                # torch wants optimizer steps in between; they were taken before the restart.
                warnings.simplefilter("ignore")
                for _ in range(values["learning_rate_steps"]):
                    trainer.lr_scheduler.step()


def state_of(students: Sequence[Student], losses: Sequence[float]) -> tuple[dict[str, Tensor], dict]:
    """Copy what a restart needs of several students: tensors, by their number and name, and plain values."""
    tensors, members = {}, []
    for i, student in enumerate(students):
        own, values = student.own_state()
        tensors |= {f"{i}.{name}": tensor.clone() for name, tensor in own.items()}
        members.append(values)
    return tensors, {"losses": list(losses), "members": members}


def load_state_into(students: Sequence[Student], tensors: Mapping[str, Tensor], values: Mapping):
    """Let as many students go on from `state_of()`.

    Raises:
        ValueError: if the state is that of another draft or optimizer, or of another number of students.
    """
    if len(values["members"]) != len(students):
        raise ValueError(
            f"The saved learner has {len(values['members'])} members and this one {len(students)}; resume with the `ensemble` it was "
            "started with, or start afresh."
        )
    for i, (student, own) in enumerate(zip(students, values["members"], strict=True)):
        prefix = f"{i}."
        student.load_own_state({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, own)


def share_frozen(module: nn.Module, trainable: set[str], frozen: dict[str, Tensor], widen: bool):
    """Let a module read what does not train from `frozen`, by name, and put there what it lacks, in float32 if `widen`. Nobody writes these weights in place."""
    for name, parameter in module.named_parameters():
        if name not in trainable and parameter.is_floating_point():
            if name not in frozen:
                frozen[name] = parameter.data.float() if widen else parameter.data
            parameter.data = frozen[name]


def copied(tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Clones of tensors, which may be written to later wherever the caller runs."""
    if tensors is None:
        return None
    with torch.inference_mode(False), torch.no_grad():
        return {name: tensor.clone() for name, tensor in tensors.items()}
