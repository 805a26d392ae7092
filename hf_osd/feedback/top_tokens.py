"""`top_tokens` finds the likeliest tokens of each row of logits, on the CPU faster than `torch.topk`."""

import torch
from torch import Tensor

# Columns of which the largest is found at once: 64 float32 are four vector registers, and few candidates are left.
_BLOCK = 64
# Fewer columns than this for each token wanted, and torch is as fast.
_WORTHWHILE = 2 * _BLOCK


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k largest of each row of logits `(n, V)`, as `torch.topk(logits, k)`, but that of equal logits either may come first.

    torch's top-k looks at column after column on the CPU. Maxima of blocks take vector instructions, and the k largest lie in the k blocks whose maxima are
    largest.

    Returns:
        `tuple[Tensor, Tensor]`: logits in falling order and their columns, int64, `(n, k)` each.
    """
    n, columns = logits.shape
    if logits.device.type != "cpu" or columns < _WORTHWHILE * k:
        return logits.topk(k, dim=-1)
    whole = columns - columns % _BLOCK
    blocks = logits[:, :whole].unflatten(-1, (-1, _BLOCK))  # (n, V/64, 64)
    chosen = blocks.amax(-1).topk(k, dim=-1, sorted=False).indices[..., None]  # (n, k, 1)
    values = blocks.gather(1, chosen.expand(-1, -1, _BLOCK)).flatten(1)
    ids = (chosen * _BLOCK + torch.arange(_BLOCK, device=logits.device)).flatten(1)
    if whole < columns:
        values = torch.cat([values, logits[:, whole:]], dim=-1)
        ids = torch.cat([ids, torch.arange(whole, columns, device=logits.device).expand(n, -1)], dim=-1)
    top, at = values.topk(k, dim=-1)
    return top, ids.gather(1, at)
