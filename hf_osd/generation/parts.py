"""`Parts` is what an assistant lends each call that it opens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_osd.config import OnlineConfig
    from hf_osd.drafting.reach import Reach
    from hf_osd.drafting.suffix_cache import SuffixCaches
    from hf_osd.drafting.vocab_mapping import VocabMapping
    from hf_osd.feedback.prompt_states import SeenTexts
    from hf_osd.models.draft_head import DraftHead
    from hf_osd.models.hot_swap import HotSwapDraft, NullHotSwap
    from hf_osd.policy.lookahead import DraftPolicy


@dataclass(frozen=True, eq=False)
class Parts:
    """Holds the parts of an assistant that a call uses, as they are when the call opens.

    Args:
        config (`OnlineConfig`): the assistant's config.
        serving (`HotSwapDraft`): leases the draft.
        lookahead (`DraftPolicy`): chooses source and γ.
        mapping (`VocabMapping`): maps the target's tokens to the draft's.
        seen_texts (`SeenTexts`): finds the part of a prompt that earlier texts do not have.
        warn (`Callable[[str], None]`): gives a warning, once.
        learns (`bool`): `True` if anything learns from calls.
        reach (`Reach`, *optional*): limits of what the draft can read, if there is one. Beyond them, and where the draft fails, a call goes on without it.
        head (`DraftHead`, *optional*): makes the heads of a draft with a reduced vocabulary.
        texts (`SuffixCaches`, *optional*): recent texts, if the suffix cache drafts.
        note_width (`Callable[[int], None]`, *optional*): called with the number of logits that the target gives, if that is not known yet; the call then
            drafts nothing.
    """

    config: OnlineConfig
    serving: HotSwapDraft | NullHotSwap
    lookahead: DraftPolicy
    mapping: VocabMapping
    seen_texts: SeenTexts
    warn: Callable[[str], None]
    learns: bool = False
    reach: Reach | None = None
    head: DraftHead | None = None
    texts: SuffixCaches | None = None
    note_width: Callable[[int], None] | None = None
