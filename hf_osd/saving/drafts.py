"""Makes drafts: `load_draft` loads one from a checkpoint, `grow_draft` builds one from the target's own layers."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Collection, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_osd.models.blueprint import attention_layers, blueprint, text_model
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
from hf_osd.saving.feature_drafts import refuse_without_target, save_feature_draft
from hf_osd.saving.hub import FROM_WHERE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


# The files of a draft's checkpoint. One that only an older checkpoint has would be loaded together with a newer one.
CHECKPOINT_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, *BASE_FILES)


def files_of_checkpoint(directory: str | os.PathLike) -> list[Path]:
    """List the checkpoint files in a folder; none if the folder does not exist."""
    folder = Path(directory)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in files if any(fnmatch(path.name, pattern) for pattern in CHECKPOINT_FILES)]


def drop_older(directory: str | os.PathLike, written: Collection[str]):
    """Remove the files of an older checkpoint that are not among those just `written`: they would be loaded together with them."""
    for path in files_of_checkpoint(directory):
        if path.name not in written:
            path.unlink()


def load_draft(name_or_path: str | os.PathLike, **kwargs) -> PreTrainedModel:
    """Load a draft by `AutoModelForCausalLM.from_pretrained`, or `AutoModelForSeq2SeqLM` for an encoder-decoder, from safetensors only, and in the checkpoint's
    dtype unless `kwargs` has another.

    An adapter is loaded onto its base, and is trainable: the result is a transformers model with an adapter, even if it was saved as a PeftModel.

    Raises:
        OSError: if there is no such draft, or its weights are damaged or not in safetensors.
        ValueError: if it is neither a causal LM nor an encoder-decoder, is an adapter that names no base, or an EAGLE-3 head, which
            [`hf_osd.load_feature_draft`] loads.
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
    """Load a model by AutoModelForSeq2SeqLM if its config is an encoder-decoder's, else by AutoModelForCausalLM, which would load a BART without its encoder,
    and refuse a T5."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = kwargs.get("config")
    if config is None:
        names = (*FROM_WHERE, "subfolder", "trust_remote_code")
        refuse_without_target(name_or_path, {name: kwargs[name] for name in names[:-1] if name in kwargs})
        config = AutoConfig.from_pretrained(name_or_path, **{name: kwargs[name] for name in names if name in kwargs})
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(name_or_path, **kwargs)


def save_draft(
    draft: nn.Module,
    directory: str | os.PathLike,
    repo_id: str | None = None,
    merge: bool = False,
    layout: str = "osd",
    **of_layout,
) -> None:
    """Write a checkpoint that `load_draft` reads: a plain one, or, for a draft with an adapter, the adapter, with its base beside it unless the Hub has that.
    In an engine's layout [`hf_osd.load_feature_draft`] reads it.

    Args:
        draft (`PreTrainedModel` or `PeftModel`): the draft.
        directory: the folder to write into.
        repo_id (`str`, *optional*): the repository to which the folder will be pushed.
        merge (`bool`): merge the adapter into the weights, for programs that read only plain checkpoints.
        layout (`str`), **of_layout: as in [`hf_osd.save_feature_draft`], for a draft that reads the target's hidden states.

    Raises:
        OSError: if it cannot be written.
        ValueError: if several adapters are active, the weights have no safetensors form, or the layout cannot express the draft.
    """
    if layout != "osd" or of_layout:
        save_feature_draft(draft, directory, layout, **of_layout)
    elif has_adapter(draft) and merge:
        merged(draft).save_pretrained(directory)
    elif has_adapter(draft):
        save_adapter(draft, directory, repo_id)
    else:
        draft.save_pretrained(directory)


def _default_layers(target: PreTrainedModel) -> Sequence[int]:
    """Choose the layers that a draft is grown from."""
    attention = attention_layers(target)
    if attention is None:
        return 0, 1
    if not attention:
        raise ValueError(
            f"All layers of the target ({type(target).__name__}) have recurrent states, which no draft may have. Grow one that reads the target's states, with "
            "hf_osd.grow_feature_draft(target)."
        )
    logger.info("The draft is grown from layers %s, the first with attention alone.", attention[:2])
    return attention[:2]


def grow_draft(target: PreTrainedModel, layers: Sequence[int] | None = None) -> PreTrainedModel:
    """Make a draft of the target's class out of some of its decoder layers.

    Input embeddings and LM head share the target's storage, are frozen, and cost no memory; layers, final norm and all other weights of the
    architecture are copied, and trainable. A multimodal target gives a draft of its text model. Weights that accelerate has offloaded are loaded. Before it has
    learnt, hardly any token of such a draft is accepted: it is the starting point of learning.

    Args:
        target (`PreTrainedModel`): a causal LM, or a multimodal model that contains one, such as Gemma 3's.
        layers (`Sequence[int]`, *optional*): indices of its decoder layers, in order; negative ones count from the end. By default the first two; where some layers have
            recurrent states, the first two of those that have none, for a draft must be taken back to before a rejected token.

    Returns:
        `PreTrainedModel`: the draft, in the target's dtype, on its device, in eval mode; its `save_pretrained` writes a plain checkpoint.

    Raises:
        ValueError: if `target` is not a decoder-only model with an LM head; if it has an adapter, quantised weights, or weights on the meta device; if an
            index is out of range; or if these layers cannot form a model of the class.
    """
    given = unwrapped(target)
    target = text_model(given)
    plan = blueprint(target, _default_layers(target) if layers is None else layers)
    draft, tensors = plan.draft, dict(target.named_parameters(remove_duplicate=False))
    ends = {id(p) for end in (target.get_input_embeddings(), target.get_output_embeddings()) for p in end.parameters()}
    home = execution_device(target.get_input_embeddings())
    fixed: dict[int, nn.Parameter] = {}  # embeddings and LM head; one parameter where they are tied
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
                # An embedding with a part for each layer has a row for each token: it is as large as embeddings and head, and frozen like them.
                table = isinstance(owner, nn.Embedding) and grown.shape != tensor.shape
                owner.register_parameter(leaf, nn.Parameter(grown, requires_grad=not table))
    entry, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    if (
        entry.is_meta and head.is_meta and target.config.tie_word_embeddings
    ):  # on the meta device tied weights cannot be recognised
        draft.get_output_embeddings().weight = draft.get_input_embeddings().weight
    record_ties(draft)
    draft.generation_config = copy.deepcopy(given.generation_config)
    return draft.eval()
