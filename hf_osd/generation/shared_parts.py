"""`SharedParts` are the parts of an assistant that others with the same draft can share."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from hf_osd.config import OnlineConfig
from hf_osd.drafting.draft_trial import try_draft
from hf_osd.drafting.reach import Reach
from hf_osd.drafting.suffix_cache import SuffixCaches
from hf_osd.generation.checks import check_draft
from hf_osd.generation.logit_widths import LogitWidths
from hf_osd.generation.patch import enable
from hf_osd.models.clean_copy import clean_copy, unwrapped
from hf_osd.models.draft_head import DraftHead
from hf_osd.policy.lookahead import DraftPolicy
from hf_osd.system.warn_once import WarnOnce

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from hf_osd.models.lora import Adapter


@dataclass(frozen=True, eq=False)
class SharedParts:
    """Holds the parts that several assistants of one draft can share, see [`hf_osd.routed.RoutedAssistant`].

    Args:
        draft (`PreTrainedModel`, *optional*): the draft as it came, in storage that is never written: copies share it until they write.
        reach (`Reach`, *optional*): the draft's limits.
        widths (`LogitWidths`): numbers of logits of targets.
        head (`DraftHead`, *optional*): the head, where the draft's vocabulary is reduced.
        texts (`SuffixCaches`, *optional*): recent texts.
        lookahead (`DraftPolicy`, *optional*): a policy whose measured costs hold for the others.
        warn_once (`WarnOnce`): gives warnings.
        frozen (`dict[str, Tensor]`, *optional*): what does not train, as the learners read it, see [`hf_osd.distill.student.Student`].
        adapters (`dict[int, Adapter]`, *optional*): untrained adapters over the draft, by their ranks; nobody writes them.
        learning (`threading.Lock`, *optional*): held while one of them learns.
        busy (`Callable[[], bool]`, *optional*): tells whether any of them serves a call.
        static (`SharedParts`, *optional*): of a static draft that serves beside each of them.
    """

    draft: PreTrainedModel | None = None
    reach: Reach | None = None
    widths: LogitWidths = field(default_factory=LogitWidths)
    head: DraftHead | None = None
    texts: SuffixCaches | None = None
    lookahead: DraftPolicy | None = None
    warn_once: WarnOnce = field(default_factory=lambda: WarnOnce(logging.getLogger("hf_osd.assistant")))
    frozen: dict[str, Tensor] | None = None
    adapters: dict[int, Adapter] | None = None
    learning: threading.Lock | None = None
    busy: Callable[[], bool] | None = None
    static: SharedParts | None = None

    @classmethod
    def of(cls, draft: PreTrainedModel | None, config: OnlineConfig) -> SharedParts:
        """Makes the parts for assistants with this draft; opens the seam.

        Raises:
            ValueError: as for [`OnlineAssistant`].
        """
        if draft is not None:
            draft = unwrapped(draft) if isinstance(draft, torch.nn.Module) else draft
            check_draft(draft)
        elif not config.suffix_cache:
            raise ValueError(
                "There is no draft and `suffix_cache` is False, so nothing could draft. Pass a draft, such as "
                "hf_osd.grow_draft(target), or leave suffix_cache on."
            )
        enable()

        shared = cls(texts=SuffixCaches(config.suffix_cache_bytes) if config.suffix_cache else None)
        if draft is not None:
            # A copy in storage of its own, made before any trainer exists: a user's training of `draft` then reaches the serving draft by
            # `refresh` only. The copies that serve and learn share this storage until they write.
            copied = clean_copy(draft)
            trial = try_draft(copied, draft)
            shared = replace(
                shared,
                draft=copied,
                reach=Reach(copied, trial),
                widths=LogitWidths(copied.config.get_text_config(decoder=True), trial.width),
                head=DraftHead.from_config(copied, config),
            )
        return shared

    def with_static(self, draft: PreTrainedModel | None, config: OnlineConfig) -> SharedParts:
        """Adds the parts of a static draft, which shares texts and warnings with these, if there is one. It is copied once, however many assistants share it.

        Raises:
            ValueError: as for [`OnlineAssistant`], or if it cannot serve beside the draft that learns.
        """
        if draft is None:
            return self
        if self.draft is None or config.learn == "process":
            why = (
                "there is no draft that it could serve beside"
                if self.draft is None
                else "`learn` is 'process', which knows of no second draft"
            )
            raise ValueError(f"`static_draft` is given, and {why}. Pass it as `draft`, or choose learn='background'.")
        static = replace(SharedParts.of(draft, config), texts=self.texts, warn_once=self.warn_once)
        if static.draft.config.is_encoder_decoder or self.draft.config.is_encoder_decoder:
            raise ValueError(
                "`static_draft` serves beside a causal LM only, and one of the drafts is an encoder-decoder; pass the better one as `draft`."
            )
        sizes = [one.draft.config.get_text_config(decoder=True).vocab_size for one in (static, self)]
        if sizes[0] != sizes[1]:  # `generate` compares the draft's with the target's, and would take any second one
            raise ValueError(
                f"`static_draft` has a vocabulary of {sizes[0]} tokens and `draft` one of {sizes[1]}. `generate` is told of one draft's tokens only; choose a static draft with "
                "the same tokenizer."
            )
        return replace(self, static=static)
