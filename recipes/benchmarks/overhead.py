"""`Overhead`: compares serving and learning with the bare forwards of the models, in the same run."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_osd import OnlineAssistant, OnlineConfig, record_answers
from hf_osd.drafting.context import DraftContext
from hf_osd.feedback.feedback import Feedback
from hf_osd.learning.rate import WEIGHTS
from hf_osd.models.draft_head import DraftHead
from hf_osd.models.draft_vocab import LowRankHead
from hf_osd.models.properties import reads_states
from recipes.benchmarks.methods import Assisted, Method, Online
from recipes.benchmarks.workload import Workload
from recipes.common.figures import spread

HEADS = ("full", "traffic", "low_rank")
# Length of the text after which a draft step is timed.
_HEAD_CONTEXT = 200
_CONTEXTS = (128, 512, 1024, 2048)
# Timed steps of each head, and forwards of each context, in each repeat.
_TIMED = 8


class Overhead:
    """Measures each part interleaved, repeat by repeat."""

    def __init__(self, args, config: OnlineConfig):
        self.args, self.interval = args, config.update_interval
        # With a constant γ every repeat does the same work, whatever the clock says. No update is due by itself.
        fixed = {"lookahead": "constant", "update_interval": 10**9, "seed": config.seed or 0, "learn": True}
        if config.learning_rate == "auto":  # trying several rates is no part of an update
            fixed["learning_rate"] = WEIGHTS[0]
        self.config = OnlineConfig.from_dict({**config.to_dict(), **fixed})
        self.work = Workload(args, config.seed, least=max(self.interval, 2))
        self.target, self.draft = self.work.target, self.work.draft
        self.requests = self.work.requests[: args.requests]
        prompts = [request["ids"] for request in self.work.requests]
        self.answers = record_answers(self.target, prompts, args.max_new_tokens, top_k=config.top_k)
        self.text = torch.cat([answer.tokens for answer in self.answers]).long()

    def measure(self) -> dict:
        """Return the figures of all parts; for a draft that reads the target's states, of capture alone: the bare forwards of the others read token ids."""
        if reads_states(self.draft):
            return {"capture": self.capture()}
        return {
            "capture": self.capture(),
            "learning": self.learning(),
            "head": self.head(),
            "context": self.context(),
            "python_ms": self.python(),
        }

    def capture(self) -> dict:
        """Serve the same requests with and without recording feedback, in turn."""
        on, off = self._online(learn=True), self._online(learn=False)
        for method in (on, off):
            method.serve(self.work, self.work.warm_up[0])
        ratios, shares, splits = [], [], []
        for repeat in range(self.args.repeats):
            seconds = {on: 0.0, off: 0.0}
            before = copy.deepcopy(on.assistant.stats.total)
            for i, request in enumerate(self.requests):
                for method in (on, off) if (repeat + i) % 2 else (off, on):
                    seconds[method] += method.serve(self.work, request).seconds
            total = on.assistant.stats.total
            rounds = total.rounds - before.rounds
            parts = {
                name: getattr(total, f"{name}_seconds") - getattr(before, f"{name}_seconds")
                for name in ("draft", "target", "capture")
            }
            parts["python"] = seconds[on] - sum(parts.values())
            ratios.append(seconds[on] / seconds[off])
            shares.append(parts["capture"] / seconds[on])
            splits.append({name: 1e3 * value / rounds for name, value in parts.items()})
        buffer = on.assistant.buffer
        return {
            "decode_seconds_on_over_off": spread(ratios),
            "capture_share_of_decode": spread(shares),
            "round_ms": {name: statistics.median(split[name] for split in splits) for name in splits[0]},
            "bytes_a_position": buffer.nbytes / buffer.tokens,
            "requests": len(self.requests),
            "repeats": self.args.repeats,
        }

    def learning(self) -> dict:
        """Compare the learner's updates with the bare forward, backward and optimizer step of the same batches, in turn."""
        assistant = OnlineAssistant(self.draft, self.config)
        learner = assistant.learner
        # Before the trainer patches forward: a later copy would run the original's weights.
        bare = copy.deepcopy(learner.student.module)
        trainer = learner.student.trainer
        feedback = self.answers[: self.interval]
        replayed = round(self.config.replay_ratio * len(feedback))
        optimizer = torch.optim.AdamW(
            [p for p in bare.parameters() if p.requires_grad], lr=self.config.learning_rate, fused=True
        )
        ratios, throughput, whole_head, tokens = [], [], [], 0
        for repeat in range(self.args.repeats + 1):
            for item in feedback:
                assistant.buffer.add(item)
            requests = [*feedback, *(feedback[i % len(feedback)] for i in range(replayed))]
            trainer._requests = requests
            batches = list(trainer.get_train_dataloader())
            trainer._requests = None
            timed = {}
            order = ("update", "bare", "whole_head")
            for what in order if repeat % 2 else order[::-1]:
                start = time.perf_counter()
                if what == "update":
                    assistant.flush()
                else:
                    bare.train()
                    for batch in batches:
                        self._bare_step(bare, optimizer, trainer, batch, whole=what == "whole_head")
                timed[what] = time.perf_counter() - start
            tokens = sum(len(batch["rows"]) for batch in batches)
            if repeat:  # the first warms up
                ratios.append(timed["update"] / timed["bare"])
                throughput.append(tokens / timed["update"])
                whole_head.append(timed["whole_head"] / timed["bare"])
        return {
            "update_seconds_over_bare": spread(ratios),
            "learned_tokens_per_second": spread(throughput),
            "whole_head_seconds_over_bare": spread(whole_head),
            "tokens_an_update": tokens,
            "failed_updates": learner.failed,
            "learner_dtype": "float32"
            if learner.student.autocast_dtype is None
            else str(learner.student.autocast_dtype),
        }

    @torch.no_grad()
    def head(self) -> dict:
        """Time a draft step with each head, and measure its α on recorded answers that its choice of rows has not seen.

        A head that the draft cannot have, or that would have as many rows as the whole one, is null.
        """
        length = self._fitting(_HEAD_CONTEXT)
        made = {name: self._head(name, self.answers) for name in HEADS}
        contexts = {
            name: _context(self.draft, self._text(length), head)
            for name, head in made.items()
            if name == "full" or head is not None
        }
        for context in contexts.values():
            context.catch_up(0)
        milliseconds = {name: [] for name in contexts}
        for repeat in range(self.args.repeats):
            for i in range(_TIMED):
                order = list(contexts) if (repeat + i) % 2 else list(contexts)[::-1]
                for name in order:
                    milliseconds[name].append(1e3 * _step(contexts[name]))
        step_ms = dict.fromkeys(HEADS) | {n: statistics.median(ms) for n, ms in milliseconds.items()}
        alphas = {f"alpha_{name}": self._alpha(name) if name in contexts else None for name in HEADS}
        over = {name: step_ms[name] / step_ms["full"] if step_ms[name] else None for name in HEADS[1:]}
        return {"step_ms": step_ms, "step_over_full": over, **alphas, "context": length}

    def context(self) -> list[dict]:
        """Compare a round of constant γ after ever longer texts with the two models' bare forwards of the same sizes.

        The first round, which reads the text, is left out. A round that the length limit cuts short is compared with the forwards of a whole one.
        """
        gamma, method = self.config.num_assistant_tokens, self._online(learn=False)
        found = []
        for length in dict.fromkeys(map(self._fitting, _CONTEXTS)):
            rows: dict[str, list[float]] = {name: [] for name in ("round", "target", "draft")}
            bare = BareForwards(self.target, self.draft, self._text(length), method.assistant.head)
            for repeat in range(self.args.repeats + 1):
                # Another text each time, for on one of them the draft may do badly or the answer end at once.
                call = method.serve(self.work, {"ids": self._text(length, start=17 * repeat)})
                rounds = call.target_forwards - 1
                steps = call.draft_forwards / call.target_forwards
                timed = [(bare.verify(gamma + 1), bare.step()) for _ in range(_TIMED)]
                if not repeat or not rounds:  # the first warms up
                    continue
                rows["round"].append(1e3 * (call.seconds - call.first_seconds) / rounds)
                rows["target"].append(1e3 * statistics.median(verify for verify, _ in timed))
                rows["draft"].append(1e3 * steps * statistics.median(step for _, step in timed))
            row = {f"{name}_ms": statistics.median(values) if values else None for name, values in rows.items()}
            forwards = row["target_ms"] + row["draft_ms"] if rows["round"] else None
            row |= {"forwards_ms": forwards, "round_over_forwards": row["round_ms"] / forwards if forwards else None}
            found.append({"context": length, **row})
        return found

    def python(self) -> dict:
        """Measure a round's time outside the forwards of both models, in plain decoding, assisted generation, and with an OnlineAssistant of the same γ.

        Each request's first round is left out. On an accelerator each forward is waited for.
        """
        work, gamma = self.work, self.config.num_assistant_tokens
        methods = {"plain": Method(), "assisted": Assisted(self.draft, gamma), "online": self._online(learn=False)}
        names, found = list(methods), {name: [] for name in methods}
        work.wait_for_forwards = self.target.device.type != "cpu"
        try:
            for repeat in range(self.args.repeats + 1):
                outside, rounds = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
                for i, request in enumerate(self.requests):
                    turn = (repeat + i) % len(names)
                    for name in [*names[turn:], *names[:turn]]:
                        call = methods[name].serve(work, request)
                        outside[name] += call.seconds - call.first_seconds - call.forward_seconds
                        rounds[name] += call.target_forwards - 1
                for name in names if repeat else ():  # the first warms up
                    if rounds[name]:
                        found[name].append(1e3 * outside[name] / rounds[name])
        finally:
            work.wait_for_forwards = False
        return {name: spread(values) if values else None for name, values in found.items()}

    def _online(self, learn: bool) -> Online:
        config = OnlineConfig.from_dict({**self.config.to_dict(), "learn": learn})
        method = Online(self.draft, config, watch=True)
        method.reset()
        return method

    def _text(self, length: int, start: int = 0) -> Tensor:
        """Return tokens of the recorded texts, int64 `(length,)`, repeated if they are too few."""
        return self.text[torch.arange(start, start + length) % len(self.text)]

    def _fitting(self, length: int) -> int:
        """Limit `length` to what the windows of both models leave beside an answer."""
        windows = [
            getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
            for model in (self.target, self.draft)
        ]
        room = self.args.max_new_tokens + self.config.num_assistant_tokens + 1
        return max(min([length, *(window - room for window in windows if window)]), 1)

    def _head(self, name: str, seen: list[Feedback]) -> DraftHead | None:
        """Make the head of an assistant that has served `seen`; `None` stands for the draft's own."""
        head = DraftHead.from_config(self.draft, OnlineConfig.from_dict({**self.config.to_dict(), "draft_head": name}))
        if head is None:
            return None
        for answer in seen:
            likely = answer.top_ids.flatten(), answer.top_logps.flatten().float().exp()
            head.observe(answer.tokens[: answer.prompt_length], answer.answer.tolist(), likely)
        if name == "low_rank":
            # Its projection is made once it has seen enough hidden states, so it reads the texts as often as needed.
            while not isinstance((view := head.view(self.draft, seen[0].tokens.long()))[0], LowRankHead):
                for answer in seen:
                    view[1](input_ids=answer.tokens.long()[None].to(self.draft.device), use_cache=False)
        return head

    def _alpha(self, name: str) -> float:
        """Measure how often the draft's likeliest token is the target's, on each answer with a head that has seen the other answers only."""
        hits: list[bool] = []
        # Fitting the low-rank projection takes seconds, so it is fitted twice, on one half of the answers each, and measured on the other.
        parts = [slice(half, None, 2) for half in range(2)] if name == "low_rank" else None
        heads = {half: self._head(name, self.answers[part]) for half, part in enumerate(parts or ())}
        for i, answer in enumerate(self.answers):
            others = [*self.answers[:i], *self.answers[i + 1 :]]
            head = heads[1 - i % 2] if parts else self._head(name, others)
            context = _context(self.draft, answer.tokens[: answer.prompt_length].long(), head)
            for token in answer.answer.tolist():
                hits.append(int(context.catch_up(0).likeliest()) == token)
                context.extend(torch.tensor([[token]]), [1])
                if context.head is not None:
                    context.head.add([token])
        return sum(hits) / len(hits)

    def _bare_step(self, model, optimizer, trainer, batch: dict, whole: bool):
        """Do forward, loss, backward and step, with the columns of the head that the trainer computes or, if `whole`, all of them."""
        batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        loss = trainer.compute_loss(model, batch, return_outputs=whole)
        (loss[0] if whole else loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


class BareForwards:
    """Times forwards of target and draft after a text `(L,)`, with nothing around them. Each leaves the caches as they were.

    Args:
        head (`DraftHead`, *optional*): the head that the draft serves with; `None` for its own.
    """

    @torch.no_grad()
    def __init__(self, target, draft, text: Tensor, head: DraftHead | None):
        self._target, self._text = target, text[None].to(target.device)
        self._cache = DynamicCache(config=target.config.get_text_config(decoder=True))
        self._cache.activate_past_recording()
        self._forward(self._text, keep=1)
        self._draft = _context(draft, text, head)
        self._draft.catch_up(0)

    @torch.no_grad()
    def verify(self, n: int) -> float:
        """Time the target's forward of n tokens, in seconds."""
        tokens = self._text[:, -n:]
        start = time.perf_counter()
        self._forward(tokens, keep=n)
        seconds = time.perf_counter() - start
        self._cache.crop(-tokens.shape[1])
        return seconds

    @torch.no_grad()
    def step(self) -> float:
        """Time a draft step, in seconds."""
        return _step(self._draft)

    def _forward(self, tokens: Tensor, keep: int):
        kept = {"logits_to_keep": keep} if self._target._supports_logits_to_keep() else {}
        outputs = self._target(input_ids=tokens, past_key_values=self._cache, use_cache=True, **kept)
        outputs.logits[0, -1].argmax(-1).item()  # waits for the device


def _context(draft, text: Tensor, head: DraftHead | None) -> DraftContext:
    context = DraftContext(draft, text)
    if head is not None:
        context.head, context.model = head.view(draft, text)
    return context


def _step(context: DraftContext) -> float:
    """Time a step after all that was read, in seconds; the context is afterwards as before."""
    token = context.ids[:, -1:]
    start = time.perf_counter()
    context.step(token).likeliest().item()
    seconds = time.perf_counter() - start
    context.crop(0)
    return seconds
