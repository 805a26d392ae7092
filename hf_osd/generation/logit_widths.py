"""`LogitWidths` finds how many logits a target gives for a token. They may be fewer than its `vocab_size`: some models cut the padding of their head off."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class LogitWidths:
    """Knows the number of logits of each target of an assistant. If a target's config names a second, smaller vocabulary, then the number is unknown until it was
    observed once.

    Args:
        draft (`PretrainedConfig`, *optional*): config of the draft's text model.
        width (`int`, *optional*): the number of the draft's logits, if known; a target with the same config gives as many.
    """

    def __init__(self, draft: PretrainedConfig | None = None, width: int | None = None):
        self._observed: weakref.WeakKeyDictionary[PreTrainedModel, int] = weakref.WeakKeyDictionary()
        self._draft, self._width = draft, width

    def width_of(self, target: PreTrainedModel) -> int | None:
        """Returns the target's number of logits; `None` if it has to be observed first, see `note`."""
        config = target.config.get_text_config(decoder=True)
        if target in self._observed or not _smaller(config):
            return self._observed.get(target, config.vocab_size)
        same = (
            self._draft is not None and type(self._draft) is type(config) and _smaller(self._draft) == _smaller(config)
        )
        return self._width if same and self._draft.vocab_size == config.vocab_size else None

    def min_width(self, target: PreTrainedModel) -> int:
        """Returns a lower bound of the target's number of logits."""
        config = target.config.get_text_config(decoder=True)
        return min(_smaller(config).values(), default=config.vocab_size)

    def note(self, target: PreTrainedModel, width: int):
        """Records that the target gave `width` logits."""
        self._observed[target] = width


def _smaller(config: PretrainedConfig) -> dict[str, int]:
    """Collects a config's fields, by name, that give the size of a vocabulary smaller than its `vocab_size`."""
    return {
        name: value
        for name, value in vars(config).items()
        if "vocab" in name and isinstance(value, int) and 0 < value < config.vocab_size
    }
