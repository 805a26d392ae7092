"""`compare_outputs` tells whether two greedy outputs are the same, and if not, whether the first difference is a near-tie or a bug."""

from __future__ import annotations

import copy
import logging
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# float32: the largest difference of the two logits that still counts as a near-tie.
FLOAT32_TIE = 1e-3
# bf16 and fp16: units in the last place of the larger logit.
HALF_TIE_ULPS = 2
_HALF = (torch.bfloat16, torch.float16)

logger = logging.getLogger(__name__)


def compare_outputs(
    target: PreTrainedModel,
    plain: Tensor,
    assisted: Tensor,
    source: Tensor | None = None,
    prompt_length: int | None = None,
) -> str:
    """Compare two greedy outputs: `"identical"`, `"near_tie"` or `"mismatch"`.

    Batched verification adds in another order than one-token decoding, so two logits that are all but equal can change places; from
    there on the outputs part. That is a *near-tie*: at the first token where the outputs differ, the two candidates' logits tie. In float32 they do
    if they differ by at most 1e-3, by a fresh forward of `target` over the common prefix. In bf16 and fp16 such a forward is a poor judge, for
    its own rounding is in question: there they tie if by the *float32* logits of the same weights they are within 2 units in the last place
    of the serving dtype, at the larger one, or if plain decoding's own two logits are. Any other difference is a mismatch, and a bug.

    Args:
        target (`PreTrainedModel`): the model that made both. It is not changed, and may serve meanwhile; of a half-precision one, one module at a time is
            held in float32.
        plain, assisted (`Tensor`): token ids `(L,)`, prompt included; those of its decoder, if `target` has an encoder.
        source (`Tensor`, *optional*): what that encoder read, `(S,)`; to be given if there is one.
        prompt_length (`int`, *optional*): tokens of them that are the prompt; without it plain decoding's own logits are not asked, which takes as many
            forwards as there are tokens before the difference.
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
        pair = [int(plain[at]), int(assisted[at])]
        if logits.dtype not in _HALF:
            return "near_tie" if is_near_tie(*logits[pair]) else "mismatch"
        exact = _float32_logits(target, inputs)
        if is_near_tie(*(logits if exact is None else exact)[pair], logits.dtype):
            return "near_tie"
        if prompt_length is not None and source is None:
            decoded = _decoded_logits(target, plain[None, :prompt_length].to(target.device), at - prompt_length)
            if decoded is not None and is_near_tie(*decoded[pair], logits.dtype):
                return "near_tie"
    return "mismatch"


def is_near_tie(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two logits are as good as equal to a model that computes in `dtype`; in their own if left out."""
    dtype = dtype or a.dtype
    difference, larger = abs(float(a) - float(b)), max(abs(float(a)), abs(float(b)))
    if dtype not in _HALF:
        return difference <= FLOAT32_TIE
    ulp = torch.finfo(dtype).eps * 2.0 ** (math.frexp(larger)[1] - 1)
    return difference <= HALF_TIE_ULPS * ulp


def _float32_logits(target: PreTrainedModel, inputs: dict) -> Tensor | None:
    """The last row of logits `(V,)` that `target`'s weights give in float32; `None` where it cannot be had (quantised or offloaded weights, say).

    A copy of the module tree that shares the weights runs, and each module has its own in float32 while it does.
    """
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in target.parameters()}
    try:
        with torch.inference_mode(False), torch.no_grad():
            model = copy.deepcopy(target, shared)
            for module in model.modules():
                _widen_while_it_runs(module)
            return model(**inputs, use_cache=False).logits[0, -1].float()
    except Exception as error:
        logger.warning(
            "No float32 logits of %s could be had (%s: %s); near-ties are judged by a forward in %s.",
            type(target).__name__,
            type(error).__name__,
            error,
            target.dtype,
        )
        return None


def _widen_while_it_runs(module: nn.Module):
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    tensors = [tensor for tensor in tensors if tensor.dtype in _HALF]
    if not tensors:
        return
    kept: list[list[Tensor]] = []

    def widen(*_):
        kept.append([tensor.data for tensor in tensors])
        for tensor in tensors:
            tensor.data = tensor.data.float()

    def narrow(*_):
        for tensor, data in zip(tensors, kept.pop(), strict=True):
            tensor.data = data

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(narrow, always_call=True)


def _decoded_logits(target: PreTrainedModel, prompt: Tensor, n: int) -> Tensor | None:
    """The logits `(V,)` that plain decoding has of the token that follows `prompt` `(1, L)` and n more; `None` if it ends before."""
    decoded = target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=n + 1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return decoded.logits[n][0] if len(decoded.logits) > n else None
