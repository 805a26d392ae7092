"""`Shape` is a kind of draft that can be grown from a target; `default_shapes` lists those that are worth a try."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_osd.models.blueprint import depth_of, text_model
from hf_osd.models.clean_copy import unwrapped
from hf_osd.models.draft_head import can_select_rows
from hf_osd.models.feature_growth import default_aux_layers, grow_feature_draft
from hf_osd.saving.drafts import grow_draft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows of the LM head that are tried beside all of them. A size over half of the vocabulary saves too little to be told apart.
SIZES = (4096, 8192)


@dataclass(frozen=True)
class Shape:
    """Describes a draft that can be grown from a target.

    Args:
        kind (`str`): `"layers"`, of the target's own layers, or `"feature"`, one new layer that reads the target's hidden states.
        layers (`tuple[int, ...]`): the layers of the target that it is made of, or after which it reads the states.
    """

    kind: str
    layers: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind} {','.join(map(str, self.layers))}"

    def grow(self, target: PreTrainedModel) -> PreTrainedModel:
        """Grow a draft of this shape, which has learnt nothing yet.

        Raises:
            ValueError: if the target has no such draft.
        """
        return (grow_feature_draft if self.kind == "feature" else grow_draft)(target, self.layers)


def default_shapes(target: PreTrainedModel) -> list[Shape]:
    """List shapes of one to four of the target's layers, fewer than it has (its first ones, first and last, and spread over its depth), and the one that reads its states.

    Raises:
        ValueError: if nothing can be grown from the target.
    """
    depth = depth_of(text_model(unwrapped(target)))
    picked = [tuple(range(count)) for count in (1, 2, 3, 4)]
    picked += [tuple(round(i * (depth - 1) / (count - 1)) for i in range(count)) for count in (2, 3, 4)]
    distinct = [one for one in dict.fromkeys(picked) if len(set(one)) == len(one) < depth]
    return [
        *(Shape("layers", one) for one in sorted(distinct, key=len)),
        Shape("feature", tuple(default_aux_layers(depth))),
    ]


def sizes_of(draft: PreTrainedModel, sizes: tuple[int, ...] = SIZES) -> list[int | None]:
    """List the draft vocabulary sizes to try of a draft; `None` stands for its whole LM head."""
    rows = draft.get_output_embeddings().weight.shape[0]
    return [*(size for size in sizes if 2 * size <= rows), None] if can_select_rows(draft) else [None]
