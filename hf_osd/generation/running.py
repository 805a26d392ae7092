"""`RunningCall`: a run of generate's own loop that an assistant serves, as that loop has it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import StoppingCriteriaList

# Of this thread: `calls`, see `running_calls`.
_thread = threading.local()


@dataclass(eq=False)
class RunningCall:
    """One run of `_assisted_decoding` with an OnlineAssistant."""

    stopping_criteria: StoppingCriteriaList
    synced_gpus: bool = False


def running_calls() -> list[RunningCall]:
    """This thread's calls that have not come back, innermost last: a streamer may call generate in the middle of one."""
    if not hasattr(_thread, "calls"):
        _thread.calls = []
    return _thread.calls
