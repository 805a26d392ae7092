"""`own_draft`: the copy of a given draft that an assistant keeps: out of what was wrapped round it, with all of its weights, and tried before it is trusted.

torch.compile, accelerate and trl put wrappers and patched `forward`s round a model. A copy of such a model runs the weights of the one it was copied
from, and would learn nothing for ever without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.models.copies import copy_draft
from hf_osd.models.plain import has_adapter, say_ties

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Whose patches of `forward` compute what the class's own does: they compile it, cast, move tensors, or add a loss.
_PATCHERS = ("torch", "accelerate", "trl", "transformers", "peft")
# What accelerate puts into an instance beside `forward`.
_HOOKED = ("_hf_hook", "_old_forward", "_original_forward", "hf_device_map", "to", "cuda", "npu", "xpu", "mlu", "musa")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of `torch.compile(model)`, DataParallel, DistributedDataParallel and other wrappers of one `module`, however often. Sharded ones
    stay, and are refused as drafts."""
    while not hasattr(type(model), "get_output_embeddings") and not _shards(model):
        if list(model._modules) not in (["_orig_mod"], ["module"]):
            break
        [model] = model._modules.values()
    return model


def own_draft(draft: PreTrainedModel) -> PreTrainedModel:
    """A copy of `draft` that runs its own weights alone; frozen ones are shared, see [`copy_draft`]. `draft`, which is unwrapped, stays as it is.

    Raises:
        ValueError: if weights are not there (on the meta device, sharded), or a `forward` is patched in a way that cannot be undone.
    """
    _check_whole(draft)
    own = copy_draft(draft)
    for name, module in list(own.named_modules()):
        if "_orig_mod" in module._modules:
            parent, _, child = name.rpartition(".")
            setattr(own.get_submodule(parent), child, unwrapped(module))
    loaded = [(module, name) for module in own.modules() for name, _ in _offloaded(module)]
    for module, name in loaded:
        _load(module, name)
    if loaded:
        own.tie_weights()
    hooked = any("_hf_hook" in vars(module) for module in own.modules())
    for module in own.modules():
        _unpatch(module)
    lacking = [name for name, tensor in (*own.named_parameters(), *own.named_buffers()) if tensor.is_meta]
    if lacking:
        raise ValueError(
            f"`draft` has no values for {lacking[0]!r} (it is on the meta device, as {len(lacking)} of its tensors are). Load it whole, with "
            "from_pretrained(...) without device_map, or give its weights values."
        )
    devices = {tensor.device for tensor in (*own.parameters(), *own.buffers())}
    if hooked and len(devices) > 1:
        own.to(own.get_input_embeddings().weight.device)  # what moved tensors between them is gone
    if not has_adapter(own):
        say_ties(own)
    for config in (own.config, own.config.get_text_config(decoder=True)):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False  # nobody reads them, and layers without a router have none
    return own


def real_tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a model, by name, with its values: where accelerate has offloaded it, what it keeps of it.

    Raises:
        ValueError: if it has none.
    """
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), leaf)
    if not tensor.is_meta:
        return tensor
    parts = name.split(".")
    for i in reversed(range(len(parts))):  # of the module itself, or of one that it is in
        key = ".".join(parts[i:])
        for found, kept in _offloaded(model.get_submodule(".".join(parts[:i]))):
            if found == key:
                return kept[key]
    raise ValueError(
        f"{name!r} of {type(model).__name__} has no values: it is on the meta device. Load the model whole, or with accelerate's offloading."
    )


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate brings them."""
    hook = vars(module).get("_hf_hook")
    for one in getattr(hook, "hooks", [hook]):
        if getattr(one, "execution_device", None) is not None:
            return torch.empty(0, dtype=torch.float32, device=one.execution_device).device
    return next(module.parameters()).device


def _shards(module: nn.Module) -> bool:
    return any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(module).__mro__)


def _check_whole(draft: nn.Module):
    """See that weights are not spread over processes."""
    sharded = any(_shards(module) for module in draft.modules())
    if sharded or any(hasattr(p, "ds_id") and not p.numel() for p in draft.parameters()):
        raise ValueError(
            f"`draft` is a {type(draft).__name__} whose weights are sharded over processes ({'FSDP' if sharded else 'DeepSpeed ZeRO-3'}), and each "
            "copy needs them whole. Pass the draft as it was before it was prepared, or load it anew with from_pretrained."
        )


def _unpatch(module: nn.Module):
    """Have a copied module run its class's forward, or somebody's patch of it that does something else, which the trial judges."""
    forward = patched = vars(module).get("forward")
    while forward is not None and getattr(forward, "__func__", forward) is not type(module).forward:
        patched, forward = forward, _inside(module, forward)
    for name in (*_HOOKED, "forward"):
        vars(module).pop(name, None)
    if forward is None and patched is not None:
        bound = isinstance(patched, MethodType)
        module.forward = MethodType(patched.__func__, module) if bound else patched


def _inside(module: nn.Module, forward):
    """What is called by a patch that computes the same; `None` if it is none of those."""
    if vars(module).get("_hf_hook") is not None and getattr(forward, "args", ())[:1] == (module,):
        return module._old_forward  # accelerate's hooks
    function = getattr(forward, "__func__", forward)
    # By where it is written: functools.wraps makes all else look like what is wrapped.
    written = getattr(function, "__globals__", {"__name__": type(function).__module__})["__name__"]
    if written.split(".")[0] not in _PATCHERS:
        return None
    return getattr(function, "_torchdynamo_orig_callable", getattr(function, "__wrapped__", None))


def _offloaded(module: nn.Module) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Names of tensors that accelerate keeps elsewhere for a module, and where it does."""
    hook = vars(module).get("_hf_hook")
    for one in getattr(hook, "hooks", [hook]):
        if getattr(one, "offload", False) and one.weights_map is not None:
            below = one.place_submodules
            for name, tensor in (*module.named_parameters(recurse=below), *module.named_buffers(recurse=below)):
                if tensor.is_meta:
                    yield name, one.weights_map


def _load(module: nn.Module, name: str):
    """Have a copied module hold an offloaded tensor where it computes."""
    owner, _, leaf = name.rpartition(".")
    old = getattr(module.get_submodule(owner), leaf)
    with torch.inference_mode(False), torch.no_grad():
        value = real_tensor(module, name).detach().to(execution_device(module), old.dtype, copy=True)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(module.get_submodule(owner), leaf, value)
