"""`RunningCall` describes a run of generate's own loop with an assistant, by what the loop was given."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, StoppingCriteriaList
    from transformers.utils import ModelOutput

    from hf_osd.generation.rollback import Rollback

# Attribute, by thread: `calls`, see `running_calls`.
_thread = threading.local()


@dataclass(eq=False)
class RunningCall:
    """Describes one run of `_assisted_decoding` with an OnlineAssistant.

    Args:
        stopping_criteria (`StoppingCriteriaList`), synced_gpus (`bool`): what the loop was given.
        target (`PreTrainedModel`, *optional*): the target, where the loop runs on a view of it.
        rollback ([`hf_osd.generation.rollback.Rollback`], *optional*): takes rejected tokens out of a target's recurrent states, if it has some.
        waiting (`weakref.WeakMethod`, *optional*): takes the outputs of the forward that was verified last, see `wait_for_outputs`.
        held (`int`): tokens, padding included, that the cache held when the loop began: the first forward reads those after them.
        verified (`int`, *optional*): tokens that the cache held before the forward that runs, or ran last; `None` before the first.
        count_completed (`Callable[[int], None]`, *optional*): counts tokens that are read again after the last round, see [`hf_osd.generation.rollback.Rollback.complete`]. It
            keeps what drafts alive, whose end is the call's, and is dropped when the run is over.
    """

    stopping_criteria: StoppingCriteriaList
    synced_gpus: bool = False
    target: PreTrainedModel | None = None
    rollback: Rollback | None = None
    waiting: weakref.WeakMethod | None = None
    held: int = 0
    verified: int | None = None
    count_completed: Callable[[int], None] | None = None

    def wait_for_outputs(self, take: Callable[[ModelOutput], object]):
        """Has the bound method `take` called once, with the outputs of the round that is ending. generate hands outputs to a candidate generator only when it
        asks for another block, which it does not after a call's last round. Does not keep its object alive."""
        self.waiting = weakref.WeakMethod(take)

    def end_round(self, outputs: ModelOutput):
        """Passes the outputs of the target's last forward to whoever waits for them."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None and (take := waiting()) is not None:
            take(outputs)


def running_calls() -> list[RunningCall]:
    """Lists this thread's running calls, the innermost last: a streamer may call generate in the middle of one."""
    if not hasattr(_thread, "calls"):
        _thread.calls = []
    return _thread.calls
