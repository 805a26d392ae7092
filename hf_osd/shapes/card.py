"""`card_of` writes the model card of a draft that was chosen out of several shapes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hf_osd.metrics.stats import Stats
from hf_osd.saving.feature_drafts import layout_of
from hf_osd.saving.model_card import machine_facts, model_card

if TYPE_CHECKING:
    from hf_osd.shapes.choice import Choice


def card_of(choice: Choice, target: str, folder: str | os.PathLike) -> str:
    """Write a README.md: how the draft was grown, distilled and chosen, and the table it was chosen from.

    Args:
        choice (`Choice`): the choice.
        target (`str`): the target's name; left out of the card if it is a folder of this machine.
        folder: where the draft is saved already.
    """
    lines = [
        "A draft model for speculative decoding, grown from its target by `hf-osd grow --choose` and distilled on the target's own answers. It has served nothing yet. It drafts; "
        "the target decides. Its weights can have memorised some of the prompts and answers.",
        "",
        choice.summary(),
        "",
        "The shapes it was chosen from, the chosen one first: c, the time of a draft step, and the time of a round's first forward, in one-token steps of the target; expected "
        "acceptance of the first tokens of a block on answers that were not learnt, those before being right; the best number γ of drafted tokens, and the speed-up expected "
        "then, over plain decoding and without the suffix cache (at γ = 0 that of the best γ from 1 on); requests learnt; seconds of distillation.",
        "",
        choice.table(),
    ]
    machine = machine_facts(choice.draft.device, choice.draft.dtype)
    return model_card(
        Stats(), target=target, config=choice.config, machine=machine, layout=layout_of(folder), grown=lines
    )
