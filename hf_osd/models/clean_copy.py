"""`clean_copy` makes the copy of a given draft that an assistant keeps: without wrappers and patches, and with all of its weights.

torch.compile, accelerate and trl put wrappers and patched `forward`s around a model. A plain copy of such a model would still run the weights of the original,
and so silently never learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.models.copies import copy_draft
from hf_osd.models.plain import has_adapter, record_ties

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Packages whose patches of `forward` compute the same as the class's own: they compile it, cast, move tensors, or add a loss.
_PATCHERS = ("torch", "accelerate", "trl", "transformers", "peft")
# Attributes that accelerate puts into an instance besides `forward`.
_HOOKED = ("_hf_hook", "_old_forward", "_original_forward", "hf_device_map", "to", "cuda", "npu", "xpu", "mlu", "musa")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile(model)`, DataParallel, DistributedDataParallel and other wrappers of one `module`, nested ones included. Sharded
    models stay wrapped; they are refused as drafts.

    Raises:
        ValueError: if it is no model at all.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"A model is needed and a {type(model).__name__} was given ({str(model)[:80]!r}); load one, with AutoModelForCausalLM.from_pretrained(...)."
        )
    while not hasattr(type(model), "get_output_embeddings") and not _shards(model):
        if list(model._modules) not in (["_orig_mod"], ["module"]):
            break
        [model] = model._modules.values()
    return model


def clean_copy(draft: PreTrainedModel) -> PreTrainedModel:
    """Copy `draft` so that the copy runs its own weights alone; frozen ones are shared, see [`copy_draft`]. `draft` must be unwrapped, and stays as it is.

    Raises:
        ValueError: if weights are missing (on the meta device, or sharded).
    """
    _check_whole(draft)
    made = copy_draft(draft)
    for name, module in list(made.named_modules()):
        if "_orig_mod" in module._modules:
            parent, _, child = name.rpartition(".")
            setattr(made.get_submodule(parent), child, unwrapped(module))
    loaded = [(module, name) for module in made.modules() for name, _ in _offloaded(module)]
    for module, name in loaded:
        _load(module, name)
    if loaded:
        made.tie_weights()
    hooked = any("_hf_hook" in vars(module) for module in made.modules())
    for module in made.modules():
        _unpatch(module)
    lacking = [name for name, tensor in (*made.named_parameters(), *made.named_buffers()) if tensor.is_meta]
    if lacking:
        raise ValueError(
            f"`draft` has no values for {lacking[0]!r} (it is on the meta device, as {len(lacking)} of its tensors are). Load it whole, with "
            "from_pretrained(...) without device_map, or give its weights values."
        )
    devices = {tensor.device for tensor in (*made.parameters(), *made.buffers())}
    if hooked and len(devices) > 1:
        made.to(made.get_input_embeddings().weight.device)  # the hooks that moved tensors between devices are gone
    if not has_adapter(made):
        record_ties(made)
    for config in (made.config, made.config.get_text_config(decoder=True)):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False  # nothing reads them, and layers without a router have none
    return made


def real_tensor(model: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer of a model by name, with its values: where accelerate has offloaded it, the tensor that it keeps.

    Raises:
        ValueError: if it has no values.
    """
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), leaf)
    if not tensor.is_meta:
        return tensor
    parts = name.split(".")
    for i in reversed(range(len(parts))):  # the hook of the module itself, or of one around it
        key = ".".join(parts[i:])
        for found, kept in _offloaded(model.get_submodule(".".join(parts[:i]))):
            if found == key:
                return kept[key]
    raise ValueError(
        f"{name!r} of {type(model).__name__} has no values: it is on the meta device. Load the model whole, or with accelerate's offloading."
    )


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which a module computes: that of its weights, or the one to which accelerate moves them."""
    hook = vars(module).get("_hf_hook")
    for one in getattr(hook, "hooks", [hook]):
        if getattr(one, "execution_device", None) is not None:
            return torch.empty(0, dtype=torch.float32, device=one.execution_device).device
    return next(module.parameters()).device


def _shards(module: nn.Module) -> bool:
    """Tell whether it is a module of FSDP."""
    return any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(module).__mro__)


def _check_whole(draft: nn.Module):
    """Raise `ValueError` if weights are sharded over processes."""
    sharded = any(_shards(module) for module in draft.modules())
    if sharded or any(hasattr(p, "ds_id") and not p.numel() for p in draft.parameters()):
        raise ValueError(
            f"`draft` is a {type(draft).__name__} whose weights are sharded over processes ({'FSDP' if sharded else 'DeepSpeed ZeRO-3'}), and each "
            "copy needs them whole. Pass the draft as it was before it was prepared, or load it anew with from_pretrained."
        )


def _unpatch(module: nn.Module):
    """Undo patches of a copied module's `forward` that compute the same. A patch that computes something else stays, and is tested by `try_draft`."""
    forward = patched = vars(module).get("forward")
    while forward is not None and getattr(forward, "__func__", forward) is not type(module).forward:
        patched, forward = forward, _inside(module, forward)
    for name in (*_HOOKED, "forward"):
        vars(module).pop(name, None)
    if forward is None and patched is not None:
        bound = isinstance(patched, MethodType)
        module.forward = MethodType(patched.__func__, module) if bound else patched


def _inside(module: nn.Module, forward):
    """Return the function that a patch wraps, if the patch computes the same; else `None`."""
    if vars(module).get("_hf_hook") is not None and getattr(forward, "args", ())[:1] == (module,):
        return module._old_forward  # accelerate's hooks
    function = getattr(forward, "__func__", forward)
    # We go by the defining module: functools.wraps copies everything else from the wrapped function.
    written = getattr(function, "__globals__", {"__name__": type(function).__module__})["__name__"]
    if written.split(".")[0] not in _PATCHERS:
        return None
    return getattr(function, "_torchdynamo_orig_callable", getattr(function, "__wrapped__", None))


def _offloaded(module: nn.Module) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield names of a module's tensors that accelerate has offloaded, with the mapping that holds each."""
    hook = vars(module).get("_hf_hook")
    for one in getattr(hook, "hooks", [hook]):
        if getattr(one, "offload", False) and one.weights_map is not None:
            below = one.place_submodules
            for name, tensor in (*module.named_parameters(recurse=below), *module.named_buffers(recurse=below)):
                if tensor.is_meta:
                    yield name, one.weights_map


def _load(module: nn.Module, name: str):
    """Load an offloaded tensor of a copied module onto the device on which it computes."""
    owner, _, leaf = name.rpartition(".")
    old = getattr(module.get_submodule(owner), leaf)
    with torch.inference_mode(False), torch.no_grad():
        value = real_tensor(module, name).detach().to(execution_device(module), old.dtype, copy=True)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(module.get_submodule(owner), leaf, value)
