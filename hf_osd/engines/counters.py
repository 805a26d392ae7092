"""`Counted` holds what an engine itself counts of speculation, and `read_counters` reads it of a running vLLM."""

from __future__ import annotations

import itertools
import logging
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counted:
    """Holds an engine's own counters since it began.

    Args:
        rounds (`int`): rounds that drafted.
        drafted (`int`), accepted (`int`): their tokens, and those of them that were accepted.
        by_position (`tuple[int, ...]`): accepted tokens by position in the round; empty if the engine does not tell.
        answers (`int`, *optional*): answers that ended; `None` if the engine does not tell.
        created (`float`, *optional*): the Unix time at which the counters began; `None` if the engine does not tell, and of sums and differences.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    by_position: tuple[int, ...] = ()
    answers: int | None = None
    created: float | None = None

    @property
    def mean_length(self) -> float:
        """Compute vLLM's mean acceptance length, the target's own token included; NaN without rounds."""
        return 1 + self.accepted / self.rounds if self.rounds else math.nan

    @property
    def variance(self) -> float:
        """Compute the variance of the accepted tokens of a round, from the share of rounds that accepted each position; without these the most that it can be. NaN without rounds."""
        if not self.rounds:
            return math.nan
        mean = self.accepted / self.rounds
        if not self.by_position:
            return mean * (self.drafted / self.rounds - mean)  # all of a round, or none
        return sum((2 * i + 1) * n for i, n in enumerate(self.by_position)) / self.rounds - mean**2

    def began_after(self, earlier: Counted) -> bool:
        """Tell whether the engine has begun anew since `earlier`: by the time at which its counters began or, where it does not tell, by lower ones."""
        if self.created is not None and earlier.created is not None:
            return self.created > earlier.created
        return self.rounds < earlier.rounds or self.drafted < earlier.drafted

    def since(self, earlier: Counted | None) -> Counted:
        """Return what was counted after `earlier`; all, if the engine has begun anew since."""
        if earlier is None or self.began_after(earlier):
            return self
        return self._with(earlier, operator.sub)

    def __add__(self, other: Counted) -> Counted:
        return self._with(other, operator.add)

    def _with(self, other: Counted, combine: Callable[[int, int], int]) -> Counted:
        places = itertools.zip_longest(self.by_position, other.by_position, fillvalue=0)
        sums = (combine(getattr(self, name), getattr(other, name)) for name in ("rounds", "drafted", "accepted"))
        told = self.answers is not None and other.answers is not None
        return Counted(
            *sums,
            tuple(combine(*pair) for pair in places),
            combine(self.answers, other.answers) if told else None,
        )


def read_counters(client: httpx.Client, url: str) -> Counted | None:
    """Read a vLLM server's counters of speculation, of all its engines together; `None` if it is down or does not speculate."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    values: dict[tuple[str, str], float] = {}
    began: list[float] = []
    name = "vllm:spec_decode_num_{}".format
    try:
        text = client.get(f"{url}/metrics").raise_for_status().text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = sample.name, sample.labels.get("position", "")
                values[key] = values.get(key, 0.0) + sample.value
                if sample.name == name("drafts_created"):
                    began.append(sample.value)
    except (httpx.HTTPError, ValueError) as error:
        logger.debug("%s has no metrics (%s).", url, type(error).__name__)
        return None
    if (name("drafts_total"), "") not in values:
        return None
    at = {int(position): n for (key, position), n in values.items() if key == name("accepted_tokens_per_pos_total")}
    answers = values.get(("vllm:request_success_total", ""))
    return Counted(
        *(int(values.get((name(f"{what}_total"), ""), 0)) for what in ("drafts", "draft_tokens", "accepted_tokens")),
        tuple(int(at.get(i, 0)) for i in range(max(at, default=-1) + 1)),
        None if answers is None else int(answers),
        min(began, default=None),  # of engines that are added to a server, the later ones are no restart
    )
