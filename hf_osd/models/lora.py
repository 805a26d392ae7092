"""`Adapter`: a LoRA adapter that hf_osd puts on a draft whose own weights are too many to learn; and what of a draft learns, by the memory there is. It knows
weights and their names; how they learn is the learner's."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.models.copies import check_finite, copy_draft
from hf_osd.models.properties import reads_states
from hf_osd.system.default_device import default_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Without a seed of the user's: the ranks of a job, and a process that learns, must all begin with the same adapter, and it adds nothing to the draft yet.
_SEED = 0
_NAME = "default"
_A, _B = f"lora_A.{_NAME}.weight", f"lora_B.{_NAME}.weight"
# Numbers of each end of a weight that tell one base from another.
_PRINTED = 256


class Adapter:
    """A LoRA adapter on a draft (Hu et al. 2021, arXiv 2106.09685): to the weight W of each linear layer in the draft's own layers comes B·A, scaled by α/r = 2.
    Embeddings, norms and LM head get none.

    Args:
        draft (`PreTrainedModel`): it is left as it is, and shares all of its storage with what is made here, which nothing here writes.
        rank (`int`): r.
        seed (`int`, *optional*): of A; B is 0 at first. The process's random state is left alone.
        trainable (`set[str]`, *optional*): names of the draft's parameters that a user lets learn: the layers of these get an adapter, or all if there
            are none.

    Raises:
        ValueError: if no module of the draft can have an adapter.

    Attributes:
        base (`PreTrainedModel`): the draft without the adapter.
        draft (`PreTrainedModel`): the draft with it, for a learner to copy.
        trainable (`set[str]`): names of the adapter's parameters in `draft`.
    """

    def __init__(self, draft: PreTrainedModel, rank: int, seed: int | None = None, trainable: set[str] | None = None):
        from peft import LoraConfig

        linears = adaptable(draft, trainable)
        if not linears:
            raise ValueError(
                f"{type(draft).__name__} has no linear layer in its decoder layers that could have a LoRA adapter. Pass adapter='off', which learns all "
                "weights, or learn=False."
            )
        self.rank, self.modules = rank, list(linears)
        self.merges = merges(linears)
        self.base = _sharing(draft)
        self.draft = _sharing(draft)
        transposed = [
            not isinstance(linear, nn.Linear) for linear in linears.values()
        ]  # a Conv1D has its weight as (in, out)
        self._transposed = dict(zip(self.modules, transposed, strict=True))
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=self.modules,
            fan_in_fan_out=all(transposed),
            task_type="SEQ_2_SEQ_LM" if draft.config.is_encoder_decoder else "CAUSAL_LM",
        )
        self._scaling = config.lora_alpha / rank
        with torch.inference_mode(False), torch.random.fork_rng(), default_device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, of drafts that have both kinds of layer
            torch.manual_seed(_SEED if seed is None else seed)
            self.draft.add_adapter(config, _NAME)
            self.trainable = {f"{module}.{end}" for module in self.modules for end in (_A, _B)}
            for name, parameter in self.draft.named_parameters():
                parameter.requires_grad_(name in self.trainable)
                if name in self.trainable:
                    parameter.data = parameter.data.float()
        if lacking := self.trainable - {name for name, _ in self.draft.named_parameters()}:
            raise ValueError(f"peft has put no adapter on {min(lacking).removesuffix('.' + _A)}; pass adapter='off'.")

    def weights(self) -> dict[str, Tensor]:
        """The adapter as it begins, which adds nothing to the draft: by name, float32. To read, not to write."""
        return {name: p.detach() for name, p in self.draft.named_parameters() if name in self.trainable}

    def merged(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The plain draft's weights that the adapter `weights` change, by the plain draft's names: W + α/r·B·A, in float32, then in the dtype of W. One
        by one, for all of them together may be most of the draft.

        Raises:
            ValueError: if one has a value that is not finite in that dtype.
        """
        for module in self.modules:
            weight = self.base.get_parameter(f"{module}.weight")
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                a, b = (weights[f"{module}.{end}"].to(weight.device, torch.float32) for end in (_A, _B))
                factors = (a.T, b.T) if self._transposed[module] else (b, a)  # (in, r)·(r, out), or (out, r)·(r, in)
                merged = torch.addmm(weight.float(), *factors, alpha=self._scaling).to(weight.dtype)
            check_finite(f"{module}.weight", merged)
            yield f"{module}.weight", merged

    def with_weights(self, weights: Mapping[str, Tensor]) -> PreTrainedModel:
        """The draft with the adapter `weights`, unmerged, for a checkpoint."""
        model = _sharing(self.draft)
        for name, parameter in model.named_parameters():
            if name in self.trainable:
                parameter.data = weights[name].detach().to(parameter.device, torch.float32, copy=True)
        return model

    def rebase(self, base: Mapping[str, Tensor]):
        """Go on over other weights of the draft, by the plain draft's names. What had the old ones has them still."""
        with torch.inference_mode(False), torch.no_grad():
            plain, adapted = dict(self.base.named_parameters()), dict(self.draft.named_parameters())
            for name, tensor in base.items():
                new = tensor.detach().to(plain[name].device, plain[name].dtype, copy=True)
                plain[name].data = adapted[name if name in adapted else _under_adapter(name)].data = new

    def print_of_base(self) -> str:
        """What tells this base from another one of the same shapes: a digest of some of the weights that are adapted."""
        digest = hashlib.sha256()
        for module in self.modules:
            flat = self.base.get_parameter(f"{module}.weight").detach().flatten()
            digest.update(torch.cat([flat[:_PRINTED], flat[-_PRINTED:]]).float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def adaptable(draft: PreTrainedModel, trainable: set[str] | None = None) -> dict[str, nn.Module]:
    """The modules of a draft that can have a LoRA adapter, by name: the linear layers among its layers, and neither LM head nor embeddings. Of those whose
    weights are `trainable`, if there are any. None of a draft that reads the target's hidden states: its one layer begins at random, and is small."""
    from transformers.pytorch_utils import Conv1D

    if reads_states(draft):
        return {}
    ends = {id(end) for end in (draft.get_input_embeddings(), draft.get_output_embeddings())}
    stacks = tuple(f"{name}." for name, module in draft.named_modules() if isinstance(module, nn.ModuleList))
    found = {
        name: module
        for name, module in draft.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(stacks) and id(module) not in ends
    }
    learnt = {name: module for name, module in found.items() if f"{name}.weight" in (trainable or ())}
    return learnt or found


def merges(linears: Mapping[str, nn.Module]) -> bool:
    """Whether an adapter on these can be put into their weights: plain layers of plain float weights, none of them shared."""
    from transformers.pytorch_utils import Conv1D

    weights = [linear.weight for linear in linears.values()]
    return (
        all(type(linear) in (nn.Linear, Conv1D) for linear in linears.values())
        and all(type(w) in (nn.Parameter, Tensor) and w.is_floating_point() and not w.is_meta for w in weights)
        and len({id(w) for w in weights}) == len(weights)
    )


def set_base(model: nn.Module, base: Mapping[str, Tensor]):
    """Put other weights of the plain draft, by its names, under a model's adapter."""
    parameters = dict(model.named_parameters())
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in base.items():
            parameter = parameters[name if name in parameters else _under_adapter(name)]
            # Never in place: what serves may share it.
            parameter.data = tensor.detach().to(parameter.device, parameter.dtype, copy=True)


def _under_adapter(name: str) -> str:
    """The name that the weight of an adapted module has, see [`peft.tuners.tuners_utils.BaseTunerLayer`]."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}"


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    """The same model again, in the same storage."""
    return copy_draft(model, {name for name, _ in model.named_parameters()})
