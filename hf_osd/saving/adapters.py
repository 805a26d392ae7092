"""Saves and loads drafts with a PEFT adapter (LoRA and its kin): the adapter, with its base beside it unless the Hub has that base."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_osd.models.plain import active_adapter, without_adapters
from hf_osd.saving.hub import FROM_WHERE, find_file

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


def base_on_hub(base: PreTrainedModel) -> tuple[str, str] | None:
    """Return the repository and commit that hold exactly this base, by comparing it with the downloaded files; `None` for any other base, such as a grown or a
    trained one.

    The weights of a quantised base differ from the file's: its config's name is trusted.
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
    """Write the active adapter in PEFT's format, as safetensors, and its base into the same folder, as transformers saves a model with an adapter of
    its own. If the Hub has the base, the base is not written: the adapter's config then names its repository and commit.

    Args:
        model (`PreTrainedModel` or `PeftModel`): a model with an adapter.
        directory: the folder to write into.
        repo_id (`str`, *optional*): the repository to which the folder will be pushed.

    Raises:
        ValueError: if not exactly one adapter is active.
    """
    from safetensors.torch import save_file

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    name, base = active_adapter(inner), without_adapters(inner)
    found = base_on_hub(base)
    if found is None:
        base.save_pretrained(directory)
    config = copy.copy(inner.peft_config[name])
    config.inference_mode = True
    # A local path would be useless to others, and reveal things about this machine; transformers loads a base beside the adapter by its own repository's name.
    config.base_model_name_or_path, config.revision = found or (repo_id, None)
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in _adapter_weights(inner, name).items()}
    save_file(tensors, Path(directory) / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(directory))


def describe_adapter(directory: str | os.PathLike) -> tuple[str | None, bool] | None:
    """Return, for an adapter's checkpoint, its base's repository, if that is on the Hub, and whether the base lies beside it; `None` for other checkpoints."""
    path = Path(directory) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return base, _has_base(path.parent)


def adapter_folder(name_or_path: str | os.PathLike, **kwargs) -> Path | None:
    """Return the folder of an adapter's checkpoint, downloading it from a repository if need be; `None` if there is no adapter.

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
    """Load a base and put the adapter of `folder` on it. The adapter is trainable, the base is frozen.

    Args:
        folder (`Path`): the folder of the adapter, and of its base if that is beside it.
        load (`Callable`): transformers' `from_pretrained`.
        **kwargs: passed to `load`.

    Raises:
        OSError: if there are no adapter weights in safetensors.
        ValueError: if the config names no base, or the adapter does not fit it.
    """
    from safetensors import safe_open

    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise OSError(
            f"{folder} has no {ADAPTER_WEIGHTS}; save the adapter as safetensors, the only form that is read."
        )
    # Files from the adapter's repository are local by now.
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
            raise ValueError(
                f"The adapter in {folder} lacks {', '.join(lacking)}; it was made for another base, or is damaged."
            )
    model.requires_grad_(False)
    model.set_adapter("default")  # makes its parameters require gradients
    return model


def _adapter_weights(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Return the adapter's weights under PEFT's names in files. Embeddings are left out: if they were trained, the base is saved too."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {f"base_model.model.{key}": tensor for key, tensor in weights.items()}


def _has_base(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
