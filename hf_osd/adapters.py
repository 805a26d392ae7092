"""Drafts with an adapter (LoRA and its kin, by PEFT): a checkpoint of the adapter, with its base beside it where nobody else could get that."""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_osd.hub import FROM_WHERE, find_file
from hf_osd.serving import copy_draft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)


def has_adapter(model: nn.Module) -> bool:
    """Whether it is a PeftModel, or a model with an adapter of transformers' `add_adapter` or `load_adapter`."""
    return bool(getattr(model, "peft_config", None))


def base_on_hub(base: PreTrainedModel) -> tuple[str, str] | None:
    """Repository and commit that hold exactly this base, by what was downloaded from there; `None` of any other, such as a grown or a trained one.

    A quantised base, whose weights are not those of the file, is believed to be what it says.
    """
    from huggingface_hub import try_to_load_from_cache
    from safetensors import safe_open

    name = getattr(base.config, "_name_or_path", None)
    if not name or os.path.exists(name):
        return None
    found = try_to_load_from_cache(name, "config.json")
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    wanted = {} if getattr(base, "hf_quantizer", None) else dict(base.named_parameters())
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in set(file.keys()) & set(wanted):
                here = wanted[key]
                if torch.equal(file.get_tensor(key).to(here.device, here.dtype), here):
                    del wanted[key]
    return None if wanted else (name, folder.name)


def save_adapter(model: nn.Module, directory: str | os.PathLike, repo_id: str | None = None) -> None:
    """Write the active adapter as PEFT has it, as safetensors, and its base into the same folder, as transformers has a model with an adapter of
    its own. The base stays away where the Hub has it: the adapter's config then names repository and commit.

    Args:
        model (`PreTrainedModel` or `PeftModel`): with an adapter.
        directory: where to.
        repo_id (`str`, *optional*): the repository that the folder will be.

    Raises:
        ValueError: if not exactly one adapter is active.
    """
    from safetensors.torch import save_file

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    name, base = _active_adapter(inner), without_adapters(inner)
    found = base_on_hub(base)
    if found is None:
        base.save_pretrained(directory)
    config = copy.copy(inner.peft_config[name])
    config.inference_mode = True
    # A path of this machine would say nothing to others, and much about it; its own repository is what transformers loads a base there by.
    config.base_model_name_or_path, config.revision = found or (repo_id, None)
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in _adapter_weights(inner, name).items()}
    save_file(tensors, Path(directory) / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(directory))


def describe_adapter(directory: str | os.PathLike) -> tuple[str | None, bool] | None:
    """Of an adapter's checkpoint the repository of its base, if that is on the Hub, and whether the base lies beside it; `None` of any other."""
    path = Path(directory) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return base, _has_base(path.parent)


def merged(model: nn.Module) -> PreTrainedModel:
    """A plain copy of a model with an adapter, which has what the active one does in its weights.

    Raises:
        ValueError: if not exactly one adapter is active.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    _active_adapter(inner)
    return without_adapters(inner, merge=True)


def without_adapters(model: PreTrainedModel, merge: bool = False) -> PreTrainedModel:
    """The base of a model with adapters, in their storage; or with `merge` a copy that has the active adapter in its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = copy_draft(model, set() if merge else {name for name, _ in model.named_parameters()})
    adapted = {n: m for n, m in base.named_modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    # Of what lies in another one its own merging takes care.
    adapted = {n: m for n, m in adapted.items() if not any(n.startswith(f"{outer}.") for outer in adapted)}
    inner, outer = (
        {id(p) for p in end.parameters()} for end in (base.get_input_embeddings(), base.get_output_embeddings())
    )
    tied = bool(inner & outer)
    if merge:
        _part_shared(base, adapted.values())
    for name, module in adapted.items():
        if isinstance(module, BaseTunerLayer):
            if merge:
                module.merge()
            plain = module.get_base_layer()
        else:
            trained = merge and module.unload_and_optionally_merge_module(True, safe_merge=False, adapter_names=None)
            plain = trained or module.original_module
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, plain)
    if merge and tied:
        _join_again(base)
    say_ties(base)
    base._hf_peft_config_loaded = False
    base.__dict__.pop("peft_config", None)
    # Where transformers has loaded the adapter, it noted how that one's names are changed, and would write the base under such names.
    if any(
        one.source_patterns[0].startswith("base_model.") for one in getattr(base, "_weight_conversions", None) or ()
    ):
        del base._weight_conversions  # those of the architecture hold again
    return base


def say_ties(model: PreTrainedModel):
    """Have the config say whether input embeddings and LM head are one: whoever reads a checkpoint goes by that, and the file has no head where they are.
    An encoder-decoder's is left as it is, for there it also says how hidden states are scaled."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.is_encoder_decoder or not all(type(getattr(end, "weight", None)) is nn.Parameter for end in ends):
        return
    for part in (model.config, model.config.get_text_config(decoder=True)):
        one = ends[0].weight is ends[1].weight
        if getattr(part, "tie_word_embeddings", one) != one:
            part.tie_word_embeddings = one


def _join_again(model: PreTrainedModel):
    """Make one of two ends that were one, and have the same values still.

    Raises:
        ValueError: if they have not, and the config of an encoder-decoder could not say that.
    """
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if torch.equal(ends[0].weight, ends[1].weight):
        ends[1].weight = ends[0].weight
    elif model.config.is_encoder_decoder:
        raise ValueError(
            f"The adapter changes one of two ends of {type(model).__name__} that are one weight, and without it a checkpoint could not say that they are two. Save "
            "it as an adapter (merge=False)."
        )


def _part_shared(model: nn.Module, adapted: Iterable[nn.Module]):
    """Give layers that are adapted weights of their own: what is merged into one must not change another that shares them, such as the other end of a
    draft with tied ones."""
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for layer in itertools.chain.from_iterable(module.modules() for module in adapted):
        for name, parameter in layer._parameters.items():
            if parameter is not None and owners[id(parameter)] > 1:
                layer._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def adapter_folder(name_or_path: str | os.PathLike, **kwargs) -> Path | None:
    """The folder of an adapter's checkpoint, downloaded if it is a repository; `None` if there is no adapter.

    Raises:
        OSError: if there is no such folder or repository, or the Hub cannot be reached.
    """
    where, subfolder = {key: kwargs[key] for key in FROM_WHERE if key in kwargs}, kwargs.get("subfolder", "")
    found = find_file(name_or_path, ADAPTER_CONFIG, subfolder=subfolder, **where)
    if found is None or os.path.isdir(name_or_path):
        return None if found is None else Path(found).parent
    from huggingface_hub import snapshot_download

    wanted = [f"{subfolder}/{name}".lstrip("/") for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, *BASE_FILES)]
    return Path(snapshot_download(str(name_or_path), allow_patterns=wanted, **where)) / subfolder


def load_with_adapter(folder: Path, load: Callable[..., PreTrainedModel], **kwargs) -> PreTrainedModel:
    """A base with the adapter of `folder` on it, which trains; the base does not.

    Args:
        folder (`Path`): of the adapter, and of its base if that is there.
        load (`Callable`): transformers' `from_pretrained`.
        **kwargs: for `load`.

    Raises:
        OSError: if the adapter's weights are not there as safetensors.
        ValueError: if nothing says what its base is, or the adapter does not fit it.
    """
    from safetensors import safe_open

    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise OSError(
            f"{folder} has no {ADAPTER_WEIGHTS}; save the adapter as safetensors, the only form that is read."
        )
    # What came from where the adapter did is local by now.
    options = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder", "force_download")}
    if _has_base(folder):
        model = load(folder, **options)
    else:
        facts = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if not facts.get("base_model_name_or_path"):
            raise ValueError(
                f"{folder / ADAPTER_CONFIG} names no base_model_name_or_path, and no base lies beside it; write the base's repository there."
            )
        model = load(facts["base_model_name_or_path"], revision=facts.get("revision") or "main", **options)
        hub = {key: kwargs[key] for key in ("token", "cache_dir") if key in kwargs}
        model.load_adapter(str(folder), is_trainable=True, adapter_kwargs=hub)
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        if lacking := sorted(set(_adapter_weights(model, "default")) - set(file.keys())):
            raise ValueError(f"The adapter in {folder} lacks {', '.join(lacking)}; it is of another base, or damaged.")
    model.requires_grad_(False)
    model.set_adapter("default")  # which, of its parameters, makes those require gradients
    return model


def _adapter_weights(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """As PEFT names them in files. Without embeddings: where they train, their base is not the Hub's any more, and goes along."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {f"base_model.model.{key}": tensor for key, tensor in weights.items()}


def _has_base(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


def _active_adapter(model: nn.Module) -> str:
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = {name for m in model.modules() if isinstance(m, BaseTunerLayer) for name in m.active_adapters}
    if len(names) != 1:
        raise ValueError(
            f"The active adapters of the draft are {sorted(names)}; make one of them active with set_adapter(name), and save."
        )
    return names.pop()
