"""`Adapter` puts a LoRA adapter on a draft whose own weights are too many to train. It knows weights and their names; training them is the learner's task."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.models.copies import check_finite, fingerprint, sharing_copy
from hf_osd.models.properties import reads_states
from hf_osd.system.default_device import default_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Used without a user's seed: all ranks of a job, and a learning process, must start from the same adapter.
_SEED = 0
_NAME = "default"
_A, _B = f"lora_A.{_NAME}.weight", f"lora_B.{_NAME}.weight"


class Adapter:
    """Adds a LoRA adapter to a draft (Hu et al. 2021, arXiv 2106.09685): the weight W of each linear layer among the decoder layers becomes W + α/r·B·A, with
    α/r = 2. Embeddings, norms and LM head get none.

    Args:
        draft (`PreTrainedModel`): stays as it is; `base` and `draft` share its storage, which is never written here.
        rank (`int`): r.
        seed (`int`, *optional*): seeds A; B starts at 0. The process's random state is left alone.
        trainable (`set[str]`, *optional*): names of the draft's parameters that a user has made trainable: their layers get an adapter, or all layers if
            there are none.

    Raises:
        ValueError: if no module of the draft can have an adapter, or peft puts none on one of them.

    Attributes:
        base (`PreTrainedModel`): the draft without the adapter.
        draft (`PreTrainedModel`): the draft with the adapter, for a learner to copy.
        trainable (`set[str]`): names of the adapter's parameters in `draft`.
        merges (`bool`): whether the adapter can be merged into the weights.
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
        self.merges = can_merge(linears)
        self.base = sharing_copy(draft)
        self.draft = sharing_copy(draft)
        transposed = [
            not isinstance(linear, nn.Linear) for linear in linears.values()
        ]  # a Conv1D's weight is (in, out)
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
            warnings.simplefilter("ignore")  # peft's, about drafts that have both kinds of layer
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
        """Return the initial adapter weights by name, float32; they add nothing to the draft. Read-only."""
        return {name: p.detach() for name, p in self.draft.named_parameters() if name in self.trainable}

    def merged(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Merge the adapter `weights`: yield the changed weights by the plain draft's names, W + α/r·B·A, computed in float32 and cast to the dtype of W. They
        come one by one, for together they may be almost as large as the draft.

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
        """Return the draft with the adapter `weights`, unmerged; it shares them where they are float32. Read-only."""
        model = sharing_copy(self.draft)
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.trainable:
                    parameter.data = weights[name].detach().to(parameter.device, torch.float32)
        return model

    def rebase(self, base: Mapping[str, Tensor]):
        """Replace weights under the adapter, by the plain draft's names. Copies made before keep the old ones."""
        with torch.inference_mode(False), torch.no_grad():
            plain, adapted = dict(self.base.named_parameters()), dict(self.draft.named_parameters())
            for name, tensor in base.items():
                new = tensor.detach().to(plain[name].device, plain[name].dtype, copy=True)
                plain[name].data = adapted[name if name in adapted else _under_adapter(name)].data = new

    def base_fingerprint(self) -> str:
        """Return a digest of some of the adapted weights, which tells this base from another one of the same shapes."""
        return fingerprint(self.base.get_parameter(f"{module}.weight") for module in self.modules)


def adaptable(draft: PreTrainedModel, trainable: set[str] | None = None) -> dict[str, nn.Module]:
    """Return the modules of a draft that can have a LoRA adapter, by name: the linear layers among its decoder layers, without LM head and embeddings; only
    those with `trainable` weights, if there are any."""
    from transformers.pytorch_utils import Conv1D

    if reads_states(draft):  # its one layer begins at random, and is small
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


def can_merge(linears: Mapping[str, nn.Module]) -> bool:
    """Tell whether an adapter can be merged into these modules: they must be plain layers with plain float weights, none of them shared."""
    from transformers.pytorch_utils import Conv1D

    weights = [linear.weight for linear in linears.values()]
    return (
        all(type(linear) in (nn.Linear, Conv1D) for linear in linears.values())
        and all(type(w) in (nn.Parameter, Tensor) and w.is_floating_point() and not w.is_meta for w in weights)
        and len({id(w) for w in weights}) == len(weights)
    )


def set_base(model: nn.Module, base: Mapping[str, Tensor]):
    """Replace the weights under a model's adapter, by the plain draft's names."""
    parameters = dict(model.named_parameters())
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in base.items():
            parameter = parameters[name if name in parameters else _under_adapter(name)]
            # Never in place: the serving draft may share it.
            parameter.data = tensor.detach().to(parameter.device, parameter.dtype, copy=True)


def _under_adapter(name: str) -> str:
    """Return the name of a weight once its module is adapted, see [`peft.tuners.tuners_utils.BaseTunerLayer`]."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}"
