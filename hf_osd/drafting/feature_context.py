"""`FeatureContext`: the verified text as a feature-level draft reads it in one generate call: each token with the target's hidden states at the token before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.drafting.context import DraftContext, DraftLogits

if TYPE_CHECKING:
    from hf_osd.models.feature_draft import FeatureDraft

_ROOM = 64  # columns


class FeatureCache:
    """Holds keys and values of the draft's one layer, with room for more: a new column then costs no copy of those before it. Has what the draft's forward
    and a [`DraftContext`] use of a `Cache`."""

    def __init__(self):
        self._room: tuple[Tensor, Tensor] | None = None  # (1, g, N, d) each
        self._length = 0

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, columns: int):
        """Removes the last `-columns` columns."""
        self._length += columns

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Appends T columns, `(1, g, T, d)` each, and returns all there are."""
        begin, end = self._length, self._length + keys.shape[2]
        if self._room is None or end > self._room[0].shape[2]:
            self._room = tuple(self._grown(i, new, end) for i, new in enumerate((keys, values)))
        for room, new in zip(self._room, (keys, values), strict=True):
            room[:, :, begin:end] = new.detach()
        self._length = end
        return tuple(room[:, :, :end] for room in self._room)

    def _grown(self, i: int, new: Tensor, columns: int) -> Tensor:
        """Allocates room for keys (`i` = 0) or values (1), and copies what is there."""
        with torch.inference_mode(False):  # made under it, they could not be written outside it
            room = new.new_empty(*new.shape[:2], columns + columns // 2 + _ROOM, new.shape[3])
        if self._room is not None:
            room[:, :, : self._length] = self._room[i][:, :, : self._length]
        return room


class FeatureContext(DraftContext):
    """A [`DraftContext`] whose draft reads the target's states (EAGLE-3, arXiv 2503.01840).

    The column of token j, for j ≥ 1, reads that token and the target's states at j-1. After a verification of m+1 tokens the states of all but the last
    of them are at hand, so the draft reads m+1 columns in one forward. Beyond them it reads its own states, and forgets these columns when the round is over:
    an accepted token is read again, with its true states.

    Args:
        model (`FeatureDraft`): the leased draft.
        prompt (`Tensor` int64 `(L,)`): the prompt, without padding.
    """

    def __init__(self, model: FeatureDraft, prompt: Tensor):
        super().__init__(model, prompt)
        # (1, S, F) in parts: of the tokens from `_first_state` on. They are joined when the draft reads them, for it may not be asked for long.
        self._states: list[Tensor] = []
        self._first_state = 0
        self._true_columns = 0  # of the cache: those that read the target's states
        self._last_own: Tensor | None = None  # (1, 1, H): the draft's own state at the last column it read

    @property
    def known(self) -> int:
        """Counts the tokens, from the first on, whose states are known."""
        return self._first_state + sum(part.shape[1] for part in self._states)

    @property
    def is_ready(self) -> bool:
        return self.length >= 2 and self.known >= self.length - 1

    @property
    def unread(self) -> int:
        return self.length - 1 - self._cache.get_seq_length()

    @property
    def askable(self) -> int:
        return max(self.length - 2, 0)  # the token after t_0 has no column before it

    def add_states(self, hidden_states: Sequence[Tensor | None], count: int, mask: Tensor | None = None) -> Tensor:
        """Takes the states of the target's last forward.

        Args:
            hidden_states: as the target's output has them: item i is `(1, T, H_t)`, after i layers; those of the draft's recorded layers are there.
            count (`int`): of its T columns those that are verified, the first ones.
            mask (`Tensor` bool `(T',)`, *optional*): which of the first T' columns are no padding.

        Returns:
            `Tensor`: the states that are new, of all recorded layers, joined; the first F numbers of each are what the draft reads.
        """
        parts = [hidden_states[layer][:, :count] for layer in self.model.config.recorded_layers]
        home = self.ids.device
        states = torch.cat([part.to(home, self.model.dtype) for part in parts], dim=-1)
        if mask is not None:
            kept = torch.ones(states.shape[1], dtype=torch.bool, device=home)
            kept[: len(mask)] = mask.to(home)[: len(kept)]
            states = states[:, kept]
        self._states.append(states[..., : self.model.config.states_size])
        return states[0]

    def catch_up(self, lag: int) -> DraftLogits:
        """Reads all the cache lacks, with the target's states: returns the draft's logits at the last `lag` tokens of the target and at the next one, lag+1 rows."""
        rows = [start - 1 for start in self._starts[len(self._starts) - lag :]] + [self.length - 1]
        begin = self._cache.get_seq_length() + 1
        at = begin - 1 - self._first_state
        states = torch.cat(self._states, dim=1)[:, at : at + self.length - begin]
        logits = self._read(self.ids[:, begin:], states, self.length - rows[0])
        self._true_columns = self._cache.get_seq_length()
        # They are in the cache now, and nothing asks for them again.
        self._first_state, self._states = self.length - 1, []
        return logits if len(logits) == len(rows) else logits[[row - rows[0] for row in rows]]

    def step(self, token: Tensor) -> DraftLogits:
        return self._read(token.to(self.ids.device), self._last_own, keep=1)

    def crop(self, accepted: int):
        """Removes what was read with the draft's own states, whatever was accepted of it."""
        self._cache.crop(-max(self._cache.get_seq_length() - self._true_columns, 0))

    def _empty_cache(self) -> FeatureCache:
        return FeatureCache()

    def _probe(self, n: int) -> FeatureContext:
        probe = super()._probe(n + 1)  # the first token has no column
        probe._true_columns, probe._first_state = 0, 0
        probe._states = [self.ids.new_zeros(1, n, self.model.config.states_size, dtype=self.model.dtype)]
        return probe

    def _read(self, tokens: Tensor, features: Tensor, keep: int) -> DraftLogits:
        read = {"input_ids": tokens, "features": features, "past_key_values": self._cache}
        logits, states = self.model(**read, use_cache=True, logits_to_keep=keep, return_dict=False)
        self._last_own = states[:, -1:]
        return self._logits(logits, keep)
