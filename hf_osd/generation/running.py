"""`RunningCall` describes a run of generate's own loop with an assistant, by what the loop was given."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import StoppingCriteriaList

# Attribute, by thread: `calls`, see `running_calls`.
_thread = threading.local()


@dataclass(eq=False)
class RunningCall:
    """Describes one run of `_assisted_decoding` with an OnlineAssistant."""

    stopping_criteria: StoppingCriteriaList
    synced_gpus: bool = False


def running_calls() -> list[RunningCall]:
    """Lists this thread's running calls, the innermost last: a streamer may call generate in the middle of one."""
    if not hasattr(_thread, "calls"):
        _thread.calls = []
    return _thread.calls
