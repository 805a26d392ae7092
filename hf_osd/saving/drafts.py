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

from hf_osd.models.blueprint import blueprint, text_model
from hf_osd.models.clean_copy import execution_device, real_tensor, unwrapped
from hf_osd.models.plain import has_adapter, merged, record_ties
from hf_osd.saving.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_FILES,
    adapter_folder,
    load_with_adapter,
    save_adapter,
)
from hf_osd.saving.hub import FROM_WHERE

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
    architecture has are copied, and trainable. Of a target that sees as well that is its text model. What accelerate has offloaded is loaded. Undistilled it accepts next to nothing: it is where learning starts.

    Args:
        target (`PreTrainedModel`): a causal LM, or a model with one in it that also sees, such as Gemma 3's.
        layers (`Sequence[int]`): indices of its decoder layers, in order; negative ones count from the end.

    Returns:
        `PreTrainedModel`: in the target's dtype, on its device, in eval mode; `save_pretrained` gives a plain checkpoint.

    Raises:
        ValueError: if `target` is no decoder-only model with an LM head, has an adapter or quantised weights or some on the meta device, or an index is out
            of range, or its layers cannot be a model of their own.
    """
    given = unwrapped(target)
    target = text_model(given)
    plan = blueprint(target, layers)
    draft, tensors = plan.draft, dict(target.named_parameters(remove_duplicate=False))
    ends = {id(p) for end in (target.get_input_embeddings(), target.get_output_embeddings()) for p in end.parameters()}
    home = execution_device(target.get_input_embeddings())
    fixed: dict[int, nn.Parameter] = {}  # of the ends, one for both where they are one
    with torch.inference_mode(False), torch.no_grad():
        for name, source in plan.sources.items():
            owner, _, leaf = name.rpartition(".")
            owner = draft.get_submodule(owner)
            placeholder, tensor = getattr(owner, leaf), real_tensor(target, source)
            of_an_end = id(tensors.get(source)) in ends
            grown = plan.part(name, tensor.detach()).to(home, copy=not of_an_end)
            if not isinstance(placeholder, nn.Parameter):
                owner.register_buffer(leaf, grown, persistent=leaf not in owner._non_persistent_buffers_set)
            elif of_an_end:
                fixed.setdefault(id(tensors[source]), nn.Parameter(grown, requires_grad=False))
                owner.register_parameter(leaf, fixed[id(tensors[source])])
            else:
                # A table with a part a layer has a row a token: it is as large as the ends are.
                table = isinstance(owner, nn.Embedding) and grown.shape != tensor.shape
                owner.register_parameter(leaf, nn.Parameter(grown, requires_grad=not table))
    entry, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    if entry.is_meta and head.is_meta and target.config.tie_word_embeddings:  # that they are one is not seen there
        draft.get_output_embeddings().weight = draft.get_input_embeddings().weight
    record_ties(draft)
    draft.generation_config = copy.deepcopy(given.generation_config)
    return draft.eval()
