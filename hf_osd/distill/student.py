"""`Student`: one copy of the draft that trains, at one learning rate, and what of it is to serve. It knows weights and a trainer; when to learn, and on
what, is the learner's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.config import OnlineConfig
from hf_osd.distill.loss_head import LossHead
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.feedback import Feedback
from hf_osd.models.copies import copy_draft
from hf_osd.system.forks import importing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.distill.callbacks import Refreshable
    from hf_osd.distill.trainer import OnlineGKDTrainer

# The average of the first steps is over few of them: its decay at step t is at most (1 + t) / (10 + t), or it would long stay near where
# the draft began.
_AVERAGE_WARM_UP = 10
# What AdamW keeps of a parameter.
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}


class Student:
    """A training copy of a draft.

    Args:
        draft (`PreTrainedModel`): the draft to start from; it is copied, and what does not train is shared with it.
        trainable (`set[str]`): names of the parameters that train. They are float32 here, whatever the draft serves in.
        buffer (`FeedbackBuffer`), config (`OnlineConfig`): as the trainer wants them.
        learning_rate (`float`): in place of the config's.
        autocast_dtype (`torch.dtype`, *optional*): of the forward passes; float32 throughout if left out.
        refreshes (`Refreshable`, *optional*): told when an update of this member is over.
        after_step (`Callable[[], None]`, *optional*): called after each optimizer step.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        trainable: set[str],
        buffer: FeedbackBuffer,
        config: OnlineConfig,
        learning_rate: float,
        autocast_dtype: torch.dtype | None = None,
        refreshes: Refreshable | None = None,
        after_step: Callable[[], None] | None = None,
    ):
        self.buffer, self.config, self.trainable, self._after_step = buffer, config, trainable, after_step
        self.learning_rate, self.autocast_dtype, self._refreshes = learning_rate, autocast_dtype, refreshes
        self.module = copy_draft(draft, {name for name, _ in draft.named_parameters()} - trainable)
        with torch.inference_mode(False):
            if autocast_dtype is None:
                self.module.float()  # shared weights that are not float32 get a copy for the learner alone
            for name, parameter in self.module.named_parameters():
                parameter.requires_grad_(name in trainable)
                if name in trainable:
                    parameter.data = parameter.data.float()
        LossHead.install(self.module)
        self.steps = 0
        self._average: dict[str, Tensor] | None = None  # of the weights over steps, where the config asks for it
        self._last_step: dict[str, Tensor] | None = (
            None  # what the last optimizer step added, where the config asks for it
        )
        self._before_step: dict[str, Tensor] | None = None
        self._trainer: OnlineGKDTrainer | None = None

    @property
    def trainer(self) -> OnlineGKDTrainer:
        """The trainer; made when first needed, for trl takes seconds to import."""
        if self._trainer is None:
            with importing():
                from hf_osd.distill.callbacks import FollowStepsCallback, RefreshAssistantCallback
                from hf_osd.distill.trainer import OnlineGKDTrainer

            refreshing = [] if self._refreshes is None else [RefreshAssistantCallback(self._refreshes)]
            self._trainer = OnlineGKDTrainer(
                self.module,
                self.buffer,
                self.config,
                learning_rate=self.learning_rate,
                autocast_dtype=self.autocast_dtype,
                callbacks=[FollowStepsCallback(self), *refreshing],
            )
        return self._trainer

    def set_rate(self, rate: float):
        """Learn at this rate from now on, with the optimizer as it is."""
        if rate == self.learning_rate:
            return
        factor, self.learning_rate = rate / self.learning_rate, rate
        if self._trainer is not None:
            self._trainer.scale_rate(factor)

    def learn(self, requests: Sequence[Feedback]):
        """One pass over `requests`."""
        self.module.train()
        self.trainer.learn(requests)

    @property
    def last_losses(self) -> tuple[float, int]:
        """The loss of the last update on this rank, as far as it has come: its sum, and over how many rows."""
        return self._trainer.losses if self._trainer is not None else (0.0, 0)

    @property
    def failure(self) -> Exception | None:
        """What went wrong on this rank in the last update, where the others went on."""
        return self._trainer.failure if self._trainer is not None else None

    def weights(self) -> dict[str, Tensor]:
        """What trains, by name: live storage, float32."""
        return {name: p.detach() for name, p in self.module.named_parameters() if name in self.trainable}

    def serving_weights(self) -> dict[str, Tensor]:
        """What is to serve, by name: the weights, or their average over steps; moved on by `optimism` times the last step. To read, not to write."""
        weights = self.weights() if self._average is None else self._average
        if self._last_step is None:
            return weights
        return {name: w.add(self._last_step[name], alpha=self.config.optimism) for name, w in weights.items()}

    @property
    def serves_as_is(self) -> bool:
        """Whether `serving_weights` are the module's own."""
        return self._average is None and self._last_step is None

    def set_weights(self, weights: Mapping[str, Tensor]):
        """Go on from other weights, with nothing known of how they came about."""
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in self.weights().items():
                parameter.copy_(weights[name])
        self._average = self._last_step = self._before_step = None
        self.steps = 0

    def snapshot(self) -> tuple:
        """What `restore` needs."""
        average = None if self._average is None else {name: t.clone() for name, t in self._average.items()}
        return {name: t.clone() for name, t in self.weights().items()}, average, self._last_step, self.steps

    def restore(self, snapshot: tuple):
        """Be as at `snapshot`, with a new optimizer: it is what may have gone wrong."""
        weights, average, last_step, steps = snapshot
        self.set_weights(weights)
        # A copy: it moves on with the steps, and the snapshot may be gone back to again.
        self._average = None if average is None else {name: t.clone() for name, t in average.items()}
        self._last_step, self.steps = last_step, steps
        self.reset_optimizer()

    def reset_optimizer(self):
        """Go on with a new optimizer, its warm-up included."""
        if self._trainer is not None:
            self._trainer.optimizer = self._trainer.lr_scheduler = None

    # Told by the trainer.

    def before_step(self, last: bool):
        """An optimizer step is due; `last` if it is the last one of an update."""
        if last and self.config.optimism:
            self._before_step = {name: t.clone() for name, t in self.weights().items()}

    @torch.no_grad()
    def after_step(self):
        """An optimizer step has been taken."""
        self.steps += 1
        if self._before_step is not None:
            self._last_step = {name: t - self._before_step[name] for name, t in self.weights().items()}
            self._before_step = None
        if self.config.ema_decay:
            decay = min(self.config.ema_decay, (1 + self.steps) / (_AVERAGE_WARM_UP + self.steps))
            weights = self.weights()
            if self._average is None:
                self._average = {name: t.clone() for name, t in weights.items()}
            for name, average in self._average.items():
                average.lerp_(weights[name], 1 - decay)
        if self._after_step is not None:
            self._after_step()

    # What a restart needs.

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors (weights, their average, the last step, the optimizer's moments, by name) and plain values."""
        tensors = {f"weights.{name}": tensor for name, tensor in self.weights().items()}
        for kind, kept in (("average", self._average), ("last_step", self._last_step)):
            tensors |= {f"{kind}.{name}": tensor for name, tensor in (kept or {}).items()}
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

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping):
        """Go on from `state()`.

        Raises:
            ValueError: if the state is that of another draft or optimizer.
        """
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
        self.set_weights(kinds["weights"])
        self.reset_optimizer()
        device = self.module.device
        # One that this config does not keep up would serve for ever.
        self._average, self._last_step = (
            {name: t.to(device, copy=True) for name, t in kinds[kind].items()} or None if asked else None
            for kind, asked in (("average", self.config.ema_decay), ("last_step", self.config.optimism))
        )
        self.steps = values["steps"]
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
                warnings.simplefilter(
                    "ignore"
                )  # torch wants optimizer steps in between; they were taken before the restart
                for _ in range(values["learning_rate_steps"]):
                    trainer.lr_scheduler.step()


def swap_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put `weights` into `module`, and return what was there."""
    with torch.inference_mode(False), torch.no_grad():
        parameters = {name: p for name, p in module.named_parameters() if name in weights}
        kept = {name: p.detach().clone() for name, p in parameters.items()}
        for name, p in parameters.items():
            p.copy_(weights[name])
    return kept
