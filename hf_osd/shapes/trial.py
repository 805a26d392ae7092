"""`Trial` distils one shape of draft on a target's answers, and scores it on others."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from hf_osd.distill.scoring import learning_modes, score_by_step
from hf_osd.distill.student import Student
from hf_osd.distill.windows import cut_to_learn
from hf_osd.learning.memory import LearningFacts, learning_bytes
from hf_osd.models.copies import embedding_names
from hf_osd.system.random_state import isolated_random_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.config import OnlineConfig
    from hf_osd.feedback.feedback import Feedback
    from hf_osd.models.draft_head import DraftHead
    from hf_osd.shapes.shape import Shape

# Tokens of a block whose acceptance is told apart; those after it are taken to do as the last.
STEPS = 3


class Trial:
    """Trains one draft.

    Args:
        shape (`Shape`): its shape, to be named.
        draft (`PreTrainedModel`): as it was grown; `score` writes what has been learnt into it.
        config (`OnlineConfig`): how to learn.
        clock (`Callable[[], float]`): gives seconds.

    Attributes:
        learnt (`int`): requests learnt so far, each time that one was.
        seconds (`float`): of learning and scoring.
        failure (`str`, *optional*): why the shape is out.
    """

    def __init__(
        self,
        shape: Shape,
        draft: PreTrainedModel,
        config: OnlineConfig,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.shape, self.draft, self._config, self._clock = shape, draft, config, clock
        self.trainable = {name for name, p in draft.named_parameters() if p.requires_grad} - embedding_names(draft)
        self.learnt, self.seconds, self.failure = 0, 0.0, None
        self._student: Student | None = None  # while the shape is in
        self._generator = torch.Generator("cpu").manual_seed(config.seed or 0)

    @property
    def parameters(self) -> int:
        """Count the weights that learn."""
        return sum(p.numel() for name, p in self.draft.named_parameters() if name in self.trainable)

    def memory(self) -> tuple[int, int]:
        """Estimate the bytes that learning takes for as long as the shape is in, and those of one step."""
        facts = LearningFacts.of(self.draft, self.trainable, {}, self._config)
        return learning_bytes(facts) - facts.activations, facts.activations

    def learn(self, requests: Sequence[Feedback]):
        """Pass once over requests; a loss that is not finite puts the shape out."""
        with _isolated(self.draft.device):
            if self._student is None:
                self._student = Student(self.draft, self.trainable, self._config)
                self._student.prepare()  # imports the trainer, which is no shape's own time
        with self._timed(), _isolated(self.draft.device):
            self._student.learn(cut_to_learn(requests, self._config, self._generator))
            total, rows = self._student.last_losses[0]
        self.learnt += len(requests)
        if rows and not math.isfinite(total / rows):
            self.failure = "its loss was not finite"
            self.end()

    def score(self, held_back: Sequence[Feedback], head_sizes: Sequence[DraftHead | None]) -> list[list[float]]:
        """Compute expected acceptance of the first tokens of a block, those before being right, with each head: the mean over `held_back`.

        A token that a head has no row for counts as rejected. NaN where there is no such block.
        """
        with self._timed(), _isolated(self.draft.device):
            if self._student is not None:
                weights = self._student.serving_weights()
                with torch.no_grad():
                    for name, parameter in self.draft.named_parameters():
                        if name in weights:
                            parameter.copy_(weights[name])
            scores = torch.cat(score_by_step(self.draft, held_back, STEPS), dim=-1)  # (steps, positions)
        found = []
        for head in head_sizes:
            covered = scores
            if head is not None:
                has = [head.covers(one.tokens[: one.prompt_length], one.answer.tolist()) for one in held_back]
                covered = scores * torch.cat(has)
            found.append(covered.nanmean(dim=-1).tolist())
        return found

    def end(self):
        """Free what learning took."""
        self._student = None

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = self._clock()
        try:
            yield
        finally:
            self.seconds += self._clock() - began


@contextlib.contextmanager
def _isolated(device: torch.device) -> Iterator[None]:
    """Shield learning and its caller from each other, as [`hf_osd.learning.learner.Learner`] does."""
    with isolated_random_state(), learning_modes(device):
        yield
