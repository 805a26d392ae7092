"""Soak tests, for what only many calls show: many threads on one assistant while it learns, memory over thousands of requests, and how long a swap of weights
delays a call.

    python -m recipes.checks.soak --what threads --callers 8 --calls 200
    python -m recipes.checks.soak --what memory --requests 5000
    python -m recipes.checks.soak --what flip --refreshes 200

Models are random, and all runs on the CPU. The exit status is 1 if an output is not the target's own, a call fails, or memory grows.
"""

from __future__ import annotations

import copy
import gc
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

from hf_osd import OnlineAssistant, OnlineConfig, compare_outputs
from hf_osd.models.copies import embedding_names
from hf_osd.models.hot_swap import HotSwapDraft
from hf_osd.system.bounds import check_options, choice, number, option, switch, whole
from hf_osd.system.strict_json import write_json
from recipes.common.command import run_command
from recipes.common.models import use_threads
from recipes.common.options import optional_string

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

WHATS = ("threads", "memory", "flip")
# Bounds are small, so that the warm-up fills them: until then memory is meant to grow. The draft drafts whether or not that pays.
DEFAULTS = {
    "learn": "background",
    "lookahead": "constant",
    "num_assistant_tokens": 3,
    "buffer_bytes": 2**20,
    "suffix_cache_bytes": 2**20,
    "seed": 0,
}
_PROMPTS, _PROMPT_TOKENS = 64, 8
_GREEDY = {"do_sample": False, "pad_token_id": 0}


@dataclass
class SoakArguments:
    """What to do, and how long. The fields of `OnlineConfig` are flags too."""

    what: str = option("threads", choice(*WHATS), "Which test to run.")
    callers: int = option(8, whole(1), "threads: how many threads call at once.")
    calls: int = option(200, whole(1), "threads: generate calls of each thread.")
    requests: int = option(5000, whole(2), "memory: generate calls, including the warm-up.")
    warm_up: int = option(1000, whole(1), "memory: calls after which memory must not grow.")
    tolerance: float = option(0.02, number(0), "memory: the relative change that is allowed.")
    layers: int = option(12, whole(1), "flip: layers of the draft; 12 are about 50M parameters.")
    width: int = option(512, whole(1), "flip: its hidden size.")
    refreshes: int = option(100, whole(1), "flip: how many swaps of weights to time.")
    max_new_tokens: int = option(16, whole(2), "Longest answer, in tokens.")
    threads: int | None = option(None, whole(1).or_none(), "CPU threads of torch; all cores if left out.")
    json: str | None = option(None, optional_string(), "Also write the figures to this file.")
    overwrite: bool = option(False, switch(), "Replace the file of --json if there is one.")

    def __post_init__(self):
        check_options(self)
        if self.requests <= self.warm_up:
            raise ValueError(
                f"`requests` is {self.requests}; give a whole number ≥ {self.warm_up + 1}, more than `warm_up`."
            )


def main(argv: list[str] | None = None) -> int:
    """Run the test and print its figures; returns the exit status."""
    return run_command(SoakArguments, run, argv, DEFAULTS)


def run(args: SoakArguments, config: OnlineConfig) -> int:
    use_threads(args.threads)
    figures, fine = {"threads": in_threads, "memory": memory, "flip": flip}[args.what](args, config)
    for name, value in figures.items():
        if not isinstance(value, list):
            print(f"{name:32} {value:.4g}" if isinstance(value, float) else f"{name:32} {value}")
    if args.json is not None:
        write_json(args.json, figures)
    return 0 if fine else 1


def in_threads(args: SoakArguments, config: OnlineConfig) -> tuple[dict, bool]:
    """Call one assistant from several threads while it learns, and compare each output with the target's own."""
    target, draft, prompts = _models()
    asked = {**_GREEDY, "max_new_tokens": args.max_new_tokens}
    plain = [target.generate(prompt, **asked) for prompt in prompts]
    verdicts, errors = Counter(), Counter()

    def call_all(caller: int):
        for i in range(args.calls):
            n = (caller * args.calls + i) % len(prompts)
            try:
                output = target.generate(prompts[n], assistant_model=assistant, **asked)
                verdicts[compare_outputs(target, plain[n], output, prompt_length=prompts[n].shape[1])] += 1
            except Exception as error:  # errors are counted
                errors[f"{type(error).__name__}: {error}"] += 1

    start = time.perf_counter()
    with OnlineAssistant(draft, config) as assistant:
        with ThreadPoolExecutor(args.callers) as pool:
            list(pool.map(call_all, range(args.callers)))
        seconds = time.perf_counter() - start
        stats = assistant.stats
    figures = {
        "callers": args.callers,
        "calls": args.callers * args.calls,
        "taken_in": stats.total.requests,
        "errors": errors.total(),
        **{name: verdicts[name] for name in ("identical", "near_tie", "mismatch")},
        "kinds_of_error": list(errors.items()),
        "seconds": seconds,
        **_learning(stats),
    }
    fine = not errors and not verdicts["mismatch"] and stats.total.requests == figures["calls"]
    return figures, fine


def memory(args: SoakArguments, config: OnlineConfig) -> tuple[dict, bool]:
    """Measure resident memory over many requests, and compare the end with the moment after the warm-up."""
    target, draft, _ = _models()
    random = torch.Generator().manual_seed(1)
    every = max(1, args.warm_up // 2)
    curve: list[tuple[int, float]] = []
    with OnlineAssistant(draft, config) as assistant:
        for done in range(1, args.requests + 1):
            prompt = torch.randint(2, target.config.vocab_size, (1, _PROMPT_TOKENS), generator=random)
            target.generate(prompt, assistant_model=assistant, max_new_tokens=args.max_new_tokens, **_GREEDY)
            if done % every == 0 or done in (args.warm_up, args.requests):
                curve.append((done, _resident_mb()))
                print(f"{done:8} requests {curve[-1][1]:10.1f} MB", flush=True)
        stats = assistant.stats
    after_warm_up = dict(curve)[args.warm_up]
    change = curve[-1][1] / after_warm_up - 1
    figures = {
        "requests": args.requests,
        "mb_after_warm_up": after_warm_up,
        "mb_at_the_end": curve[-1][1],
        "change": change,
        "buffer_bytes": stats.buffer_bytes,
        "suffix_cache_bytes": stats.suffix_cache_bytes,
        **_learning(stats),
        "curve": curve,
    }
    return figures, abs(change) <= args.tolerance


def flip(args: SoakArguments, config: OnlineConfig) -> tuple[dict, bool]:
    """Time swaps of weights, how long each holds the lock, and how long calls that begin meanwhile wait for their draft."""
    draft = _llama(vocab=8192, width=args.width, layers=args.layers, seed=0)
    fixed = embedding_names(draft) if config.freeze_embeddings else set()
    trainable = {name for name, _ in draft.named_parameters()} - fixed
    weights = {name: p.detach().clone() for name, p in draft.named_parameters() if name in trainable}
    serving = HotSwapDraft(draft, trainable)
    serving._lock = lock = _TimedLock()
    stop, alone, beside = threading.Event(), _Waits(serving), _Waits(serving)

    hammer = threading.Thread(target=alone.hammer, args=(stop,))
    hammer.start()
    time.sleep(1.0)  # how long a lease takes when nothing is swapped
    stop.set()
    hammer.join()
    stop.clear()
    hammer = threading.Thread(target=beside.hammer, args=(stop,))
    hammer.start()
    refreshes, flips = [], []
    for _ in range(args.refreshes):
        lock.held = []
        start = time.perf_counter()
        serving.refresh(weights)
        refreshes.append(1e3 * (time.perf_counter() - start))
        flips.append(1e3 * lock.held[-1])
    stop.set()
    hammer.join()
    figures = {
        "million_parameters": sum(p.numel() for p in draft.parameters()) / 1e6,
        "million_that_train": sum(p.numel() for p in weights.values()) / 1e6,
        "refreshes": args.refreshes,
        "refresh_ms": statistics.median(refreshes),
        "longest_refresh_ms": max(refreshes),
        "flip_ms": statistics.median(flips),
        "longest_flip_ms": max(flips),
        "leases_meanwhile": beside.count,
        "longest_lease_ms": 1e3 * beside.longest,
        "leases_alone": alone.count,
        "longest_lease_alone_ms": 1e3 * alone.longest,
    }
    return figures, serving.version == args.refreshes


class _TimedLock:
    """A lock that records how long its creating thread holds it each time, in seconds."""

    def __init__(self):
        self._lock, self._thread = threading.Lock(), threading.get_ident()
        self.held: list[float] = []

    def __enter__(self):
        self._lock.acquire()
        self._since = time.perf_counter()

    def __exit__(self, *exception):
        seconds = time.perf_counter() - self._since
        self._lock.release()
        if threading.get_ident() == self._thread:
            self.held.append(seconds)


class _Waits:
    """Leases a draft over and over, and records the longest time that took."""

    def __init__(self, serving: HotSwapDraft):
        self._serving, self.count, self.longest = serving, 0, 0.0

    def hammer(self, stop: threading.Event):
        while not stop.is_set():
            start = time.perf_counter()
            model = self._serving.lease()
            self.longest = max(self.longest, time.perf_counter() - start)
            self.count += 1
            self._serving.release(model)


def _models() -> tuple[LlamaForCausalLM, LlamaForCausalLM, list[Tensor]]:
    """Make a tiny target, a draft that agrees with it on some tokens, and prompts `(1, L)`."""
    target, random = _llama(vocab=64, width=32, layers=2, seed=0), torch.Generator().manual_seed(0)
    draft = copy.deepcopy(target)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(0.1 * p.std() * torch.randn(p.shape, generator=random))
    prompts = torch.randint(2, 64, (_PROMPTS, 1, _PROMPT_TOKENS), generator=random)
    return target, draft, list(prompts)


def _llama(vocab: int, width: int, layers: int, seed: int) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=512,
        initializer_range=0.3 if width < 128 else 0.02,  # greedy answers of a small model repeat with less
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def _learning(stats) -> dict:
    names = ("updates", "failed_updates", "rejected_updates", "learner_restarts", "draft_version", "learned_tokens")
    return {name: getattr(stats, name) for name in names} | {"alpha": stats.total.alpha}


def _resident_mb() -> float:
    """Measure resident memory, after a garbage collection that releases ended calls."""
    gc.collect()
    return psutil.Process().memory_info().rss / 1e6


if __name__ == "__main__":
    sys.exit(main())
