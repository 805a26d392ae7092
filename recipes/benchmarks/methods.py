"""Compares ways to decode in one process: every method serves each request in turn, so that whatever slows the machine slows all of them alike.

A `Method` is a way to decode the requests of a `Workload`, `Contest` runs several, and `figures_of` computes their figures.
"""

from __future__ import annotations

import copy
import gc
import logging
import time
from typing import TYPE_CHECKING

import torch

from hf_osd import OnlineAssistant, OnlineConfig, compare_outputs
from hf_osd.drafting.vocab_mapping import VocabMapping
from recipes.benchmarks.runs import GAIN, Run, difference, figures_of, gain_of
from recipes.benchmarks.workload import Call, Workload
from recipes.common.answers import record_fitting, score_by_domain
from recipes.common.command import numbers_of
from recipes.common.memory import peak_rss_mb
from recipes.common.models import load_draft

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
# Prompts that are answered together, to score drafts on the answers.
_BATCH = 8


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
        self.draft, self._config, self._watch = draft, config, watch

    @property
    def learns(self) -> bool:
        """Tell whether the assistant learns between requests, in this thread."""
        return self.draft is not None and self._config.learn == "inline"

    def reset(self):
        """Begin with an assistant of its own, whose suffix cache is empty: no method finds in it what another one has served."""
        self.close()
        self.assistant = OnlineAssistant(self.draft, self._config)

    def close(self):
        """End what learns beside the assistant, if anything does."""
        if self.assistant is not None:
            self.assistant.close()

    def serve(self, work: Workload, request: dict) -> Call:
        # Views of the serving draft with a partial head share its hooks.
        watched = self.assistant.serving.active if self._watch else None
        tokenizers = {} if self.draft is None else work.tokenizers  # without a draft there is only one vocabulary
        call = work.generate(request, watch=watched, assistant_model=self.assistant, **tokenizers)
        start = time.perf_counter()
        self.assistant.update()
        call.learn_seconds = time.perf_counter() - start
        call.draft_forwards = self.assistant.stats.last.draft_steps
        return call


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
        self._alphas: dict[int, list[float | None] | None] = {}  # by the draft's id

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
            found[name] |= dict.fromkeys((*GAIN, "alpha_by_step"))
            if isinstance(method, Online) and name != CACHE:
                found[name]["alpha_by_step"] = self._alpha_by_step(method.draft)
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

    def _alpha_by_step(self, draft: PreTrainedModel) -> list[float | None] | None:
        """Score a draft, as it came, on the target's greedy answers to the measured requests."""
        if id(draft) not in self._alphas:
            work, args = self.work, self.args
            assistant = OnlineAssistant(draft, OnlineConfig.from_dict({**self.config.to_dict(), "learn": "off"}))
            mapping = VocabMapping.from_models(work.target, draft, **work.tokenizers)
            prompts = [request["ids"] for request in work.requests]
            sizes = args.max_new_tokens, _BATCH
            answers = record_fitting(
                work.target, assistant, mapping, prompts, *sizes, "answers to score on", show=False
            )
            self._alphas[id(draft)] = score_by_domain(assistant, {work.name: answers})[work.name]
        return self._alphas[id(draft)]

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
