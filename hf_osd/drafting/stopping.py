"""`DraftStops`: where a draft must end, because there the generation would.

generate asks its stopping criteria once a round, about a whole block of tokens: one that would have ended plain decoding inside the block
is noticed at its end, and the output overshoots. EOS and the length limit are cut by generate itself; all others are this room's.
"""

from __future__ import annotations

from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)


class DraftStops:
    """Of the stopping criteria of one generate call.

    A greedy draft ends before the token at which one of transformers' own criteria would end the text: the target says that token
    itself, as the last of its block. A sampled draft may not be cut for what was sampled, or q is no longer what it was sampled from;
    and a user's own criteria may keep state, so they are not asked about tokens that may never come true. In both cases `allow_drafts`
    is `False`.

    Args:
        criteria (`list[StoppingCriteria]`): all of the call's.
        sampled (`bool`): whether the call samples.
        eos (`set[int]`), max_length (`int`): what generate itself cuts a block at.
    """

    def __init__(self, criteria: list[StoppingCriteria], sampled: bool, eos: set[int], max_length: int):
        self.max_length = max_length  # the least of all limits
        self.unasked: list[str] = []  # names of the criteria for which nothing may be drafted
        self._asked: list[StoppingCriteria] = []
        for criterion in criteria:
            kind = type(criterion)
            if kind is MaxLengthCriteria:
                self.max_length = min(self.max_length, criterion.max_length)
            elif kind is MaxTimeCriteria or (kind is EosTokenCriteria and _ids(criterion) <= eos):
                continue  # a limit in seconds has no token of its own; the others generate cuts at
            elif kind in (EosTokenCriteria, StopStringCriteria) and not sampled:
                self._asked.append(criterion)
            else:
                self.unasked.append(kind.__name__)

    @property
    def allow_drafts(self) -> bool:
        return not self.unasked

    @property
    def asks(self) -> bool:
        """Whether there is a criterion that `end` asks."""
        return bool(self._asked)

    def end(self, input_ids: Tensor) -> bool:
        """Whether the generation would end with the last token of `input_ids` `(1, L)`."""
        return any(bool(criterion(input_ids, None).any()) for criterion in self._asked)


def _ids(criterion: EosTokenCriteria) -> set[int]:
    return set(criterion.eos_token_id.flatten().tolist())
