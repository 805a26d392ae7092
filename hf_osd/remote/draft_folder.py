"""Writes and reads the folder that a learning process starts from: the draft as a checkpoint, its adapter's weights, and the config."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_osd.config import OnlineConfig
from hf_osd.models.copies import sharing_copy
from hf_osd.models.feature_draft import FeatureDraft
from hf_osd.models.lora import Adapter
from hf_osd.models.properties import reads_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.models.hot_swap import HotSwapDraft

DRAFT, BEGIN, ADAPTER = "draft", "begin.json", "adapter.safetensors"


def check_loadable(draft: PreTrainedModel):
    """Raise an error if another process could not load the draft from a folder.

    Raises:
        ValueError: if the draft is not a class of transformers, or serves with an adapter.
    """
    if not type(draft).__module__.startswith("transformers.") and not reads_states(draft):
        raise ValueError(
            f"learn='process' loads the draft in another process, and {type(draft).__name__} is no class of transformers. Pass learn='background', which "
            "learns in a thread."
        )
    if getattr(draft, "peft_config", None):
        raise ValueError(
            "learn='process' loads the draft in another process as a plain checkpoint, and this one serves with an adapter that is not in its weights. Pass "
            "learn='background', which learns in a thread."
        )


def write_draft_folder(folder: Path, serving: HotSwapDraft, config: OnlineConfig):
    """Write the serving draft; where it has an adapter, the draft without it and the adapter's weights.

    Raises:
        OSError: if the folder cannot be written.
    """
    from safetensors.torch import save_file, save_model

    leased = serving.lease()
    try:
        draft, weights = serving.for_learner()
        draft.config.save_pretrained(folder / DRAFT)
        save_model(_without_views(draft), str(folder / DRAFT / "model.safetensors"), metadata={"format": "pt"})
    finally:
        serving.release(leased)
    adapter = None
    if serving.adapter is not None:
        adapter = {"rank": serving.adapter.rank, "modules": serving.adapter.modules}
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / ADAPTER)
    begin = {
        "class": type(draft).__name__,
        "dtype": str(draft.dtype).removeprefix("torch."),
        "device": config.learner_device or str(draft.device),
        "trainable": sorted(serving.trainable),
        "adapter": adapter,
        "config": config.to_dict(),
    }
    (folder / BEGIN).write_text(json.dumps(begin), encoding="utf-8")


def _without_views(draft: PreTrainedModel) -> PreTrainedModel:
    """Return the draft with copies of those weights that are parts of a larger allocation, as learnt ones are: safetensors does not write them."""
    draft = sharing_copy(draft)
    for parameter in draft.parameters():
        if parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.detach().clone()
    return draft


@dataclass(frozen=True)
class Beginning:
    """Holds a learner's arguments, read from a draft folder."""

    draft: PreTrainedModel
    trainable: set[str]
    config: OnlineConfig


def read_draft_folder(folder: Path) -> Beginning:
    """Load what `write_draft_folder` wrote, with the draft on the device that it is to learn on."""
    import transformers

    begin = json.loads((folder / BEGIN).read_text(encoding="utf-8"))
    kind = FeatureDraft if begin["class"] == FeatureDraft.__name__ else getattr(transformers, begin["class"])
    draft = kind.from_pretrained(folder / DRAFT, dtype=getattr(torch, begin["dtype"]), local_files_only=True)
    draft.to(begin["device"])
    if begin["adapter"] is not None:
        draft = _with_adapter(draft, folder / ADAPTER, **begin["adapter"])
    return Beginning(draft, set(begin["trainable"]), OnlineConfig.from_dict(begin["config"]))


def _with_adapter(draft: PreTrainedModel, weights: Path, rank: int, modules: list[str]) -> PreTrainedModel:
    """Return the draft with the adapter that it serves with, and the weights that the adapter has learnt so far."""
    from safetensors.torch import load_file

    return Adapter(draft, rank, trainable={f"{module}.weight" for module in modules}).with_weights(load_file(weights))
