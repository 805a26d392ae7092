"""`LogitWidths`: how many logits targets give, which may be fewer than their config says: some cut the padding of their head off."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class LogitWidths:
    """Of the targets of an assistant. A config that names a second, smaller number of tokens leaves it open how many logits there are, until they have been seen once.

    Args:
        draft (`PretrainedConfig`, *optional*): of the draft's text model,
        width (`int`, *optional*): and the logits that it gives, where that is known: a target of the same config gives as many.
    """

    def __init__(self, draft: PretrainedConfig | None = None, width: int | None = None):
        self._seen: weakref.WeakKeyDictionary[PreTrainedModel, int] = weakref.WeakKeyDictionary()
        self._draft, self._width = draft, width

    def of(self, target: PreTrainedModel) -> int | None:
        """How many logits it gives; `None` if that has to be seen first, see `note`."""
        config = target.config.get_text_config(decoder=True)
        if target in self._seen or not _smaller(config):
            return self._seen.get(target, config.vocab_size)
        same = (
            self._draft is not None and type(self._draft) is type(config) and _smaller(self._draft) == _smaller(config)
        )
        return self._width if same and self._draft.vocab_size == config.vocab_size else None

    def least(self, target: PreTrainedModel) -> int:
        """At least how many it gives."""
        config = target.config.get_text_config(decoder=True)
        return min(_smaller(config).values(), default=config.vocab_size)

    def note(self, target: PreTrainedModel, width: int):
        """It gave so many."""
        self._seen[target] = width


def _smaller(config: PretrainedConfig) -> dict[str, int]:
    """What a config says of vocabularies that are smaller than the one it has, by name."""
    return {
        name: value
        for name, value in vars(config).items()
        if "vocab" in name and isinstance(value, int) and 0 < value < config.vocab_size
    }
