"""Callbacks of a Trainer: `RefreshAssistantCallback` puts the trained weights into an assistant; `FollowStepsCallback` reports each optimizer step to a student."""

from __future__ import annotations

from typing import Protocol

from torch import nn
from transformers import TrainerCallback


class Refreshable(Protocol):
    """Takes new draft weights, as an [`OnlineAssistant`] does."""

    def refresh(self, model: nn.Module): ...


class Follower(Protocol):
    """Keeps weights beside those that train, as a [`hf_osd.distill.student.Student`] does."""

    def before_step(self, last: bool): ...

    def after_step(self): ...


class RefreshAssistantCallback(TrainerCallback):
    """Refreshes an assistant from the model being trained, at the end of training and, if asked, on the way.

    It works in [`OnlineGKDTrainer`] and in any other Trainer whose model has the draft's architecture: the running generate calls finish
    on the weights they began with, the next ones get the new.

    Args:
        assistant ([`OnlineAssistant`]): the one to refresh.
        every_steps (`int`, *optional*): also refresh after every so many optimizer steps.

    Raises:
        ValueError: if `every_steps` is below 1.
    """

    def __init__(self, assistant: Refreshable, every_steps: int | None = None):
        if every_steps is not None and every_steps < 1:
            raise ValueError(
                f"`every_steps` is {every_steps!r}; give a whole number ≥ 1, or None for the end of training only."
            )
        self.assistant, self.every_steps = assistant, every_steps

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.every_steps is not None and state.global_step % self.every_steps == 0:
            self.assistant.refresh(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.assistant.refresh(model)


class FollowStepsCallback(TrainerCallback):
    """Calls a [`Follower`] before and after each optimizer step."""

    def __init__(self, follower: Follower):
        self.follower = follower

    def on_step_begin(self, args, state, control, **kwargs):
        self.follower.before_step(last=state.global_step + 1 == state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.follower.after_step()
