"""`DraftContext` holds the verified text of one generate call in the draft's tokens, with the draft's KV cache; `DraftLogits` are the logits that it
computes there."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from hf_osd.models.properties import encoder_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.models.draft_vocab import LowRankHead, RowsHead


@dataclass(frozen=True)
class DraftLogits:
    """Holds the draft's logits at n positions, for its whole vocabulary or for the part that its head computes.

    Args:
        logits (`Tensor` float32 `(n, R)`): logits of R of the draft's W tokens.
        ids (`Tensor` int64 `(R,)` or `(n, R)`, *optional*): ids of these tokens; `None` for all W.
        hidden (`Tensor` `(n, d)`, *optional*): the head's input, kept if the head computes a part only.
    """

    logits: Tensor
    ids: Tensor | None = None
    hidden: Tensor | None = None

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, rows: slice | list[int]) -> DraftLogits:
        each = self.ids is not None and self.ids.dim() == 2
        return DraftLogits(
            self.logits[rows],
            self.ids[rows] if each else self.ids,
            None if self.hidden is None else self.hidden[rows],
        )

    def likeliest(self) -> Tensor:
        """Returns the likeliest token of each row, `(n,)`."""
        return self.tokens(self.logits.argmax(-1))

    def tokens(self, columns: Tensor) -> Tensor:
        """Maps one column in each row to its token id, `(n,)` to `(n,)`."""
        if self.ids is None:
            return columns
        return self.ids[columns] if self.ids.dim() == 1 else self.ids.gather(-1, columns[:, None]).squeeze(-1)

    def confidence(self) -> Tensor:
        """Computes the probability of each row's likeliest token, `(n,)`; 0 where all are -inf."""
        return self.logits.softmax(-1).amax(-1).nan_to_num()

    def dense(self, size: int) -> Tensor:
        """Spreads the logits over the draft's vocabulary of `size` W, `(n, W)`; -inf where none was computed."""
        if self.ids is None:
            return self.logits
        ids = self.ids if self.ids.dim() == 2 else self.ids.expand(len(self), -1)
        return self.logits.new_full((len(self), size), -torch.inf).scatter_(-1, ids, self.logits)


class DraftContext:
    """Holds the verified text as the draft reads it, and a KV cache that may lag behind it.

    Args:
        model (`PreTrainedModel`): the leased draft.
        prompt (`Tensor` int64 `(L,)`): the prompt in the draft's tokens, without padding.
        encoded (*optional*): encoder outputs for a draft that attends to them: from its own encoder, or from the target's if it has none.
        encoded_mask (`Tensor` `(1, S)`, *optional*): 0 where they are padding.
    """

    def __init__(self, model: PreTrainedModel, prompt: Tensor, encoded=None, encoded_mask: Tensor | None = None):
        self.model = model
        self.head: RowsHead | LowRankHead | None = None  # if set, `model` is a view that computes it
        self.ids = prompt[None].to(model.device)  # (1, M)
        self._starts: list[int] = []  # index in `ids` of each verified token's first id
        self._keeps_logits = model._supports_logits_to_keep()
        self._inputs = _encoder_inputs(model, encoded, encoded_mask)
        self._ids_name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        self._cache = self._empty_cache()

    @property
    def length(self) -> int:
        """Counts the text's tokens, M, in the draft's vocabulary."""
        return self.ids.shape[1]

    @property
    def unread(self) -> int:
        """Counts the tokens at the text's end that are not in the cache."""
        return self.length - self._cache.get_seq_length()

    @property
    def is_ready(self) -> bool:
        """Whether there is all that the draft reads."""
        return True

    @property
    def askable(self) -> float:
        """Verified tokens, the last ones, of which the draft can be asked what it would have predicted."""
        return math.inf

    def extend(self, tokens: Tensor, sizes: list[int]):
        """Appends verified text, `(1, T)` in the draft's ids; `sizes` are the numbers of these ids that each of the target's tokens has."""
        start = self.length
        for size in sizes:
            self._starts.append(start)
            start += size
        self.ids = torch.cat([self.ids, tokens.to(self.ids.device)], dim=-1)

    def catch_up(self, unscored: int) -> DraftLogits:
        """Reads all unread text. Returns the draft's predictions of the target's last `unscored` tokens and of the next one, unscored+1 rows."""
        rows = [start - 1 for start in self._starts[len(self._starts) - unscored :]] + [self.length - 1]
        logits = self._forward(self.ids[:, self._cache.get_seq_length() :], keep=self.length - rows[0])
        return logits if len(logits) == len(rows) else logits[[row - rows[0] for row in rows]]

    def step(self, token: Tensor) -> DraftLogits:
        """Reads one drafted token, int64 `(1, 1)`, and predicts the next."""
        return self._forward(token.to(self.ids.device), keep=1)

    def crop(self, accepted: int):
        """Removes rejected drafts from the cache: it keeps the text and those of the `accepted` drafts that were read.

        Call it after every round with drafts, even if none was rejected; otherwise sliding windows never shrink.
        """
        self._cache.crop(-max(self._cache.get_seq_length() - self.length - accepted, 0))

    def reads(self, n: int) -> bool:
        """Tries if the draft can read n tokens, with n copies of the text's first one on an empty cache.

        Raises:
            torch.OutOfMemoryError: if memory is short, which tells nothing of n.
        """
        try:
            with torch.no_grad():
                self._probe(n).catch_up(0)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return False
        return True

    def _probe(self, n: int) -> DraftContext:
        """Makes a context in which n tokens are still unread."""
        probe = copy.copy(self)
        probe.ids, probe._starts, probe._cache = self.ids[:, :1].expand(1, n), [], self._empty_cache()
        return probe

    def _empty_cache(self) -> DynamicCache | EncoderDecoderCache:
        config = self.model.config.get_text_config(decoder=True)
        cache = DynamicCache(config=config)
        if self._inputs:
            cache = EncoderDecoderCache(cache, DynamicCache(config=config))
        cache.activate_past_recording()
        return cache

    def _forward(self, tokens: Tensor, keep: int) -> DraftLogits:
        kwargs = {"logits_to_keep": keep} if self._keeps_logits else {}
        outputs = self.model(
            **{self._ids_name: tokens}, past_key_values=self._cache, use_cache=True, **self._inputs, **kwargs
        )
        return self._logits(outputs.logits, keep)

    def _logits(self, logits: Tensor, keep: int) -> DraftLogits:
        """The last `keep` rows of a forward's logits `(1, T, R)`."""
        logits = logits[0, -keep:].float()
        if self.head is None:
            return DraftLogits(logits)
        ids, hidden = self.head.ids, self.head.hidden[0, -keep:]
        return DraftLogits(logits, ids if ids.dim() == 1 else ids[-keep:], hidden)


def without_padding(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Removes padding from one row of tokens, `(1, L)` to `(L',)`. The draft never reads padding; the other tokens have the same positions as in
    generate. A prompt of nothing but padding is left unchanged, for a draft must read at least one token."""
    kept = tokens[0] if mask is None else tokens[0, mask[0].bool()]
    return kept if len(kept) else tokens[0]


def encoder_source(draft: PreTrainedModel, inputs: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Returns the tokens that the draft's own encoder reads, `(S,)`; `None` if it has no encoder, or one that reads features."""
    if not draft.config.is_encoder_decoder or inputs is None or inputs.is_floating_point():
        return None
    return without_padding(inputs, mask)


def _encoder_inputs(model: PreTrainedModel, encoded, mask: Tensor | None) -> dict:
    """Makes the arguments by which the draft's forward takes encoder outputs: its own encoder's as they are, another's as hidden states, or none."""
    if encoded is None:
        return {}
    mask = None if mask is None else mask.to(model.device)
    if model.config.is_encoder_decoder:
        return {"encoder_outputs": encoded, "attention_mask": mask}
    takes = encoder_parameters(model)
    states = encoded[0].to(model.device, model.dtype)  # (1, S, d)
    if "encoder_outputs" in takes:
        return {"encoder_outputs": (states,)}
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask} if takes else {}
