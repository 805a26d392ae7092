"""`DraftContext`: what the draft has read in one generate call, in its own tokens, with the keys and values of it, and `DraftLogits`: what it
says next."""

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


def logit_width(model: PreTrainedModel) -> int | None:
    """How many logits a decoder gives for a token, by trying; `None` of a model that cannot read a token alone."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            return (
                DraftContext(model, torch.zeros(1, dtype=torch.long, device=model.device)).catch_up(0).logits.shape[-1]
            )
    except Exception:
        return None
    finally:
        model.train(training)


@dataclass(frozen=True)
class DraftLogits:
    """The draft's logits at n positions, of all its tokens or of those that its head computes.

    Args:
        logits (`Tensor` float32 `(n, R)`): R of the draft's W tokens.
        ids (`Tensor` int64 `(R,)` or `(n, R)`, *optional*): which; `None` for all.
        hidden (`Tensor` `(n, d)`, *optional*): what the head read, where it computes some tokens alone.
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
        """The likeliest token of each row, `(n,)`."""
        return self.tokens(self.logits.argmax(-1))

    def tokens(self, columns: Tensor) -> Tensor:
        """The token of one column in each row, `(n,)` to `(n,)`."""
        if self.ids is None:
            return columns
        return self.ids[columns] if self.ids.dim() == 1 else self.ids.gather(-1, columns[:, None]).squeeze(-1)

    def confidence(self) -> Tensor:
        """The probability of the likeliest token of each row, `(n,)`."""
        return (self.logits.amax(-1) - self.logits.logsumexp(-1)).exp()

    def dense(self, size: int) -> Tensor:
        """All of the draft's logits, `(n, W)`: -inf where none was computed."""
        if self.ids is None:
            return self.logits
        ids = self.ids if self.ids.dim() == 2 else self.ids.expand(len(self), -1)
        return self.logits.new_full((len(self), size), -torch.inf).scatter_(-1, ids, self.logits)


class DraftContext:
    """The verified text as the draft reads it, and a cache that may lag behind it.

    Args:
        model (`PreTrainedModel`): the leased draft.
        prompt (`Tensor` int64 `(L,)`): the prompt in the draft's tokens, without padding.
        encoded (*optional*): encoder outputs for a draft that attends to them: its own encoder's, or the target's if it has none.
        encoded_mask (`Tensor` `(1, S)`, *optional*): which of them are no padding.
    """

    def __init__(self, model: PreTrainedModel, prompt: Tensor, encoded=None, encoded_mask: Tensor | None = None):
        self.model = model
        self.head: RowsHead | LowRankHead | None = None  # in place of the model's own, of which `model` is then a view
        self.ids = prompt[None].to(model.device)  # (1, M)
        self._starts: list[int] = []  # where in it each verified token of the target starts
        self._keeps_logits = model._supports_logits_to_keep()
        self._inputs = _encoder_inputs(model, encoded, encoded_mask)
        self._ids_name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
        self._cache = self._empty_cache()

    @property
    def length(self) -> int:
        """M, in the draft's tokens."""
        return self.ids.shape[1]

    @property
    def unread(self) -> int:
        """Tokens of it that the cache lacks."""
        return self.length - self._cache.get_seq_length()

    @property
    def is_ready(self) -> bool:
        """Whether there is all that the draft reads."""
        return True

    @property
    def is_behind(self) -> bool:
        """Whether its next forward reads more than those after it will: its time is then no measure of theirs."""
        return self.unread > 2

    @property
    def askable(self) -> float:
        """Verified tokens, the last ones, of which the draft can be asked what it would have predicted."""
        return math.inf

    def extend(self, tokens: Tensor, sizes: list[int]):
        """Append verified text, `(1, T)` in the draft's ids: of each of the target's tokens it has as many as `sizes` says."""
        start = self.length
        for size in sizes:
            self._starts.append(start)
            start += size
        self.ids = torch.cat([self.ids, tokens.to(self.ids.device)], dim=-1)

    def catch_up(self, lag: int) -> DraftLogits:
        """Read all the cache lacks: what the draft says of the last `lag` tokens of the target and of the next one, lag+1 rows."""
        rows = [start - 1 for start in self._starts[len(self._starts) - lag :]] + [self.length - 1]
        said = self._forward(self.ids[:, self._cache.get_seq_length() :], keep=self.length - rows[0])
        return said if len(said) == len(rows) else said[[row - rows[0] for row in rows]]

    def step(self, token: Tensor) -> DraftLogits:
        """Read one drafted token, int64 `(1, 1)`: what the draft says of the next."""
        return self._forward(token.to(self.ids.device), keep=1)

    def crop(self, accepted: int):
        """Keep of the cache what is verified: the text and the accepted drafts, of those that were read.

        Owed after every round that drafted, also by 0, or sliding windows never shrink.
        """
        self._cache.crop(-max(self._cache.get_seq_length() - self.length - accepted, 0))

    def reads(self, n: int) -> bool:
        """Whether the draft can read n tokens at all, whatever they say.

        Raises:
            torch.OutOfMemoryError: if that is what fails.
        """
        probe = copy.copy(self)
        probe.ids, probe._starts, probe._cache = self.ids[:, :1].expand(1, n), [], self._empty_cache()
        try:
            with torch.no_grad():
                probe.catch_up(0)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return False
        return True

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
    """Of one row of tokens `(1, L)`, those that are no padding, `(L',)`. To the draft padding is nothing: it reads the others at the
    positions that generate gives them too. A prompt that is all padding stays as it is: a draft must read something."""
    kept = tokens[0] if mask is None else tokens[0, mask[0].bool()]
    return kept if len(kept) else tokens[0]


def encoder_source(draft: PreTrainedModel, inputs: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The tokens that the draft's own encoder reads, `(S,)`; `None` if it has none, or reads features."""
    if not draft.config.is_encoder_decoder or inputs is None or inputs.is_floating_point():
        return None
    return without_padding(inputs, mask)


def _encoder_inputs(model: PreTrainedModel, encoded, mask: Tensor | None) -> dict:
    """What the draft's forward takes of an encoder: its own outputs whole, those of another as hidden states, or nothing."""
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
