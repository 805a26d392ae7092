"""accelerate's state, of which a process has one: makes trainers share it, and keep what they read of it from others that make it anew."""

from __future__ import annotations

import functools
import logging
import threading

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, DynamoBackend, TorchDynamoPlugin
from accelerate.utils.environment import parse_choice_from_env

from hf_osd.system.forks import released

logger = logging.getLogger(__name__)

# Held while the state may be empty: making a trainer can begin with emptying it.
STATE = released(threading.RLock())


def has_state_for(device: torch.device) -> bool:
    """Tell whether accelerate's state is what a trainer on `device` would make anew. That one would first empty it, under whoever trains in another thread."""
    if not AcceleratorState._shared_state or not PartialState._shared_state:
        return False
    state = AcceleratorState()
    return (
        state.distributed_type == DistributedType.NO
        and state.device.type == device.type
        and state.mixed_precision == parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
        and state.dynamo_plugin.backend == TorchDynamoPlugin().backend
    )


def detached(state: AcceleratorState | PartialState) -> AcceleratorState | PartialState:
    """Copy a state that others share, and empty when they make a trainer."""
    own = object.__new__(type(state))
    own.__dict__ = dict(vars(state))
    return own


def set_launch_settings_aside(accelerator: Accelerator):
    """Ignore compilation and mixed precision of a launch config, or of a user's own Accelerator: they are meant for the user's training, and stay with it.

    Compiled anew for each length of a batch, learning took seventy times as long; and its arithmetic is `learner_dtype`, or as DeepSpeed and FSDP have it.
    """
    state, aside = accelerator.state, {}
    if state.dynamo_plugin is not None and state.dynamo_plugin.backend != DynamoBackend.NO:
        aside["dynamo_backend"] = state.dynamo_plugin.backend.value.lower()
    sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    if state.mixed_precision != "no" and not sharded:
        aside["mixed_precision"] = state.mixed_precision
    if not aside:
        return
    if "dynamo_backend" in aside:
        state.dynamo_plugin = TorchDynamoPlugin(backend="no")
    if "mixed_precision" in aside:
        state._mixed_precision, accelerator.native_amp, accelerator.scaler = "no", False, None
    _say_that_it_is_set_aside(", ".join(f"{name}={value}" for name, value in aside.items()))


@functools.cache
def _say_that_it_is_set_aside(what: str):
    logger.warning(
        "accelerate's %s is set aside for learning, which compiles nothing and computes in OnlineConfig(learner_dtype=...); your own training keeps it.",
        what,
    )
