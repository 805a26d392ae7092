"""`FeedbackCollator`: makes one batch of requests for the draft. It knows Feedback and tensors, no model."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_osd.feedback.feedback import Feedback


class FeedbackCollator:
    """Pads requests to one batch, and stacks the targets of the rows that teach.

    A decoder's are padded left, so that their answers end together: the logits that predict the answers lie in the last columns, and a draft
    computes its LM head for those alone (`logits_to_keep`), on any architecture that generates from left-padded prompts. An
    encoder-decoder's are padded right, where a causal decoder needs no mask and keeps its positions.

    Args:
        positions (`str`): `"all"` or `"error"`: which generated positions teach (see [`Feedback.teaching_mask`]).
        prompts (`bool`, defaults to `True`): whether those of the prompts do that have a target.

    Returns, from a call on a list of requests, a dict of
        `input_ids`, `attention_mask`, `position_ids` (int64 `(B, T)`): each request without its last token, which predicts nothing; for
            an encoder-decoder these T are its `decoder_input_ids`, and `input_ids` and `attention_mask` (`(B, S)`) are the sources;
        `labels` (int64 `(B, T+1)`): the token at each teaching position, -100 elsewhere, so that Trainer counts the rows;
        `rows` (int64 `(R,)`): where the R teaching rows lie in the `(B·keep)` logits of the last `keep` columns;
        `keep` (`int`): the columns that hold them;
        `top_ids` (int64 `(R, k)`), `top_logps` (float32 `(R, k)`), `tail_logp` (float32 `(R,)`): their targets.
    """

    def __init__(self, positions: str = "all", prompts: bool = True):
        self.positions, self.prompts = positions, prompts

    def __call__(self, batch: list[Feedback]) -> dict:
        has_source = batch[0].source is not None
        longest = max(feedback.tokens.shape[0] for feedback in batch)
        if not has_source and (longest - 1) % 128 == 64:
            # One column of padding more. With a mask and so many columns, cuDNN's attention has gradients that are NaN where a row sees nothing, as rows of
            # padding do (torch 2.11 on Hopper, pytorch/pytorch#196678).
            longest += 1
        prompts = [feedback.prompt_rows if self.prompts else None for feedback in batch]
        read = [0 if rows is None else len(rows) for rows in prompts]  # M of each
        keep = longest - 1 if has_source else max(len(feedback) + m for feedback, m in zip(batch, read, strict=True))
        labels = torch.full((len(batch), longest), -100, dtype=torch.long, device="cpu")
        rows, targets = [], []
        for b, feedback in enumerate(batch):
            length, start = feedback.tokens.shape[0], feedback.prompt_length
            taught = feedback.teaching_mask(self.positions).nonzero().squeeze(-1)  # (r,) of N
            tokens = torch.cat(
                [torch.arange(start - read[b], start, device="cpu"), start + taught]
            )  # (M + r,) of prompt and answer
            at = tokens + (0 if has_source else longest - length)  # their columns
            labels[b, at] = feedback.tokens[tokens].long()
            rows.append(b * keep + at - 1 - (longest - 1 - keep))  # each is predicted by the column before its own
            said = [*([prompts[b]] if read[b] else []), feedback.rows.select(taught)]
            targets += [(part.top_ids.long(), part.top_logps.float(), part.tail_logp.float()) for part in said]
        top_ids, top_logps, tail_logp = map(torch.cat, zip(*targets, strict=True))
        texts = [feedback.tokens[:-1] for feedback in batch]
        if has_source:
            input_ids, attention_mask = _padded([feedback.source for feedback in batch], left=False)
            inputs = {"decoder_input_ids": _padded(texts, left=False)[0]}
        else:
            input_ids, attention_mask = _padded(texts, left=True, longest=longest - 1)
            places = (attention_mask.cumsum(-1) - 1).clamp_min(0)
            for row, (after, count) in ((b, one.gap) for b, one in enumerate(batch) if one.gap is not None):
                places[row] += count * (places[row] >= after)
            inputs = {"position_ids": places}
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            **inputs,
            "labels": labels,
            "rows": torch.cat(rows),
            "keep": keep,
            "top_ids": top_ids,
            "top_logps": top_logps,
            "tail_logp": tail_logp,
        }


def _padded(texts: list[Tensor], left: bool, longest: int | None = None) -> tuple[Tensor, Tensor]:
    """Pad token ids with 0, to the longest of them by default, and return them and their mask, int64 `(B, longest)` each."""
    longest = max(map(len, texts)) if longest is None else longest
    ids = torch.zeros(len(texts), longest, dtype=torch.long, device="cpu")
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        columns = slice(longest - len(text), longest) if left else slice(0, len(text))
        ids[row, columns], mask[row, columns] = text.long(), 1
    return ids, mask
