"""Compares ways to decode in one process: every method serves each request in turn, so that whatever slows the machine slows all of them alike.

A `Method` is a way to decode the requests of a `Workload`, `Contest` runs several, and `figures_of` computes their figures.
"""

from __future__ import annotations

import copy
import gc
import logging
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from hf_osd import OnlineAssistant, OnlineConfig, compare_outputs
from hf_osd.metrics.stats import CallStats
from recipes.benchmarks.workload import Call, Workload
from recipes.common.command import numbers_of
from recipes.common.figures import or_none, rate_interval, spread
from recipes.common.memory import peak_rss_mb
from recipes.common.models import load_draft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.policy.costs import Costs

logger = logging.getLogger("hf_osd.recipes.methods")

ONLINE = {  # what each changes in the config of the flags
    "online": {},
    "online-no-cache": {"suffix_cache": False},
    "online-full-head": {"draft_head": "full"},
    "online-low-rank": {"draft_head": "low_rank"},
    "before": {},
    "cache": {"suffix_cache": True, "learn": "off"},
    "useless": {},
}
METHODS = ("plain", "assisted", "assisted-default", "prompt_lookup", *ONLINE)
CACHE = "cache"  # what every other online method is compared with for its gain of learning

# Requests on which the setting of a stock method is chosen. They are measured too, so the choice can only flatter the method.
_TRIED = 4
# v(1)..v(8) are reported.
_V = 8


class Method:
    """Decodes with `target.generate(**kwargs)`; without `kwargs` this is plain decoding.

    Args:
        facts: the method's settings, for the JSON.
    """

    assistant: OnlineAssistant | None = None

    def __init__(self, facts: dict | None = None, **kwargs):
        self.facts, self.kwargs = facts or {}, kwargs

    def reset(self):
        """Begin anew, as if nothing had been served."""

    def serve(self, work: Workload, request: dict) -> Call:
        """Decode one request, timed."""
        return work.generate(request, **self.kwargs)


class Assisted(Method):
    """Decodes with transformers' own assisted generation.

    Args:
        draft: the draft.
        gamma (`int`, *optional*): tokens drafted in every round; if left out, the draft's generation config decides.
    """

    def __init__(self, draft: PreTrainedModel, gamma: int | None = None):
        super().__init__({} if gamma is None else {"gamma": gamma}, assistant_model=draft)
        self._draft, self._settings = draft, copy.deepcopy(draft.generation_config)
        if gamma is not None:
            self._settings.num_assistant_tokens = gamma
            self._settings.num_assistant_tokens_schedule = "constant"
            self._settings.assistant_confidence_threshold = 0.0
        self.reset()

    def reset(self):
        self._current = copy.deepcopy(self._settings)  # transformers' schedule changes it

    def serve(self, work: Workload, request: dict) -> Call:
        own, self._draft.generation_config = self._draft.generation_config, self._current
        try:
            return work.generate(request, watch=self._draft, **self.kwargs, **work.tokenizers)
        finally:
            self._draft.generation_config = own


class Online(Method):
    """Decodes with an [`OnlineAssistant`], which collects its calls, and learns, between requests.

    Args:
        draft: the draft; `None` leaves drafting to the suffix cache.
        config: the assistant's.
        watch (`bool`): also time the draft's forwards; they are counted in any case.
    """

    def __init__(self, draft: PreTrainedModel | None, config: OnlineConfig, watch: bool = False):
        super().__init__()
        self._draft, self._config, self._watch = draft, config, watch

    @property
    def learns(self) -> bool:
        """Tell whether the assistant learns between requests, in this thread."""
        return self._draft is not None and self._config.learn == "inline"

    def reset(self):
        """Begin with an assistant of its own, whose suffix cache is empty: no method finds in it what another one has served."""
        self.close()
        self.assistant = OnlineAssistant(self._draft, self._config)

    def close(self):
        """End what learns beside the assistant, if anything does."""
        if self.assistant is not None:
            self.assistant.close()

    def serve(self, work: Workload, request: dict) -> Call:
        # Views of the serving draft with a partial head share its hooks.
        watched = self.assistant.serving.active if self._watch else None
        tokenizers = {} if self._draft is None else work.tokenizers  # without a draft there is only one vocabulary
        call = work.generate(request, watch=watched, assistant_model=self.assistant, **tokenizers)
        start = time.perf_counter()
        self.assistant.update()
        call.learn_seconds = time.perf_counter() - start
        call.draft_forwards = self.assistant.stats.last.draft_steps
        return call


@dataclass
class Run:
    """The calls of one method in one repeat, and its assistant's statistics of them."""

    calls: list[Call] = field(default_factory=list)
    stats: CallStats | None = None
    updates: int = 0
    costs: Costs | None = None
    regret: float | None = None  # regret_vs_static

    def sum(self, name: str) -> float:
        """Add up a field of all calls."""
        return sum(getattr(call, name) for call in self.calls)

    @property
    def rate(self) -> float:
        """New tokens a second."""
        return self.sum("new") / self.sum("seconds")

    @property
    def rate_with_learning(self) -> float:
        """New tokens a second of serving and learning together."""
        return self.sum("new") / (self.sum("seconds") + self.sum("learn_seconds"))

    @property
    def decode_rate(self) -> float | None:
        """New tokens a second after each request's first round, which includes the prompt; `None` if no request had another round."""
        tokens, seconds = self.sum("new") - self.sum("first"), self.sum("seconds") - self.sum("first_seconds")
        return tokens / seconds if tokens and seconds else None

    @property
    def ideal_speedup(self) -> float:
        """New tokens over Σ of the rounds' (draft steps · c + v(tokens verified)), with c and v as measured while serving.

        With a fixed γ this is `ideal_speedup` of docs/figures.md, (1 + Σ_j Π_{i≤j} a_i) / (γ·c + v(γ+1)): numerator and denominator are means over the
        rounds.
        """
        lengths = self.stats.verified_lengths
        v = self.costs.v_upto(max(lengths))
        time = self.stats.draft_steps * (self.costs.c or 0.0) + sum(n * v[length - 1] for length, n in lengths.items())
        return self.stats.new_tokens / time


class Contest:
    """Runs several methods on the same requests."""

    def __init__(self, args, config: OnlineConfig):
        self.names = names_of(args.methods)
        self.args, self.config = args, config
        self.work = Workload(args, config.seed)
        if args.sample and self.work.tokenizers and any(name.startswith("assisted") for name in self.names):
            raise ValueError(
                f"`methods` is {args.methods!r} and `sample` is set: with a draft of another vocabulary transformers' sampled assisted generation replaces "
                "the head for good. Leave out assisted and assisted-default, or --sample."
            )
        self._methods = {name: self._make(name) for name in self.names}

    def run(self) -> dict[str, dict]:
        """Run all repeats; returns figures by method."""
        work, repeats = self.work, []
        for repeat in range(self.args.repeats):
            gc.collect()  # frees the last repeat's assistants now, and not within a timed call
            runs = {name: self._warmed_up(method, repeat) for name, method in self._methods.items()}
            for i, request in enumerate(work.requests):
                turn = (repeat + i) % len(self.names)
                for name in [*self.names[turn:], *self.names[:turn]]:
                    runs[name].calls.append(self._methods[name].serve(work, request))
            for name, method in self._methods.items():
                if method.assistant is not None:
                    stats = method.assistant.stats
                    runs[name].stats = difference(stats.total, runs[name].stats)
                    runs[name].updates = stats.updates - runs[name].updates
                    runs[name].regret = stats.regret_vs_static
            repeats.append(runs)
            logger.info("Repeat %d of %d is done.", repeat + 1, self.args.repeats)
        for method in self._methods.values():
            if isinstance(method, Online):
                method.close()
        found = {}
        for name, method in self._methods.items():
            plain = [runs["plain"] for runs in repeats] if "plain" in self.names else None
            found[name] = method.facts | figures_of([runs[name] for runs in repeats], plain)
            found[name] |= dict.fromkeys(GAIN)
            if isinstance(method, Online) and name != CACHE:
                found[name] |= gain_of(
                    [runs[name] for runs in repeats], [runs[CACHE] for runs in repeats], method.learns
                )
            found[name] |= self._parity(repeats[0][name], plain[0] if plain else None)
            found[name]["peak_rss_mb"] = peak_rss_mb()
        return found

    def _warmed_up(self, method: Method, repeat: int) -> Run:
        """Begin a repeat: reset the method and serve the warm-up requests, untimed. Methods without an assistant do that before the first repeat alone."""
        method.reset()
        if method.assistant is None:
            for request in () if repeat else self.work.warm_up:
                method.serve(self.work, request)
            return Run()
        for request in (*self.work.warm_up, *self.work.warm):
            method.serve(self.work, request)
        stats = method.assistant.stats
        return Run([], copy.deepcopy(stats.total), stats.updates, method.assistant.lookahead.costs)

    def _parity(self, run: Run, plain: Run | None) -> dict:
        """Compare the greedy outputs with plain decoding's."""
        if plain is None or self.args.sample:
            return {"identical_share": None, "near_ties": None, "mismatches": None}
        pairs = zip(plain.calls, run.calls, strict=True)
        verdicts = [
            compare_outputs(self.work.target, one.output, other.output, prompt_length=len(one.output) - one.new)
            for one, other in pairs
        ]
        return {
            "identical_share": verdicts.count("identical") / len(verdicts),
            "near_ties": verdicts.count("near_tie"),
            "mismatches": verdicts.count("mismatch"),
        }

    def _make(self, name: str) -> Method:
        """Make the method of this name; stock methods get their fastest setting."""
        draft = self.work.draft
        if name == "plain":
            return Method()
        if name == "assisted":
            return self._fastest({gamma: Assisted(draft, gamma) for gamma in numbers_of(self.args.gammas, "gammas")})
        if name == "assisted-default":
            return Assisted(draft)
        if name == "prompt_lookup":
            lookups = numbers_of(self.args.lookups, "lookups")
            return self._fastest({n: Method({"lookup": n}, prompt_lookup_num_tokens=n) for n in lookups})
        config = OnlineConfig.from_dict({**self.config.to_dict(), **ONLINE[name]})
        own = {
            "before": lambda: load_draft(self.args.before, self.work.target),
            "cache": lambda: None,
            "useless": lambda: random_draft(draft, self.work.seed),
        }
        return Online(own.get(name, lambda: draft)(), config)

    def _fastest(self, methods: dict[int, Method]) -> Method:
        """Choose the method that is fastest on the first requests, served in turn."""
        seconds = dict.fromkeys(methods, 0.0)
        for i, request in enumerate([self.work.warm_up[0], *self.work.requests[:_TRIED]]):
            for value in list(methods)[i % len(methods) :] + list(methods)[: i % len(methods)]:
                call = methods[value].serve(self.work, request)
                seconds[value] += call.seconds / call.new if i else 0.0  # the first warms up
        return methods[min(seconds, key=seconds.get)]


def figures_of(runs: list[Run], plain: list[Run] | None) -> dict:
    """Compute a method's figures: medians over its repeats, and counts of the first one.

    Args:
        runs: the method's, one for each repeat.
        plain: plain decoding's of the same repeats, for speed-ups.
    """
    first, medians = runs[0], statistics.median
    figures = {
        "tokens_per_second": medians(run.rate for run in runs),
        "wall_s": medians(run.sum("seconds") for run in runs),
        "new_tokens": first.sum("new"),
        "tokens_per_round": first.sum("new") / first.sum("target_forwards"),
        "target_forwards": first.sum("target_forwards"),
        "draft_forwards": first.sum("draft_forwards"),
        "prefill_s": medians(run.sum("first_seconds") for run in runs),
        "speedup_vs_plain": None,
        "speedup_decode_only": None,
    }
    # Ratios of rates, not of seconds: sampled outputs differ in length.
    decode_only = None
    if plain is not None:
        figures["speedup_vs_plain"] = spread([run.rate / base.rate for run, base in zip(runs, plain, strict=True)])
        if all(run.decode_rate for run in (*runs, *plain)):
            decode_only = [run.decode_rate / base.decode_rate for run, base in zip(runs, plain, strict=True)]
            figures["speedup_decode_only"] = spread(decode_only)
    names = ("alpha", "alpha_live", "c", "v", "ideal_speedup", "share_of_ideal", "drafted_by", "accepted_by")
    figures |= dict.fromkeys(
        (*names, "head_coverage", "head_alpha_loss", "round_ms", "learn_s", "updates", "regret_vs_static")
    )
    if first.stats is None:
        return figures
    total = CallStats()
    for run in runs:
        total.add(run.stats)
    for name in ("alpha", "alpha_live", "head_coverage", "head_alpha_loss"):
        figures[name] = or_none(getattr(total, name))
    for name in ("drafted_by", "accepted_by"):
        figures[name] = {source: getattr(first.stats, name)[source] for source in ("draft", "cache")}
    known = [run.costs.c for run in runs if run.costs.c is not None]
    heights = zip(*(run.costs.v_upto(_V) for run in runs), strict=True)
    ideal = [run.ideal_speedup for run in runs]
    figures |= {
        "c": medians(known) if known else None,
        "v": {str(n): medians(height) for n, height in enumerate(heights, 1)},
        "ideal_speedup": medians(ideal),
        "round_ms": {part: medians(round_ms(run)[part] for run in runs) for part in round_ms(first)},
        "learn_s": medians(run.sum("learn_seconds") for run in runs),
        "updates": first.updates,
        "regret_vs_static": first.regret,
    }
    if decode_only is not None:
        figures["share_of_ideal"] = medians(speed / most for speed, most in zip(decode_only, ideal, strict=True))
    return figures


GAIN = ("gain_of_learning", "gain_of_learning_interval", "gain_of_learning_end_to_end")


def gain_of(runs: list[Run], cache: list[Run], learns: bool) -> dict:
    """Compute what a method's draft earns beside the suffix cache: its tokens a second over those of the cache alone.

    Args:
        runs: the method's, one for each repeat.
        cache: those of the method `cache` in the same repeats, on the same requests.
        learns: whether the method learns between its requests, so that its seconds of learning are to be counted too.
    """
    pairs = list(zip(runs, cache, strict=True))
    requests = [
        (one.new, one.seconds, other.new, other.seconds)
        for run, base in pairs
        for one, other in zip(run.calls, base.calls, strict=True)
    ]
    count = len(runs[0].calls)
    # A request's repeats belong together: they are drawn together.
    summed = [tuple(map(sum, zip(*requests[i::count], strict=True))) for i in range(count)]
    end_to_end = spread([run.rate_with_learning / base.rate for run, base in pairs]) if learns else None
    return {
        "gain_of_learning": spread([run.rate / base.rate for run, base in pairs]),
        "gain_of_learning_interval": rate_interval(summed),
        "gain_of_learning_end_to_end": end_to_end,
    }


def round_ms(run: Run) -> dict[str, float]:
    """Split the milliseconds of a round, prompts' forwards included; `python` is the remainder, mostly generate's own loop."""
    parts = {name: getattr(run.stats, f"{name}_seconds") for name in ("draft", "target", "lookup", "capture")}
    parts["python"] = run.sum("seconds") - sum(parts.values())
    return {name: 1e3 * seconds / run.stats.rounds for name, seconds in parts.items()}


def difference(after: CallStats, before: CallStats) -> CallStats:
    """Subtract statistics: those of the calls between two moments."""
    found = CallStats()
    for name, value in vars(after).items():
        base = getattr(before, name)
        setattr(found, name, Counter(value - base) if isinstance(value, Counter) else value - base)
    return found


def random_draft(draft: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Make a draft of the same class and config with random weights, embeddings included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = type(draft)(copy.deepcopy(draft.config))
    return made.to(draft.device, draft.dtype).eval()


def names_of(methods: str) -> list[str]:
    """Read the flag `methods`: each name once, in order; beside online methods always `cache`, last if it is not among them.

    Raises:
        ValueError: if a name is unknown, or there is none.
    """
    names = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    if not names or not set(names) <= set(METHODS):
        raise ValueError(f"`methods` is {methods!r}; choose from {', '.join(METHODS)}.")
    return names if CACHE in names or not set(names) & set(ONLINE) else [*names, CACHE]
