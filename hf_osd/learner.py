"""`Learner`: owns the module that trains, and decides when. Between it and the serving draft lies one refresh; whatever goes wrong
here leaves that draft as it was."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.buffer import FeedbackBuffer
from hf_osd.config import OnlineConfig
from hf_osd.feedback import Feedback
from hf_osd.scoring import judge, learners_autocast
from hf_osd.serving import copy_draft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.distill.trainer import OnlineGKDTrainer

logger = logging.getLogger(__name__)


class Learner:
    """Trains a draft on a buffer, in the caller's thread.

    Args:
        draft (`PreTrainedModel`): the draft to start from; it is copied, and what does not train is shared with it.
        trainable (`set[str]`): names of the parameters that train. They are float32 here, whatever the draft serves in.
        buffer (`FeedbackBuffer`): where feedback comes from.
        config (`OnlineConfig`): when to learn, and how.
        refresh (`Callable[[nn.Module], None]`): takes the module after each update, to serve its weights.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        trainable: set[str],
        buffer: FeedbackBuffer,
        config: OnlineConfig,
        refresh: Callable[[nn.Module], None],
    ):
        self.buffer, self.config, self.trainable = buffer, config, trainable
        self.refresh = refresh
        self.updates = self.failed = self.learned_tokens = 0
        self.seconds = 0.0
        self.autocast_dtype = _autocast_dtype(config, draft)
        self.module = copy_draft(draft, {name for name, _ in draft.named_parameters()} - trainable)
        with torch.inference_mode(False):
            if self.autocast_dtype is None:
                self.module.float()  # shared weights that are not float32 get a copy for the learner alone
            for name, parameter in self.module.named_parameters():
                parameter.requires_grad_(name in trainable)
                if name in trainable:
                    parameter.data = parameter.data.float()
        self._generator = torch.Generator()
        self._generator.manual_seed(config.seed if config.seed is not None else torch.seed() % 2**63)
        self._trainer: OnlineGKDTrainer | None = None
        self._lock = threading.Lock()

    @property
    def trainer(self) -> OnlineGKDTrainer:
        """The trainer; made when first needed, for trl takes seconds to import."""
        if self._trainer is None:
            from hf_osd.distill.callbacks import RefreshAssistantCallback
            from hf_osd.distill.trainer import OnlineGKDTrainer

            with isolated_random_state():
                self._trainer = OnlineGKDTrainer(
                    self.module,
                    self.buffer,
                    self.config,
                    autocast_dtype=self.autocast_dtype,
                    callbacks=[RefreshAssistantCallback(self)],
                )
        return self._trainer

    def due(self) -> bool:
        """Whether enough requests or tokens wait, or one has waited long enough."""
        new, config = self.buffer.new(), self.config
        if not new:
            return False
        return (
            len(new) >= config.update_interval
            or (config.update_tokens is not None and sum(map(len, new)) >= config.update_tokens)
            or (config.update_age is not None and time.monotonic() - new[0].created >= config.update_age)
        )

    def update(self, wait: bool = True) -> bool:
        """One update on what is new and its replay. `True` if the serving draft was refreshed.

        Never raises for what happens inside learning: a failed update is logged and counted, the learner goes back to the weights that
        serve, with a new optimizer. An interrupt passes through.

        Args:
            wait (`bool`): while another thread learns, wait for it; else leave the learning to it.
        """
        if not self._lock.acquire(blocking=wait):
            return False
        try:
            new = self.buffer.new()
            return bool(new) and self._update(new)
        finally:
            self._lock.release()

    def judge(self, feedback: list[Feedback], wait: bool = True) -> list[tuple[Tensor, Tensor]] | None:
        """Expected acceptance and confidence of the learner's weights on `feedback`, see [`hf_osd.scoring.judge`]; `None` if another thread
        learns and `wait` is not set."""
        if not self._lock.acquire(blocking=wait):
            return None
        try:
            with self._autocast():
                return judge(self.module, feedback)
        finally:
            self._lock.release()

    def weights(self) -> dict[str, Tensor]:
        """What trains, by name: live storage, float32."""
        return {name: p.detach() for name, p in self.module.named_parameters() if name in self.trainable}

    def take(self, weights: dict[str, Tensor]):
        """Go on learning from weights that were trained elsewhere."""
        with self._lock:
            self._set_weights(weights)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """What a restart needs: tensors (weights and the optimizer's moments, by name) and plain values."""
        tensors = {f"weights.{name}": tensor for name, tensor in self.weights().items()}
        optimizer = self._trainer.optimizer if self._trainer is not None else None
        if optimizer is not None:
            for index, entries in optimizer.state_dict()["state"].items():
                tensors |= {
                    f"optimizer.{index}.{name}": value for name, value in entries.items() if isinstance(value, Tensor)
                }
        scheduler = self._trainer.lr_scheduler if self._trainer is not None else None
        return tensors, {
            "updates": self.updates,
            "failed": self.failed,
            "learned_tokens": self.learned_tokens,
            "seconds": self.seconds,
            "learning_rate_steps": scheduler.last_epoch if scheduler is not None else 0,
        }

    def load_state(self, tensors: dict[str, Tensor], values: dict):
        """Go on from `state()`.

        Raises:
            ValueError: if the state is that of another draft.
        """
        saved = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
        if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in self.weights().items()}:
            raise ValueError(
                "The saved learner is that of another draft; resume with the --draft it was started with, or start afresh."
            )
        self._set_weights(saved)
        self.updates, self.failed = values["updates"], values["failed"]
        self.learned_tokens, self.seconds = values["learned_tokens"], values["seconds"]
        state: dict[int, dict] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, entry = name.split(".", 2)
                state.setdefault(int(index), {})[entry] = tensor
        if state:
            trainer = self.trainer
            trainer.create_optimizer()
            trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": state})
            trainer.create_scheduler(0)
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # torch wants optimizer steps in between; they were taken before the restart
                for _ in range(min(values["learning_rate_steps"], self.config.warmup_steps)):
                    trainer.lr_scheduler.step()

    def _update(self, new: list[Feedback]) -> bool:
        start = time.perf_counter()
        replayed = self.buffer.sample(round(self.config.replay * len(new)), self._generator)
        self.buffer.mark_seen(new)  # also if learning fails: what broke it once must not break it for ever
        before = {name: tensor.clone() for name, tensor in self.weights().items()}
        try:
            self._train([*new, *replayed])
        except Exception:
            self.failed += 1
            logger.exception("An update failed; the serving draft is as it was, and learning goes on from it.")
            self._go_back(before)
            return False
        finally:
            self.seconds += time.perf_counter() - start
        self.updates += 1
        self.learned_tokens += sum(int(r.teaches(self.config.positions).sum()) for r in (*new, *replayed))
        if self.config.clear_after_update:
            self.buffer.clear()
        return True

    def _train(self, requests: list[Feedback]):
        # generate runs under no_grad, users under inference_mode or autocast; and Trainer seeds the process's random state.
        with (
            isolated_random_state(),
            torch.inference_mode(False),
            torch.enable_grad(),
            learners_autocast(self.module.device.type, None),
            torch.autocast("cpu", enabled=False),  # feedback lies there, wherever the draft does
        ):
            self.module.train()
            self.trainer.learn(requests)

    def _autocast(self) -> torch.autocast:
        """Frozen weights are shared in the serving dtype, so that only under autocast all of the module's dtypes meet."""
        return learners_autocast(self.module.device.type, self.autocast_dtype)

    def _go_back(self, weights: dict[str, Tensor]):
        self._set_weights(weights)
        if self._trainer is not None:
            self._trainer.optimizer = self._trainer.lr_scheduler = None

    def _set_weights(self, weights: dict[str, Tensor]):
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in self.weights().items():
                parameter.copy_(weights[name])


@contextlib.contextmanager
def isolated_random_state() -> Iterator[None]:
    """Give back Python's, NumPy's and torch's random states as they were: learning must not change what a user samples."""
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _autocast_dtype(config: OnlineConfig, draft: PreTrainedModel) -> torch.dtype | None:
    """bfloat16 if learning is to run under autocast, `None` for float32 throughout."""
    if config.learner_dtype == "bfloat16":
        return torch.bfloat16
    if config.learner_dtype == "float32" or draft.dtype == torch.float32:
        return None
    if draft.device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif draft.device.type == "cpu":
        # Emulated bfloat16 is several times slower than float32 there.
        native = any(torch.cpu.get_capabilities().get(feature) for feature in ("avx512_bf16", "amx_bf16"))
    else:
        native = False
    return torch.bfloat16 if native else None
