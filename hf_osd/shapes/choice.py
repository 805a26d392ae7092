"""`choose_shape` chooses the draft that makes a target fastest on this machine, out of several shapes.

Latency decides, and quality buys less than depth costs (Decoding Speculative Decoding, arXiv 2402.01528): so each shape has its c measured here, and its α after a short
distillation on the target's own answers, and the policy's formula weighs the two. Distillation is by successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943):
a little of all shapes, more of the better half, and so on.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from hf_osd.config import OnlineConfig
from hf_osd.learning.memory import BUDGET_SHARE, available, size
from hf_osd.models.draft_head import DraftHead, default_size
from hf_osd.models.properties import reads_states
from hf_osd.policy.lookahead import best_length, ideal_speedup
from hf_osd.shapes.answers import HELD_BACK
from hf_osd.shapes.shape import SIZES, Shape, default_shapes, sizes_of
from hf_osd.shapes.step_costs import Variant, measure_costs
from hf_osd.shapes.trial import Trial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.feedback.feedback import Feedback
    from hf_osd.policy.costs import Costs

logger = logging.getLogger(__name__)

# Requests that all shapes learn in turn before the clock is asked again.
_CHUNK = 8


@dataclass(frozen=True)
class Row:
    """Holds the figures of one shape with one draft vocabulary.

    Args:
        shape (`str`), kind (`str`), layers (`list[int]`): see [`Shape`].
        draft_vocab_size (`int`, *optional*): rows of the LM head that it computes; `None` for all.
        parameters (`int`): weights that learn.
        c, read (`float`): the time of a draft step, and of a round's first forward, in one-token target steps.
        acceptance (`list[float]`): expected acceptance of the first tokens of a block, those before being right; the first is α.
        gamma (`int`): the number of drafted tokens that is best; 0 if drafting does not pay.
        speedup (`float`): expected, over plain decoding; 1 if it does not pay.
        value (`float`): the same of the best γ from 1 on, by which rows are sorted.
        learnt (`int`): requests that it has learnt, each time that one was.
        seconds (`float`): that its distillation and scoring took, all draft vocabularies together.
    """

    shape: str
    kind: str
    layers: list[int]
    draft_vocab_size: int | None
    parameters: int
    c: float
    read: float
    acceptance: list[float]
    gamma: int
    speedup: float
    value: float
    learnt: int
    seconds: float


@dataclass(frozen=True)
class Choice:
    """Holds the draft that was chosen, and what it was chosen from.

    Args:
        draft (`PreTrainedModel`): the draft, with what it has learnt.
        config (`OnlineConfig`): with the draft vocabulary it was chosen with.
        rows (`list[Row]`): all shapes with all their draft vocabularies, those distilled longest first, then by speed-up; the first is the chosen one.
        left_out (`dict[str, str]`): shapes that were not tried or failed, and why.
        verify (`dict[int, float]`): v(n) of the target by n.
        step_seconds (`float`): of a one-token target step.
        answers, held_back (`int`): answers that were learnt, and that drafts were scored on.
        seconds (`float`): in all.
    """

    draft: PreTrainedModel
    config: OnlineConfig
    rows: list[Row]
    left_out: dict[str, str]
    verify: dict[int, float]
    step_seconds: float
    answers: int
    held_back: int
    seconds: float
    facts: dict = field(default_factory=dict)

    @property
    def row(self) -> Row:
        """Return the row of the chosen draft."""
        return self.rows[0]

    def to_dict(self) -> dict:
        """Return all but draft and config, as JSON has it."""
        names = ("left_out", "verify", "step_seconds", "answers", "held_back", "seconds")
        return (
            {"rows": [asdict(row) for row in self.rows]} | {name: getattr(self, name) for name in names} | self.facts
        )

    def summary(self) -> str:
        """Describe the choice in a sentence or two."""
        row, v = self.row, ", ".join(f"v({n}) = {value:.2f}" for n, value in self.verify.items())
        head = "all rows of its head" if row.draft_vocab_size is None else f"{row.draft_vocab_size:,} rows of its head"
        pays = (
            f"expected speed-up {row.speedup:.2f} with {row.gamma} drafted tokens"
            if row.gamma
            else "no shape pays on this machine yet: it serves once it has learnt more"
        )
        return (
            f"{row.shape} with {head}, {row.parameters:,} parameters that learn, distilled on {self.answers} answers ({row.learnt} times one); on {self.held_back} others "
            f"α = {row.acceptance[0]:.2f}; c = {row.c:.3f}, {v}; {pays}. Chosen in {self.seconds:.0f} s."
        )

    def table(self) -> str:
        """Write the rows as a Markdown table, the chosen one first."""
        names = ("shape", "head rows", "parameters", "c", "read", "α by token", "γ", "speed-up", "learnt", "seconds")
        lines = [
            (
                row.shape,
                "all" if row.draft_vocab_size is None else f"{row.draft_vocab_size:,}",
                f"{row.parameters / 1e6:.1f}M",
                f"{row.c:.3f}",
                f"{row.read:.3f}",
                " ".join(f"{a:.2f}" for a in row.acceptance),
                str(row.gamma),
                f"{row.value:.2f}",
                str(row.learnt),
                f"{row.seconds:.0f}",
            )
            for row in self.rows
        ]
        cells = [names, ["---"] * len(names), *lines]
        return "\n".join(f"| {' | '.join(one)} |" for one in cells)


def choose_shape(
    target: PreTrainedModel,
    feedback: Sequence[Feedback],
    candidates: Sequence[Shape] | None = None,
    *,
    sizes: tuple[int, ...] = SIZES,
    config: OnlineConfig | None = None,
    seconds: float | None = None,
    held_back: int | None = None,
    measure: Callable[..., list[Costs]] = measure_costs,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Grow drafts of several shapes, measure and distil them, and return the one with the largest expected speed-up.

    The weights of all shapes that are still in, their gradients and moments are in memory together; the largest ones are left out where that would take more than half of
    what is free.

    Args:
        target (`PreTrainedModel`): a decoder-only causal LM.
        feedback (`Sequence[Feedback]`): its answers, as [`hf_osd.record_answers`] makes them; for a shape that reads states with those after its recorded layers (`states_of`),
            see [`states_to_record`]. The last ones are held back.
        candidates (`Sequence[Shape]`, *optional*): [`default_shapes`] if left out.
        sizes (`tuple[int, ...]`): draft vocabulary sizes to try of each, beside the whole head.
        config (`OnlineConfig`, *optional*): how to learn; γ goes up to its `num_assistant_tokens`.
        seconds (`float`, *optional*): after which no more is learnt; it may be passed by one turn of all shapes. Without it each answer is learnt as often as serving would, with replay.
        held_back (`int`, *optional*): answers to score on; a fifth if left out.
        measure (`Callable`): as [`measure_costs`].
        clock (`Callable[[], float]`): gives seconds.

    Raises:
        ValueError: if there are fewer than two answers, or no shape can be grown, learns within the memory there is, or has a finite loss.
    """
    began, config = clock(), config or OnlineConfig()
    count = max(1, len(feedback) // HELD_BACK) if held_back is None else held_back
    learnt, held = list(feedback[: len(feedback) - count]), list(feedback[len(feedback) - count :])
    if not learnt or not held:
        raise ValueError(
            f"There are {len(feedback)} answers, {count} of them held back; give at least one to learn and one to score on."
        )
    left_out: dict[str, str] = {}
    trials = _grown(target, default_shapes(target) if candidates is None else candidates, config, clock, left_out)
    if not all(one.states is not None for one in feedback):
        trials = _without(
            trials, lambda one: reads_states(one.draft), "the answers come without the target's states", left_out
        )
    trials = _fitting(trials, left_out)
    if not trials:
        raise ValueError(
            f"No draft can be chosen: {'; '.join(f'{name}: {why}' for name, why in left_out.items()) or 'no candidates'}."
        )
    heads = _heads(trials, learnt, sizes)
    variants = [(trial, rows) for trial in trials for rows in sizes_of(trial.draft, sizes)]
    measured = measure(
        target, [Variant(trial.draft, heads[rows]) for trial, rows in variants], held, config.num_assistant_tokens
    )
    costs: dict[Trial, dict[int | None, Costs]] = {}
    for (trial, rows), one in zip(variants, measured, strict=True):
        costs.setdefault(trial, {})[rows] = one

    def rows_of(trial: Trial) -> list[Row]:
        scores = trial.score(held, [heads[rows] for rows in costs[trial]])
        return [
            _row(trial, rows, one, costs[trial][rows], config) for rows, one in zip(costs[trial], scores, strict=True)
        ]

    deadline = None if seconds is None else began + seconds
    ranked = _halve(trials, learnt, rows_of, config, deadline, clock)
    left_out |= {str(one.shape): one.failure for one in trials if one.failure}
    if not ranked:
        raise ValueError("No shape had a finite loss; lower the learning rate, or load the target in float32.")
    best = ranked[0][0]
    rows = [row for _, found in ranked for row in found]
    unit = costs[best][rows[0].draft_vocab_size]
    longest = config.num_assistant_tokens + 1
    return Choice(
        draft=best.draft,
        config=_with_head(config, best.draft, rows[0].draft_vocab_size),
        rows=rows,
        left_out=left_out,
        verify={n: unit.v(n) for n in sorted({n for n in (2, 4, longest) if n <= longest})},
        step_seconds=unit.step_seconds or math.nan,
        answers=len(learnt),
        held_back=len(held),
        seconds=clock() - began,
    )


def states_to_record(target: PreTrainedModel, candidates: Sequence[Shape] | None = None) -> list[int] | None:
    """List the layers whose states `record_answers` is to keep for these shapes; `None` if none of them reads any.

    Raises:
        ValueError: if several shapes read the target's states: one recording cannot serve them all.
    """
    reading = [one for one in (default_shapes(target) if candidates is None else candidates) if one.kind == "feature"]
    if len(reading) > 1:
        raise ValueError(f"The candidates {', '.join(map(str, reading))} read different states; give one of them.")
    try:
        return reading[0].grow(target).config.recorded_layers if reading else None
    except ValueError:  # it will be left out
        return None


def _halve(
    trials: Sequence[Trial],
    learnt: Sequence[Feedback],
    rows_of: Callable[[Trial], list[Row]],
    config: OnlineConfig,
    deadline: float | None,
    clock: Callable[[], float],
) -> list[tuple[Trial, list[Row]]]:
    """Distil all trials for a part of the time, the better half of them for another (and the best of each kind), and so on; all that are in learn the same requests.

    Returns:
        the trials with their rows, best first, those that were in for longest before the others.
    """
    alive, ranked, out = list(trials), [], []
    rungs = max(1, math.ceil(math.log2(len(alive))))
    most = round(config.passes * len(learnt))
    requests, done = _chunks(learnt, config.seed or 0), 0
    for left in range(rungs, 0, -1):
        now, before = clock(), done
        until = math.inf if deadline is None else now + max(deadline - now, 0.0) / left
        goal = most if deadline is not None else math.ceil(most / 2 ** (left - 1))
        while done < goal and (clock() < until or not done):
            chunk = next(requests)[: goal - done]
            for trial in alive:
                trial.learn(chunk)
            alive, done = [one for one in alive if not one.failure], done + len(chunk)
        if done > before:
            ranked = sorted(((one, _sorted(rows_of(one))) for one in alive), key=lambda pair: -pair[1][0].value)
            for one, rows in ranked:
                logger.info("%s: expected speed-up %.3f after %d requests.", one.shape, rows[0].value, one.learnt)
        if left > 1:
            stays = _stay(ranked)
            out = [*(pair for pair in ranked if pair not in stays), *out]
            ranked = stays
        for one, _ in out:
            one.end()
        alive = [one for one, _ in ranked]
    for one in alive:
        one.end()
    return [*ranked, *out]


def _stay(ranked: list[tuple[Trial, list[Row]]]) -> list[tuple[Trial, list[Row]]]:
    """Choose the better half of the trials, and the best of each kind: a new layer begins slower than layers of the target, and overtakes them."""
    half, kinds = ranked[: math.ceil(len(ranked) / 2)], set()
    for pair in ranked:
        if pair[0].shape.kind not in kinds and pair not in half:
            half.append(pair)
        kinds.add(pair[0].shape.kind)
    return half


def _sorted(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: -row.value)


def _chunks(learnt: Sequence[Feedback], seed: int) -> Iterator[list[Feedback]]:
    """Yield the requests in parts, without end, each pass in another order."""
    draws = torch.Generator("cpu").manual_seed(seed)
    while True:
        order = torch.randperm(len(learnt), generator=draws, device="cpu").tolist()
        for begin in range(0, len(order), _CHUNK):
            yield [learnt[i] for i in order[begin : begin + _CHUNK]]


def _row(trial: Trial, rows: int | None, acceptance: list[float], costs: Costs, config: OnlineConfig) -> Row:
    """Weigh acceptance against cost. A round's first forward reads what was verified, and costs more than a step: that is charged with the verification."""
    c, read = costs.c or 0.0, costs.read(1)
    known: list[float] = []
    for one in acceptance:
        known.append(one if math.isfinite(one) else known[-1] if known else 0.0)
    longest = config.num_assistant_tokens
    along = [*known, *[known[-1]] * longest][:longest]
    v = costs.v_upto(longest + 1)

    def time_of(n: int) -> float:
        return v[n - 1] + (max(read - c, 0.0) if n > 1 else 0.0)

    gamma, speedup = best_length(along, c, time_of)
    return Row(
        shape=str(trial.shape),
        kind=trial.shape.kind,
        layers=list(trial.shape.layers),
        draft_vocab_size=rows,
        parameters=trial.parameters,
        c=c,
        read=read,
        acceptance=known,
        gamma=gamma,
        speedup=speedup,
        value=max(ideal_speedup(along, n, c, time_of) for n in range(1, longest + 1)),
        learnt=trial.learnt,
        seconds=trial.seconds,
    )


def _grown(
    target: PreTrainedModel, shapes: Sequence[Shape], config: OnlineConfig, clock: Callable[[], float], left_out: dict
) -> list[Trial]:
    trials = []
    for shape in dict.fromkeys(shapes):
        try:
            trials.append(Trial(shape, shape.grow(target), config, clock))
        except ValueError as error:
            left_out[str(shape)] = str(error)
    return trials


def _without(trials: list[Trial], is_out: Callable[[Trial], bool], why: str, left_out: dict) -> list[Trial]:
    left_out |= {str(one.shape): why for one in trials if is_out(one)}
    return [one for one in trials if not is_out(one)]


def _fitting(trials: list[Trial], left_out: dict) -> list[Trial]:
    """Leave out the largest trials where there is no memory to distil all at once."""
    room = BUDGET_SHARE * available(trials[0].draft.device) if trials else 0.0
    kept, taken, step = [], 0, 0
    for one in sorted(trials, key=lambda trial: trial.parameters):
        stays, passing = one.memory()
        if (needed := taken + stays + max(step, passing)) > room:
            left_out[str(one.shape)] = (
                f"beside the smaller ones there is no memory to distil it: {size(needed)} of {size(room)}"
            )
            continue
        kept.append(one)
        taken, step = taken + stays, max(step, passing)
    return [one for one in trials if one in kept]


def _heads(
    trials: Sequence[Trial], learnt: Sequence[Feedback], sizes: tuple[int, ...]
) -> dict[int | None, DraftHead | None]:
    """Make a draft vocabulary of each size, of the tokens of the answers that are learnt; all drafts have the target's rows."""
    heads: dict[int | None, DraftHead | None] = {None: None}
    for rows in {rows for trial in trials for rows in sizes_of(trial.draft, sizes)} - {None}:
        heads[rows] = DraftHead(trials[0].draft.get_output_embeddings().weight.shape[0], rows)
        for one in learnt:
            heads[rows].observe(one.tokens[: one.prompt_length], one.answer.tolist(), None)
    return heads


def _with_head(config: OnlineConfig, draft: PreTrainedModel, rows: int | None) -> OnlineConfig:
    """Return the config with which the draft computes so many rows of its head."""
    if rows is None:
        return replace(config, draft_head="full", draft_vocab_size=None)
    if DraftHead.from_config(
        draft, replace(config, draft_head="auto", draft_vocab_size=None)
    ) is not None and rows == default_size(draft):
        return replace(config, draft_head="auto", draft_vocab_size=None)
    return replace(config, draft_head="traffic", draft_vocab_size=rows)
