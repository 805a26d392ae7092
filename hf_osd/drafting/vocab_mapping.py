"""`VocabMapping`: the target's tokens in the draft's vocabulary, and the draft's scores in the target's.

Most pairs share one vocabulary. Some pad it differently, so that the rows of their LM heads differ in number; others come with two
tokenizers. In all of them the draft can say those tokens alone that both vocabularies have, q is 0 outside them, and so the output stays
exact: token-level intersection, Timor et al., Lossless Speculative Decoding Algorithms for Heterogeneous Vocabularies (arXiv 2502.05202,
algorithm 4). The draft itself is never changed; its head and embeddings stay whole.

Symbols: V and W the rows of the target's and of the draft's LM head, S the tokens they share.
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
    """Between two vocabularies. Make one by `of_models`, `of_sizes` or `of_tokenizers`.

    Args:
        target_size (`int`), draft_size (`int`): V and W.
        shared (`tuple[Tensor, Tensor]`, *optional*): int64 `(S,)` twice: the ids of shared tokens in the target's vocabulary and in the
            draft's, one to one. `None` if both vocabularies are the same.
        tokenizers (`tuple`, *optional*): the target's and the draft's, where text has to be read anew.
        stand_in (`int`): the draft's id for what it has no token for.
        rows (`int`, *optional*): how many tokens the draft has an embedding of, where those may be fewer than a text shows it.
    """

    def __init__(
        self,
        target_size: int,
        draft_size: int,
        shared: tuple[Tensor, Tensor] | None = None,
        tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
        unk_id: int = 0,
        rows: int | None = None,
    ):
        self._rows = rows
        self.target_size, self.draft_size = target_size, draft_size
        self.shared = shared
        self._tokenizers, self._stand_in = tokenizers, unk_id
        self._to_draft = None
        if shared is not None:
            self._to_draft = torch.full((target_size,), -1, dtype=torch.long, device="cpu").index_copy_(
                0, *shared
            )  # (V,)
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def of_models(
        cls,
        target: PreTrainedModel,
        draft: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> VocabMapping:
        """Between a target and a draft, as a call of `target.generate` with these tokenizers has it.

        Raises:
            ValueError: if the heads differ in size and a tokenizer is missing, or the tokenizers share no token.
        """
        sizes = [model.config.get_text_config().vocab_size for model in (target, draft)]
        rows = draft.get_input_embeddings().weight.shape[0] if hasattr(draft, "get_input_embeddings") else None
        if tokenizer is not None and assistant_tokenizer is not None:
            return cls.of_tokenizers(tokenizer, assistant_tokenizer, *sizes, rows)
        if sizes[0] != sizes[1]:
            missing = "tokenizer" if tokenizer is None else "assistant_tokenizer"
            raise ValueError(
                f"The target has {sizes[0]} tokens, the draft {sizes[1]}, and `{missing}` is None; pass the tokenizers of both: the same "
                "one twice, if only the padding of their heads differs."
            )
        return cls.of_sizes(*sizes, rows=rows)

    @classmethod
    def of_sizes(cls, target_size: int, draft_size: int, unk_id: int = 0, rows: int | None = None) -> VocabMapping:
        """One tokenizer, and heads of V and W rows: ids below both are shared, and of those that the draft has an embedding of; the rest is padding."""
        shared = min(target_size, draft_size, draft_size if rows is None else rows)
        if target_size == draft_size == shared:
            return cls(target_size, draft_size, unk_id=unk_id, rows=rows)
        ids = torch.arange(shared, device="cpu")
        return cls(target_size, draft_size, (ids, ids), unk_id=unk_id, rows=rows)

    @classmethod
    def of_tokenizers(
        cls,
        target_tokenizer: PreTrainedTokenizerBase,
        draft_tokenizer: PreTrainedTokenizerBase,
        target_size: int,
        draft_size: int,
        rows: int | None = None,
    ) -> VocabMapping:
        """Two tokenizers: tokens of the same string are shared, whichever sign stands for a space in it, and so is the end of sequence.

        Raises:
            ValueError: if they share no token.
        """
        known = min(draft_size, draft_size if rows is None else rows)
        unk_id = next(
            (
                i
                for i in (draft_tokenizer.unk_token_id, draft_tokenizer.pad_token_id, draft_tokenizer.eos_token_id)
                if i is not None and i < known
            ),
            0,
        )
        if target_tokenizer is draft_tokenizer or target_tokenizer.get_vocab() == draft_tokenizer.get_vocab():
            return cls.of_sizes(target_size, draft_size, unk_id, rows)
        ours, theirs = _by_string(target_tokenizer, target_size), _by_string(draft_tokenizer, known)
        pairs = {ours[string]: theirs[string] for string in ours.keys() & theirs.keys()}
        ends = target_tokenizer.eos_token_id, draft_tokenizer.eos_token_id
        if None not in ends and ends[0] not in pairs and ends[1] not in set(pairs.values()):
            pairs[ends[0]] = ends[1]
        if not pairs:
            raise ValueError(
                "The target's tokenizer and the draft's share no token, so no draft could ever be accepted. Choose a draft whose "
                "tokenizer has tokens of the target's, or hf_osd.grow_draft(target)."
            )
        shared = tuple(torch.tensor(ids, device="cpu") for ids in zip(*sorted(pairs.items()), strict=True))
        return cls(target_size, draft_size, shared, (target_tokenizer, draft_tokenizer), unk_id, rows)

    @property
    def is_identity(self) -> bool:
        return self.shared is None

    @property
    def has_one_tokenizer(self) -> bool:
        """Whether both read a text as the same ids, position by position, whatever padding their heads have."""
        return self._tokenizers is None

    def shared_columns(self, device: torch.device) -> Tensor | None:
        """The columns of the target's logits that the draft can say, `(S,)`; `None` for all."""
        return None if self.shared is None else self._tables(device)[0]

    def prompt(self, tokens: Tensor) -> Tensor:
        """The target's prompt `(L,)` as the draft reads it, `(L',)` with L' ≥ 1; L' = L with one tokenizer."""
        if self.shared is None:
            return self.shown(tokens)
        if self._tokenizers is None:
            return torch.tensor([i for ids in self.tokens(tokens.tolist()) for i in ids], device=tokens.device)
        target_tokenizer, draft_tokenizer = self._tokenizers
        specials = set(target_tokenizer.all_special_ids)
        # Some tokenizers put a token before every text. Where the target's does too, it is not to come twice.
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
            if token is not None and (known := self._known(token)) >= 0 and ids != [known]:
                ids = [*ids, known]
        return self.shown(torch.tensor(ids or [self._stand_in], device=tokens.device))

    def shown(self, tokens: Tensor) -> Tensor:
        """Tokens of any shape as they may be shown to the draft's embeddings: where those have no row, as an image's place may have none, the stand-in."""
        if self._rows is None:
            return tokens
        return torch.where((tokens >= 0) & (tokens < self._rows), tokens, self._stand_in)

    def tokens(self, tokens: Sequence[int]) -> list[list[int]]:
        """Of each of the target's tokens, the draft's ids: one if it is shared, else those of its text, and never none."""
        if self.shared is None:
            return [[token] for token in tokens]
        return [self._spelled(token) for token in tokens]

    def token(self, token: Tensor) -> Tensor:
        """A shared token's id in the draft's vocabulary; int64, any shape."""
        return token if self.shared is None else self._tables(token.device)[2][token]

    def rows(self, rows: SparseLogits, pieces: list[list[int]]) -> SparseLogits:
        """What the target said before each of its n tokens, about shared tokens and in its ids, in the draft's: `pieces` are the draft's ids of the tokens, as
        `tokens` gives them, and each has its row at the first of its ids. The others have no target."""
        if self.shared is None:
            return rows
        rows = SparseLogits(self.token(rows.top_ids.long()).to(torch.int32), rows.top_logps, rows.tail_logp)
        n = sum(map(len, pieces))
        return rows if n == len(pieces) else rows.scatter(starts(pieces), n)

    def scores(self, logits: Tensor) -> Tensor:
        """The draft's logits `(n, W)` over the target's vocabulary, `(n, V)`: -inf where the draft has no such token."""
        if self.shared is None:
            return logits
        ours, theirs, _ = self._tables(logits.device)
        scores = torch.full((logits.shape[0], self.target_size), -torch.inf, device=logits.device, dtype=logits.dtype)
        return scores.index_copy_(-1, ours, logits.index_select(-1, theirs))

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Both ids of the shared tokens, `(S,)`, and the draft's id by the target's, `(V,)`, -1 for none."""
        if device not in self._on:
            self._on[device] = tuple(ids.to(device) for ids in (*self.shared, self._to_draft))
        return self._on[device]

    def _known(self, token: int) -> int:
        """The draft's id of one of the target's tokens, -1 for none; also for ids that no head says, such as an image's place."""
        return int(self._to_draft[token]) if 0 <= token < self.target_size else -1

    def _spelled(self, token: int) -> list[int]:
        known = self._known(token)
        if known >= 0:
            return [known]
        ids = []
        if self._tokenizers is not None and 0 <= token < self.target_size:
            ids = self._tokenizers[1](self._text([token]), add_special_tokens=False)["input_ids"]
            ids = self.shown(torch.tensor(ids, dtype=torch.long, device="cpu")).tolist()
        return ids or [self._stand_in]

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizers[0].decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def starts(pieces: list[list[int]]) -> list[int]:
    """Where each piece starts in all of them, one after the other."""
    at = [0]
    for piece in pieces[:-1]:
        at.append(at[-1] + len(piece))
    return at


def _by_string(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, int]:
    """The tokens that a head of `size` rows can say, by string, with a plain space for the sign of one."""
    strings: dict[str, int] = {}
    for i, string in sorted((i, string) for string, i in tokenizer.get_vocab().items() if i < size):
        for sign in _SPACES:
            string = string.replace(sign, " ")
        # Without their signs two strings may be one: the first keeps the name, for shared tokens go one to one.
        strings.setdefault(string, i)
    return strings


def check_vocabularies(target: PreTrainedModel, translation: VocabMapping):
    """Whether a draft of another vocabulary can assist `target`: a `ValueError` if not."""
    if target.config.is_encoder_decoder and not translation.is_identity:
        raise ValueError(
            f"The target is an encoder-decoder of {translation.target_size} tokens and the draft has {translation.draft_size}; hf_osd "
            "translates between vocabularies for decoder-only models. Choose a draft with the target's own vocabulary."
        )
