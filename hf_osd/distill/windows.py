"""`cut`: finds the part of a long request that is worth the time to judge and to learn it; and `Windows`: holds such parts to be judged. They know Feedback, no
model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_osd.config import OnlineConfig
from hf_osd.distill.scoring import Judged
from hf_osd.feedback.feedback import Feedback
from hf_osd.feedback.target_states import TargetStates

# The share of a window that is only read, as context; and the text's first tokens, so many, which are read too, for models attend to these wherever they are
# (Xiao et al. 2023, arXiv 2309.17453).
_CONTEXT = 1 / 4
_FIRST = 4


def cut(
    request: Feedback,
    most: int | None,
    positions: str = "all",
    prompts: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Feedback, slice]:
    """Cut a request whose text is longer than `most` tokens to the window that teaches at the largest number of positions: the text's first tokens, context, and
    these positions. A shorter one is returned as it is, with all of its answer. An encoder's source is never cut, and the text after it is left its beginning.

    Args:
        request (`Feedback`): to be cut.
        most (`int`, *optional*): tokens of the window; `None` for all.
        positions (`str`), prompts (`bool`): select the positions that teach, as for [`hf_osd.distill.collator.FeedbackCollator`].
        generator (`torch.Generator`, *optional*): chooses among windows that teach alike; the first of them if left out.

    Returns:
        the window, a request whose tokens keep their positions (`gap`), and the slice of the answer that is in it.
    """
    length, start = len(request.tokens), request.prompt_length
    if most is None or length <= most:
        return request, slice(0, len(request))
    most = max(most, 4 * _FIRST)
    taught = torch.zeros(length, dtype=torch.bool, device="cpu")
    taught[start:] = request.teaching_mask(positions)
    rows = len(request.prompt_rows) if prompts and request.prompt_rows is not None else 0
    taught[start - rows : start] = True
    begin, first = _place(taught, most, generator if request.source is None else None, request.source is None)
    end = begin + most - (_FIRST if begin else 0)
    a, b = min(max(first - start, 0), len(request)), max(end - start, 0)  # of the answer
    kept = {
        name: getattr(request, name)[a:b]
        for name in (
            "top_ids",
            "top_logps",
            "tail_logp",
            "draft_logps",
            "drafted",
            "drafted_logp",
            "outcome",
            "overlap",
        )
    }
    tokens = request.tokens[begin:end]
    if begin:
        tokens = torch.cat([request.tokens[:_FIRST], tokens])
    of_prompt = range(max(first, start - rows), min(end, start)) if not a else range(0)
    at = torch.tensor([token - (start - rows) for token in of_prompt], dtype=torch.long, device="cpu")
    return replace(
        request,
        tokens=tokens,
        prompt_length=len(tokens) - (b - a),
        prompt_rows=request.prompt_rows.select(at) if len(at) else None,
        gap=(_FIRST, begin - _FIRST) if begin else None,
        states=None if request.states is None else _cut_states(request.states, begin, end),
        **kept,
    ), slice(a, b)


def _cut_states(states: TargetStates, begin: int, end: int) -> TargetStates | None:
    """The states of a window `[:_FIRST] + [begin:end]` of a text, at the places of its tokens there. Where tokens are left out, the last of the first ones gets
    the state before `begin`: the draft reads it with the token at `begin`, and with no other."""
    if not begin:
        return states.cut(0, end)
    positions = torch.cat([torch.arange(_FIRST - 1, device="cpu"), torch.arange(begin - 1, end, device="cpu")])
    there = (
        ((states.start <= positions) & (positions < states.stop)).nonzero().squeeze(-1)
    )  # consecutive, as states are
    return states.select(positions[there]).moved(int(there[0])) if len(there) else None


def cut_to_learn(requests: Sequence[Feedback], config: OnlineConfig, generator: torch.Generator) -> list[Feedback]:
    """Cut long requests to the windows that are learnt: another one each time, if several teach alike."""
    return [cut(one, config.learning_window, config.positions, generator=generator)[0] for one in requests]


class Windows:
    """Cuts long requests to the windows that are judged: `requests`, of `most` tokens each, if given."""

    def __init__(self, whole: Sequence[Feedback], most: int | None):
        cuts = [cut(one, most, prompts=False) for one in whole]
        self.requests, self._at = [one for one, _ in cuts], [at for _, at in cuts]
        self._whole = whole

    def spread(self, judged: Sequence[Judged]) -> list[Judged]:
        """Spread their scores over all positions of the whole requests; NaN outside the windows."""
        return [self._within(*each) for each in zip(self._whole, self.requests, self._at, judged, strict=True)]

    @staticmethod
    def _within(whole: Feedback, part: Feedback, at: slice, judged: Judged) -> Judged:
        if part is whole:
            return judged
        spread = [one.new_full((len(whole),), torch.nan) for one in judged]
        taught = whole.teaching_mask("all")
        # The first part of a token that is several of the draft's counts as wrong; a window that ends there does not show the other parts.
        if at.start < at.stop < len(taught) and not taught[at.stop]:
            at = slice(at.start, at.stop - 1)
        for wide, one in zip(spread, judged, strict=True):
            wide[at] = one[: at.stop - at.start]
        return Judged(*spread)


def _place(taught: Tensor, most: int, generator: torch.Generator | None, anywhere: bool) -> tuple[int, int]:
    """Choose where a window begins, and the first token in it that may teach: at the text's beginning, or after as much context as is only read."""
    body = most - _FIRST
    context = int(_CONTEXT * body)
    upto = torch.cat([taught.new_zeros(1, dtype=torch.long), taught.long().cumsum(0)])  # taught before each
    if not anywhere or len(taught) - body <= _FIRST:
        return 0, 1
    begins = torch.arange(_FIRST + 1, len(taught) - body + 1, device="cpu")
    teach = upto[begins + body] - upto[begins + context]
    best = int(teach.max())
    if int(upto[most] - upto[1]) >= best:
        return 0, 1
    alike = begins[teach == best]
    at = 0 if generator is None else int(torch.randint(len(alike), (1,), generator=generator, device="cpu"))
    return int(alike[at]), int(alike[at]) + context
