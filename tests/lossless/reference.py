"""What should have come out of a call, slow and plain: no cache, one full forward a question."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_osd.feedback.feedback import ACCEPTED, REJECTED, UNTESTED, Feedback


def processors_of(prompt_length: int, eos: Sequence[int] = (), extra=(), **kwargs) -> LogitsProcessorList:
    """The logits processors of a generate call, in generate's order, of those of its kwargs that this suite uses."""
    made = LogitsProcessorList()
    if kwargs.get("repetition_penalty"):
        made.append(RepetitionPenaltyLogitsProcessor(kwargs["repetition_penalty"]))
    if kwargs.get("min_new_tokens") and eos:
        made.append(MinNewTokensLengthLogitsProcessor(prompt_length, kwargs["min_new_tokens"], list(eos)))
    made += extra
    if kwargs.get("do_sample"):
        if kwargs.get("temperature", 1.0) != 1.0:
            made.append(TemperatureLogitsWarper(kwargs["temperature"]))
        if kwargs["top_k"]:
            made.append(TopKLogitsWarper(kwargs["top_k"]))
        if kwargs.get("top_p", 1.0) < 1.0:
            made.append(TopPLogitsWarper(kwargs["top_p"]))
    return made


@torch.no_grad()
def scores_of(model: PreTrainedModel, text: Tensor, start: int, processors=()) -> Tensor:
    """What `model` says of each token of `text` `(L,)` from `start` on, by one forward over all of it: `(L-start, V)`, processed."""
    logits = model(input_ids=text[None], use_cache=False).logits[0, start - 1 : -1].float()
    if not processors:
        return logits
    return torch.cat([processors(text[None, : start + i], row[None].clone()) for i, row in enumerate(logits)])


class Block(NamedTuple):
    """One round: what was drafted, how much of it was accepted, what came out."""

    drafted: list[int]
    accepted: int
    said: list[int]

    @property
    def tested(self) -> int:
        return min(self.accepted + 1, len(self.said), len(self.drafted))

    @property
    def outcomes(self) -> list[int]:
        of_drafts = [ACCEPTED] * self.accepted + [REJECTED] * (self.tested - self.accepted)
        return of_drafts + [UNTESTED] * (len(self.said) - self.tested)


@torch.no_grad()
def speculate(
    draft: PreTrainedModel, prompt: Tensor, answer: list[int], lengths: Sequence[int], end: int, eos, processors
) -> Iterator[Block]:
    """Greedy speculative decoding of a target that says `answer` after `prompt` `(L,)`, with γ of `lengths`, at most `end` tokens."""
    done, wished = 0, chain(lengths, repeat(0))
    while done < len(answer):
        drafted = []
        for _ in range(min(next(wished), end - done - 1)):
            text = torch.cat([prompt, torch.tensor(answer[:done] + drafted, dtype=torch.long)])
            logits = draft(input_ids=text[None], use_cache=False).logits[:, -1].float()
            drafted.append(int((processors(text[None], logits) if processors else logits).argmax()))
            if drafted[-1] in eos:
                break
        said, accepted = [], 0
        for i, token in enumerate(answer[done:]):
            said.append(token)
            if i == len(drafted) or token != drafted[i]:
                break
            accepted += 1
        yield Block(drafted, accepted, said)
        done += len(said)


def blocks_of(feedback: Feedback) -> list[Block]:
    """The rounds that a request's outcomes tell of: each ends where a draft was not accepted, or with the call."""
    blocks, drafted, said = [], [], []
    for token, guess, outcome in zip(
        *map(Tensor.tolist, (feedback.answer, feedback.drafted, feedback.outcome)), strict=True
    ):
        said.append(token)
        drafted += [guess] * (outcome != UNTESTED)
        if outcome != ACCEPTED:
            blocks.append(Block(drafted, len(drafted) - (outcome == REJECTED), said))
            drafted, said = [], []
    return [*blocks, Block(drafted, len(drafted), said)] if said else blocks


@torch.no_grad()
def exact_distribution(target: PreTrainedModel, prompt: Tensor, n: int, eos=(), **kwargs) -> dict[tuple, float]:
    """The probability of each answer of at most n tokens to `prompt` `(1, L)`, by the target's own forwards over all prefixes."""
    processors = processors_of(prompt.shape[1], eos, **kwargs)
    ended, going = {}, {(): 1.0}
    for _ in range(n):
        texts = torch.stack([torch.cat([prompt[0], torch.tensor(prefix, dtype=torch.long)]) for prefix in going])
        scores = target(input_ids=texts, use_cache=False).logits[:, -1].float()
        rows = (processors(texts, scores) if processors else scores).double().softmax(-1).tolist()
        longer = {}
        for (prefix, mass), row in zip(going.items(), rows, strict=True):
            for token, p in enumerate(row):
                if p:
                    (ended if token in eos else longer)[*prefix, token] = mass * p
        going = longer
    return ended | going


def p_value(counts: Counter, probabilities: dict[tuple, float]) -> float:
    """Of Pearson's χ²; cells of which fewer than 5 are expected are one, joined to the next smallest if it is too small itself."""
    calls = sum(counts.values())
    cells = sorted((calls * p, counts[key]) for key, p in probabilities.items())
    pooled = [0.0, 0]
    while len(cells) > 1 and (cells[0][0] < 5 or 0 < pooled[0] < 5):
        expected, seen = cells.pop(0)
        pooled = [pooled[0] + expected, pooled[1] + seen]
    if pooled[0]:
        cells.append(tuple(pooled))
    chi2 = sum((seen - expected) ** 2 / expected for expected, seen in cells)
    half = torch.tensor([(len(cells) - 1) / 2, chi2 / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
