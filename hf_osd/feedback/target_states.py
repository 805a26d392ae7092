"""`TargetStates`: the hidden states a target had at consecutive positions of a text, which a feature-level draft reads. Held as int8 with a scale for each position
and layer, a quarter of what float32 takes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_CODES = 127  # codes lie in -127 … 127
# float16 keeps 11 bits, and no steps finer than 2^-24: a scale raised by half a step is never rounded to below itself, so that no code is clipped.
_RELATIVE, _STEP = 2.0**-11, 2.0**-24


@dataclass(frozen=True, eq=False)
class TargetStates:
    """The states s_start … s_{start+S-1} of one text: at each position F = n_aux·H numbers, a part of H for each of n_aux layers.

    Args:
        codes (`Tensor` int8 `(S, F)`): the states, in units of `scales`.
        scales (`Tensor` float16 `(S, n_aux)`): the unit of each part.
        start (`int`): the position in the text of the first of them.
    """

    codes: Tensor
    scales: Tensor
    start: int

    @classmethod
    def from_states(cls, states: Tensor, n_aux: int, start: int) -> TargetStates:
        """Keep states `(S, F)` of any float dtype and device, on the CPU. Each part of a row is off by at most 1/127 of its largest absolute value, unless that
        is below 1e-5.

        Raises:
            ValueError: if F is no multiple of `n_aux`, `start` is negative, or a state is not finite or above 8.3 million.
        """
        if states.ndim != 2 or n_aux < 1 or states.shape[1] % n_aux or not states.shape[1]:
            raise ValueError(
                f"The states have shape {tuple(states.shape)}; give them as (S, F), F a multiple of the {n_aux} layers they are of."
            )
        if start < 0:
            raise ValueError(f"`start` is {start}; give the position of the first state, 0 or more.")
        parts = states.detach().float().unflatten(-1, (n_aux, -1))  # (S, n_aux, H)
        exact = parts.abs().amax(-1) / _CODES
        scales = (exact * (1 + _RELATIVE) + _STEP / 2).clamp_min(_STEP).half()
        codes = (parts / scales.float()[..., None]).round().clamp(-_CODES, _CODES).to(torch.int8)
        scales = scales.cpu()
        if not scales.isfinite().all():
            raise ValueError(
                "The target's hidden states are not finite, or above 8.3 million; nothing can be learnt from them. Load the target in bfloat16 or float32."
            )
        return cls(codes.flatten(1).cpu(), scales, start)

    @classmethod
    def cat(cls, parts: Sequence[TargetStates]) -> TargetStates:
        """States of parts of one text that follow one another.

        Raises:
            ValueError: if there are none, or one does not begin where the one before ends.
        """
        if not parts:
            raise ValueError("No states were given; give at least one part.")
        for one, other in itertools.pairwise(parts):
            if one.stop != other.start:
                raise ValueError(
                    f"States up to position {one.stop} are followed by ones from position {other.start} on; give parts that follow one another."
                )
        return cls(torch.cat([one.codes for one in parts]), torch.cat([one.scales for one in parts]), parts[0].start)

    def __len__(self) -> int:
        """S, the number of states."""
        return self.codes.shape[0]

    @property
    def stop(self) -> int:
        """The position after the last state."""
        return self.start + len(self)

    @property
    def n_aux(self) -> int:
        """How many layers the states are of."""
        return self.scales.shape[1]

    @property
    def width(self) -> int:
        """F, the numbers of one state."""
        return self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.codes.nbytes + self.scales.nbytes

    def dense(self) -> Tensor:
        """The states, float32 `(S, F)`."""
        return (self.codes.unflatten(-1, (self.n_aux, -1)).float() * self.scales.float()[..., None]).flatten(1)

    def cut(self, begin: int, end: int) -> TargetStates | None:
        """The states of the positions `begin` … `end`-1 that there are, at the places that they had; `None` if there are none. Copies."""
        begin, end = max(begin, self.start), min(end, self.stop)
        if begin >= end:
            return None
        rows = slice(begin - self.start, end - self.start)
        return TargetStates(self.codes[rows].clone(), self.scales[rows].clone(), begin)

    def select(self, positions: Tensor) -> TargetStates:
        """The states of `positions` `(P,)` of the text, whatever their order, as those of a text that consists of these positions alone: `start` is 0. Copies.

        Raises:
            IndexError: if there is no state for one of them.
        """
        rows = positions - self.start
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= len(self)):
            raise IndexError(f"There are states of the positions {self.start} to {self.stop - 1} alone.")
        return TargetStates(self.codes[rows], self.scales[rows], 0)

    def moved(self, by: int) -> TargetStates:
        """The same states, `by` positions later in the text; earlier if negative."""
        return replace(self, start=self.start + by)
