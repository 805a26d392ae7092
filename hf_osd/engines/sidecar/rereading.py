"""`AnswerReader` reads served answers once more with a copy of the target: for drafts that learn from its hidden states, which engines do not hand out while they
speculate, and where engines are not to be asked for log-probs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.feedback.feedback import Feedback, SparseLogits
from hf_osd.feedback.prompt_states import SeenTexts
from hf_osd.feedback.target_states import TargetStates
from hf_osd.models.feature_target import check_target
from hf_osd.models.properties import forward_parameters, reads_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.config import OnlineConfig

# Tokens of a forward, padding included, unless one answer alone has more.
_TOKENS_AT_ONCE = 1024
# Rows of logits that are reduced at a time: each is as wide as the vocabulary, in float32.
_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Served:
    """Holds an answer that an engine gave.

    Args:
        prompt (`list[int]`), answer (`list[int]`): token ids.
        sampled (`bool`): whether it was sampled rather than greedy.
    """

    prompt: list[int]
    answer: list[int]
    sampled: bool


class AnswerReader:
    """Reads answers and their prompts in batches, one forward each, and makes [`Feedback`] of them: with distributions for the prompt, too, and for a feature-level
    draft with the target's states.

    Args:
        target (`PreTrainedModel`): a causal LM, the same as the engines serve.
        draft (`PreTrainedModel`): the draft that learns.
        config (`OnlineConfig`): `top_k`, `feedback_dtype` and `prompt_positions` are as in serving.
        share (`float`): share of the time that reading may take, above 0 up to 1. It is the budget: what cannot be read in it is not read.
        clock (`Callable[[], float]`): tells the time in seconds.

    Raises:
        ValueError: if `share` is not such a share, or the draft was made for a target of other sizes.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel,
        config: OnlineConfig,
        share: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        if not 0 < share <= 1:
            raise ValueError(f"`share` is {share}; give the share of the time that reading may take, above 0 up to 1.")
        check_target(target, draft.config)
        self.target, self.share = target.eval(), share
        self.seconds = 0.0
        self._layers = draft.config.recorded_layers if reads_states(draft) else None
        self._top_k, self._prompt_positions = config.top_k, config.prompt_positions
        self._dtype = getattr(torch, config.feedback_dtype)
        self._seen, self._clock, self._next = SeenTexts(), clock, clock()

    @property
    def rest(self) -> float:
        """Tells for how many seconds nothing is to be read, so that the share is kept."""
        return max(self._next - self._clock(), 0.0)

    @torch.no_grad()
    def read(self, answers: Sequence[Served]) -> Iterator[Feedback]:
        """Read answers, and yield their feedback as it is made, the shortest first."""
        for batch in _batches(sorted(answers, key=lambda one: len(one.prompt) + len(one.answer))):
            began = self._clock()
            feedback = self._read(batch)
            took = self._clock() - began
            self.seconds += took
            self._next = self._clock() + took * (1 / self.share - 1)
            yield from feedback

    def _read(self, batch: Sequence[Served]) -> list[Feedback]:
        """Read some answers in one forward. Padding is on the right, where no token before it sees it."""
        device = self.target.get_input_embeddings().weight.device
        ids = [torch.tensor([*one.prompt, *one.answer], dtype=torch.long, device="cpu") for one in batch]
        taught = [min(len(one.prompt) - 1, self._prompt_positions) for one in batch]
        first = min(
            len(one.prompt) - 1 - rows for one, rows in zip(batch, taught, strict=True)
        )  # whose logits are read
        inputs = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        how = {} if self._layers is None else {"output_hidden_states": self._layers}
        if "logits_to_keep" in forward_parameters(self.target):
            how["logits_to_keep"] = inputs.shape[1] - first
        output = self.target(input_ids=inputs, use_cache=False, **how)
        logits = output.logits[:, first - inputs.shape[1] :]
        return [
            self._feedback(one, tokens, logits[i], first, rows, self._states(output, i, len(tokens), len(one.prompt)))
            for i, (one, tokens, rows) in enumerate(zip(batch, ids, taught, strict=True))
        ]

    def _feedback(
        self, one: Served, tokens: Tensor, logits: Tensor, first: int, taught: int, states: TargetStates | None
    ) -> Feedback:
        """Make an answer's feedback. Row i of `logits` is of the position `first` + i, and predicts the token after it."""
        begin = len(one.prompt) - 1 - first
        rows = self._rows(logits[begin - taught : begin + len(one.answer)])
        whole = Feedback.from_target(
            tokens,
            len(one.prompt),
            rows.select(list(range(taught, len(rows)))),
            prompt_rows=rows.select(list(range(taught))) if taught else None,
            sampled=one.sampled,
            states=states,
        )
        return self._seen.only_new(whole, self._prompt_positions)

    def _rows(self, logits: Tensor) -> SparseLogits:
        parts = logits.split(_ROWS_AT_ONCE)
        return SparseLogits.cat([SparseLogits.from_logits(p.float(), self._top_k, self._dtype).cpu() for p in parts])

    def _states(self, output, i: int, length: int, prompt_length: int) -> TargetStates | None:
        """Keep the states of a prompt's end, as many as teach, and of the answer but for its last token, as serving does."""
        if self._layers is None:
            return None
        start = max(prompt_length - self._prompt_positions - 2, 0)
        parts = [output.hidden_states[layer][i, start : length - 1].cpu() for layer in self._layers]
        return TargetStates.from_states(torch.cat(parts, -1), len(self._layers), start)


def _batches(answers: Sequence[Served]) -> Iterator[list[Served]]:
    """Split answers, the shortest first, into batches."""
    batch: list[Served] = []
    for one in answers:
        if batch and (len(one.prompt) + len(one.answer)) * (len(batch) + 1) > _TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch
