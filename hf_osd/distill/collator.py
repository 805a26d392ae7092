"""`FeedbackCollator`: requests to one batch for the draft. It knows Feedback and tensors, no model."""

from __future__ import annotations

import torch

from hf_osd.feedback import Feedback


class FeedbackCollator:
    """Left-pads requests so that their answers end together, and stacks the targets of the rows that teach.

    Left padding puts the logits that predict the answers into the last columns, so a draft computes its LM head for those alone
    (`logits_to_keep`), on any architecture that generates from left-padded prompts.

    Args:
        positions (`str`): `"all"` or `"error"`: which positions teach (see [`Feedback.teaches`]).

    Returns, from a call on a list of requests, a dict of
        `input_ids`, `attention_mask`, `position_ids` (int64 `(B, T)`): each request without its last token, which predicts nothing;
        `labels` (int64 `(B, T+1)`): the token at each teaching position, -100 elsewhere, so that Trainer counts the rows;
        `rows` (int64 `(R,)`): where the R teaching rows lie in the `(B·keep)` logits of the last `keep` columns;
        `keep` (`int`): the longest answer of the batch;
        `top_ids` (int64 `(R, k)`), `top_logps` (float32 `(R, k)`), `tail_logp` (float32 `(R,)`): their targets.
    """

    def __init__(self, positions: str = "all"):
        self.positions = positions

    def __call__(self, batch: list[Feedback]) -> dict:
        longest = max(feedback.tokens.shape[0] for feedback in batch)
        keep = max(map(len, batch))
        input_ids = torch.zeros(len(batch), longest - 1, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full((len(batch), longest), -100, dtype=torch.long)
        rows, targets = [], []
        for b, feedback in enumerate(batch):
            length, n = feedback.tokens.shape[0], len(feedback)
            input_ids[b, longest - length :] = feedback.tokens[:-1]
            attention_mask[b, longest - length :] = 1
            taught = feedback.teaches(self.positions).nonzero().squeeze(-1)  # (r,) of N
            labels[b, longest - n + taught] = feedback.answer[taught].long()
            rows.append(b * keep + keep - n + taught)
            targets.append(
                (
                    feedback.top_ids[taught].long(),
                    feedback.top_logps[taught].float(),
                    feedback.tail_logp[taught].float(),
                )
            )
        top_ids, top_logps, tail_logp = map(torch.cat, zip(*targets, strict=True))
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(-1) - 1).clamp_min(0),
            "labels": labels,
            "rows": torch.cat(rows),
            "keep": keep,
            "top_ids": top_ids,
            "top_logps": top_logps,
            "tail_logp": tail_logp,
        }
