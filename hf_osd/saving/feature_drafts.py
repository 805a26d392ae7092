"""Feature-level drafts on disk: `save_feature_draft` and `load_feature_draft`, in the layouts of [`hf_osd.saving.feature_layouts`].

Symbols: V tokens of the target; D of them that an LM head of the draft's own has rows for; H its width.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.models.blueprint import depth_of, text_model
from hf_osd.models.clean_copy import unwrapped
from hf_osd.models.feature_config import FeatureDraftConfig
from hf_osd.models.feature_draft import FeatureDraft
from hf_osd.models.feature_growth import share_ends
from hf_osd.models.feature_target import check_target
from hf_osd.saving.feature_layouts import (
    LAYOUTS,
    check_expressible,
    eagle3_config,
    feature_layout,
    read_config,
    speculators_config,
    verifier_of,
)
from hf_osd.saving.hub import find_file, from_hub

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The logit of a token that an LM head of the draft's own has no row for. Finite, or each of the target's tokens that is missing would make an infinite loss.
MISSING = -100.0

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# In such checkpoints, and of no use to a draft.
_IGNORED = ("verifier_lm_head.weight", "verifier_norm.weight", "rotary_emb.inv_freq")


def save_feature_draft(
    draft: FeatureDraft,
    directory: str | os.PathLike,
    layout: str = "osd",
    *,
    draft_vocab: Sequence[int] | Tensor | None = None,
    verifier: str | None = None,
    speculative_tokens: int = 5,
):
    """Write a feature-level draft in one of the `LAYOUTS`.

    Args:
        draft ([`FeatureDraft`]): the draft.
        directory: where to; made if it is not there. Weights that are there already are removed.
        layout (`str`): one of `LAYOUTS`.
        draft_vocab (`Sequence[int]` or `Tensor`, *optional*): of an engine's layout, the tokens that its LM head has rows for; all that the draft's has if left
            out. Fewer make engines quicker.
        verifier (`str`, *optional*): of `speculators`, the target's name or folder; the one it was grown for if left out.
        speculative_tokens (`int`): of `speculators`, how many tokens an engine drafts at once unless it is told.

    Raises:
        OSError: if it cannot be written.
        ValueError: if there is no such layout, or it cannot express the draft; the message says what it is.
    """
    check_layout(draft, layout, verifier)
    folder = Path(directory)
    if layout == "osd":
        if draft_vocab is not None:
            raise ValueError(
                "`draft_vocab` is for an engine's layout; choose 'eagle3' or 'speculators', or leave it out."
            )
        _drop_weights(folder)
        draft.save_pretrained(folder)
        return
    ids = _rows_to_write(draft, draft_vocab)
    if layout == "eagle3":
        config = eagle3_config(draft, len(ids))
    else:
        config = speculators_config(draft, len(ids), verifier, speculative_tokens)
    tensors = {
        name if layout == "eagle3" else name.replace("midlayer.", "layers.0."): tensor
        for name, tensor in _with_ascending_layers(draft).items()
        if not name.startswith(("embed_tokens.", "lm_head.", "t2d"))
    }
    tensors["lm_head.weight"] = draft.lm_head.weight.detach()[ids.to(draft.lm_head.weight.device)]
    if len(ids) < draft.config.vocab_size:
        tensors["t2d"] = torch.zeros(draft.config.vocab_size, dtype=torch.bool, device="cpu").index_fill_(0, ids, True)
        tensors["d2t"] = ids - torch.arange(len(ids), device="cpu")
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    _drop_weights(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_layout(draft: nn.Module, layout: str, verifier: str | None = None):
    """See, before anything is learnt, that [`save_feature_draft`] could write a draft in a layout.

    Raises:
        ValueError: if there is no such layout, the draft is none that reads the target's states, or the layout cannot express it.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"`layout` is {layout!r}; choose one of {', '.join(LAYOUTS)}.")
    if layout == "osd":
        return
    if not isinstance(draft, FeatureDraft):
        raise ValueError(
            f"`layout` is {layout!r}, which is for drafts that read the target's hidden states, and the draft is a {type(draft).__name__}. Leave `layout` out: engines "
            "read what is written then as a whole model."
        )
    check_expressible(draft)
    if layout == "speculators":
        verifier_of(draft, verifier)


def load_feature_draft(
    name_or_path: str | os.PathLike, target: PreTrainedModel, *, keep_head: bool = False, **where
) -> FeatureDraft:
    """The feature-level draft of a checkpoint in any of the `LAYOUTS`, with the target's embeddings, and its LM head, in their storage.

    The LM head is a frozen one of the draft's own where the checkpoint has one that is not the target's, as most EAGLE-3 heads have: its logit of each token
    that it lacks is -100, and so the probability 0.

    Args:
        name_or_path: a folder or a Hub id.
        target (`PreTrainedModel`): the model it drafts for.
        keep_head (`bool`): keep to the tokens of a smaller draft vocabulary even where its rows are the target's, which otherwise mean the whole of the target's head.
            It then drafts what an engine would, and is saved with the same vocabulary.
        **where: `revision`, `token`, `subfolder`, …, as for `from_pretrained`.

    Returns:
        [`FeatureDraft`]: in the target's dtype, on the device of its embeddings, in eval mode.

    Raises:
        OSError: if there is no such checkpoint, or its weights are damaged or no safetensors.
        ValueError: if it is of another kind or variant, made for another target, or incomplete; the message says which.
    """
    from safetensors import SafetensorError

    given = unwrapped(target)
    inner = text_model(given)
    try:
        draft = from_hub(name_or_path, lambda: _load(name_or_path, inner, keep_head, where))
    except SafetensorError as error:
        raise OSError(
            f"The weights of the draft {name_or_path} are damaged ({error}); save or download them again."
        ) from error
    draft.generation_config = copy.deepcopy(given.generation_config)
    return draft.eval()


def layout_of(name_or_path: str | os.PathLike, **where) -> str | None:
    """Return in which of the `LAYOUTS` a folder or repository holds a feature-level draft; `None` if it holds none.

    Args:
        name_or_path, **where: as for [`load_feature_draft`].
    """
    found = find_file(name_or_path, "config.json", **where)
    return None if found is None else feature_layout(_json(found))


def refuse_without_target(name_or_path: str | os.PathLike, where: Mapping):
    """See that a checkpoint stands alone: an EAGLE-3 head has its target's embeddings, and transformers would read it as another model.

    Raises:
        ValueError: if it does not.
    """
    layout = layout_of(name_or_path, **where)
    if layout not in (None, "osd"):
        raise ValueError(
            f"{name_or_path} is an EAGLE-3 head in the layout {layout!r}, without embeddings: it has its target's. Load it with "
            "hf_osd.load_feature_draft(name, target), or OnlineAssistant.from_pretrained(name, target=target)."
        )


def _load(name: str | os.PathLike, target: PreTrainedModel, keep_head: bool, where: dict) -> FeatureDraft:
    found = find_file(name, "config.json", **where)
    if found is None:
        raise OSError(f"There is no config.json in {name}; give the folder or repository of a draft.")
    raw = _json(found)
    layout = feature_layout(raw)
    if layout is None:
        raise ValueError(
            f"{name} is no feature-level draft (its `architectures` are {raw.get('architectures')}). Load it with AutoModelForCausalLM.from_pretrained."
        )
    if layout == "osd":
        draft = FeatureDraft.from_pretrained(name, dtype=target.dtype, use_safetensors=True, **where)
        check_target(target, draft.config, depth_of(target))
        draft.to(target.get_input_embeddings().weight.device)
        share_ends(draft, target, head=draft.config.draft_vocab_size is None)
        return draft
    config = read_config(raw, layout, target)
    check_target(target, config, depth_of(target))
    tensors = _read_tensors(name, where)
    return _assembled(name, config, tensors, target, keep_head)


def _assembled(
    name: str | os.PathLike,
    config: FeatureDraftConfig,
    tensors: dict[str, Tensor],
    target: PreTrainedModel,
    keep_head: bool,
) -> FeatureDraft:
    """The draft of an engine's checkpoint: a head whose rows are the target's is that, whole, unless `keep_head` and it lacks some."""
    head, ids = _read_head(name, config, tensors, target, keep_head)
    own = tensors.pop("embed_tokens.weight", None)
    if own is not None and not _close(own, target.get_input_embeddings().weight[: len(own)]):
        raise ValueError(
            f"{name} has embeddings of its own, 'embed_tokens.weight', which hf_osd does not read. Choose a draft that has the target's."
        )
    with torch.inference_mode(False), torch.no_grad():
        if head is not None:
            config.draft_vocab_size, config.head_bias = len(ids), len(ids) < config.vocab_size
        with torch.device("meta"):
            draft = FeatureDraft(config)
        state = draft.state_dict()
        wanted = {n: t.shape for n, t in state.items() if not n.startswith(("embed_tokens.", "lm_head.", "t2d"))}
        missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        if missing:
            raise ValueError(
                f"{name} lacks {missing[0]!r} ({len(missing)} missing tensors). Save or download it again."
            )
        if unknown:
            raise ValueError(
                f"{name} has {unknown[0]!r} ({len(unknown)} such tensors), of a variant of EAGLE-3 that hf_osd does not read. Choose a head of one plain Llama layer."
            )
        for key, shape in wanted.items():
            if tensors[key].shape != shape:
                raise ValueError(
                    f"{key!r} is {tuple(tensors[key].shape)} in {name} and should be {tuple(shape)} by its config and this target. Choose the target it was made for."
                )
        home = target.get_input_embeddings().weight.device
        values = {key: tensor.to(home, target.dtype) for key, tensor in tensors.items()}
        draft.load_state_dict(values, strict=False, assign=True)
        if head is not None:
            _give_own_head(draft, head.to(home, target.dtype), ids.to(home))
        share_ends(draft, target, head=head is None)
    return draft


def _give_own_head(draft: FeatureDraft, rows: Tensor, ids: Tensor):
    """Give a draft an LM head of its own with these rows `(D, H)` of the tokens `ids` `(D,)`."""
    size = draft.config.vocab_size
    weight = rows.new_zeros(size, rows.shape[1]).index_copy_(0, ids, rows)
    draft.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    if len(ids) < size:
        bias = rows.new_full((size,), MISSING).index_fill_(0, ids, 0.0)
        draft.lm_head.bias = nn.Parameter(bias, requires_grad=False)
    draft.t2d = torch.zeros(size, dtype=torch.bool, device=rows.device).index_fill_(0, ids, True)


def _read_head(
    name: str | os.PathLike,
    config: FeatureDraftConfig,
    tensors: dict[str, Tensor],
    target: PreTrainedModel,
    keep_head: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The rows of an LM head of the draft's own and their tokens; `None` where they are the target's, and, with `keep_head`, all of them."""
    rows, offsets, mask = (tensors.pop(key, None) for key in ("lm_head.weight", "d2t", "t2d"))
    size, wanted = config.vocab_size, config.draft_vocab_size or config.vocab_size
    config.draft_vocab_size = None
    if rows is None and wanted == size:
        return None, None
    for key, tensor, needed in (("lm_head.weight", rows, True), ("d2t", offsets, wanted < size)):
        if tensor is None and needed:
            raise ValueError(f"{name} lacks {key!r}, and has {wanted} of {size} tokens. Save or download it again.")
    offsets = torch.zeros(len(rows), dtype=torch.long, device="cpu") if offsets is None else offsets.long().cpu()
    ids = torch.arange(len(offsets), device="cpu") + offsets
    tokens = ids.unique()  # ascending
    if not len(rows) == len(ids) == len(tokens) == wanted or tokens[0] < 0 or tokens[-1] >= size:
        raise ValueError(
            f"'d2t' and 'lm_head.weight' of {name} do not give {wanted} different tokens of {size} a row each. Save or download it again."
        )
    if mask is not None and (len(mask) != size or not torch.equal(mask.bool().cpu().nonzero().squeeze(-1), tokens)):
        raise ValueError(f"'t2d' of {name} has other tokens than 'd2t'. Save or download it again.")
    full = target.get_output_embeddings()
    same = getattr(full, "bias", None) is None and full.weight.shape[0] == size and not (keep_head and wanted < size)
    if same and rows.shape[1:] == full.weight.shape[1:] and _close(rows, full.weight[ids.to(full.weight.device)]):
        return None, None
    if rows.shape[1] != config.hidden_size:
        raise ValueError(
            f"'lm_head.weight' of {name} has width {rows.shape[1]} and the draft {config.hidden_size}. Save or download it again."
        )
    return rows, ids


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two weights are one, but for the rounding of another dtype."""
    if other.is_meta or one.shape != other.shape:
        return False
    return torch.allclose(one.float(), other.detach().float().to(one.device), rtol=0.01, atol=1e-6)


def _with_ascending_layers(draft: FeatureDraft) -> dict[str, Tensor]:
    """The draft's tensors as they are where its states are joined in ascending order of `aux_layers`, which is how engines join them."""
    tensors, layers = draft.state_dict(), draft.config.aux_layers
    order = sorted(range(len(layers)), key=layers.__getitem__)
    for name in ("fc.weight", "input_norm.weight"):
        if name in tensors:
            parts = tensors[name].chunk(len(order), dim=-1)
            tensors[name] = torch.cat([parts[i] for i in order], dim=-1)
    norms = {f"fc_norm.{new}.weight": tensors.get(f"fc_norm.{old}.weight") for new, old in enumerate(order)}
    return tensors | {name: norm for name, norm in norms.items() if norm is not None}


def _rows_to_write(draft: FeatureDraft, draft_vocab: Sequence[int] | Tensor | None) -> Tensor:
    """The tokens of the head that is written, int64 `(D,)`, ascending."""
    config = draft.config
    has = torch.arange(config.vocab_size, device="cpu")
    if config.draft_vocab_size is not None:
        has = draft.t2d.cpu().nonzero().squeeze(-1)
    if draft_vocab is None:
        return has
    ids = torch.as_tensor(draft_vocab, dtype=torch.long, device="cpu").flatten().unique()
    if not len(ids) or not torch.isin(ids, has).all():
        raise ValueError(
            f"`draft_vocab` has {len(ids)} tokens, {int((~torch.isin(ids, has)).sum())} of which the draft's LM head has no row for; choose from its {len(has)}."
        )
    return ids


def _read_tensors(name: str | os.PathLike, where: dict) -> dict[str, Tensor]:
    """All tensors of a checkpoint, with our names."""
    from safetensors.torch import load_file

    files = [find_file(name, _WEIGHTS, **where)]
    if files[0] is None and (index := find_file(name, _INDEX, **where)) is not None:
        files = [find_file(name, file, **where) for file in sorted(set(_json(index)["weight_map"].values()))]
    if None in files:
        raise OSError(
            f"There is no {_WEIGHTS} in {name}. hf_osd reads safetensors alone: convert pytorch_model.bin with save_file of safetensors.torch."
        )
    tensors = {key.removeprefix("model."): tensor for file in files for key, tensor in load_file(file).items()}
    return {
        key.replace("layers.0.", "midlayer.", 1) if key.startswith("layers.0.") else key: tensor
        for key, tensor in tensors.items()
        if not key.endswith(_IGNORED)
    }


def _json(path: str | os.PathLike) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _drop_weights(folder: Path):
    """Remove the weights of an older checkpoint, which engines would read with those of the new one."""
    for path in folder.glob("*.safetensors*") if folder.is_dir() else ():
        path.unlink()
