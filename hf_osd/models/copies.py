"""Makes copies of a draft that share weights, and checks weights that are to replace theirs.

Copies must be made before any trainer exists, which patches `forward`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

_FINGERPRINTED = 256  # values at each end of a weight that go into a fingerprint


def copy_draft(model: nn.Module, frozen: set[str] | None = None) -> nn.Module:
    """Copy `model`: the copy owns its trainable weights and shares the storage of the frozen ones.

    Must be called before any trainer holds `model`: trl and accelerate patch `forward`, and a copy of a patched model silently runs
    the original's weights.

    Args:
        frozen (`set[str]`, *optional*): parameter names to share; those without `requires_grad` if left out.
    """
    memo = {}
    for name, parameter in model.named_parameters():
        if name in frozen if frozen is not None else not parameter.requires_grad:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for module in model.modules():  # accelerate's, which holds offloaded weights
        if (hook := vars(module).get("_hf_hook")) is not None:
            memo[id(hook)] = hook
    # Drafts loaded under inference_mode could never be trained or written.
    with torch.inference_mode(False):
        return copy.deepcopy(model, memo)


def sharing_copy(model: nn.Module) -> nn.Module:
    """Copy `model` without its weights: the copy has parameters of its own in the same storage, all frozen."""
    return copy_draft(model, {name for name, _ in model.named_parameters()})


def embedding_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters of the input embeddings and the LM head."""
    ends = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    shared = {id(p) for module in ends for p in module.parameters()}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in shared}


def check_weights(weights: Mapping[str, Tensor], served: Mapping[str, Tensor]):
    """Check that `weights`, of any dtype and device, can replace all those in `served`.

    Raises:
        ValueError: if one is missing, or has another shape or a value that is not finite.
    """
    for name, old in served.items():
        if name not in weights:
            raise ValueError(f"The new weights lack {name!r}; refresh from a model of the draft's own architecture.")
        if weights[name].shape != old.shape:
            raise ValueError(
                f"{name!r} is {tuple(weights[name].shape)} in the new weights and {tuple(old.shape)} in the draft; "
                "refresh from a model of the draft's own architecture."
            )
        check_finite(name, weights[name].to(old.dtype))  # in the dtype that serves: float16 ends at 65504


def fingerprint(weights: Iterable[Tensor]) -> str:
    """Return a digest of the ends of some weights, which tells a model from another one of the same shapes."""
    digest = hashlib.sha256()
    for weight in weights:
        flat = weight.detach().flatten()
        digest.update(torch.cat([flat[:_FINGERPRINTED], flat[-_FINGERPRINTED:]]).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_finite(name: str, weight: Tensor):
    """Check that all values of a weight are finite.

    Raises:
        ValueError: if one is not.
    """
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{name!r} has values that are not finite; the serving draft is kept. Lower the learning rate."
        )
