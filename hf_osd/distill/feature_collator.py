"""`FeatureCollator`: requests to one batch for a draft that reads the target's hidden states. It knows Feedback and tensors, no model."""

from __future__ import annotations

import torch

from hf_osd.feedback.feedback import Feedback


class FeatureCollator:
    """Pads requests to one batch of columns, and stacks the targets of the rows that teach.

    The column of token t_j reads that token and the target's state s_{j-1}, and predicts t_{j+1}. A request has those columns for which it has both the state
    and the next token, which are consecutive; where states were not recorded nothing is read, and nothing is taught. Columns are padded left, so that the logits
    that are asked for lie in the last ones.

    Args:
        width (`int`): F, the numbers of one state, as the draft reads it.
        positions (`str`): `"all"` or `"error"`: which generated positions teach (see [`Feedback.teaching_mask`]).
        prompts (`bool`, defaults to `True`): whether those of the prompts do that have a target.
        last_state (`slice`, *optional*): where, in a state as it was recorded, that of the target's last layer lies, of H_t numbers, if rows are taught it.

    Returns, from a call on a list of requests, a dict of
        `input_ids`, `attention_mask`, `position_ids` (int64 `(B, T)`): the columns; the position of t_j's is j-1;
        `features` (float32 `(B, T, F)`): the target's states, 0 in padding;
        `labels` (int64 `(B, T+1)`): the token that a column predicts, one further right, where that teaches, -100 elsewhere, so that Trainer counts the rows;
        `rows` (int64 `(R,)`): where the R teaching rows lie in the `(B·keep)` logits of the last `keep` columns;
        `keep` (`int`): the columns that hold them;
        `last_states` (float32 `(R, H_t)`), `has_last_state` (bool `(R,)`), with `last_state` alone: the target's last state at the column that predicts the token, and
            whether it was recorded;
        `depth` (int64 `(R,)`): the columns of its request that lie before a row's own: after so many drafted tokens, at most, it can be predicted;
        `top_ids` (int64 `(R, k)`), `top_logps` (float32 `(R, k)`), `tail_logp` (float32 `(R,)`): their targets.

    Raises, from a call:
        ValueError: if a request's states are of another width.
    """

    def __init__(self, width: int, positions: str = "all", prompts: bool = True, last_state: slice | None = None):
        self.width, self.positions, self.prompts, self.last_state = width, positions, prompts, last_state

    def __call__(self, batch: list[Feedback]) -> dict:
        counts = [self._columns(feedback) for feedback in batch]
        width = max(*counts, 1)
        width += width % 128 == 64  # see FeedbackCollator
        size = len(batch), width
        ids, mask, places = (torch.zeros(size, dtype=torch.long, device="cpu") for _ in range(3))
        features = torch.zeros(*size, self.width, dtype=torch.float32, device="cpu")
        labels = torch.full((len(batch), width + 1), -100, dtype=torch.long, device="cpu")
        columns, depths, targets, last = [], [], [], []
        for b, (feedback, count) in enumerate(zip(batch, counts, strict=True)):
            states = None if feedback.states is None else feedback.states.dense()  # (S, F) or wider
            if count:
                # The first token with a column, and that column.
                first, left = feedback.states.start + 1, width - count
                ids[b, left:], mask[b, left:] = feedback.tokens[first : first + count].long(), 1
                features[b, left:] = states[:count, : self.width]
                at = torch.arange(first, first + count, device="cpu")
                if feedback.gap is not None:
                    after, left_out = feedback.gap
                    at = at + left_out * (at >= after)
                places[b, left:] = at - 1
            tokens, parts = self._taught(feedback)  # (r,)
            depth = tokens - 2 - (feedback.states.start if count else 0)
            column = width - count + depth  # each is predicted by the column of the token before
            labels[b, column + 1] = feedback.tokens[tokens].long()
            columns.append(column)
            depths.append(depth)
            if self.last_state is not None:
                last.append(self._last_states(feedback, states, tokens))
            targets += [(part.top_ids.long(), part.top_logps.float(), part.tail_logp.float()) for part in parts]
        keep = max([1, *(width - int(column.min()) for column in columns if len(column))])
        rows = [b * keep + column - (width - keep) for b, column in enumerate(columns)]
        top_ids, top_logps, tail_logp = map(torch.cat, zip(*targets, strict=True))
        made = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": places,
            "features": features,
            "labels": labels,
            "rows": torch.cat(rows),
            "keep": keep,
            "depth": torch.cat(depths),
            "top_ids": top_ids,
            "top_logps": top_logps,
            "tail_logp": tail_logp,
        }
        if last:
            made["last_states"], made["has_last_state"] = map(torch.cat, zip(*last, strict=True))
        return made

    def _last_states(
        self, feedback: Feedback, states: torch.Tensor | None, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The target's last states where `tokens` `(r,)` of a request are predicted, `(r, H_t)`, zeros where they are not known, bool `(r,)`."""
        part = self.last_state
        found = torch.zeros(len(tokens), part.stop - part.start, dtype=torch.float32, device="cpu")
        known = torch.zeros(len(tokens), dtype=torch.bool, device="cpu")
        if states is not None and states.shape[1] >= part.stop:
            at = tokens - 1 - feedback.states.start
            known = (at >= 0) & (at < len(states))
            found[known] = states[at[known], part]
        return found, known

    def _columns(self, feedback: Feedback) -> int:
        """How many columns a request has."""
        states = feedback.states
        if states is None:
            return 0
        # Those of the last layer may have been recorded as well.
        if states.width not in (self.width, self.width + states.width // states.n_aux):
            raise ValueError(
                f"A request has states of {states.width} numbers and the draft reads {self.width}: they were recorded of other layers, or of another target. "
                "Record them of the draft's own `config.recorded_layers`."
            )
        return max(min(states.stop, len(feedback.tokens) - 2) - states.start, 0)

    def _taught(self, feedback: Feedback) -> tuple[torch.Tensor, list]:
        """The tokens of a request that teach, by their places in it, int64 `(r,)`; and their targets, in parts."""
        start = feedback.prompt_length
        taught = feedback.teaching_mask(self.positions, states=True).nonzero().squeeze(-1)
        tokens, parts = [start + taught], [feedback.rows.select(taught)]
        if self.prompts and feedback.prompt_rows is not None:
            first = start - len(feedback.prompt_rows)
            known = feedback.predicted_from_states()[first:start].nonzero().squeeze(-1)
            tokens, parts = [first + known, *tokens], [feedback.prompt_rows.select(known), *parts]
        return torch.cat(tokens), parts
