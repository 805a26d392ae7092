"""`DraftStops` ends a draft where the generation would end.

generate asks its stopping criteria once per round, about a whole block of tokens: a criterion that would have ended plain decoding inside the block
is noticed at the block's end, and the output overshoots. generate itself cuts blocks at EOS and the length limit; all other criteria are handled here.
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
    """Applies the stopping criteria of one generate call to drafts.

    A greedy draft ends before the token at which one of transformers' own criteria would end the text: the target adds that token
    itself, as the last of the round. A sampled draft may not be cut by the sampled token, or q would no longer be what it was sampled from;
    and a user's own criteria may keep state, so they are never called with drafts, which may be rejected. In both cases `allow_drafts`
    is `False`.

    Args:
        criteria (`list[StoppingCriteria]`): all criteria of the call.
        sampled (`bool`): `True` if the call samples.
        eos (`set[int]`), max_length (`int`): token ids and length at which generate itself cuts a block.
    """

    def __init__(self, criteria: list[StoppingCriteria], sampled: bool, eos: set[int], max_length: int):
        self.max_length = max_length  # the smallest of all limits
        self.unasked: list[str] = []  # names of the criteria for which nothing may be drafted
        self._asked: list[StoppingCriteria] = []
        for criterion in criteria:
            kind = type(criterion)
            if kind is MaxLengthCriteria:
                self.max_length = min(self.max_length, criterion.max_length)
            elif kind is MaxTimeCriteria or (kind is EosTokenCriteria and _ids(criterion) <= eos):
                continue  # a time limit ends at no particular token; at these EOS ids generate cuts
            elif kind in (EosTokenCriteria, StopStringCriteria) and not sampled:
                self._asked.append(criterion)
            else:
                self.unasked.append(kind.__name__)

    @property
    def allow_drafts(self) -> bool:
        return not self.unasked

    @property
    def asks(self) -> bool:
        """Is `True` if there is a criterion that `end` asks."""
        return bool(self._asked)

    def end(self, input_ids: Tensor) -> bool:
        """Asks the criteria if the generation would end with the last token of `input_ids` `(1, L)`."""
        return any(bool(criterion(input_ids, None).any()) for criterion in self._asked)


def _ids(criterion: EosTokenCriteria) -> set[int]:
    return set(criterion.eos_token_id.flatten().tolist())
