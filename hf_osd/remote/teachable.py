"""`TeachableAssistant`: chooses which of an assistant's weights learn, and where, and loads weights that were trained elsewhere."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_osd.distill.ensemble import make_student
from hf_osd.distill.student import copied
from hf_osd.learning.background import BackgroundLearner
from hf_osd.learning.learner import Learner
from hf_osd.learning.memory import choose_learning
from hf_osd.learning.orphan import Orphan
from hf_osd.models.clean_copy import unwrapped
from hf_osd.models.copies import check_weights, copy_draft
from hf_osd.models.hot_swap import HotSwapDraft
from hf_osd.models.lora import Adapter
from hf_osd.remote.supervisor import learn_in_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.remote.learner import RemoteLearner

logger = logging.getLogger(__name__)


class TeachableAssistant:
    """Makes the learner of an [`OnlineAssistant`], of which it is a part, and refreshes its weights."""

    def _serve(self, own: PreTrainedModel, trainable: set[str]):
        """Make the serving draft, and a learner of all `trainable` parameters, of an adapter, or of none, as the memory allows."""
        config = self.osd_config
        if not config.learns:
            self.serving, self.learning_choice = HotSwapDraft(own, trainable), "Nothing learns, as asked."
            return
        choice = choose_learning(own, trainable, config)
        self.learning_choice = choice.sentence
        if choice.rank is None:
            self.serving = HotSwapDraft(own, trainable)
        else:
            adapters = {} if self.shared.adapters is None else self.shared.adapters
            if choice.rank not in adapters:
                adapters[choice.rank] = Adapter(own, choice.rank, config.seed, trainable)
            self.adapter = adapter = adapters[choice.rank]
            # Where the weights cannot take it in, the adapter serves beside them.
            merged, apart = (own, trainable, adapter), (adapter.draft, adapter.trainable)
            self.serving = HotSwapDraft(*(merged if adapter.merges else apart))
            self._base = trainable
            own = adapter.draft
        if choice.learns:
            logger.info(choice.sentence)
            self.learner = self._make_learner(own, self.serving.trainable)
        else:
            logger.warning(choice.sentence)

    def _make_learner(
        self, draft: PreTrainedModel, trainable: set[str]
    ) -> Learner | BackgroundLearner | RemoteLearner:
        config = self.osd_config
        if config.learn == "process":
            learner = learn_in_process(self.serving, self.buffer, config)
            self._calls.on_change = learner.transport.note_busy
            return learner
        if config.learner_device is not None:
            try:
                draft = copy_draft(draft, frozen=set()).to(config.learner_device)
            except (
                RuntimeError,
                AssertionError,
            ) as error:  # the second where torch was built without that kind of device
                raise ValueError(
                    f"`learner_device` is {config.learner_device!r}, where the draft cannot be put ({error}); name a device of this machine, or leave it "
                    "out to learn where the draft is."
                ) from error
        student, alone = make_student(draft, trainable, config, self.shared.frozen), config.learn != "background"
        learner = Learner(student, self.buffer, self.serving.refresh, alone, self.shared.learning)
        return learner if alone else BackgroundLearner(learner, busy=self.shared.busy or self._calls.any)

    def after_fork(self):
        """Continue learning in a forked child, or replace a learner that cannot by an [`Orphan`]."""
        if self.learner is not None and (reason := self.learner.after_fork()) is not None:
            self.learner = Orphan(self.learner, reason)

    def refresh(self, model: nn.Module):
        """Serve the weights of `model`, a draft of the same architecture trained elsewhere, from the next call on.

        Where the draft learns in an adapter that hf_osd has put on it, `model` may be a plain one, whose weights then take the place of the draft's, and
        the adapter begins anew; or one with such an adapter.

        Raises:
            ValueError: if `model` does not fit, has values that are not finite, or has changed weights that this assistant
                holds fixed.
        """
        self._needs_draft("refresh")
        model = unwrapped(model)
        adapter = self.adapter
        # Of a PeftModel the adapter's names are those of what it wraps.
        if adapter is not None and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        weights = {name: p.detach() for name, p in model.named_parameters()}
        if adapter is not None and not adapter.trainable & weights.keys():
            self._rebase(weights)
            return
        served = self.serving.active if adapter is None else adapter.draft
        self._check_fixed(weights, served, self.serving.trainable)
        self.take_weights(copied({name: weight for name, weight in weights.items() if name in self.serving.trainable}))

    def take_weights(self, weights: dict[str, Tensor]):
        """Serve learnt weights of this draft, by the names of `serving.weights()`, from the next call on, and go on learning from them. Nobody may write them any more.

        Raises:
            ValueError: if they are not this draft's.
        """
        self.serving.refresh(weights)
        if self.learner is not None:
            self.learner.load_weights(weights)

    def _rebase(self, weights: dict[str, Tensor]):
        """Serve a plain model's weights, and continue learning from them in an adapter that begins anew."""
        adapter = self.adapter
        if self.shared.adapters is not None:
            raise ValueError(
                "The trained model has no adapter, and other routes have learnt in one over the weights that it would replace. Refresh from a model with the adapter, "
                "or make a new RoutedAssistant with the trained model."
            )
        if not adapter.merges:
            raise ValueError(
                "The trained model has no adapter, and this assistant learns in one over weights that it cannot write (quantised ones). Refresh from a model "
                "with the adapter, or make a new assistant with the trained model."
            )
        base = {name: p for name, p in adapter.base.named_parameters() if name in self._base}
        check_weights(weights, base)
        self._check_fixed(weights, adapter.base, self._base)
        base = {name: weights[name] for name in base}
        # Learning first: what it learns meanwhile over the new weights, the old ones serve with for a moment.
        if self.learner is not None:
            self.learner.load_weights(adapter.weights(), base)
        self.serving.rebase(base)

    def _check_fixed(self, weights: dict[str, Tensor], served: nn.Module, trainable: set[str]):
        """Raise `ValueError` if a trained model has changed weights that this assistant holds fixed."""
        for name, p in served.named_parameters():
            if name not in trainable and name in weights and not torch.equal(p, weights[name].to(p)):
                raise ValueError(
                    f"The trained model has changed {name!r}, which this assistant holds fixed. Make it with freeze_embeddings=False "
                    "and a draft whose weights require gradients, or freeze these weights in training."
                )
