"""`HotSwapDraft` swaps the weights of the serving draft. It knows weights and leases, nothing of generation or learning.

A generate call leases the active copy for as long as it lasts; new weights go into a new copy, and then a reference is flipped. A copy is never written, so weights never
change under a call's KV cache; the old one goes with the last call that holds it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from hf_osd.models.copies import check_weights, sharing_copy
from hf_osd.system.forks import released

if TYPE_CHECKING:
    from hf_osd.models.lora import Adapter


class HotSwapDraft:
    """Holds the serving copy of a draft, and swaps it for new ones. Thread-safe.

    Weights that were never written are shared: a draft that has learnt nothing yet exists once, however many copies serve and learn.

    Args:
        model (`PreTrainedModel`): the draft. It is never written here, and must not be written elsewhere: until a refresh the copies share its weights.
        trainable (`set[str]`): names of the parameters that refreshes write. All others are shared with `model` for good.
        adapter ([`hf_osd.models.lora.Adapter`], *optional*): the adapter that learns in place of `trainable`. Refreshes then bring its weights, which are
            merged into the copy that serves: that is a plain model.

    Attributes:
        version (`int`): how many refreshes there were.
    """

    def __init__(self, model: nn.Module, trainable: set[str], adapter: Adapter | None = None):
        self.adapter = adapter
        self.trainable = trainable if adapter is None else adapter.trainable
        self.version = 0
        self._copy = sharing_copy(model).eval()
        self._learnt = (
            None if adapter is None else adapter.weights()
        )  # the adapter weights merged into the active copy
        self._leases: dict[int, int] = {}  # id of a copy -> number of calls that hold it
        self._rests = False  # the adapter serves unmerged
        self._lock = released(threading.RLock())  # guards leases and what is active
        self._refreshing = released(threading.Lock())  # one refresh at a time

    @property
    def active(self) -> nn.Module:
        """Return the copy that serves the next call. Read-only."""
        return self._copy

    def plain(self) -> nn.Module:
        """Return a model of what serves that has no adapter on it, where the adapter can be merged. Read-only."""
        with self._lock:
            rests, learnt, active = self._rests, self._learnt, self.active
        return self._merged(learnt) if rests else active

    def lease(self) -> nn.Module:
        """Return the active copy, and count who holds it until `release`."""
        with self._lock:
            model = self.active
            self._leases[id(model)] = self._leases.get(id(model), 0) + 1
            return model

    def release(self, model: nn.Module):
        """Give back a leased copy."""
        with self._lock:
            left = self._leases.pop(id(model)) - 1
            if left:
                self._leases[id(model)] = left

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the learnt weights that serve, by name: the active copy's trainable weights, or the adapter's."""
        if self._learnt is not None:
            return iter(self._learnt.items())
        return ((name, p.detach()) for name, p in self.active.named_parameters() if name in self.trainable)

    def rest(self) -> bool:
        """Serve the adapter unmerged until the next refresh, over the weights that all share: a draft step then takes a little longer. Returns `True` if it was merged into a copy,
        which goes with the last call that holds it."""
        with self._refreshing, self._lock:
            if self.adapter is None or self._rests or not self.version:
                return False
            unmerged = self.adapter.with_weights(self._learnt).eval()
            self._copy, self._rests = unmerged, True
            return True

    def own_bytes(self) -> int:
        """Count the bytes of weights that are not shared with the draft as it came."""
        if self.adapter is None:
            return sum(self.active.get_parameter(name).nbytes for name in self.trainable) if self.version else 0
        learnt = sum(tensor.nbytes for tensor in self._learnt.values())
        if not self.version or self._rests:
            return learnt
        return learnt + sum(self.active.get_parameter(f"{module}.weight").nbytes for module in self.adapter.modules)

    def for_learner(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return a plain draft from which a learner in another process can start, and the adapter weights on it, if there is an adapter. Read-only."""
        with self._refreshing:
            if self.adapter is None:
                return self.active, {}
            return sharing_copy(self.adapter.base).eval(), dict(self._learnt)

    def refresh(self, weights: Mapping[str, Tensor]):
        """Put `weights` (any dtype and device) into a new copy and make it the active one. An adapter's are kept as they are: nobody writes them any more.

        Raises:
            ValueError: if a trainable parameter is missing, or has another shape or a value that is not finite. The
                serving draft is then unchanged.
        """
        check_weights(weights, dict(self.weights()))
        with self._refreshing:
            weights = {name: weights[name] for name in self.trainable}
            if self.adapter is None:
                made, learnt = _copy_with(self._copy, self.trainable, weights.items()), None
            else:
                made, learnt = self._merged(weights), _kept(weights)
            with self._lock:
                self._copy, self._learnt, self._rests = made, learnt, False
                self.version += 1

    def rebase(self, base: Mapping[str, Tensor]):
        """Serve other weights of the plain draft, by name, with a fresh adapter. Running calls keep the old ones."""
        with self._refreshing:
            self.adapter.rebase(base)
            copy = sharing_copy(self.adapter.base).eval()
            with self._lock:
                self._copy, self._learnt, self._rests = copy, self.adapter.weights(), False
                self.version += 1

    def _merged(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """Make a copy with the adapter `weights` merged in."""
        names = [f"{module}.weight" for module in self.adapter.modules]
        return _copy_with(self.adapter.base, names, self.adapter.merged(weights))


def _copy_with(model: nn.Module, names: Iterable[str], weights: Iterable[tuple[str, Tensor]]) -> nn.Module:
    """Copy `model` with new `weights`, which have these `names`, and share all others. The new ones lie in one allocation for each device and dtype, which is freed when the copy
    stops serving: many small ones, made anew at each refresh, would leave gaps that add up to another copy."""
    model = sharing_copy(model).eval()
    changed = [model.get_parameter(name) for name in names]
    with torch.inference_mode(False), torch.no_grad():
        whole = {
            key: torch.empty(sum(p.numel() for p in changed if _kind(p) == key), device=key[0], dtype=key[1])
            for key in set(map(_kind, changed))
        }
        for name, tensor in weights:
            old = model.get_parameter(name)
            piece, rest = whole[_kind(old)].tensor_split([old.numel()])
            old.data, whole[_kind(old)] = piece.view_as(old).copy_(tensor), rest
    return model


def _kind(weight: Tensor) -> tuple[torch.device, torch.dtype]:
    return weight.device, weight.dtype


def _kept(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in float32, in storage that learning can go on from."""
    with torch.inference_mode(False), torch.no_grad():
        return {name: t.detach().to(torch.float32, copy=t.is_inference()) for name, t in weights.items()}


class NullDraft:
    """Has the attributes that transformers reads on an assistant model, where there is no draft model and the suffix cache drafts alone."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        self.config = _NullConfig()
        self.generation_config = GenerationConfig()

    def _supports_logits_to_keep(self) -> bool:
        return True


class _NullConfig:
    is_encoder_decoder = False

    def get_text_config(self, **kwargs) -> _NullConfig:
        return self

    @property
    def vocab_size(self) -> _AnySize:
        return _AnySize()


class _AnySize:
    """Equals every vocabulary size: cached tokens are the target's own, and `generate` compares sizes before it passes the target on."""

    def __eq__(self, other) -> bool:
        return True

    __hash__ = None


class NullHotSwap:
    """Replaces [`HotSwapDraft`] where there is no draft model."""

    trainable: frozenset[str] = frozenset()
    version = 0

    def __init__(self):
        self.active = NullDraft()

    def lease(self) -> NullDraft:
        return self.active

    def release(self, model: NullDraft):
        pass
