"""Compares settings of the learner on answers that `recipes/experiments/record.py` has recorded: every arm learns from the same requests.

    python -m recipes.experiments.replay --trace runs/traces/sql --requests 250 --arms "base;learning_rate=3e-3;replay_ratio=6.0,batch_size=4" --seeds 0,1,2

Answers do not depend on the draft, greedy ones word by word and sampled ones by their distribution, so what an arm learns here is what it would have learnt serving.
Only learning is timed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_osd import Feedback, OnlineAssistant, OnlineConfig
from hf_osd.feedback.trace import read_trace
from hf_osd.models.properties import reads_states
from hf_osd.saving.drafts import files_of_checkpoint
from hf_osd.system.bounds import option, switch, whole
from hf_osd.system.output_paths import check_apart
from recipes.common.answers import alpha_by_step
from recipes.common.command import check_learns, check_trace, numbers_of, run_command
from recipes.common.memory import peak_rss_mb
from recipes.common.models import ModelArguments, draft_tokenizers, load_target, shuffled, use_threads
from recipes.common.options import optional_string, string
from recipes.common.row_log import RowLog
from recipes.experiments.arms import Arm, intervals, read_arm
from recipes.experiments.record import again_part
from recipes.experiments.replaying import replay

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("hf_osd.recipes.replay")


@dataclass
class ReplayArguments(ModelArguments):
    """What to learn from, and what to try. The flags of `OnlineConfig` are the base of all arms."""

    trace: str = option("", string(), "Folders made by record.py, with ',' between; learnt one after another.")
    arms: str = option(
        "base",
        string(),
        "Arms with ';' between, each 'field=value,…' to change in the base, or 'base'; see docs/recipes.md.",
    )
    seeds: str = option("0", string(), "Seeds of request order and learning, with ',' between; a run for each.")
    requests: str = option(
        "250", string(), "Requests to learn from: one number for each trace, with ',' between, or one for all."
    )
    mixed: bool = option(
        False, switch(), "Learn from all traces at once, in random order, rather than in turn, as to warm up a draft."
    )
    gradual: bool = option(
        False,
        switch(),
        "Let each trace fade into the next: its share rises to its turn and falls after it, in a straight line.",
    )
    passes: int = option(
        1,
        whole(1),
        "Learn all requests this many times over, in another order each time, as offline distillation does.",
    )
    again: int = option(
        0,
        whole(0),
        "With each request learn so many of the further answers that record.py --again recorded, as a rehearsal would.",
    )
    held_back: int = option(100, whole(1), "Held-back prompts of each trace to score on.")
    also: str = option("", string(), "Further traces to score on without learning from them, with ',' between.")
    score_every: int = option(50, whole(1), "Requests between two scores on held-back prompts.")
    at: str = option(
        "",
        string(),
        "Requests after which to print tables too, with ',' between; '500-1000' compares α after 500 with α after 1000.",
    )
    save_to: str | None = option(
        None, optional_string(), "Also save each run's draft, in '<arm's number>-<seed>' in this folder."
    )
    log: str | None = option(
        None, optional_string(), "Append a row for each run to this JSONL file; runs it already has are not run again."
    )
    overwrite: bool = option(False, switch(), "Replace drafts that are already in --save_to.")

    def __post_init__(self):
        super().__post_init__()
        check_trace(self.trace)
        if self.mixed and self.gradual:
            raise ValueError("`mixed` and `gradual` are both on, and are two orders of the same requests; choose one.")


@dataclass
class Traced:
    """The recording of one domain."""

    name: str
    stream: list[Feedback]
    again: list[tuple[Feedback, ...]]  # further answers to each
    held_back: list[Feedback]
    max_new_tokens: int
    digest: str  # of the files, by which it is told from another recording of that name
    draft_size: int | None = None  # size of its vocabulary, if that is not the target's
    states: str | None = None  # layers of the target whose hidden states are in it, with ',' between
    temperature: float = 0.0  # at which its answers were sampled; 0 for greedy ones


def main(argv: list[str] | None = None) -> int:
    """Learn with each arm and seed, print a line for each and a table at the end; returns the exit status."""
    return run_command(ReplayArguments, measure, argv)


def measure(args: ReplayArguments, base: OnlineConfig):
    """Do every run that the log does not have, and print the table of all arms against the first."""
    arms = [read_arm(arm, base, args.draft) for arm in args.arms.split(";")]
    seeds = numbers_of(args.seeds, "seeds", least=0)
    for arm in arms:
        check_learns(arm.config.learn, f"recipes/experiments/replay.py's arm {arm.label!r}")
    log = RowLog(args.log, ("key", "arm", "seed", "scores"))
    experiment = Experiment(args, top_k=max(arm.config.top_k for arm in arms))
    done = {row["key"]: row for row in log.rows}
    runs = [[(arm, seed, experiment.key(arm, seed), f"{i}-{seed}") for seed in seeds] for i, arm in enumerate(arms)]
    to_save = (
        [Path(args.save_to) / folder for some in runs for _, _, key, folder in some if key not in done]
        if args.save_to
        else []
    )
    for folder in to_save:
        check_apart(
            {"--save_to": folder},
            {"--target": args.target, **{f"the draft of the arm {arm.label!r},": arm.draft_name for arm in arms}},
        )
    if (found := [folder for folder in to_save if files_of_checkpoint(folder)]) and not args.overwrite:
        raise ValueError(
            f"--save_to has a draft already in {found[0]}; choose another folder, or pass --overwrite to replace what is there."
        )
    results: list[list[dict]] = []
    for some in runs:
        results.append([])
        for arm, seed, key, folder in some:
            row = done.get(key)
            if row is None:
                row = {"key": key} | experiment.run(arm, seed, folder)
                log.append(row)
            results[-1].append(row)
            print(_line(row), flush=True)
    print(table(results, args.at))
    if experiment.unsaved is not None:
        raise experiment.unsaved


class Experiment:
    """Shared by all runs: target, traces, and how many requests of each."""

    def __init__(self, args: ReplayArguments, top_k: int):
        use_threads(args.threads)
        self.args = args
        self.target, self.tokenizer = load_target(args.target, args.dtype, args.device)
        self.traces = [
            load_trace(Path(folder), top_k, args.held_back, again=args.again) for folder in args.trace.split(",")
        ]
        also = filter(None, args.also.split(","))
        self.judged = [
            *self.traces,
            *(load_trace(Path(folder), top_k, args.held_back, stream=False) for folder in also),
        ]
        sizes = {traced.draft_size for traced in self.judged}
        if len(sizes) > 1:
            raise ValueError(
                "The traces are in the tokens of several vocabularies; name those that were recorded with one --draft."
            )
        [self.draft_size] = sizes
        counts = numbers_of(args.requests, "requests")
        self.counts = counts * len(self.traces) if len(counts) == 1 else counts
        if len(self.counts) != len(self.traces):
            raise ValueError(
                f"`requests` is {args.requests!r} for {len(self.traces)} traces; give one number, or one for each."
            )
        for traced, count in zip(self.traces, self.counts, strict=True):
            if count > len(traced.stream):
                raise ValueError(
                    f"{traced.name} has {len(traced.stream)} recorded requests and `requests` asks for {count}; record more, or lower it."
                )
        self.total = args.passes * sum(self.counts)
        _spans(args.at, [0, *range(args.score_every, self.total, args.score_every), self.total])
        self.unsaved: OSError | None = None  # why a draft could not be saved
        self._first: dict[tuple, dict] = {}  # scores of drafts before they learn, by draft

    def run(self, arm: Arm, seed: int, folder: str) -> dict:
        """One arm with one seed: α on what is held back every `score_every` requests, of each request before it was learnt, and what learning took."""
        began = time.perf_counter()
        config = dataclasses.replace(arm.config, seed=seed, suffix_cache=False)
        draft = arm.draft(self.target, self.draft_size)
        self._check_states(draft, arm.draft_name)
        tokenizers = draft_tokenizers(arm.draft_name, draft, self.target, self.tokenizer)
        assistant = OnlineAssistant(draft, config)
        kind = (arm.draft_name, config.learner_dtype)
        if kind not in self._first:
            self._first[kind] = self._score(assistant)
        points, peak = {0: self._first[kind]}, peak_rss_mb()
        served, prequential = 0, []
        for requests, again, limit in self._turns(seed):
            for request in replay(assistant, requests, limit, again):
                served += 1
                prequential.append(round(float(request.overlap.nanmean()), 4))
                if served % self.args.score_every == 0 or served == self.total:
                    points[served] = self._score(assistant)
                    means = " ".join(f"{name} {alpha_of(hits):.3f}" for name, hits in points[served].items())
                    logger.info("%s, seed %d: α after %d requests: %s", arm.label, seed, served, means)
        if self.args.save_to is not None:
            tokenizer = tokenizers.get("assistant_tokenizer", self.tokenizer)
            try:
                assistant.save_pretrained(Path(self.args.save_to) / folder, tokenizer)
            except OSError as error:  # the figures of the run are worth their row
                logger.error("%s", error)
                self.unsaved = error
        return {
            "arm": arm.label,
            "seed": seed,
            "traces": [traced.name for traced in self.traces],
            "requests": self.counts,
            "mixed": self.args.mixed,
            "gradual": self.args.gradual,
            "passes": self.args.passes,
            "target": self.args.target,
            "draft": arm.draft_name,
            "dtype": str(draft.dtype).removeprefix("torch."),
            "max_new_tokens": max(traced.max_new_tokens for traced in self.traces),
            "temperature": max(traced.temperature for traced in self.traces),
            "again": self.args.again,
            "scores": {
                traced.name: {str(n): hits[traced.name] for n, hits in points.items()} for traced in self.judged
            },
            "alpha_by_step": {
                traced.name: [round(alpha, 4) for alpha in alpha_by_step(assistant, traced.held_back)]
                for traced in self.judged
            },
            "prequential": prequential,
            **learning_of(assistant, began),
            "peak_rss_mb": [round(peak), round(peak_rss_mb())],
            "shares": [round(share, 4) for share in assistant.learner.student.shares],
            "losses": [round(loss, 4) for loss in assistant.learner.student.losses],
        }

    def _check_states(self, draft: PreTrainedModel, name: str):
        """Raise a ValueError if a draft reads the target's hidden states and they are not in a trace."""
        if not reads_states(draft):
            return
        config = draft.config
        known = [",".join(map(str, layers)) for layers in (config.recorded_layers, config.aux_layers)]
        if wrong := [traced for traced in self.judged if traced.states not in known]:
            raise ValueError(
                f"The draft {name} learns from the target's hidden states after layers {known[0]}, and {wrong[0].name} has {wrong[0].states or 'none'}; record it again "
                f"with --states {known[0]} --overwrite."
            )

    def key(self, arm: Arm, seed: int) -> str:
        """Digest what makes two runs the same run."""
        args = self.args
        facts = [args.target, args.dtype, args.held_back, args.score_every, args.also, arm.facts(), seed]
        facts += [[(traced.name, traced.digest) for traced in self.judged], self.counts, args.mixed, args.again]
        # Left out where they are as they were before there was such a flag: rows of older logs are still found.
        facts += [args.gradual, args.passes] if args.gradual or args.passes > 1 else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def _score(self, assistant: OnlineAssistant) -> dict[str, list]:
        """Count `[accepted, positions]` of each held-back prompt, by domain."""
        return {traced.name: hits_of(assistant, traced.held_back) for traced in self.judged}

    def _turns(self, seed: int) -> Iterator[tuple[list[Feedback], list[tuple[Feedback, ...]], int]]:
        """Yield the requests to learn, in order: for each trace, or for all together, a tuple of requests, further answers to each, and `max_new_tokens`."""
        for again in range(self.args.passes):
            yield from self._turns_of_pass(seed, again)

    def _turns_of_pass(self, seed: int, again: int) -> list[tuple[list[Feedback], list[tuple[Feedback, ...]], int]]:
        chosen = []
        for traced, count in zip(self.traces, self.counts, strict=True):
            pairs = shuffled(list(zip(traced.stream, traced.again, strict=True)), seed)[:count]
            # Each pass has the same requests.
            chosen.append((shuffled(pairs, seed + again) if again else pairs, traced.max_new_tokens))
        if self.args.mixed or self.args.gradual:
            parts, limit = [pairs for pairs, _ in chosen], max(limit for _, limit in chosen)
            if self.args.gradual:
                chosen = [(fading(parts), limit)]
            else:
                chosen = [(shuffled([pair for pairs in parts for pair in pairs], seed + again), limit)]
        return [([request for request, _ in pairs], [again for _, again in pairs], limit) for pairs, limit in chosen]


def fading(parts: list[list]) -> list:
    """Join lists so that each fades into the next, items in their order: the n-th list's share is largest at time n and falls in a straight line to nothing at n - 1 and n + 1."""
    timed = []
    for n, items in enumerate(parts):
        for i, item in enumerate(items):
            share = (i + 0.5) / len(items)  # of the list that has come; its inverse is that of a triangle's area
            timed.append((n + ((2 * share) ** 0.5 - 1 if share < 0.5 else 1 - (2 - 2 * share) ** 0.5), item))
    return [item for _, item in sorted(timed, key=lambda pair: pair[0])]


def learning_of(assistant: OnlineAssistant, began: float) -> dict:
    """Collect the figures of learning for the row of a run that began at `began`, a `time.perf_counter`."""
    stats = assistant.stats
    return {
        "updates": stats.updates,
        "failed": stats.failed_updates,
        "accepted": stats.accepted_updates,
        "dropped": stats.rejected_updates,
        "regret_vs_static": round(stats.regret_vs_static, 5),
        "learning_rate": stats.learning_rate,
        "learning_rate_reason": stats.learning_rate_reason,
        "longest_update": round(stats.longest_update, 2),
        "learned_tokens": stats.learned_tokens,
        "learning_seconds": round(stats.learning_seconds, 2),
        "seconds": round(time.perf_counter() - began, 1),
        "threads": torch.get_num_threads(),
    }


def hits_of(assistant: OnlineAssistant, held_back: list[Feedback]) -> list[list[float]]:
    """Count `[accepted, positions]` of each request with the weights that serve now; of a sampled one, the accepted ones that are expected."""
    return [
        [round(float(hits.nansum()), 3) if request.sampled else int(hits.nansum()), int((~hits.isnan()).sum())]
        for request, hits in zip(held_back, assistant.score(held_back), strict=True)
    ]


def load_trace(folder: Path, top_k: int, held_back: int, stream: bool = True, again: int = 0) -> Traced:
    """Load a domain's trace.

    Args:
        top_k: log-probs to keep of each position to learn from. Of held-back answers all are kept: α is of these.
        held_back: held-back prompts to load.
        stream: whether to load the requests too.
        again: further answers to load with each request.

    Raises:
        OSError: if a part is missing.
        ValueError: if a file is damaged, too few prompts are held back, or not every request has further answers.
    """
    others = [again_part(n) for n in range(again if stream else 0)]
    names = ["held_back", *(["stream"] if stream else []), *others]
    parts: dict[str, list[Feedback]] = {name: [] for name in names}
    limits, sizes, states, temperatures, digest = set(), set(), set(), set(), hashlib.sha256()
    for part in names:
        for path in sorted(folder.glob(f"{part}-*.safetensors")):
            requests, facts = read_trace(path)
            digest.update(path.read_bytes())
            parts[part] += requests if part == "held_back" else [request.truncate(top_k) for request in requests]
            limits.add(int(facts["max_new_tokens"]))
            sizes.add(int(facts["draft_size"]) if "draft_size" in facts else None)
            states.add(facts.get("states"))
            if part not in others:
                temperatures.add(float(facts.get("temperature", 0)))
        if not parts[part]:
            flag = f" --again 0.7 --times {again}" if part in others else ""
            raise FileNotFoundError(
                f"No trace {part}-….safetensors in {folder}; make one with `python -m recipes.experiments.record{flag}`."
            )
    if len(parts["held_back"]) < held_back:
        raise ValueError(
            f"{folder} has {len(parts['held_back'])} prompts held back and `held_back` is {held_back}; lower it."
        )
    if len(sizes) > 1:
        raise ValueError(
            f"{folder} has shards in the tokens of several vocabularies; record them again with one --draft."
        )
    requests = parts.get("stream", [])
    for part in others:
        if [one.prompt_length for one in parts[part]] != [one.prompt_length for one in requests]:
            raise ValueError(
                f"{folder} has {len(requests)} requests and {len(parts[part])} in {part}-…, which do not match; record both with one command."
            )
    return Traced(
        folder.name,
        requests,
        list(zip(*(parts[part] for part in others), strict=True)) if others else [()] * len(requests),
        parts["held_back"][:held_back],
        max(limits),
        digest.hexdigest(),
        sizes.pop(),
        states.pop() if len(states) == 1 else None,
        max(temperatures),
    )


def table(results: list[list[dict]], at: str = "") -> str:
    """Write Markdown tables with a line for each arm: α on each domain's held-back prompts before and after, and the paired difference to the first arm.

    Args:
        results: the rows of each arm's runs, one for each seed.
        at: as the flag `--at`.

    Raises:
        ValueError: if α was not measured at a point that `at` names.
    """
    lines = []
    for name, points in results[0][0]["scores"].items():
        for first, last in [*_spans(at, list(points)), ("0", max(points, key=int))]:
            lines += _table(results, name, first, last)
    if all("prequential" in row for rows in results for row in rows):
        lines += [
            "\n| arm | prequential α, all requests | regret against the best arm, accepted tokens of 100 |",
            "|---|---|---|",
        ]
        means = [statistics.fmean(statistics.fmean(row["prequential"]) for row in rows) for rows in results]
        lines += [
            f"| {rows[0]['arm']} | {mean:.3f} | {100 * (max(means) - mean):.1f} |"
            for rows, mean in zip(results, means, strict=True)
        ]
    return "\n".join(lines)


def _spans(at: str, points: list) -> list[tuple[str, str]]:
    """Read the flag `at` as pairs of points, from which to which a table compares, and check that α is measured there."""
    spans = [span.split("-") if "-" in span else ["0", span] for span in filter(None, map(str.strip, at.split(",")))]
    known = [str(point) for point in points]
    if any(len(span) != 2 or not set(span) <= set(known) for span in spans):
        raise ValueError(f"`at` is {at!r}, and α is measured after {', '.join(known)} requests; see --score_every.")
    return [(first, last) for first, last in spans]


def _table(results: list[list[dict]], name: str, first: str, last: str) -> list[str]:
    lines = [
        f"\nheld back of {name}, {len(results[0][0]['scores'][name][first])} prompts, from {first} to {last} requests, {len(results[0])} seeds",
        "| arm | α before | α after | by seed | gain (95%) | against the first arm (95%) | learning in all, s | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rows in results:
        before, after = ([row["scores"][name][n] for row in rows] for n in (first, last))
        gain, versus = intervals(before, after), intervals([row["scores"][name][last] for row in results[0]], after)
        seconds = [row["learning_seconds"] for row in rows]
        rate = statistics.median(row["learned_tokens"] / max(row["learning_seconds"], 1e-9) for row in rows)
        seeds = " ".join(f"{alpha_of(scores):.3f}" for scores in after)
        lines.append(
            f"| {rows[0]['arm']} | {statistics.fmean(map(alpha_of, before)):.3f} | {statistics.fmean(map(alpha_of, after)):.3f} | {seeds} "
            f"| {gain} | {'' if rows is results[0] else versus} | {statistics.median(seconds):.0f} | {rate:.0f} |"
        )
    return lines


def _line(row: dict) -> str:
    curves = "; ".join(
        f"{name} "
        + " ".join(f"{alpha_of(hits):.3f}" for _, hits in sorted(points.items(), key=lambda item: int(item[0])))
        for name, points in row["scores"].items()
    )
    steps = "; ".join(" ".join(f"{alpha:.3f}" for alpha in steps) for steps in row["alpha_by_step"].values())
    return f"{row['arm']:<40} seed {row['seed']} α {curves}  by step {steps}  ({row['learning_seconds']:.0f} s of learning, {row['seconds']:.0f} in all)"


def alpha_of(hits: list[list[int]]) -> float:
    """Compute α from `[accepted, positions]` of each prompt."""
    return sum(hit for hit, _ in hits) / max(sum(n for _, n in hits), 1)


if __name__ == "__main__":
    sys.exit(main())
