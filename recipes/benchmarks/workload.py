"""`Workload`: the models and requests of a benchmark, and how a request is timed. It knows nothing of ways to draft."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from recipes.common.forwards import Forwards
from recipes.common.models import draft_tokenizers, encode_rows, load_draft, load_target, use_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Requests served before any is measured, to warm up torch's caches and measured costs. They are not measured themselves.
WARM_UP = 2


@dataclass
class Call:
    """One served request, with its times and counts."""

    output: Tensor  # int64 (L,), prompt included
    new: int  # new tokens
    first: int  # new tokens of the first round
    seconds: float
    first_seconds: float  # until the first round's tokens came, the prompt's forward included
    target_forwards: int
    draft_forwards: int = 0
    forward_seconds: float = 0.0  # within forwards of target and watched draft, after the first round
    learn_seconds: float = 0.0


class FirstTokens(BaseStreamer):
    """Notes when the first new tokens came. `generate` puts the prompt first, and then the tokens of each round."""

    def __init__(self, meters: Sequence[Forwards]):
        self._meters, self._puts = meters, 0

    def put(self, value: Tensor):
        self._puts += 1
        if self._puts == 2:
            self.at, self.count = time.perf_counter(), value.numel()
            self.forward_seconds = sum(meter.seconds for meter in self._meters)

    def end(self):
        pass


class Workload:
    """Loads target, draft and requests that the flags name, and times requests.

    Args:
        args (`BenchmarkArguments`): the flags.
        seed (`int`, *optional*): seeds the split into held-back prompts, and sampling.
        least: smallest number of requests to load, if `args.requests` is less.

    Raises:
        ValueError: if the stream has too few prompts.
    """

    def __init__(self, args, seed: int | None, least: int = 1):
        use_threads(args.threads)
        self.max_new_tokens, self.sample, self.seed = args.max_new_tokens, args.sample, seed or 0
        self.wait_for_forwards = False
        self.target, self.tokenizer = load_target(args.target, args.dtype)
        self._load_requests(args, max(args.requests, least))
        # Only `methods` serves drafts of another vocabulary, which `generate` needs tokenizers for.
        self.draft: PreTrainedModel = load_draft(args.draft, self.target, any_vocabulary=args.what == "methods")
        self.tokenizers = draft_tokenizers(args.draft, self.draft, self.target, self.tokenizer)

    def _load_requests(self, args, count: int):
        from recipes.common.prompts import load_stream, split_held_back

        if args.warm > args.skip:
            raise ValueError(
                f"`warm` is {args.warm} and `skip` {args.skip}: the warm requests are the ones just before those measured; raise --skip to "
                "at least as many."
            )
        self.name, rows = load_stream(args.stream, self.seed)
        held, rest = split_held_back(rows, args.held_back, self.seed, self.name) if args.held_back else (rows, [])
        first = args.skip - args.warm
        self.warm = self._encode(args, held[first : args.skip])
        found = self._encode(args, held[args.skip :])
        self.requests = found[:count]
        # Never a measured request, whose answer a cache would then know.
        others = [*self._encode(args, held[:first]), *self._encode(args, rest[: 4 * WARM_UP])]
        self.warm_up = [*found[count:], *others][:WARM_UP]
        if len(self.requests) < count or len(self.warm_up) < WARM_UP:
            raise ValueError(
                f"{self.name} has {len(rows)} prompts, {len(found)} of them to measure with --held_back {args.held_back} and --skip "
                f"{args.skip}: too few for {count} and {WARM_UP} others to warm up. Lower --requests, --skip or --warm, or give more prompts."
            )

    def _encode(self, args, rows: list[dict]) -> list[dict]:
        return encode_rows(self.target, self.tokenizer, self.name, rows, self.max_new_tokens, args.chat_template)[0]

    def generate(self, request: dict, watch: nn.Module | None = None, **kwargs) -> Call:
        """Serve one request by `target.generate(**kwargs)`, timed; the forwards of the draft `watch` are counted and timed too."""
        input_ids = request["ids"][None].to(self.target.device)
        mask = torch.ones_like(input_ids)
        if self.sample:
            torch.manual_seed(self.seed)  # the same draws for every method
        with contextlib.ExitStack() as open_meters:
            models = [self.target] if watch is None else [self.target, watch]
            meters = [open_meters.enter_context(Forwards(model, self.wait_for_forwards)) for model in models]
            first = FirstTokens(meters)
            start = time.perf_counter()
            output = self.target.generate(
                input_ids=input_ids,
                attention_mask=mask,
                max_new_tokens=self.max_new_tokens,
                do_sample=self.sample,
                streamer=first,
                **kwargs,
            )[0].cpu()  # waits for the device
            seconds = time.perf_counter() - start
        return Call(
            output,
            new=len(output) - input_ids.shape[1],
            first=first.count,
            seconds=seconds,
            first_seconds=first.at - start,
            target_forwards=meters[0].count,
            draft_forwards=sum(meter.count for meter in meters[1:]),
            forward_seconds=sum(meter.seconds for meter in meters) - first.forward_seconds,
        )
