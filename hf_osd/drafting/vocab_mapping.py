"""`VocabMapping` maps the target's tokens to the draft's vocabulary, and the draft's scores to the target's.

Most pairs share one vocabulary. Some pad it differently, so that their LM heads differ in size; others have two tokenizers. In all cases the draft can
propose only tokens that both vocabularies have, q is 0 for all others, and so the output stays exact: token-level intersection, Timor et al., Lossless
Speculative Decoding Algorithms for Heterogeneous Vocabularies (arXiv 2502.05202, algorithm 4). The draft itself is never changed; its head and embeddings
stay whole.

Symbols: V and W are the sizes of the target's and the draft's LM head, S is the number of tokens that they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.feedback.feedback import SparseLogits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# What byte-level BPE and SentencePiece write for a space.
_SPACES = ("Ġ", "▁")


class VocabMapping:
    """Maps ids and scores between two vocabularies. Make one with `from_models`, `from_sizes` or `from_tokenizers`.

    Args:
        target_size (`int`), draft_size (`int`): V and W.
        shared (`tuple[Tensor, Tensor]`, *optional*): int64 `(S,)` twice: the ids of the shared tokens in the target's vocabulary and in the
            draft's, one to one. `None` if both vocabularies are the same.
        tokenizers (`tuple`, *optional*): the target's and the draft's, if the draft has to tokenize the text anew.
        unk_id (`int`): the draft's id that stands for tokens it does not have.
        num_embeddings (`int`, *optional*): rows of the draft's embedding table, if a text may hold ids beyond it.
    """

    def __init__(
        self,
        target_size: int,
        draft_size: int,
        shared: tuple[Tensor, Tensor] | None = None,
        tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
        unk_id: int = 0,
        num_embeddings: int | None = None,
    ):
        self._num_embeddings = num_embeddings
        self.target_size, self.draft_size = target_size, draft_size
        self.shared = shared
        self._tokenizers, self._unk_id = tokenizers, unk_id
        self._draft_ids = None  # (V,)
        if shared is not None:
            unknown = torch.full((target_size,), -1, dtype=torch.long, device="cpu")
            self._draft_ids = unknown.index_copy_(0, *shared)
        self._by_device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def from_models(
        cls,
        target: PreTrainedModel,
        draft: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> VocabMapping:
        """Makes the mapping that a call of `target.generate` with this draft and these tokenizers uses.

        Raises:
            ValueError: if the heads differ in size and a tokenizer is missing, or the tokenizers share no token.
        """
        sizes = [model.config.get_text_config().vocab_size for model in (target, draft)]
        known = draft.get_input_embeddings().weight.shape[0] if hasattr(draft, "get_input_embeddings") else None
        if tokenizer is not None and assistant_tokenizer is not None:
            return cls.from_tokenizers(tokenizer, assistant_tokenizer, *sizes, known)
        if sizes[0] != sizes[1]:
            missing = "tokenizer" if tokenizer is None else "assistant_tokenizer"
            raise ValueError(
                f"The target has {sizes[0]} tokens, the draft {sizes[1]}, and `{missing}` is None; pass the tokenizers of both: the same "
                "one twice, if only the padding of their heads differs."
            )
        return cls.from_sizes(*sizes, num_embeddings=known)

    @classmethod
    def from_sizes(
        cls, target_size: int, draft_size: int, unk_id: int = 0, num_embeddings: int | None = None
    ) -> VocabMapping:
        """Makes the mapping for one tokenizer and LM heads of V and W rows: ids that both heads and the draft's embeddings have are shared; the rest is
        padding."""
        shared = min(target_size, draft_size, draft_size if num_embeddings is None else num_embeddings)
        if target_size == draft_size == shared:
            return cls(target_size, draft_size, unk_id=unk_id, num_embeddings=num_embeddings)
        ids = torch.arange(shared, device="cpu")
        return cls(target_size, draft_size, (ids, ids), unk_id=unk_id, num_embeddings=num_embeddings)

    @classmethod
    def from_tokenizers(
        cls,
        target_tokenizer: PreTrainedTokenizerBase,
        draft_tokenizer: PreTrainedTokenizerBase,
        target_size: int,
        draft_size: int,
        num_embeddings: int | None = None,
    ) -> VocabMapping:
        """Makes the mapping for two tokenizers: tokens with the same string are shared, whatever sign stands for a space in it, and so are the ends of sequence.

        Raises:
            ValueError: if they share no token.
        """
        known = min(draft_size, draft_size if num_embeddings is None else num_embeddings)
        unk_id = next(
            (
                i
                for i in (draft_tokenizer.unk_token_id, draft_tokenizer.pad_token_id, draft_tokenizer.eos_token_id)
                if i is not None and i < known
            ),
            0,
        )
        if target_tokenizer is draft_tokenizer or target_tokenizer.get_vocab() == draft_tokenizer.get_vocab():
            return cls.from_sizes(target_size, draft_size, unk_id, num_embeddings)
        targets, drafts = _by_string(target_tokenizer, target_size), _by_string(draft_tokenizer, known)
        pairs = {targets[string]: drafts[string] for string in targets.keys() & drafts.keys()}
        ends = target_tokenizer.eos_token_id, draft_tokenizer.eos_token_id
        if None not in ends and ends[0] not in pairs and ends[1] not in set(pairs.values()):
            pairs[ends[0]] = ends[1]
        if not pairs:
            raise ValueError(
                "The target's tokenizer and the draft's share no token, so no draft could ever be accepted. Choose a draft whose "
                "tokenizer has tokens of the target's, or hf_osd.grow_draft(target)."
            )
        shared = tuple(torch.tensor(ids, device="cpu") for ids in zip(*sorted(pairs.items()), strict=True))
        return cls(target_size, draft_size, shared, (target_tokenizer, draft_tokenizer), unk_id, num_embeddings)

    @property
    def is_identity(self) -> bool:
        return self.shared is None

    @property
    def has_one_tokenizer(self) -> bool:
        """Is `True` if both models read a text as the same ids, position by position; their heads may be padded differently."""
        return self._tokenizers is None

    def shared_columns(self, device: torch.device) -> Tensor | None:
        """Returns the columns of the target's logits that the draft has tokens for, `(S,)`; `None` for all."""
        return None if self.shared is None else self._tables(device)[0]

    def to_draft_prompt(self, tokens: Tensor) -> Tensor:
        """Maps the target's prompt `(L,)` to the draft's ids, `(L',)` with L' ≥ 1; L' = L with one tokenizer."""
        if self.shared is None:
            return self.embeddable(tokens)
        if self._tokenizers is None:
            return torch.tensor([i for ids in self.to_draft_ids(tokens.tolist()) for i in ids], device=tokens.device)
        target_tokenizer, draft_tokenizer = self._tokenizers
        specials = set(target_tokenizer.all_special_ids)
        # Some tokenizers put a token before every text. If the target's does too, it must not come twice.
        first = draft_tokenizer("")["input_ids"][:1]
        ids = first if first == [draft_tokenizer.bos_token_id] else []
        run: list[int] = []
        for token in [*tokens.tolist(), None]:
            if token is not None and token not in specials:
                run.append(token)
                continue
            if run:
                ids = ids + draft_tokenizer(self._text(run), add_special_tokens=False)["input_ids"]
                run = []
            if token is not None and (known := self._draft_id(token)) >= 0 and ids != [known]:
                ids = [*ids, known]
        return self.embeddable(torch.tensor(ids or [self._unk_id], device=tokens.device))

    def embeddable(self, tokens: Tensor) -> Tensor:
        """Replaces ids that the draft has no embedding for, such as image placeholders, by `unk_id`; any shape."""
        if self._num_embeddings is None:
            return tokens
        return torch.where((tokens >= 0) & (tokens < self._num_embeddings), tokens, self._unk_id)

    def to_draft_ids(self, tokens: Sequence[int]) -> list[list[int]]:
        """Maps each of the target's tokens to the draft's ids: one if it is shared, else the ids of its text; at least one."""
        if self.shared is None:
            return [[token] for token in tokens]
        return [self._spell(token) for token in tokens]

    def shared_to_draft(self, token: Tensor) -> Tensor:
        """Maps shared tokens to their ids in the draft's vocabulary; int64, any shape."""
        return token if self.shared is None else self._tables(token.device)[2][token]

    def to_draft_rows(self, rows: SparseLogits, pieces: list[list[int]]) -> SparseLogits:
        """Maps the target's distributions of n tokens, over shared tokens, to the draft's ids. `pieces` are each token's ids from `to_draft_ids`: the first
        of them gets the token's row, the others rows that teach nothing."""
        if self.shared is None:
            return rows
        rows = SparseLogits(self.shared_to_draft(rows.top_ids.long()).to(torch.int32), rows.top_logps, rows.tail_logp)
        n = sum(map(len, pieces))
        return rows if n == len(pieces) else rows.scatter(starts(pieces), n)

    def to_target_scores(self, logits: Tensor) -> Tensor:
        """Maps the draft's logits `(n, W)` to the target's vocabulary, `(n, V)`; -inf for tokens that the draft does not have."""
        if self.shared is None:
            return logits
        target_ids, draft_ids, _ = self._tables(logits.device)
        scores = torch.full((logits.shape[0], self.target_size), -torch.inf, device=logits.device, dtype=logits.dtype)
        return scores.index_copy_(-1, target_ids, logits.index_select(-1, draft_ids))

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Returns, on `device`, both ids of the shared tokens, `(S,)` each, and the draft's id by the target's, `(V,)`, -1 for none."""
        if device not in self._by_device:
            self._by_device[device] = tuple(ids.to(device) for ids in (*self.shared, self._draft_ids))
        return self._by_device[device]

    def _draft_id(self, token: int) -> int:
        """Looks up the draft's id of one of the target's tokens; -1 for none, and for ids outside the target's head, such as image placeholders."""
        return int(self._draft_ids[token]) if 0 <= token < self.target_size else -1

    def _spell(self, token: int) -> list[int]:
        known = self._draft_id(token)
        if known >= 0:
            return [known]
        ids = []
        if self._tokenizers is not None and 0 <= token < self.target_size:
            ids = self._tokenizers[1](self._text([token]), add_special_tokens=False)["input_ids"]
            ids = self.embeddable(torch.tensor(ids, dtype=torch.long, device="cpu")).tolist()
        return ids or [self._unk_id]

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizers[0].decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def starts(pieces: list[list[int]]) -> list[int]:
    """Computes the index at which each piece starts when all are concatenated."""
    at = [0]
    for piece in pieces[:-1]:
        at.append(at[-1] + len(piece))
    return at


def _by_string(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, int]:
    """Maps the strings of a tokenizer's tokens below id `size` to these ids, with a plain space for the sign of one."""
    strings: dict[str, int] = {}
    for i, string in sorted((i, string) for string, i in tokenizer.get_vocab().items() if i < size):
        for sign in _SPACES:
            string = string.replace(sign, " ")
        # Two strings may become the same: the first id keeps it, for shared tokens map one to one.
        strings.setdefault(string, i)
    return strings


def check_vocabularies(target: PreTrainedModel, mapping: VocabMapping):
    """Raises a `ValueError` if `target` cannot be assisted by a draft of another vocabulary."""
    if target.config.is_encoder_decoder and not mapping.is_identity:
        raise ValueError(
            f"The target is an encoder-decoder of {mapping.target_size} tokens and the draft has {mapping.draft_size}; hf_osd "
            "translates between vocabularies for decoder-only models. Choose a draft with the target's own vocabulary."
        )
