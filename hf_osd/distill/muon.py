"""`MuonWithAdamW`: torch's Muon for the matrices of a draft's layers, and AdamW for what Muon does not do, as one optimizer for a Trainer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Both with one learning rate: Muon's steps are scaled to the size of AdamW's (`adjust_lr_fn="match_rms_adamw"`).

    Args:
        model (`nn.Module`): whose parameters with gradients to optimize. Matrices are Muon's, but those of embeddings, of tokens or positions, and LM head.
        lr (`float`), weight_decay (`float`): of both.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float = 0.0):
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]  # of tokens, and of positions
        ends = {id(p) for m in (*embeddings, model.get_output_embeddings()) for p in m.parameters()}
        training = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in training if p.ndim == 2 and id(p) not in ends]
        chosen = set(map(id, matrices))
        rest = [p for p in training if id(p) not in chosen]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(
                torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay))
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": lr})
        self._share()

    def _share(self):
        """The parts work on this optimizer's own groups and state, which a Trainer reads, schedules and saves."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict):
        super().load_state_dict(state_dict)
        self._share()
