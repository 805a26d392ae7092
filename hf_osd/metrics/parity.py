"""`compare_outputs` tells whether two greedy outputs are the same, and if not, whether the first difference is a near-tie or a bug."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# float32: the largest difference of the two logits that still counts as a near-tie.
FLOAT32_TIE = 1e-3
# bf16 and fp16: units in the last place of the larger logit.
HALF_TIE_ULPS = 2


def compare_outputs(target: PreTrainedModel, plain: Tensor, assisted: Tensor, source: Tensor | None = None) -> str:
    """Compare two greedy outputs: return `"identical"`, `"near_tie"` or `"mismatch"`.

    Batched verification adds numbers in another order than one-token decoding, so two almost equal logits can swap their order, after which
    the outputs diverge. This is a *near-tie*: at the first token where the outputs differ, the two candidates' logits, computed by
    a fresh forward of `target` over the common prefix, differ by at most 1e-3 in float32, or by 2 units in the last place of the
    larger in bf16 and fp16. Any other difference is a mismatch, and a bug.

    Args:
        target (`PreTrainedModel`): the model that made both outputs.
        plain, assisted (`Tensor`): token ids `(L,)`, prompt included; of the decoder, if `target` has an encoder.
        source (`Tensor`, *optional*): the encoder's input, `(S,)`; required if there is an encoder.
    """
    plain, assisted = plain.flatten().cpu(), assisted.flatten().cpu()
    shared = min(len(plain), len(assisted))
    differs = (plain[:shared] != assisted[:shared]).nonzero()
    if not len(differs):
        return "identical" if len(plain) == len(assisted) else "mismatch"
    at = int(differs[0])
    inputs = {"input_ids": plain[None, :at].to(target.device)}
    if source is not None:
        inputs = {"input_ids": source.flatten()[None].to(target.device), "decoder_input_ids": inputs["input_ids"]}
    with torch.no_grad():
        logits = target(**inputs, use_cache=False).logits[0, -1]
    return "near_tie" if is_near_tie(logits[plain[at]], logits[assisted[at]]) else "mismatch"


def is_near_tie(a: Tensor, b: Tensor) -> bool:
    """Tell whether two logits, in the dtype in which the model computes, are equal up to rounding."""
    difference, larger = abs(float(a) - float(b)), max(abs(float(a)), abs(float(b)))
    if a.dtype not in (torch.bfloat16, torch.float16):
        return difference <= FLOAT32_TIE
    ulp = torch.finfo(a.dtype).eps * 2.0 ** (math.frexp(larger)[1] - 1)
    return difference <= HALF_TIE_ULPS * ulp
