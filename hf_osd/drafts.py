"""Where a draft comes from: `load_draft` from a checkpoint, `grow_draft` from the target's own layers for those who have none."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_osd.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_FILES,
    adapter_folder,
    has_adapter,
    load_with_adapter,
    merged,
    save_adapter,
)
from hf_osd.hub import FROM_WHERE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# The files of a draft's checkpoint: those of an older one that a newer one lacks would be read with it.
CHECKPOINT_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, *BASE_FILES)


def files_of_checkpoint(directory: str | os.PathLike) -> list[Path]:
    """The files of a checkpoint that are in a folder; none if there is no folder."""
    folder = Path(directory)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in files if any(fnmatch(path.name, pattern) for pattern in CHECKPOINT_FILES)]


def drop_older(directory: str | os.PathLike, written: Collection[str]):
    """Remove the files of an older checkpoint that the one just `written` lacks: they would be read with it."""
    for path in files_of_checkpoint(directory):
        if path.name not in written:
            path.unlink()


def load_draft(name_or_path: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, or `AutoModelForSeq2SeqLM` for an encoder-decoder, from safetensors alone, in the checkpoint's dtype unless
    `kwargs` say otherwise.

    Where an adapter is there, it comes on its base, and trains: a transformers model with an adapter, whether or not it was saved as a PeftModel.

    Raises:
        OSError: if there is no such draft, or its weights are damaged or no safetensors.
        ValueError: if what is there is neither, or an adapter that names no base.
    """
    from safetensors import SafetensorError

    kwargs = {"dtype": "auto", "use_safetensors": True, **kwargs}
    try:
        folder = adapter_folder(name_or_path, **kwargs)
        if folder is None:
            return load_model(name_or_path, **kwargs)
        return load_with_adapter(folder, load_model, **kwargs)
    except SafetensorError as error:
        raise OSError(
            f"The weights of the draft {name_or_path} are damaged ({error}); save or download them again."
        ) from error


def load_model(name_or_path: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """`from_pretrained` of AutoModelForSeq2SeqLM if the config says that it is an encoder-decoder, of AutoModelForCausalLM if not: that one would make
    a decoder without an encoder of a BART, and refuse a T5."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = kwargs.get("config")
    if config is None:
        names = (*FROM_WHERE, "subfolder", "trust_remote_code")
        config = AutoConfig.from_pretrained(name_or_path, **{name: kwargs[name] for name in names if name in kwargs})
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(name_or_path, **kwargs)


def save_draft(
    draft: nn.Module, directory: str | os.PathLike, repo_id: str | None = None, merge: bool = False
) -> None:
    """Write a checkpoint that `load_draft` reads: a plain one; or of a draft with an adapter the adapter alone, with its base beside it unless
    the Hub has that.

    Args:
        draft (`PreTrainedModel` or `PeftModel`): the draft.
        directory: where to.
        repo_id (`str`, *optional*): the repository that the folder will be.
        merge (`bool`): put an adapter into the weights, for those who read plain checkpoints alone.

    Raises:
        OSError: if it cannot be written.
        ValueError: if several adapters are active, or the weights have no safetensors form.
    """
    if has_adapter(draft) and merge:
        merged(draft).save_pretrained(directory)
    elif has_adapter(draft):
        save_adapter(draft, directory, repo_id)
    else:
        draft.save_pretrained(directory)


def grow_draft(target: PreTrainedModel, layers: Sequence[int] = (0, 1)) -> PreTrainedModel:
    """A draft of the target's class made of some of its decoder layers.

    Input embeddings and LM head are the target's own storage, frozen, and cost no memory; layers, final norm and whatever else the
    architecture has are copied, and trainable. Undistilled it accepts next to nothing: it is where learning starts.

    Args:
        target (`PreTrainedModel`): a causal LM.
        layers (`Sequence[int]`): indices of its decoder layers, in order; negative ones count from the end.

    Returns:
        `PreTrainedModel`: in the target's dtype, on its device, in eval mode; `save_pretrained` gives a plain checkpoint.

    Raises:
        ValueError: if `target` is no decoder-only model with an LM head, or an index is out of range.
    """
    config = target.config.get_text_config(decoder=True)
    depth = config.num_hidden_layers
    if target.config.is_encoder_decoder or config is not target.config or target.get_output_embeddings() is None:
        raise ValueError(
            f"`target` is a {type(target).__name__}; a draft grows from a decoder-only model with an LM head, such as one loaded "
            "by AutoModelForCausalLM."
        )
    if not layers or any(not -depth <= i < depth for i in layers):
        raise ValueError(
            f"`layers` is {list(layers)}; give at least one index from {-depth} to {depth - 1}: the target has {depth} layers."
        )
    picked = [i % depth for i in layers]

    draft_config = copy.deepcopy(config)
    for name, value in vars(config).items():  # layer_types and other lists with an entry a layer
        other = name == "architectures" or name.endswith(("_token_id", "_token_ids"))  # may be as long by chance
        if isinstance(value, (list, tuple)) and len(value) == depth and not other:
            setattr(draft_config, name, type(value)(value[i] for i in picked))
    draft_config.num_hidden_layers = len(picked)
    draft_config._name_or_path = ""  # it is in no repository
    with torch.inference_mode(False), torch.device("meta"):
        draft = type(target)(draft_config)

    stack = _layer_stack_name(target, depth)
    sources = dict(target.named_parameters(remove_duplicate=False)) | dict(
        target.named_buffers(remove_duplicate=False)
    )
    frozen = {
        id(p): nn.Parameter(p.detach(), requires_grad=False)
        for end in (target.get_input_embeddings(), target.get_output_embeddings())
        for p in end.parameters()
    }
    with torch.inference_mode(False), torch.no_grad():
        for name, placeholder in [
            *draft.named_parameters(remove_duplicate=False),
            *draft.named_buffers(remove_duplicate=False),
        ]:
            source = sources.get(_name_in_target(name, stack, picked))
            if source is None or source.shape != placeholder.shape:
                raise ValueError(
                    f"{name!r} has no counterpart in {type(target).__name__}, whose layers are not of one kind; make the draft by hand, "
                    f"or pick other `layers` than {picked}."
                )
            owner = draft.get_submodule(name.rpartition(".")[0])
            if isinstance(placeholder, nn.Parameter):
                grown = frozen.get(id(source)) if id(source) in frozen else nn.Parameter(source.detach().clone())
                owner.register_parameter(name.rpartition(".")[2], grown)
            else:
                persistent = name.rpartition(".")[2] not in owner._non_persistent_buffers_set
                owner.register_buffer(name.rpartition(".")[2], source.detach().clone(), persistent=persistent)
    draft.generation_config = copy.deepcopy(target.generation_config)
    return draft.eval()


def _layer_stack_name(model: nn.Module, depth: int) -> str:
    """The name of the ModuleList that holds the decoder layers, `"model.layers"` for one."""
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not names:
        raise ValueError(
            f"{type(model).__name__} keeps its {depth} layers in no ModuleList that hf_osd can find; make the draft by hand."
        )
    return min(names, key=len)


def _name_in_target(name: str, stack: str, picked: list[int]) -> str:
    if not name.startswith(stack + "."):
        return name
    index, _, rest = name[len(stack) + 1 :].partition(".")
    return f"{stack}.{picked[int(index)]}.{rest}"
